"""Vocabulary rows: log-prob of the label, entropy, log-sum-exp and friends in one pass over the logits, one
pass back."""

from __future__ import annotations

import torch

from fastalign.ops.token_stats.contract import (
    DIFFERENTIABLE,
    OUTPUT_BITS,
    RowGradients,
    Rows,
    TokenStatsBwd,
    TokenStatsFused,
    TokenStatsFwd,
    forward_shapes,
    row_rules,
)
from fastalign.runtime import ffi, overwrite
from fastalign.runtime.function import Function
from fastalign.runtime.op import ROW_DTYPES, Op


def _fwd_fake(a: TokenStatsFwd) -> tuple[torch.Tensor, ...]:
    logits = a.rows.logits
    acc = ffi.acc_dtype(logits.dtype)
    return tuple(logits.new_empty(shape, dtype=acc) for shape in forward_shapes(a.rows, a.outputs))


def check_values(a: TokenStatsFwd | TokenStatsFused) -> None:
    """Values that cannot be checked without reading tensors: temperature > 0, labels of unmasked rows inside
    the vocabulary."""
    rows = a.rows
    if rows.temperature_tensor is not None and not float(rows.temperature_tensor) > 0:
        raise ValueError(f"temperature must be positive, got {float(rows.temperature_tensor)}")
    labels = rows.labels
    if labels is None or labels.numel() == 0:
        return
    wrong = (labels != rows.ignore_index) & ((labels < 0) | (labels >= rows.vocab_total))
    if rows.mask is not None:
        wrong &= rows.mask.unsqueeze(-1)
    if bool(wrong.any()):
        row, k = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"labels[{row}] = {int(labels[row, k])} is outside [0, {rows.vocab_total}) and is not ignore_index ({rows.ignore_index})"
        )


def _bwd_rules(a: TokenStatsBwd) -> None:
    row_rules(a.rows, upstream=a.upstream)


token_stats_fwd = Op(
    "token_stats_fwd",
    TokenStatsFwd,
    f"({', '.join(['Tensor'] * (len(OUTPUT_BITS) + 2))})",
    _fwd_fake,
    "token_stats",
    ROW_DTYPES,
    lambda a: row_rules(a.rows, a.outputs, target_in=a.target_in),
    check_values,
    public=("token_stats", "token_logprobs", "selective_log_softmax", "entropy_from_logits", "token_kl"),
)
# Results: the outputs in the order of OUTPUT_BITS (PER_LABEL [rows, K], the others [rows]; empty(0) if not
# asked for), state [rows, STATE_WIDTH], target [rows, K], with ref_logits [2, rows, K] for policy and
# reference (raw logit of each label, after tanh if capped; -inf while its shard has not come; empty(0)
# without labels).
token_stats_bwd = Op(
    "token_stats_bwd",
    TokenStatsBwd,
    "Tensor",
    lambda a: torch.empty_like(a.rows.logits, memory_format=torch.contiguous_format),
    "token_stats",
    ROW_DTYPES,
    _bwd_rules,
)
# Result: d loss / d logits (logits' shape and dtype, contiguous); the op with an underscore writes it over
# the logits.
token_stats_bwd_ = Op(
    "token_stats_bwd_",
    TokenStatsBwd,
    "()",
    lambda a: None,
    "token_stats",
    ROW_DTYPES,
    _bwd_rules,
    writes="logits",
)


class TokenStatsFunction(Function):
    """Forward streams the rows once and keeps the row states; backward streams them once more."""

    names = "token_stats (token_logprobs, token_kl, entropy_from_logits, selective_log_softmax)"

    @staticmethod
    def forward(ctx, logits, rows: Rows, outputs: int, inplace: bool):
        rows = rows._replace(logits=logits)
        *results, state, _ = token_stats_fwd(TokenStatsFwd(rows, outputs, None, None))
        ctx.save_for_backward(*rows[:_TENSORS], state)
        ctx.numbers, ctx.inplace = rows[_TENSORS:], inplace
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(r for name, r in zip(OUTPUT_BITS, results) if name not in DIFFERENTIABLE))
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        if not ctx.needs_input_grad[0]:
            return None
        *tensors, state = ctx.saved_tensors
        rows = Rows(*tensors, *ctx.numbers)
        given = {n: None if g is None or g.numel() == 0 else g.contiguous() for n, g in zip(OUTPUT_BITS, grads)}
        upstream = RowGradients(*(given[name] for name in DIFFERENTIABLE))
        if upstream.g_kl_policy_ref is None and upstream.g_kl_ref_policy is None:
            rows = rows._replace(ref_logits=None)
        logits = rows.logits
        if not (ctx.inplace and overwrite.may_overwrite(logits, "inplace_backward")):
            return token_stats_bwd(TokenStatsBwd(rows, state, upstream))
        grad = logits.detach()
        token_stats_bwd_(TokenStatsBwd(rows._replace(logits=grad), state, upstream))
        overwrite.retire(logits)
        return grad


_TENSORS = Rows._fields.index("factor")  # the fields of Rows before the first number
