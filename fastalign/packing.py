"""Packed variable-length sequences: one row of tokens, `cu_seqlens` for the boundaries, labels aligned with
the rows that predict them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.sequence_sum.op import SequenceSumFunction
from fastalign.runtime.checks import (
    check_cu_seqlens,
    check_cu_seqlens_outside_ops,
    check_integer,
    check_integers,
    check_same_device,
    check_shape,
    per_token,
    row_mask,
)

IGNORE_INDEX = -100


class PackedBatch(NamedTuple):
    """Sequences laid end to end. T tokens, S sequences.

    input_ids [T] int64; position_ids [T] int64, restarting at 0 in every sequence; labels [T] int64: row t of
    the logits scores labels[t], the next token of the same sequence, `ignore_index` where nothing is scored;
    mask [T] bool = labels != ignore_index (row-aligned); cu_seqlens [S + 1] int32; max_seqlen: the longest
    sequence, a Python int."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return PackedBatch(
            *(x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x for x in self)
        )


def pack(
    sequences: Sequence[Sequence[int] | Tensor],
    masks: Sequence[Sequence[int] | Sequence[bool] | Tensor] | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """Lay sequences of token ids end to end.

    Args:
        sequences: S sequences of token ids (lists or 1-D integer tensors); empty ones are legal.
        masks: for each sequence, which of its own tokens are scored (token-aligned: masks[i][j] says whether
            token j of sequence i is a response token). Default: all. The first token of a sequence has no
            prediction and is never scored.
        device: of the result; default: the CPU.

    Returns:
        PackedBatch.

    Raises:
        ValueError, TypeError: sequences or masks of more than one dimension, token ids that are no integers,
            masks that do not match the sequences.
    """
    rows = [_row("sequences", i, s) for i, s in enumerate(sequences)]
    for i, r in enumerate(rows):
        if r.numel():  # an empty list has no type
            check_integers(f"sequences[{i}]", r)
    rows = [r.to(torch.int64) for r in rows]
    lengths = [len(r) for r in rows]
    if masks is not None:
        marks = [_row("masks", i, m).to(torch.bool) for i, m in enumerate(masks)]
        if [len(m) for m in marks] != lengths:
            raise ValueError(
                f"masks has lengths {[len(m) for m in marks]}; legal: those of sequences, {lengths}"
            )
    input_ids = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0) if rows else 0
    positions = [torch.arange(n) for n in lengths]
    position_ids = torch.cat(positions) if rows else torch.empty(0, dtype=torch.int64)
    mask = torch.cat(marks) if masks is not None and rows else None
    labels = shift_labels(input_ids, cu_seqlens, mask, ignore_index=ignore_index)
    batch = PackedBatch(
        input_ids, position_ids, labels, labels != ignore_index, cu_seqlens, max(lengths, default=0)
    )
    return batch if device is None else batch.to(device)


def _row(name: str, i: int, values: Any) -> Tensor:
    row = torch.as_tensor(values)
    if row.dim() != 1:
        raise ValueError(f"{name}[{i}] has shape {tuple(row.shape)}; legal: 1-D, a sequence's tokens")
    return row


def shift_labels(
    input_ids: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Labels for the rows that predict them: labels[t] = input_ids[t + 1] within a sequence, `ignore_index` at each sequence's last row.

    Args:
        input_ids: [T] integers, packed.
        cu_seqlens: [S + 1] int32.
        mask: [T] bool aligned with input_ids: which tokens are scored. Token t + 1 unscored makes labels[t] =
            ignore_index.

    Returns:
        [T] int64. Nothing crosses a boundary of cu_seqlens.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, malformed cu_seqlens (values on the CPU).
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 1:
        raise ValueError("input_ids must be a 1-D tensor [T] (packed tokens)")
    check_integers("input_ids", input_ids)
    check_integer("ignore_index", ignore_index)
    cu_seqlens = check_cu_seqlens(cu_seqlens, input_ids)
    check_cu_seqlens_outside_ops(cu_seqlens, input_ids.numel())
    labels = torch.full_like(input_ids, ignore_index, dtype=torch.int64)
    if input_ids.numel() == 0:
        return labels
    following = input_ids[1:].to(torch.int64)
    if mask is not None:
        check_shape("mask", mask, tuple(input_ids.shape))
        check_same_device("mask", mask, "input_ids", input_ids)
        following = torch.where(mask[1:].to(torch.bool), following, ignore_index)
    labels[:-1] = following
    # The last row of every non-empty sequence. An empty sequence's "last row" is its predecessor's, which is
    # a last row as well; leading empty ones have none, and fall on row T - 1 by the modulus: also a last row.
    # No shape depends on data.
    last = torch.remainder(cu_seqlens[1:].to(torch.int64) - 1, input_ids.numel())
    return labels.index_fill(0, last, ignore_index)


def unpad(x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the padding of a padded batch.

    Args:
        x: [B, T, ...]. attention_mask: [B, T], non-zero at real tokens, on any side.

    Returns:
        (packed [N, ...], cu_seqlens [B + 1] int32, indices [N] int64 into the flattened B * T): `packed =
        x.flatten(0, 1)[indices]`. One sequence per row of the batch, empty rows included. N depends on data,
        so a CUDA mask costs one synchronisation.
    """
    if x.dim() < 2 or tuple(x.shape[:2]) != tuple(attention_mask.shape):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; legal here: {tuple(x.shape[:2])} (the "
            "first two dims of x)"
        )
    check_same_device("attention_mask", attention_mask, "x", x)
    keep = attention_mask != 0
    indices = keep.flatten().nonzero().flatten()
    cu_seqlens = torch.zeros(x.shape[0] + 1, dtype=torch.int32, device=x.device)
    cu_seqlens[1:] = keep.sum(1, dtype=torch.int32).cumsum(0)
    return x.flatten(0, 1).index_select(0, indices), cu_seqlens, indices


def repad(packed: Tensor, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `unpad`: [N, ...] back to `shape` = (B, T), zeros elsewhere. Differentiable."""
    rows, columns = shape
    if packed.shape[0] != indices.numel():
        raise ValueError(
            f"packed has {packed.shape[0]} rows but indices has {indices.numel()} entries; they must match"
        )
    out = packed.new_zeros((rows * columns, *packed.shape[1:]))
    return out.index_copy(0, indices, packed).view(rows, columns, *packed.shape[1:])


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
        mask: [T] bool, row-aligned; False tokens are left out and get gradient 0, whatever they hold (NaN
            included).
        weights: [T], any sign; not differentiated.
        mean: divide by the number of scored tokens (at least 1), also when weights are given.
        group: a process group over which every sequence's tokens are split (sequence parallel). All ranks
            pass the same S; sums and counts are added across ranks, and every rank's loss may use the result:
            the gradient stays local (each rank differentiates its own copy of the same loss once).

    Returns:
        [S] fp32 (fp64 for fp64 input). Fixed summation order: two runs are bitwise equal.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices; cu_seqlens not running monotonically from 0 to T
            (checked on the CPU).
    """
    x = per_token("x", x)
    cu_seqlens = check_cu_seqlens(cu_seqlens, x)
    mask = row_mask(mask, x)
    if weights is not None:
        weights = per_token("weights", weights, x).detach()
    sums, counts = SequenceSumFunction.apply(x, cu_seqlens, mask, weights)
    if group is not None:
        from fastalign.runtime.distributed import sum_over_group

        sums, counts = sum_over_group(sums, group), sum_over_group(counts, group)
    return sums / counts.clamp(min=1.0) if mean else sums
