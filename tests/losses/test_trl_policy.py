"""Every policy loss that TRL has against TRL's own code: `GRPOTrainer._compute_loss` runs on the same
log-probs, loss and gradient are compared."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.gmpo import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

import fastalign as fa
from fastalign.losses import policy as policy_losses

B, T = 5, 9
# our loss -> (TRL's attributes, our options besides the preset's)
SAME = {
    "ppo": ({"loss_type": "bnpo", "epsilon_low": 0.2, "epsilon_high": 0.2}, {}),
    "grpo": ({"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo", "epsilon_low": 0.2, "epsilon_high": 0.2}, {"norm_length": 12.0}),
    "dapo": ({"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28}, {}),
    "gspo": (
        {
            "loss_type": "grpo",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
            "importance_sampling_level": "sequence",
        },
        {},
    ),
    "luspo": (
        {
            "loss_type": "luspo",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
            "importance_sampling_level": "sequence",
        },
        {},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_low": 0.2, "epsilon_high": 5.0}, {}),
    # 1.0625 is exact in fp32, to which TRL rounds its default of 1.05
    "sapo": ({"loss_type": "sapo", "epsilon_low": 0.2, "epsilon_high": 0.2}, {"tau_neg": 1.0625}),
    "vespo": ({"loss_type": "vespo", "epsilon_low": 0.2, "epsilon_high": 0.2}, {}),
    "gmpo": ({"loss_type": "grpo", "epsilon_low": 0.4, "epsilon_high": 0.4}, {}),
}


class Accelerator:
    num_processes = 1

    @staticmethod
    def gather(x):
        return x

    @staticmethod
    def reduce(x, reduction="sum"):
        return x

    gather_for_metrics = gather


def trl_loss(logps, old, ref, advantages, mask, entropy, **attributes):
    args = SimpleNamespace(delta=attributes.pop("delta", None), use_bias_correction_kl=attributes.pop("bias", False), steps_per_generation=1,
                           sapo_temperature_pos=1.0, sapo_temperature_neg=1.0625, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0,
                           vespo_lambda_neg=2.0)  # fmt: skip
    cls = attributes.pop("cls", GRPOTrainer)
    me = SimpleNamespace(
        args=args, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        max_completion_length=12, current_gradient_accumulation_steps=1, accelerator=Accelerator(),
        model=SimpleNamespace(training=False), aux_loss_enabled=False, _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)), get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, entropy, None), beta=0.0,
        importance_sampling_level="token",
    )  # fmt: skip
    for name, value in attributes.items():
        setattr(me, name, value)
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return cls._compute_loss(me, None, inputs), me._metrics["eval"]


def batch(spread=0.3):
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4, B, T, generator=g, dtype=torch.float64)
    logps = -noise[0].abs()
    mask = (torch.arange(T) < torch.tensor([9, 1, 4, 7, 6]).unsqueeze(1)).long()
    return (
        logps,
        logps + spread * noise[1],
        logps + 0.3 * noise[2],
        torch.tensor([1.3, -0.4, 0.0, 0.8, -2.0], dtype=torch.float64),
        mask,
        noise[3].abs(),
    )


def both(name, spread=0.3, theirs=(), ours=()):
    logps, old, ref, advantages, mask, entropy = batch(spread)
    attributes, options = SAME[name]
    cls = {"cls": GMPOTrainer} if name == "gmpo" else {}
    x = logps.clone().requires_grad_()
    want, metrics = trl_loss(x, old, ref, advantages, mask, entropy, **{**cls, **attributes, **dict(theirs)})
    want_g = torch.autograd.grad(want, x)[0].flatten()
    y = logps.flatten().clone().requires_grad_()
    cu = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    out = fa.policy_loss(y, old.flatten(), advantages, loss=name, cu_seqlens=cu, mask=mask.bool().flatten(), ref_logprobs=ref.flatten(),
                         entropy=entropy.flatten(), **options, **dict(ours))  # fmt: skip
    g = torch.autograd.grad(out.loss, y)[0]
    assert abs(float(out.loss.detach() - want.detach())) < 1e-12 * max(1.0, abs(float(want.detach())))
    assert float((g - want_g).abs().max()) < 1e-12
    return out.metrics(), metrics


@pytest.mark.parametrize("spread", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("name", SAME)
def test_same_loss_and_gradient_as_trl(name, spread):
    ours, theirs = both(name, spread)
    if "clip_ratio/low_mean" in theirs:  # of tokens; of gspo and luspo of sequences
        for mine, peers in (
            ("clipfrac_low", "low_mean"),
            ("clipfrac_high", "high_mean"),
            ("clipfrac", "region_mean"),
        ):
            assert float(ours[f"policy/{mine}"]) == pytest.approx(theirs[f"clip_ratio/{peers}"][0]), mine
    assert float(ours["policy/entropy"]) == pytest.approx(theirs["entropy"][0])


def test_every_form_of_the_table_is_compared():
    assert {p.name for p in policy_losses.PRESETS.values() if p.trl or p.name in policy_losses.TRL_FORMS} == {
        *SAME,
        "rloo",
    }


@pytest.mark.parametrize("spread", [1e-2, 0.3])
def test_rloo_is_that_of_the_rloo_trainer(spread):
    """TRL keeps only the old sum of a response, of which our ratio is made too."""
    logps, old, _, advantages, mask, entropy = batch(spread)
    me = SimpleNamespace(
        epsilon_low=0.2, epsilon_high=0.2, aux_loss_enabled=False, accelerator=Accelerator(),
        model=SimpleNamespace(training=False), _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (x, entropy, None),
    )  # fmt: skip
    ids = torch.zeros(B, T, dtype=torch.long)
    x, y = logps.clone().requires_grad_(), logps.flatten().clone().requires_grad_()
    want = RLOOTrainer._compute_loss(me, None, {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask,
                                                "advantages": advantages, "old_logps": (old * mask).sum(1)})  # fmt: skip
    out = fa.policy_loss(y, old.flatten(), advantages, loss="rloo", mask=mask.bool().flatten(),
                         cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32))  # fmt: skip
    (g,), (want_g,) = torch.autograd.grad(out.loss, y), torch.autograd.grad(want, x)
    assert (
        abs(float((out.loss - want).detach())) < 1e-12 and float((g - want_g.flatten()).abs().max()) < 1e-12
    )
    ours, theirs = out.metrics(), me._metrics["eval"]
    for mine, peers in (
        ("clipfrac_low", "low_mean"),
        ("clipfrac_high", "high_mean"),
        ("clipfrac", "region_mean"),
    ):
        assert float(ours[f"policy/{mine}"]) == pytest.approx(theirs[f"clip_ratio/{peers}"][0]), mine


def test_what_is_counted_otherwise_than_in_trl():
    """cispo: here every clipped weight, there those with A > 0. kl: here the estimate, there times rho where
    the term is corrected."""
    logps, old, _, advantages, mask, _ = batch()
    kept, a = mask.bool(), advantages.unsqueeze(1).expand(B, T)
    above = ((logps - old).exp() > 1.1)[kept]
    ours, theirs = both("cispo", theirs={"epsilon_high": 1.1}, ours={"ratio_max": 1.1})
    assert float(ours["policy/clipfrac_high"]) == pytest.approx(float(above.double().mean()))
    assert theirs["cispo_clip_ratio"][0] == pytest.approx(float((above & (a[kept] > 0)).double().mean()))
    for corrected in (False, True):
        ours, theirs = both(
            "grpo",
            theirs={"beta": 0.04, "bias": corrected},
            ours={"kl_coef": 0.04, "kl_bias_correction": corrected},
        )
        assert (float(ours["policy/kl"]) == pytest.approx(theirs["kl"][0])) == (not corrected)


def test_k3_as_a_loss_is_bounded():
    """As verl's low_var_kl, whose value is clamped at 10; TRL's is not (kl_clamp=None)."""
    d = torch.tensor([-30.0, -15.0, -2.0, 0.5, 40.0], dtype=torch.float64)

    def ours(**options):
        x = d.clone().requires_grad_()
        out = fa.policy_loss(
            x,
            None,
            torch.zeros(5),
            mask=d == d,
            ref_logprobs=torch.zeros(5),
            kl_coef=1.0,
            aggregation="token_sum",
            **options,
        )
        return out, torch.autograd.grad(out.loss, x)[0]

    x = d.clone().requires_grad_()
    verl = torch.clamp(torch.exp(torch.clamp(-x, -20, 20)) + x - 1, -10, 10)
    out, slope = ours()
    assert float(out.loss) == pytest.approx(float(verl.sum())) and torch.allclose(
        slope, torch.autograd.grad(verl.sum(), x)[0]
    )
    assert float(ours(kl_clamp=None)[0].loss) > 4e8 and float(ours(kl_clamp=None)[1].abs().max()) > 4e8
    x = d.clone().requires_grad_()
    value = fa.kl_estimate(x, torch.zeros(5), "k3", clamp=10.0)
    assert torch.allclose(value, verl) and torch.allclose(torch.autograd.grad(value.sum(), x)[0], slope)
    for kind in ("k1", "k2", "abs", "k3+"):  # unbounded unless asked for
        assert float(ours(kl_kind=kind)[0].loss) == pytest.approx(
            float(ours(kl_kind=kind, kl_clamp=None)[0].loss)
        )
        held, slope = ours(kl_kind=kind, kl_clamp=3.0)
        plain = fa.kl_estimate(d, torch.zeros(5), "k3" if kind == "k3+" else kind)
        assert float(held.loss) == pytest.approx(float(plain.clamp(-3, 3).sum()))
        assert torch.allclose(slope, d) if kind == "k3+" else not bool(slope[plain.abs() > 3].any())
    for wrong in (0.0, -1.0, "off", float("nan")):
        with pytest.raises((ValueError, TypeError), match="kl_clamp"):
            ours(kl_clamp=wrong)
    with pytest.raises(ValueError, match="clamp"):
        fa.kl_estimate(d, d, clamp=0.0)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_same_kl_term_as_trl(name):
    both(name, theirs={"beta": 0.04}, ours={"kl_coef": 0.04})
    if name != "gspo":
        both(name, theirs={"beta": 0.04, "bias": True}, ours={"kl_coef": 0.04, "kl_bias_correction": True})


def test_same_cap_as_trl():
    """TRL's delta: at or above 1 + eh it is dual_clip; below, it caps the other side as well."""
    both("grpo", 1.0, theirs={"delta": 1.5}, ours={"dual_clip": 1.5})
    both("grpo", 1.0, theirs={"delta": 1.1}, ours={"dual_clip": 1.2, "clip_high": 0.1})
