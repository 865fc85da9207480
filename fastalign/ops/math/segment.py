"""csrc/segment.h as @triton.jit functions: where a packed sequence begins and ends, whatever cu_seqlens hold;
and which of its tokens count."""

import triton
import triton.language as tl


@triton.jit
def sequence_bounds(cu_seqlens, i, tokens):
    """First and last + 1 token of sequence i, inside [0, tokens] whatever cu_seqlens holds (its values are
    not checked on the device)."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), tokens)
    return begin, tl.minimum(tl.maximum(tl.load(cu_seqlens + i + 1), begin), tokens)


@triton.jit
def sequence_share(cu_seqlens, i, sequences, tokens):
    """The tokens that sequence i has to write, first and last + 1: its own, and those that boundaries which
    have changed would leave to nobody."""
    begin, end = sequence_bounds(cu_seqlens, i, tokens)
    return tl.where(i == 0, 0, begin), tl.where(i == sequences - 1, tokens, end)


@triton.jit
def scored_tokens(mask, t, inside):
    """Which of the tokens t, those inside, the mask lets count; without one all do."""
    scored = inside
    if mask is not None:
        scored = tl.load(mask + t, mask=inside, other=0) != 0
    return scored
