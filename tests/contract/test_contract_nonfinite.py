"""What a number that is not finite does, on every backend: the table of docs/edge_cases.md, and moments of
values that lie far from 0."""

from __future__ import annotations

import math

import pytest
import torch

import fastalign as fa
from fastalign.testing import assert_close

CU, LIST = [0, 6, 12, 18, 24], [0, 2, 4]
BAD = [math.nan, math.inf, -math.inf]


def packed(device, seed=0):
    """Four sequences of six tokens, of which the last four are scored; log-probs of policy and reference."""
    g = torch.Generator().manual_seed(seed)
    lp, ref = -torch.rand(2, 24, generator=g) - 0.1
    mask = torch.arange(24) % 6 >= 2
    return (
        lp.to(device).requires_grad_(),
        ref.to(device),
        torch.tensor(CU, dtype=torch.int32, device=device),
        mask.to(device),
    )


def token_stats_rows(device, lp):
    return torch.stack([lp, lp * 0.5, -lp], -1)


def per_token_losses(device):
    """name -> (function of the log-probs, what of it is not scored)."""
    lp, ref, cu, mask = packed(device)
    flat, lists = (
        torch.tensor([0, 1, 2, 3], device=device),
        torch.tensor(LIST, dtype=torch.int32, device=device),
    )
    scores = torch.tensor([1.0, 0.0, 0.5, 0.2], device=device)
    advantages, desirable = torch.linspace(-1, 1, 24, device=device), flat % 2 == 0
    weights = torch.linspace(-1, 1, 24, device=device)
    return {
        "token_stats": lambda x: fa.token_stats(token_stats_rows(device, x), (mask.long() * 2), outputs=("logprob", "entropy"), mask=mask).logprob,
        "token_kl": lambda x: fa.token_kl(token_stats_rows(device, x), token_stats_rows(device, ref), mask=mask),
        "sequence_sum": lambda x: fa.sequence_sum(x, cu, mask=mask),
        "sequence_sum mean": lambda x: fa.sequence_sum(x, cu, mask=mask, mean=True),
        "sequence_sum weights": lambda x: fa.sequence_sum(x, cu, mask=mask, weights=weights),
        "preference": lambda x: fa.preference_loss(x, ref, cu, mask=mask).loss,
        "preference none": lambda x: fa.preference_loss(x, ref, cu, mask=mask, reduction="none").loss,
        "preference sft": lambda x: fa.preference_loss(x, ref, cu, mask=mask, loss="rpo_nll" if "rpo_nll" in fa.losses.available() else "cpo").loss,
        "preference ld": lambda x: fa.preference_loss(x, ref, cu, mask=mask, loss="ld_dpo").loss,
        "preference weights": lambda x: fa.preference_loss(x, ref, cu, mask=mask, weights=weights).loss,
        "unpaired": lambda x: fa.unpaired_loss(x, ref, cu, desirable, mask=mask, baseline=0.1).loss,
        "listwise": lambda x: fa.listwise_loss(x, ref, cu, lists, scores, mask=mask).loss,
        "policy": lambda x: fa.policy_loss(x, ref, advantages, mask=mask, cu_seqlens=cu).loss,
        "policy grpo": lambda x: fa.policy_loss(x, ref, advantages, mask=mask, cu_seqlens=cu, loss="grpo", ref_logprobs=ref).loss,
        "value": lambda x: fa.value_loss(x, ref, advantages, mask=mask, clip=0.05).loss,
    }  # fmt: skip


@pytest.mark.parametrize("upstream", BAD)
def test_upstream_gradients_that_are_not_finite_stay_off_masked_tokens(backend, device, upstream):
    mask = packed(device)[3]
    for name, f in per_token_losses(device).items():
        lp = packed(device)[0]
        out = f(lp)
        (g,) = torch.autograd.grad(out, lp, torch.full_like(out, upstream))
        assert bool((g[~mask] == 0).all()), name
        assert not bool(torch.isfinite(g[mask]).all()), f"{name} hides it"


@pytest.mark.parametrize("bad", BAD)
def test_masked_inputs_that_are_not_finite_change_nothing(backend, device, bad):
    mask = packed(device)[3]
    for name, f in per_token_losses(device).items():
        results = []
        for garbage in (0.25, bad):
            lp = packed(device)[0].detach()
            lp[~mask] = garbage
            out = f(lp.requires_grad_())
            results.append((out.detach(), torch.autograd.grad(out.sum(), lp)[0]))
        for a, b in zip(*results):
            assert torch.equal(a, b), name


