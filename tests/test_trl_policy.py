"""Every policy loss that TRL has against TRL's own code: `GRPOTrainer._compute_loss` runs on the same log-probs, loss and gradient are compared."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.gmpo import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

import fastalign as fa

B, T = 5, 9
# our loss -> (TRL's attributes, our options besides the preset's)
SAME = {
    "ppo": ({"loss_type": "bnpo", "epsilon_low": 0.2, "epsilon_high": 0.2}, {}),
    "grpo": ({"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo", "epsilon_low": 0.2, "epsilon_high": 0.2}, {"norm_length": 12.0}),
    "dapo": ({"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28}, {}),
    "gspo": ({"loss_type": "grpo", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}, {}),
    "luspo": ({"loss_type": "luspo", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}, {}),
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
        args=args, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, max_completion_length=12,
        current_gradient_accumulation_steps=1, accelerator=Accelerator(), model=SimpleNamespace(training=False), aux_loss_enabled=False,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)), get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, entropy, None), beta=0.0, importance_sampling_level="token",
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
    want, metrics = trl_loss(x, old, ref, advantages, mask, entropy, **cls, **attributes, **dict(theirs))
    want_g = torch.autograd.grad(want, x)[0].flatten()
    y = logps.flatten().clone().requires_grad_()
    cu = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    out = fa.policy_loss(y, old.flatten(), advantages, loss=name, cu_seqlens=cu, mask=mask.bool().flatten(), ref_logprobs=ref.flatten(), **options,
                         **dict(ours))  # fmt: skip
    g = torch.autograd.grad(out.loss, y)[0]
    assert abs(float(out.loss.detach() - want.detach())) < 1e-12 * max(1.0, abs(float(want.detach())))
    assert float((g - want_g).abs().max()) < 1e-12
    return out.metrics(), metrics


@pytest.mark.parametrize("spread", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("name", SAME)
def test_same_loss_and_gradient_as_trl(name, spread):
    ours, theirs = both(name, spread)
    if name in ("ppo", "grpo", "dapo"):
        assert float(ours["policy/clipfrac_low"]) == pytest.approx(theirs["clip_ratio/low_mean"][0])
        assert float(ours["policy/clipfrac_high"]) == pytest.approx(theirs["clip_ratio/high_mean"][0])


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_same_kl_term_as_trl(name):
    both(name, theirs={"beta": 0.04}, ours={"kl_coef": 0.04})
    if name != "gspo":
        both(name, theirs={"beta": 0.04, "bias": True}, ours={"kl_coef": 0.04, "kl_bias_correction": True})


def test_same_cap_as_trl():
    """TRL's delta: at or above 1 + eh it is dual_clip; below, it caps the other side as well."""
    both("grpo", 1.0, theirs={"delta": 1.5}, ours={"dual_clip": 1.5})
    both("grpo", 1.0, theirs={"delta": 1.1}, ours={"dual_clip": 1.2, "clip_high": 0.1})
