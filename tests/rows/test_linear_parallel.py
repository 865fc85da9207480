"""The fused head on several ranks (gloo): a vocabulary in parts, a weight in shards, rows that only some
ranks have."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import fastalign as fa

ROWS, WIDTH, VOCAB = 61, 16, 400
OUTPUTS = ("logprob", "entropy", "kl_policy_ref", "is_top1")
BUDGETS = (None, 130 * VOCAB * 4, 3000)


def make():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH), torch.randn(VOCAB)
    ref = torch.randn(ROWS, 5), torch.randn(VOCAB, 5)
    labels = torch.randint(VOCAB, (ROWS,))
    labels[:8] = torch.tensor([0, 99, 100, 199, 200, 299, 300, 399])  # every edge of 2 and 4 shards
    labels[8::5] = -100
    labels[9:14] = 7  # a stretch that the later shards hold nothing of
    return hidden, weight, bias, ref, labels


def loss_of(hidden, weight, bias, ref, labels, **options):
    """Everything that must be equal, and the gradients."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    hidden = hidden.clone().requires_grad_()
    out = fa.linear_token_stats(
        hidden, weight, labels, bias=bias, ref_hidden=ref[0], ref_weight=ref[1], outputs=OUTPUTS, **options
    )
    total = (
        (out.logprob * torch.linspace(-1, 1, len(labels))).sum()
        + out.entropy.sum()
        + 0.3 * out.kl_policy_ref.sum()
    )
    total.backward()
    return [getattr(out, n).detach() for n in OUTPUTS], hidden.grad, weight.grad, bias.grad


def kept_of(hidden, weight, bias, labels, **options):
    """Of a support that every rank has some tokens of, one row NaN and masked."""
    indices = torch.cat(
        [labels.clamp(0).unsqueeze(-1), torch.arange(ROWS * 4).view(ROWS, 4) * 37 % VOCAB], -1
    )
    indices[::3, 2] = -1
    mask = torch.arange(ROWS) != 11
    leaves = [
        x.clone().requires_grad_()
        for x in (hidden.masked_fill(~mask.unsqueeze(-1), float("nan")), weight, bias)
    ]
    out = fa.logprobs_at(
        leaves[0],
        leaves[1],
        indices,
        labels,
        bias=leaves[2],
        mask=mask,
        with_mass=True,
        softcap=9.0,
        **options,
    )
    total = (out.logprobs * torch.linspace(-1, 1, 5)).sum() + out.label_logprob.sum() + out.log_mass.sum()
    return [x.detach() for x in out], *torch.autograd.grad(total, leaves)


