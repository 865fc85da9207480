"""The picture of a run: what its training stages logged, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

# What is drawn, each where at least one stage has it: title -> the first of these metrics that a record has.
_PANELS = {
    "loss": ("loss",),
    "reward (mean score of samples, or implicit margin)": (
        "objective/scores",
        "mean_reward",
        "rewards/margins",
    ),
    "accuracy": ("rewards/accuracies", "mean_token_accuracy"),
    "KL to the reference, nats per response": ("objective/kl", "kl"),
}


def draw(title: str, records: Sequence[dict[str, Any]], path: Path) -> None:
    """Panels over the optimizer steps of all stages; a line begins where a stage does."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    training = [record for record in records if "loss" in record]
    panels = {name: keys for name, keys in _PANELS.items() if any(key in r for r in training for key in keys)}
    starts: dict[str, int] = {}
    for x, record in enumerate(training):
        starts.setdefault(record["stage"], x)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(11, 2.6 * len(panels)), layout="constrained", sharex=True, squeeze=False
    )
    for axis, (name, keys) in zip(axes[:, 0], panels.items()):
        for stage, start in starts.items():
            points = [
                (start + i, next((r[key] for key in keys if r.get(key) is not None), None))
                for i, r in enumerate(r for r in training if r["stage"] == stage)
            ]
            points = [(x + 1, y) for x, y in points if y is not None]
            if points:
                axis.plot(*zip(*points), marker="." if len(points) < 30 else None)
            axis.axvline(start + 0.5, color="grey", linewidth=0.8, alpha=0.6)
        axis.set_title(name, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    top = axes[0, 0]
    for stage, start in starts.items():
        top.annotate(
            stage, (start + 0.5, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3),
            textcoords="offset points", va="top", rotation=90, fontsize=7, color="grey",
        )  # fmt: skip
    axes[-1, 0].set_xlabel("optimizer step of the run")
    figure.suptitle(title)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
