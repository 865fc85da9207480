"""The training loop: steps, records, evaluations, checkpoints, resumption. What a step is, a `Task` says; nothing here knows of any loss."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fastalign
from fastalign.train import checkpoint
from fastalign.train import model as models
from fastalign.train.config import RunConfig
from fastalign.train.errors import UserError
from fastalign.train.metrics import RunLog
from fastalign.train.optimise import Optimizer


class Task(Protocol):
    """What a run does: learning from a data file (`fastalign.train.offline`), or from the policy's own samples."""

    method: str  # its name on the command line
    data: str  # hash of the data; a run is resumed with the same only
    steps: int
    steps_per_epoch: float
    evaluates: bool  # whether there is anything to evaluate on

    def describe(self) -> str:
        """One line about what is about to happen."""

    def modules(self) -> Mapping[str, torch.nn.Module]:
        """What is trained and saved besides the model (a value head): name -> module, saved as NAME.safetensors beside the model."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def step(self, step: int, optimizer: Optimizer) -> tuple[dict[str, float], int]:
        """Do step 0, 1, ...: (its metrics with the learning rate, tokens seen)."""

    def evaluate(self) -> dict[str, float]:
        """The metrics of an evaluation, "loss" among them, without prefix."""


@dataclass
class TrainResult:
    """What a run leaves behind: the last training record and the last evaluation merged, every record, seconds per step, and the directory."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    step_times: list[float]
    output: Path


@dataclass
class Run:
    """Everything that one run is made of. `callback` gets every record."""

    config: RunConfig
    output: Path
    lm: models.PackedModel
    tokenizer: Any
    task: Task
    callback: Callable[[dict[str, Any]], None] | None = None

    def fit(self) -> TrainResult:
        """Train in place, log, evaluate, checkpoint, resume, and save the result in the output directory."""
        config, task = self.config, self.task
        modules = [self.lm.model, *task.modules().values()]
        optimizer = Optimizer([p for m in modules for p in m.parameters() if p.requires_grad], config, task.steps)
        first, tokens = self._resume(optimizer) if config.resume else (0, 0)
        self._describe(first)
        log = RunLog(self.output, config, first_step=first, total_steps=task.steps)

        def report(step: int, values: dict[str, Any]) -> None:
            record = {"step": step, "epoch": step / task.steps_per_epoch, **values}
            log.write(record)
            if self.callback is not None:
                self.callback(record)

        def evaluate(step: int) -> None:
            with torch.no_grad():
                report(step, {f"eval_{name}": value for name, value in task.evaluate().items()})

        try:
            if first == 0 and task.evaluates:
                evaluate(0)
            for step in range(first, task.steps):
                started = time.perf_counter()
                metrics, seen = task.step(step, optimizer)
                done, tokens, seconds = step + 1, tokens + seen, time.perf_counter() - started
                report(done, metrics | {"num_tokens": tokens, "step_time": seconds})
                if task.evaluates and (done == task.steps or config.eval_every and done % config.eval_every == 0):
                    evaluate(done)
                if config.save_every and done % config.save_every == 0:
                    self._save_checkpoint(optimizer, done, tokens)
        finally:
            log.close()
        checkpoint.save_final(self.output, self._save_model)
        print(f"model saved in {self.output}")
        return result(log.history, self.output)

    def _resume(self, optimizer: Optimizer) -> tuple[int, int]:
        """Bring model, optimizer, task and random state to the newest checkpoint; (steps done, tokens seen)."""
        path = checkpoint.newest(self.output)
        state = checkpoint.load_state(path)
        checkpoint.check_same_run(state, self.config, self.task.method, self.task.data)
        self.lm.load_weights(str(path), trust_remote_code=self.config.trust_remote_code)
        for name, module in self.task.modules().items():
            try:
                module.load_state_dict(load_file(path / f"{name}.safetensors"))
            except (SafetensorError, OSError, RuntimeError) as error:
                raise UserError(f"--resume: {path / name}.safetensors cannot be read: {str(error).splitlines()[0]}") from error
        optimizer.load_state_dict(state["optimizer"])
        self.task.load_state_dict(state["task"])
        checkpoint.restore_random_state(state["random"])
        print(f"resumed from {path}")
        return state["step"], state["tokens"]

    def _save_checkpoint(self, optimizer: Optimizer, step: int, tokens: int) -> None:
        state = {"step": step, "tokens": tokens, "optimizer": optimizer.state_dict(), "random": checkpoint.random_state()}
        state |= {"method": self.task.method, "data": self.task.data, "settings": checkpoint.settings(self.config)}
        state["task"] = self.task.state_dict()
        checkpoint.save_checkpoint(self.output, step, state, self._save_model, self.config.keep_checkpoints)

    def _save_model(self, folder: Path) -> None:
        self.lm.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for name, module in self.task.modules().items():
            save_file(module.state_dict(), folder / f"{name}.safetensors")

    def _describe(self, first: int) -> None:
        """Print what is about to happen, and keep the settings and versions beside the result."""
        size = sum(p.numel() for p in self.lm.model.parameters())
        passed_over = "".join(f"; not {name}: {reason}" for name, reason in self.lm.refused.items())
        print(
            f"model: {type(self.lm.model).__name__}, {size / 1e6:.3g} M parameters, on {self.lm.device}, forward in {self.config.dtype}\n"
            f"attention: {self.lm.attention}{passed_over}\n"
            f"training: {self.task.method}, {self.task.steps - first} steps, {self.task.describe()}, output {self.output}"
        )
        versions = {module.__name__: module.__version__ for module in (fastalign, torch, transformers)}
        record = {"method": self.task.method, "config": asdict(self.config), "versions": versions}
        text = json.dumps(record, indent=2) + "\n"
        checkpoint.replace_file(checkpoint.inside(self.output, "train_config.json"), lambda path: path.write_text(text, encoding="utf-8"))


def result(history: list[dict[str, Any]], output: Path) -> TrainResult:
    """The records of a run, summed up."""
    training = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record]
    metrics = {**(evaluations[-1] if evaluations else {}), **(training[-1] if training else {})}
    return TrainResult(metrics, history, [record["step_time"] for record in training], output)
