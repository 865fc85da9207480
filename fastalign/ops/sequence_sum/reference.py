"""The definition of sums over packed sequences in plain PyTorch."""

from __future__ import annotations

import torch

from fastalign.ops.slopes import times_slope


def _segments(cu_seqlens, tokens):
    """Sequence number of every token: one that there is, whatever cu_seqlens holds."""
    rows = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True).clamp(
        max=max(cu_seqlens.shape[0] - 2, 0)
    )


def covered(cu_seqlens, index):
    """Whether every token lies in its sequence: False somewhere only for boundaries that are none, or none of
    these tokens."""
    rows = torch.arange(index.shape[0], device=index.device)
    return (cu_seqlens[index] <= rows) & (rows < cu_seqlens[index + 1]) if index.numel() else rows > 0


def _terms(x, mask, weights):
    terms = x if weights is None else x * weights
    return terms if mask is None else torch.where(mask, terms, torch.zeros_like(terms))


def segment_sums(values, index, sequences):
    """Sum of `values` by sequence number, accumulated in fp64 and rounded once."""
    return (
        torch.zeros(sequences, dtype=torch.float64, device=values.device)
        .index_add(0, index, values.double())
        .to(values.dtype)
    )


def sequence_sum_fwd(a):
    sequences = a.cu_seqlens.shape[0] - 1
    index = _segments(a.cu_seqlens, a.x.shape[0])
    counted = torch.ones_like(a.x) if a.mask is None else a.mask.to(a.x.dtype)
    return segment_sums(_terms(a.x, a.mask, a.weights), index, sequences), segment_sums(
        counted, index, sequences
    )


def sequence_sum_bwd(a):
    index = _segments(a.cu_seqlens, a.tokens)
    each = a.grad[index]
    each = _terms(each if a.weights is None else times_slope(each, a.weights), a.mask, None)
    return torch.where(covered(a.cu_seqlens, index), each, torch.nan)
