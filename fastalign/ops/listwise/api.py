"""Losses over ranked lists of responses: sums per sequence, one block per list for value and slopes, slopes carried back to the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.checks import (
    check_choice,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_same_device,
    check_shape,
    global_count,
    per_token,
    row_mask,
)
from fastalign.function import Function
from fastalign.list_preset import LIST_SCALAR_COUNT, MAX_LIST, ListPreset
from fastalign.losses import resolve_listwise
from fastalign.ops.listwise.output import ListwiseOutput
from fastalign.ops.preference.api import preference_fwd
from fastalign.ops.sequence_sum.api import sequence_sum_bwd
from fastalign.preset import REDUCTIONS, SCALAR_COUNT, Preset
from fastalign.registry import Op, scalar_dtypes, standard_kernels
from fastalign.slopes import times_slope

TABLE_WIDTH = 9


def _check_values(sums, list_offsets, scores, *rest):
    """Offsets monotone from 0 to S, no list longer than a block, finite scores."""
    check_cu_seqlens_values(list_offsets, sums.shape[0], name="list_offsets", total="sequences")
    sizes = list_offsets.diff()
    if sizes.numel() and int(sizes.max()) > MAX_LIST:
        raise ValueError(f"list {int(sizes.argmax())} holds {int(sizes.max())} responses; legal: up to {MAX_LIST}")
    if not bool(torch.isfinite(scores).all()):
        where = int((~torch.isfinite(scores)).nonzero()[0])
        raise ValueError(f"scores[{where}] is {float(scores[where])}; legal: finite numbers")


def _fake(sums, list_offsets, *rest):
    sequences, lists = sums.shape[0], list_offsets.shape[0] - 1
    return tuple(sums.new_empty(s) for s in ((), (lists,), (sequences,), (sequences,), (lists, TABLE_WIDTH)))


listwise_fwd = Op(
    "listwise_fwd",
    "(Tensor sums, Tensor list_offsets, Tensor scores, Tensor? beta, Tensor? num_items, Tensor? num_sft_tokens, float[] scalars, int[] switches)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake, standard_kernels("listwise", "listwise_fwd"), scalar_dtypes(),
    "sums[S,6] list_offsets[L+1]:int32 scores[S] beta[L?] num_items[] num_sft_tokens[]", check=_check_values,
)  # fmt: skip
# sums [S, SUM_WIDTH]: as in the pair kernel (policy, ratio, length, KL, SFT, SFT length). list_offsets [L + 1] int32. scores [S].
# Results: loss [], list_loss [L], slopes [S] = d loss (or d list_loss) / d policy sum, SFT term included, rewards [S] = beta a,
# table [L, TABLE_WIDTH] (columns: csrc/math/list.h).


def _evaluate(sums, list_offsets, scores, extra, params):
    """(the reduced loss or [L], slopes, rewards, table)"""
    loss, list_loss, slopes, rewards, table = listwise_fwd(
        sums, list_offsets, scores, *extra, list(params[:LIST_SCALAR_COUNT]), list(params[LIST_SCALAR_COUNT:])
    )
    return (list_loss if params.reduction == REDUCTIONS.index("none") else loss), slopes, rewards, table


def _sequence_grad(grad, slopes, list_offsets):
    """Gradient of every sequence's sum: its slope times the upstream gradient, which may be one per list."""
    if grad.dim():
        numbers = torch.arange(slopes.shape[0], device=slopes.device, dtype=torch.int32)
        grad = grad[torch.searchsorted(list_offsets[1:].contiguous(), numbers, right=True).clamp(max=max(grad.shape[0] - 1, 0))]
    return times_slope(grad, slopes)


# The pair kernel's parameters for sums without and with a reference.
_SUMS = tuple(Preset(reference=reference) for reference in (False, True))


