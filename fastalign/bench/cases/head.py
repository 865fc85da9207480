"""The fused head: log-probs from hidden states and the head's weight. What it costs at least are its products
alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign.bench import eager
from fastalign.bench.cases.case import Case, Contestant, no_grad
from fastalign.bench.shapes import Head

SAMPLED = 16  # rows, and tokens of the vocabulary, whose results are compared with fp64

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, labels) -> [rows]


def logprobs(shape: Head, device: torch.device, cache_bytes: int) -> Case:
    hidden, weight, labels = _inputs(shape, device)
    sampled = _sampled(shape.rows, device)
    truth, baseline = (
        eager.linear_log_softmax_gather(hidden[sampled].to(t), weight.to(t), labels[sampled])
        for t in _types()
    )
    out = torch.empty(shape.rows, shape.vocab, dtype=hidden.dtype, device=device)
    contestants = [
        Contestant("fastalign", no_grad(fastalign.linear_token_logprobs), "ours"),
        Contestant("fastalign batch_invariant", no_grad(_invariant), "eager"),
        Contestant("linear, log_softmax, gather", no_grad(eager.linear_log_softmax_gather), "eager"),
        _products(lambda h, w, y: torch.mm(h, w.t(), out=out), 1),
    ]
    scale = torch.full_like(truth, _logit_size(hidden, weight))
    traffic = out.numel() * out.element_size()
    return Case(
        "linear_token_logprobs",
        shape,
        [(hidden, weight, labels)],
        traffic,
        contestants,
        truth,
        baseline,
        lambda x: x[sampled],
        scale,
    )


def backward(shape: Head, device: torch.device, cache_bytes: int) -> Case:
    """Gradients of hidden and weight."""
    hidden, weight, labels = _inputs(shape, device)
    return _backward(
        shape, hidden.requires_grad_(), weight.requires_grad_(), labels, "linear_token_logprobs_backward"
    )


def frozen(shape: Head, device: torch.device, cache_bytes: int) -> Case:
    """The gradient of hidden alone, as in LoRA."""
    hidden, weight, labels = _inputs(shape, device)
    return _backward(shape, hidden.requires_grad_(), weight, labels, "linear_token_logprobs_frozen")


def differentiated(function: LogProbs) -> Callable[..., list[Tensor]]:
    """Forward and backward with an upstream gradient per token."""

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> list[Tensor]:
        value = function(hidden, weight, labels)
        wanted = [x for x in (hidden, weight) if x.requires_grad]
        return list(torch.autograd.grad(value, wanted, upstream.to(value.dtype)))

    return run


def _backward(shape: Head, hidden: Tensor, weight: Tensor, labels: Tensor, op: str) -> Case:
    device = hidden.device
    upstream = torch.linspace(-1.0, 1.0, shape.rows, device=device)
    rows, tokens = _sampled(shape.rows, device), _sampled(shape.vocab, device)
    both = weight.requires_grad
    grads = [
        _sampled_gradients(
            hidden.detach(), weight.detach(), labels, upstream, rows, tokens if both else None, t
        )
        for t in _types()
    ]
    logits = torch.empty(shape.rows, shape.vocab, dtype=hidden.dtype, device=device)
    out = [torch.empty_like(x) for x in (hidden.detach(), weight.detach())]

    def products(h: Tensor, w: Tensor, *rest: Any) -> Tensor:
        h, w = h.detach(), w.detach()
        torch.mm(h, w.t(), out=logits)
        torch.mm(logits, w, out=out[0])
        return torch.mm(logits.t(), h, out=out[1]) if both else out[0]

    contestants = [
        Contestant("fastalign", differentiated(fastalign.linear_token_logprobs), "ours"),
        Contestant("fastalign recomputing", differentiated(_small(shape)), "eager"),
        Contestant("linear, log_softmax, gather", differentiated(eager.linear_log_softmax_gather), "eager"),
        _products(products, 3 if both else 2),
    ]

    def sample(found: list[Tensor]) -> Tensor:
        parts = [found[0][rows].flatten()]
        return torch.cat([*parts, found[1][tokens].flatten()] if both else parts)

    traffic = 3 * shape.rows * shape.vocab * hidden.dtype.itemsize
    scale = torch.full_like(
        grads[0], _logit_size(hidden.detach(), weight.detach())
    )  # rounding of logits shows in every slope
    return Case(
        op,
        shape,
        [(hidden, weight, labels, upstream)],
        traffic,
        contestants,
        *grads,
        sample=sample,
        scale=scale,
        of_peer=differentiated,
    )


def _invariant(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastalign.linear_token_logprobs(hidden, weight, labels, batch_invariant=True)


def _small(shape: Head) -> LogProbs:
    """With a workspace for a quarter of the logits: what a call does whose logits do not fit."""
    size = shape.rows * shape.vocab
    return lambda h, w, y: fastalign.linear_token_logprobs(h, w, y, workspace_bytes=size)


def _products(run: Callable[..., Tensor], count: int) -> Contestant:
    return Contestant(f"{count} product{'s' * (count > 1)} and nothing else", run, "floor")


def _inputs(shape: Head, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation 2."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    hidden = torch.empty(shape.rows, shape.hidden, dtype=dtype, device=device).normal_(
        std=1.0, generator=generator
    )
    weight = torch.empty(shape.vocab, shape.hidden, dtype=dtype, device=device).normal_(
        std=2.0 * shape.hidden**-0.5, generator=generator
    )
    return hidden, weight, torch.randint(shape.vocab, (shape.rows,), device=device, generator=generator)


def _sampled(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(SAMPLED, count), device=device).long()


def _types() -> tuple[torch.dtype, torch.dtype]:
    return torch.float64, torch.float32


def _logit_size(hidden: Tensor, weight: Tensor) -> float:
    """The sum of the magnitudes whose rounding shows in a logit: sqrt(H) terms of the operands' size."""
    return float(hidden.abs().max()) * float(weight.abs().max()) * hidden.shape[1] ** 0.5


def _sampled_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor,
    rows: Tensor,
    tokens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """By the formula, some rows of the gradient of hidden and some of that of weight: d = upstream (1[label]
    - softmax)."""
    weight, parts, of_tokens = weight.to(dtype), [], 0.0
    for first in range(0, len(labels), 512):
        part = slice(first, first + 512)
        h, g = hidden[part].to(dtype), upstream[part].to(dtype).unsqueeze(-1)
        probabilities = torch.softmax(h @ weight.t(), -1)
        slopes = (
            torch.zeros_like(probabilities)
            .scatter_(-1, labels[part].unsqueeze(-1), 1.0)
            .sub_(probabilities)
            .mul_(g)
        )
        own = rows[(rows >= first) & (rows < first + len(h))] - first
        parts.append((slopes[own] @ weight).flatten())
        if tokens is not None:
            of_tokens = of_tokens + slopes[:, tokens].t() @ h
    return torch.cat(parts if tokens is None else [*parts, of_tokens.flatten()])
