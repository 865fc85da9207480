"""Per-token estimates of a KL from log-probs of sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.kl_estimate.op import KINDS, KlEstimateFunction, KlEstimateFwd, kl_estimate_fwd
from fastalign.runtime.checks import (
    check_choice,
    check_floating,
    check_number,
    check_same_device,
    check_shape,
)
from fastalign.runtime.function import forward_mode


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3", *, clamp: float | None = None
) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, with d = logprobs - ref_logprobs.

    k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d (never negative), abs = |d|  (Schulman, "Approximating KL divergence", 2020).
    d/d logprobs: 1, d, 1 - e^-d, sign(d). Near d = 0, k3 uses its series. Below d = -20 its value stays that of d = -20, and so does the slope
    (it does not become 0: the token is still pulled back). Equal infinities count as d = 0. NaN stays NaN; where the upstream gradient is 0, so is
    the gradient, whatever the inputs hold.

    Args:
        logprobs, ref_logprobs: same shape and device, floating. kind: k1, k2, k3 or abs.
        clamp: > 0; the estimate is clamped to [-clamp, clamp], without gradient where it is, as verl and
            OpenRLHF do with 10. None: as it is. k3 grows as e^-d, so that a loss made of it should be
            bounded: one token at d = -20 has a slope of -4.9e8 (`policy_loss` does that with kl_clamp).

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
        value = kl_estimate_fwd(KlEstimateFwd(*(x.detach() for x in flat), KINDS.index(kind), False))[0]
    if clamp is not None:
        value = value.clamp(-clamp, clamp)
    return value.view(logprobs.shape)
