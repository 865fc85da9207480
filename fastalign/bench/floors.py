"""What an op costs at least: the memory that it must touch, touched by torch's own operations on whole
tensors, and nothing computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.bench import measure
from fastalign.bench.measure import raw


def read_and_rewrite(logits: Tensor, *rest: Any) -> Tensor:
    """A forward pass over the logits and a backward pass in place: read, then read and written."""
    measure.read(logits.detach())
    return raw(logits.detach()).neg_()


def read_both_and_rewrite(logits: Tensor, ref: Tensor, *rest: Any) -> Tensor:
    measure.read(ref)
    return raw(logits.detach()).neg_()


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, *rest: Tensor) -> Tensor:
        ctx.save_for_backward(first)
        for x in rest:
            raw(x).sum()
        return first.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (first,) = ctx.saved_tensors
        return torch.ones_like(first), *(None,) * (len(ctx.needs_input_grad) - 1)


def loss_and_gradient(first: Tensor, *rest: Tensor) -> Tensor:
    """A loss that reads its inputs and a gradient that is written, through an autograd function like any
    other."""
    return torch.autograd.grad(_Touch.apply(first, *rest), first)[0]


def copy_each(*inputs: Tensor) -> list[Tensor]:
    """As many results as inputs, of the same size."""
    return [x.clone() for x in inputs]
