"""csrc/math/moments.h as @triton.jit functions: counts, means and squared deviations that merge; the rules of
scalar.py hold."""

import triton
import triton.language as tl


@triton.jit
def push_moments(x, counted, count, shift, total, square):
    """Adds x, where it is counted, to the sums of each lane."""
    shift = tl.where(counted & (count == 0), x, shift)
    d = tl.where(counted, x - shift, 0.0)
    return count + tl.where(counted, 1.0, 0.0), shift, total + d, square + d * d


@triton.jit
def moved_m2(count, mean, m2, new_mean):
    return m2 + count * (mean - new_mean) * (mean - new_mean)


@triton.jit
def merge_lanes(count, shift, total, square):
    """Count, mean and m2 of all lanes' sums, in fp64: the lanes' means may lie far from 0 against their
    deviations."""
    count, total = count.to(tl.float64), total.to(tl.float64)
    mean = total / tl.where(count > 0, count, 1.0)
    m2 = square.to(tl.float64) - mean * total
    mean += shift.to(tl.float64)
    n = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / tl.where(n > 0, n, 1.0)
    return n, center, tl.sum(moved_m2(count, mean, tl.where(m2 < 0, 0.0, m2), center), 0)


@triton.jit
def merge_parts(counts, count_stride, means, m2s, stride, parts, BLOCK: tl.constexpr):
    """Count, mean and m2 of all parts, in index order, in fp64. Part i's numbers lie at counts + i
    count_stride, means + i stride, m2s + i stride."""
    lane = tl.arange(0, BLOCK)
    n, weighted, squares = (
        tl.zeros([BLOCK], tl.float64),
        tl.zeros([BLOCK], tl.float64),
        tl.zeros([BLOCK], tl.float64),
    )
    for start in range(0, parts, BLOCK):
        i, inside = start + lane, start + lane < parts
        count = tl.load(counts + i * count_stride, mask=inside, other=0.0).to(tl.float64)
        n += count
        weighted += count * tl.load(means + i * stride, mask=inside, other=0.0)
    all_count = tl.sum(n, 0)
    center = tl.sum(weighted, 0) / tl.where(all_count > 0, all_count, 1.0)
    for start in range(0, parts, BLOCK):
        i, inside = start + lane, start + lane < parts
        count = tl.load(counts + i * count_stride, mask=inside, other=0.0).to(tl.float64)
        mean, m2 = (
            tl.load(means + i * stride, mask=inside, other=0.0),
            tl.load(m2s + i * stride, mask=inside, other=0.0),
        )
        squares += moved_m2(count, mean, m2, center)
    return all_count, center, tl.sum(squares, 0)
