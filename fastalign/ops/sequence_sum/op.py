"""Sums over packed sequences, the middle phase of every method: [T] -> [S], deterministic, differentiable."""

from __future__ import annotations

from typing import NamedTuple

from fastalign.runtime.arguments import In, Maybe, SymInt
from fastalign.runtime.checks import check_cu_seqlens_values
from fastalign.runtime.function import Function
from fastalign.runtime.op import SCALAR_DTYPES, Op


class SequenceSumFwd(NamedTuple):
    x: In("T")
    cu_seqlens: In("S+1", "int32")
    mask: Maybe("T", "bool")
    weights: Maybe("T")


class SequenceSumBwd(NamedTuple):
    grad: In("S")
    cu_seqlens: In("S+1", "int32")
    mask: Maybe("tokens", "bool")
    weights: Maybe("tokens")
    tokens: SymInt


sequence_sum_fwd = Op(
    "sequence_sum_fwd",
    SequenceSumFwd,
    "(Tensor, Tensor)",
    lambda a: tuple(a.x.new_empty(a.cu_seqlens.shape[0] - 1) for _ in range(2)),
    "sequence_sum",
    SCALAR_DTYPES,
    check=lambda a: check_cu_seqlens_values(a.cu_seqlens, a.x.numel()),
    public=("sequence_sum",),
)
# Results: sums [S] of weights * x over scored tokens, counts [S] of scored tokens, both in x's dtype.
sequence_sum_bwd = Op(
    "sequence_sum_bwd",
    SequenceSumBwd,
    "Tensor",
    lambda a: a.grad.new_empty(a.tokens),
    "sequence_sum",
    SCALAR_DTYPES,
)


class SequenceSumFunction(Function):
    names = "sequence_sum"

    @staticmethod
    def forward(ctx, x, cu_seqlens, mask, weights):
        sums, counts = sequence_sum_fwd(SequenceSumFwd(x, cu_seqlens, mask, weights))
        ctx.save_for_backward(cu_seqlens, mask, weights)
        ctx.tokens = x.shape[0]
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    def backward(ctx, grad, _):
        cu_seqlens, mask, weights = ctx.saved_tensors
        return sequence_sum_bwd(SequenceSumBwd(grad.contiguous(), cu_seqlens, mask, weights, ctx.tokens))
