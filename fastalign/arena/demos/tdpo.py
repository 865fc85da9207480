"""`fastalign demo tdpo`: DPO, TDPO1 and TDPO2 from the same SFT model, on the same pairs, for the same number
of steps.

Token-level DPO (Zeng et al. 2024, arXiv 2404.11999) is claimed to buy its reward at less divergence from the
reference, on the rejected side above all. The table and the picture show gold reward against KL as they come
out here, for this seed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastalign
from fastalign.arena import review_task
from fastalign.arena.demos.common import Clock, machine, sampled_pairs, sampling_copy, start_from_sft
from fastalign.cli.console import table
from fastalign.train.config import TrainConfig
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.offline import train

PROMPTS, HELD_OUT_PROMPTS, SAMPLES = 384, 96, 256
LEARNING_RATE, BATCH_SIZE, CURVE_POINTS = 1e-4, 32, 4
BETA = 0.5
# Label -> (method, loss, options of the loss). alpha is the paper's choice for TDPO2.
CONTESTANTS: dict[str, tuple[str, str, dict[str, float]]] = {
    "DPO": ("dpo", "dpo", {"beta": BETA}),
    "TDPO1": ("tdpo", "tdpo1", {"beta": BETA}),
    "TDPO2": ("tdpo", "tdpo2", {"beta": BETA, "alpha": 0.5}),
}
COLUMNS = {
    "gold_reward": "gold reward",
    "kl": "KL(policy, SFT), own samples",
    "seqkl_chosen": "KL(SFT, policy), chosen",
    "seqkl_rejected": "KL(SFT, policy), rejected",
    "accuracy": "reward accuracy",
}


def run(seed: int, steps: int, output: Path) -> dict[str, Any]:
    """The whole comparison. Returns what metrics.json holds."""
    clock = Clock()
    seeds = [1000 * seed + i for i in range(8)]  # one for each use of chance, as in the demonstration of DPO
    start = model, sft, tokenizer, _ = start_from_sft(clock, seeds)
    clock.stage(
        f"preferences: best against worst of 4 samples for each of {PROMPTS + HELD_OUT_PROMPTS} prompts"
    )
    pairs, held_out = sampled_pairs(start, seeds, PROMPTS, HELD_OUT_PROMPTS)
    prompts = review_task.make_prompts(SAMPLES, seeds[7])

    def judge(policy: torch.nn.Module) -> dict[str, float]:
        samples = review_task.generate(sampling_copy(policy), tokenizer, prompts, seed=seeds[7])
        kl = review_task.sampled_kl(policy, sft, samples)["k3_per_sequence"]
        return {
            "gold_reward": review_task.mean_gold_reward(samples),
            "kl": kl,
            **held_out_divergence(policy, sft, held_out),
        }

    before = judge(sft)
    curves: dict[str, list[dict[str, float]]] = {}
    for label, (method, loss, options) in CONTESTANTS.items():
        clock.stage(
            f"{label}: {steps} steps of {BATCH_SIZE} pairs, "
            f"{', '.join(f'{k} {v:g}' for k, v in options.items())}"
        )
        policy = copy.deepcopy(model)
        points = curves[label] = [{"step": 0, **before}]

        def note(
            record: dict[str, Any], policy: torch.nn.Module = policy, points: list[dict[str, float]] = points
        ) -> None:
            if "eval_loss" in record:
                points.append({"step": record["step"], **judge(policy)})

        config = TrainConfig(
            output=str(output / label.lower()), overwrite=True, loss=loss, loss_options=options,
            learning_rate=LEARNING_RATE, seed=seed, batch_size=BATCH_SIZE, max_steps=steps,
            eval_every=max(1, steps // CURVE_POINTS), token_metrics=False,
        )  # fmt: skip
        train(
            method,
            config,
            model=policy,
            tokenizer=tokenizer,
            examples=pairs,
            eval_examples=held_out,
            callback=note,
        )
        if points[-1]["step"] != steps:
            points.append({"step": steps, **judge(policy)})

    settings = {
        "seed": seed,
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "pairs": len(pairs),
    }
    report = {
        "settings": settings,
        "machine": machine(),
        "contestants": CONTESTANTS,
        "curves": curves,
        "seconds": clock.stop(),
    }
    (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(curves, output / "curves.png")
    print(
        "\n"
        + summary(curves)
        + f"\ntook {report['seconds']['total']:.0f} s\n\ncurves: {output / 'curves.png'}  numbers: {output / 'metrics.json'}"
    )
    return report


@torch.no_grad()
def held_out_divergence(
    policy: torch.nn.Module, reference: torch.nn.Module, pairs: Sequence[TokenExample]
) -> dict[str, float]:
    """Mean over the pairs of the exact KL(reference || policy), summed over each response, in nats; and the
    share of pairs whose chosen response has the larger log-ratio (NaN where all are 0)."""
    sequences = [(pair.prompt.tolist(), side.tolist()) for pair in pairs for side in pair.completions]
    batch = fastalign.pack(
        [p + c for p, c in sequences], [[False] * len(p) + [True] * len(c) for p, c in sequences]
    )
    lms = PackedCausalLM(policy), PackedCausalLM(reference)
    try:
        batch = batch.to(lms[0].device)
        logits, ref_logits = (lm.logits(batch) for lm in lms)
    finally:
        for lm in lms:
            lm.restore()
    stats = fastalign.token_stats(
        logits, batch.labels, ref_logits=ref_logits, outputs=("logprob", "ref_logprob", "kl_ref_policy")
    )
    kl, ratio = (fastalign.sequence_sum(x, batch.cu_seqlens, mask=batch.mask).view(-1, 2)
                 for x in (stats.kl_ref_policy, stats.logprob - stats.ref_logprob))  # fmt: skip
    accuracy = float((ratio[:, 0] > ratio[:, 1]).float().mean()) if bool(ratio.any()) else float("nan")
    return {
        "seqkl_chosen": float(kl[:, 0].mean()),
        "seqkl_rejected": float(kl[:, 1].mean()),
        "accuracy": accuracy,
    }


def summary(curves: dict[str, list[dict[str, float]]]) -> str:
    """The table after the last step, SFT first."""
    ends = {"SFT": next(iter(curves.values()))[0], **{label: points[-1] for label, points in curves.items()}}
    rows = [
        [label, *("n/a" if x[key] != x[key] else f"{x[key]:.3f}" for key in COLUMNS)]
        for label, x in ends.items()
    ]
    note = "KL in nats per sequence; KL(SFT, policy) is exact, over the whole vocabulary at every token of the held-out responses."
    return table(["", *COLUMNS.values()], rows) + "\n" + note


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Gold reward against KL, and the growth of the divergence on both sides."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    panels = [
        ("kl", "gold_reward", "gold reward against KL"),
        ("step", "seqkl_chosen", "KL(SFT, policy) on chosen"),
        ("step", "seqkl_rejected", "KL(SFT, policy) on rejected"),
    ]
    for axis, (x, y, title) in zip(axes, panels):
        for label, points in curves.items():
            axis.plot([p[x] for p in points], [p[y] for p in points], marker="o", label=label)
        axis.set(
            title=title,
            xlabel=COLUMNS.get(x, x),
            ylabel="nats per sequence" if y != "gold_reward" else "gold reward",
        )
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
