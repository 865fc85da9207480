"""The ops over vocabulary rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastalign
from fastalign import testing
from fastalign.bench import eager, floors, measure
from fastalign.bench.cases.case import (
    Case,
    Contestant,
    backward_of,
    eager_and_compiled,
    floor_line,
    input_sets,
    no_grad,
)
from fastalign.bench.shapes import Rows

SAMPLED_ROWS = 16  # rows whose results are compared with fp64


def _row_inputs(
    shape: Rows, device: torch.device, cache_bytes: int
) -> tuple[list[tuple[Tensor, Tensor]], int, Tensor]:
    """([(logits, labels)], bytes of the logits, sampled rows)"""
    dtype = getattr(torch, shape.dtype)
    size = shape.rows * shape.vocab * dtype.itemsize
    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for _ in range(input_sets(size, cache_bytes)):
        logits = torch.empty(shape.rows, shape.vocab, dtype=dtype, device=device).normal_(
            std=2.0, generator=generator
        )
        inputs.append((logits, torch.randint(shape.vocab, (shape.rows,), device=device, generator=generator)))
    sampled = torch.linspace(0, shape.rows - 1, min(SAMPLED_ROWS, shape.rows), device=device).long()
    return inputs, size, sampled


def _read_only() -> Contestant:
    """Read the logits and nothing else, by the fastest reduction that this machine has for raw bytes."""
    return Contestant("read only", lambda logits, *rest: measure.read(logits.detach()), "read")


def logprobs(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    inputs, size, sampled = _row_inputs(shape, device, cache_bytes)
    truth, baseline = (testing.token_stats_truth(inputs[0][0][sampled], inputs[0][1][sampled], dtype=t)["logprob"]
                       for t in (torch.float64, torch.float32))  # fmt: skip
    contestants = [
        Contestant("fastalign", no_grad(fastalign.token_logprobs), "ours"),
        *eager_and_compiled("log_softmax.gather", no_grad, eager.log_softmax_gather),
        *eager_and_compiled("gather - logsumexp", no_grad, eager.gather_minus_logsumexp, compiled=False),
        *eager_and_compiled("F.cross_entropy", no_grad, eager.cross_entropy),
        _read_only(),
    ]
    return Case(
        "token_logprobs", shape, inputs, size, contestants, truth, baseline, sample=lambda x: x[sampled]
    )


def logprobs_entropy(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    inputs, size, sampled = _row_inputs(shape, device, cache_bytes)

    def both(logits: Tensor, labels: Tensor) -> Tensor:
        stats = fastalign.token_stats(logits, labels, outputs=("logprob", "entropy"))
        return torch.stack([stats.logprob, stats.entropy])

    stats = [
        testing.token_stats_truth(inputs[0][0][sampled], inputs[0][1][sampled], dtype=t)
        for t in (torch.float64, torch.float32)
    ]
    truth, baseline = (torch.stack([s["logprob"], s["entropy"]]) for s in stats)
    contestants = [
        Contestant("fastalign", no_grad(both), "ours"),
        *eager_and_compiled("log_softmax, gather and -(p log p).sum", no_grad, eager.logprob_and_entropy),
        _read_only(),
    ]
    return Case(
        "token_logprobs_entropy",
        shape,
        inputs,
        size,
        contestants,
        truth,
        baseline,
        sample=lambda x: x[:, sampled],
    )


def logprobs_backward(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    inputs, size, sampled = _row_inputs(shape, device, cache_bytes)
    upstream = torch.linspace(-1.0, 1.0, shape.rows, device=device)
    inputs = [(logits.requires_grad_(), labels, upstream) for logits, labels in inputs]
    logits, labels = inputs[0][0].detach()[sampled], inputs[0][1][sampled]
    grads = []
    for dtype in (torch.float64, torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        value = testing.token_stats_truth(leaf, labels, dtype=dtype)["logprob"]
        grads.append(torch.autograd.grad(value, leaf, upstream[sampled].to(dtype))[0])
    contestants = [
        Contestant(
            "fastalign",
            backward_of(lambda x, y: fastalign.token_logprobs(x, y, inplace_backward=True)),
            "ours",
            overwrites=True,
        ),
        *eager_and_compiled("log_softmax.gather", backward_of, eager.log_softmax_gather, compiled=False),
        *eager_and_compiled("F.cross_entropy", backward_of, eager.cross_entropy),
        _read_only(),
        floor_line(floors.read_and_rewrite, overwrites=True),
    ]
    scale = testing.gradient_scale(logits, labels) * upstream[sampled].abs().double().unsqueeze(-1)
    # Read forward, read and write backward.
    return Case(
        "token_logprobs_backward",
        shape,
        inputs,
        3 * size,
        contestants,
        *grads,
        sample=lambda x: x[sampled],
        scale=scale,
        of_peer=backward_of,
    )


def _kl_inputs(
    shape: Rows, device: torch.device, cache_bytes: int
) -> tuple[list[tuple[Tensor, Tensor]], int, Tensor]:
    """([(logits, reference logits)], bytes of both, sampled rows). The reference is near the policy, as in
    training."""
    rows, size, sampled = _row_inputs(shape, device, cache_bytes // 2)
    generator = torch.Generator(device).manual_seed(1)
    inputs = [(x, torch.empty_like(x).normal_(std=0.3, generator=generator).add_(x)) for x, _ in rows]
    return inputs, 2 * size, sampled


def _read_both() -> Contestant:
    return Contestant(
        "read only", lambda logits, ref, *rest: (measure.read(logits.detach()), measure.read(ref))[0], "read"
    )


def token_kl(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    inputs, size, sampled = _kl_inputs(shape, device, cache_bytes)
    truth, baseline = (
        eager.exact_kl(*(x[sampled].to(t) for x in inputs[0])) for t in (torch.float64, torch.float32)
    )
    contestants = [
        Contestant("fastalign", no_grad(fastalign.token_kl), "ours"),
        *eager_and_compiled("log_softmax in fp32, exp, difference, sum", no_grad, eager.exact_kl),
        *eager_and_compiled(
            "log_softmax, exp, difference, sum", no_grad, eager.exact_kl_rounded, compiled=False
        ),
        _read_both(),
    ]
    return Case(
        "token_kl", shape, inputs, size, contestants, truth, baseline, sample=lambda x: x[sampled], read=2
    )


def token_kl_loss(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    """Value and gradient of sum(coef * KL), the coefficients known beforehand."""
    inputs, size, sampled = _kl_inputs(shape, device, cache_bytes)
    coef = torch.linspace(0.5, 1.5, shape.rows, device=device)
    inputs = [(logits.requires_grad_(), ref) for logits, ref in inputs]

    def fused(logits: Tensor, ref: Tensor) -> Tensor:
        return torch.autograd.grad(fastalign.token_kl_loss(logits, ref, coef, inplace=True).loss, logits)[0]

    def wrap(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logits, ref: torch.autograd.grad((kl(logits, ref) * coef).sum(), logits)[0]

    grads = []
    for dtype in (torch.float64, torch.float32):
        leaf = inputs[0][0].detach()[sampled].to(dtype).requires_grad_()
        grads.append(
            torch.autograd.grad(
                (eager.exact_kl(leaf, inputs[0][1][sampled].to(dtype)) * coef[sampled]).sum(), leaf
            )[0]
        )
    contestants = [
        Contestant("fastalign", fused, "ours", overwrites=True),
        *eager_and_compiled("log_softmax in fp32, exp, difference, sum", wrap, eager.exact_kl),
        _read_both(),
        floor_line(floors.read_both_and_rewrite, overwrites=True),
    ]
    # Read both, write one gradient.
    scale = torch.full_like(grads[0], float(grads[0].abs().max()))
    return Case(
        "token_kl_loss",
        shape,
        inputs,
        size // 2 * 3,
        contestants,
        *grads,
        sample=lambda x: x[sampled],
        scale=scale,
        read=2,
    )
