"""The form in which every loss reports its metrics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Metric(NamedTuple):
    """A mean as its (sum, count), both 0-dim tensors on the loss's device: add them over micro-batches and ranks, divide at the end."""

    sum: Tensor
    count: Tensor

    def __float__(self) -> float:
        count = float(self.count)
        return float(self.sum) / count if count else float("nan")
