"""Distillation losses that are registered with verl: estimates of the KL to the teacher from the sampled
tokens, with "+" the gradient of k2, whose expectation is that of the KL itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.adapters.verl.losses import kl_penalty

KINDS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
NAMES = [f"fastalign_{kind}" for kind in KINDS]


def reverse_kl(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """(losses [B, response], metrics), as verl's own estimators give them."""
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    settings = distillation_config.distillation_loss
    kind = settings.loss_mode.removeprefix("fastalign_")
    if kind == "k1" and not settings.use_policy_gradient:  # which verl refuses by the name k1
        raise ValueError(
            "loss_mode=fastalign_k1 without use_policy_gradient has a gradient that does not know the teacher; "
            "fastalign_k1+ has the KL's"
        )
    student = no_padding_2_padding(model_output["log_probs"], data)
    teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    mask = data["response_mask"]
    mask = mask.bool().to_padded_tensor(False) if mask.is_nested else mask.bool()
    losses = kl_penalty(student, teacher, kind)
    return losses, {"distillation/abs_loss": Metric(AggregationType.MEAN, losses[mask].abs().mean())}
