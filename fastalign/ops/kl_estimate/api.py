"""Per-token KL estimators from two log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.checks import check_choice, check_floating, check_number, check_same_device, check_shape
from fastalign.function import Function, forward_mode
from fastalign.registry import Op, scalar_dtypes, standard_kernels
from fastalign.slopes import times_slope

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


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3", *, clamp: float | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, with d = logprobs - ref_logprobs.

    k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d (never negative), abs = |d|  (Schulman, "Approximating KL divergence", 2020).
    d/d logprobs: 1, d, 1 - e^-d, sign(d). Near d = 0, k3 uses its series. Below d = -20 its value stays that of d = -20, and so does the slope
    (it does not become 0: the token is still pulled back). Equal infinities count as d = 0. NaN stays NaN; where the upstream gradient is 0, so is
    the gradient, whatever the inputs hold.

    Args:
        logprobs, ref_logprobs: same shape and device, floating. kind: k1, k2, k3 or abs.
        clamp: > 0; the estimate is clamped to [-clamp, clamp], without gradient where it is, as verl and OpenRLHF do with 10. None: as it is. k3
            grows as e^-d, so that a loss made of it should be bounded: one token at d = -20 has a slope of -4.9e8 (`policy_loss` does that
            with kl_clamp).

    Returns:
        The same shape, fp32 (fp64 if either input is), differentiable in both.

    Raises:
        ValueError, TypeError: unknown kind, a clamp that is not positive, shapes, dtypes, devices.
    """
    check_choice("kind", kind, KINDS)
    if clamp is not None:
        check_number("clamp", clamp, above=0.0)
    check_floating("logprobs", logprobs)
    check_floating("ref_logprobs", ref_logprobs)
    check_shape("ref_logprobs", ref_logprobs, tuple(logprobs.shape))
    check_same_device("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    dtype = torch.float64 if torch.float64 in (logprobs.dtype, ref_logprobs.dtype) else torch.float32
    flat = [x.to(dtype).reshape(-1).contiguous() for x in (logprobs, ref_logprobs)]
    if (torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad)) or forward_mode():
        value = KlEstimateFunction.apply(*flat, KINDS.index(kind))
    else:  # a metric, a reward: no slope
        value = kl_estimate_fwd(*(x.detach() for x in flat), KINDS.index(kind), False)[0]
    if clamp is not None:
        value = value.clamp(-clamp, clamp)
    return value.view(logprobs.shape)
