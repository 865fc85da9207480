"""csrc/math/scalar.h as @triton.jit functions. The other files of this folder are the twins of the other
headers; kernels stand in ops/*/triton*.py.

Rules that hold for every function of this folder. No libdevice: Triton's interpreter has none. What must be
rounded once says `fma`, and kernels are compiled without fusion of their own, so the interpreter, NVIDIA and
AMD do the same arithmetic. Selections are tl.where and written so that NaN survives. Kinds (transform, link,
labels) are constexpr: a run uses one loss, so one small kernel per loss is compiled at first use, instead of
one that holds every formula and branches at run time. Numbers (beta, margins, weights) are run-time arguments
and never cause a compilation.
"""

import triton
import triton.language as tl

from fastalign.ops.math.columns import ABS, K1, K2
from fastalign.runtime.ffi import TRITON_INTERPRETED

LN2 = tl.constexpr(0.69314718055994531)
LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) in fp32
LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # and what fp32 left out
FINITE = tl.constexpr(3.4028234663852886e38)
SUM_SHARE, SUM_SHRINKS_BY = tl.constexpr(2.0**-24), tl.constexpr(2.0**24)  # of the sum of a row's logits
INTERPRETED = tl.constexpr(TRITON_INTERPRETED)


@triton.jit
def fma(x, y, z):
    if INTERPRETED:  # before Triton 3.9 the interpreter rounds twice; a product of two fp32 is exact in fp64
        return (tl.cast(x, tl.float64) * tl.cast(y, tl.float64) + tl.cast(z, tl.float64)).to(tl.float32)
    else:
        return tl.math.fma(x, y, z)


@triton.jit
def div(x, y):
    return tl.math.div_rn(x, y)  # `/` is 2 ulp on NVIDIA


@triton.jit
def relu(x):
    return tl.where(x > 0, x, tl.where(x != x, x, 0.0))


@triton.jit
def exp(x):
    # tl.exp rounds x log2(e) to fp32, an error that grows with |x|: put back what the product lost.
    t = x * LOG2E
    lost = fma(x, LOG2E, -t) + x * LOG2E_REST
    e = tl.exp2(t)
    return tl.where(tl.abs(t) < 126.0, fma(e, lost * LN2, e), e)


@triton.jit
def expm1(x):
    # The Taylor series where exp(x) - 1 would cancel; the ninth term is below half an ulp at 1/2.
    r = 1.0 + x * (
        1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))))
    )
    return tl.where(tl.abs(x) < 0.5, x * r, exp(x) - 1.0)


@triton.jit
def log1p(x):
    # log(1 + x) = 2 atanh(x / (2 + x)) where adding 1 would lose digits of x. Beyond, the sum is exact or
    # harmless.
    s = div(x, 2.0 + x)
    q = s * s
    r = 1.0 + q * (
        1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))))
    )
    return tl.where(tl.abs(x) < 0.5, 2.0 * s * r, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    # A fitted odd polynomial (error below 3e-9) up to 0.6; beyond, 1 - 2 / (e^2x + 1), which does not cancel
    # there. For every element of capped logits, hence no more accurate than needed: an approximate exp2 and
    # division.
    a = tl.abs(x)
    q = a * a
    p = q * (
        -0.33333298563957214
        + q
        * (
            0.13331924378871918
            + q * (-0.053783826529979706 + q * (0.02079596184194088 + q * -0.005895147565752268))
        )
    )
    t = tl.where(a < 0.6, fma(a, p, a), 1.0 - 2.0 / (tl.exp2(a * 2.885390081777927) + 1.0))
    return tl.where(x < 0, -t, t)


@triton.jit
def softplus(x):
    return relu(x) + log1p(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return div(tl.where(x >= 0, 1.0, e), 1.0 + e)


@triton.jit
def log1mexp(x):
    return tl.where(x < -LN2, log1p(-exp(x)), tl.log(-expm1(x)))


@triton.jit
def is_finite(x):
    return tl.abs(x) <= FINITE


@triton.jit
def times_slope(gradient, slope):
    """gradient * slope; a slope of exactly 0 passes nothing on, not even an infinite gradient."""
    return tl.where(slope == 0, 0.0, gradient * slope)


@triton.jit
def power(x, y):
    """x ** y for x > 0; exact for y = 0 and y = 1."""
    return tl.where(y == 0, 1.0, tl.where(y == 1, x, exp(y * tl.log(x))))


@triton.jit
def kl_estimate(KIND: tl.constexpr, logprob, ref_logprob):
    """Value and slope of k1, k2, k3, abs; see scalar.h."""
    d = tl.where(logprob == ref_logprob, 0.0, logprob - ref_logprob)
    if KIND == K1:
        value, slope = d, tl.zeros_like(d) + 1.0
    elif KIND == K2:
        value, slope = d * d * 0.5, d
    elif KIND == ABS:
        value, slope = tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    else:
        series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720)))))
        x = tl.where(-d > 20.0, 20.0, -d)
        m = expm1(x)
        value, slope = tl.where(tl.abs(d) < 0.05, series, m - x), -m
    return value, slope


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to the storage type, rounded to nearest even, once."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own conversion truncates
        u = x.to(tl.uint32, bitcast=True)
        u = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, u).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def one_if_zero(x):
    return tl.where(x > 0, x, 1.0)
