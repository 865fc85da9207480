"""DPO's loss head as it is usually written in PyTorch, and the time of training steps with it and with
fastalign's, side by side."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign
from fastalign.train.config import TrainConfig
from fastalign.train.data.examples import Schedule, pack_examples
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.methods.base import Split
from fastalign.train.methods.dpo import PreferenceMethod
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.models.reference import LiveReference
from fastalign.train.offline import accumulate
from fastalign.train.optimise import clip_gradients


def plain_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """`fastalign.token_logprobs(logits [T, V], labels [T])` by log_softmax in fp32 and gather. Makes [T, V]
    temporaries."""
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
    """`fastalign.preference_loss` for plain DPO, with autograd: .loss and .metrics() as the trainer uses
    them."""
    if loss.name != "dpo" or loss.labels != "hard":
        raise ValueError(f"the plain path knows the loss dpo only, not {loss.name!r}")
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=logprobs.device), lengths, output_size=logprobs.shape[0]
    )
    policy, reference = (
        x.new_zeros(len(lengths)).index_add(0, sequence, x) for x in (logprobs, ref_logprobs)
    )
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
    model: torch.nn.Module, pairs: Sequence[TokenExample], config: TrainConfig, *, steps: int = 16
) -> dict[str, Any]:
    """Whole optimizer steps (policy and live reference forward, backward, clipping, AdamW) by the parts that
    the trainer is made of, on both paths: same start, data and settings, step by step in turns.

    `model` is copied. The first two steps warm up. Returns the median milliseconds per step of each path, the
    median of the ratios of neighbouring steps, the number of timed steps, and the largest difference between
    the two paths' losses."""
    schedule = Schedule(len(pairs), dataclasses.replace(config, max_steps=steps))
    runs = {name: _Run(model, pairs, config, *functions) for name, functions in PATHS.items()}
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    losses: dict[str, list[float]] = {name: [] for name in PATHS}
    for step in range(steps):
        for name in list(PATHS)[:: 1 if step % 2 == 0 else -1]:
            seconds = -time.perf_counter()
            losses[name].append(runs[name].step(schedule.indices(step)))
            times[name].append(seconds + time.perf_counter())
    timed = {name: seconds[2:] for name, seconds in times.items()}
    difference = max(abs(a - b) for a, b in zip(losses["fused"], losses["plain"]))
    return _medians(timed) | {"timed_steps": steps - 2, "largest_loss_difference": difference}


class _Run:
    """A copy of the model being trained on one of the paths."""

    def __init__(
        self,
        model: torch.nn.Module,
        pairs: Sequence[TokenExample],
        config: TrainConfig,
        logprob_fn: Any,
        loss_fn: Any,
    ):
        self.lm = PackedCausalLM(copy.deepcopy(model).requires_grad_(True))
        # No token metrics on either side: they are free in the fused pass and dear in the plain one.
        self.method = PreferenceMethod(
            dataclasses.replace(config, token_metrics=False), logprob_fn=logprob_fn, loss_fn=loss_fn
        )
        self.split = Split(pairs, LiveReference(self.lm.frozen_copy(), self.method.token_stats))
        self.optimizer = torch.optim.AdamW(self.lm.model.parameters(), lr=config.learning_rate)
        self.max_grad_norm = config.max_grad_norm

    def step(self, indices: Sequence[int]) -> float:
        sums, _ = accumulate(self.lm, self.method, self.split, indices, backward=True)
        clip_gradients(list(self.lm.model.parameters()), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums.means()["loss"]


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds of each path, and plain / fused from calls that followed each other: load that comes and
    goes meets both."""
    ratios = [plain / fused for fused, plain in zip(times["fused"], times["plain"])]
    return {f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()} | {
        "ratio": statistics.median(ratios)
    }


def time_head_of(
    model: torch.nn.Module, pairs: Sequence[TokenExample], config: TrainConfig, *, rounds: int = 15
) -> dict[str, Any]:
    """The loss head alone on a batch of the run: log-probs of the model's own logits, preference loss, and
    back to d loss / d logits."""
    (batch, *_) = pack_examples(pairs, range(config.batch_size), 1 << 30)
    lm = PackedCausalLM(model)
    try:
        with torch.no_grad():
            packed = lm.to_device(batch.packed)
            logits = lm.logits(packed)
    finally:
        lm.restore()
    return _time_head(logits, packed, rounds)


def time_head_large(
    vocab: int = 128_256,
    *,
    pairs: int = 8,
    length: int = 32,
    rounds: int = 7,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The same with the vocabulary of a current model and random bf16 logits, where the head costs what it
    costs in practice."""
    generator = torch.Generator().manual_seed(0)
    packed = fastalign.pack(
        torch.randint(vocab, (2 * pairs, length), generator=generator).unbind(0), device=device
    )
    logits = torch.empty(2 * pairs * length, vocab, dtype=torch.bfloat16).normal_(
        std=2.0, generator=generator
    )
    return _time_head(logits.to(device), packed, rounds)


def _time_head(logits: Tensor, packed: Any, rounds: int) -> dict[str, Any]:
    preset = fastalign.losses.get("dpo")
    reference = plain_logprobs(logits, packed.labels) - 0.1
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    source, buffer = logits.detach().requires_grad_(), torch.empty_like(logits)
    for turn in range(rounds + 1):
        for name, (logprob_fn, loss_fn) in PATHS.items():
            rows = buffer.detach().copy_(
                source
            )  # fresh, and no leaf of the graph: the fused path writes the gradient over it
            _synchronize(logits)
            seconds = -time.perf_counter()
            logprobs = logprob_fn(rows, packed.labels)
            count = (len(packed.cu_seqlens) - 1) // 2
            output = loss_fn(
                logprobs, reference, packed.cu_seqlens, loss=preset, mask=packed.mask, num_items=count
            )
            torch.autograd.grad(output.loss, rows)
            _synchronize(logits)
            if turn:  # the first turn warms up
                times[name].append(seconds + time.perf_counter())
    return _medians(times) | {
        "tokens": logits.shape[0],
        "vocabulary": logits.shape[1],
        "dtype": str(logits.dtype).removeprefix("torch."),
    }


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
