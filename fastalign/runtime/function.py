"""`Function`: what every autograd function of the package has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fastalign.runtime import backends


class Function(torch.autograd.Function):
    """A function with first derivatives only, whose backward runs on the backend of its forward and returns
    the gradients of the first inputs, those that can have one; the others' None is added here.

    A backward that is asked for a graph of itself (create_graph=True, as in hessian, hvp and gradient
    penalties) raises: its kernels have none, and the second-order term would be missing without a word.
    `names`: the public functions that it serves, for that message.

    Autograd may run backward on a thread of its own, where `use_backend` of the forward's thread is not seen;
    forward leaves it in ctx."""

    names = ""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        cls.forward = staticmethod(_recording(cls.forward))
        cls.backward = staticmethod(_first_order(cls.backward, cls.names))


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken, which tensors do not show in requires_grad. A
    `Function` refuses them."""
    return not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0


def _recording(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recorded(ctx: Any, *args: Any) -> Any:
        if not torch.compiler.is_compiling():  # the compiler's graph holds ops, which choose where they run
            ctx.forced = backends.forced()
        return forward(ctx, *args)

    return recorded


def _first_order(first_gradients: Callable[..., Any], names: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        found = first_gradients(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        return found + (None,) * (len(ctx.needs_input_grad) - len(found))

    @functools.wraps(first_gradients)
    def first_order(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        if torch.is_grad_enabled():  # in backward: exactly under create_graph=True
            raise RuntimeError(
                f"{names} can be differentiated once: create_graph=True (hessian, hvp, a gradient penalty) "
                "asks for a graph of the gradient, "
                "which the kernels do not have. For second derivatives write the loss in plain PyTorch"
            )
        # A forward that was compiled has left nothing: its graph chose when it was made.
        here = backends.forced()
        forced = getattr(ctx, "forced", here)
        if forced == here:
            return backward(ctx, *grads)
        with backends.on_backend(forced):
            return backward(ctx, *grads)

    return first_order