class ListwiseFunction(Function):
    """From per-token tensors."""

    names = "listwise_loss"

    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, cu_seqlens, mask, list_offsets, scores, extra, pair, params, count):
        # Pairs (0, 1), (2, 3), ... visit every sequence once; behind the last one stands an empty one, for odd counts.
        sums = preference_fwd(
            logprobs, ref_logprobs, None, torch.cat([cu_seqlens, cu_seqlens[-1:]]), None, mask, *(None,) * 11, list(pair[:SCALAR_COUNT]),
            list(pair[SCALAR_COUNT:]), (count + 1) // 2, False,
        )[3].flatten(0, 1)[:count]  # fmt: skip
        value, slopes, rewards, table = _evaluate(sums, list_offsets, scores, extra, params)
        ctx.save_for_backward(cu_seqlens, mask, list_offsets, slopes)
        ctx.tokens = logprobs.shape[0]
        ctx.mark_non_differentiable(rewards, table, sums)
        return value, rewards, table, sums

    @staticmethod
    def backward(ctx, grad, *_):
        cu_seqlens, mask, list_offsets, slopes = ctx.saved_tensors
        per_sequence = _sequence_grad(grad, slopes, list_offsets)
        return sequence_sum_bwd(per_sequence, cu_seqlens, mask, None, ctx.tokens), *(None,) * 9


class ListwiseFromSumsFunction(Function):
    """From the sums of the policy's log-probs (or a reward model's scores) [S]; `sums` holds them and what belongs to them, as constants."""

    names = "listwise_loss_from_sums"

    @staticmethod
    def forward(ctx, totals, sums, list_offsets, scores, extra, params):
        value, slopes, rewards, table = _evaluate(sums, list_offsets, scores, extra, params)
        ctx.save_for_backward(list_offsets, slopes)
        ctx.mark_non_differentiable(rewards, table)
        return value, rewards, table

    @staticmethod
    def backward(ctx, grad, *_):
        list_offsets, slopes = ctx.saved_tensors
        return _sequence_grad(grad, slopes, list_offsets), *(None,) * 5


def listwise_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    list_offsets: Tensor,
    scores: Tensor,
    *,
    loss: str | ListPreset = "plackett_luce",
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    **options: Any,
) -> ListwiseOutput:
    """A loss over lists of responses to the same prompt, ranked by scores; the formula of every loss is in `losses.available_listwise()`.

    Args:
        logprobs: [T] policy log-probs, row-aligned (row t scores the next token); differentiable.
        ref_logprobs: [T] reference log-probs, never differentiated; None where the loss needs none (it is accepted and not read then).
        cu_seqlens: [S + 1] int32, from 0 to T.
        list_offsets: [L + 1] integers, from 0 to S: list l holds the sequences list_offsets[l] to list_offsets[l + 1] - 1, at most 64 of them.
            Lists of none or one are legal.
        scores: [S] finite numbers, higher is better; constants. The ranking comes from them: equal scores keep the order of the list in
            plackett_luce and are no contrast in rrhf, pro and lipo; infonca, nca and exo_list take them as rewards, lipo as graded
            labels (its gain is 2^score: give a bounded scale).
        loss: a name of `losses.available_listwise()` or a ListPreset.
        mask: [T] bool, row-aligned: the response tokens. Required by losses that use lengths.
        reduction: "mean" over the valid lists, "sum", or "none" ([L]; its mean over the valid lists is "mean").
        num_items: the number of valid lists over all micro-batches and ranks, for "mean" under gradient accumulation; number or 0-dim tensor.
        num_sft_tokens: likewise the number of tokens of the SFT term (sft_norm="token_mean_global").
        options: the loss's own options and fields of ListPreset, by name. beta may be a tensor, 0-dim or [L], a constant here.

    Returns:
        ListwiseOutput. A list without any scored token is not valid and counts nowhere.

    Raises:
        ValueError, TypeError: unknown loss or option, shapes, dtypes, devices, missing mask or reference log-probs; on the CPU also offsets that
            do not run from 0 to S, a list of more than 64 responses and scores that are not finite. On a GPU, where values are not looked at,
            the loss of such a list is NaN (`registry.debug_checks` raises there too).
    """
    preset, tensors = resolve_listwise(loss, options)
    check_choice("reduction", reduction, REDUCTIONS)
    logprobs = per_token("logprobs", logprobs)
    cu_seqlens = check_cu_seqlens(cu_seqlens, logprobs)
    if mask is None and preset.needs_lengths:
        raise ValueError(f"loss {preset.name!r} uses response lengths: mask is required (row-aligned, True at response tokens)")
    if preset.reference and ref_logprobs is None:
        raise ValueError(f"loss {preset.name!r} needs ref_logprobs")
    ref = per_token("ref_logprobs", ref_logprobs, logprobs).detach() if preset.reference else None
    count = cu_seqlens.shape[0] - 1
    lists, scores, extra = _list_inputs(list_offsets, scores, tensors, num_items, num_sft_tokens, count, logprobs)
    pair = _SUMS[ref is not None].params()
    value, rewards, table, sums = ListwiseFunction.apply(
        logprobs, ref, cu_seqlens, row_mask(mask, logprobs), lists, scores, extra, pair, preset.params(reduction), count
    )
    return ListwiseOutput(value, rewards, preset, lists, table, sums)


