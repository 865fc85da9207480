"""AdamW with the run's learning-rate schedule, gradient clipping, and a stop before an update that would not
be finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastalign.train.config import RunConfig
from fastalign.train.errors import TrainingError, UserError


class Optimizer:
    """The optimizer of a run of `steps` steps. A step is one or more rounds of: gradients, `clip()`,
    `update(...)`."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], config: RunConfig, steps: int):
        self.parameters, self.config, self.steps = list(parameters), config, steps
        if not self.parameters:
            raise UserError("the model has no weight to train: none of its parameters requires a gradient")
        matrices, vectors = (
            [p for p in self.parameters if (p.dim() >= 2) is wanted] for wanted in (True, False)
        )
        # Weight decay acts on matrices only, not on norms and biases.
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=config.learning_rate)

    def clip(self) -> torch.Tensor:
        """Scale the gradients to the run's largest norm; the norm that they had, on the device."""
        return clip_gradients(self.parameters, self.config.max_grad_norm)

    def update(self, step: int, metrics: Mapping[str, Any]) -> float:
        """Update the weights at the rate of step 0, 1, ..., which is returned. `metrics`: "loss" and
        "grad_norm", numbers on the host, must be finite."""
        if not (math.isfinite(metrics["grad_norm"]) and math.isfinite(metrics.get("loss", 0.0))):
            raise TrainingError(
                f"step {step + 1}: loss {metrics.get('loss')}, gradient norm {metrics['grad_norm']}; no "
                "update was made"
            )
        rate = learning_rate(step, self.steps, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return rate

    def discard(self) -> None:
        """Drop the gradients: this update is not made."""
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the moments. The rest, rates and groups, follows from the run's settings. Raises
        `ValueError` for those of other weights."""
        groups, found = self.adamw.state_dict()["param_groups"], state["param_groups"]
        if [group["params"] for group in found] != [group["params"] for group in groups]:
            raise ValueError("it belongs to other weights")
        numbered = [p for group in self.adamw.param_groups for p in group["params"]]
        for number, moments in state["state"].items():
            shape = numbered[number].shape
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != shape or not moments[name].isfinite().all():
                    raise ValueError(
                        f"{name} of a weight of shape {tuple(shape)} has shape {tuple(moments[name].shape)}, "
                        "or is not finite"
                    )
            if not 0 < float(moments["step"]) < math.inf:
                raise ValueError(f"a number of updates is {float(moments['step'])}")
        self.adamw.load_state_dict({"state": state["state"], "param_groups": groups})


def learning_rate(step: int, total: int, config: RunConfig) -> float:
    """The rate of step 0, 1, ..., total - 1: a linear rise over the first `warmup_ratio` of the steps, then a
    cosine towards 0."""
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients to at most this global norm (0: leave them) and return the norm they had."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
