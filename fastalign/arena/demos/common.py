"""What the demonstrations share: the clock, the start from random weights to an SFT model, and the record of
the machine."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

import fastalign
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import TrainingError

SFT_STEPS = 220
GOLD_REWARD = (
    "Gold reward: the true reward of this task, which a program computes from a text's words. It is 1 for a "
    "review of known words with at least three\n"
    "different positive ones and none that is negative, 0.5 for a neutral one, 0 for a negative one, and less "
    "for unknown words or more than 16 words."
)


class Clock:
    """Prints each stage as it begins and keeps the seconds of each."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.name, self.seconds = "", {}

    def stage(self, title: str) -> None:
        self._close()
        self.name = title.split(":")[0]
        print(f"\n[{time.perf_counter() - self.started:5.1f} s] {title}", flush=True)

    def _close(self) -> None:
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = now - self.last
        self.last = now

    def stop(self) -> dict[str, float]:
        self._close()
        return self.seconds | {"total": time.perf_counter() - self.started}


class Start(NamedTuple):
    """Where every method begins: a model after SFT (to be trained), its frozen copy, the tokenizer, the
    losses of SFT."""

    model: torch.nn.Module
    sft: torch.nn.Module
    tokenizer: Any
    sft_losses: list[float]


def start_from_sft(clock: Clock, seeds: list[int]) -> Start:
    """A small model with random weights, warmed up on generated reviews. seeds: for the weights, the reviews,
    the order."""
    from fastalign.arena import review_task

    tokenizer = review_task.make_tokenizer()
    model = review_task.make_model(tokenizer, seeds[0])
    clock.stage(
        f"SFT: {sum(p.numel() for p in model.parameters()):,} parameters, byte tokenizer, {SFT_STEPS} steps "
        "on generated reviews"
    )
    losses = review_task.train_sft(
        model, tokenizer, review_task.make_reviews(4000, seeds[1]), steps=SFT_STEPS, seed=seeds[2]
    )
    return Start(model, copy.deepcopy(model).requires_grad_(False), tokenizer, losses)


def sampled_pairs(
    start: Start, seeds: list[int], known: int, held_out: int
) -> tuple[list[TokenExample], list[TokenExample]]:
    """Preference pairs of the SFT model's samples, best against worst of 4, for so many prompts to learn from
    and so many others."""
    from fastalign.arena import review_task

    parts = tuple(
        review_task.sample_pairs(
            start.sft, start.tokenizer, review_task.make_prompts(count, seeds[prompts]), seed=seeds[samples]
        )
        for count, prompts, samples in ((known, 3, 4), (held_out, 5, 6))
    )
    if not all(parts):
        raise TrainingError("the samples give no pairs with different rewards")
    return parts


def shown_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Lines with each prompt and, under it, every policy's whole response with its gold reward. samples:
    policy -> one per prompt."""
    width = max(map(len, samples))
    lines = []
    for row in zip(*samples.values()):
        lines.append(f"  {row[0]['prompt']}")
        lines += [
            f"    {name:<{width}} {sample['gold_reward']:.2f} {sample['text'].strip()}"
            for name, sample in zip(samples, row)
        ]
    return lines


def sampling_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that can generate: the trainer's attention serves packed sequences only."""
    policy = copy.deepcopy(model)
    policy.set_attn_implementation("sdpa")
    return policy


def machine() -> dict[str, Any]:
    """What the times belong to."""
    return {
        "fastalign": fastalign.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "backend": fastalign.explain("token_logprobs", torch.empty(1, 1)).splitlines()[0].rpartition(": ")[2],
    }
