"""OpenRLHF's own functions against those that take their place."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from checks.trainers import same

import fastalign.adapters as adapters
from fastalign.adapters import openrlhf as ours

utils = importlib.import_module("openrlhf.models.utils")
losses = importlib.import_module("openrlhf.models.loss")
maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows(draw, dtype, temperature):
    logits, labels = (3 * draw(2, 3, 37)).to(dtype), draw(2, 3).abs().mul(9).long()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    results = []
    for function in (ours.log_probs_from_logits, utils.log_probs_from_logits):
        leaf = logits.clone().requires_grad_()
        used = leaf * 1.0
        out = function(used, labels, temperature)
        results.append(
            (out, torch.autograd.grad((out * torch.arange(6).view(2, 3)).sum(), leaf)[0], used.detach())
        )
    for one, other in zip(*results):  # the logits that it leaves behind, too
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    logits.requires_grad_()
    same(ours.compute_entropy(logits), utils.compute_entropy(logits), logits, tolerance=tolerance)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_approx_kl(draw, kind, unbiased, sampled):
    new = torch.cat([draw(40) * 3, torch.tensor([-25.0, -9.0, 0.0, 25.0])]).view(4, 11).requires_grad_()
    ref = torch.cat([draw(40) * 3, torch.zeros(4)]).view(4, 11)
    args = (new, ref, new.detach() + draw(4, 11) if sampled else None, kind, unbiased)
    same(ours.compute_approx_kl(*args), utils.compute_approx_kl(*args), new)
    assert ours.compute_approx_kl(new.bfloat16(), ref.bfloat16(), None, kind).dtype == torch.float32
    with pytest.raises(ValueError, match="legal: k1, k2, k3"):
        ours.compute_approx_kl(new, ref, kl_estimator="abs")


# The last: means of the batch at hand, which dp_size does not multiply.
COUNTS = ({}, {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 7.0}, {"dp_size": 3})
# level, mode, gating, threshold
CORRECTIONS = [
    ("off", "mask", "ratio", (0.5, 5.0)), ("token", "mask", "ratio", (0.5, 2.0)),
    ("token", "clip", "ratio", (0.5, 2.0)),
    ("token", "mask", "binary_kl", (0.0, 0.05)), ("token", "mask", "tv", (0.0, 0.1)),
    ("seq", "mask", "ratio", (0.8, 1.3)),
    ("seq", "mask", "binary_kl", (0.0, 0.05)), ("seq", "mask", "tv", (0.0, 0.1)),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("token_level", [True, False])
def test_policy_loss(draw, ragged, kind, dual_clip, token_level):
    mask = ragged[[0, 2, 3, 4]]  # of a row without tokens theirs has no statistic
    new = (draw(4, 9) - 2).requires_grad_()
    old = new.detach() + 0.5 * draw(4, 9)
    rollout, advantages = old + 0.3 * draw(4, 9), draw(4, 9)
    for (level, mode, gating, threshold), counts in itertools.product(CORRECTIONS, COUNTS):
        module = losses.PolicyLoss(
            0.1, 0.25, dual_clip, token_level, kind, is_correction_level=level, is_correction_mode=mode,
            is_correction_gating=gating, is_correction_threshold=threshold,
        )  # fmt: skip
        args = (new, old, advantages, mask.float(), rollout)
        mine, theirs = ours.policy_loss(module, *args, **counts), module(*args, **counts)
        same(mine[0], theirs[0], new)
        for one, other in zip(mine[1:], theirs[1:]):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
                assert not one.requires_grad


def test_policy_loss_without_a_mask(draw):
    new, old, advantages = draw(4, 9).requires_grad_(), draw(4, 9), draw(4, 9)
    module = losses.PolicyLoss()
    same(ours.policy_loss(module, new, old, advantages)[0], module(new, old, advantages)[0], new)
    with pytest.raises(ValueError, match="action_mask=None"):
        ours.policy_loss(losses.PolicyLoss(token_level_loss=False), new, old, advantages)
    with pytest.raises(ValueError, match="is_correction_level=token needs rollout_log_probs"):
        ours.policy_loss(losses.PolicyLoss(is_correction_level="token"), new, old, advantages)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
def test_value_loss(draw, ragged, clip, token_level, counts):
    module = losses.ValueLoss(clip, token_level)
    values = draw(5, 9).requires_grad_()
    args = (values, draw(5, 9), draw(5, 9), ragged.float())
    same(ours.value_loss(module, *args, **counts), module(*args, **counts), values)


@pytest.mark.parametrize("smoothing, ipo", [(0.0, False), (0.1, False), (0.0, True)])
def test_dpo_loss(draw, smoothing, ipo):
    chosen, rejected = (5 * draw(6)).requires_grad_(), (5 * draw(6)).requires_grad_()
    module = losses.DPOLoss(0.3, smoothing, ipo)
    args = (chosen, rejected, 5 * draw(6), 5 * draw(6))
    same(ours.dpo_loss(module, *args), module(*args), chosen, rejected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0)])
@pytest.mark.parametrize("masked", [True, False])
def test_advantages_and_returns(draw, ragged, gamma, lam, masked):
    """Holes are steps there, and so they are here."""
    args = (draw(5, 9), draw(5, 9), ragged.float() if masked else None, gamma, lam)
    method = maker.RemoteExperienceMaker.get_advantages_and_returns
    same(ours.get_advantages_and_returns(None, *args), method(None, *args))


def test_the_patch_reaches_the_importing_modules(draw):
    actor = importlib.import_module("openrlhf.models.actor")
    before = actor.compute_entropy
    with adapters.patch("openrlhf") as report:
        places = {(r.place, r.name) for r in report.replaced}
        assert {
            ("openrlhf.models.actor", "log_probs_from_logits"),
            ("openrlhf.models.actor", "compute_entropy"),
        } <= places
        assert ("openrlhf.trainer.ppo_utils.experience_maker", "compute_approx_kl") in places
        module = losses.ValueLoss(0.2)
        args = (draw(2, 3), draw(2, 3), draw(2, 3), torch.ones(2, 3))
        patched = module(*args)
    same(patched, module(*args))
    assert actor.compute_entropy is before


def test_without_vllm_the_experience_maker_is_left_as_it_is(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    before = maker.RemoteExperienceMaker.get_advantages_and_returns
    ours.everywhere()
    ours.everywhere()  # again: nothing
    try:
        assert maker.RemoteExperienceMaker.get_advantages_and_returns is before
        assert losses.DPOLoss.forward is ours.dpo_loss
        assert "get_advantages_and_returns is left as it is: vllm is not installed" in str(
            ours.ADAPTER.report
        )
    finally:
        adapters.unpatch("openrlhf")
    assert losses.DPOLoss.forward is not ours.dpo_loss
