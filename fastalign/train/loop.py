"""The training loop. A method supplies batches and losses; everything else about a run is here, and nothing about any loss."""
from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Protocol, Sequence

import torch
import transformers

import fastalign
from fastalign.train import checkpoint, model as models
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
    """What the loop needs to know of a method."""

    def batches(self, split: Split, indices: Sequence[int]) -> list[Any]: ...

    def denominators(self, split: Split, batches: Sequence[Any]) -> dict[str, int]: ...

    def loss(self, lm: models.PackedCausalLM, split: Split, batch: Any, **denominators: int) -> tuple[torch.Tensor, Metrics]: ...


@dataclass
class TrainResult:
    """What a run leaves behind: the last training record and the last evaluation merged, every record, seconds per step, and the directory."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    step_times: list[float]
    output: Path


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of step 0, 1, ..., total - 1: a linear rise over the first `warmup_ratio` of the steps, then a cosine that ends at 0."""
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def run(config: TrainConfig, output: Path, lm: models.PackedCausalLM, tokenizer: Any, method: Method, train: Split, evaluation: Split,
        schedule: Schedule, *, data: str, callback: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """Train `lm` in place, log, evaluate, checkpoint, resume, and save the result in `output`. `data` identifies the data."""
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
                                   {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}], lr=config.learning_rate)
    first, tokens = _resume(config, output, lm, optimizer, data) if config.resume else (0, 0)
    _describe(config, output, lm, schedule, first)
    log = RunLog(output, config, first_step=first, total_steps=schedule.steps)

    def report(write: Callable[[dict[str, Any]], None], record: dict[str, Any]) -> None:
        write(record)
        if callback is not None:
            callback(record)

    def evaluate(step: int) -> None:
        if evaluation.examples:
            with torch.no_grad():
                sums, _ = accumulate(lm, method, evaluation, range(len(evaluation.examples)))
            means = {f"eval_{name}": value for name, value in sums.means().items()}
            report(log.evaluation, {"step": step, "epoch": step / schedule.steps_per_epoch, **means})

    try:
        if first == 0:
            evaluate(0)
        for step in range(first, schedule.steps):
            started = time.perf_counter()
            sums, seen = accumulate(lm, method, train, schedule.indices(step), backward=True)
            tokens += seen
            sums.add({"grad_norm": (clip_gradients(parameters, config.max_grad_norm), 1)})
            metrics = sums.means()
            if not math.isfinite(metrics["grad_norm"]):
                raise TrainingError(f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; stopped before the update")
            rate = learning_rate(step, schedule.steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report(log.step, {"step": step + 1, "epoch": (step + 1) / schedule.steps_per_epoch, **metrics, "learning_rate": rate,
                              "num_tokens": tokens, "step_time": time.perf_counter() - started})
            if step + 1 == schedule.steps or config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate(step + 1)
            if config.save_every and (step + 1) % config.save_every == 0:
                _save(config, output, lm, tokenizer, optimizer, step + 1, tokens, data)
    finally:
        log.close()
    checkpoint.save_final(output, lambda folder: _save_model(folder, lm, tokenizer))
    print(f"model saved in {output}")
    return _result(log.history, output)


def accumulate(lm: models.PackedCausalLM, method: Method, split: Split, indices: Sequence[int], *,
               backward: bool = False) -> tuple[MetricSums, int]:
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


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients to at most this global norm (0: leave them) and return the norm they had."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)


def _resume(config: TrainConfig, output: Path, lm: models.PackedCausalLM, optimizer: torch.optim.Optimizer, data: str) -> tuple[int, int]:
    """Bring model, optimizer and random state to the newest checkpoint; (steps done, tokens seen)."""
    path = checkpoint.newest(output)
    state = checkpoint.load_state(path)
    checkpoint.check_same_run(state, config, data)
    weights = models.load_model(path, trust_remote_code=config.trust_remote_code).state_dict()
    lm.model.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    checkpoint.restore_random_state(state["random"])
    print(f"resumed from {path}")
    return state["step"], state["tokens"]


def _save(config: TrainConfig, output: Path, lm: models.PackedCausalLM, tokenizer: Any, optimizer: torch.optim.Optimizer, step: int,
          tokens: int, data: str) -> None:
    state = {"step": step, "tokens": tokens, "optimizer": optimizer.state_dict(), "random": checkpoint.random_state(), "data": data,
             "settings": checkpoint.settings(config)}
    checkpoint.save_checkpoint(output, step, state, lambda folder: _save_model(folder, lm, tokenizer), config.keep_checkpoints)


def _save_model(folder: Path, lm: models.PackedCausalLM, tokenizer: Any) -> None:
    lm.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _describe(config: TrainConfig, output: Path, lm: models.PackedCausalLM, schedule: Schedule, first: int) -> None:
    """Print what is about to happen, and keep the settings and versions beside the result."""
    size = sum(p.numel() for p in lm.model.parameters())
    passed_over = "".join(f"; not {name}: {reason}" for name, reason in lm.refused.items())
    print(f"model: {type(lm.model).__name__}, {size / 1e6:.3g} M parameters, on {lm.device}, forward pass in {config.dtype}\n"
          f"attention: {lm.attention}{passed_over}\n"
          f"training: {schedule.steps - first} steps of up to {config.batch_size} pairs, loss {config.loss}, output {output}")
    about = {"config": asdict(config), "versions": {module.__name__: module.__version__ for module in (fastalign, torch, transformers)}}
    checkpoint.replace_file(checkpoint.inside(output, "train_config.json"),
                            lambda temporary: temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8"))


def _result(history: list[dict[str, Any]], output: Path) -> TrainResult:
    training = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record]
    metrics = {**(evaluations[-1] if evaluations else {}), **(training[-1] if training else {})}
    return TrainResult(metrics, history, [record["step_time"] for record in training], output)
