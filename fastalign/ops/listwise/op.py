"""Losses over ranked lists of responses: sums per sequence, one block per list for value and slopes, slopes
carried back to the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastalign.ops.columns import LIST_TABLE_WIDTH, MAX_LIST, NONE, SUM_WIDTH
from fastalign.ops.listwise.params import ListParams
from fastalign.ops.preference.op import PairTensors, PairTokens, PreferenceFwd, preference_fwd
from fastalign.ops.sequence_sum.op import SequenceSumBwd, sequence_sum_bwd
from fastalign.ops.slopes import times_slope
from fastalign.runtime.arguments import In, Maybe
from fastalign.runtime.checks import check_cu_seqlens_values
from fastalign.runtime.function import Function
from fastalign.runtime.op import SCALAR_DTYPES, Op


class ListTensors(NamedTuple):
    """beta per list or once for all, in place of the parameters' number; and the two global counts."""

    beta: Maybe("L?") = None
    num_items: Maybe("") = None
    num_sft_tokens: Maybe("") = None


class ListwiseFwd(NamedTuple):
    sums: In(f"S,{SUM_WIDTH}")
    list_offsets: In("L+1", "int32")
    scores: In("S")
    given: ListTensors
    params: ListParams


def _check_values(a: ListwiseFwd) -> None:
    """Offsets monotone from 0 to S, no list longer than a block, finite scores."""
    check_cu_seqlens_values(a.list_offsets, a.sums.shape[0], name="list_offsets", total="sequences")
    sizes = a.list_offsets.diff()
    if sizes.numel() and int(sizes.max()) > MAX_LIST:
        raise ValueError(
            f"list {int(sizes.argmax())} holds {int(sizes.max())} responses; legal: up to {MAX_LIST}"
        )
    if not bool(torch.isfinite(a.scores).all()):
        where = int((~torch.isfinite(a.scores)).nonzero()[0])
        raise ValueError(f"scores[{where}] is {float(a.scores[where])}; legal: finite numbers")


def _fake(a: ListwiseFwd) -> tuple[torch.Tensor, ...]:
    sequences, lists = a.sums.shape[0], a.list_offsets.shape[0] - 1
    return tuple(
        a.sums.new_empty(s) for s in ((), (lists,), (sequences,), (sequences,), (lists, LIST_TABLE_WIDTH))
    )


listwise_fwd = Op(
    "listwise_fwd",
    ListwiseFwd,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    "listwise",
    SCALAR_DTYPES,
    check=_check_values,
    public=("listwise_loss", "listwise_loss_from_sums", "kwise_reward_loss"),
)
# sums [S, SUM_WIDTH]: as in the pair kernel (policy, ratio, length, KL, SFT, SFT length). list_offsets [L +
# 1] int32. scores [S]. Results: loss [], list_loss [L], slopes [S] = d loss (or d list_loss) / d policy sum,
# SFT term included, rewards [S] = beta a, table [L, LIST_TABLE_WIDTH] (columns.py).


def _evaluate(a: ListwiseFwd):
    """(the reduced loss or [L], slopes, rewards, table)"""
    loss, list_loss, slopes, rewards, table = listwise_fwd(a)
    return (list_loss if a.params.reduction == NONE else loss), slopes, rewards, table


def _sequence_grad(grad, slopes, list_offsets):
    """Gradient of every sequence's sum: its slope times the upstream gradient, which may be one per list."""
    if grad.dim():
        numbers = torch.arange(slopes.shape[0], device=slopes.device, dtype=torch.int32)
        grad = grad[
            torch.searchsorted(list_offsets[1:].contiguous(), numbers, right=True).clamp(
                max=max(grad.shape[0] - 1, 0)
            )
        ]
    return times_slope(grad, slopes)


class ListwiseFunction(Function):
    """From per-token tensors."""

    names = "listwise_loss"

    @staticmethod
    def forward(
        ctx,
        logprobs,
        ref_logprobs,
        cu_seqlens,
        mask,
        list_offsets,
        scores,
        given: ListTensors,
        pair,
        params,
        count,
    ):
        # Pairs (0, 1), (2, 3), ... visit every sequence once; behind the last one stands an empty one, for
        # odd counts.
        tokens = PairTokens(
            logprobs, ref_logprobs, None, torch.cat([cu_seqlens, cu_seqlens[-1:]]), None, mask
        )
        *_, sums = preference_fwd(PreferenceFwd(tokens, None, PairTensors(), pair, (count + 1) // 2, False))
        sums = sums.flatten(0, 1)[:count]
        value, slopes, rewards, table = _evaluate(ListwiseFwd(sums, list_offsets, scores, given, params))
        ctx.save_for_backward(cu_seqlens, mask, list_offsets, slopes)
        ctx.tokens = logprobs.shape[0]
        ctx.mark_non_differentiable(rewards, table, sums)
        return value, rewards, table, sums

    @staticmethod
    def backward(ctx, grad, *_):
        cu_seqlens, mask, list_offsets, slopes = ctx.saved_tensors
        per_sequence = _sequence_grad(grad, slopes, list_offsets)
        return sequence_sum_bwd(SequenceSumBwd(per_sequence, cu_seqlens, mask, None, ctx.tokens))


class ListwiseFromSumsFunction(Function):
    """From the sums of the policy's log-probs (or a reward model's scores) [S]; `sums` holds them and what
    belongs to them, as constants."""

    names = "listwise_loss_from_sums"

    @staticmethod
    def forward(ctx, totals, sums, list_offsets, scores, given: ListTensors, params):
        value, slopes, rewards, table = _evaluate(ListwiseFwd(sums, list_offsets, scores, given, params))
        ctx.save_for_backward(list_offsets, slopes)
        ctx.mark_non_differentiable(rewards, table)
        return value, rewards, table

    @staticmethod
    def backward(ctx, grad, *_):
        list_offsets, slopes = ctx.saved_tensors
        return _sequence_grad(grad, slopes, list_offsets)
