"""The training loop. A method supplies batches and losses; everything else about a run is here, and nothing about any loss."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import fastalign
from fastalign.train import checkpoint
from fastalign.train import model as models
from fastalign.train.config import TrainConfig
from fastalign.train.data import Schedule
from fastalign.train.errors import TrainingError
from fastalign.train.metrics import Metrics, MetricSums, RunLog


@dataclass
class Split:
    """Examples to train or evaluate on, and where their reference log-probs come from (None: the loss needs none)."""

    examples: Sequence[Any]
    reference: Callable[[Any, Any], torch.Tensor] | None = None


class Method(Protocol):
    """What the loop needs to know of a method. A batch is anything with a `fastalign.PackedBatch` as `.packed`."""

    def batches(self, split: Split, indices: Sequence[int]) -> list[Any]:
        """The chosen examples as packed batches, one forward pass each."""

    def denominators(self, split: Split, batches: Sequence[Any]) -> dict[str, int]:
        """What the loss divides by, counted over all of these batches."""

    def loss(self, lm: models.PackedCausalLM, split: Split, batch: Any, **denominators: int) -> tuple[torch.Tensor, Metrics]:
        """This batch's part of the loss, and its metrics."""


@dataclass
class TrainResult:
    """What a run leaves behind: the last training record and the last evaluation merged, every record, seconds per step, and the directory."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    step_times: list[float]
    output: Path


@dataclass
class Run:
    """Everything that one run is made of. `data` identifies the data; `callback` gets every record."""

    config: TrainConfig
    output: Path
    lm: models.PackedCausalLM
    tokenizer: Any
    method: Method
    train: Split
    evaluation: Split
    data: str
    callback: Callable[[dict[str, Any]], None] | None = None

    def fit(self) -> TrainResult:
        """Train in place, log, evaluate, checkpoint, resume, and save the result in the output directory."""
        config, schedule = self.config, Schedule(len(self.train.examples), self.config)
        parameters = [p for p in self.lm.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(parameters, config)
        first, tokens = self._resume(optimizer) if config.resume else (0, 0)
        self._describe(schedule, first)
        log = RunLog(self.output, config, first_step=first, total_steps=schedule.steps)

        def report(step: int, values: dict[str, Any]) -> None:
            record = {"step": step, "epoch": step / schedule.steps_per_epoch, **values}
            log.write(record)
            if self.callback is not None:
                self.callback(record)

        try:
            if first == 0 and self.evaluation.examples:
                report(0, self.evaluate())
            for step in range(first, schedule.steps):
                started = time.perf_counter()
                sums, seen = accumulate(self.lm, self.method, self.train, schedule.indices(step), backward=True)
                sums.add({"grad_norm": (clip_gradients(parameters, config.max_grad_norm), 1)})
                metrics, tokens = sums.means(), tokens + seen  # the step's only transfer from the device
                if not math.isfinite(metrics["grad_norm"]):
                    raise TrainingError(
                        f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; no update was made"
                    )
                rate = learning_rate(step, schedule.steps, config)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done, seconds = step + 1, time.perf_counter() - started
                report(done, metrics | {"learning_rate": rate, "num_tokens": tokens, "step_time": seconds})
                if self.evaluation.examples and (done == schedule.steps or config.eval_every and done % config.eval_every == 0):
                    report(done, self.evaluate())
                if config.save_every and done % config.save_every == 0:
                    self._save_checkpoint(optimizer, done, tokens)
        finally:
            log.close()
        checkpoint.save_final(self.output, self._save_model)
        print(f"model saved in {self.output}")
        return result(log.history, self.output)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of the whole evaluation split, under eval_ names."""
        sums, _ = accumulate(self.lm, self.method, self.evaluation, range(len(self.evaluation.examples)))
        return {f"eval_{name}": value for name, value in sums.means().items()}

    def _resume(self, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Bring model, optimizer and random state to the newest checkpoint; (steps done, tokens seen)."""
        path = checkpoint.newest(self.output)
        state = checkpoint.load_state(path)
        checkpoint.check_same_run(state, self.config, self.data)
        saved = models.load_model(path, trust_remote_code=self.config.trust_remote_code)
        self.lm.model.load_state_dict(saved.state_dict())
        optimizer.load_state_dict(state["optimizer"])
        checkpoint.restore_random_state(state["random"])
        print(f"resumed from {path}")
        return state["step"], state["tokens"]

    def _save_checkpoint(self, optimizer: torch.optim.Optimizer, step: int, tokens: int) -> None:
        state = {"step": step, "tokens": tokens, "optimizer": optimizer.state_dict(), "random": checkpoint.random_state()}
        state |= {"data": self.data, "settings": checkpoint.settings(self.config)}
        checkpoint.save_checkpoint(self.output, step, state, self._save_model, self.config.keep_checkpoints)

    def _save_model(self, folder: Path) -> None:
        self.lm.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _describe(self, schedule: Schedule, first: int) -> None:
        """Print what is about to happen, and keep the settings and versions beside the result."""
        size = sum(p.numel() for p in self.lm.model.parameters())
        passed_over = "".join(f"; not {name}: {reason}" for name, reason in self.lm.refused.items())
        print(
            f"model: {type(self.lm.model).__name__}, {size / 1e6:.3g} M parameters, on {self.lm.device}, forward in {self.config.dtype}\n"
            f"attention: {self.lm.attention}{passed_over}\n"
            f"training: {schedule.steps - first} steps of up to {self.config.batch_size} pairs, loss {self.config.loss}, output {self.output}"
        )
        versions = {module.__name__: module.__version__ for module in (fastalign, torch, transformers)}
        text = json.dumps({"config": asdict(self.config), "versions": versions}, indent=2) + "\n"
        checkpoint.replace_file(checkpoint.inside(self.output, "train_config.json"), lambda path: path.write_text(text, encoding="utf-8"))


def accumulate(
    lm: models.PackedCausalLM, method: Method, split: Split, indices: Sequence[int], *, backward: bool = False
) -> tuple[MetricSums, int]:
    """(metrics, tokens) of the chosen examples taken as one batch, whatever number of forward passes they need. `backward` adds the
    gradient to the parameters."""
    batches = method.batches(split, indices)
    denominators = method.denominators(split, batches)
    sums, total, tokens = MetricSums(), 0.0, 0
    for batch in batches:
        loss, metrics = method.loss(lm, split, batch, **denominators)
        if backward:
            loss.backward()
        sums.add(metrics)
        total = total + loss.detach()
        tokens += batch.packed.input_ids.numel()
    sums.add({"loss": (total, 1)})
    return sums, tokens


def make_optimizer(parameters: Sequence[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay acts on matrices only, not on norms and biases."""
    matrices, vectors = ([p for p in parameters if (p.dim() >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of step 0, 1, ..., total - 1: a linear rise over the first `warmup_ratio` of the steps, then a cosine towards 0."""
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients to at most this global norm (0: leave them) and return the norm they had."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)


def result(history: list[dict[str, Any]], output: Path) -> TrainResult:
    """The records of a run, summed up."""
    training = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record]
    metrics = {**(evaluations[-1] if evaluations else {}), **(training[-1] if training else {})}
    return TrainResult(metrics, history, [record["step_time"] for record in training], output)
