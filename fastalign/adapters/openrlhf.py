"""OpenRLHF: functions that take the place of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.adapters import padded
from fastalign.adapters.common import Adapter, Seam

_HERE = "fastalign.adapters.openrlhf"
_UTILS, _LOSSES = "openrlhf.models.utils", "openrlhf.models.loss"

ADAPTER = Adapter(
    "openrlhf",
    "openrlhf",
    ">=0.11.2,<0.12",
    seams=(
        Seam(f"{_UTILS}:log_probs_from_logits", f"{_HERE}:log_probs_from_logits",
            "one pass, without a [N, V] temporary, flash-attn or not"),
        Seam(f"{_UTILS}:compute_entropy", f"{_HERE}:compute_entropy",
            "one pass, without a [N, V] temporary; nothing is compiled"),
        Seam(f"{_UTILS}:compute_approx_kl", f"{_HERE}:compute_approx_kl",
            "one launch; k3 keeps its digits near 0"),
        Seam(f"{_LOSSES}:PolicyLoss.forward", f"{_HERE}:policy_loss",
            "one launch; what the mask leaves out may be NaN; an empty batch is 0"),
        Seam(f"{_LOSSES}:ValueLoss.forward", f"{_HERE}:value_loss",
            "one launch; what the mask leaves out may be NaN; an empty batch is 0"),
        Seam(f"{_LOSSES}:DPOLoss.forward", f"{_HERE}:dpo_loss", "one launch"),
        Seam(
            "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns",
            f"{_HERE}:get_advantages_and_returns", "one launch in place of a loop over the tokens", needs="vllm",
        ),
    ),
)  # fmt: skip


def everywhere() -> None:
    """Patch OpenRLHF in this process, if it is not yet: what Ray is to call in every worker
    (`worker_process_setup_hook` of its runtime environment)."""
    if ADAPTER.report is None:
        ADAPTER.patch()


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., V), (...) -> (...), in the logits' dtype. As OpenRLHF's it leaves the logits divided by the
    temperature."""
    if temperature != 1.0:
        logits.div_(temperature)
    return fa.token_logprobs(logits, labels, ignore_index=padded.NO_LABEL).to(logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """(..., V) -> (...), in the logits' dtype."""
    return fa.entropy_from_logits(logits, dtype=logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """The estimate per token, clamped to +-10, fp32. unbiased_gradient: its gradient is that of k2 times the
    ratio to the policy that sampled, which is at most OpenRLHF's KL_IS_WEIGHT_CLIP."""
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"Unknown kl_estimator: {kl_estimator}; legal: k1, k2, k3")
    new, base = torch.broadcast_tensors(log_probs.float(), log_probs_base.float())
    if not unbiased_gradient:
        return fa.kl_estimate(new, base, kl_estimator, clamp=10.0)
    value = fa.kl_estimate(new.detach(), base.detach(), kl_estimator, clamp=10.0)
    slope = fa.kl_estimate(new, base, "k2")
    if log_probs_old is not None:
        from openrlhf.models.utils import KL_IS_WEIGHT_CLIP

        slope = (new - log_probs_old.float()).exp().clamp(max=KL_IS_WEIGHT_CLIP).detach() * slope
    return padded.with_slope_of(value, slope)


def _aggregation(
    token_level: bool, mask: Tensor | None, like: Tensor, tokens: Any, sequences: Any
) -> tuple[Tensor, dict[str, Any], Any]:
    """(mask, aggregation and its global count, the count): OpenRLHF's `aggregate_loss`. A mean over the batch
    at hand is not multiplied by dp_size."""
    if mask is None and not (token_level and tokens is None):
        raise ValueError("action_mask=None is legal with token_level_loss and without batch_num_tokens only")
    count = tokens if token_level else sequences
    name = "token_mean" if token_level else "seq_mean_token_mean"
    scored = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    return scored, {"aggregation": name, "num_items": count}, count


def policy_loss(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`PolicyLoss.forward`: (loss, clip ratio, ppo_kl, vllm_kl, share of what is filtered), of [B, T] tensors."""
    if self.policy_loss_type not in ("ppo", "gspo"):
        raise ValueError(f"Invalid policy loss type: {self.policy_loss_type}; legal: ppo, gspo")
    corrected = self.is_correction_level != "off"
    if corrected and rollout_log_probs is None:
        raise ValueError(f"is_correction_level={self.is_correction_level} needs rollout_log_probs; got None")
    mask, options, count = _aggregation(
        self.token_level_loss, action_mask, log_probs, batch_num_tokens, global_batch_size
    )
    weight = vllm_kl = filtered = None
    behaviour = old_log_probs
    if corrected and self.policy_loss_type == "gspo":
        behaviour = rollout_log_probs
    elif corrected:
        weight, filtered = _correction(self, old_log_probs, rollout_log_probs, mask)
        vllm_kl = padded.masked_mean(rollout_log_probs - old_log_probs, mask)
        vllm_kl = vllm_kl.to(padded.common_dtype(rollout_log_probs, old_log_probs, action_mask))
    preset = fa.policy_losses.get(self.policy_loss_type)
    options |= padded.clip_options(preset, self.clip_eps_low, self.clip_eps_high, self.dual_clip)
    loss, numbers = padded.policy_loss(
        preset,
        log_probs,
        behaviour,
        advantages,
        mask if action_mask is None else action_mask,
        is_weight=weight,
        **options,
    )
    ppo_kl = padded.masked_mean((old_log_probs - log_probs).detach(), mask)
    ppo_kl = ppo_kl.to(padded.common_dtype(old_log_probs, log_probs, action_mask))
    return (loss if count is None else loss * dp_size), numbers["clipfrac"], ppo_kl, vllm_kl, filtered


def _correction(settings: Any, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [B, T], share of the units outside the threshold): how far the trainer's log-probs are from the
    sampler's. A unit is a token or a sequence; its statistic the ratio, or the divergence of the sampled token."""
    low, high = settings.is_correction_threshold
    by_sequence = settings.is_correction_level == "seq"
    log_ratio = (old - rollout).detach()
    if settings.is_correction_gating == "ratio":
        statistic = padded.row_means(log_ratio, mask).unsqueeze(-1).exp() if by_sequence else log_ratio.exp()
    else:
        p, q = (x.detach().exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
        if settings.is_correction_gating == "binary_kl":
            statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        else:  # tv
            statistic = (p - q).abs()
        if by_sequence:
            statistic = padded.row_means(statistic, mask).unsqueeze(-1)
    outside = (statistic < low) | (statistic > high)
    share = outside.float().mean() if by_sequence else padded.masked_mean(outside.float(), mask)
    if settings.is_correction_mode == "clip":
        return statistic.clamp(min=low, max=high), share
    return torch.where(outside, 0.0, log_ratio.exp()), share


def value_loss(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> Tensor:
    """`ValueLoss.forward`, of [B, T] tensors."""
    tensors = (values, returns, *(() if self.clip_eps is None else (old_values,)))
    dtype = padded.common_dtype(*tensors, action_mask, by_sequence=not self.token_level_loss)
    mask, options, count = _aggregation(
        self.token_level_loss, action_mask, values, batch_num_tokens, global_batch_size
    )
    own = padded.common_dtype(*tensors)
    out = padded.value_loss(own, values, old_values, returns, mask, self.clip_eps, **options)
    return (out.loss if count is None else out.loss * dp_size).to(dtype)


def dpo_loss(
    self: Any,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`DPOLoss.forward`: (loss, chosen rewards, rejected rewards), of [B] log-probs as OpenRLHF has summed or
    averaged them."""
    sums = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    dtype = padded.common_dtype(*sums)
    if self.ipo:
        ones = torch.ones_like(policy_chosen_logps)
        loss = {"loss": "ipo", "tau": self.beta, "chosen_lengths": ones, "rejected_lengths": ones}
    elif self.label_smoothing:
        loss = {"loss": "cdpo", "beta": self.beta, "label_smoothing": self.label_smoothing}
    else:
        loss = {"loss": "dpo", "beta": self.beta}
    out = fa.preference_loss_from_sums(*sums, **loss)
    rewards = (self.beta * (own - ref).detach() for own, ref in zip(sums[:2], sums[2:]))
    return out.loss.to(dtype), *rewards


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """Method of the experience maker: (advantages, returns), [B, T]. As there every token is a step, those
    outside the mask with value and reward 0."""
    dtype = padded.common_dtype(values, rewards, action_mask)
    if action_mask is not None:
        mask = action_mask.bool()
        values, rewards = torch.where(mask, values, 0.0), torch.where(mask, rewards, 0.0)
    out = fa.gae(rewards.flatten(), values.flatten(), padded.boundaries(rewards), gamma=gamma, lam=lambd)
    return tuple(x.view(rewards.shape).to(dtype) for x in (out.advantages, out.returns))
