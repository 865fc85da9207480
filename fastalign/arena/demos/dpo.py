"""`fastalign demo dpo`: SFT, then DPO on sampled pairs, in under three minutes on two cores; and what the
fused path saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastalign.arena import comparison, review_task
from fastalign.arena.demos.common import (
    GOLD_REWARD,
    Clock,
    machine,
    sampled_pairs,
    sampling_copy,
    shown_samples,
    start_from_sft,
)
from fastalign.cli.console import table
from fastalign.train.config import TrainConfig
from fastalign.train.offline import train_dpo

PROMPTS, HELD_OUT_PROMPTS, JUDGED = 384, 96, 256
BETA, LEARNING_RATE, BATCH_SIZE = 0.5, 1e-4, 32
CURVE_POINTS, SHOWN = 4, 4


def run(seed: int, steps: int, output: Path) -> dict[str, Any]:
    """The whole demonstration. Returns what metrics.json holds."""
    clock = Clock()
    seeds = [1000 * seed + i for i in range(8)]  # one for each use of chance
    start = model, sft, tokenizer, sft_losses = start_from_sft(clock, seeds)

    clock.stage(
        f"preferences: best against worst of 4 samples for each of {PROMPTS + HELD_OUT_PROMPTS} prompts"
    )
    pairs, held_out = sampled_pairs(start, seeds, PROMPTS, HELD_OUT_PROMPTS)
    prompts = review_task.make_prompts(JUDGED, seeds[7])

    clock.stage(f"DPO: {steps} steps of {BATCH_SIZE} pairs, beta {BETA}")
    config = TrainConfig(
        output=str(output / "model"),
        overwrite=True,
        loss_options={"beta": BETA},
        learning_rate=LEARNING_RATE,
        seed=seed,
        batch_size=BATCH_SIZE,
        max_steps=steps,
        precompute_ref=True,
        eval_every=max(1, steps // CURVE_POINTS),
    )
    curve: list[dict[str, float]] = []

    def judge(record: dict[str, Any]) -> None:
        """At every evaluation, sample the policy and score the samples: the prompts and the seed of the
        judgement, whose SFT column is step 0."""
        if "eval_loss" in record:
            policy = sampling_copy(model)
            samples = review_task.generate(policy, tokenizer, prompts, seed=seeds[7])
            curve.append(
                {
                    "step": record["step"],
                    "gold_reward": review_task.mean_gold_reward(samples),
                    **review_task.sampled_kl(policy, sft, samples),
                }
            )

    result = train_dpo(
        config, model=model, tokenizer=tokenizer, examples=pairs, eval_examples=held_out, callback=judge
    )

    clock.stage(f"judgement: {JUDGED} samples of each policy, {len(held_out)} held-out pairs")
    before, after = (
        judge_policy(policy, sft, tokenizer, prompts, held_out, seeds[7]) for policy in (sft, model)
    )
    clock.stage("time per step: fused path and plain PyTorch path in turns, then the loss head alone")
    timing = {
        "step": comparison.time_steps(sft, pairs, config),
        "head": comparison.time_head_of(sft, pairs, config),
        "head_large_vocabulary": comparison.time_head_large(device=next(sft.parameters()).device),
    }
    settings = {
        "seed": seed,
        "steps": steps,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "pairs": len(pairs),
    }
    report = {"settings": settings, "machine": machine(), "sft_loss": sft_losses, "before": before, "after": after, "curve": curve,
              "timing": timing, "history": result.history}  # fmt: skip
    report["seconds"] = clock.stop()
    (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, output / "curves.png")
    print(
        "\n"
        + summary(report)
        + f"\n\ncurves: {output / 'curves.png'}  numbers: {output / 'metrics.json'}  model: {output / 'model'}"
    )
    return report


def judge_policy(
    policy: Any, reference: Any, tokenizer: Any, prompts: list[str], pairs: list[Any], seed: int
) -> dict[str, Any]:
    """Gold reward and KL to the reference from fresh samples, accuracies on held-out pairs, and the first
    samples as text."""
    samples = review_task.generate(policy, tokenizer, prompts, seed=seed)
    sides = [
        [review_task.Sample(pair.prompt.tolist(), side.tolist(), "") for side in pair.completions]
        for pair in pairs
    ]
    flat = [sample for both in sides for sample in both]
    logps, ref_logps = (
        torch.stack([s.sum() for s in review_task.score_samples(m, flat)]).view(-1, 2)
        for m in (policy, reference)
    )
    rewards = BETA * (logps - ref_logps)
    return {
        "gold_reward": review_task.mean_gold_reward(samples),
        "kl": review_task.sampled_kl(policy, reference, samples),
        # Before training every implicit reward is 0, so there is nothing to compare.
        "reward_accuracy": float((rewards[:, 0] > rewards[:, 1]).float().mean()) if bool(rewards.any()) else None,
        "logprob_accuracy": float((logps[:, 0] > logps[:, 1]).float().mean()),
        "finished": sum(s.completion[-1] == tokenizer.eos_token_id for s in samples) / len(samples),
        "samples": [{"prompt": prompt, "text": s.text, "gold_reward": review_task.gold_reward(s.text)} for prompt, s in zip(prompts[:SHOWN], samples)],
    }  # fmt: skip


def summary(report: dict[str, Any]) -> str:
    """The tables and samples that the demo prints."""
    before, after, timing = report["before"], report["after"], report["timing"]

    def number(x: float | None) -> str:
        return "n/a" if x is None else f"{x:.3f}"

    rows = [("gold reward (true reward of fresh samples, 0 to 1)", "gold_reward")]
    rows += [
        ("reward accuracy on held-out pairs (implicit reward)", "reward_accuracy"),
        ("log-prob accuracy on held-out pairs", "logprob_accuracy"),
    ]
    lines = [[name, number(before[key]), number(after[key])] for name, key in rows]
    for kind in ("k1", "k3"):
        for per in ("token", "sequence"):
            lines.append(
                [
                    f"KL to SFT, nats per {per} ({kind} on its own samples)",
                    *(number(x["kl"][f"{kind}_per_{per}"]) for x in (before, after)),
                ]
            )
    step, head, large = timing["step"], timing["head"], timing["head_large_vocabulary"]
    times = [
        [
            f"optimizer step, {report['settings']['batch_size']} pairs (policy and reference forward, "
            "backward, AdamW)",
            step,
        ],
        [
            f"of it the policy's loss head, [{head['tokens']}, {head['vocabulary']}] {head['dtype']} logits",
            head,
        ],
        [
            f"loss head at a usual vocabulary, [{large['tokens']}, {large['vocabulary']}] {large['dtype']} "
            "logits",
            large,
        ],
    ]
    timed = [[name, f"{t['fused_ms']:.1f}", f"{t['plain_ms']:.1f}", f"{t['ratio']:.2f}"] for name, t in times]
    shown = shown_samples({"SFT": before["samples"], "DPO": after["samples"]})
    share = head["fused_ms"] / step["fused_ms"]
    return "\n".join([
        table(["", "SFT", "DPO"], lines), "(before training all implicit rewards are 0: no accuracy)", "",
        GOLD_REWARD, "", "samples for the same prompts, each with its gold reward:", *shown, "",
        table([f"median milliseconds on backend {report['machine']['backend']}", "fused", "plain", "plain / fused"], timed),
        f"With {head['vocabulary']} tokens in the vocabulary the transformer takes {1 - share:.0%} of a fused "
        "step, so the whole step shows little;",
        "the last row is the same loss head where the vocabulary has its usual size. Losses of the two paths "
        "differ by at most "
        f"{step['largest_loss_difference']:.1e}.",
        f"took {report['seconds']['total']:.0f} s",
    ])  # fmt: skip


def plot(report: dict[str, Any], path: Path) -> None:
    """Over the steps of DPO: loss, margin, accuracy, gold reward, KL; and the time per step, fused and
    plain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history, curve, timing = report["history"], report["curve"], report["timing"]
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    panels = {
        "loss": {"loss": "training", "eval_loss": "held out"},
        "margin of the implicit rewards": {"rewards/margins": "training", "eval_rewards/margins": "held out"},
        "accuracy of the implicit rewards": {
            "rewards/accuracies": "training",
            "eval_rewards/accuracies": "held out",
        },
    }
    for axis, (title, series) in zip(axes[0], panels.items()):
        for key, label in series.items():
            points = [(record["step"], record[key]) for record in history if key in record]
            held_out = key.startswith("eval_")
            axis.plot(
                *zip(*points), label=label, marker="o" if held_out else None, alpha=1 if held_out else 0.5
            )
        axis.set_title(title)
    gold, kl, times = axes[1]
    steps = [point["step"] for point in curve]
    gold.plot(steps, [point["gold_reward"] for point in curve], marker="o", label="policy's samples")
    gold.axhline(report["before"]["gold_reward"], linestyle="--", color="grey", label="SFT")
    gold.set(title="gold reward (true reward of fresh samples)", ylim=(0, 1))
    for kind in ("k1", "k3"):
        kl.plot(steps, [point[f"{kind}_per_sequence"] for point in curve], marker="o", label=kind)
    kl.set_title("KL to SFT, nats per sequence")
    axes[0][2].set_ylim(0, 1.05)
    for axis in (*axes[0], gold, kl):
        axis.set_xlabel("DPO step")
    rows = {
        "whole step": timing["step"],
        "its loss head": timing["head"],
        "loss head,\nusual vocabulary": timing["head_large_vocabulary"],
    }
    for shift, which in ((-0.2, "fused"), (0.2, "plain")):
        bars = times.bar(
            [i + shift for i in range(len(rows))], [t[f"{which}_ms"] for t in rows.values()], 0.4, label=which
        )
        times.bar_label(bars, fmt="%.0f")
    times.set(title="milliseconds per step (median)", xticks=range(len(rows)), xticklabels=rows)
    for axis in axes.flat:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
