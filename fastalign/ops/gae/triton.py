"""Generalised advantage estimation in Triton: a program per sequence goes against time, block by block, with
a scan of affine maps inside a block (the formulas are in fastalign/ops/math/affine.py). The last program to
finish merges the moments of all sequences in index order."""

import torch
import triton
import triton.language as tl

from fastalign.ops import columns
from fastalign.ops.math.affine import compose, gae_map
from fastalign.ops.math.columns import MOMENT_COUNT, MOMENT_M2, MOMENT_MEAN, MOMENT_WIDTH
from fastalign.ops.math.moments import merge_lanes, merge_parts, push_moments
from fastalign.ops.math.scalar import fma
from fastalign.ops.math.segment import scored_tokens, sequence_bounds
from fastalign.runtime import ffi

TOKENS = 1024  # of a sequence, at a time
PARTS = 256  # moments of sequences, at a time
TENSORS = [
    "rewards",
    "values",
    "cu_seqlens",
    "mask",
    "bootstrap",
    "gamma_tensor",
    "lam_tensor",
]  # their alignment compiles nothing anew


@triton.jit
def _load(rewards, values, mask, t, inside):
    """Rewards, values, and which of the tokens are scored."""
    scored = scored_tokens(mask, t, inside)
    return tl.load(rewards + t, mask=inside, other=0.0), tl.load(values + t, mask=inside, other=0.0), scored


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=TENSORS)
def gae_fwd_kernel(
    rewards, values, cu_seqlens, mask, bootstrap, gamma_tensor, lam_tensor, gamma, lam, advantages, returns,
    moments, parts, counter, tokens: tl.int32, TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    begin, end = sequence_bounds(cu_seqlens, s, tokens)
    if gamma_tensor is not None:
        gamma = tl.load(gamma_tensor)
    if lam_tensor is not None:
        lam = tl.load(lam_tensor)
    x = 0.0  # X of math/affine.h after the block's last token
    if bootstrap is not None:
        x = tl.load(bootstrap + s)

    count, shift = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    total, square = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    lane = tl.arange(0, TOKENS)
    for first in range(0, end - begin, TOKENS):
        # Lane order runs from the sequence's end, so the scan is a forward one. Each lane brings in the map
        # of the token after its own: the scan then holds X_next without moving results between lanes, and the
        # last lane's is where the next block starts.
        t = end - 1 - (first + lane)
        inside = t >= begin
        r, v, scored = _load(rewards, values, mask, t, inside)
        r_next, v_next, scored_next = _load(rewards, values, mask, t + 1, inside & (t + 1 < end))
        a, b = gae_map(r_next, v_next, gamma, lam)
        a, b = tl.associative_scan((tl.where(scored_next, a, 1.0), tl.where(scored_next, b, 0.0)), 0, compose)
        x_next = fma(a, x, b)
        target = fma(gamma, x_next, r)
        advantage = target - v
        nothing = advantage - advantage  # NaN from a number that is not finite on; see math/affine.h
        target, advantage = target + nothing, advantage + nothing
        tl.store(returns + t, tl.where(scored, target, 0.0), mask=inside)
        tl.store(advantages + t, tl.where(scored, advantage, 0.0), mask=inside)
        count, shift, total, square = push_moments(advantage, scored, count, shift, total, square)
        x = tl.sum(tl.where(lane == TOKENS - 1, x_next, 0.0), 0)

    n, center, m2 = merge_lanes(count, shift, total, square)
    part = parts + MOMENT_WIDTH * s
    tl.store(part + MOMENT_COUNT, n)
    tl.store(part + MOMENT_MEAN, center)
    tl.store(part + MOMENT_M2, m2)

    tl.debug_barrier()  # every thread's part is written before this program is counted, and read after
    sequences = tl.num_programs(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == sequences - 1
    tl.debug_barrier()
    if last:
        all_count, all_mean, all_m2 = merge_parts(
            parts + MOMENT_COUNT,
            MOMENT_WIDTH,
            parts + MOMENT_MEAN,
            parts + MOMENT_M2,
            MOMENT_WIDTH,
            sequences,
            PARTS,
        )
        tl.store(moments + MOMENT_COUNT, all_count.to(tl.float32))
        tl.store(moments + MOMENT_MEAN, all_mean.to(tl.float32))
        tl.store(moments + MOMENT_M2, all_m2.to(tl.float32))


def gae_fwd(a):
    tokens, sequences, dtype, device = (
        a.rewards.shape[0],
        a.cu_seqlens.shape[0] - 1,
        a.rewards.dtype,
        a.rewards.device,
    )
    advantages, returns = (ffi.empty((tokens,), dtype, device) for _ in range(2))
    moments, parts = (
        ffi.empty((columns.MOMENT_WIDTH,), dtype, device),
        ffi.empty((sequences, columns.MOMENT_WIDTH), torch.float64, device),
    )
    if sequences == 0:
        return advantages, returns, moments.zero_()
    with ffi.triton_device(device):
        gae_fwd_kernel[(sequences,)](
            a.rewards, a.values, a.cu_seqlens, a.mask, a.bootstrap, a.gamma_tensor, a.lam_tensor, a.gamma,
            a.lam, advantages, returns, moments, parts, ffi.counter(a.rewards), tokens, TOKENS=TOKENS,
            PARTS=PARTS, **ffi.launch_options(256, device),
        )  # fmt: skip
    return advantages, returns, moments
