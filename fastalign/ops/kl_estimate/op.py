"""Per-token KL estimators from two log-probs."""

from __future__ import annotations

import torch

from fastalign.ops.slopes import times_slope
from fastalign.runtime.dispatch import Op, scalar_dtypes, standard_kernels
from fastalign.runtime.function import Function

KINDS = ("k1", "k2", "k3", "abs")  # the position is the code in csrc/math/scalar.h (KlKind)

kl_estimate_fwd = Op(
    "kl_estimate_fwd", "(Tensor logprobs, Tensor ref_logprobs, int kind, bool with_slope) -> (Tensor, Tensor)",
    lambda logprobs, ref_logprobs, kind, with_slope: (
        torch.empty_like(logprobs), torch.empty_like(logprobs) if with_slope else logprobs.new_empty(0)
    ),
    standard_kernels("kl_estimate", "kl_estimate_fwd"), scalar_dtypes(), "logprobs[N] ref_logprobs[N]",
)  # fmt: skip
# Results: value and d value / d logprobs, both [n]; the latter empty(0) if not `with_slope`.


class KlEstimateFunction(Function):
    names = "kl_estimate"

    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, kind):
        value, slope = kl_estimate_fwd(logprobs, ref_logprobs, kind, True)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        # Selected also where nothing comes from above: the slope of k2 is infinite for an infinite d, and all slopes are NaN for NaN.
        g = times_slope(grad, slope).masked_fill(grad == 0, 0.0)
        return g, -g if ctx.needs_input_grad[1] else None, None
