"""`fastalign demo`: from random weights through SFT to DPO on a task whose true reward is known, in under three minutes on two cores.

Nothing is downloaded. The task, model and tokenizer are those of `fastalign.train.sandbox`; training is `fastalign.train.train`."""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastalign
from fastalign.console import Parser, integer, table
from fastalign.train.errors import TrainingError, UserError

SFT_STEPS, PROMPTS, HELD_OUT_PROMPTS, JUDGED = 220, 384, 96, 256
BETA, LEARNING_RATE, BATCH_SIZE = 0.5, 1e-4, 32
CURVE_POINTS, CURVE_SAMPLES, SHOWN = 6, 128, 4


def main(argv: list[str]) -> int:
    """0: done; 1: training broke off; 2: a wrong option or output directory."""
    parser = Parser(prog="fastalign demo", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False)
    parser.add_argument("--seed", type=integer(0, 2**31), default=0, help="seed of data, weights, sampling and training (default: 0)")
    parser.add_argument("--steps", type=integer(1), default=60, help="optimizer steps of DPO (default: 60)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fastalign-demo"),
        metavar="DIR",
        help="directory for curves.png, metrics.json and the model (default: ./fastalign-demo)",
    )
    arguments = parser.parse_args(argv)
    try:
        _prepare(arguments.output)
        run(arguments.seed, arguments.steps, arguments.output)
    except (UserError, TrainingError) as error:
        print(f"fastalign demo: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def _prepare(output: Path) -> None:
    try:
        import matplotlib  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(f"the demo needs transformers, tokenizers and matplotlib: pip install 'fastalign[train]' ({error})") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the output directory {output}: {error.strerror}") from None
    if not os.access(output, os.W_OK):
        raise UserError(f"cannot write into the output directory {output}")


def run(seed: int, steps: int, output: Path) -> dict[str, Any]:
    """The whole demonstration. Returns what metrics.json holds."""
    from fastalign.train import comparison, sandbox
    from fastalign.train.config import TrainConfig
    from fastalign.train.offline import train_dpo

    clock = _Clock()
    seeds = [1000 * seed + i for i in range(8)]  # one for each use of chance
    tokenizer = sandbox.make_tokenizer()
    model = sandbox.make_model(tokenizer, seeds[0])
    clock.stage(f"SFT: {sum(p.numel() for p in model.parameters()):,} parameters, byte tokenizer, {SFT_STEPS} steps on generated reviews")
    sft_losses = sandbox.train_sft(model, tokenizer, sandbox.make_reviews(4000, seeds[1]), steps=SFT_STEPS, seed=seeds[2])
    sft = copy.deepcopy(model).requires_grad_(False)

    clock.stage(f"preferences: best against worst of 4 samples for each of {PROMPTS + HELD_OUT_PROMPTS} prompts")
    pairs = sandbox.sample_pairs(sft, tokenizer, sandbox.make_prompts(PROMPTS, seeds[3]), seed=seeds[4])
    held_out = sandbox.sample_pairs(sft, tokenizer, sandbox.make_prompts(HELD_OUT_PROMPTS, seeds[5]), seed=seeds[6])
    if not pairs or not held_out:
        raise TrainingError("the samples give no pairs with different rewards")
    prompts = sandbox.make_prompts(JUDGED, seeds[7])

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
        """At every evaluation, sample the policy and score the samples."""
        if "eval_loss" in record:
            policy = copy.deepcopy(model)
            policy.set_attn_implementation("sdpa")  # the trainer's attention serves packed sequences only
            samples = sandbox.generate(policy, tokenizer, prompts[:CURVE_SAMPLES], seed=seeds[7])
            curve.append(
                {"step": record["step"], "gold_reward": sandbox.mean_gold_reward(samples), **sandbox.sampled_kl(policy, sft, samples)}
            )

    result = train_dpo(config, model=model, tokenizer=tokenizer, examples=pairs, eval_examples=held_out, callback=judge)

    clock.stage(f"judgement: {JUDGED} samples of each policy, {len(held_out)} held-out pairs")
    before, after = (judge_policy(policy, sft, tokenizer, prompts, held_out, seeds[7]) for policy in (sft, model))
    clock.stage("time per step: fused path and plain PyTorch path in turns, then the loss head alone")
    timing = {
        "step": comparison.time_steps(sft, pairs, config),
        "head": comparison.time_head_of(sft, pairs, config),
        "head_large_vocabulary": comparison.time_head_large(device=next(sft.parameters()).device),
    }
    settings = {"seed": seed, "steps": steps, "beta": BETA, "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE, "pairs": len(pairs)}
    report = {"settings": settings, "machine": _machine(), "sft_loss": sft_losses, "before": before, "after": after, "curve": curve,
              "timing": timing, "history": result.history}  # fmt: skip
    report["seconds"] = clock.stop()
    (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, output / "curves.png")
    print("\n" + summary(report) + f"\n\ncurves: {output / 'curves.png'}  numbers: {output / 'metrics.json'}  model: {output / 'model'}")
    return report


def _machine() -> dict[str, Any]:
    """What the times belong to."""
    return {
        "fastalign": fastalign.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "backend": fastalign.explain("token_logprobs", torch.empty(1, 1)).splitlines()[0].rpartition(": ")[2],
    }


class _Clock:
    """Prints each stage as it begins and keeps the seconds of each."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.name, self.seconds = "", {}

    def stage(self, title: str) -> None:
        self._close()
        self.name = title.split(":")[0]
        print(f"\n[{time.perf_counter() - self.started:5.1f} s] {title}", flush=True)

    def _close(self) -> None:
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = now - self.last
        self.last = now

    def stop(self) -> dict[str, float]:
        self._close()
        return self.seconds | {"total": time.perf_counter() - self.started}


def judge_policy(policy: Any, reference: Any, tokenizer: Any, prompts: list[str], pairs: list[Any], seed: int) -> dict[str, Any]:
    """Gold reward and KL to the reference from fresh samples, accuracies on held-out pairs, and the first samples as text."""
    from fastalign.train import sandbox

    samples = sandbox.generate(policy, tokenizer, prompts, seed=seed)
    sides = [[sandbox.Sample(pair.prompt.tolist(), side.tolist(), "") for side in pair.completions] for pair in pairs]
    flat = [sample for both in sides for sample in both]
    logps, ref_logps = (torch.stack([s.sum() for s in sandbox.score_samples(m, flat)]).view(-1, 2) for m in (policy, reference))
    rewards = BETA * (logps - ref_logps)
    return {
        "gold_reward": sandbox.mean_gold_reward(samples),
        "kl": sandbox.sampled_kl(policy, reference, samples),
        # Before training every implicit reward is 0, so there is nothing to compare.
        "reward_accuracy": float((rewards[:, 0] > rewards[:, 1]).float().mean()) if bool(rewards.any()) else None,
        "logprob_accuracy": float((logps[:, 0] > logps[:, 1]).float().mean()),
        "finished": sum(s.completion[-1] == tokenizer.eos_token_id for s in samples) / len(samples),
        "samples": [{"prompt": prompt, "text": s.text, "gold_reward": sandbox.gold_reward(s.text)} for prompt, s in zip(prompts[:SHOWN], samples)],
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
                [f"KL to SFT, nats per {per} ({kind} on its own samples)", *(number(x["kl"][f"{kind}_per_{per}"]) for x in (before, after))]
            )
    step, head, large = timing["step"], timing["head"], timing["head_large_vocabulary"]
    times = [
        [f"optimizer step, {report['settings']['batch_size']} pairs (policy and reference forward, backward, AdamW)", step],
        [f"of it the policy's loss head, [{head['tokens']}, {head['vocabulary']}] {head['dtype']} logits", head],
        [f"loss head at a usual vocabulary, [{large['tokens']}, {large['vocabulary']}] {large['dtype']} logits", large],
    ]
    timed = [[name, f"{t['fused_ms']:.1f}", f"{t['plain_ms']:.1f}", f"{t['ratio']:.2f}"] for name, t in times]
    texts = [f"  {which}: {x['gold_reward']:.2f} {x['text'].strip()!r}" for pair in zip(before["samples"], after["samples"])
             for which, x in zip(("SFT", "DPO"), pair)]  # fmt: skip
    share = head["fused_ms"] / step["fused_ms"]
    return "\n".join([
        table(["", "SFT", "DPO"], lines), "(before training all implicit rewards are 0: no accuracy)", "",
        "samples for the same prompts, each with its gold reward:", *texts, "",
        table([f"median milliseconds on backend {report['machine']['backend']}", "fused", "plain", "plain / fused"], timed),
        f"With {head['vocabulary']} tokens in the vocabulary the transformer takes {1 - share:.0%} of a fused step, so the whole step shows little;",
        "the last row is the same loss head where the vocabulary has its usual size. Losses of the two paths differ by at most "
        f"{step['largest_loss_difference']:.1e}.",
        f"took {report['seconds']['total']:.0f} s",
    ])  # fmt: skip


def plot(report: dict[str, Any], path: Path) -> None:
    """Training curves: loss, rewards, gold reward and KL over the steps of DPO."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history, curve = report["history"], report["curve"]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    panels = [
        ("loss", [("loss", "training"), ("eval_loss", "held out")]),
        ("implicit reward", [("rewards/margins", "margin, training"), ("eval_rewards/margins", "margin, held out"),
                             ("eval_rewards/accuracies", "accuracy, held out")]),
    ]  # fmt: skip
    for axis, (title, series) in zip(axes[0], panels):
        for key, label in series:
            points = [(record["step"], record[key]) for record in history if key in record]
            axis.plot(*zip(*points), label=label, marker="o" if key.startswith("eval_") else None)
        axis.set_title(title)
    steps = [point["step"] for point in curve]
    axes[1][0].plot(steps, [point["gold_reward"] for point in curve], marker="o", label="policy samples")
    axes[1][0].axhline(report["before"]["gold_reward"], linestyle="--", color="grey", label="SFT")
    axes[1][0].set(title="gold reward", ylim=(0, 1))
    for kind in ("k1", "k3"):
        axes[1][1].plot(steps, [point[f"{kind}_per_sequence"] for point in curve], marker="o", label=kind)
    axes[1][1].set_title("KL to SFT, nats per sequence")
    for axis in axes.flat:
        axis.set_xlabel("DPO step")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
