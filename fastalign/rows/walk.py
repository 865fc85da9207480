"""The walk of the fused head over tiles of logits: [some rows] x [a part of the vocabulary] at a time, in one
workspace that every tile is written over. Forward pushes tiles into row states, backward pulls their
gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_stats.contract import (
    RowGradients,
    RowOptions,
    Rows,
    TokenStatsBwd,
    TokenStatsFused,
    TokenStatsFwd,
)
from fastalign.ops.token_stats.fused import token_stats_fused_
from fastalign.ops.token_stats.op import row_states_finish, token_stats_bwd_, token_stats_fwd
from fastalign.rows import vocab_parallel
from fastalign.rows.head import Head, Precision, Tile, bring_back, logits_of, operand
from fastalign.rows.planner import SHARDS, Plan
from fastalign.rows.spec import RowSpec
from fastalign.rows.states import RowStates


class Tower(NamedTuple):
    """Hidden states [T, H] and the head over them."""

    hidden: Tensor
    head: Head


class Call(NamedTuple):
    """One call: its tensors, then what they mean. labels [T, K], mask [T]: of all rows; index [n]: the scored
    ones among them, or None where all are walked (then `mask` says which count). vocab_start, vocab_total:
    which part of the vocabulary the weight is; the others are on the other ranks of `group`. outputs,
    differentiable: names."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    index: Tensor | None
    temperature: Tensor | None
    precision: Precision
    ref_precision: Precision | None
    options: RowOptions
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    plan: Plan
    vocab_start: int
    vocab_total: int
    group: Any
    counts: bool  # whether numbers may be read from the device

    @property
    def policy(self) -> Tower:
        return Tower(self.hidden, Head(self.weight, self.bias, *self.precision))

    @property
    def ref(self) -> Tower | None:
        return (
            None
            if self.ref_hidden is None
            else Tower(self.ref_hidden, Head(self.ref_weight, self.ref_bias, *self.ref_precision))
        )

    @property
    def rows(self) -> int:
        """How many are walked."""
        return self.hidden.shape[0] if self.index is None else self.index.shape[0]


TENSORS = Call._fields.index("precision")  # the fields of Call before the first that is no tensor


class Block(NamedTuple):
    """Rows that are multiplied together: their places among the walked rows, and their operands."""

    rows: slice
    index: Tensor | None
    x: Tensor
    ref_x: Tensor | None
    spec: RowSpec


def picked(x: Tensor | None, index: Tensor | None) -> Tensor | None:
    return x if x is None or index is None else x.index_select(0, index)


def blocks(call: Call, size: int) -> Iterator[Block]:
    """The walked rows, `size` at a time."""
    for first in range(0, call.rows, size):
        rows = slice(first, min(first + size, call.rows))
        yield block_of(call, rows)


def block_of(call: Call, rows: slice) -> Block:
    index = None if call.index is None else call.index[rows]

    def mine(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows] if index is None else x.index_select(0, index)

    mask = mine(call.mask)

    def operands(tower: Tower | None) -> Tensor | None:
        if tower is None:
            return None
        x = operand(tower.head, mine(tower.hidden))
        # A masked row's logits get gradient 0, but 0 times NaN would reach the weight.
        x = (
            x
            if mask is None
            else torch.where(mask.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device))
        )
        missing = call.plan.rows - x.shape[0] if call.plan.pinned else 0
        return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x

    labels = mine(call.labels)
    count = rows.stop - rows.start
    shape = () if labels is None else tuple(labels.shape)
    spec = RowSpec(
        (count,), call.vocab_total, shape, labels, mask, call.temperature, call.options, call.outputs
    )
    return Block(rows, index, operands(call.policy), operands(call.ref), spec)


class Workspace:
    """The tile's logits, policy's and reference's."""

    def __init__(self, call: Call, rows: int, vocab: int):
        head = call.policy.head
        size = (rows if call.plan.pinned else min(rows, call.rows)) * min(vocab, head.vocab)
        self.buffers = [
            torch.empty(size, dtype=head.logits, device=head.weight.device)
            for _ in range(1 if call.ref is None else 2)
        ]

    def rows(self, call: Call, block: Block, first: int, end: int) -> Rows:
        """The logits of a tile, computed, and how they are read."""
        tiles = []
        for buffer, tower, x in zip(self.buffers, (call.policy, call.ref), (block.x, block.ref_x)):
            tile = buffer[: x.shape[0] * (end - first)].view(x.shape[0], end - first)
            tiles.append(logits_of(tower.head, x, first, end, tile)[: block.spec.shape[0]])
        return block.spec.rows(*tiles, start=call.vocab_start + first)


