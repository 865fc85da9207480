"""LLaMA-Factory: functions that take the place of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.adapters.common import Adapter, Seam
from fastalign.adapters.padded import common_dtype

_HERE = "fastalign.adapters.llamafactory"
_DPO, _KTO = (
    "llamafactory.train.dpo.trainer:CustomDPOTrainer",
    "llamafactory.train.kto.trainer:CustomKTOTrainer",
)

ADAPTER = Adapter(
    "llamafactory",
    "llamafactory",
    ">=0.9.5,<0.10",
    seams=(
        Seam("llamafactory.train.trainer_utils:get_batch_logps", f"{_HERE}:get_batch_logps",
            "one pass, without a [B, T, V] temporary"),
        Seam(f"{_DPO}.compute_preference_loss", f"{_HERE}:compute_preference_loss",
             "one launch; pref_loss holds with every TRL (from 0.20 on LLaMA-Factory's own takes hinge and ipo for sigmoid)"),
        Seam(f"{_DPO}.odds_ratio_loss", f"{_HERE}:odds_ratio_loss", "one launch"),
        Seam(f"{_DPO}.simpo_loss", f"{_HERE}:simpo_loss", "one launch"),
        Seam(f"{_DPO}.bco_loss", f"{_HERE}:bco_loss", "one launch"),
        Seam(f"{_KTO}.kto_loss", f"{_HERE}:kto_loss", "one launch"),
    ),
)  # fmt: skip


def get_batch_logps(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """[B, T, V], [B, T] -> (sums of log-probs [B], in the logits' dtype or with ld_alpha at least fp32;
    numbers of scored tokens [B]). The labels are shifted, not the logits, whose gradient then is of their own
    size. ld_alpha: beyond the shorter response of the pair (row i and i + B / 2) log-probs count ld_alpha
    times."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must have the same batch and length"
        )
    following = torch.full_like(labels, label_pad_token_id)
    following[:, :-1] = labels[:, 1:]
    scored = following != label_pad_token_id
    logprobs = fa.token_logprobs(logits, following, ignore_index=label_pad_token_id)
    lengths = scored.sum(-1)
    if ld_alpha is not None:
        half = labels.shape[0] // 2
        shorter = torch.minimum(lengths[:half], lengths[half:]).repeat(2)
        beyond = torch.arange(labels.shape[1], device=labels.device) >= (
            scored.int().argmax(1) + shorter
        ).unsqueeze(1)
        logprobs = torch.where(beyond, ld_alpha * logprobs, logprobs)
    dtype = logits.dtype if ld_alpha is None else torch.promote_types(logits.dtype, torch.float32)
    return logprobs.sum(-1).to(dtype), lengths


def _losses(chosen: Tensor, rejected: Tensor, *ref: Tensor, **loss: Any) -> Tensor:
    """[B], of log-probs that have been averaged where the loss averages."""
    ones = torch.ones_like(chosen)
    out = fa.preference_loss_from_sums(
        chosen, rejected, *ref, chosen_lengths=ones, rejected_lengths=ones, reduction="none", **loss
    )
    return out.loss.to(common_dtype(chosen, rejected))


def odds_ratio_loss(self: Any, chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    return _losses(chosen_logps, rejected_logps, loss="orpo", pair_weight=self.beta)


def simpo_loss(self: Any, chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    return _losses(chosen_logps, rejected_logps, loss="simpo", beta=self.beta, gamma=self.simpo_gamma)


def bco_loss(
    self: Any,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> Tensor:
    """BCO against the running mean of the rewards, which the trainer keeps (`self.running`)."""
    ratios = (chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps)
    self.running.update((self.beta * torch.cat(ratios)).mean().detach())
    return _losses(
        chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps, loss="bco_pair",
        beta=self.beta,
        delta=torch.as_tensor(self.running.mean, dtype=torch.float32, device=chosen_logps.device),
    )  # fmt: skip


def compute_preference_loss(
    self: Any,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen rewards, rejected rewards), [B], by pref_loss, pref_beta, dpo_label_smoothing,
    simpo_gamma and pref_bco_weight."""
    device = self.accelerator.device
    sums = [policy_chosen_logps.to(device), policy_rejected_logps.to(device)]
    if not self.finetuning_args.use_ref_model:
        alone = {"orpo": self.odds_ratio_loss, "simpo": self.simpo_loss}
        if self.loss_type not in alone:
            raise NotImplementedError(  # as LLaMA-Factory's own does
                f"Unknown loss type: {self.loss_type}; without a reference: {', '.join(alone)}"
            )
        return alone[self.loss_type](*sums), *((self.beta * x).detach() for x in sums)
    ref = [reference_chosen_logps.to(device), reference_rejected_logps.to(device)]
    if self.loss_type == "sigmoid" and self.label_smoothing:
        loss = {"loss": "cdpo", "beta": self.beta, "label_smoothing": self.label_smoothing}
    elif self.loss_type in ("sigmoid", "hinge"):
        loss = {"loss": self.loss_type, "beta": self.beta}
    elif self.loss_type == "ipo":
        loss = {"loss": "ipo", "tau": self.beta}
    else:
        raise ValueError(
            f"pref_loss={self.loss_type} is no loss of the trl that LLaMA-Factory takes; legal: sigmoid, "
            "hinge, ipo, orpo, simpo"
        )
    losses = _losses(*sums, *ref, **loss)
    if self.bco_gemma > 1e-6:
        losses = (losses + self.bco_loss(*sums, *ref) * self.bco_gemma) / (1.0 + self.bco_gemma)
    return losses, *((self.beta * (own - other)).detach() for own, other in zip(sums, ref))


def kto_loss(
    self: Any,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    policy_KL_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    reference_KL_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, the desirable responses' first; their rewards; those of the others; the KL that they are
    compared with), by pref_beta, kto_chosen_weight and kto_rejected_weight."""
    policy = torch.cat([policy_chosen_logps, policy_rejected_logps])
    ref = torch.cat([reference_chosen_logps, reference_rejected_logps])
    chosen = policy_chosen_logps.shape[0]
    if self.calculate_KL:
        kl = (policy_KL_logps - reference_KL_logps).mean().detach()
        kl = self.accelerator.gather_for_metrics(kl).mean().clamp(min=0)
    else:
        kl = torch.zeros(1, device=policy.device)
    positions = torch.arange(policy.shape[0] + 1, dtype=torch.int32, device=policy.device)
    out = fa.unpaired_loss(
        policy, ref, positions, positions[:-1] < chosen, loss=self.loss_type, beta=self.beta, reduction="none",
        desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight,
        baseline=kl if self.loss_type == "kto" else None,
    )  # fmt: skip
    dtype = common_dtype(policy, ref)
    rewards = out.rewards.to(dtype)
    return out.loss.to(dtype), rewards[:chosen], rewards[chosen:], kl
