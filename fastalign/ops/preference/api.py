"""Every DPO-family loss on packed per-token log-probs or on sequence sums: value and slopes in one evaluation, one launch each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.checks import (
    as_int32,
    check_choice,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_pairs_values,
    check_same_device,
    check_shape,
    global_count,
    per_token,
    row_mask,
)  # fmt: skip
from fastalign.function import Function
from fastalign.layout import refuse
from fastalign.ops.preference import compose
from fastalign.ops.preference.output import PreferenceOutput
from fastalign.preset import REDUCTIONS, SCALAR_COUNT, TENSOR_FIELDS, TENSOR_ONLY, PairParams, Preset
from fastalign.registry import Op, scalar_dtypes, standard_kernels
from fastalign.rules import BatchRule
from fastalign.slopes import times_slope

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


def _check_values(logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, sums, beta, omega, soft_labels, *rest):
    """cu_seqlens monotone, pairs inside [0, S), beta not negative, soft labels probabilities."""
    if soft_labels is not None and bool(((soft_labels < 0) | (soft_labels > 1)).any()):
        raise ValueError("soft_labels are probabilities that the chosen response wins; legal: 0 to 1")
    if beta is not None and bool((beta < 0).any()):
        raise ValueError("beta must not be negative")
    if cu_seqlens is None:
        return
    check_cu_seqlens_values(cu_seqlens, logprobs.shape[0])
    if pairs is not None:
        check_pairs_values(pairs, cu_seqlens.shape[0] - 1)


def _fwd_rules(logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, sums, beta, omega, soft_labels, gamma_ext, target, anchor, valid,
               num_items, num_sft_tokens, scalars, switches, count, table):  # fmt: skip
    refuse((logprobs is None) == (sums is None), "either logprobs or sums must be given")
    refuse(sums is None and cu_seqlens is None, "logprobs need cu_seqlens")
    if sums is None:
        _pair_rules(ref_logprobs, cu_seqlens, pairs, scalars, switches, count)


def _pair_rules(ref_logprobs, cu_seqlens, pairs, scalars, switches, count):
    """What the kernels read without asking: the reference where the parameters have one, the sequences of the default pairs."""
    refuse(PairParams(*scalars, *switches).reference != 0 and ref_logprobs is None, "the parameters need ref_logprobs")
    refuse(pairs is None and 2 * count > cu_seqlens.shape[0] - 1, f"{count} pairs without `pairs` need as many times two sequences")


preference_fwd = Op(
    "preference_fwd", _FWD_SCHEMA, _fwd_fake, standard_kernels("preference", "preference_fwd"), scalar_dtypes(),
    "logprobs[T] ref_logprobs[T] kl[T] cu_seqlens[S+1]:int32 pairs[count,2]:int32 mask[T]:bool weights[T] sums[count,2,6] beta[count?]"
    " omega[count?] soft_labels[count?] gamma_ext[count?] target[count?] anchor[count?] valid[count]:bool num_items[] num_sft_tokens[]",
    _fwd_rules, _check_values,
)  # fmt: skip
preference_bwd = Op(
    "preference_bwd",
    "(Tensor grad, Tensor logprobs, Tensor? ref_logprobs, Tensor cu_seqlens, Tensor? pairs, Tensor? mask, Tensor? weights, Tensor sums,"
    " Tensor table, float[] scalars, int[] switches, bool with_kl) -> (Tensor, Tensor)",
    lambda grad, logprobs, *rest: (torch.empty_like(logprobs), logprobs.new_empty(logprobs.shape[0] if rest[-1] else 0)),
    standard_kernels("preference", "preference_bwd"), scalar_dtypes(),
    "grad[P?] logprobs[T] ref_logprobs[T] cu_seqlens[S+1]:int32 pairs[P,2]:int32 mask[T]:bool weights[T] sums[P,2,6] table[P,11]",
    lambda grad, logprobs, ref_logprobs, cu_seqlens, pairs, mask, weights, sums, table, scalars, switches, with_kl: _pair_rules(
        ref_logprobs, cu_seqlens, pairs, scalars, switches, table.shape[0]
    ),
)  # fmt: skip
# grad: [] for reductions mean and sum (gradient of the loss), [P] for none (of pair_loss). Results: d logprobs [T], d kl [T] or empty(0).


class PreferenceFunction(Function):
    """From per-token tensors."""

    names = "preference_loss (unpaired_loss, reward_loss)"

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
    def backward(ctx, grad, *_):
        d_logprobs, d_kl = preference_bwd(grad.contiguous(), *ctx.saved_tensors, *ctx.params, ctx.with_kl)
        return d_logprobs, None, d_kl if ctx.with_kl else None, *(None,) * 7


class PairSumsFunction(Function):
    """Sums [P, 2, SUM_WIDTH] of per-token tensors: the first half of the kernel, for losses that do something between the halves."""

    names = "preference_loss (unpaired_loss, reward_loss)"

    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, params, count):
        scalars, switches = list(params[:SCALAR_COUNT]), list(params[SCALAR_COUNT:])
        sums = preference_fwd(
            logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, None, *(None,) * 9, scalars, switches, count, False
        )[3]
        ctx.save_for_backward(logprobs, ref_logprobs, cu_seqlens, pairs, mask, weights, sums)
        ctx.params, ctx.with_kl = (scalars, switches), kl is not None
        return sums

    @staticmethod
    def backward(ctx, grad):
        # The gradient of the sums takes the place of the table's slopes. The policy's sums move with its log-probs as the log-ratios do
        # (no token clamp where they are used: see compose.shared_params).
        slopes = grad.new_zeros((grad.shape[0], TABLE_WIDTH))
        slopes[:, 0:2], slopes[:, 2:4], slopes[:, 4] = grad[:, :, 0] + grad[:, :, 1], grad[:, :, 3], grad[:, 0, 4]
        slopes[:, 8] = 1.0  # every row counts
        one = grad.new_ones(())
        d_logprobs, d_kl = preference_bwd(one, *ctx.saved_tensors, slopes, *ctx.params, ctx.with_kl)
        return d_logprobs, None, d_kl if ctx.with_kl else None, *(None,) * 6


class PreferenceFromSumsFunction(Function):
    """From sums [P, 2, SUM_WIDTH]; the slopes of the table are the gradient."""

    names = "preference_loss_from_sums"

    @staticmethod
    def forward(ctx, sums, extra, params):
        scalars, switches = list(params[:SCALAR_COUNT]), list(params[SCALAR_COUNT:])
        loss, pair_loss, table, _ = preference_fwd(*(None,) * 7, sums, *extra, scalars, switches, sums.shape[0], True)
        ctx.save_for_backward(table)
        ctx.mark_non_differentiable(table)
        return (pair_loss if params.reduction == REDUCTIONS.index("none") else loss), table

    @staticmethod
    def backward(ctx, grad, _):
        (table,) = ctx.saved_tensors
        out = table.new_zeros((table.shape[0], 2, SUM_WIDTH))
        g = grad.unsqueeze(-1) if grad.dim() else grad
        out[:, :, 1] = times_slope(g, table[:, 0:2])
        out[:, :, 3] = times_slope(g, table[:, 2:4])
        out[:, 0, 4] = times_slope(grad, table[:, 4])
        return out, None, None


def preference_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    *,
    loss: str | Preset | Sequence[tuple[str | Preset, float]] = "dpo",
    pairs: Tensor | None = None,
    mask: Tensor | None = None,
    kl_ref_policy: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    state: BatchRule | Sequence[BatchRule] | None = None,
    **options: Any,
) -> PreferenceOutput:
    """A preference loss over pairs of packed sequences; the formula of every loss is in `fastalign.losses.available()`.

    Args:
        logprobs: [T] policy log-probs, row-aligned (row t scores the next token), 0 at unscored rows; differentiable.
        ref_logprobs: [T] reference log-probs, never differentiated; None where the loss needs none (it is accepted and not read then).
        cu_seqlens: [S + 1] int32, from 0 to T.
        loss: a name of `losses.available()`, a Preset, or a mixture [(name or Preset, weight), ...] whose losses share one pass and add up;
            a mixture takes no further options (put them into Presets), and its rewards are those of its first loss (in metrics(): of the first
            that is not SFT).
        pairs: [P, 2] integers, (chosen, rejected) sequence numbers; default (0, 1), (2, 3), ... A sequence may be in several pairs.
        mask: [T] bool, row-aligned: the response tokens. Required by losses that use lengths.
        kl_ref_policy: [T] exact KL(ref || policy) per token, for losses with sequence KLs; differentiable.
        weights: [T] token weights, any sign, on log-probs and reference alike; not differentiated, and not applied to the SFT term.
        reduction: "mean" over the valid pairs, "sum", or "none" ([P]; its mean over the valid pairs is "mean").
        num_items: the number of valid pairs over all micro-batches and ranks, for "mean" under gradient accumulation; number or 0-dim tensor.
        num_sft_tokens: likewise the number of tokens of the SFT term (sft_norm="token_mean_global").
        state: the rule object (`fastalign.BetaDPO`, `AlphaDPO`, `BCODelta`) that beta_dpo, alpha_dpo and bco need; it remembers between calls.
        options: the loss's own options and fields of Preset, by name. beta, target and anchor may be tensors, 0-dim or [P]; omega
            (pair weights), gamma_ext (extra margin), soft_labels (P(chosen wins)) and valid (bool) are tensors [P]. Tensors are constants here.

    Returns:
        PreferenceOutput. A pair whose two responses are both empty is not valid and counts nowhere.

    Raises:
        ValueError, TypeError: unknown loss or option, impossible combination, shapes, dtypes, devices, missing mask or reference log-probs.
        IndexError: pairs outside [0, S) (checked on the CPU).
    """
    components, tensors = compose.components(loss, options)
    presets = [p for p, _ in components]
    check_choice("reduction", reduction, REDUCTIONS)
    logprobs = per_token("logprobs", logprobs)
    cu_seqlens = check_cu_seqlens(cu_seqlens, logprobs)
    for p in presets:
        if mask is None and p.needs_lengths:
            raise ValueError(f"loss {p.name!r} uses response lengths: mask is required (row-aligned, True at response tokens)")
        if p.needs_reference and ref_logprobs is None:
            raise ValueError(f"loss {p.name!r} needs ref_logprobs")
        if p.needs_kl and kl_ref_policy is None:
            raise ValueError(f"loss {p.name!r} needs kl_ref_policy, the per-token KL(ref || policy)")
    ref = per_token("ref_logprobs", ref_logprobs, logprobs).detach() if any(p.needs_reference for p in presets) else None
    kl = per_token("kl_ref_policy", kl_ref_policy, logprobs) if any(p.needs_kl for p in presets) else None
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
        pairs, count = as_int32(pairs), pairs.shape[0]
    tokens = (logprobs, ref, kl, cu_seqlens, pairs, mask, weights)
    if compose.is_plain(components, state):
        extra = pair_extra(presets[0], tensors, count, num_items, num_sft_tokens, logprobs)
        value, table, sums = PreferenceFunction.apply(*tokens, extra, presets[0].params(reduction), count)
        return PreferenceOutput(value, presets[0], table, sums, presets[0].sft_weight != 0, (), tensors.get("target"))
    sums = PairSumsFunction.apply(*tokens, compose.shared_params(presets), count)
    return _from_sums(components, sums, tensors, state, reduction, num_items, num_sft_tokens)


def _from_sums(
    components: list[tuple[Preset, float]],
    sums: Tensor,
    tensors: dict[str, Tensor],
    state: Any,
    reduction: str,
    num_items: Any,
    num_sft_tokens: Any,
) -> PreferenceOutput:
    """The table of every component from the same sums (with log-ratios against the reference where any component has one), added up."""
    total, first = None, None
    rules = compose.rules_of(components, state)
    with_reference = any(p.needs_reference for p, _ in components)
    for preset, weight in components:
        own, given = compose.prepare(preset, sums, tensors, rules.get(preset.rule), with_reference)
        extra = pair_extra(preset, given, sums.shape[0], num_items, num_sft_tokens, sums)
        value, table = PreferenceFromSumsFunction.apply(own, extra, preset.params(reduction))
        total = weight * value if total is None else total + weight * value
        if first is None:
            first = preset, compose.own_rewards(preset, table, sums, tensors), sums.detach()
    has_sft = any(p.sft_weight for p, _ in components)
    return PreferenceOutput(total, *first, has_sft, tuple(p for p, _ in components), tensors.get("target"))


def preference_loss_from_sums(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss: str | Preset | Sequence[tuple[str | Preset, float]] = "dpo",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_kl: Tensor | None = None,
    rejected_kl: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    state: BatchRule | Sequence[BatchRule] | None = None,
    **options: Any,
) -> PreferenceOutput:
    """The same losses for trainers that have already summed their log-probs over tokens.

    Args:
        chosen, rejected: [P] sums (never means) of the policy's log-probs over the response tokens; differentiable.
        ref_chosen, ref_rejected: [P], the reference's; needed where the loss needs a reference. fp64 is worth its bytes: the sums cancel.
        chosen_lengths, rejected_lengths: [P] numbers of response tokens; required by losses that use lengths. Without them every
            response counts as non-empty.
        chosen_kl, rejected_kl: [P] sequence KLs, differentiable, for losses with sequence KLs.
        loss, reduction, num_items, num_sft_tokens, state, options: as in `preference_loss`. Options that act on single tokens (ld_alpha, token_clamp,
            sft_include_prompt) raise here.

    Returns:
        PreferenceOutput.
    """
    components, tensors = compose.components(loss, options)
    presets = [p for p, _ in components]
    check_choice("reduction", reduction, REDUCTIONS)
    for p in presets:
        if p.ld_alpha != 1.0 or p.token_clamp is not None or p.sft_include_prompt:
            raise ValueError("ld_alpha, token_clamp and sft_include_prompt act on single tokens; use preference_loss on packed log-probs")
        if p.needs_reference and (ref_chosen is None or ref_rejected is None):
            raise ValueError(f"loss {p.name!r} needs ref_chosen and ref_rejected")
        if p.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
            raise ValueError(f"loss {p.name!r} uses response lengths: chosen_lengths and rejected_lengths are required")
        if p.needs_kl and (chosen_kl is None or rejected_kl is None):
            raise ValueError(f"loss {p.name!r} needs chosen_kl and rejected_kl, the sequence sums of KL(ref || policy)")
    chosen = per_token("chosen", chosen)
    if rejected.dtype == torch.float64 and chosen.dtype != torch.float64:
        chosen = chosen.double()
    rejected = per_token("rejected", rejected, chosen)
    if any(p.needs_reference for p in presets):
        ratios = []
        for name, policy, ref in (("ref_chosen", chosen, ref_chosen), ("ref_rejected", rejected, ref_rejected)):
            check_shape(name, ref, tuple(chosen.shape))
            check_same_device(name, ref, "chosen", chosen)
            # Subtract in the wider type, then round once. Equal infinities differ by 0; equal numbers do too, but pass the gradient on.
            difference = (policy - ref.detach()).to(policy.dtype)
            ratios.append(torch.where((policy == ref) & torch.isinf(policy), torch.zeros_like(policy), difference))
    else:
        ratios = [chosen, rejected]

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
        kl = column(f"{side}_kl", kl if any(p.needs_kl for p in presets) else None, 0.0)
        sides.append(torch.stack([policy, ratio, length, kl, policy, length], -1))
    return _from_sums(components, torch.stack(sides, 1), tensors, state, reduction, num_items, num_sft_tokens)


def pair_extra(
    preset: Preset, tensors: dict[str, Tensor], count: int, num_items: Any, num_sft_tokens: Any, like: Tensor
) -> tuple[Tensor | None, ...]:
    """The op's tensors per pair, `valid`, and the two global counts, in the op's order; constants of the loss."""
    if preset.needs_soft_labels and "soft_labels" not in tensors:
        raise ValueError(f"loss {preset.name!r} needs soft_labels, a tensor [P]")
    if missing := [name for name in preset.requires if name not in tensors]:
        hint = " (fastalign.wpo_weights computes it)" if preset.name == "wpo" else ""
        raise ValueError(f"loss {preset.name!r} needs {', '.join(missing)}, a tensor [P]{hint}")
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
    out += [global_count(name, value, like) for name, value in (("num_items", num_items), ("num_sft_tokens", num_sft_tokens))]
    return tuple(out)


assert set(TENSOR_ONLY) - {"valid"} | set(TENSOR_FIELDS) == set(_PAIR_TENSORS)
