"""This tree against another one, call by call in turns: `python benchmarks/two_trees.py OTHER_TREE OUT.json`.

One process for each tree stays up; a call is timed in the one and at once in the other, so that both see the
machine in the same state, and the ratio is the median over the turns. Small inputs (tests/every_call.py) show
the host time of a call, large ones the kernels. Both trees need their extension built in place."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Size(NamedTuple):
    """How a set of calls is timed."""

    turns: int  # of both trees
    seconds: float  # of calls, in each tree and turn
    threads: int
    unit: float  # of a second


SIZES = {"small": Size(15, 0.06, 1, 1e-6), "large": Size(21, 0.25, 2, 1e-3)}


def small_calls() -> dict[str, Callable[[], Any]]:
    import every_call

    return every_call.calls(every_call.inputs())


def large_calls() -> dict[str, Callable[[], Any]]:
    """The ops over vocabulary rows and the packed ones, at the shapes of `fastalign bench --quick`."""
    import torch

    import fastalign

    generator = torch.Generator().manual_seed(0)
    rows, vocab = 128, 128256
    logits, ref = (
        torch.randn(rows, vocab, generator=generator).bfloat16().requires_grad_() for _ in range(2)
    )
    labels = torch.randint(vocab, (rows,), generator=generator)
    starts = torch.arange(0, 129 * 256, 256)
    chosen, ref_tokens = (torch.randn(128 * 256, generator=generator) - 2 for _ in range(2))
    rewards, values = (torch.randn(64 * 4096, generator=generator) for _ in range(2))
    long_starts = torch.arange(0, 65 * 4096, 4096)
    tokens = (torch.randn(64 * 1024, generator=generator) * 0.1 - 2).requires_grad_()
    old_tokens, advantages = tokens.detach() + 0.01, torch.randn(64 * 1024, generator=generator)

    def backward() -> None:
        fastalign.token_logprobs(logits, labels).sum().backward()
        logits.grad = None

    def policy() -> None:
        loss = fastalign.policy_loss(tokens, old_tokens, advantages, aggregation="token_sum")
        getattr(loss, "loss", loss).backward()

    @torch.no_grad()
    def kl() -> None:
        fastalign.token_kl(logits, ref)

    return {
        "token_logprobs": torch.no_grad()(lambda: fastalign.token_logprobs(logits, labels)),
        "token_logprobs and backward": backward,
        "token_stats logprob, entropy": torch.no_grad()(
            lambda: fastalign.token_stats(logits, labels, outputs=("logprob", "entropy"))
        ),
        "token_kl": kl,
        "sequence_sum": lambda: fastalign.sequence_sum(chosen, starts),
        "preference_loss dpo": lambda: fastalign.preference_loss(chosen, ref_tokens, starts),
        "gae": lambda: fastalign.gae(rewards, values, long_starts),
        "policy_loss and backward": policy,
    }


def serve(size: Size, calls: dict[str, Callable[[], Any]]) -> None:
    """Names on standard input, medians in seconds on standard output."""
    for call in calls.values():
        for _ in range(3):
            call()
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        call, samples = calls[line.rstrip("\n")], []
        end = time.perf_counter() + size.seconds
        while not samples or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        print(statistics.median(samples), flush=True)


class Worker:
    """The process of one tree."""

    def __init__(self, tree: Path, name: str):
        if not (tree / "tests" / "every_call.py").is_file():
            sys.exit(f"two_trees: {tree} is no checkout of fastalign (it has no tests/every_call.py)")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}",
            "OMP_NUM_THREADS": str(SIZES[name].threads),
            # Memory that is freed stays with the process: what is compared is the kernels, not page faults.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        }
        command = [sys.executable, "-W", "ignore", __file__, "--serve", name]
        self.tree = tree
        self.process = subprocess.Popen(
            command, env=environment, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.names: list[str] = json.loads(self.read())

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"two_trees: {self.tree} cannot be measured (its process said why)")
        return line

    def seconds(self, name: str) -> float:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self.read())


def compare(name: str, other: Path) -> dict[str, Any]:
    """call -> both medians and the median of the turns' ratios"""
    before, after = (Worker(tree, name) for tree in (other, ROOT))
    report = {}
    for call in [x for x in after.names if x in before.names]:
        turns = [(before.seconds(call), after.seconds(call)) for _ in range(SIZES[name].turns)]
        ratios = sorted(b / a for a, b in turns)
        quarter = len(ratios) // 4
        report[call] = {
            "before": round(statistics.median(a for a, _ in turns) / SIZES[name].unit, 2),
            "after": round(statistics.median(b for _, b in turns) / SIZES[name].unit, 2),
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)],
        }
        print(f"{report[call]['ratio']:6.3f}  {name} {call}", flush=True)
    for worker in (before, after):
        worker.process.stdin.close()
        worker.process.wait()
    return report


def main(other: Path, out: Path) -> None:
    report = {}
    for name, size in SIZES.items():
        calls = compare(name, other)
        unit = {1e-6: "us", 1e-3: "ms"}[size.unit]
        middle = statistics.median(call["ratio"] for call in calls.values())
        report[name] = {"unit": unit, "threads": size.threads, "ratio_median": middle, "calls": calls}
        print(f"{name}: {len(calls)} calls, median {middle:.3f}")
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) == 3 and sys.argv[1] == "--serve":
        serve(SIZES[sys.argv[2]], {"small": small_calls, "large": large_calls}[sys.argv[2]]())
    elif len(sys.argv) == 3:
        main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
