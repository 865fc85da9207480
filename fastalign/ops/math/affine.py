"""csrc/math/affine.h as @triton.jit functions: the affine maps that GAE composes; the rules of scalar.py
hold."""

import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it in the module of every function)

from fastalign.ops.math.scalar import fma


@triton.jit
def compose(inner_a, inner_b, outer_a, outer_b):
    """The map outer(inner(x)) of x -> a x + b; in the order of a forward scan, which has the inner one
    first."""
    return inner_a * outer_a, fma(outer_a, inner_b, outer_b)


@triton.jit
def gae_map(reward, value, gamma, lam):
    return gamma * lam, fma(lam, reward, (1.0 - lam) * value)
