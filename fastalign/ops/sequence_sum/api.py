"""Sums over packed sequences, the middle phase of every method: [T] -> [S], deterministic, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.checks import check_cu_seqlens, check_cu_seqlens_values, per_token, row_mask
from fastalign.function import Function
from fastalign.registry import Op, scalar_dtypes, standard_kernels


def _check_values(x, cu_seqlens, *rest):
    check_cu_seqlens_values(cu_seqlens, x.numel())


sequence_sum_fwd = Op(
    "sequence_sum_fwd", "(Tensor x, Tensor cu_seqlens, Tensor? mask, Tensor? weights) -> (Tensor, Tensor)",
    lambda x, cu_seqlens, mask, weights: (x.new_empty(cu_seqlens.shape[0] - 1), x.new_empty(cu_seqlens.shape[0] - 1)),
    standard_kernels("sequence_sum", "sequence_sum_fwd"), scalar_dtypes(), "x[T] cu_seqlens[S+1]:int32 mask[T]:bool weights[T]",
    check=_check_values,
)  # fmt: skip
# Results: sums [S] of weights * x over scored tokens, counts [S] of scored tokens, both in x's dtype.
sequence_sum_bwd = Op(
    "sequence_sum_bwd", "(Tensor grad, Tensor cu_seqlens, Tensor? mask, Tensor? weights, SymInt tokens) -> Tensor",
    lambda grad, cu_seqlens, mask, weights, tokens: grad.new_empty(tokens),
    standard_kernels("sequence_sum", "sequence_sum_bwd"), scalar_dtypes(),
    "grad[S] cu_seqlens[S+1]:int32 mask[tokens]:bool weights[tokens]",
)  # fmt: skip


class SequenceSumFunction(Function):
    names = "sequence_sum"

    @staticmethod
    def forward(ctx, x, cu_seqlens, mask, weights):
        sums, counts = sequence_sum_fwd(x, cu_seqlens, mask, weights)
        ctx.save_for_backward(cu_seqlens, mask, weights)
        ctx.tokens = x.shape[0]
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    def backward(ctx, grad, _):
        cu_seqlens, mask, weights = ctx.saved_tensors
        return sequence_sum_bwd(grad.contiguous(), cu_seqlens, mask, weights, ctx.tokens), None, None, None


def sequence_sum(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    mean: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Per-sequence sums of packed per-token values: out[i] = sum of weights[n] * x[n] over the scored tokens n of sequence i.

    Args:
        x: [T], floating; differentiable.
        cu_seqlens: [S + 1] int32, from 0 to T. Zero-length sequences give 0.
        mask: [T] bool, row-aligned; False tokens are left out and get gradient 0, whatever they hold (NaN included).
        weights: [T], any sign; not differentiated.
        mean: divide by the number of scored tokens (at least 1), also when weights are given.
        group: a process group over which every sequence's tokens are split (sequence parallel). All ranks pass the same S; sums and counts are
            added across ranks, and every rank's loss may use the result: the gradient stays local (each rank differentiates its own copy of
            the same loss once).

    Returns:
        [S] fp32 (fp64 for fp64 input). Fixed summation order: two runs are bitwise equal.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices; cu_seqlens not running monotonically from 0 to T (checked on the CPU).
    """
    x = per_token("x", x)
    cu_seqlens = check_cu_seqlens(cu_seqlens, x)
    mask = row_mask(mask, x)
    if weights is not None:
        weights = per_token("weights", weights, x).detach()
    sums, counts = SequenceSumFunction.apply(x, cu_seqlens, mask, weights)
    if group is not None:
        from fastalign.distributed import sum_over_group

        sums, counts = sum_over_group(sums, group), sum_over_group(counts, group)
    return sums / counts.clamp(min=1.0) if mean else sums
