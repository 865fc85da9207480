"""The autograd function of the fused head: tiles forward, tiles back, as its plan says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.columns import STATE_WIDTH
from fastalign.ops.token_stats.contract import (
    DIFFERENTIABLE,
    OUTPUT_BITS,
    PER_LABEL,
    RowGradients,
    TokenStatsBwd,
)
from fastalign.ops.token_stats.op import token_stats_bwd_
from fastalign.rows import vocab_parallel, walk
from fastalign.rows.head import CAST_BYTES
from fastalign.rows.walk import TENSORS, Call, Gradients, Workspace
from fastalign.runtime import overwrite
from fastalign.runtime.function import Function


class LinearTokenStatsFunction(Function):
    """Forward walks the tiles as the plan says; backward too, where forward left it something to multiply."""

    names = "linear_token_stats (linear_token_logprobs)"

    @staticmethod
    def forward(ctx, hidden, weight, bias, call: Call):
        call = call._replace(hidden=hidden, weight=weight, bias=bias)
        state, slopes, kept = None, None, ()
        if call.plan.kind == "frozen":
            results, slopes = _with_slopes(call)
        elif call.plan.kind == "keep":
            results, state, kept = _with_logits(call)
        else:
            results, state = _through_tiles(call)
        ctx.save_for_backward(*call[:TENSORS], state, slopes, *kept)
        ctx.rest, ctx.spent = call[TENSORS:], False
        ctx.set_materialize_grads(False)
        results = [_on_all_rows(call, name, result) for name, result in zip(OUTPUT_BITS, results)]
        ctx.mark_non_differentiable(
            *(r for name, r in zip(OUTPUT_BITS, results) if name not in call.differentiable)
        )
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        call = Call(*saved[:TENSORS], *ctx.rest)
        state, slopes, *kept = saved[TENSORS:]
        needs = ctx.needs_input_grad[:3]
        upstream = _on_walked_rows(call, grads)
        if slopes is not None:
            return _scaled(call, slopes, upstream)
        if upstream.g_kl_policy_ref is None and upstream.g_kl_ref_policy is None:
            call, kept = call._replace(ref_hidden=None), kept[:1]
        if kept and not ctx.spent:
            ctx.spent = True  # a second time they are multiplied again
            return _from_logits(call, state, kept, upstream, needs)
        return _from_tiles(call, state, upstream, needs)


# --- forward ------------------------------------------------------------------------------------------------


def _through_tiles(call: Call) -> tuple[list[Tensor], Tensor]:
    """Row states over tiles: the workspace grows neither with the rows nor with the vocabulary."""
    work = Workspace(call, call.plan.rows, call.plan.vocab)
    parts = [walk.push(call, block, work) for block in walk.blocks(call, call.plan.rows)]
    return _joined(call, [results for results, _ in parts]), _joined_states(
        call, [state for _, state in parts]
    )


def _with_logits(call: Call) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """All logits at once; they stay."""
    block = walk.block_of(call, slice(0, call.rows))
    rows = Workspace(call, call.rows, call.weight.shape[0]).rows(call, block, 0, call.weight.shape[0])
    results, state = walk.push_logits(call, block, rows)
    return results, state, [rows.logits] if rows.ref_logits is None else [rows.logits, rows.ref_logits]


def _with_slopes(call: Call) -> tuple[list[Tensor], Tensor]:
    """Results, and d output / d hidden [rows, H] for the one differentiable output: its gradient is that
    times a number per row."""
    work = Workspace(call, call.plan.rows, call.plan.vocab)
    (name,) = call.differentiable
    shape = (call.rows, 1) if name in PER_LABEL else (call.rows,)
    one = torch.ones(shape, dtype=call.precision.acc, device=call.hidden.device)
    slopes = torch.empty(call.rows, call.hidden.shape[1], dtype=call.precision.acc, device=call.hidden.device)
    parts = []
    for block in walk.blocks(call, call.plan.rows):
        results, grad = walk.fused(call, block, work, RowGradients(**{f"g_{name}": one[block.rows]}))
        walk.bring_hidden_back(call, grad, slopes[block.rows])
        parts.append(results)
    if call.group is not None:
        vocab_parallel.add(slopes, call.group)
    return _joined(call, parts), slopes


def _joined(call: Call, parts: list[Any]) -> list[Tensor]:
    """The results of all blocks."""
    if len(parts) == 1:
        return list(parts[0])
    if parts:
        return [torch.cat(each) for each in zip(*parts)]
    return [torch.empty(0, dtype=call.precision.acc, device=call.hidden.device) for _ in OUTPUT_BITS]


def _joined_states(call: Call, parts: list[Tensor]) -> Tensor:
    return (
        torch.cat(parts)
        if parts
        else torch.empty(0, STATE_WIDTH, dtype=call.precision.acc, device=call.hidden.device)
    )


def _on_all_rows(call: Call, name: str, result: Tensor) -> Tensor:
    """A result of the walked rows among all rows: exactly 0 at the others."""
    if name not in call.outputs:
        return result
    if call.index is None and call.rows:
        return result
    shape = (call.hidden.shape[0], call.labels.shape[1]) if name in PER_LABEL else (call.hidden.shape[0],)
    full = torch.zeros(shape, dtype=call.precision.acc, device=call.hidden.device)
    return full.index_copy_(0, call.index, result.view(call.rows, *shape[1:])) if call.rows else full


# --- backward -----------------------------------------------------------------------------------------------


def _on_walked_rows(call: Call, grads: Sequence[Tensor | None]) -> RowGradients:
    """Upstream gradients of the walked rows."""
    given = dict(zip(OUTPUT_BITS, grads))
    upstream = {}
    for name in DIFFERENTIABLE:
        g = given[name]
        upstream[f"g_{name}"] = (
            None if g is None or name not in call.outputs else walk.picked(g, call.index).contiguous()
        )
    return RowGradients(**upstream)


def _scaled(call: Call, slopes: Tensor, upstream: RowGradients) -> Tensor:
    """The gradient of hidden with a frozen head."""
    if not call.rows:
        return torch.zeros_like(call.hidden, memory_format=torch.contiguous_format)
    (name,) = call.differentiable
    g = getattr(upstream, f"g_{name}").reshape(-1, 1)
    rows = torch.where(g == 0, 0.0, slopes * g).to(call.hidden.dtype)
    if call.index is None:
        return rows
    return torch.zeros_like(call.hidden, memory_format=torch.contiguous_format).index_copy_(
        0, call.index, rows
    )


def _from_tiles(
    call: Call, state: Tensor, upstream: RowGradients, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    call, state, upstream = _live_rows(call, state, upstream)
    work = Workspace(call, call.plan.rows, call.plan.vocab)
    into = Gradients(call, *needs, several=call.rows > call.plan.rows)
    for block in walk.blocks(call, call.plan.rows):
        into.add(block, walk.pull(call, block, work, state[block.rows], walk.part_of(upstream, block.rows)))
    return into.results()


def _from_logits(
    call: Call, state: Tensor, kept: list[Tensor], upstream: RowGradients, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    block = walk.block_of(call, slice(0, call.rows))
    logits = (
        kept[0] if overwrite.is_ours_alone(kept[0]) else kept[0].clone()
    )  # saved-tensor hooks may keep what they gave
    token_stats_bwd_(
        TokenStatsBwd(block.spec.rows(logits, *kept[1:], start=call.vocab_start), state, upstream)
    )
    into = Gradients(call, *needs, several=False)
    into.add(block, _pieces(call, logits))
    return into.results()


def _pieces(call: Call, grad: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The gradient of all logits, in parts of the vocabulary whose weights' gradients are CAST_BYTES where
    they must be rounded."""
    vocab, hidden = call.weight.shape
    step = vocab if call.weight.dtype == call.precision.acc else max(64, CAST_BYTES // (hidden * 4))
    for first in range(0, vocab, step):
        yield first, grad[:, first : first + step]


def _live_rows(call: Call, state: Tensor, upstream: RowGradients) -> tuple[Call, Tensor, RowGradients]:
    """Without the rows through which no gradient comes back, where that is worth a copy."""
    if not call.counts:
        return call, state, upstream
    live = torch.zeros(call.rows, dtype=torch.bool, device=call.hidden.device)
    for g in upstream:
        if g is not None:
            live |= (g != 0).view(call.rows, -1).any(-1)
    count = int(live.sum())
    if count > 0.9 * call.rows:
        return call, state, upstream
    chosen = live.nonzero().squeeze(-1)
    index = chosen if call.index is None else call.index[chosen]
    return call._replace(index=index), state[chosen], walk.part_of(upstream, chosen)
