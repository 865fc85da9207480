"""Microseconds per call of every public function on small CPU inputs (tests/every_call.py), in this tree and another one:
`python benchmarks/host_time.py OTHER_TREE OUT.json`. Processes of both in turns, medians in each and over
them; both trees need their extension built in place."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROCESSES, CALLS = 5, 120


def measure() -> None:
    """Of the tree that is on the path: prints name -> microseconds as JSON."""
    warnings.simplefilter("ignore")
    import every_call

    times = {}
    for name, call in every_call.calls(every_call.inputs()).items():
        samples = []
        for _ in range(20 + CALLS):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        times[name] = statistics.median(samples[20:]) * 1e6
    print(json.dumps(times))


def times_of(tree: Path) -> dict[str, float]:
    if not (tree / "tests" / "every_call.py").is_file():
        sys.exit(f"host_time: {tree} is no checkout of fastalign (it has no tests/every_call.py)")
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "measure"]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"host_time: {tree} cannot be measured: "
            f"{(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main(other: str, out: str) -> None:
    pairs = [(times_of(Path(other).resolve()), times_of(ROOT)) for _ in range(PROCESSES)]
    calls = {
        name: {
            "before_us": round(statistics.median(before[name] for before, _ in pairs), 1),
            "after_us": round(statistics.median(after[name] for _, after in pairs), 1),
            "ratio": round(statistics.median(after[name] / before[name] for before, after in pairs), 3),
        }
        for name in pairs[0][0].keys() & pairs[0][1].keys()
    }
    ratios = [call["ratio"] for call in calls.values()]
    report = {"ratio_median": statistics.median(ratios), "calls": dict(sorted(calls.items()))}
    Path(out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{len(calls)} calls, ratio {min(ratios):.2f} to {max(ratios):.2f}, median "
        f"{statistics.median(ratios):.3f}"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    elif len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
