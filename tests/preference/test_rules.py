"""Rules that look at the whole batch, sorted order and mixtures: against loops, stop-gradient, state,
evaluation mode, one and many pairs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import fastalign as fa
from fastalign import losses
from fastalign.preference import rules
from fastalign.testing import gradient, make_batch


def call(batch, lp=None, **options):
    lp = batch.logprobs if lp is None else lp
    return fa.preference_loss(
        lp, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, **options
    )


def margins(batch):
    out = call(batch, beta=1.0)
    return out.chosen_rewards - out.rejected_rewards


def batches(count=4, pairs=8):
    return [make_batch(pairs, dtype=torch.float64, seed=s, noise=0.5) for s in range(count)]


# --- beta-DPO -----------------------------------------------------------------------------------------------


def test_beta_dpo_against_a_loop():
    rule = fa.BetaDPO(alpha=0.6, filter=0.0, momentum=0.9)
    mean = std = 0.0
    for k, batch in enumerate(batches(), 1):
        m = margins(batch)
        mean, std = 0.9 * mean + 0.1 * m.mean(), 0.9 * std + 0.1 * m.std()
        beta = max(0.1 * (1 + 0.6 * float(m.mean() - mean / (1 - 0.9**k))), 1e-3)
        lp = batch.logprobs.clone().requires_grad_()
        out = call(batch, lp, loss="beta_dpo", state=rule)
        plain = batch.logprobs.clone().requires_grad_()
        want = call(batch, plain, loss="dpo", beta=beta)
        assert abs(float(out.loss - want.loss)) < 1e-10
        # beta_batch depends on the log-probs, but is a constant of the loss
        assert float((gradient(out.loss, lp) - gradient(want.loss, plain)).abs().max()) < 1e-10
    assert abs(float(rule.memory["std"] - std)) < 1e-10 and rule.memory["steps"] == 4


def test_beta_dpo_filter():
    rule = fa.BetaDPO(filter=0.25, seed=3)
    batch = batches(1)[0]
    out = call(batch, loss="beta_dpo", state=rule)
    assert int(out.valid.sum()) == 6  # floor(0.75 * 8)
    again = fa.BetaDPO(filter=0.25, seed=3)
    assert torch.equal(call(batch, loss="beta_dpo", state=again).valid, out.valid)
    kept = torch.zeros(8)
    for seed in range(400):
        kept += call(batch, loss="beta_dpo", state=fa.BetaDPO(filter=0.25, seed=seed)).valid
    m = margins(batch)
    distance = (m - m.mean()).abs()
    assert kept[distance.argmin()] > kept[distance.argmax()]  # pairs near the mean margin are kept more often
    with pytest.raises(ValueError, match="filter"):
        fa.BetaDPO(filter=1.0)


def test_step_zero_and_a_single_pair():
    for rule, name in ((fa.BetaDPO(), "beta_dpo"), (fa.AlphaDPO(), "alpha_dpo"), (fa.BCODelta(), "bco")):
        batch = make_batch(1)
        for same in (batch, batch._replace(ref_logprobs=batch.logprobs)):
            assert bool(torch.isfinite(call(same, loss=name, state=rule).loss)), name
    many = make_batch(6)
    many = many._replace(ref_logprobs=many.logprobs)  # standard deviation 0
    out = call(many, loss="beta_dpo", state=fa.BetaDPO())
    assert abs(float(out.loss) - math.log(2)) < 1e-6 and int(out.valid.sum()) == 4
    assert bool(torch.isfinite(call(many, loss="alpha_dpo", state=fa.AlphaDPO()).loss))


def test_evaluation_reads_and_does_not_write():
    for rule, name in ((fa.BetaDPO(), "beta_dpo"), (fa.AlphaDPO(), "alpha_dpo"), (fa.BCODelta(), "bco")):
        for batch in batches(2):
            call(batch, loss=name, state=rule)
        before = rule.state_dict()
        rule.eval()
        values = [float(call(batch, loss=name, state=rule).loss) for batch in batches(2)]
        assert all(
            torch.equal(torch.as_tensor(before[k]), torch.as_tensor(rule.state_dict()[k])) for k in before
        ), name
        fresh = type(rule)()
        fresh.load_state_dict(before)
        fresh.eval()
        assert values == [float(call(batch, loss=name, state=fresh).loss) for batch in batches(2)]
        with pytest.raises(ValueError, match="state has entries"):
            fresh.load_state_dict({"nonsense": 1})


# --- alpha-DPO, BCO -----------------------------------------------------------------------------------------


def test_alpha_dpo_against_a_loop():
    rule, mean, std = fa.AlphaDPO(alpha=0.2), 0.0, 0.0
    for k, batch in enumerate(batches(), 1):
        cu, mask = batch.packed.cu_seqlens.tolist(), batch.packed.mask
        means = {}
        for name, x in (("p", batch.logprobs), ("r", batch.ref_logprobs)):
            values = torch.stack([x[a:b][mask[a:b]].mean() for a, b in zip(cu, cu[1:])])
            means[name] = values[::2] - values[1::2]
        gap = means["p"] - means["r"]
        mean, std = 0.9 * mean + 0.1 * gap.mean(), 0.9 * std + 0.1 * gap.std()
        z = (gap - mean / (1 - 0.9**k)) / (std / (1 - 0.9**k))
        want = -torch.nn.functional.logsigmoid(2.5 * (means["p"] - (0.2 * z + 0.3))).mean()
        assert abs(float(call(batch, loss="alpha_dpo", state=rule).loss - want)) < 1e-10


@pytest.mark.parametrize("momentum", [None, 0.8])
def test_bco_running_delta(momentum):
    rule, seen, running = fa.BCODelta(momentum=momentum), [], None
    for batch in batches():
        out = call(batch, beta=0.01)
        rewards = torch.cat([out.chosen_rewards, out.rejected_rewards])
        seen.append(rewards)
        running = rewards.mean() if running is None else 0.8 * running + 0.2 * rewards.mean()
        delta = float(torch.cat(seen).mean() if momentum is None else running)
        got, want = call(batch, loss="bco", state=rule).loss, call(batch, loss="bco_pair", delta=delta).loss
        assert abs(float(got - want)) < 1e-10


@pytest.mark.parametrize(
    "name,rule", [("beta_dpo", fa.BetaDPO), ("alpha_dpo", fa.AlphaDPO), ("bco", fa.BCODelta)]
)
@pytest.mark.parametrize("spoiled", [math.nan, -math.inf])
def test_memory_takes_only_finite_pairs(name, rule, spoiled):
    good, state = batches(1)[0], rule()
    lp = good.logprobs.clone()
    lp[: int(good.packed.cu_seqlens[1])] = spoiled
    dropped = call(good, lp, loss=name, state=state, nonfinite="drop")
    assert math.isfinite(float(dropped.loss)) and float(dropped.loss) != 0
    assert all(math.isfinite(float(v)) for v in state.state_dict().values())
    assert math.isfinite(float(call(good, loss=name, state=state).loss))
    assert not math.isfinite(float(call(good, lp, loss=name, state=rule()).loss))  # propagated


@pytest.mark.parametrize(
    "name,rule", [("beta_dpo", fa.BetaDPO), ("alpha_dpo", fa.AlphaDPO), ("bco", fa.BCODelta)]
)
def test_a_batch_without_usable_pairs_leaves_the_averages_alone(name, rule):
    good, state = batches(1)[0], rule()
    call(good, loss=name, state=state)
    before, used = state.state_dict(), state.used
    call(good, torch.full_like(good.logprobs, math.nan), loss=name, state=state, nonfinite="drop")
    for key in ("mean", "std"):
        if key in before:
            correct = [
                float(memory[key]) / (1 - 0.9 ** memory.get("steps", math.inf))
                for memory in (before, state.state_dict())
            ]
            assert correct[0] == pytest.approx(correct[1], rel=1e-12)
    assert all(math.isfinite(float(v.double().sum())) for v in used.values())


def test_memory_takes_only_finite_differences():
    """Both log-ratios are finite and their difference, or the reward, is not."""
    for name, rule, options in (("beta_dpo", fa.BetaDPO(), {}), ("bco", fa.BCODelta(), {"beta": 4.0})):
        sums = torch.zeros(3, 2, 3)
        sums[..., 2] = 1.0
        sums[0, 0, :2], sums[0, 1, :2] = 3e38, -3e38
        values = rules.PairValues(sums, torch.ones(3, dtype=torch.bool), options.get("beta", 0.1))
        rule(None, values)
        assert all(math.isfinite(float(v)) for v in rule.state_dict().values()), name


def test_damaged_memory_is_refused():
    for rule in (fa.BetaDPO(), fa.AlphaDPO(), fa.BCODelta()):
        call(make_batch(3), loss=rule.rule, state=rule)
        whole = rule.state_dict()
        for key in whole:
            for bad in (
                torch.tensor(math.nan),
                torch.tensor(math.inf),
                torch.ones(2),
                torch.tensor(1),
                "x",
                1.5,
                -1,
            ):
                with pytest.raises((ValueError, TypeError), match=key):
                    rule.load_state_dict({**whole, key: bad})
        for bad in (None, [], {}, {**whole, "more": 1}):
            with pytest.raises(ValueError, match="legal: "):
                rule.load_state_dict(bad)
        rule.load_state_dict(whole)
    for bad in (2**64, 1.5, True, "x"):
        with pytest.raises((ValueError, TypeError), match="seed"):
            fa.BetaDPO(seed=bad)


def test_state_is_required_and_checked():
    batch = make_batch(3)
    for words, options in (
        ("needs state=", {"loss": "beta_dpo"}),
        ("needs state=", {"loss": "beta_dpo", "state": fa.AlphaDPO()}),
        ("no loss of this call uses", {"loss": "dpo", "state": fa.AlphaDPO()}),
        ("needs omega", {"loss": "wpo"}),
        ("anchor comes from the rule", {"loss": "bco", "state": fa.BCODelta(), "anchor": torch.tensor(0.1)}),
    ):
        with pytest.raises(ValueError, match=words):
            call(batch, **options)
    with pytest.raises(TypeError, match="must be a rule object"):
        call(batch, loss="beta_dpo", state={})


# --- WPO, AOT -----------------------------------------------------------------------------------------------


def test_wpo_weights_against_a_loop():
    torch.manual_seed(0)
    logits = torch.randn(9, 20, dtype=torch.float64)
    packed = fa.pack([[1, 2, 3, 4], [1, 2], [5, 6, 7]], [[0, 1, 1, 1], [0, 1], [0, 0, 1]])
    stats = fa.token_stats(logits, packed.labels, outputs=("logprob", "log_sum_sq_probs"))
    pairs = torch.tensor([[0, 1], [2, 1], [2, 2]])
    got = fa.wpo_weights(
        stats.logprob, stats.log_sum_sq_probs, packed.cu_seqlens, mask=packed.mask, pairs=pairs, clamp=None
    )
    p = torch.softmax(logits, -1)
    v = []
    for a, b in ((0, 4), (4, 6), (6, 9)):
        rows = [t for t in range(a, b) if packed.mask[t]]
        v.append(
            sum(float(torch.log(p[t, packed.labels[t]]) - torch.log((p[t] ** 2).sum())) for t in rows)
            / len(rows)
        )
    want = torch.tensor([math.exp(v[a] + v[b]) for a, b in pairs.tolist()], dtype=torch.float64)
    assert float((got - want).abs().max()) < 1e-10
    clamped = fa.wpo_weights(
        stats.logprob, stats.log_sum_sq_probs, packed.cu_seqlens, mask=packed.mask, pairs=pairs
    )
    assert torch.equal(clamped, got.clamp(max=1.0))


def test_aot_ties_invalid_pairs_and_one_pair():
    batch = make_batch(5, dtype=torch.float64)
    one = make_batch(1, dtype=torch.float64)
    assert abs(float(call(one, loss="aot").loss - call(one, loss="dpo", beta=0.01).loss)) < 1e-12
    tied = batch._replace(ref_logprobs=batch.logprobs)
    lp = tied.logprobs.clone().requires_grad_()
    assert bool(torch.isfinite(gradient(call(tied, lp, loss="aot_unpaired").loss, lp)).all())
    keep = torch.tensor([True, False, True, True, False])
    few = [i for i, k in enumerate(keep.tolist()) if k]
    for name in ("aot", "aot_unpaired"):
        got = call(batch, loss=name, valid=keep)
        subset = torch.tensor([[2 * i, 2 * i + 1] for i in few])
        assert abs(float(got.loss - call(batch, loss=name, pairs=subset).loss)) < 1e-12
        rewards = fa.preference_loss(
            batch.logprobs,
            batch.ref_logprobs,
            batch.packed.cu_seqlens,
            mask=batch.packed.mask,
            loss=name,
            valid=keep,
        )
        assert torch.equal(rewards.valid, keep) and float(rewards.metrics()["rewards/margins"].count) == 3
        for option in ("omega", "gamma_ext", "beta"):
            with pytest.raises(ValueError, match=f"compares ranks.*{option} must be a single number"):
                call(batch, loss=name, **{option: torch.ones(5)})
        # A NaN among the valid pairs is seen, and does not bring an excluded pair in.
        bad = batch.logprobs.clone()
        bad[: int(batch.packed.cu_seqlens[1])] = math.nan
        lp = bad.requires_grad_()
        out = call(batch, lp, loss=name, valid=keep)
        excluded = slice(int(batch.packed.cu_seqlens[2]), int(batch.packed.cu_seqlens[4]))
        assert math.isnan(float(out.loss)) and not bool(gradient(out.loss, lp)[excluded].any())
    with pytest.raises(ValueError, match="no pair partner"):
        call(batch, loss="aot_unpaired", ld_alpha=0.5)
    with pytest.raises(ValueError, match="order sorts"):
        losses.get("ipo").replace(order="paired")


# --- mixtures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixture_is_the_sum_of_its_parts(reduction):
    batch = make_batch(5, dtype=torch.float64)
    mix = [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0), ("simpo", 0.5), ("ipo", 0.3)]
    lp = batch.logprobs.clone().requires_grad_()
    out = call(batch, lp, loss=mix, reduction=reduction)
    parts = []
    for name, weight in mix:
        own = batch.logprobs.clone().requires_grad_()
        part = call(batch, own, loss=name, reduction=reduction)
        parts.append((weight * part.loss, weight * gradient(part.loss, own)))
    assert float((out.loss - sum(p[0] for p in parts)).abs().max()) < 1e-10
    assert float((gradient(out.loss, lp) - sum(p[1] for p in parts)).abs().max()) < 1e-10
    assert torch.equal(out.chosen_rewards, call(batch).chosen_rewards) and "nll_loss" in out.metrics()


def test_mixture_from_sums_and_with_a_rule():
    batch = make_batch(4, dtype=torch.float64)
    cu, mask = batch.packed.cu_seqlens, batch.packed.mask
    sums, refs, lengths = (
        fa.sequence_sum(x, cu, mask=mask) for x in (batch.logprobs, batch.ref_logprobs, mask.double())
    )
    mix = [("bco", 1.0), ("aot", 0.5), ("cpo", 0.25)]
    got = fa.preference_loss_from_sums(
        sums[::2],
        sums[1::2],
        refs[::2],
        refs[1::2],
        loss=mix,
        chosen_lengths=lengths[::2],
        rejected_lengths=lengths[1::2],
        state=fa.BCODelta(),
    )
    assert abs(float(got.loss - call(batch, loss=mix, state=fa.BCODelta()).loss)) < 1e-10


def test_bad_mixtures():
    batch = make_batch(3)
    with pytest.raises(ValueError, match="a mixture takes no options"):
        call(batch, loss=[("dpo", 1.0)], beta=0.3)
    with pytest.raises(ValueError, match="must agree in ld_alpha"):
        call(batch, loss=[("dpo", 1.0), ("ld_dpo", 1.0)])
    with pytest.raises(TypeError, match="name or Preset, weight"):
        call(batch, loss=["dpo", "ipo"])
    with pytest.raises(ValueError, match="loss='dop' is unknown"):
        call(batch, loss=[("dop", 1.0)])


# --- ranks --------------------------------------------------------------------------------------------------


def _worker(rank):
    found = {}
    group = dist.group.WORLD
    whole = make_batch(8, dtype=torch.float64, noise=0.5)
    cut = int(whole.packed.cu_seqlens[8])
    rows = slice(0, cut) if rank == 0 else slice(cut, None)
    cu = whole.packed.cu_seqlens[:9] if rank == 0 else whole.packed.cu_seqlens[8:] - cut
    part = whole._replace(
        packed=whole.packed._replace(cu_seqlens=cu, mask=whole.packed.mask[rows]),
        logprobs=whole.logprobs[rows], ref_logprobs=whole.ref_logprobs[rows],
    )  # fmt: skip
    for name, rule in (
        ("beta_dpo", fa.BetaDPO(group=group)),
        ("alpha_dpo", fa.AlphaDPO(group=group)),
        ("bco", fa.BCODelta(group=group)),
    ):
        total = call(part, loss=name, state=rule, reduction="sum").loss
        found[name] = float(total)
    return found


def test_two_ranks_equal_one():
    results = on_ranks(2, _worker)
    whole = make_batch(8, dtype=torch.float64, noise=0.5)
    for name, rule in (("beta_dpo", fa.BetaDPO()), ("alpha_dpo", fa.AlphaDPO()), ("bco", fa.BCODelta())):
        want = float(call(whole, loss=name, state=rule, reduction="sum").loss)
        assert abs(results[0][name] + results[1][name] - want) < 1e-9, name
