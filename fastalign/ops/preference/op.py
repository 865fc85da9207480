"""Every DPO-family loss on packed per-token log-probs or on sequence sums: value and slopes in one
evaluation, one launch each way."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastalign.ops.columns import (
    CHOSEN,
    KL_SLOPES,
    NONE,
    RATIO_SLOPES,
    SUM_KL,
    SUM_POLICY,
    SUM_RATIO,
    SUM_SFT,
    SUM_WIDTH,
    TAB_SFT,
    TAB_VALID,
    TABLE_WIDTH,
)
from fastalign.ops.preference.params import PairParams
from fastalign.ops.slopes import times_slope
from fastalign.runtime.arguments import In, Maybe, SymInt
from fastalign.runtime.checks import check_cu_seqlens_values, check_pairs_values
from fastalign.runtime.function import Function
from fastalign.runtime.layout import refuse
from fastalign.runtime.op import SCALAR_DTYPES, Op


class PairTokens(NamedTuple):
    """Numbers per token, and which tokens are whose. pairs None: sequences (0, 1), (2, 3), ..."""

    logprobs: Maybe("T") = None
    ref_logprobs: Maybe("T") = None
    kl: Maybe("T") = None
    cu_seqlens: Maybe("S+1", "int32") = None
    pairs: Maybe("count,2", "int32") = None
    mask: Maybe("T", "bool") = None
    weights: Maybe("T") = None


class PairTensors(NamedTuple):
    """What a call gives per pair, or once for all, in place of the parameters' numbers; and the two global
    counts."""

    beta: Maybe("count?") = None
    omega: Maybe("count?") = None
    soft_labels: Maybe("count?") = None
    gamma_ext: Maybe("count?") = None
    target: Maybe("count?") = None
    anchor: Maybe("count?") = None
    valid: Maybe("count", "bool") = None
    num_items: Maybe("") = None
    num_sft_tokens: Maybe("") = None


PAIR_TENSORS = PairTensors._fields[:7]  # those with a value per pair


class PreferenceFwd(NamedTuple):
    """From tokens, or from the sums of them. count = P; without `table` the sums are all that is made."""

    tokens: PairTokens
    sums: Maybe(f"count,2,{SUM_WIDTH}")
    given: PairTensors
    params: PairParams
    count: SymInt
    table: bool


class PreferenceBwd(NamedTuple):
    """grad: [] for the reductions mean and sum (gradient of the loss), [P] for none (of pair_loss)."""

    grad: In("count?")
    tokens: PairTokens
    sums: In(f"count,2,{SUM_WIDTH}")
    table: In(f"count,{TABLE_WIDTH}")
    params: PairParams
    with_kl: bool


def _fwd_fake(a: PreferenceFwd) -> tuple[torch.Tensor, ...]:
    like = a.tokens.logprobs if a.sums is None else a.sums
    shapes = [(), (a.count,), (a.count, TABLE_WIDTH)] if a.table else [(0,)] * 3
    return tuple(like.new_empty(s) for s in (*shapes, (a.count, 2, SUM_WIDTH)))


def _bwd_fake(a: PreferenceBwd) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = a.tokens.logprobs
    return torch.empty_like(logprobs), logprobs.new_empty(logprobs.shape[0] if a.with_kl else 0)


def _check_values(a: PreferenceFwd) -> None:
    """cu_seqlens monotone, pairs inside [0, S), beta not negative, soft labels probabilities."""
    soft_labels, cu_seqlens, pairs = a.given.soft_labels, a.tokens.cu_seqlens, a.tokens.pairs
    if soft_labels is not None and bool(((soft_labels < 0) | (soft_labels > 1)).any()):
        raise ValueError("soft_labels are probabilities that the chosen response wins; legal: 0 to 1")
    if a.given.beta is not None and bool((a.given.beta < 0).any()):
        raise ValueError("beta must not be negative")
    if cu_seqlens is None:
        return
    check_cu_seqlens_values(cu_seqlens, a.tokens.logprobs.shape[0])
    if pairs is not None:
        check_pairs_values(pairs, cu_seqlens.shape[0] - 1)


def _fwd_rules(a: PreferenceFwd) -> None:
    refuse((a.tokens.logprobs is None) == (a.sums is None), "either logprobs or sums must be given")
    refuse(a.sums is None and a.tokens.cu_seqlens is None, "logprobs need cu_seqlens")
    refuse(
        a.sums is not None and any(x is not None for x in a.tokens),
        "what is given per token has no effect beside sums",
    )
    if a.sums is None:
        _pair_rules(a.tokens, a.params, a.count)


def _bwd_rules(a: PreferenceBwd) -> None:
    refuse(a.tokens.logprobs is None or a.tokens.cu_seqlens is None, "logprobs and cu_seqlens must be given")
    refuse(a.tokens.kl is not None, "kl has no effect in backward, whose with_kl asks for its gradient")
    _pair_rules(a.tokens, a.params, a.table.shape[0])


def _pair_rules(tokens: PairTokens, params: PairParams, count: int) -> None:
    """What the kernels read without asking: the reference where the parameters have one, the sequences of the
    default pairs."""
    refuse(params.reference != 0 and tokens.ref_logprobs is None, "the parameters need ref_logprobs")
    refuse(
        tokens.pairs is None and 2 * count > tokens.cu_seqlens.shape[0] - 1,
        f"{count} pairs without `pairs` need as many times two sequences",
    )


preference_fwd = Op(
    "preference_fwd",
    PreferenceFwd,
    "(Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    "preference",
    SCALAR_DTYPES,
    _fwd_rules,
    _check_values,
    public=("preference_loss", "preference_loss_from_sums", "reward_loss"),
)
# Results: loss [], pair_loss [P], table [P, TABLE_WIDTH] (columns.py; all three empty(0) if not `table`),
# sums [P, 2, SUM_WIDTH].
preference_bwd = Op(
    "preference_bwd",
    PreferenceBwd,
    "(Tensor, Tensor)",
    _bwd_fake,
    "preference",
    SCALAR_DTYPES,
    _bwd_rules,
)
# Results: d logprobs [T], d kl [T] or empty(0).


class PreferenceFunction(Function):
    """From per-token tensors. logprobs and kl stand in the tokens too; they are named apart because they are
    differentiated."""

    names = "preference_loss (unpaired_loss, reward_loss)"

    @staticmethod
    def forward(ctx, logprobs, kl, tokens: PairTokens, given: PairTensors, params, count):
        tokens = _with_inputs(tokens, logprobs, kl)
        loss, pair_loss, table, sums = preference_fwd(PreferenceFwd(tokens, None, given, params, count, True))
        _save(ctx, tokens, params, sums, table)
        ctx.mark_non_differentiable(table, sums)
        return (pair_loss if params.reduction == NONE else loss), table, sums

    @staticmethod
    def backward(ctx, grad, *_):
        return _to_tokens(ctx, grad.contiguous())


class PairSumsFunction(Function):
    """Sums [P, 2, SUM_WIDTH] of per-token tensors: the first half of the kernel, for losses that do something
    between the halves."""

    names = "preference_loss (unpaired_loss, reward_loss)"

    @staticmethod
    def forward(ctx, logprobs, kl, tokens: PairTokens, params, count):
        tokens = _with_inputs(tokens, logprobs, kl)
        *_, sums = preference_fwd(PreferenceFwd(tokens, None, PairTensors(), params, count, False))
        _save(ctx, tokens, params, sums)
        return sums

    @staticmethod
    def backward(ctx, grad):
        # The gradient of the sums takes the place of the table's slopes. The policy's sums move with its
        # log-probs as the log-ratios do (no token clamp where they are used: see mixture.shared_params).
        slopes = grad.new_zeros((grad.shape[0], TABLE_WIDTH))
        slopes[:, RATIO_SLOPES] = grad[:, :, SUM_POLICY] + grad[:, :, SUM_RATIO]
        slopes[:, KL_SLOPES], slopes[:, TAB_SFT] = grad[:, :, SUM_KL], grad[:, CHOSEN, SUM_SFT]
        slopes[:, TAB_VALID] = 1.0  # every row counts
        return _to_tokens(ctx, grad.new_ones(()), slopes)


def _with_inputs(tokens: PairTokens, logprobs: torch.Tensor, kl: torch.Tensor | None) -> PairTokens:
    """The tokens with what a `Function` was given in its place; outside of the compiler it is the same."""
    same = tokens.logprobs is logprobs and tokens.kl is kl
    return tokens if same else tokens._replace(logprobs=logprobs, kl=kl)


def _save(ctx, tokens: PairTokens, params: PairParams, *results: torch.Tensor) -> None:
    kept = tokens if tokens.kl is None else tokens._replace(kl=None)
    ctx.save_for_backward(*kept, *results)
    ctx.params, ctx.with_kl = params, tokens.kl is not None


def _to_tokens(ctx, grad: torch.Tensor, *slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients in logprobs and kl."""
    saved = ctx.saved_tensors
    width = len(PairTokens._fields)
    tokens, (sums, *table) = PairTokens(*saved[:width]), saved[width:]
    d_logprobs, d_kl = preference_bwd(
        PreferenceBwd(grad, tokens, sums, *table, *slopes, ctx.params, ctx.with_kl)
    )
    return d_logprobs, d_kl if ctx.with_kl else None


class PreferenceFromSumsFunction(Function):
    """From sums [P, 2, SUM_WIDTH]; the slopes of the table are the gradient."""

    names = "preference_loss_from_sums"

    @staticmethod
    def forward(ctx, sums, given: PairTensors, params):
        loss, pair_loss, table, _ = preference_fwd(
            PreferenceFwd(PairTokens(), sums, given, params, sums.shape[0], True)
        )
        ctx.save_for_backward(table)
        ctx.mark_non_differentiable(table)
        return (pair_loss if params.reduction == NONE else loss), table

    @staticmethod
    def backward(ctx, grad, _):
        (table,) = ctx.saved_tensors
        out = table.new_zeros((table.shape[0], 2, SUM_WIDTH))
        g = grad.unsqueeze(-1) if grad.dim() else grad
        out[:, :, SUM_RATIO] = times_slope(g, table[:, RATIO_SLOPES])
        out[:, :, SUM_KL] = times_slope(g, table[:, KL_SLOPES])
        out[:, CHOSEN, SUM_SFT] = times_slope(grad, table[:, TAB_SFT])
        return out
