"""Every DPO-family loss on packed per-token log-probs or on sequence sums: value and slopes in one evaluation, one launch each way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.checks import (
    check_choice,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_number,
    check_same_device,
    check_shape,
    per_token,
    row_mask,
)  # fmt: skip
from fastalign.losses import resolve
from fastalign.preset import REDUCTIONS, SCALAR_COUNT, TENSOR_FIELDS, TENSOR_ONLY, Preset
from fastalign.registry import Op, scalar_dtypes, standard_kernels

SUM_WIDTH, TABLE_WIDTH = 6, 11
# Tensors per pair, in the order of the op's arguments; `valid` follows them.
_PAIR_TENSORS = ("beta", "omega", "soft_labels", "gamma_ext", "target", "anchor")

_FWD_SCHEMA = (
    "(Tensor? logprobs, Tensor? ref_logprobs, Tensor? kl, Tensor? cu_seqlens, Tensor? pairs, Tensor? mask, Tensor? weights, Tensor? sums,"
    " Tensor? beta, Tensor? omega, Tensor? soft_labels, Tensor? gamma_ext, Tensor? target, Tensor? anchor, Tensor? valid, Tensor? num_items,"
    " Tensor? num_sft_tokens, float[] scalars, int[] switches, SymInt count, bool table) -> (Tensor, Tensor, Tensor, Tensor)"
)
# Per-token tensors [T], or sums [P, 2, SUM_WIDTH] instead. pairs [P, 2] int32 or None: (0, 1), (2, 3), ...  scalars and switches: PairParams.
# count = P. Results: loss [], pair_loss [P], table [P, TABLE_WIDTH] (columns: csrc/math/pair.h; all three empty(0) if not `table`), sums.


def _fwd_fake(logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, sums, beta, omega, soft_labels, gamma_ext, target, anchor,
              valid, num_items, num_sft_tokens, scalars, switches, count, table):  # fmt: skip
    like = logprobs if sums is None else sums
    shapes = [(), (count,), (count, TABLE_WIDTH)] if table else [(0,)] * 3
    return tuple(like.new_empty(s) for s in (*shapes, (count, 2, SUM_WIDTH)))


def _check_values(logprobs, ref_logprobs, kl, cu_seqlens, pairs, *rest):
    """cu_seqlens monotone, pairs inside [0, S)."""
    if cu_seqlens is None:
        return
    check_cu_seqlens_values(cu_seqlens, logprobs.shape[0])
    sequences = cu_seqlens.shape[0] - 1
    if pairs is not None and pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= sequences):
        raise IndexError(f"pairs holds sequence numbers from {int(pairs.min())} to {int(pairs.max())}; legal: 0 to {sequences - 1}")


preference_fwd = Op(
    "preference_fwd", _FWD_SCHEMA, _fwd_fake, standard_kernels("preference", "preference_fwd"), scalar_dtypes(), check=_check_values
)
preference_bwd = Op(
    "preference_bwd",
    "(Tensor grad, Tensor logprobs, Tensor? ref_logprobs, Tensor cu_seqlens, Tensor? pairs, Tensor? mask, Tensor? weights, Tensor sums,"
    " Tensor table, float[] scalars, int[] switches, bool with_kl) -> (Tensor, Tensor)",
    lambda grad, logprobs, *rest: (torch.empty_like(logprobs), logprobs.new_empty(logprobs.shape[0] if rest[-1] else 0)),
    standard_kernels("preference", "preference_bwd"), scalar_dtypes(),
)  # fmt: skip
# grad: [] for reductions mean and sum (gradient of the loss), [P] for none (of pair_loss). Results: d logprobs [T], d kl [T] or empty(0).


class PreferenceFunction(torch.autograd.Function):
    """From per-token tensors."""

    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, extra, params, count):
        scalars, switches = list(params[:SCALAR_COUNT]), list(params[SCALAR_COUNT:])
        loss, pair_loss, table, sums = preference_fwd(
            logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, None, *extra, scalars, switches, count, True
        )
        ctx.save_for_backward(logprobs, ref_logprobs, cu_seqlens, pairs, mask, weights, sums, table)
        ctx.params, ctx.with_kl = (scalars, switches), kl is not None
        ctx.mark_non_differentiable(table, sums)
        return (pair_loss if params.reduction == REDUCTIONS.index("none") else loss), table, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        d_logprobs, d_kl = preference_bwd(grad.contiguous(), *ctx.saved_tensors, *ctx.params, ctx.with_kl)
        return d_logprobs, None, d_kl if ctx.with_kl else None, *(None,) * 7


class PreferenceFromSumsFunction(torch.autograd.Function):
    """From sums [P, 2, SUM_WIDTH]; the slopes of the table are the gradient."""

    @staticmethod
    def forward(ctx, sums, extra, params):
        scalars, switches = list(params[:SCALAR_COUNT]), list(params[SCALAR_COUNT:])
        loss, pair_loss, table, _ = preference_fwd(*(None,) * 7, sums, *extra, scalars, switches, sums.shape[0], True)
        ctx.save_for_backward(table)
        ctx.mark_non_differentiable(table)
        return (pair_loss if params.reduction == REDUCTIONS.index("none") else loss), table

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (table,) = ctx.saved_tensors
        out = table.new_zeros((table.shape[0], 2, SUM_WIDTH))
        g = grad.unsqueeze(-1) if grad.dim() else grad
        out[:, :, 1] = g * table[:, 0:2]
        out[:, :, 3] = g * table[:, 2:4]
        out[:, 0, 4] = grad * table[:, 4]
        return out, None, None


class Metric(NamedTuple):
    """A mean as its (sum, count), both 0-dim tensors on the loss's device: add them over micro-batches and ranks, divide at the end."""

    sum: Tensor
    count: Tensor

    def __float__(self) -> float:
        count = float(self.count)
        return float(self.sum) / count if count else float("nan")


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. `loss` is differentiable; everything else is detached, [P] per pair.

    loss: scalar, or [P] with reduction="none". chosen_rewards, rejected_rewards: beta * a, with the method's own aggregation (token means where
    the method averages). margins: their difference. chosen_logprobs, rejected_logprobs: sums of the policy's log-probs over the scored tokens
    (means for the reference-free methods that average, as TRL logs them). valid: bool, which pairs counted."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    valid: Tensor
    preset: Preset
    table: Tensor
    sums: Tensor

    def metrics(self) -> dict[str, Metric]:
        """TRL's keys -> Metric (sum, count) over the valid pairs: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies
        (chosen > rejected, strictly), logps/chosen, logps/rejected; nll_loss (per token) with an SFT term, seqkl/chosen and seqkl/rejected with
        sequence KLs; n_empty (pairs with an empty side), nonfinite_pairs."""
        valid, zero = self.valid, torch.zeros_like(self.margins)
        count = valid.sum(dtype=self.margins.dtype)

        def over_pairs(x: Tensor) -> Metric:
            return Metric(torch.where(valid, x, zero).sum(), count)

        out = {
            "rewards/chosen": over_pairs(self.chosen_rewards),
            "rewards/rejected": over_pairs(self.rejected_rewards),
            "rewards/margins": over_pairs(self.margins),
            "rewards/accuracies": over_pairs((self.chosen_rewards > self.rejected_rewards).to(zero.dtype)),
            "logps/chosen": over_pairs(self.chosen_logprobs),
            "logps/rejected": over_pairs(self.rejected_logprobs),
        }
        if self.preset.sft_weight:
            out["nll_loss"] = Metric(
                torch.where(valid, -self.sums[:, 0, 4], zero).sum(), torch.where(valid, self.sums[:, 0, 5], zero).sum()
            )
        if self.preset.needs_kl:
            out["seqkl/chosen"], out["seqkl/rejected"] = over_pairs(self.sums[:, 0, 3]), over_pairs(self.sums[:, 1, 3])
        pairs = torch.ones_like(self.margins).sum()
        out["n_empty"] = Metric((self.sums[:, :, 2] == 0).any(-1).sum(dtype=zero.dtype), pairs)
        out["nonfinite_pairs"] = Metric((~torch.isfinite(self.margins)).sum(dtype=zero.dtype), pairs)
        return out


