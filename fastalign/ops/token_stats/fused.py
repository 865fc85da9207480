"""Exact KL over the vocabulary, and its loss with the gradient made in the forward pass."""

from __future__ import annotations

import math

import torch

from fastalign.ops.token_stats.contract import (
    OUTPUT_BITS,
    RowGradients,
    Rows,
    ScaleRows,
    TokenStatsFused,
    TokenStatsFwd,
    output_shapes,
    row_rules,
)
from fastalign.ops.token_stats.op import check_values, token_stats_fwd
from fastalign.runtime import ffi, overwrite
from fastalign.runtime.function import Function
from fastalign.runtime.op import ROW_DTYPES, Op

DIRECTIONS = {"policy_ref": "kl_policy_ref", "ref_policy": "kl_ref_policy"}


def _outputs(a: TokenStatsFused) -> list[torch.Tensor]:
    logits = a.rows.logits
    acc = ffi.acc_dtype(logits.dtype)
    shapes = output_shapes(math.prod(logits.shape[:-1]), a.rows.labels, a.outputs)
    return [logits.new_empty(shape, dtype=acc) for shape in shapes]


def _rules(a: TokenStatsFused) -> None:
    row_rules(a.rows, a.outputs, a.upstream)


token_stats_fused = Op(
    "token_stats_fused",
    TokenStatsFused,
    f"({', '.join(['Tensor'] * (len(OUTPUT_BITS) + 1))})",
    lambda a: (*_outputs(a), torch.empty_like(a.rows.logits, memory_format=torch.contiguous_format)),
    "token_stats",
    ROW_DTYPES,
    _rules,
    check_values,
    public=("token_kl_loss",),
)
# Results: the outputs in the order of OUTPUT_BITS, and d loss / d logits; the op with an underscore writes
# that over the logits.
token_stats_fused_ = Op(
    "token_stats_fused_",
    TokenStatsFused,
    f"({', '.join(['Tensor'] * len(OUTPUT_BITS))})",
    lambda a: tuple(_outputs(a)),
    "token_stats",
    ROW_DTYPES,
    _rules,
    check_values,
    writes="logits",
)
scale_rows_ = Op(
    "scale_rows_",
    ScaleRows,
    "()",
    lambda a: None,
    "token_stats",
    ROW_DTYPES,
    writes="x",
)
# x [..., V] *= scale, which costs nothing where scale is 1.


class TokenKLLossFunction(Function):
    """Forward makes the gradient as well; backward hands it out, scaled where the upstream gradient is not
    1."""

    names = "token_kl_loss"

    @staticmethod
    def forward(ctx, logits, rows: Rows, direction, coef, with_grad, inplace):
        rows = rows._replace(logits=logits)
        name, mask = DIRECTIONS[direction], rows.mask
        index = [*OUTPUT_BITS].index(name)
        upstream = RowGradients(**{f"g_{name}": coef})
        if not with_grad:
            kl = token_stats_fwd(TokenStatsFwd(rows, OUTPUT_BITS[name], None, None))[index]
        elif inplace:
            grad = logits.detach()
            kl = token_stats_fused_(TokenStatsFused(rows._replace(logits=grad), OUTPUT_BITS[name], upstream))[
                index
            ]
            overwrite.retire(logits)
        else:
            *results, grad = token_stats_fused(TokenStatsFused(rows, OUTPUT_BITS[name], upstream))
            kl = results[index]
        if with_grad:
            ctx.save_for_backward(grad)
        ctx.spent = False
        ctx.mark_non_differentiable(kl)
        return (kl * coef if mask is None else torch.where(mask, kl * coef, 0.0)).sum(), kl

    @staticmethod
    def backward(ctx, g_loss, _):
        if torch.compiler.is_compiling():
            (grad,) = ctx.saved_tensors
            scale_rows_(ScaleRows(grad, g_loss))
            return grad
        if ctx.spent:
            raise RuntimeError(
                "token_kl_loss can be differentiated once: its stored gradient was modified by an inplace "
                "operation, the scaling of the first time"
            )
        ctx.spent = True
        (grad,) = ctx.saved_tensors
        if not overwrite.is_ours_alone(grad):  # saved-tensor hooks may keep what they gave
            grad = grad.clone()
        scale_rows_(ScaleRows(grad, g_loss))
        return grad
