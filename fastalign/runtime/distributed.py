"""Reductions across ranks that losses need before their nonlinearity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.runtime.function import Function


class _SumOverGroup(Function):
    names = "a sum over a process group"

    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        # Every rank computes the same loss from the same total; summing the ranks' equal gradients would
        # count it world_size times.
        return grad, None


def sum_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `x` over the ranks of `group`, the same on every rank; the gradient is passed on locally (see
    `sequence_sum`)."""
    return _SumOverGroup.apply(x, group)


def global_denominator(mask: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Number of True entries of `mask` over all ranks of `group` (None: this rank alone), a 0-dim fp32
    tensor: a loss's `num_items`."""
    count = mask.sum(dtype=torch.float32)
    if group is not None:
        dist.all_reduce(count, group=group)
    return count


def moments_over_group(
    count: Tensor, mean: Tensor, m2: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, sum of (x - mean)^2) of the values of all ranks of `group`, 0-dim fp64, the same bits on
    every rank."""
    own = torch.stack([x.double() for x in (count, mean, m2)])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return merged_moments(*torch.stack(parts).unbind(1))


def merged_moments(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, m2) of all values, from those of their parts, one entry each (Chan, Golub, LeVeque 1979): mean = sum n_i mean_i / sum n_i,
    m2 = sum m2_i + n_i (mean_i - mean)^2."""
    total = counts.sum()
    mean = (counts * means).sum() / total.clamp(min=1.0)
    return total, mean, (m2s + counts * (means - mean) ** 2).sum()
