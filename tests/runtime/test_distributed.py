"""Sums across ranks on two gloo processes: a sequence split over ranks gives the loss and gradients of one
rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import on_ranks

import fastalign as fa


def _worker(rank):
    group = dist.group.WORLD
    x, mask, cu = _data()
    # Rank 0 holds the first tokens of both sequences, rank 1 the rest of the first only (nothing of the
    # second).
    keep = [torch.tensor([0, 1, 6, 7, 8]), torch.tensor([2, 3, 4, 5])][rank]
    local_cu = torch.tensor([[0, 2, 5], [0, 4, 4]][rank], dtype=torch.int32)
    local = x[keep].clone().requires_grad_()
    sums = fa.sequence_sum(local, local_cu, mask=mask[keep], mean=True, group=group)
    loss = torch.nn.functional.softplus(-(sums[0] - sums[1]))
    loss.backward()
    return float(loss), local.grad, float(fa.global_denominator(mask[keep], group))


def _data():
    torch.manual_seed(0)
    return (
        torch.randn(9),
        torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool),
        torch.tensor([0, 6, 9], dtype=torch.int32),
    )


def test_sequence_parallel_sums():  # C2, C3
    results = on_ranks(2, _worker)
    x, mask, cu = _data()
    x.requires_grad_()
    sums = fa.sequence_sum(x, cu, mask=mask, mean=True)
    loss = torch.nn.functional.softplus(-(sums[0] - sums[1]))
    loss.backward()
    for rank, keep in enumerate(([0, 1, 6, 7, 8], [2, 3, 4, 5])):
        value, grad, count = results[rank]
        assert abs(value - float(loss)) < 1e-6 and count == float(mask.sum())
        torch.testing.assert_close(grad, x.grad[keep])
