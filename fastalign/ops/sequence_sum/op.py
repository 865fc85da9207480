"""Sums over packed sequences, the middle phase of every method: [T] -> [S], deterministic, differentiable."""

from __future__ import annotations

from fastalign.runtime.checks import check_cu_seqlens_values
from fastalign.runtime.dispatch import Op, scalar_dtypes, standard_kernels
from fastalign.runtime.function import Function


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
