"""Losses for trainers that are not on the package index, called as those call them; the formulas are typed
from their sources."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fastalign.adapters as adapters
from fastalign.adapters import prime_rl, skyrl, slime
from fastalign.losses.policy import PRESETS


def install(monkeypatch, name, **contents):
    """A module, and the packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(contents)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def same(ours, theirs, wrt):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, wrt, retain_graph=True)[0] for x in (ours, theirs)), rtol=1e-5, atol=1e-5
    )


def clipped(ratio, advantages, low, high, dual=None):
    out = torch.maximum(-ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages)
    return out if dual is None else torch.where(advantages < 0, torch.minimum(out, -dual * advantages), out)


# --- SkyRL --------------------------------------------------------------------------------------------------


class Registry:
    losses: dict = {"fastalign_grpo": "the user's own"}

    @classmethod
    def register(cls, name, function):
        assert name not in cls.losses
        cls.losses[name] = function

    @classmethod
    def list_available(cls):
        return list(cls.losses)


def off_policy_correction(loss, old_log_probs, rollout_logprobs, loss_mask, config):
    if config.tis_ratio_type is None:
        return loss, loss_mask, {}
    ratio = (old_log_probs - rollout_logprobs).exp().clamp(max=2.0)
    return loss * ratio, loss_mask * (ratio < 1.9), {"tis": 1.0}