def vocabulary_parallel(rank, world, group):
    hidden, weight, bias, ref, labels = make()
    part = slice(rank * VOCAB // world, (rank + 1) * VOCAB // world)
    own = (hidden, weight[part], bias[part], (ref[0], ref[1][part]), labels)
    found = {}
    for invariant in (False, True):
        for budget in BUDGETS:
            options = {"batch_invariant": invariant, "workspace_bytes": budget, "tp_group": group}
            found[invariant, budget] = loss_of(*own, **options)
    cu = torch.tensor([0, 15, 30, 40, ROWS], dtype=torch.int32)
    leaves = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_()
    for frozen in (False, True):
        given = leaves[0], leaves[1].detach() if frozen else leaves[1]
        out = fa.linear_preference_loss(
            *given, labels, cu, ref_hidden=ref[0], ref_weight=ref[1][part], tp_group=group
        )
        grads = torch.autograd.grad(out.loss, leaves[: 1 if frozen else 2])
        found["dpo", frozen] = ([out.loss.detach()], grads[0], grads[1] if not frozen else None, None)
    lone = fa.linear_token_logprobs(leaves[0], leaves[1].detach(), labels, tp_group=group)
    found["frozen"] = ([lone.detach()], torch.autograd.grad(lone.sum(), leaves[0])[0], None, None)
    for counts in (True, False):
        found["kept", counts] = kept_of(
            hidden, weight[part], bias[part], labels, host_counts=counts, tp_group=group
        )
    empty = loss_of(
        hidden[:0], weight[part], bias[part], (ref[0][:0], ref[1][part]), labels[:0], tp_group=group
    )
    assert not empty[2].any() and empty[1].shape == (0, WIDTH)
    return found


def sharded_weight(rank, world, mesh):
    """As FSDP2 leaves a parameter outside of its module: each rank has a shard and rows of its own, the last
    none."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import Replicate, Shard

    hidden, weight, bias, _, labels = make()
    own = slice(*[0, 17, ROWS, ROWS][rank : rank + 2])
    found = {}
    for frozen in (False, True):
        shards = [
            distribute_tensor(x, mesh, [p]).requires_grad_(not frozen)
            for x, p in ((weight, Shard(0)), (bias, Replicate()))
        ]
        rows = hidden[own].clone().requires_grad_()
        weights = torch.linspace(-1, 1, ROWS)[own]
        out = fa.linear_token_logprobs(rows, shards[0], labels[own], bias=shards[1])
        (out * weights).sum().backward()
        grads = [None if x.grad is None else x.grad.full_tensor() for x in shards]
        found[frozen] = ([out.detach()], rows.grad, *grads)
        rows.grad = shards[0].grad = shards[1].grad = None
        kept = fa.logprobs_at(
            rows,
            shards[0],
            labels[own].clamp(0).unsqueeze(-1).repeat(1, 2) + torch.tensor([0, -1]),
            bias=shards[1],
        )
        (kept.logprobs[:, 0] * weights).sum().backward()
        grads = [None if x.grad is None else x.grad.full_tensor() for x in shards]
        found["kept", frozen] = ([kept.logprobs.detach()], rows.grad, *grads)
    with pytest.raises(ValueError, match="weight is a DTensor of placements"):
        fa.linear_token_logprobs(hidden, distribute_tensor(weight, mesh, [Shard(1)]), labels)
    return found


def inside_fsdp(rank, world, mesh):
    """The head used inside of the module that the engine wraps: it gathers, reduces and averages itself."""
    from torch.distributed.fsdp import fully_shard

    hidden, weight, bias, _, labels = make()
    model = WithHead(weight, bias)
    fully_shard(model, mesh=mesh)
    own = slice(*[0, 17, ROWS][rank : rank + 2])
    loss = model(hidden[own], labels[own], torch.linspace(-1, 1, ROWS)[own])
    loss.backward()
    return {
        "fsdp": (
            [loss.detach()],
            None,
            *(p.grad.full_tensor() * world for p in (model.head.weight, model.head.bias)),
        )
    }


class WithHead(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.head = torch.nn.Linear(WIDTH, VOCAB)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def forward(self, hidden, labels, weights):
        return (
            fa.linear_token_logprobs(hidden, self.head.weight, labels, bias=self.head.bias) * weights
        ).sum()


def _work(rank):
    from torch.distributed.device_mesh import DeviceMesh

    groups = {world: dist.new_group(range(world)) for world in (2, 4)}
    meshes = {world: DeviceMesh("cpu", list(range(world))) for world in (2, 3)}
    found = {}
    for name, work, world, where in (
        ("vocabulary 2", vocabulary_parallel, 2, groups[2]),
        ("vocabulary 4", vocabulary_parallel, 4, groups[4]),
        ("sharded", sharded_weight, 3, meshes[3]),
        ("fsdp", inside_fsdp, 2, meshes[2]),
    ):
        if rank < world:
            found[name] = work(rank, world, where)
    return found


@pytest.fixture(scope="module")
def ranks():
    """What four processes found, each of them."""
    return on_ranks(4, _work)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_parallel(ranks, world):  # G6
    """Results of one rank, with the same bits on every rank; batch-invariant ones with the bits of one
    rank."""
    hidden, weight, bias, ref, labels = make()
    ranks = [rank[f"vocabulary {world}"] for rank in ranks[:world]]
    for invariant in (False, True):
        for budget in BUDGETS:
            want = loss_of(
                hidden, weight, bias, ref, labels, batch_invariant=invariant, workspace_bytes=budget
            )
            got = [rank[invariant, budget] for rank in ranks]
            for rank in got:
                assert all(torch.equal(a, b) for a, b in zip(rank[0], got[0][0])) and torch.equal(
                    rank[1], got[0][1]
                )
                for a, b in zip(rank[0], want[0]):
                    assert torch.equal(a, b) if invariant else close(a, b) is None
            close(got[0][1], want[1])
            close(torch.cat([rank[2] for rank in got]), want[2])
            close(torch.cat([rank[3] for rank in got]), want[3])
    cu = torch.tensor([0, 15, 30, 40, ROWS], dtype=torch.int32)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fa.linear_preference_loss(*leaves, labels, cu, ref_hidden=ref[0], ref_weight=ref[1])
    grads = torch.autograd.grad(out.loss, leaves)
    for rank in ranks:
        for frozen in (False, True):
            close(rank["dpo", frozen][0][0], out.loss.detach())
            close(rank["dpo", frozen][1], grads[0])
    close(torch.cat([rank["dpo", False][2] for rank in ranks]), grads[1])
    want = kept_of(hidden, weight, bias, labels)
    for counts in (True, False):
        got = [rank["kept", counts] for rank in ranks]
        for rank in got:
            assert all(torch.equal(a, b) for a, b in zip(rank[0], got[0][0])) and torch.equal(
                rank[1], got[0][1]
            )
            for a, b in zip((*rank[0], rank[1]), (*want[0], want[1])):
                close(a, b)
        for i in (2, 3):
            close(torch.cat([rank[i] for rank in got]), want[i])
    lone = fa.linear_token_logprobs(leaves[0], weight, labels)
    for rank in ranks:
        close(rank["frozen"][0][0], lone.detach())
        close(rank["frozen"][1], torch.autograd.grad(lone.sum(), leaves[0], retain_graph=True)[0])


def test_sharded_weight(ranks):  # G2
    """The last of the three ranks has no row at all, and takes part."""
    hidden, weight, bias, _, labels = make()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = fa.linear_token_logprobs(leaves[0], leaves[1], labels, bias=leaves[2])
    want = torch.autograd.grad((out * torch.linspace(-1, 1, ROWS)).sum(), leaves)
    ranks = [rank["sharded"] for rank in ranks[:3]]
    for frozen in (False, True):
        close(torch.cat([rank[frozen][0][0] for rank in ranks]), out.detach())
        close(torch.cat([rank[frozen][1] for rank in ranks]), want[0])
        for rank in ranks:
            for got, truth in zip(rank[frozen][2:], want[1:]):
                assert got is None if frozen else close(got, truth) is None


def test_kept_tokens_of_a_sharded_weight(ranks):
    """Of a support of each label and the token before it (that of label 0 has no other)."""
    hidden, weight, bias, _, labels = make()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    indices = labels.clamp(0).unsqueeze(-1).repeat(1, 2) + torch.tensor([0, -1])
    logits = (
        (leaves[0] @ leaves[1].t() + leaves[2])
        .gather(-1, indices.clamp(0))
        .masked_fill(indices < 0, float("-inf"))
    )
    out = torch.log_softmax(logits, -1).masked_fill(indices < 0, 0.0)
    want = torch.autograd.grad((out[:, 0] * torch.linspace(-1, 1, ROWS)).sum(), leaves)
    ranks = [rank["sharded"] for rank in ranks[:3]]
    for frozen in (False, True):
        close(torch.cat([rank["kept", frozen][0][0] for rank in ranks]), out.detach())
        close(torch.cat([rank["kept", frozen][1] for rank in ranks]), want[0])
        for rank in ranks:
            for got, truth in zip(rank["kept", frozen][2:], want[1:]):
                assert got is None if frozen else close(got, truth) is None


def test_inside_a_wrapped_module(ranks):  # G1
    hidden, weight, bias, _, labels = make()
    model = WithHead(weight, bias)
    loss = model(hidden, labels, torch.linspace(-1, 1, ROWS))
    loss.backward()
    ranks = [rank["fsdp"] for rank in ranks[:2]]
    close(sum(rank["fsdp"][0][0] for rank in ranks), loss.detach())
    for rank in ranks:
        close(rank["fsdp"][2], model.head.weight.grad)
        close(rank["fsdp"][3], model.head.bias.grad)
