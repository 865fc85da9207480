"""What the adapters share: a batch [B, T] with a mask is read where it lies, a row of it as
a sequence, what the mask leaves out as holes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.losses.policy import PolicyPreset

# An ignore_index that no label can have, for trainers that ignore none.
NO_LABEL = -(1 << 62)


def boundaries(padded: Tensor) -> Tensor:
    """cu_seqlens of the rows of [B, T]."""
    rows, columns = padded.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=padded.device) * columns


def common_dtype(*tensors: Tensor | None, by_sequence: bool = False) -> torch.dtype:
    """What the trainer's arithmetic between them gives, masks of floating type included. by_sequence: its means
    over sequences multiply by fp32."""
    dtypes = [t.dtype for t in tensors if t is not None] + [torch.float32] * by_sequence
    return functools.reduce(torch.promote_types, dtypes)


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """[B]: of each row of [B, T] the mean over the mask, 0 where that is empty."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def with_slope_of(value: Tensor, other: Tensor) -> Tensor:
    """The value of the one, which has no graph, to the bit, and the gradient of the other."""
    return other - other.detach() + value


def value_loss(
    dtype: torch.dtype, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None,
    **options: Any
) -> Any:  # fmt: skip
    """`fastalign.value_loss` of [B, T] tensors, computed in dtype."""
    return fa.value_loss(
        values.to(dtype).flatten(), old_values.flatten(), returns.flatten(), cu_seqlens=boundaries(mask),
        mask=mask.flatten(), clip=clip, **options,
    )  # fmt: skip


def clip_options(
    preset: PolicyPreset, low: float, high: float, dual_clip: float | None = None
) -> dict[str, float]:
    """Of a trainer's clip range what the surrogate reads. A ratio is never below 0, whatever `low` says."""
    if preset.surrogate not in ("clip", "cispo", "gmpo"):
        return {}
    own = {"clip_low": min(low, 1.0) if preset.surrogate == "clip" else low, "clip_high": high}
    dual = dual_clip is not None and preset.surrogate == "clip"
    return {**own, "dual_clip": dual_clip} if dual else own


def policy_loss(
    preset: PolicyPreset,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    is_weight: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`fastalign.policy_loss` of [B, T] tensors, or of packed ones with cu_seqlens, in the dtype of their
    arithmetic, and three numbers on the device: clipfrac, clipfrac_lower (the dual clip's) and kl (mean of
    old - new), over the scored tokens.

    A loss with one ratio per sequence is a function of one advantage per sequence. It is linear in those of
    one sign, so that advantages that vary within a sequence are two: the means of its positive and of its
    negative ones. gmpo, whose tokens are clipped by the sign, takes their mean, as verl does. Weights that vary
    are their mean, too; of gmpo, as in verl, the geometric one."""
    by_sequence = options["aggregation"].startswith("seq_")
    dtype = common_dtype(logprobs, old_logprobs, advantages, mask, is_weight, by_sequence=by_sequence)
    cu_seqlens = boundaries(mask) if cu_seqlens is None else cu_seqlens
    logprobs, old, advantages, mask = (
        x.flatten() for x in (logprobs, old_logprobs.detach(), advantages.detach(), mask.bool())
    )
    weight = None if is_weight is None else is_weight.detach().flatten()
    of_sequences = functools.partial(fa.sequence_sum, cu_seqlens=cu_seqlens, mask=mask, mean=True)
    parts = [advantages]
    if preset.needs_sequence_values:
        geometric = preset.surrogate == "gmpo"
        parts = [advantages] if geometric else [advantages.clamp(min=0), advantages.clamp(max=0)]
        parts = [of_sequences(part) for part in parts]
        if weight is not None:
            weight = of_sequences((weight + 1e-10).log()).exp() if geometric else of_sequences(weight)
    call = {"cu_seqlens": cu_seqlens, "mask": mask, **options}
    outputs = [fa.policy_loss(logprobs, old, part, loss=preset, is_weight=weight, **call) for part in parts]
    with torch.no_grad():
        counted = outputs
        if preset.clips_sequences and preset.ratio == "seq_mean":  # trainers count clipped tokens
            by_token = preset.replace(ratio="seq_mean_token")
            counted = [fa.policy_loss(logprobs, old, advantages, loss=by_token, **call)]
        metrics = [output.metrics() for output in counted]
        clipped, dual = (
            sum(m[name].sum / m[name].count.clamp(min=1) for m in metrics)
            for name in ("policy/clipfrac", "policy/clipfrac_lower")
        )
        kl = masked_mean((old - logprobs).clamp(-20.0, 20.0), mask)
    numbers = {"clipfrac": (clipped - dual).float(), "clipfrac_lower": dual.float(), "kl": kl}
    return sum(output.loss for output in outputs).to(dtype), numbers
