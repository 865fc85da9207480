"""Reductions across ranks that losses need before their nonlinearity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # Every rank computes the same loss from the same total; summing the ranks' equal gradients would count it world_size times.
        return grad, None


def sum_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `x` over the ranks of `group`, the same on every rank; the gradient is passed on locally (see `sequence_sum`)."""
    return _SumOverGroup.apply(x, group)


def global_denominator(mask: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Number of True entries of `mask` over all ranks of `group` (None: this rank alone), a 0-dim fp32 tensor: a loss's `num_items`."""
    count = mask.sum(dtype=torch.float32)
    if group is not None:
        dist.all_reduce(count, group=group)
    return count