def test_upstream_gradients_pass_no_slope_of_zero(backend, device):
    """Clipped tokens, pairs that were dropped, responses beyond the shorter one with ld_alpha = 0."""
    lp, ref, cu, mask = packed(device)
    clipped = fa.policy_loss(
        lp, lp.detach() - 1.0, torch.ones(24, device=device), mask=mask
    )  # every ratio is above its bound
    assert bool((torch.autograd.grad(clipped.loss, lp, torch.tensor(math.inf, device=device))[0] == 0).all())
    lp, ref, cu, mask = packed(device)
    dirty = ref.clone()
    dirty[3] = math.nan  # of the first pair
    out = fa.preference_loss(lp, dirty, cu, mask=mask, nonfinite="drop")
    g = torch.autograd.grad(out.loss, lp, torch.tensor(math.inf, device=device))[0]
    assert bool((g[:12] == 0).all()) and bool(torch.isinf(g[12:][mask[12:]]).all())
    short = torch.tensor([0, 6, 8, 16, 24], dtype=torch.int32, device=device)
    out = fa.preference_loss(lp, ref, short, mask=torch.ones_like(mask), loss="ld_dpo", ld_alpha=0.0)
    g = torch.autograd.grad(out.loss, lp, torch.tensor(math.inf, device=device))[0]
    assert bool((g[2:6] == 0).all()) and bool(torch.isinf(g[:2]).all())


def test_scaled_kl_gradient_of_masked_rows(backend, device):
    x = torch.randn(4, 7, device=device).requires_grad_()
    mask = torch.tensor([True, False, True, False], device=device)
    loss = fa.token_kl_loss(
        x * 1.0, torch.randn(4, 7, device=device), torch.ones(4, device=device), mask=mask
    ).loss
    (g,) = torch.autograd.grad(loss, x, torch.tensor(math.inf, device=device))
    assert bool((g[~mask] == 0).all()) and not bool(torch.isfinite(g[mask]).any())


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["rewards", "values", "bootstrap"])
@pytest.mark.parametrize("discounts", [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0), (0.0, 0.7)])
def test_gae(backend, device, bad, what, discounts):
    """NaN from the token on, backwards in its sequence. Behind it, in the other sequences and at unscored
    tokens: what there is without it."""
    g = torch.Generator().manual_seed(0)
    size = 240 if backend == "reference" else 1240  # a loop over tokens; the kernels have blocks of them
    cu = torch.tensor([0, 40, size - 40, size], dtype=torch.int32, device=device)
    rewards, values = (torch.randn(size, generator=g).to(device) for _ in range(2))
    bootstrap, mask = torch.randn(3, generator=g).to(device), (torch.rand(size, generator=g) < 0.9).to(device)
    at = size - 140
    mask[at] = True
    arguments = {"rewards": rewards, "values": values, "bootstrap": bootstrap}
    clean = fa.gae(rewards, values, cu, bootstrap=bootstrap, mask=mask, gamma=discounts[0], lam=discounts[1])
    dirty = {k: v.clone() for k, v in arguments.items()}
    dirty[what][1 if what == "bootstrap" else at] = bad
    out = fa.gae(
        dirty["rewards"],
        dirty["values"],
        cu,
        bootstrap=dirty["bootstrap"],
        mask=mask,
        gamma=discounts[0],
        lam=discounts[1],
    )
    index = torch.arange(size, device=device)
    reached = mask & (index >= 40) & (index < size - 40 if what == "bootstrap" else index <= at)
    for got, want in ((out.advantages, clean.advantages), (out.returns, clean.returns)):
        assert bool(torch.isnan(got[reached]).all()) and torch.equal(got[~reached], want[~reached])
    assert (
        float(out.count) == float(clean.count) and math.isnan(float(out.m2)) and math.isnan(float(out.mean))
    )
    dirty[what] = arguments[what].clone()
    if what != "bootstrap":
        mask[at], dirty[what][at] = False, bad  # not read there
        out = fa.gae(
            dirty["rewards"],
            dirty["values"],
            cu,
            bootstrap=bootstrap,
            mask=mask,
            gamma=discounts[0],
            lam=discounts[1],
        )
        assert bool(torch.isfinite(out.advantages).all()) and math.isfinite(float(out.m2))


def test_kl_estimate(backend, device):
    """d = logprob - ref_logprob: equal infinities are 0, NaN stays NaN in value and slope."""
    lp = torch.tensor([math.nan, -1.0, -math.inf, -1.0, -math.inf, -1.0], device=device)
    ref = torch.tensor([-1.0, math.nan, -math.inf, -math.inf, -1.0, -2.0], device=device)
    d = [math.nan, math.nan, 0.0, math.inf, -math.inf, 1.0]
    far, e20 = math.inf, math.exp(20.0)
    values = {"k1": d, "k2": [math.nan, math.nan, 0.0, far, far, 0.5], "abs": [math.nan, math.nan, 0.0, far, far, 1.0],
              "k3": [math.nan, math.nan, 0.0, far, e20 - 21.0, math.exp(-1.0)]}  # fmt: skip
    slopes = {"k1": [1.0] * 6, "k2": d, "abs": [math.nan, math.nan, 0.0, 1.0, -1.0, 1.0],
              "k3": [math.nan, math.nan, 0.0, 1.0, 1.0 - e20, 1.0 - math.exp(-1.0)]}  # fmt: skip
    for kind in values:
        leaf = lp.clone().requires_grad_()
        out = fa.kl_estimate(leaf, ref, kind)
        (g,) = torch.autograd.grad(out.sum(), leaf)
        for got, want in ((out, values[kind]), (g, slopes[kind])):
            torch.testing.assert_close(
                got.detach().cpu().double(),
                torch.tensor(want).double(),
                rtol=1e-5,
                atol=1e-6,
                equal_nan=True,
                msg=kind,
            )