def vocabulary(call: Call) -> Iterator[list[tuple[int, int]]]:
    """The parts of the vocabulary that tiles are made of. All of them follow each other in one state; with
    pinned products each shard's do, so that one rank or several come to the same sums."""
    vocab, step = call.policy.head.vocab, call.plan.vocab
    shard = -(-call.vocab_total // SHARDS) if call.plan.pinned else vocab
    for begin in range(0, vocab, shard):
        stop = min(begin + shard, vocab)
        yield [(first, min(first + step, stop)) for first in range(begin, stop, step)]


def push(call: Call, block: Block, work: Workspace) -> tuple[Sequence[Tensor], Tensor]:
    """(results, state) of a block's rows over the vocabulary."""
    shards = []
    for tiles in vocabulary(call):
        state = target = None
        for first, end in tiles:
            rows = work.rows(call, block, first, end)
            *results, state, target = token_stats_fwd(
                TokenStatsFwd(rows, block.spec.bits, state, target if call.labels is not None else None)
            )
        shards.append(RowStates(state, target))
    return merged(call, block, results, shards)


def push_logits(call: Call, block: Block, rows: Rows) -> tuple[Sequence[Tensor], Tensor]:
    """(results, state) of a block's rows whose logits over all the vocabulary of this rank are there."""
    *results, state, target = token_stats_fwd(TokenStatsFwd(rows, block.spec.bits, None, None))
    return merged(call, block, results, [RowStates(state, target)])


def merged(
    call: Call, block: Block, results: Sequence[Tensor], shards: list[RowStates]
) -> tuple[Sequence[Tensor], Tensor]:
    """With the states of all shards, this rank's and the others'. results: what a lone shard gave."""
    if len(shards) == 1 and call.group is None:
        return results, shards[0].state
    states = vocab_parallel.merge(shards, call.group)
    return row_states_finish(block.spec.finishing(*states)), states.state


class Gradients:
    """The gradients that a call makes, and how tiles reach them: those of hidden [T, H] in the hidden states'
    type, those of weight and bias summed in the accumulation type."""

    def __init__(self, call: Call, need_hidden: bool, need_weight: bool, need_bias: bool, several: bool):
        """several: more than one block of rows will add to the weight's."""
        self.call, head, hidden = call, call.policy.head, call.policy.hidden
        self.acc, self.several = call.precision.acc, several
        kind = self.acc if call.group is not None else hidden.dtype  # what ranks add up is rounded afterwards
        self.hidden = torch.zeros(hidden.shape, dtype=kind, device=hidden.device) if need_hidden else None
        self.weight = self._sum(head.weight) if need_weight else None
        self.bias = self._sum(head.bias) if need_bias else None
        self._begun = False

    def _sum(self, x: Tensor) -> Tensor:
        narrow = x.dtype != self.acc and not self.several
        make = torch.empty if self.call.rows else torch.zeros
        return make(x.shape, dtype=x.dtype if narrow else self.acc, device=x.device)

    def add(self, block: Block, tiles: Iterator[tuple[int, Tensor]]) -> None:
        """The gradients of a block's tiles of logits, which cover the vocabulary."""
        head = self.call.policy.head
        hidden = None
        if self.hidden is not None:
            in_place = block.index is None and self.hidden.dtype == self.acc
            count = block.spec.shape[0]
            hidden = (
                self.hidden[block.rows]
                if in_place
                else torch.empty(count, block.x.shape[1], dtype=self.acc, device=block.x.device)
            )
        x = block.x[: block.spec.shape[0]]
        for first, grad in tiles:
            part = slice(first, first + grad.shape[1])
            weight, bias = (None if x is None else self._wide(x[part]) for x in (self.weight, self.bias))
            bring_back(head, grad, first, x, Tile(hidden, weight, bias, first > 0, self._begun))
            for whole, wide in ((self.weight, weight), (self.bias, bias)):
                if whole is not None and whole.dtype != self.acc:
                    whole[part] = wide
        self._begun = True
        if hidden is not None and not in_place:
            if block.index is None:
                self.hidden[block.rows] = hidden
            else:
                self.hidden.index_copy_(0, block.index, hidden.to(self.hidden.dtype))

    def _wide(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.acc else torch.empty(x.shape, dtype=self.acc, device=x.device)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        head, hidden = self.call.policy.head, self.hidden
        if hidden is not None and self.call.group is not None:
            hidden = vocab_parallel.add(hidden, self.call.group).to(self.call.hidden.dtype)
        weight = None if self.weight is None else self.weight.to(head.weight.dtype)
        return hidden, weight, None if self.bias is None else self.bias.to(head.bias.dtype)


def pull(
    call: Call, block: Block, work: Workspace, state: Tensor, upstream: RowGradients
) -> Iterator[tuple[int, Tensor]]:
    """The gradient of a block's logits, tile by tile, from logits that are multiplied again."""
    for tiles in vocabulary(call):
        for first, end in tiles:
            rows = work.rows(call, block, first, end)
            token_stats_bwd_(TokenStatsBwd(rows, state, upstream))
            yield first, rows.logits


def fused(
    call: Call, block: Block, work: Workspace, upstream: RowGradients
) -> tuple[Sequence[Tensor], Tensor]:
    """(results, gradient of the logits) of a block, for upstream gradients known beforehand."""
    rows = work.rows(call, block, 0, call.policy.head.vocab)
    if call.group is None:
        return token_stats_fused_(TokenStatsFused(rows, block.spec.bits, upstream)), rows.logits
    results, state = push_logits(call, block, rows)
    token_stats_bwd_(TokenStatsBwd(rows, state, upstream))
    return results, rows.logits


def part_of(upstream: RowGradients, rows: Any) -> RowGradients:
    """The upstream gradients of some rows: a slice or their numbers."""
    return RowGradients(*(None if g is None else g[rows] for g in upstream))


def bring_hidden_back(call: Call, grad: Tensor, out: Tensor) -> None:
    """The gradient of hidden alone, [rows, H], from that of the logits over the whole vocabulary."""
    bring_back(call.policy.head, grad, 0, out, Tile(out, None, None, False, False))