def preference_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    *,
    loss: str | Preset = "dpo",
    pairs: Tensor | None = None,
    mask: Tensor | None = None,
    kl_ref_policy: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    **options: Any,
) -> PreferenceOutput:
    """A preference loss over pairs of packed sequences; the formula of every loss is in `fastalign.losses.available()`.

    Args:
        logprobs: [T] policy log-probs, row-aligned (row t scores the next token), 0 at unscored rows; differentiable.
        ref_logprobs: [T] reference log-probs, never differentiated; None where the loss needs none (it is accepted and not read then).
        cu_seqlens: [S + 1] int32, from 0 to T.
        loss: a name of `losses.available()`, or a Preset.
        pairs: [P, 2] integers, (chosen, rejected) sequence numbers; default (0, 1), (2, 3), ... A sequence may be in several pairs.
        mask: [T] bool, row-aligned: the response tokens. Required by losses that use lengths.
        kl_ref_policy: [T] exact KL(ref || policy) per token, for losses with sequence KLs; differentiable.
        weights: [T] token weights, any sign, on log-probs and reference alike; not differentiated, and not applied to the SFT term.
        reduction: "mean" over the valid pairs, "sum", or "none" ([P]; its mean over the valid pairs is "mean").
        num_items: the number of valid pairs over all micro-batches and ranks, for "mean" under gradient accumulation; number or 0-dim tensor.
        num_sft_tokens: likewise the number of tokens of the SFT term (sft_norm="token_mean_global").
        options: the loss's own options and fields of Preset, by name. beta, target and anchor may be tensors, 0-dim or [P]; omega
            (pair weights), gamma_ext (extra margin), soft_labels (P(chosen wins)) and valid (bool) are tensors [P]. Tensors are constants here.

    Returns:
        PreferenceOutput. A pair whose two responses are both empty is not valid and counts nowhere.

    Raises:
        ValueError, TypeError: unknown loss or option, impossible combination, shapes, dtypes, devices, missing mask or reference log-probs.
        IndexError: pairs outside [0, S) (checked on the CPU).
    """
    preset, tensors = resolve(loss, options)
    check_choice("reduction", reduction, REDUCTIONS)
    logprobs = per_token("logprobs", logprobs)
    cu_seqlens = check_cu_seqlens(cu_seqlens, logprobs)
    if mask is None and preset.needs_lengths:
        raise ValueError(f"loss {preset.name!r} uses response lengths: mask is required (row-aligned, True at response tokens)")
    if preset.needs_reference and ref_logprobs is None:
        raise ValueError(f"loss {preset.name!r} needs ref_logprobs")
    if preset.needs_kl and kl_ref_policy is None:
        raise ValueError(f"loss {preset.name!r} needs kl_ref_policy, the per-token KL(ref || policy)")
    ref = per_token("ref_logprobs", ref_logprobs, logprobs).detach() if preset.needs_reference else None
    kl = per_token("kl_ref_policy", kl_ref_policy, logprobs) if preset.needs_kl else None
    mask = row_mask(mask, logprobs)
    if weights is not None:
        weights = per_token("weights", weights, logprobs).detach()
    sequences = cu_seqlens.shape[0] - 1
    if pairs is None:
        if sequences % 2:
            raise ValueError(f"pairs is required: the default pairs sequences (0, 1), (2, 3), ... but there are {sequences} sequences")
        count = sequences // 2
    else:
        if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype.is_floating_point or pairs.dtype == torch.bool:
            raise ValueError(f"pairs must be integers of shape [P, 2], got {pairs.dtype} {tuple(pairs.shape)}")
        check_same_device("pairs", pairs, "logprobs", logprobs)
        pairs, count = pairs.to(torch.int32).contiguous(), pairs.shape[0]
    extra = _extra(preset, tensors, count, num_items, num_sft_tokens, logprobs)
    value, table, sums = PreferenceFunction.apply(
        logprobs, ref, kl, cu_seqlens, pairs, mask, weights, extra, preset.params(reduction), count
    )
    return _output(value, table, sums, preset)


