"""torch.compile and torch.export of what is more than one op: mixtures, sorted order, rules with a memory,
several losses in one graph."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import fastalign as fa
from fastalign.runtime.function import Function


def _batch(sequences, length, seed=0):
    """(logprobs, ref, cu_seqlens, mask) of so many sequences of one length."""
    g = torch.Generator().manual_seed(seed)
    tokens = sequences * length
    logprobs, ref = -torch.rand(2, tokens, generator=g)
    return (
        logprobs,
        ref,
        torch.arange(0, tokens + 1, length, dtype=torch.int32),
        torch.rand(tokens, generator=g) < 0.8,
    )


BATCHES = [_batch(*shape, seed) for seed, shape in enumerate(((6, 5), (8, 7), (10, 4)))]


def _as_eager(make, through="eager", free=1):
    """Values and gradients are those of eager on batches of different sizes; what was compiled by batch
    `free` serves all that follow."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(through)
    eager, compiled = make(), torch.compile(make(), fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for logprobs, *rest in BATCHES:
        results = []
        for step in (eager, compiled):
            x = logprobs.clone().requires_grad_()
            loss = step(x, *rest)
            loss.backward()
            results.append((loss.detach(), x.grad))
        for a, b in zip(*results):
            assert torch.equal(a, b)
        assert results[0][1].abs().sum() > 0
        graphs.append(counter.frame_count)
    assert graphs[free - 1] == graphs[-1] > 0, f"graphs after each batch: {graphs}"


def _preference(**options):
    def step(logprobs, ref, cu, mask):
        return fa.preference_loss(logprobs, ref, cu, mask=mask, **options).loss

    return step


MIXTURE = [("dpo", 1.0), ("sft", 0.5), ("simpo", 0.25)]


def test_mixture():
    _as_eager(lambda: _preference(loss=MIXTURE), "aot_eager")


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted(name):
    _as_eager(lambda: _preference(loss=name))


RULES = {
    "alpha_dpo": lambda: fa.AlphaDPO(momentum=0.5),
    "bco": lambda: fa.BCODelta(),
    "beta_dpo": lambda: fa.BetaDPO(filter=0.4, seed=3),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_with_a_memory(name):
    """One graph for the empty memory, one for the filled; the memory is that of eager."""
    rules = []

    def make():
        rules.append(RULES[name]())
        return _preference(loss=name, state=rules[-1])

    _as_eager(make, free=2)
    first, second = (r.state_dict() for r in rules)
    assert first.keys() == second.keys() and first.get("steps", 3) == second.get("steps", 3) == 3
    for key in first.keys() - {"steps"}:
        assert torch.equal(first[key], second[key]) and first[key] != 0


def test_unpaired_rule():
    def make():
        state = fa.BCODelta(momentum=0.5)

        def step(logprobs, ref, cu, mask):
            return fa.unpaired_loss(
                logprobs, ref, cu, torch.arange(cu.shape[0] - 1) % 3 == 0, loss="bco", state=state, mask=mask
            ).loss

        return step

    _as_eager(make, free=2)


def test_mixture_with_a_rule_and_sorted_order():
    _as_eager(lambda: _preference(loss=[("alpha_dpo", 1.0), ("aot", 0.5)], state=fa.AlphaDPO()), free=2)


def test_wpo_weights_of_pairs():
    def step(logprobs, ref, cu, mask):
        pairs = torch.arange(cu.shape[0] - 1).view(-1, 2).flip(0)
        omega = fa.wpo_weights(logprobs, 0.5 * ref, cu, mask=mask, pairs=pairs, clamp=None)
        return fa.preference_loss(logprobs, ref, cu, mask=mask, loss="wpo", omega=omega, pairs=pairs).loss

    _as_eager(lambda: step)


def _all_losses(logprobs, ref, cu, mask):
    sequences = cu.shape[0] - 1
    per_sequence, numbers = ref[:sequences], torch.arange(sequences)
    offsets, desirable = torch.arange(0, sequences + 1, 2), numbers % 3 == 0
    sums = fa.sequence_sum(logprobs, cu, mask=mask)
    return (
        fa.preference_loss(logprobs, ref, cu, mask=mask).loss
        + fa.preference_loss_from_sums(sums[::2], sums[1::2], loss="slic_hf").loss
        + fa.unpaired_loss(logprobs, ref, cu, desirable, loss="apo_zero_unpaired", mask=mask).loss
        + fa.unpaired_loss(
            logprobs, ref, cu, desirable, loss="dro", mask=mask, rewards=per_sequence, values=-per_sequence
        ).loss
        + fa.listwise_loss(logprobs, ref, cu, offsets, numbers, mask=mask).loss
        + fa.reward_loss(sums[::2], sums[1::2]).loss
        + fa.kwise_reward_loss(sums, offsets, numbers).loss
        + fa.policy_loss(logprobs, ref, ref, mask=mask).loss
        + fa.policy_loss(logprobs, ref, per_sequence, loss="gspo", cu_seqlens=cu, mask=mask).loss
        + fa.value_loss(logprobs, ref, -ref, mask=mask).loss
        + fa.kl_estimate(logprobs, ref, "k3").sum()
        + fa.gae(ref, logprobs.detach(), cu, mask=mask).advantages.mean() * sums.mean()
    )


def test_every_loss_twice_in_one_graph():
    """The floats of a preset that two losses share are read once, where both can see them."""
    _as_eager(lambda: lambda logprobs, *rest: _all_losses(logprobs, *rest) + _all_losses(2 * logprobs, *rest))


class _Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(6, 11)

    def forward(self, hidden, labels, ref, cu, mask):
        logits = self.head(hidden)
        logprobs = fa.token_logprobs(logits, labels)
        stats = fa.token_stats(
            logits, labels, ref_logits=logits * 0.9, outputs=("entropy", "kl_policy_ref", "log_sum_sq_probs")
        )
        omega = fa.wpo_weights(
            logprobs, stats.log_sum_sq_probs, cu, mask=mask, pairs=torch.arange(cu.shape[0] - 1).view(-1, 2)
        )
        exact = fa.token_kl_loss(logits * 1.0, logits.detach() * 0.9, torch.full((), 0.1)).loss
        mixed = fa.preference_loss(logprobs, ref, cu, mask=mask, loss=MIXTURE).loss
        return (logprobs, stats.entropy, stats.kl_policy_ref, omega, exact, mixed, *fa.gae(ref, logprobs.detach(), cu, mask=mask)[:2],
                _all_losses(logprobs, ref, cu, mask))  # fmt: skip


def test_export_with_any_number_of_tokens_and_sequences():
    def inputs(sequences, length):
        _, ref, cu, mask = _batch(sequences, length)
        return torch.randn(len(ref), 6), torch.arange(len(ref)) % 11, ref, cu, mask

    tokens = {0: Dim("tokens", min=8)}
    model = _Head()
    program = export(
        model, inputs(6, 5), dynamic_shapes=(tokens, tokens, tokens, {0: Dim.AUTO}, tokens), strict=False
    )
    for shape in ((8, 7), (4, 3)):
        batch = inputs(*shape)
        want, got = model(*batch), program.module()(*batch)
        assert len(want) == len(got) == 9
        for a, b in zip(want, got):
            assert torch.equal(a, b) and a.numel()


def test_an_exported_program_refuses_derivatives():
    """Its graph holds the bare ops; without a word the loss would have no gradient."""
    model = _Head()
    _, ref, cu, mask = _batch(6, 5)
    batch = torch.randn(30, 6), torch.arange(30) % 11, ref, cu, mask
    loss = export(model, batch, strict=False).module()(*batch)[-1]
    with pytest.raises(
        RuntimeError,
        match="has no derivative by itself: differentiate fastalign's functions.*torch.compile is for training",
    ):
        loss.backward()


HEAD_CALLS = {
    "keep": lambda h, w, y, cu: fa.linear_token_stats(h, w, y, outputs=("logprob", "entropy")).logprob.sum(),
    "tiles": lambda h, w, y, cu: fa.linear_token_stats(
        h, w, y, outputs=("logprob", "entropy"), workspace_bytes=500
    ).entropy.sum(),
    "frozen": lambda h, w, y, cu: fa.linear_token_logprobs(h, w.detach(), y).sum(),
    "pairs": lambda h, w, y, cu: fa.linear_preference_loss(h, w, y, cu, ref_logprobs=torch.zeros(12)).loss,
    "policy": lambda h, w, y, cu: fa.linear_policy_loss(h, w, y, torch.zeros(12) - 4, torch.ones(12)).loss,
    "kl": lambda h, w, y, cu: (
        fa.linear_token_kl_loss(h, w, h.detach(), w.detach() * 1.1, torch.tensor(0.5)).loss
    ),
}


@pytest.mark.parametrize(
    ("name", "fullgraph"),
    [("keep", True), ("tiles", False), ("frozen", True), ("pairs", True), ("policy", False), ("kl", True)],
)
def test_fused_head_in_a_graph(name, fullgraph):
    """Also as a part of a graph that breaks elsewhere: backward then runs outside of any."""
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    labels, cu = torch.randint(37, (12,)), torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
    labels[3] = -100

    def call(*given):
        if not fullgraph:
            torch._dynamo.graph_break()
        return HEAD_CALLS[name](*given)

    torch._dynamo.reset()
    want = HEAD_CALLS[name](hidden, weight, labels, cu)
    got = torch.compile(call, backend="aot_eager", fullgraph=fullgraph)(hidden, weight, labels, cu)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight), allow_unused=True) for x in (got, want))):
        assert (a is None) == (b is None) and (a is None or torch.testing.assert_close(a, b) is None)


class Broken(Function):
    """A function that the compiler cannot take as a whole: its parts are compiled, its backward runs eagerly."""

    names = "broken"

    @staticmethod
    def forward(ctx, x):
        torch._dynamo.graph_break()
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_backward_of_a_forward_that_was_compiled_in_parts():
    torch._dynamo.reset()
    x = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda x: Broken.apply(x + 1).sum(), backend="eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.full((3,), 2.0))
