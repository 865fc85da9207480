"""Every DPO-family loss on packed per-token log-probs or on sequence sums: value and slopes in one evaluation, one launch each way."""

from __future__ import annotations

import torch

from fastalign.ops.preference.params import REDUCTIONS, SCALAR_COUNT, PairParams
from fastalign.ops.slopes import times_slope
from fastalign.runtime.checks import (
    check_cu_seqlens_values,
    check_pairs_values,
)
from fastalign.runtime.dispatch import Op, scalar_dtypes, standard_kernels
from fastalign.runtime.function import Function
from fastalign.runtime.layout import refuse

SUM_WIDTH, TABLE_WIDTH = 6, 11
# Tensors per pair, in the order of the op's arguments; `valid` follows them.
PAIR_TENSORS = ("beta", "omega", "soft_labels", "gamma_ext", "target", "anchor")

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
