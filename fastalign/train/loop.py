"""The training loop: steps, records, evaluations, checkpoints, resumption. What a step is, a `Task` says;
nothing here knows of any loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from fastalign.train import checkpoint, files
from fastalign.train.config import RunConfig
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.metrics import RunLog
from fastalign.train.models import packed as models
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.optimise import Optimizer
from fastalign.train.vain import Vain


class Task(Protocol):
    """What a run does: learning from a data file (`fastalign.train.offline`), or from the policy's own
    samples."""

    method: str  # its name on the command line
    data: str  # hash of the data; a run is resumed with the same only
    steps: int
    steps_per_epoch: float
    evaluates: bool  # whether there is anything to evaluate on

    def describe(self) -> str:
        """One line about what is about to happen."""

    def modules(self) -> Mapping[str, torch.nn.Module]:
        """What is trained and saved besides the model (a value head): name -> module, saved as
        NAME.safetensors beside the model."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def step(self, step: int, optimizer: Optimizer) -> tuple[dict[str, float], int]:
        """Do step 0, 1, ...: (its metrics with the learning rate, tokens seen)."""

    def evaluate(self) -> dict[str, float]:
        """The metrics of an evaluation, "loss" among them, without prefix."""

    def conclude(self) -> None:
        """Called after the last step, before the model is saved."""


@dataclass
class TrainResult:
    """What a run leaves behind: the last training record and the last evaluation merged, every record,
    seconds per step, and the directory."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    step_times: list[float]
    output: Path


@dataclass
class Run:
    """Everything that one run is made of. `callback` gets every record. `weights`: setting -> hash of the
    weights that the model of this setting started from, needed where the run is resumed or may be
    (`weights_of`)."""

    config: RunConfig
    output: Path
    lm: models.PackedModel
    tokenizer: Any
    task: Task
    callback: Callable[[dict[str, Any]], None] | None = None
    weights: Mapping[str, str] = field(default_factory=dict)

    def fit(self) -> TrainResult:
        """Train in place, log, evaluate, checkpoint, resume, and save the result in the output directory."""
        config, task = self.config, self.task
        modules = [self.lm.model, *task.modules().values()]
        optimizer = Optimizer(
            [p for m in modules for p in m.parameters() if p.requires_grad], config, task.steps
        )
        first, tokens = self._resume(optimizer) if config.resume else (0, 0)
        self._describe(first)
        log = RunLog(self.output, config, first_step=first, total_steps=task.steps)

        vain = Vain(log.say)

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
                vain.look(done, metrics)
                if task.evaluates and (
                    done == task.steps or config.eval_every and done % config.eval_every == 0
                ):
                    evaluate(done)
                if config.save_every and done % config.save_every == 0:
                    self._save_checkpoint(optimizer, done, tokens)
            vain.conclude()
        finally:
            log.close()
        self._check_weights(task.steps)
        task.conclude()
        checkpoint.save_final(self.output, self._save_model)
        print(f"model saved in {self.output}")
        return result(log.history, self.output)

    def _resume(self, optimizer: Optimizer) -> tuple[int, int]:
        """Bring model, optimizer, task and random state to the newest checkpoint; (steps done, tokens
        seen)."""
        path, task = checkpoint.newest(self.output), self.task
        state = checkpoint.load_state(path)
        checkpoint.check_same_run(state, self.config, task.method, task.data, self.weights, task.steps)

        def restore(what: str, load: Callable[[], None]) -> None:
            try:
                load()
            except UserError:
                raise
            except Exception as error:  # contents that have the form of a checkpoint and are not this run's fail in many ways
                raise UserError(
                    f"--resume: the checkpoint {path} is damaged: its {what} cannot be read: "
                    f"{files.reason(error)}"
                ) from error

        restore(
            "model", lambda: self.lm.load_weights(str(path), trust_remote_code=self.config.trust_remote_code)
        )
        for name, module in task.modules().items():
            file = f"{name}.safetensors"
            restore(file, lambda module=module, file=file: module.load_state_dict(load_file(path / file)))
        restore("optimizer state", lambda: optimizer.load_state_dict(state["optimizer"]))
        restore("state of the method", lambda: task.load_state_dict(state["task"]))
        restore("random state", lambda: checkpoint.restore_random_state(state["random"]))
        print(f"resumed from {path}")
        if task.steps > state["steps"]:
            print(
                f"goes on to step {task.steps}, not {state['steps']}: from here on the learning rate is that "
                "of a run of this length"
            )
        return state["step"], state["tokens"]

    def _check_weights(self, step: int) -> None:
        """Keep weights that an update has spoiled from being saved as a model."""
        for module in (self.lm.model, *self.task.modules().values()):
            for name, weight in module.named_parameters():
                if not weight.isfinite().all():
                    raise TrainingError(
                        f"step {step}: the weights of {name} are not finite any more (a lower "
                        "--learning-rate?); they are not saved"
                    )

    def _save_checkpoint(self, optimizer: Optimizer, step: int, tokens: int) -> None:
        self._check_weights(step)
        state = {
            "step": step,
            "tokens": tokens,
            "optimizer": optimizer.state_dict(),
            "random": checkpoint.random_state(),
        }
        state |= {
            "method": self.task.method,
            "data": self.task.data,
            "settings": checkpoint.settings(self.config),
            "models": dict(self.weights),
        }
        state |= {"format": checkpoint.FORMAT, "steps": self.task.steps, "task": self.task.state_dict()}
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
        router = f"router: {self.lm.router_note}\n" if self.lm.router_note else ""
        head = f"head: {self.lm.describe_head()}\n" if isinstance(self.lm, PackedCausalLM) else ""
        print(
            f"model: {type(self.lm.model).__name__}, {size / 1e6:.3g} M parameters, on {self.lm.device}, "
            f"forward in {self.config.dtype}\n"
            f"attention: {self.lm.attention}{passed_over}\n{head}"
            f"{router}training: {self.task.method}, {self.task.steps - first} steps, {self.task.describe()}, "
            f"output {self.output}"
        )
        with files.writing(f"{checkpoint.RECORD} in {self.output}"):
            checkpoint.write_record(self.output, self.config, self.task.method)


def result(history: list[dict[str, Any]], output: Path) -> TrainResult:
    """The records of a run, summed up."""
    training = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record]
    metrics = {**(evaluations[-1] if evaluations else {}), **(training[-1] if training else {})}
    return TrainResult(metrics, history, [record["step_time"] for record in training], output)
