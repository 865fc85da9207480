"""DPO's loss head as it is usually written in PyTorch, and the time of training steps with it and with fastalign's, side by side."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign
from fastalign.train.config import TrainConfig
from fastalign.train.data import pack_pairs
from fastalign.train.dpo import train_dpo
from fastalign.train.model import PackedCausalLM
from fastalign.train.tokenise import TokenPair


def plain_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """`fastalign.token_logprobs(logits [T, V], labels [T])` by log_softmax in fp32 and gather. Makes [T, V] temporaries."""
    logprobs = F.log_softmax(logits.float(), dim=-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, torch.zeros_like(logprobs), logprobs)


def plain_preference_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    loss: Any,
    mask: Tensor | None = None,
    num_items: int,
    num_sft_tokens: int = 0,
) -> SimpleNamespace:
    """`fastalign.preference_loss` for plain DPO, with autograd: .loss and .metrics() as the trainer uses them."""
    if loss.name != "dpo" or loss.labels != "hard":
        raise ValueError(f"the plain path knows the loss dpo only, not {loss.name!r}")
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=logprobs.device), lengths, output_size=logprobs.shape[0])
    policy, reference = (x.new_zeros(len(lengths)).index_add(0, sequence, x) for x in (logprobs, ref_logprobs))
    rewards = loss.beta * (policy - reference)
    chosen, rejected = rewards[0::2], rewards[1::2]
    value = -F.logsigmoid(chosen - rejected).sum() / num_items

    def metrics() -> dict[str, tuple[Tensor, Tensor]]:
        count = torch.full((), len(chosen), device=logprobs.device)
        means = {
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(), "logps/chosen": policy[0::2], "logps/rejected": policy[1::2],
        }  # fmt: skip
        return {name: (x.detach().sum(), count) for name, x in means.items()}

    return SimpleNamespace(loss=value, metrics=metrics)


def fused_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return fastalign.token_logprobs(logits, labels, inplace_backward=True)


PATHS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "fused": (fused_logprobs, fastalign.preference_loss),
    "plain": (plain_logprobs, plain_preference_loss),
}


def time_steps(
    model: torch.nn.Module, tokenizer: Any, pairs: Sequence[TokenPair], config: TrainConfig, *, rounds: int = 4, steps: int = 5
) -> dict[str, Any]:
    """Whole optimizer steps of the project's trainer on both paths: same start, data and settings, in turns.

    Each of the `rounds` trains a copy of the model for `steps` steps on either path; the first step of each is warm-up. Returns the median
    milliseconds per step of each path, the number of steps behind them, and the largest difference between the two paths' losses."""
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    losses: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name in list(PATHS)[:: 1 if turn % 2 == 0 else -1]:
            logprob_fn, loss_fn = PATHS[name]
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                # Token metrics are off on both sides: they are free in the fused pass and dear in the plain one.
                quick = dataclasses.replace(
                    config,
                    output=folder,
                    max_steps=steps,
                    eval_every=0,
                    token_metrics=False,
                    precompute_ref=False,
                    tensorboard=False,
                    progress=False,
                )
                result = train_dpo(
                    quick, model=copy.deepcopy(model), tokenizer=tokenizer, examples=pairs, logprob_fn=logprob_fn, loss_fn=loss_fn
                )
            times[name] += result.step_times[1:]
            losses[name] = [record["loss"] for record in result.history if "loss" in record]
    return {
        **{f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()},
        "timed_steps": len(times["fused"]),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["fused"], losses["plain"])),
    }


def time_head_of(model: torch.nn.Module, pairs: Sequence[TokenPair], config: TrainConfig, *, rounds: int = 15) -> dict[str, Any]:
    """The loss head alone on a batch of the run: log-probs of the model's own logits, preference loss, and back to d loss / d logits."""
    (batch, *_) = pack_pairs(pairs, range(config.batch_size), 1 << 30)
    lm = PackedCausalLM(model)
    try:
        with torch.no_grad():
            packed = lm.to_device(batch.packed)
            logits = lm.logits(packed)
    finally:
        lm.restore()
    return _time_head(logits, packed, rounds)


def time_head_large(vocab: int = 128_256, *, pairs: int = 8, length: int = 32, rounds: int = 7) -> dict[str, Any]:
    """The same with the vocabulary of a current model and random bf16 logits, where the head costs what it costs in practice."""
    generator = torch.Generator().manual_seed(0)
    packed = fastalign.pack(torch.randint(vocab, (2 * pairs, length), generator=generator).unbind(0))
    logits = torch.empty(2 * pairs * length, vocab, dtype=torch.bfloat16).normal_(std=2.0, generator=generator)
    return _time_head(logits, packed, rounds)


def _time_head(logits: Tensor, packed: Any, rounds: int) -> dict[str, Any]:
    preset = fastalign.losses.get("dpo")
    reference = plain_logprobs(logits, packed.labels) - 0.1
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    source, buffer = logits.detach().requires_grad_(), torch.empty_like(logits)
    for turn in range(rounds + 1):
        for name, (logprob_fn, loss_fn) in PATHS.items():
            rows = buffer.detach().copy_(source)  # fresh, and no leaf of the graph: the fused path writes the gradient over it
            seconds = -time.perf_counter()
            output = loss_fn(
                logprob_fn(rows, packed.labels),
                reference,
                packed.cu_seqlens,
                loss=preset,
                mask=packed.mask,
                num_items=(len(packed.cu_seqlens) - 1) // 2,
            )
            torch.autograd.grad(output.loss, rows)
            seconds += time.perf_counter()
            if turn:  # the first turn warms up
                times[name].append(seconds)
    medians = {f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    return medians | {"tokens": logits.shape[0], "vocabulary": logits.shape[1], "dtype": str(logits.dtype).removeprefix("torch.")}
