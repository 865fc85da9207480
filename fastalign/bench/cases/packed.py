"""The ops over packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign.bench import eager, floors
from fastalign.bench.cases.case import Case, Contestant, eager_and_compiled, floor_line, input_sets, no_grad
from fastalign.bench.shapes import Pairs, Sequences

MOST_STEPS = 8192  # time steps that a loop in Python is run over


def _packed_inputs(
    shape: Pairs, device: torch.device, cache_bytes: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """([(logprobs, ref_logprobs)], cu_seqlens, the sequence of every token)"""
    tokens = 2 * shape.pairs * shape.length
    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for _ in range(input_sets(8 * tokens, cache_bytes)):
        logprobs = -4.0 * torch.rand(tokens, device=device, generator=generator)
        inputs.append((logprobs, logprobs + 0.1 * torch.randn(tokens, device=device, generator=generator)))
    sequence = torch.arange(2 * shape.pairs, device=device).repeat_interleave(shape.length)
    return inputs, torch.arange(0, tokens + 1, shape.length, dtype=torch.int32, device=device), sequence


def sequence_sum(shape: Pairs, device: torch.device, cache_bytes: int) -> Case:
    inputs, cu_seqlens, sequence = _packed_inputs(shape, device, cache_bytes)
    inputs = [(x,) for pair in inputs for x in pair]
    sequences = 2 * shape.pairs
    truth, baseline = (
        eager.segment_sum(inputs[0][0].to(t), sequence, sequences) for t in (torch.float64, torch.float32)
    )
    lengths = cu_seqlens.diff().long()
    contestants = [
        Contestant("fastalign", no_grad(lambda x: fastalign.sequence_sum(x, cu_seqlens)), "ours"),
        *eager_and_compiled("index_add", no_grad, lambda x: eager.segment_sum(x, sequence, sequences)),
        *eager_and_compiled(
            "torch.segment_reduce",
            no_grad,
            lambda x: torch.segment_reduce(x, "sum", lengths=lengths),
            compiled=False,
        ),
    ]
    return Case("sequence_sum", shape, inputs, 4 * inputs[0][0].numel(), contestants, truth, baseline)


def preference_loss(shape: Pairs, device: torch.device, cache_bytes: int) -> Case:
    def fused(logprobs: Tensor, ref: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fastalign.preference_loss(logprobs, ref, cu_seqlens, loss="dpo", beta=eager.BETA).loss

    return _loss_gradient(
        "preference_loss", shape, device, cache_bytes, fused, "index_add, logsigmoid", eager.dpo_loss
    )


def listwise_loss(shape: Pairs, device: torch.device, cache_bytes: int) -> Case:
    """The sequences of the pairs as lists of four."""
    scores = torch.rand(2 * shape.pairs, generator=torch.Generator().manual_seed(1)).to(device)
    offsets = torch.arange(0, 2 * shape.pairs + 1, 4, dtype=torch.int32, device=device)

    def fused(logprobs: Tensor, ref: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fastalign.listwise_loss(
            logprobs, ref, cu_seqlens, offsets, scores, loss="plackett_luce", beta=eager.BETA
        ).loss

    def plain(logprobs: Tensor, ref: Tensor, sequence: Tensor, sequences: int) -> Tensor:
        return eager.plackett_luce_loss(logprobs, ref, sequence, scores.view(-1, 4))

    return _loss_gradient(
        "listwise_loss", shape, device, cache_bytes, fused, "index_add, logcumsumexp", plain
    )


def _loss_gradient(op: str, shape: Pairs, device: torch.device, cache_bytes: int, fused: Callable[..., Tensor], name: str,
                   plain: Callable[..., Tensor]) -> Case:  # fmt: skip
    """A loss on packed log-probs, forward and backward. fused(logprobs, ref, cu_seqlens), plain(logprobs,
    ref, sequence, sequences)."""
    inputs, cu_seqlens, sequence = _packed_inputs(shape, device, cache_bytes)
    inputs = [(logprobs.requires_grad_(), ref) for logprobs, ref in inputs]

    def gradient_of(loss: Callable[..., Tensor], *rest: Any) -> Callable[..., Tensor]:
        return lambda logprobs, ref: torch.autograd.grad(loss(logprobs, ref, *rest), logprobs)[0]

    def eagerly(logprobs: Tensor, ref: Tensor) -> Tensor:
        return plain(logprobs, ref, sequence, 2 * shape.pairs)

    truth, baseline = (
        gradient_of(eagerly)(*(x.detach().to(t).requires_grad_() for x in inputs[0]))
        for t in (torch.float64, torch.float32)
    )
    contestants = [
        Contestant("fastalign", gradient_of(fused, cu_seqlens), "ours"),
        *eager_and_compiled(name, gradient_of, eagerly),
        floor_line(floors.loss_and_gradient),
    ]
    # Read both log-probs, write one gradient.
    traffic, scale = 12 * inputs[0][0].numel(), torch.full_like(truth, float(truth.abs().max()))
    return Case(op, shape, inputs, traffic, contestants, truth, baseline, scale=scale)


def kl_estimate(shape: Pairs, device: torch.device, cache_bytes: int) -> Case:
    inputs, _, _ = _packed_inputs(shape, device, cache_bytes)
    truth, baseline = (eager.k3(*(x.to(t) for x in inputs[0])) for t in (torch.float64, torch.float32))
    contestants = [
        Contestant("fastalign", no_grad(lambda x, ref: fastalign.kl_estimate(x, ref, "k3")), "ours"),
        *eager_and_compiled("expm1(-d) + d", no_grad, eager.k3),
    ]
    return Case("kl_estimate", shape, inputs, 12 * inputs[0][0].numel(), contestants, truth, baseline)


def gae(shape: Sequences, device: torch.device, cache_bytes: int) -> Case:
    tokens, gamma, lam = shape.sequences * shape.length, 1.0, 0.95
    generator = torch.Generator(device).manual_seed(0)
    copies = input_sets(8 * tokens, cache_bytes)
    inputs = [
        tuple(torch.randn(tokens, device=device, generator=generator) for _ in range(2))
        for _ in range(copies)
    ]
    cu_seqlens = torch.arange(0, tokens + 1, shape.length, dtype=torch.int32, device=device)

    def fused(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return fastalign.gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam)[:2]

    def padded(
        function: Callable[..., tuple[Tensor, Tensor]], *between: Tensor
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            rows = (x.view(shape.sequences, shape.length) for x in (rewards, values))
            return tuple(x.flatten() for x in function(*rows, *between, gamma, lam))

        return run

    def of_peer(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        if shape.length > MOST_STEPS:
            raise RuntimeError(f"not run beyond {MOST_STEPS} steps")
        return no_grad(padded(function, torch.ones(shape.sequences, shape.length, device=device)))

    looped, masked = "loop over time steps", "loop over time steps, masked"
    if shape.length <= MOST_STEPS:
        plain, missing = padded(eager.gae_loop), {}
        mask = torch.ones(shape.sequences, shape.length, device=device)
        rivals = [*eager_and_compiled(looped, no_grad, plain, compiled=False),
                  *eager_and_compiled(masked, no_grad, padded(eager.gae_masked_loop, mask), compiled=False)]  # fmt: skip
    else:
        plain, missing = (
            padded(eager.gae_doubling),
            dict.fromkeys((looped, masked), f"not run beyond {MOST_STEPS} steps"),
        )
        rivals = eager_and_compiled("scan by doubling", no_grad, plain, compiled=False)
    truth, baseline = (
        torch.stack(plain(*(x.to(t) for x in inputs[0]))) for t in (torch.float64, torch.float32)
    )
    contestants = [Contestant("fastalign", no_grad(fused), "ours"), *rivals, floor_line(floors.copy_each)]
    # Read rewards and values, write advantages and returns. What rounds is of the size of the largest sums.
    scale = torch.full_like(truth, float(truth.abs().max()))
    return Case(
        "gae",
        shape,
        inputs,
        16 * tokens,
        contestants,
        truth,
        baseline,
        sample=torch.stack,
        scale=scale,
        missing=missing,
        of_peer=of_peer,
    )


def policy_loss(shape: Sequences, device: torch.device, cache_bytes: int) -> Case:
    """PPO's clipped loss and its gradient in the log-probs."""
    tokens = shape.sequences * shape.length
    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for _ in range(input_sets(17 * tokens, cache_bytes)):
        noise = torch.randn(3, tokens, device=device, generator=generator)
        logprobs = -4.0 * torch.rand(tokens, device=device, generator=generator)
        mask = torch.rand(tokens, device=device, generator=generator) < 0.9
        inputs.append((logprobs.requires_grad_(), logprobs.detach() + 0.1 * noise[0], noise[1], mask))

    def gradient_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logprobs, *rest: torch.autograd.grad(loss(logprobs, *rest), logprobs)[0]

    def fused(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return fastalign.policy_loss(logprobs, old, advantages, mask=mask).loss

    logprobs, old, advantages, mask = inputs[0]
    truth, baseline = (
        gradient_of(eager.ppo_loss)(
            logprobs.detach().to(t).requires_grad_(), old.to(t), advantages.to(t), mask
        )
        for t in (torch.float64, torch.float32)
    )
    # Next to a bound the two precisions may disagree about whether it holds: such tokens say nothing.
    ratio = torch.exp((logprobs - old).detach().double())
    clear = ((ratio - 0.8).abs() > 1e-6) & ((ratio - 1.2).abs() > 1e-6)
    contestants = [
        Contestant("fastalign", gradient_of(fused), "ours"),
        *eager_and_compiled("exp, clamp, maximum", gradient_of, eager.ppo_loss),
        floor_line(floors.loss_and_gradient),
    ]
    # Read four tensors, write one gradient.
    scale = torch.full_like(truth[clear], float(truth.abs().max()))
    return Case(
        "policy_loss",
        shape,
        inputs,
        17 * tokens,
        contestants,
        truth[clear],
        baseline[clear],
        sample=lambda g: g[clear],
        scale=scale,
        of_peer=gradient_of,
    )