def listwise_loss_from_sums(
    totals: Tensor,
    ref_totals: Tensor | None,
    list_offsets: Tensor,
    scores: Tensor,
    *,
    loss: str | ListPreset = "plackett_luce",
    lengths: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    **options: Any,
) -> ListwiseOutput:
    """The same losses for trainers that have already summed their log-probs over tokens.

    Args:
        totals: [S] sums (never means) of the policy's log-probs over the response tokens; differentiable.
        ref_totals: [S], the reference's; needed where the loss needs a reference. fp64 is worth its bytes: the sums cancel.
        lengths: [S] numbers of response tokens; required by losses that use lengths. Without them every response counts as non-empty.
        list_offsets, scores, loss, reduction, num_items, num_sft_tokens, options: as in `listwise_loss`.

    Returns:
        ListwiseOutput.
    """
    preset, tensors = resolve_listwise(loss, options)
    check_choice("reduction", reduction, REDUCTIONS)
    totals = per_token("totals", totals)
    count = totals.shape[0]
    for name, value, needed in (("ref_totals", ref_totals, preset.reference), ("lengths", lengths, preset.needs_lengths)):
        if value is None and needed:
            raise ValueError(f"loss {preset.name!r} needs {name}, a tensor [S]")
        if value is not None:
            check_shape(name, value, (count,))
            check_same_device(name, value, "totals", totals)
    policy = totals.detach()
    # Subtract in the wider type, then round once.
    ratio = torch.where(policy == ref_totals, 0.0, policy - ref_totals.detach()) if preset.reference else policy
    length = torch.ones_like(policy) if lengths is None else lengths.detach().to(policy.dtype)
    sums = torch.stack([policy, ratio.to(policy.dtype), length, torch.zeros_like(policy), policy, length], -1)
    lists, scores, extra = _list_inputs(list_offsets, scores, tensors, num_items, num_sft_tokens, count, totals)
    value, rewards, table = ListwiseFromSumsFunction.apply(totals, sums, lists, scores, extra, preset.params(reduction))
    return ListwiseOutput(value, rewards, preset, lists, table, sums)


def _list_inputs(
    list_offsets: Tensor, scores: Tensor, tensors: dict[str, Tensor], num_items: Any, num_sft_tokens: Any, count: int, like: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Offsets, scores, and (beta, num_items, num_sft_tokens), as the op takes them; constants of the loss."""
    list_offsets = check_cu_seqlens(list_offsets, like, name="list_offsets", total="sequences")
    check_shape("scores", scores, (count,))
    check_same_device("scores", scores, "the log-probs", like)
    beta = tensors.get("beta")
    if beta is not None:
        lists = list_offsets.shape[0] - 1
        if beta.numel() != 1 and tuple(beta.shape) != (lists,):
            raise ValueError(f"beta has shape {tuple(beta.shape)}; legal: ({lists},) or a single value")
        check_same_device("beta", beta, "the log-probs", like)
        beta = beta.detach().to(like.dtype).contiguous()
        beta = beta.reshape(()) if tuple(beta.shape) != (lists,) else beta
    counts = [global_count(name, value, like) for name, value in (("num_items", num_items), ("num_sft_tokens", num_sft_tokens))]
    return list_offsets, scores.detach().to(like.dtype).contiguous(), (beta, *counts)
