"""What several seeds of a demonstration end with: `python benchmarks/demo_seeds.py OUT.json RUN/metrics.json
...` writes each seed's final numbers to one small file and prints the README's table, mean and range. The
runs: `fastalign demo tdpo|ppo --seed N --output RUN`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# key -> the table's heading; KL in nats per sequence
COLUMNS = {
    "gold_reward": "true reward",
    "kl": "KL(policy, SFT) on own samples, k3",
    "seqkl_chosen": "KL(SFT, policy) on chosen",
    "seqkl_rejected": "KL(SFT, policy) on rejected",
}
PPO = {"sft": "SFT", "gold": "PPO on the true reward", "model": "PPO on the reward model"}


def finals(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """policy -> its final numbers, from the metrics.json of `demo tdpo` or `demo ppo`."""
    if "contestants" in report:
        curves = report["curves"]
        first = next(iter(curves.values()))[0]
        return {"SFT": first, **{label: points[-1] for label, points in curves.items()}}
    policies = report.get("policies") or sys.exit(
        "demo_seeds: a run is neither of `demo tdpo` nor of `demo ppo`"
    )
    return {
        PPO[name]: {"gold_reward": p["gold_reward"], "kl": p["kl"]["k3_per_sequence"]}
        for name, p in policies.items()
    }


def table(seeds: list[dict[str, Any]]) -> str:
    """One line per policy: the mean over the seeds, and their range."""
    policies = {name: [seed["policies"][name] for seed in seeds] for name in seeds[0]["policies"]}
    keys = [key for key in COLUMNS if all(key in numbers for every in policies.values() for numbers in every)]
    lines = ["| | " + " | ".join(COLUMNS[key] for key in keys) + " |", "|---" * (1 + len(keys)) + "|"]
    for name, every in policies.items():
        cells = []
        for key in keys:
            values = [numbers[key] for numbers in every]
            digits = 3 if key == "gold_reward" else 2
            low, high = min(values), max(values)
            spread = f" ({low:.{digits}f} to {high:.{digits}f})" if high > low else ""
            cells.append(f"{sum(values) / len(values):.{digits}f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(out: str, *runs: str) -> None:
    try:
        reports = [json.loads(Path(run).read_text(encoding="utf-8")) for run in runs]
    except (OSError, ValueError) as error:
        sys.exit(
            f"demo_seeds: {error}; legal: the metrics.json of `fastalign demo tdpo` or `fastalign demo ppo`"
        )
    if len({tuple(finals(report)) for report in reports}) > 1:
        sys.exit("demo_seeds: the runs are of different demonstrations")
    kept = ("gold_reward", "kl", "seqkl_chosen", "seqkl_rejected", "accuracy")
    seeds = [
        {
            "settings": report["settings"],
            "machine": report["machine"],
            "seconds": report["seconds"]["total"],
            "policies": {
                name: {k: v for k, v in numbers.items() if k in kept}
                for name, numbers in finals(report).items()
            },
        }
        for report in reports
    ]
    Path(out).write_text(json.dumps({"seeds": seeds}, indent=1) + "\n", encoding="utf-8")
    print(table(seeds))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