def preference_loss_from_sums(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss: str | Preset = "dpo",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_kl: Tensor | None = None,
    rejected_kl: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    **options: Any,
) -> PreferenceOutput:
    """The same losses for trainers that have already summed their log-probs over tokens.

    Args:
        chosen, rejected: [P] sums (never means) of the policy's log-probs over the response tokens; differentiable.
        ref_chosen, ref_rejected: [P], the reference's; needed where the loss needs a reference. fp64 is worth its bytes: the sums cancel.
        chosen_lengths, rejected_lengths: [P] numbers of response tokens; required by losses that use lengths. Without them every
            response counts as non-empty.
        chosen_kl, rejected_kl: [P] sequence KLs, differentiable, for losses with sequence KLs.
        reduction, num_items, num_sft_tokens, options: as in `preference_loss`. Options that act on single tokens (ld_alpha, token_clamp,
            sft_include_prompt) raise here.

    Returns:
        PreferenceOutput.
    """
    preset, tensors = resolve(loss, options)
    check_choice("reduction", reduction, REDUCTIONS)
    if preset.ld_alpha != 1.0 or preset.token_clamp is not None or preset.sft_include_prompt:
        raise ValueError("ld_alpha, token_clamp and sft_include_prompt act on single tokens; use preference_loss on packed log-probs")
    chosen = per_token("chosen", chosen)
    if rejected.dtype == torch.float64 and chosen.dtype != torch.float64:
        chosen = chosen.double()
    rejected = per_token("rejected", rejected, chosen)
    if preset.needs_reference:
        if ref_chosen is None or ref_rejected is None:
            raise ValueError(f"loss {preset.name!r} needs ref_chosen and ref_rejected")
        ratios = []
        for name, policy, ref in (("ref_chosen", chosen, ref_chosen), ("ref_rejected", rejected, ref_rejected)):
            check_shape(name, ref, tuple(chosen.shape))
            check_same_device(name, ref, "chosen", chosen)
            # Subtract in the wider type, then round once.
            difference = torch.where(policy == ref, torch.zeros_like(policy), (policy - ref.detach()).to(policy.dtype))
            ratios.append(difference)
    else:
        ratios = [chosen, rejected]
    if preset.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(f"loss {preset.name!r} uses response lengths: chosen_lengths and rejected_lengths are required")
    if preset.needs_kl and (chosen_kl is None or rejected_kl is None):
        raise ValueError(f"loss {preset.name!r} needs chosen_kl and rejected_kl, the sequence sums of KL(ref || policy)")

    def column(name: str, value: Tensor | None, default: float) -> Tensor:
        if value is None:
            return torch.full_like(chosen, default)
        check_shape(name, value, tuple(chosen.shape))
        check_same_device(name, value, "chosen", chosen)
        return value.to(chosen.dtype)

    sides = []
    for policy, ratio, lengths, kl, side in ((chosen, ratios[0], chosen_lengths, chosen_kl, "chosen"),
                                             (rejected, ratios[1], rejected_lengths, rejected_kl, "rejected")):  # fmt: skip
        length = column(f"{side}_lengths", lengths, 1.0).detach()
        kl = column(f"{side}_kl", kl if preset.needs_kl else None, 0.0)
        sides.append(torch.stack([policy.detach(), ratio, length, kl, policy, length], -1))
    sums = torch.stack(sides, 1)
    extra = _extra(preset, tensors, chosen.shape[0], num_items, num_sft_tokens, chosen)
    value, table = PreferenceFromSumsFunction.apply(sums, extra, preset.params(reduction))
    return _output(value, table, sums.detach(), preset)


