"""`fastalign bench` in this tree and another one, in turns: `python benchmarks/two_trees.py OTHER_TREE
OUT.json`. Ratios of the medians' medians, by op and shape, of the lines that both have; the read bandwidth of
every run beside them, since a machine's changes. Both trees need their extension built in place."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
OURS = "fastalign cpu"


def bench(tree: Path) -> dict[str, Any]:
    """The report of one run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [
            sys.executable,
            "-m",
            "fastalign",
            "bench",
            "--quick",
            "--no-compile",
            "--backend",
            "cpu",
            "--json",
            str(path),
        ]
        skip = [] if tree != ROOT else [x for op in shared_ops() for x in ("--op", op)]
        done = subprocess.run(
            [*command, *skip],
            env={**os.environ, "PYTHONPATH": str(tree)},
            cwd=tree,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(
                f"two_trees: {tree} cannot be measured: "
                f"{(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
            )
        return json.loads(path.read_text())


def shared_ops() -> list[str]:
    """Without the fused head, which older trees do not have."""
    sys.path.insert(0, str(ROOT))
    from fastalign.bench.shapes import HEAD_OPS, OPS

    return [op for op in OPS if op not in HEAD_OPS]


def times(report: dict[str, Any]) -> dict[str, float]:
    """op and shape -> milliseconds of ours."""
    return {
        f"{case['op']} {case['shape']}": line["ms"]
        for case in report["cases"]
        for line in case["results"]
        if line["name"] == OURS and line["ms"]
    }


def main(other: str, out: str) -> None:
    runs = [(times(bench(Path(other).resolve())), times(bench(ROOT))) for _ in range(ROUNDS)]
    names = set.intersection(*(set(before) & set(after) for before, after in runs))
    cases = {
        name: {
            "before_ms": statistics.median(before[name] for before, _ in runs),
            "after_ms": statistics.median(after[name] for _, after in runs),
            "ratio": round(statistics.median(after[name] / before[name] for before, after in runs), 3),
            "ratios": [round(after[name] / before[name], 3) for before, after in runs],
        }
        for name in sorted(names)
    }
    ratios = [case["ratio"] for case in cases.values()]
    Path(out).write_text(
        json.dumps({"ratio_median": statistics.median(ratios), "cases": cases}, indent=1) + "\n",
        encoding="utf-8",
    )
    for name, case in cases.items():
        print(f"{case['ratio']:6.3f}  {name}")
    print(f"median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
