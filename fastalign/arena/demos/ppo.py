"""`fastalign demo ppo`: SFT, a reward model from sampled pairs, then PPO twice: on the true reward, and on
the reward model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastalign.arena import review_task
from fastalign.arena.demos.common import (
    GOLD_REWARD,
    Clock,
    Start,
    machine,
    sampled_pairs,
    sampling_copy,
    shown_samples,
    start_from_sft,
)
from fastalign.cli.console import table
from fastalign.train.config import TrainConfig
from fastalign.train.offline import train
from fastalign.train.online import train_online
from fastalign.train.online_config import OnlineConfig

PROMPTS, HELD_OUT_PROMPTS, JUDGED = 384, 96, 256
REWARD_STEPS, REWARD_BATCH, REWARD_RATE = 40, 32, 3e-4
BATCH_SIZE, LEARNING_RATE = 64, 3e-4
KL_COEF = {"gold": 0.03, "model": 0.1}  # the reward model's scores have another scale than the gold reward
CURVE_POINTS, SHOWN = 6, 4
NAMES = {"sft": "SFT", "gold": "PPO, gold reward", "model": "PPO, reward model"}


def run(seed: int, steps: int, output: Path) -> dict[str, Any]:
    """The whole demonstration. Returns what metrics.json holds."""
    clock = Clock()
    seeds = [1000 * seed + i for i in range(8)]  # one for each use of chance
    start = start_from_sft(clock, seeds)
    reward_model = train_reward_model(clock, start, seeds, output)
    prompts = review_task.make_prompts(JUDGED, seeds[7])
    policies, curves, histories = {"sft": start.sft}, {}, {}
    first = {
        "step": 0,
        **judge_samples(start.sft, start, prompts, seeds[7]),
    }  # both runs begin with this very model
    for reward in ("gold", "model"):
        clock.stage(
            f"{NAMES[reward]}: {steps} steps of {BATCH_SIZE} samples, KL coefficient {KL_COEF[reward]}"
        )
        policies[reward], curve = copy.deepcopy(start.model), [first]
        source = {"reward": gold} if reward == "gold" else {}
        config = OnlineConfig(
            output=str(output / f"ppo_{reward}"),
            reward_model=None if reward == "gold" else str(output / "reward_model"),
            overwrite=True,
            seed=seed,
            batch_size=BATCH_SIZE,
            max_steps=steps,
            minibatches=2,
            rollout_epochs=2,
            learning_rate=LEARNING_RATE,
            kl_coef=KL_COEF[reward],
            max_new_tokens=review_task.MAX_NEW_TOKENS,
            sample_batch=BATCH_SIZE,
        )
        rows = [{"prompt": prompt} for prompt in review_task.make_prompts(PROMPTS, seeds[3])]
        judge = judging(policies[reward], start, prompts, seeds[7], max(1, steps // CURVE_POINTS), curve)
        result = train_online(
            "ppo",
            config,
            model=policies[reward],
            tokenizer=start.tokenizer,
            prompts=rows,
            callback=judge,
            **source,
        )
        curves[reward], histories[reward] = curve, result.history
    clock.stage(f"judgement: {JUDGED} samples of each policy")
    judged = {name: judge_policy(policy, start, prompts, seeds[7]) for name, policy in policies.items()}
    settings = {
        "seed": seed,
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "kl_coef": KL_COEF,
    }
    report = {"settings": settings, "machine": machine(), "sft_loss": start.sft_losses, "reward_model": reward_model, "policies": judged,
              "curves": curves, "histories": histories, "seconds": clock.stop()}  # fmt: skip
    (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, output / "curves.png")
    print(
        "\n"
        + summary(report)
        + f"\n\ncurves: {output / 'curves.png'}  numbers: {output / 'metrics.json'}  models: {output}/ppo_gold, ppo_model"
    )
    return report


def gold(completions: list[str]) -> list[float]:
    """The true reward, as the trainer calls a reward function."""
    return [review_task.gold_reward(text) for text in completions]


def train_reward_model(clock: Clock, start: Start, seeds: list[int], output: Path) -> dict[str, float]:
    """A Bradley-Terry reward model from the SFT model's samples, best against worst of four; its accuracy on
    pairs of other prompts."""
    clock.stage(
        f"reward model: {REWARD_STEPS} steps of {REWARD_BATCH} pairs, best against worst of 4 samples"
    )
    known, held_out = sampled_pairs(start, seeds, PROMPTS, HELD_OUT_PROMPTS)
    for part in (start.sft, start.tokenizer):
        part.save_pretrained(output / "sft")
    config = TrainConfig(
        model=str(output / "sft"),
        output=str(output / "reward_model"),
        overwrite=True,
        seed=seeds[0],
        batch_size=REWARD_BATCH,
        max_steps=REWARD_STEPS,
        learning_rate=REWARD_RATE,
        log_every=REWARD_STEPS,
    )
    metrics = train(
        "reward", config, tokenizer=start.tokenizer, examples=known, eval_examples=held_out
    ).metrics
    return {
        "pairs": len(known),
        "held_out_pairs": len(held_out),
        "held_out_accuracy": metrics["eval_accuracy"],
    }


def judging(
    policy: Any, start: Start, prompts: list[str], seed: int, every: int, curve: list[dict[str, float]]
) -> Callable[[Any], None]:
    """A callback that samples the policy every so many steps and scores the samples by the gold reward."""

    def judge(record: dict[str, Any]) -> None:
        if record["step"] % every == 0:
            curve.append(
                {"step": record["step"], **judge_samples(sampling_copy(policy), start, prompts, seed)}
            )

    return judge


def judge_samples(policy: Any, start: Start, prompts: list[str], seed: int) -> dict[str, float]:
    """Gold reward and KL to the SFT model from fresh samples. The same prompts and seed throughout: a model's
    points and its final row agree."""
    samples = review_task.generate(policy, start.tokenizer, prompts, seed=seed)
    return {
        "gold_reward": review_task.mean_gold_reward(samples),
        **review_task.sampled_kl(policy, start.sft, samples),
    }


def judge_policy(policy: Any, start: Start, prompts: list[str], seed: int) -> dict[str, Any]:
    """Gold reward and KL to the SFT model from fresh samples, and the first samples as text."""
    samples = review_task.generate(policy, start.tokenizer, prompts, seed=seed)
    return {
        "gold_reward": review_task.mean_gold_reward(samples),
        "kl": review_task.sampled_kl(policy, start.sft, samples),
        "finished": sum(s.completion[-1] == start.tokenizer.eos_token_id for s in samples) / len(samples),
        "distinct": len({s.text for s in samples}) / len(samples),
        "samples": [{"prompt": p, "text": s.text, "gold_reward": review_task.gold_reward(s.text)} for p, s in zip(prompts[:SHOWN], samples)],
    }  # fmt: skip


def summary(report: dict[str, Any]) -> str:
    """The table and samples that the demo prints."""
    policies = report["policies"]
    rows = [
        [
            "gold reward (true reward of fresh samples, 0 to 1)",
            *(f"{p['gold_reward']:.3f}" for p in policies.values()),
        ]
    ]
    for kind in ("k1", "k3"):
        label = f"KL to SFT, nats per sequence ({kind} on its own samples)"
        rows.append([label, *(f"{p['kl'][f'{kind}_per_sequence']:.2f}" for p in policies.values())])
    rows.append(
        ["share of samples that end by themselves", *(f"{p['finished']:.2f}" for p in policies.values())]
    )
    rows.append(["share of distinct samples", *(f"{p['distinct']:.2f}" for p in policies.values())])
    shown = shown_samples({NAMES[name]: p["samples"] for name, p in policies.items()})
    model, times = (
        report["reward_model"],
        [record["step_time"] for record in report["histories"]["gold"] if "step_time" in record],
    )
    return "\n".join([
        table(["", *(NAMES[name] for name in policies)], rows), "",
        GOLD_REWARD, "", "samples for the same prompts, each with its gold reward:", *shown, "",
        f"The reward model ranks {model['held_out_accuracy']:.0%} of {model['held_out_pairs']} held-out pairs "
        "as the gold reward does.",
        f"Median step of PPO on the gold reward: {sorted(times)[len(times) // 2]:.2f} s; all of it took "
        f"{report['seconds']['total']:.0f} s "
        f"({report['machine']['threads']} threads, load average {report['machine']['load_average'][0]:.1f} at "
        "the end).",
    ])  # fmt: skip


def plot(report: dict[str, Any], path: Path) -> None:
    """Gold reward, the rewards that PPO saw, and KL over the steps; gold reward over KL; the time per
    step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    (rewards, seen_gold, seen_model), (kl, frontier, times) = axes
    for name, curve in report["curves"].items():
        divergence, gold = (
            [point["k3_per_sequence"] for point in curve],
            [point["gold_reward"] for point in curve],
        )
        steps = [point["step"] for point in curve]
        rewards.plot(steps, gold, marker="o", label=NAMES[name])
        kl.plot(steps, divergence, marker="o", label=NAMES[name])
        frontier.plot(
            divergence, gold, marker="o", label=NAMES[name]
        )  # in the order of the steps, from SFT at KL 0
        history = [
            record
            for record in report["histories"][name]
            if "objective/scores" in record and "step_time" in record
        ]
        seen = seen_gold if name == "gold" else seen_model
        seen.plot([r["step"] for r in history], [r["objective/scores"] for r in history], label=NAMES[name])
        seconds = sorted(r["step_time"] for r in history)
        times.bar_label(times.bar([NAMES[name]], [seconds[len(seconds) // 2]], label=NAMES[name]), fmt="%.2f")
    for axis in (rewards, frontier):
        axis.axhline(report["policies"]["sft"]["gold_reward"], linestyle="--", color="grey", label="SFT")
    rewards.set(title="gold reward of fresh samples", ylim=(0, 1), xlabel="PPO step")
    seen_gold.set(title="reward that PPO saw: gold reward", ylim=(0, 1), xlabel="PPO step")
    seen_model.set(title="reward that PPO saw: reward model's score", xlabel="PPO step")
    kl.set(title="KL to SFT, nats per sequence (k3)", xlabel="PPO step")
    frontier.set(
        title="gold reward over KL, from step 0 on", xlabel="KL to SFT, nats per sequence (k3)", ylim=(0, 1)
    )
    times.set(title="seconds per step (median), sampling included")
    for axis in axes.flat:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