def _extra(
    preset: Preset, tensors: dict[str, Tensor], count: int, num_items: Any, num_sft_tokens: Any, like: Tensor
) -> tuple[Tensor | None, ...]:
    """The op's tensors per pair, `valid`, and the two global counts, in the op's order; constants of the loss."""
    if preset.needs_soft_labels and "soft_labels" not in tensors:
        raise ValueError(f"loss {preset.name!r} needs soft_labels, a tensor [P]")
    if "soft_labels" in tensors and not preset.takes_soft_labels:
        raise ValueError(f"loss {preset.name!r} does not use soft_labels (labels='soft' does)")
    out: list[Tensor | None] = []
    for name in (*_PAIR_TENSORS, "valid"):
        t = tensors.get(name)
        if t is not None:
            may_be_scalar = name in TENSOR_FIELDS or name in ("omega", "gamma_ext")
            if tuple(t.shape) != (count,) and not (may_be_scalar and t.numel() == 1):
                raise ValueError(f"{name} has shape {tuple(t.shape)}; legal: ({count},)" + " or a single value" * may_be_scalar)
            check_same_device(name, t, "the log-probs", like)
            t = t.detach().to(torch.bool if name == "valid" else like.dtype).contiguous()
            t = t.reshape(()) if t.dim() and tuple(t.shape) != (count,) else t
        out.append(t)
    for name, value in (("num_items", num_items), ("num_sft_tokens", num_sft_tokens)):
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
            check_same_device(name, value, "the log-probs", like)
            value = value.detach().reshape(()).to(like.dtype)
        elif value is not None:
            check_number(name, value, low=0)
            value = torch.full((), float(value), dtype=like.dtype, device=like.device)
        out.append(value)
    return tuple(out)


def _output(value: Tensor, table: Tensor, sums: Tensor, preset: Preset) -> PreferenceOutput:
    chosen, rejected = sums[:, 0, 0], sums[:, 1, 0]
    if not preset.reference and preset.length_norm:
        lengths = sums[:, :, 2].clamp(min=1.0) ** preset.length_norm
        chosen, rejected = chosen / lengths[:, 0], rejected / lengths[:, 1]
    rewards = table[:, 5], table[:, 6]
    return PreferenceOutput(value, *rewards, rewards[0] - rewards[1], chosen, rejected, table[:, 8] > 0, preset, table, sums)


assert set(TENSOR_ONLY) - {"valid"} | set(TENSOR_FIELDS) == set(_PAIR_TENSORS)