def test_skyrl(monkeypatch, draw):
    install(monkeypatch, "skyrl.backends.skyrl_train.utils.ppo_utils", PolicyLossRegistry=Registry)
    install(
        monkeypatch,
        "skyrl.backends.skyrl_train.utils.off_policy_correction_utils",
        apply_off_policy_correction=off_policy_correction,
    )
    skyrl.register()
    skyrl.register()  # again: what is there stays
    assert Registry.losses["fastalign_grpo"] == "the user's own"
    assert {f"fastalign_{name}" for name in PRESETS} | {"fastalign_dual_clip"} == set(Registry.losses)
    mask = (draw(5, 9) > -0.6).float()
    mask[1] = 0
    new, advantages = (draw(5, 9) - 2).requires_grad_(), draw(5, 9)
    old = new.detach() + 0.5 * draw(5, 9)
    rollout = old + 0.5 * draw(5, 9)
    for tis in (None, "token"):
        config = SimpleNamespace(
            eps_clip_low=0.1, eps_clip_high=0.25, clip_ratio_c=1.5,
            off_policy_correction=SimpleNamespace(tis_ratio_type=tis),
            sapo=SimpleNamespace(tau_pos=1.3, tau_neg=0.8),
            cispo=SimpleNamespace(cispo_eps_clip_low=0.3, cispo_eps_clip_high=0.4, cispo_anchor="old"),
        )  # fmt: skip
        weight, kept, _ = off_policy_correction(
            torch.ones(5, 9), old, rollout, mask, config.off_policy_correction
        )
        ratio = (new - old).exp()
        mean = ((new - old).detach() * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
        tau = torch.where(advantages > 0, 1.3, 0.8)
        expected = {
            "ppo": clipped(ratio, advantages, 0.1, 0.25), "dual_clip": clipped(ratio, advantages, 0.1, 0.25, 1.5),
            "sapo": -advantages * 4 / tau * torch.sigmoid(tau * (ratio - 1)),
            "cispo": -advantages * ratio.clamp(0.7, 1.4).detach() * new,
            "gspo_token": clipped((new - new.detach() + mean).exp(), advantages, 0.1, 0.25),
        }  # fmt: skip
        for name, per_token in expected.items():
            loss, metrics = Registry.losses[f"fastalign_{name}"](new, old, advantages, config, mask, rollout)
            same(loss, (per_token * weight * kept).sum(), new)
            assert isinstance(metrics["clip_ratio"], float) and ("tis" in metrics) == (tis is not None)
        share = ((ratio < 0.9) & (advantages < 0)) | ((ratio > 1.25) & (advantages > 0))
        _, metrics = Registry.losses["fastalign_ppo"](new, old, advantages, config, mask, rollout)
        assert metrics["clip_ratio"] == pytest.approx(float((share * kept).sum() / kept.sum()))
    config.off_policy_correction.tis_ratio_type, config.cispo.cispo_anchor = None, "rollout"
    loss, _ = Registry.losses["fastalign_cispo"](new, old, advantages, config, mask, rollout)
    same(loss, (-advantages * (new - rollout).exp().clamp(0.7, 1.4).detach() * new * mask).sum(), new)
    with pytest.raises(ValueError, match="cispo_anchor=rollout needs rollout_logprobs"):
        Registry.losses["fastalign_cispo"](new, old, advantages, config, mask, None)
    same(
        Registry.losses["fastalign_ppo"](new, old, advantages, config)[0],
        clipped(ratio, advantages, 0.1, 0.25).sum(),
        new,
    )


# --- prime-rl -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclasses.dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


def test_prime_rl(monkeypatch, draw):
    install(monkeypatch, "prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)
    new, advantages, mask, weights = (
        (draw(40) - 2).requires_grad_(),
        draw(40),
        draw(40) > -0.5,
        draw(40).exp(),
    )
    old, ref = new.detach() + 0.5 * draw(40), new.detach() + draw(40)
    given = {
        "trainer_logprobs": new,
        "inference_logprobs": old,
        "ref_logprobs": ref,
        "advantages": advantages,
        "loss_mask": mask,
    }
    path = "fastalign.adapters.prime_rl.policy_loss"
    loss = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
    for weight in (None, weights):
        inputs = LossInputs(**given, loss_weights=weight)
        factor = 1.0 if weight is None else weight
        ratio = (new - old).exp()
        out = loss(inputs, loss="dapo", dual_clip=3.0)
        same(out.loss, (clipped(ratio, advantages, 0.2, 0.28, 3.0) * factor)[mask].sum(), new)
        assert set(out.metrics) == {"clipfrac", "clipfrac_low", "clipfrac_high", "approxkl"}
        assert all(m.dim() == 0 and not m.requires_grad for m in out.metrics.values())
        out = loss(inputs, loss="cispo", ratio_max=2.0)
        same(out.loss, (-advantages * ratio.clamp(max=2.0).detach() * new * factor)[mask].sum(), new)
    inputs = LossInputs(**given)
    out = loss(inputs, kl_coef=0.1, kl_kind="k2")
    same(out.loss, (clipped(ratio, advantages, 0.2, 0.2) + 0.05 * (new - ref) ** 2)[mask].sum(), new)
    for options, message in (
        ({"loss": "gspo"}, "one ratio per sequence, .* legal: ppo, "),
        ({"aggregation": "token_mean"}, "prime-rl sums over the tokens"),
        ({"clip": 3}, "clip"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            prime_rl.policy_loss(inputs, **options)
    with pytest.raises(ValueError, match="where prime-rl gives loss_weights"):
        prime_rl.policy_loss(LossInputs(**given, loss_weights=weights), kl_coef=0.1)


# --- slime --------------------------------------------------------------------------------------------------


LENGTHS = (3, 7, 5)


@pytest.fixture
def batch(monkeypatch, draw):
    logits = draw(1, sum(LENGTHS), 11).requires_grad_()

    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy
    ):
        rows = (logits[0] / args.rollout_temperature).log_softmax(-1)
        entropy = -(rows.exp() * rows).sum(-1)
        return None, {"log_probs": [*rows[:, 0].split(LENGTHS)], "entropy": [*entropy.split(LENGTHS)]}

    install(monkeypatch, "slime.backends.megatron_utils.loss", get_log_probs_and_entropy=get_log_probs_and_entropy,
            mpu=SimpleNamespace(get_context_parallel_world_size=lambda: 1))  # fmt: skip
    masks = [(draw(n) > -0.7).float() for n in LENGTHS]
    masks[0][:] = torch.tensor([1.0, 0.0, 1.0])
    split = lambda x: [*x.split(LENGTHS)]  # noqa: E731
    new = (logits[0] / 0.9).log_softmax(-1)[:, 0].detach()
    made = {
        "unconcat_tokens": None, "total_lengths": [4, 8, 6], "response_lengths": [*LENGTHS], "loss_masks": masks,
        "advantages": [a.expand(n) for a, n in zip(draw(3), LENGTHS)], "log_probs": split(new + 0.4 * draw(15)),
        "rollout_log_probs": split(new + 0.4 * draw(15)), "ref_log_probs": split(new + draw(15)),
    }  # fmt: skip
    return logits, made


def arguments(**changes):
    given = {"eps_clip": 0.1, "eps_clip_high": 0.25, "eps_clip_c": None, "entropy_coef": 0.0,
        "use_kl_loss": False, "kl_loss_coef": 0.0,
             "kl_loss_type": "k3", "use_rollout_logprobs": False, "rollout_temperature": 0.9}  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


def reducers(masks):
    def of_samples(x):
        return sum((a * m).sum() / m.sum().clamp(min=1) for a, m in zip(x.split(LENGTHS), masks))

    def of_tokens(x):
        return sum((a * m).sum() for a, m in zip(x.split(LENGTHS), masks))

    return of_samples, of_tokens


def test_slime(batch):
    logits, made = batch
    rows = (logits[0] / 0.9).log_softmax(-1)
    new, entropy, advantages = rows[:, 0], -(rows.exp() * rows).sum(-1), torch.cat(made["advantages"])
    means = [
        ((new - torch.cat(made["log_probs"])).split(LENGTHS)[i] * m).sum() / m.sum()
        for i, m in enumerate(made["loss_masks"])
    ]
    sequence = torch.cat([mean.expand(n) for mean, n in zip(means, LENGTHS)])
    for reduce in reducers(made["loss_masks"]):
        for which in ("log_probs", "rollout_log_probs"):
            args = arguments(
                use_rollout_logprobs=which == "rollout_log_probs", eps_clip_c=1.5, entropy_coef=0.01
            )
            ratio = (new - torch.cat(made[which])).exp()
            loss, metrics = slime.dapo(args, made, logits, reduce)
            same(loss, reduce(clipped(ratio, advantages, 0.1, 0.25, 1.5)) - 0.01 * reduce(entropy), logits)
            assert set(metrics) == {"loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl"}
        ratio = (new - torch.cat(made["log_probs"])).exp()
        loss, _ = slime.cispo(arguments(), made, logits, reduce)
        same(loss, reduce(-advantages * ratio.clamp(0.9, 1.25).detach() * new), logits)
        loss, _ = slime.gspo(arguments(), made, logits, reduce)
        same(loss, reduce(clipped(sequence.exp(), advantages, 0.1, 0.25)), logits)
        d = new - torch.cat(made["ref_log_probs"])
        for kind, kl in (
            ("k1", d),
            ("k2", d * d / 2),
            ("k3", (-d).exp() - 1 + d),
            ("low_var_kl", ((-d).exp() - 1 + d).clamp(-10, 10)),
        ):
            args = arguments(use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type=kind)
            loss, metrics = slime.grpo(args, made, logits, reduce)
            same(loss, reduce(clipped(ratio, advantages, 0.1, 0.25)) + 0.2 * reduce(kl), logits)
            assert "kl_loss" in metrics


def test_slime_refuses_what_it_does_not_know(batch, monkeypatch):
    logits, made = batch
    reduce = reducers(made["loss_masks"])[0]
    for option in ("use_tis", "use_opsm", "use_unbiased_kl"):
        with pytest.raises(ValueError, match=f"does not know --{option.replace('_', '-')}"):
            slime.dapo(arguments(**{option: True}), made, logits, reduce)
    with pytest.raises(ValueError, match="kl_loss_type=k4 .* legal: k1, k2"):
        slime.dapo(arguments(use_kl_loss=True, kl_loss_type="k4"), made, logits, reduce)
    monkeypatch.setattr(
        sys.modules["slime.backends.megatron_utils.loss"].mpu, "get_context_parallel_world_size", lambda: 2
    )
    with pytest.raises(ValueError, match="context parallelism splits sequences"):
        slime.gspo(arguments(), made, logits, reduce)


@pytest.mark.parametrize("name", ["skyrl", "prime_rl", "slime"])
def test_they_are_not_patched(name):
    with pytest.raises(adapters.AdapterError, match=f"{name} is not patched: .*policy loss"):
        adapters.patch(name)
