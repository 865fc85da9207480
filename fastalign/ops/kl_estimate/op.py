"""Per-token KL estimators from two log-probs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastalign.ops.slopes import times_slope
from fastalign.runtime.arguments import In
from fastalign.runtime.function import Function
from fastalign.runtime.op import SCALAR_DTYPES, Op

KINDS = ("k1", "k2", "k3", "abs")  # the position is the code in csrc/math/scalar.h (KlKind)


class KlEstimateFwd(NamedTuple):
    logprobs: In("N")
    ref_logprobs: In("N")
    kind: int
    with_slope: bool


kl_estimate_fwd = Op(
    "kl_estimate_fwd",
    KlEstimateFwd,
    "(Tensor, Tensor)",
    lambda a: (
        torch.empty_like(a.logprobs),
        a.logprobs.new_empty(a.logprobs.shape[0] if a.with_slope else 0),
    ),
    "kl_estimate",
    SCALAR_DTYPES,
    public=("kl_estimate",),
)
# Results: value and d value / d logprobs, both [n]; the latter empty(0) if not `with_slope`.


class KlEstimateFunction(Function):
    names = "kl_estimate"

    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, kind):
        value, slope = kl_estimate_fwd(KlEstimateFwd(logprobs, ref_logprobs, kind, True))
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        # Selected also where nothing comes from above: the slope of k2 is infinite for an infinite d, and all
        # slopes are NaN for NaN.
        g = times_slope(grad, slope).masked_fill(grad == 0, 0.0)
        return g, -g if ctx.needs_input_grad[1] else None