@pytest.mark.parametrize("bad", BAD)
def test_policy_loss_agrees_with_the_reference(backend, device, bad):
    """A scored number that is not finite reaches the loss and its own slope, alike on every backend."""
    for loss in ("ppo", "cispo", "sapo", "gmpo", "grpo", "reinforce"):
        for where in ("logprobs", "old_logprobs", "advantages", "ref_logprobs"):
            lp, ref, cu, mask = packed(device)
            t = {
                "logprobs": lp.detach(),
                "old_logprobs": ref.clone(),
                "advantages": torch.linspace(-1, 1, 24, device=device),
                "ref_logprobs": ref,
            }
            if loss == "gmpo":
                if where == "advantages":
                    continue
                t["advantages"] = torch.linspace(-1, 1, 4, device=device)
            t = {k: v.clone() for k, v in t.items()}
            t[where][3] = bad
            outs = []
            for name in (backend, "reference"):
                with fa.use_backend(name):
                    leaf = t["logprobs"].clone().requires_grad_()
                    out = fa.policy_loss(leaf, t["old_logprobs"], t["advantages"], loss=loss, mask=mask, cu_seqlens=cu,
                                         ref_logprobs=t["ref_logprobs"], kl_coef=0.1)  # fmt: skip
                    outs.append((out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]))
            for got, want in zip(*outs):
                torch.testing.assert_close(
                    got, want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"{loss} {where} {bad}"
                )
            assert bool(torch.isfinite(outs[0][1][~mask]).all())


# --- values that lie many standard deviations from 0 --------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e5, 1e6])
def test_explained_variance_far_from_zero(backend, device, mean):
    g = torch.Generator().manual_seed(1)
    returns = (torch.randn(5000, generator=g).double() + mean).float()
    values = (returns.double() + 0.5 * torch.randn(5000, generator=g).double() + 0.3 * mean).float()
    mask = torch.rand(5000, generator=g) < 0.8
    truth = 1.0 - float((returns - values.double())[mask].var() / returns.double()[mask].var())
    out = fa.value_loss(values.to(device), values.to(device), returns.to(device), mask=mask.to(device))
    # The error itself is a difference in fp32: 3e-8 of the mean.
    assert float(out.explained_variance) == pytest.approx(truth, abs=1e-5 + 4e-7 * abs(mean) ** 0.5)
    metrics = out.metrics()
    assert float(metrics["returns/var"]) == pytest.approx(
        float(returns.double()[mask].var(unbiased=False)), rel=1e-5
    )
    dirty = torch.where(mask, returns, math.nan).to(device)
    again = fa.value_loss(values.to(device), values.to(device), dirty, mask=mask.to(device))
    assert torch.equal(again.stats, out.stats)


def test_ratio_variance_far_from_one(backend, device):
    g = torch.Generator().manual_seed(2)
    old = -torch.rand(5000, generator=g) - 1.0
    lp = old + 8.0 + 1e-3 * torch.randn(5000, generator=g)
    out = fa.policy_loss(
        lp.to(device),
        old.to(device),
        torch.ones(5000, device=device),
        mask=torch.ones(5000, dtype=torch.bool, device=device),
    )
    truth = (lp - old).double().exp().var(unbiased=False)
    assert float(out.metrics()["val/ratio_var"]) == pytest.approx(
        float(truth), rel=1e-3
    )  # the ratio's own rounding in fp32


@pytest.mark.parametrize("mean", [0.0, 3e4, -2e6])
def test_whitened_advantages_far_from_zero(backend, device, mean):
    """`whiten` with the moments that `gae` returns gives what fp64 gives of the same fp32 advantages."""
    g = torch.Generator().manual_seed(3)
    cu = torch.tensor([0, 900, 2500, 2500, 4000], dtype=torch.int32, device=device)
    rewards, mask = (
        (torch.randn(4000, generator=g) + mean).to(device),
        (torch.rand(4000, generator=g) < 0.9).to(device),
    )
    out = fa.gae(rewards, torch.zeros_like(rewards), cu, mask=mask, gamma=0.0, lam=0.0)
    x = out.advantages[mask].double()
    assert float(out.count) == x.numel()
    got = fa.whiten(out.advantages, mask, moments=out.moments)
    want = (x - x.mean()) / torch.sqrt(x.var() + 1e-8)
    assert_close(got[mask], want, scale=8.0)
    assert_close(fa.whiten(out.advantages, mask)[mask], want, scale=8.0)
    assert bool((got[~mask] == 0).all())
