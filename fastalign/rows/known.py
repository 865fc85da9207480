"""The fused head where a loss is known as soon as some rows' statistics are: logits, loss and gradient of a
chunk follow each other while its logits are there, so nothing is multiplied twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_stats.contract import OUTPUT_BITS, PER_LABEL, RowGradients, ScaleRows, TokenStatsBwd
from fastalign.ops.token_stats.fused import scale_rows_
from fastalign.ops.token_stats.op import token_stats_bwd_
from fastalign.rows import walk
from fastalign.rows.stats import TokenStats
from fastalign.rows.walk import Call, Gradients, Workspace
from fastalign.runtime import overwrite
from fastalign.runtime.function import Function


class Chunk(NamedTuple):
    """Tokens [first, end) of the call and the walked rows among them, and which of the loss's units (pairs,
    sequences) they are."""

    tokens: slice
    rows: slice
    units: slice


class KnownLoss(NamedTuple):
    """chunks: of all rows, in order. part(chunk, stats): the share of the loss, a scalar, of a chunk's
    statistics, [its tokens] each. whole(stats): the loss of all, whose value is returned."""

    chunks: Sequence[Chunk]
    part: Callable[[Chunk, TokenStats], Tensor]
    whole: Callable[[TokenStats], Tensor]


class KnownLossFunction(Function):
    """Forward makes the gradients; backward hands them out, times the upstream gradient of the loss."""

    names = "linear_preference_loss, linear_policy_loss and linear_token_kl_loss"

    @staticmethod
    def forward(ctx, hidden, weight, bias, call: Call, loss: KnownLoss):
        call = call._replace(hidden=hidden, weight=weight, bias=bias)
        most = max((c.rows.stop - c.rows.start for c in loss.chunks), default=0)
        into = Gradients(
            call, *ctx.needs_input_grad[:3], several=len(loss.chunks) > 1 or most > call.plan.rows
        )
        work = Workspace(call, call.plan.rows, call.plan.vocab)
        found = {
            name: torch.zeros(hidden.shape[0], dtype=call.precision.acc, device=hidden.device)
            for name in call.outputs
        }
        for chunk in loss.chunks:
            _chunk(call, chunk, loss.part, work, found, into)
        gradients = into.results()
        ctx.save_for_backward(*gradients)
        ctx.spent = False
        return loss.whole(TokenStats(**found))

    @staticmethod
    def backward(ctx, g_loss):
        if ctx.spent:
            raise RuntimeError(
                f"{KnownLossFunction.names} can be differentiated once: the gradients made in forward have "
                "been handed out"
            )
        ctx.spent = True
        return tuple(None if g is None else _times(g, g_loss) for g in ctx.saved_tensors)


def chunks_of(call: Call, borders: Sequence[int] | None) -> list[Chunk]:
    """Chunks of about as many walked rows as the plan has at once, their borders among these (tokens at which
    units begin, and the end); None: any row is one."""
    count = call.hidden.shape[0]
    if borders is None:
        starts = list(range(0, call.rows, call.plan.rows))
        cuts = [0, *(starts[1:] if call.index is None else call.index[starts[1:]].tolist()), count]
        rows = [*starts, call.rows] if starts else [0, 0]
        return [
            Chunk(slice(a, b), slice(r, s), slice(a, b)) for a, b, r, s in zip(cuts, cuts[1:], rows, rows[1:])
        ]
    walked = (
        borders
        if call.index is None
        else torch.searchsorted(call.index, torch.tensor(borders, device=call.index.device)).tolist()
    )
    chunks, first = [], 0
    for i in range(1, len(borders)):
        last = i == len(borders) - 1
        if last or walked[i + 1] - walked[first] > call.plan.rows:
            chunks.append(
                Chunk(slice(borders[first], borders[i]), slice(walked[first], walked[i]), slice(first, i))
            )
            first = i
    return chunks


def _chunk(
    call: Call, chunk: Chunk, part: Any, work: Workspace, found: dict[str, Tensor], into: Gradients
) -> None:
    """One chunk's statistics into `found`, its gradients into `into`."""
    first, end = chunk.rows.start, chunk.rows.stop
    fits = end - first <= call.plan.rows
    blocks = [
        walk.block_of(call, slice(a, min(a + call.plan.rows, end))) for a in range(first, end, call.plan.rows)
    ]
    states, logits = [], None
    for block in blocks:
        rows = work.rows(call, block, 0, call.plan.vocab)
        results, state = walk.push_logits(call, block, rows)
        states.append(state)
        logits = rows if fits else None
        places = block.rows if block.index is None else block.index
        for name, result in zip(OUTPUT_BITS, results):
            if name in found:
                found[name][places] = result.reshape(-1)
    slopes = _slopes(chunk, part, found, call.differentiable)
    for block, state in zip(blocks, states):
        places = block.rows if block.index is None else block.index
        upstream = _at(slopes, places, chunk.tokens.start)
        if logits is None:
            into.add(block, walk.pull(call, block, work, state, upstream))
        else:
            token_stats_bwd_(TokenStatsBwd(logits, state, upstream))
            into.add(block, iter([(0, logits.logits)]))


def _slopes(chunk: Chunk, part: Any, found: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """d loss / d statistic of the chunk's tokens."""
    leaves = {name: found[name][chunk.tokens].detach().requires_grad_(name in names) for name in found}
    asked = [name for name in names if name in leaves]
    with torch.enable_grad():
        value = part(chunk, TokenStats(**leaves))
    if not value.requires_grad:
        return {}
    grads = torch.autograd.grad(value, [leaves[name] for name in asked], allow_unused=True)
    return {name: g for name, g in zip(asked, grads) if g is not None}


def _at(slopes: dict[str, Tensor], places: Any, start: int) -> RowGradients:
    """The slopes of some rows, by their places among all of them; the slopes begin at `start`."""
    own = slice(places.start - start, places.stop - start) if isinstance(places, slice) else places - start
    found = {name: g[own].contiguous() for name, g in slopes.items()}
    return RowGradients(
        **{f"g_{name}": g.unsqueeze(-1) if name in PER_LABEL else g for name, g in found.items()}
    )


def _times(grad: Tensor, scale: Tensor) -> Tensor:
    if not overwrite.is_ours_alone(grad):  # saved-tensor hooks may keep what they gave
        grad = grad.clone()
    scale_rows_(ScaleRows(grad, scale.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)))
    return grad
