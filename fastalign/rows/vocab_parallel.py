"""A head whose weight several ranks hold. Parts of the vocabulary stay where they are (`tp_group`): only the
states of rows travel, 14 numbers a row. Shards of a DTensor are brought together once per direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.rows import states
from fastalign.rows.planner import SHARDS
from fastalign.rows.states import RowStates


def merge(own: Sequence[RowStates], group: Any) -> RowStates:
    """The states over all the vocabulary from those of this rank's parts, the same bits on every rank:
    neighbours first, then neighbours of those, so that 1, 2 or 4 ranks that hold the same parts come to the
    same sums."""
    state = _tree(own)
    return state if group is None else _tree(_from_ranks(state, group))


def _tree(parts: Sequence[RowStates]) -> RowStates:
    while len(parts) > 1:
        parts = [states.merge(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


def _from_ranks(own: RowStates, group: Any) -> list[RowStates]:
    """In the order of the ranks; one message each way."""
    flat = torch.cat([own.state.reshape(-1), own.target.reshape(-1)])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, flat, group=group)
    size = own.state.numel()
    return [RowStates(x[:size].view_as(own.state), x[size:].view_as(own.target)) for x in gathered]


def add(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, in place: a rank's part of the gradient of hidden is that of its part of the
    vocabulary."""
    dist.all_reduce(x, group=group)
    return x


def place(vocab: int, group: Any, pinned: bool = False) -> tuple[int, int]:
    """(vocab_start, vocab_total) of this rank, whose part has `vocab` tokens; ranks hold equal parts in their
    order. pinned: in parts that one rank would have, too."""
    if group is None:
        return 0, vocab
    ranks = dist.get_world_size(group)
    if pinned and (SHARDS % ranks or ranks * vocab % SHARDS):
        raise ValueError(
            f"batch_invariant=True with a vocabulary of {ranks * vocab} on {ranks} ranks; legal: 1, 2 or "
            f"{SHARDS} ranks and a multiple of {SHARDS}"
        )
    return dist.get_rank(group) * vocab, dist.get_world_size(group) * vocab


def whole_weight(name: str, x: Any, group: Any) -> Any:
    """A weight or bias that is a DTensor as a tensor: with a vocabulary-parallel group this rank's part, else
    all of it, gathered from the ranks, among which backward sums its gradient and scatters the shards. Others
    as they are."""
    if not _is_dtensor(x):
        return x
    if any(not (p.is_replicate() or p.is_shard(0)) for p in x.placements):
        raise ValueError(f"{name} is a DTensor of placements {x.placements}; legal: Replicate and Shard(0)")
    if group is not None:
        return x.to_local()
    from torch.distributed.tensor import Partial  # slow to import, and there already where a DTensor is

    return x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)


def own_rows(name: str, x: Any) -> Any:
    """Hidden states that are a DTensor as a tensor: the rows of this rank. Others as they are."""
    if not _is_dtensor(x):
        return x
    if any(not (p.is_replicate() or p.is_shard(0)) for p in x.placements):
        raise ValueError(f"{name} is a DTensor of placements {x.placements}; legal: Replicate and Shard(0)")
    return x.to_local()


def _is_dtensor(x: Any) -> bool:
    return type(x).__name__ == "DTensor"
