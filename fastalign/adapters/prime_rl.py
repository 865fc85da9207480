"""prime-rl: a policy loss for its `import_path`.

prime-rl calls it with a packed micro-batch (or one sequence) and scales the sum that it returns. prime-rl is
not on the package index: this is tested against the signature of prime_rl.trainer.rl.loss."""

from __future__ import annotations

import importlib
from typing import Any

import torch

import fastalign as fa
from fastalign.adapters.common import Adapter

ADAPTER = Adapter(
    "prime_rl", "prime-rl", "",
    registers=(
        'a policy loss: trainer.loss.type="custom", '
        'trainer.loss.import_path="fastalign.adapters.prime_rl.policy_loss", '
        "its name and options in trainer.loss.kwargs",
    ),
)  # fmt: skip


def policy_loss(inputs: Any, *, loss: str = "ppo", **options: Any) -> Any:
    """`LossOutputs` of `LossInputs`: the sum over the tokens of loss_mask, each times its loss_weights. The ratio
    is that of trainer_logprobs to inference_logprobs.

    Args:
        loss: a policy loss of fastalign with a ratio per token, or none. The others need to know where
            sequences begin, which prime-rl's inputs do not say.
        options: as in `fastalign.policy_loss`: clip_low, clip_high, dual_clip, tau_pos, ...; with kl_coef the
            KL to ref_logprobs. aggregation and num_items are prime-rl's own.
    """
    preset = fa.policy_losses.get(loss)
    if preset.needs_lengths and preset.ratio != "token":
        legal = [n for n, p in fa.policy_losses.PRESETS.items() if p.ratio == "token"]
        raise ValueError(
            f"loss={loss!r} has one ratio per sequence, and prime-rl's inputs do not say where sequences begin; "
            f"legal: {', '.join(legal)}"
        )
    if own := {"aggregation", "num_items", "norm_length", "cu_seqlens"} & set(options):
        raise ValueError(f"{', '.join(sorted(own))}: prime-rl sums over the tokens and scales the sum itself")
    weights = getattr(inputs, "loss_weights", None)  # there since 2026
    if weights is not None and {"kl_coef", "entropy_coef"} & set(options):
        raise ValueError(
            "kl_coef has no per-token weight: it cannot be used where prime-rl gives loss_weights"
        )
    ref = {"ref_logprobs": inputs.ref_logprobs} if "kl_coef" in options else {}
    out = fa.policy_loss(
        inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages, loss=preset, mask=inputs.loss_mask,
        is_weight=weights, aggregation="token_sum", **ref, **options,
    )  # fmt: skip
    metrics = out.metrics()
    with torch.no_grad():
        shown = {
            name: metrics[f"policy/{name}"].sum / metrics[f"policy/{name}"].count.clamp(min=1)
            for name in ("clipfrac", "clipfrac_low", "clipfrac_high", "approxkl")
        }
    outputs = importlib.import_module("prime_rl.trainer.rl.loss").LossOutputs
    return outputs(loss=out.loss, metrics=shown)
