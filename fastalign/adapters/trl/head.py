"""What takes the place of TRL's fused head, whose trainers call it by `ChunkedLogProbFunction.apply`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import _use_triton

import fastalign
from fastalign.runtime.checks import check_choice
from fastalign.runtime.function import Function

# TRL's name of an optional output -> ours.
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
_HALF = (torch.bfloat16, torch.float16)


class ChunkedLogProb:
    """`fastalign.linear_token_stats`, called as TRL calls its autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = tuple(OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """Statistics of softmax(z), z = cap(logit_scale * (hidden weight^T + bias)) / temperature.

        Args:
            hidden: [N, H]; weight: [V, H]; bias: [V]; targets: [N].
            chunk_size: without effect: the tiles are ours.
            outputs: of OUTPUTS; "log_probs" is always there.

        Returns:
            (log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1): [N] fp32, is_top1 bool; None: not
            asked for. The first two are differentiable.
        """
        check_head("lm_head.weight", weight)
        for name in outputs:
            check_choice("outputs", name, ("log_probs", *OUTPUTS))
        wanted = [name for name in OUTPUTS if name in outputs]
        autocast = multiplied_as(hidden, weight)
        late = (
            "entropy" in wanted
            and _is_frozen(weight, bias)
            and hidden.requires_grad
            and torch.is_grad_enabled()
        )

        def statistics(
            names: Sequence[str], differentiable: Sequence[str] | None, *head: Any
        ) -> list[Tensor]:
            hidden, weight, bias = head
            with autocast():
                stats = fastalign.linear_token_stats(
                    hidden, weight, targets, bias=bias, outputs=names, differentiable=differentiable,
                    temperature=temperature, softcap=final_logit_softcapping, logit_scale=logit_scale,
                )  # fmt: skip
            return [getattr(stats, name).float() for name in names]

        names = ("logprob", *(OUTPUTS[name] for name in wanted))
        rows = functools.partial(statistics, names, ("logprob",) if late else None)
        logprobs, *others = head_rows(rows, 2 if "entropy" in wanted else 1, hidden, weight, bias)
        found = dict(zip(wanted, others))
        if late:
            # Most trainers only log the entropy: with a frozen head that saves a third of the products.
            again = functools.partial(statistics, ("entropy",), None)
            (found["entropy"],) = ComputedAgain.apply(again, 1, (found["entropy"],), hidden, weight, bias)
        top = found.get("is_top1")
        return (
            logprobs,
            found.get("entropy"),
            found.get("log_sum_sq_probs"),
            found.get("mean_logits"),
            None if top is None else top == 1,
        )


def scores_labelled_rows(device: torch.device) -> bool:
    """Whether TRL's forward gives the head only the rows that have a label. It asks whether it has a kernel,
    for fear of a compiler that wants fixed shapes; on the CPU there is none."""
    return device.type == "cpu" or _use_triton(device)


def check_head(name: str, weight: Tensor) -> None:
    """Refuse numbers that are not the head's own: TRL would multiply the codes of a quantised one."""
    if weight.dtype not in (torch.float32, torch.float64, *_HALF):
        raise TypeError(
            f"{name} is {weight.dtype}, of a quantised head; legal: float32, bfloat16, float16, float64. "
            "Leave lm_head out of the quantisation"
        )


def multiplied_as(hidden: Tensor, weight: Tensor) -> Callable[[], Any]:
    """The context in which hidden and weight are multiplied in TRL's type, autocast's or that of hidden, now
    or in backward."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype in _HALF and weight.dtype != hidden.dtype:
        dtype = hidden.dtype
    else:
        return contextlib.nullcontext
    return lambda: torch.autocast(device, dtype=dtype)


Rows = Callable[[Tensor, Tensor, "Tensor | None"], "Sequence[Tensor]"]


def _is_frozen(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether neither gets a gradient, in a head that stays where it is, outside a compiler."""
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    return not learns and not _is_gathered(weight) and not torch.compiler.is_compiling()


def _is_gathered(weight: Tensor) -> bool:
    """Whether ZeRO-3 takes it away between forward and backward."""
    return hasattr(weight, "ds_status")


def head_rows(
    rows: Rows, differentiable: int, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Sequence[Tensor]:
    """rows(hidden, weight, bias), also where ZeRO-3 takes the weight away between forward and backward.
    differentiable: how many of the results are, the first ones."""
    if not _is_gathered(weight):
        return rows(hidden, weight, bias)
    with torch.no_grad():
        values = rows(hidden, weight, bias)
    return ComputedAgain.apply(rows, differentiable, values, hidden, weight, bias)


class ComputedAgain(Function):
    """values = rows(hidden, weight, bias), without their graph. In backward the rows are computed again, with
    it, from a head that is gathered once more, as TRL's own function does."""

    names = "TRL's fused head, patched,"

    @staticmethod
    def forward(ctx, rows, differentiable, values, hidden, weight, bias):
        ctx.rows = rows
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*values[differentiable:])
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads):
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        with maybe_gather_lm_head_ctx(*saved[1:]), torch.enable_grad():
            given = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(saved, needs)]
            results, upstream = zip(*((y, g) for y, g in zip(ctx.rows(*given), grads) if g is not None))
            leaves = [x for x, need in zip(given, needs) if need]
            found = iter(torch.autograd.grad(results, leaves, upstream))
        return (None, None, None, *(next(found) if need else None for need in needs))
