"""Where numbers go: sums over micro-batches, metrics.jsonl, TensorBoard, the console."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastalign.runtime.metric import AnyMetric, Total, merge_metrics
from fastalign.train.config import RunConfig
from fastalign.train.files import inside, replace_file, writing

# name -> a form of fastalign.runtime.metric, or a mean as a plain pair (sum, count); tensors on the device
Metrics = Mapping[str, Any]

# What the console shows of a record; the files have everything.
_CONSOLE = (
    "loss", "rewards/accuracies", "rewards/margins", "accuracy", "margin", "mean_reward", "kl", "delta",
    "seqkl/chosen", "seqkl/rejected", "logps/chosen", "logps/rejected", "objective/scores", "objective/kl",
    "objective/entropy", "policy/approxkl", "policy/clipfrac", "loss/value", "grad_norm", "learning_rate",
    "step_time",
)  # fmt: skip


class MetricSums:
    """Merges metrics of all packs on the device; `means()` moves them to the host in one transfer, gives each
    one's value, and leaves out what nothing was seen of."""

    def __init__(self) -> None:
        self.sums: dict[str, AnyMetric] = {}

    def add(self, metrics: Metrics) -> None:
        self.sums = merge_metrics(self.sums, metrics)

    def merge(self, other: MetricSums) -> None:
        self.add(other.sums)

    def means(self) -> dict[str, float]:
        if not self.sums:
            return {}
        fields = iter(torch.stack([field for metric in self.sums.values() for field in metric]).tolist())
        here = {name: type(metric)(*(next(fields) for _ in metric)) for name, metric in self.sums.items()}
        return {
            name: float(metric) for name, metric in here.items() if metric.count or isinstance(metric, Total)
        }


class RunLog:
    """One record per optimizer step and per evaluation, in `history`, metrics.jsonl and TensorBoard; some
    lines on the console."""

    def __init__(self, output: Path, config: RunConfig, *, first_step: int, total_steps: int):
        self.path, self.log_every = inside(output, "metrics.jsonl"), config.log_every
        with writing(str(self.path)):
            self.history = self._keep_until(first_step)
            self.file = self.path.open("a", encoding="utf-8")
            self.board = (
                self._open_board(inside(output, "tensorboard"), first_step) if config.tensorboard else None
            )
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="training",
            unit=" steps",
            disable=None if config.progress else True,
        )

    def write(self, record: dict[str, Any]) -> None:
        """A record of training (`record["step"]` counts from 1) or, under eval_ names, of an evaluation."""
        self.history.append(record)
        strict = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with writing(str(self.path)):
            self.file.write(json.dumps(strict) + "\n")
            self.file.flush()
        if self.board is not None:
            with writing("TensorBoard events (--no-tensorboard writes none)"):
                for name, value in record.items():
                    group, short = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
                    self.board.add_scalar(f"{group}/{short}", value, record["step"])
        if "eval_loss" in record:
            self._print(record, "eval_")
            return
        self.bar.set_postfix({"loss": f"{record['loss']:.4f}"}, refresh=False)
        self.bar.update()
        if record["step"] % self.log_every == 0 or record["step"] in (1, self.bar.total):
            self._print(record, "")

    def say(self, text: str) -> None:
        """A line on the console that does not break the progress bar."""
        with tqdm.external_write_mode():
            print(text, flush=True)

    def close(self) -> None:
        self.bar.close()
        with writing(str(self.path)):
            self.file.close()
        if self.board is not None:
            with writing("TensorBoard events (--no-tensorboard writes none)"):
                self.board.close()

    def _print(self, record: dict[str, Any], prefix: str) -> None:
        shown = [f"{name} {record[prefix + name]:.4g}" for name in _CONSOLE if prefix + name in record]
        self.say(f"{'eval' if prefix else 'step'} {record['step']}/{self.bar.total}: " + ", ".join(shown))

    def _keep_until(self, step: int) -> list[dict[str, Any]]:
        """On resume, drop the records after the checkpoint (they will be produced again), and what follows a
        line that is cut off or damaged."""
        history, last = [], 0
        if step and self.path.exists():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    record = json.loads(line)
                    last = int(record["step"])
                except (ValueError, RecursionError, TypeError, KeyError):
                    break
                if last <= step:
                    history.append(record)
            if last < step:
                print(
                    f"warning: {self.path} is damaged or incomplete: it keeps the records up to step {last}, "
                    f"and the run goes on after step {step}"
                )
        lines = "".join(json.dumps(record) + "\n" for record in history)
        replace_file(self.path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
        return history

    def _open_board(self, folder: Path, first_step: int) -> Any:
        if importlib.util.find_spec("tensorboard") is None:
            print("tensorboard is not installed: no TensorBoard events are written")
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=first_step + 1)
