"""The ops as torch sees them: schemas, fakes, torch.compile, and when the dispatcher is passed by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from row_calls import PLAIN, rows_of

import fastalign as fa
from fastalign.ops.gae.op import GaeFwd
from fastalign.ops.kl_estimate.op import KlEstimateFwd
from fastalign.ops.listwise.op import ListTensors, ListwiseFwd
from fastalign.ops.policy import params as policy_params
from fastalign.ops.policy.op import PolicyBwd, PolicyFwd, ValueFwd
from fastalign.ops.policy.params import PolicyParams
from fastalign.ops.preference.op import PairTensors, PairTokens, PreferenceBwd, PreferenceFwd
from fastalign.ops.sequence_sum.op import SequenceSumBwd, SequenceSumFwd
from fastalign.ops.token_stats.contract import (
    RowGradients,
    RowStatesFinish,
    RowStatesMerge,
    ScaleRows,
    TokenStatsBwd,
    TokenStatsFused,
    TokenStatsFwd,
)
from fastalign.runtime import checks, op
from fastalign.runtime.op import OPS
from fastalign.testing import assert_close, make_batch, make_labels, make_logits

ROOT = Path(__file__).resolve().parents[2]


def _op_samples():
    """(op, its arguments one by one)."""
    for name, a in _samples():
        yield name, OPS[name].declaration.flatten(a)


def _policy_samples(batch):
    lp, ref, cu, mask = batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, batch.packed.mask
    one = torch.tensor(0.1)
    gspo = fa.policy_losses.get("gspo").params(advantages_per_sequence=True)
    full = PolicyFwd(
        lp, ref, torch.ones(6), cu, mask, ref, -lp, None, one, one, torch.tensor(6.0), gspo, True
    )
    yield "policy_fwd", full
    plain = PolicyParams(*gspo[: policy_params.SCALAR_COUNT], *[0] * (len(gspo) - policy_params.SCALAR_COUNT))
    yield "policy_fwd", PolicyFwd(lp, None, lp, None, None, None, None, None, None, None, None, plain, False)
    yield "value_fwd", ValueFwd(lp, ref, ref, cu, mask, None, 0.2, 1, 1.0)
    _, slopes, entropy_slopes, stats = OPS["policy_fwd"](full)
    yield "policy_bwd", PolicyBwd(torch.ones(()), slopes, entropy_slopes, stats)


def _row_samples():
    x, labels, ref, ones = (
        make_logits(3, 17),
        make_labels(3, 17).unsqueeze(-1),
        make_logits(3, 17, seed=1),
        torch.ones(3),
    )
    plain, pair = rows_of(x, labels), rows_of(x, labels, ref=ref)
    forward = TokenStatsFwd(plain, 63, None, None)
    state = OPS["token_stats_fwd"](forward)[-2]
    yield "token_stats_fwd", forward
    yield "token_stats_fwd", TokenStatsFwd(rows_of(x, temperature=torch.tensor(0.5)), 2, None, None)
    yield "token_stats_bwd", TokenStatsBwd(plain, state, RowGradients(torch.ones(3, 1)))
    yield "token_stats_bwd_", TokenStatsBwd(rows_of(x.clone(), labels), state, RowGradients(g_entropy=ones))
    both = TokenStatsFwd(pair, 511, None, None)
    *_, state, _ = OPS["token_stats_fwd"](both)
    yield "token_stats_fwd", both
    upstream = RowGradients(torch.ones(3, 1), g_kl_policy_ref=ones, g_kl_ref_policy=ones)
    yield "token_stats_bwd", TokenStatsBwd(pair, state, upstream)
    yield "token_stats_fused", TokenStatsFused(rows_of(x, ref=ref), 128, RowGradients(g_kl_policy_ref=ones))
    yield (
        "token_stats_fused_",
        TokenStatsFused(rows_of(x.clone(), ref=ref), 256, RowGradients(g_kl_ref_policy=ones)),
    )
    yield "scale_rows_", ScaleRows(x.clone(), torch.tensor(0.5))


def _state_samples():
    x, labels, ref = make_logits(3, 17), make_labels(3, 17).unsqueeze(-1), make_logits(3, 17, seed=1)
    cut = [
        rows_of(x[:, lo:hi], labels, ref=ref[:, lo:hi], start=lo, total=17) for lo, hi in ((0, 8), (8, 17))
    ]
    parts = [OPS["token_stats_fwd"](TokenStatsFwd(part, 511, None, None))[-2:] for part in cut]
    states, targets = (
        torch.stack([state for state, _ in parts]),
        torch.stack([target.flatten(0, 1) for _, target in parts]),
    )
    yield "row_states_merge", RowStatesMerge(states, targets)
    yield "row_states_merge", RowStatesMerge(states, None)
    state, target = OPS["row_states_merge"](RowStatesMerge(states, targets))
    options = (PLAIN.factor, 1.0, -100, 17)
    yield "row_states_finish", RowStatesFinish(state, target, labels, None, torch.tensor(0.5), *options, 511)
    yield (
        "row_states_finish",
        RowStatesFinish(state, None, None, torch.ones(3, dtype=torch.bool), None, *options, 130),
    )


def _samples():
    batch = make_batch(3)
    lp, ref, cu, mask = batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, batch.packed.mask
    yield from _row_samples()
    yield "sequence_sum_fwd", SequenceSumFwd(lp, cu, mask, None)
    yield "sequence_sum_bwd", SequenceSumBwd(torch.ones(6), cu, None, None, lp.shape[0])
    yield "kl_estimate_fwd", KlEstimateFwd(lp, ref, 2, True)
    yield "kl_estimate_fwd", KlEstimateFwd(lp, ref, 2, False)
    params = fa.losses.get("dpo").params()
    tokens = PairTokens(lp, ref, cu_seqlens=cu, mask=mask)
    forward = PreferenceFwd(tokens, None, PairTensors(), params, 3, True)
    yield "preference_fwd", forward
    _, _, table, sums = OPS["preference_fwd"](forward)
    yield "preference_bwd", PreferenceBwd(torch.ones(()), tokens, sums, table, params, True)
    yield "gae_fwd", GaeFwd(lp, ref, cu, mask, torch.ones(6), torch.tensor(0.9), None, 0.0, 0.95)
    yield from _policy_samples(batch)
    offsets, given = torch.tensor([0, 2, 6], dtype=torch.int32), ListTensors(num_items=torch.tensor(2.0))
    ranked = fa.losses.get_listwise("rrhf").params()
    yield from _state_samples()
    yield "listwise_fwd", ListwiseFwd(sums.flatten(0, 1), offsets, torch.arange(6.0), given, ranked)


@pytest.mark.parametrize("index", range(len(list(_op_samples()))))
def test_opcheck(index):
    name, args = list(_op_samples())[index]
    torch.library.opcheck(OPS[name].overload, args)


def test_every_op_is_checked():
    assert {name for name, _ in _op_samples()} == set(OPS)


def test_compile_fullgraph():  # H1
    batch = make_batch(3, vocab=40)
    tokens = batch.packed.input_ids.numel()
    hidden, weight = torch.randn(tokens, 8), torch.randn(40, 8)

    def step(hidden, weight, labels, ref, cu, mask, beta):
        logits = hidden @ weight.T
        stats = fa.token_stats(
            logits,
            labels,
            ref_logits=logits.detach() * 0.9,
            outputs=("logprob", "entropy", "kl_policy_ref"),
            softcap=20.0,
            inplace_backward=True,
        )
        exact = fa.token_kl_loss(hidden @ weight.T, logits.detach() * 0.8, torch.full((), 0.01)).loss
        out = fa.preference_loss(stats.logprob, ref, cu, mask=mask, beta=beta)
        ppo = fa.policy_loss(
            stats.logprob,
            ref,
            ref,
            mask=mask,
            ref_logprobs=ref,
            entropy=stats.entropy,
            kl_coef=beta,
            entropy_coef=0.1,
        )
        value = fa.value_loss(stats.entropy, ref, ref, mask=mask)
        kl = fa.sequence_sum(fa.kl_estimate(stats.logprob, ref, "k2"), cu, mask=mask, mean=True)
        offsets, scores = torch.arange(3, device=cu.device) * 3, torch.arange(6, device=cu.device)
        ranked = fa.listwise_loss(stats.logprob, ref, cu, offsets, scores, mask=mask, beta=beta)
        losses = out.loss + ranked.loss + exact + ppo.loss + value.loss + 0.1 * stats.kl_policy_ref.mean()
        return losses + 0.1 * kl.mean() - 0.01 * stats.entropy.mean(), out.margins

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    args = (batch.packed.labels, batch.ref_logprobs, batch.packed.cu_seqlens, batch.packed.mask)
    for beta in (0.1, 0.3):
        results = []
        for f in (step, compiled):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            loss, margins = f(h, w, *args, torch.tensor(beta))
            loss.backward()
            results.append((loss.detach(), margins, h.grad, w.grad))
        for a, b in zip(*results):
            assert_close(a, b.double(), scale=20.0 * max(1.0, float(b.abs().max())))


def test_no_recompilation_over_lengths():  # H2
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(lp, ref, cu, mask, offsets, scores):
        ranked = fa.listwise_loss(lp, ref, cu, offsets, scores, mask=mask, loss="rrhf")
        return fa.preference_loss(lp, ref, cu, mask=mask).loss + ranked.loss

    for seed in range(12):
        batch = make_batch(2 + seed % 5, seed=seed)
        count = batch.packed.cu_seqlens.shape[0] - 1
        lists = torch.tensor([*range(seed % 3 + 1), count]), torch.rand(count)
        step(
            batch.logprobs.requires_grad_(),
            batch.ref_logprobs,
            batch.packed.cu_seqlens,
            batch.packed.mask,
            *lists,
        )
    assert counter.frame_count <= 2


def _small_loss():
    lp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    return fa.preference_loss(lp, lp.detach(), torch.tensor([0, 1, 3], dtype=torch.int32)).loss


def test_the_dispatcher_is_passed_by_where_nobody_listens(monkeypatch):
    def refuse(*args):
        raise AssertionError("through the dispatcher")

    for name in ("preference_fwd", "preference_bwd"):
        monkeypatch.setattr(OPS[name], "overload", refuse)
    _small_loss().backward()


def test_who_listens_sees_the_ops():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        _small_loss()
    assert "fastalign.preference_fwd.default" in seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _small_loss().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastalign::preference_fwd", "fastalign::preference_bwd"} <= names


def test_tensor_subclasses_reach_the_dispatcher():
    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    seen = []
    cu = torch.tensor([0, 2], dtype=torch.int32)
    OPS["sequence_sum_fwd"](SequenceSumFwd(torch.ones(2).as_subclass(Tagged), cu, None, None))
    assert any("sequence_sum_fwd" in name for name in seen)


def test_transforms_are_not_passed_by():
    x, cu = torch.arange(6.0).view(3, 2), torch.tensor([0, 2], dtype=torch.int32)
    sums = torch.vmap(lambda row: OPS["sequence_sum_fwd"](SequenceSumFwd(row, cu, None, None))[0])(x)
    assert sums.flatten().tolist() == [1.0, 5.0, 9.0]


def test_a_trace_holds_the_op():
    cu = torch.tensor([0, 2], dtype=torch.int32)
    traced = torch.jit.trace(
        lambda x: OPS["sequence_sum_fwd"](SequenceSumFwd(x, cu, None, None))[0], torch.ones(2)
    )
    assert float(traced(torch.tensor([3.0, 4.0]))) == 7.0


def test_without_torchs_private_names_all_goes_through_the_dispatcher(monkeypatch):
    monkeypatch.setattr(op, "_can_tell", False)
    monkeypatch.setattr(
        OPS["preference_fwd"], "overload", lambda *args: (_ for _ in ()).throw(KeyError("dispatched"))
    )
    with pytest.raises(KeyError, match="dispatched"):
        _small_loss()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_are_looked_at_whatever_their_layout(dtype):
    """The quick look in C++ and torch's own agree, also on what only torch can read."""
    x = torch.ones(4)
    for offsets, words in (
        ([0, 2, 4], None),
        ([0, 3, 2, 4], "decreases at position 2"),
        ([1, 4], "must start at 0"),
        ([0, 3], "must start at 0"),
    ):
        wide = torch.full((len(offsets), 2), -7, dtype=dtype)
        wide[:, 0] = torch.tensor(offsets, dtype=dtype)
        for cu in (wide[:, 0], wide[:, 0].clone()):
            if words is None:
                assert fa.sequence_sum(x, cu).tolist() == [2.0, 2.0]
                checks.check_cu_seqlens_values(cu, 4)
                continue
            for call in (fa.sequence_sum, lambda x, cu: checks.check_cu_seqlens_values(cu, 4)):
                with pytest.raises(ValueError, match=words):
                    call(x, cu)
