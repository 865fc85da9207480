"""How backward passes use what forward passes leave behind."""

from __future__ import annotations

import torch
from torch import Tensor


def times_slope(grad: Tensor, slope: Tensor) -> Tensor:
    """grad * slope, broadcast. A slope of exactly 0 (a masked token, a clipped one, a dropped pair) passes
    nothing on, not even an infinite or NaN gradient. The twin of `times_slope` in csrc/math/scalar.h."""
    return torch.where(slope == 0, torch.zeros_like(slope), grad * slope)
