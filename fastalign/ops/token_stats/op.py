"""Vocabulary rows: log-prob of the label, entropy, log-sum-exp and friends in one pass over the logits, one
pass back."""

from __future__ import annotations

import torch

from fastalign.ops.token_stats.contract import (
    DIFFERENTIABLE,
    OUTPUT_BITS,
    RowGradients,
    Rows,
    RowStatesFinish,
    RowStatesMerge,
    TokenStatsBwd,
    TokenStatsFused,
    TokenStatsFwd,
    forward_shapes,
    merge_shapes,
    output_rules,
    output_shapes,
    row_rules,
)
from fastalign.runtime import ffi, overwrite
from fastalign.runtime.function import Function
from fastalign.runtime.layout import refuse
from fastalign.runtime.op import ROW_DTYPES, SCALAR_DTYPES, Op


def _fwd_fake(a: TokenStatsFwd) -> tuple[torch.Tensor, ...]:
    logits = a.rows.logits
    acc = ffi.acc_dtype(logits.dtype)
    return tuple(logits.new_empty(shape, dtype=acc) for shape in forward_shapes(a.rows, a.outputs))


def check_values(a: TokenStatsFwd | TokenStatsFused) -> None:
    check_row_values(a.rows)


def check_row_values(rows: Rows | RowStatesFinish) -> None:
    """Values that cannot be checked without reading tensors: temperature > 0, labels of unmasked rows inside
    the vocabulary."""
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
            f"labels[{row}] = {int(labels[row, k])} is outside [0, {rows.vocab_total}) and is not "
            f"ignore_index ({rows.ignore_index})"
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
# reference (raw logit of each label, after tanh if capped; -inf where it lies in another part of the
# vocabulary; empty(0) without labels). Of a row that is not scored the state is the empty one, which merges
# with any other without a trace, and the target -inf, as that of every ignored label is.
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


def _merge_rules(a: RowStatesMerge) -> None:
    parts, rows, _ = a.states.shape
    refuse(parts == 0, "states has no part; legal: 1 or more")
    if a.targets is not None:
        entries = a.targets.shape[1]
        refuse(
            entries not in (rows, 2 * rows),
            f"targets has {entries} rows a part; legal here: {rows} or {2 * rows}",
        )


def _finish_rules(a: RowStatesFinish) -> None:
    refuse((a.labels is None) != (a.target is None), "target and labels are given together or not at all")
    rows, entries = a.state.shape[0], None if a.target is None else a.target.shape[0]
    refuse(
        entries not in (None, rows, 2 * rows), f"target has {entries} rows; legal here: {rows} or {2 * rows}"
    )
    output_rules(a.outputs, a.labels, entries in (None, 2 * rows))


# Between pushing the parts of a vocabulary into states and pulling gradients out of them.
row_states_merge = Op(
    "row_states_merge",
    RowStatesMerge,
    "(Tensor, Tensor)",
    lambda a: tuple(a.states.new_empty(shape) for shape in merge_shapes(a)),
    "token_stats",
    SCALAR_DTYPES,
    _merge_rules,
)
# Results: state [rows, STATE_WIDTH] and target [N, K] (empty(0) without targets) of all R parts, merged in
# index order: over all of the vocabulary what token_stats_fwd gives for it. One part comes out as it is, to
# the bit. A label lies in one part at most, and where none holds it the target is -inf.
row_states_finish = Op(
    "row_states_finish",
    RowStatesFinish,
    f"({', '.join(['Tensor'] * len(OUTPUT_BITS))})",
    lambda a: tuple(
        a.state.new_empty(shape) for shape in output_shapes(a.state.shape[0], a.labels, a.outputs)
    ),
    "token_stats",
    SCALAR_DTYPES,
    _finish_rules,
    check_row_values,
)
# Results: the outputs, as token_stats_fwd gives them.


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
        ctx.mark_non_differentiable(
            *(r for name, r in zip(OUTPUT_BITS, results) if name not in DIFFERENTIABLE)
        )
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        if not ctx.needs_input_grad[0]:
            return None
        *tensors, state = ctx.saved_tensors
        rows = Rows(*tensors, *ctx.numbers)
        given = {
            n: None if g is None or g.numel() == 0 else g.contiguous() for n, g in zip(OUTPUT_BITS, grads)
        }
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
