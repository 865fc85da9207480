"""verl's value loss and KL penalty, and the policy losses that are registered with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.adapters import padded
from fastalign.losses.policy import PRESETS

# verl's loss_agg_mode -> ours, and which of its global counts divides.
_AGGREGATIONS = {
    "token-mean": ("token_mean", "batch_num_tokens"),
    "token-sum": ("token_sum", None),
    "seq-mean-token-mean": ("seq_mean_token_mean", "global_batch_size"),
    "seq-mean-token-sum": ("seq_mean_token_sum", "global_batch_size"),
    "seq-mean-token-sum-norm": ("seq_mean_token_sum_norm", "global_batch_size"),
}  # fmt: skip


def aggregation_options(
    loss_agg_mode: str,
    mask: Tensor,
    *,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> dict[str, Any]:
    """verl's `agg_loss` in our words, except for the factor dp_size."""
    if loss_agg_mode not in _AGGREGATIONS:
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}; legal: {', '.join(_AGGREGATIONS)}")
    aggregation, count_name = _AGGREGATIONS[loss_agg_mode]
    counts = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
    options: dict[str, Any] = {"aggregation": aggregation}
    if count_name is not None:
        if counts[count_name] is None and dp_size > 1:
            raise ValueError(f"{count_name} is required when dp_size > 1")
        options["num_items"] = counts[count_name]
    if aggregation == "seq_mean_token_sum_norm":
        options["norm_length"] = float(mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return options


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[Tensor, Tensor]:
    """(loss, share of the scored tokens whose clipped branch is the larger), of [B, T] tensors."""
    dtype = padded.common_dtype(
        vpreds, returns, values, response_mask, by_sequence=loss_agg_mode.startswith("seq-")
    )
    mask = response_mask.bool()
    options = aggregation_options(
        loss_agg_mode, mask, dp_size=dp_size, batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
    )  # fmt: skip
    own = padded.common_dtype(vpreds, returns, values)
    out = padded.value_loss(own, vpreds, values, returns, mask, cliprange_value, **options)
    clipped = out.metrics()["val/clipfrac"]
    return (out.loss * dp_size).to(dtype), (clipped.sum / clipped.count.clamp(min=1)).float()


# verl's names of a KL estimate -> ours, and its clamp.
_ESTIMATES = {
    "kl": ("k1", None), "k1": ("k1", None), "abs": ("abs", None), "mse": ("k2", None), "k2": ("k2", None),
    "low_var_kl": ("k3", 10.0), "k3": ("k3", 10.0),
}  # fmt: skip


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """The estimate per token; with "+" behind its name the gradient of k2."""
    dtype = padded.common_dtype(logprob, ref_logprob)
    if logprob.shape != ref_logprob.shape:
        logprob, ref_logprob = torch.broadcast_tensors(logprob, ref_logprob)
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATES or kl_penalty.endswith("++"):
        raise NotImplementedError(  # as verl's own does, and callers may expect
            f"kl_penalty={kl_penalty!r} is no estimate from the tokens' log-probs; legal: "
            f"{', '.join(_ESTIMATES)}, "
            "each also with a + behind it"
        )
    kind, clamp = _ESTIMATES[name]
    if not kl_penalty.endswith("+"):
        return fa.kl_estimate(logprob, ref_logprob, kind, clamp=clamp).to(dtype)
    slope = fa.kl_estimate(logprob, ref_logprob, "k2")
    value = fa.kl_estimate(logprob.detach(), ref_logprob.detach(), kind, clamp=clamp)
    return padded.with_slope_of(value, slope).to(dtype)


def policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss with verl's signature: surrogate and ratio are the preset's, everything that verl's config
    has is taken from there: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c (of token ratios), tau_pos,
    tau_neg, loss_agg_mode and the global counts."""
    preset = PRESETS[name]
    if config is None:
        raise ValueError(f"loss_mode=fastalign_{name} needs verl's actor config; got None")
    counts = dict(config.global_batch_info)
    dp_size = counts.get("dp_size", 1)
    options = aggregation_options(loss_agg_mode, response_mask, **counts)
    ends = (config.clip_ratio_low, config.clip_ratio_high)
    low, high = (config.clip_ratio if end is None else end for end in ends)
    dual_clip = config.get("clip_ratio_c", 3.0) if preset.ratio == "token" else None
    options |= padded.clip_options(preset, low, high, dual_clip)
    if preset.surrogate == "sapo":
        options |= {"tau_pos": config.tau_pos, "tau_neg": config.tau_neg}
    loss, numbers = padded.policy_loss(
        preset, log_prob, old_log_prob, advantages, response_mask, is_weight=rollout_is_weights, **options
    )
    names = {"clipfrac": "pg_clipfrac", "kl": "ppo_kl", "clipfrac_lower": "pg_clipfrac_lower"}
    values = torch.stack([numbers[own].float() for own in names]).tolist()  # one wait for the device
    return loss * dp_size, {f"actor/{theirs}": value for theirs, value in zip(names.values(), values)}


# loss_mode -> function, for `register_policy_loss`.
POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, float]]]] = {
    f"fastalign_{name}": functools.partial(policy_loss, name) for name in PRESETS
}
