"""What the files of the GPU gate say, as Markdown: `gpu_report.py FOLDER ...`, folders of one or both stages.

Tests passed and failed per backend, every failed test by name; bandwidth by op, shape and backend with its
share of the measured copy and read; the sweep and the variants beside their baseline; hardware counters per
kernel. Lines that were cut off are left out, and what did not run is named."""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from gpu_lines import read_lines

Lines = list[dict[str, Any]]
WORST = ("error", "failed", "skipped", "passed")  # of several lines about one test


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; columns after the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def stage(report: dict[str, Any]) -> str:
    machine = report["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "python") if name in machine)
    end = "finished" if report["finished"] else f"NOT finished ({report.get('interrupted', 'killed')})"
    head = f"## Stage {report['stage']}: {machine['device']}, {facts}\n\nrevision {report['revision']}, {report['started']}, {report['seconds']} s, {end}"
    rows = [[step["step"], step["outcome"], f"{step['seconds']:.1f}"] for step in report["steps"]]
    planned = (
        {name for name, _ in report["plan"]}
        - {step["step"] for step in report["steps"]}
        - {"describe the machine"}
    )
    rows += [[name, "not reached", ""] for name, _ in report["plan"] if name in planned]
    return f"{head}\n\n{table(['step', 'outcome', 's'], rows)}"


def outcomes(lines: Lines) -> dict[tuple[str, str], dict[str, Any]]:
    """(step, test) -> the line with its worst outcome; tests that were announced and have no line are "not
    run"."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        for test in line.get("collected", ()):
            found.setdefault(
                (line["step"], test),
                {"step": line["step"], "test": test, "outcome": "not run", "backend": _backend(test)},
            )
        if "test" not in line:
            continue
        key, before = (line["step"], line["test"]), found.get((line["step"], line["test"]))
        rank = WORST.index(line["outcome"])
        if before is None or before["outcome"] == "not run" or rank < WORST.index(before["outcome"]):
            found[key] = line
    return found


def _backend(test: str) -> str | None:
    """As gpu_pytest_log.backend_of, without pytest."""
    parameters = re.search(r"\[(.*)\]$", test)
    return next(
        (
            p
            for p in (parameters[1].split("-") if parameters else ())
            if p in ("reference", "cpu", "triton", "cuda")
        ),
        None,
    )


def tests(lines: Lines) -> str:
    found = outcomes(lines)
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for line in found.values():
        counts[line["step"], str(line["backend"])][line["outcome"]] += 1
    kinds = ("passed", "failed", "error", "skipped", "not run")
    rows = [
        [f"{step}, {backend}", *(str(count[kind]) for kind in kinds)]
        for (step, backend), count in sorted(counts.items())
    ]
    parts = ["## Tests\n", table(["", *kinds], rows)]
    for kind in kinds[1:]:
        named = sorted((step, test, line) for (step, test), line in found.items() if line["outcome"] == kind)
        if named:
            parts += [f"\n{kind}:\n", *(f"- {step}: {test}{_reason(line)}" for step, test, line in named)]
    recorded = {name: value for line in found.values() for name, value in line.get("properties", {}).items()}
    if recorded:
        parts += ["\nrecorded: " + ", ".join(f"{name} {value}" for name, value in sorted(recorded.items()))]
    return "\n".join(parts)


def _reason(line: dict[str, Any]) -> str:
    """The last line of the failure that says something."""
    words = [text.strip() for text in line.get("text", "").splitlines() if text.strip()]
    errors = [text for text in words if text.startswith("E ")]
    return f": {(errors or words)[-1][:200]}" if words else ""


def bandwidth(lines: Lines) -> str:
    """Table by op, shape and backend."""
    top = [line for line in lines if line["op"] == "ceilings"][-1:]
    parts = ["## Bandwidth\n"]
    if top:
        parts.append(f"{top[0]['device']}: copies {top[0]['copy_gbs']:.0f} GB/s (read + written), reads {top[0]['read_gbs']:.0f} GB/s, "
                     f"bf16 matmul {top[0]['matmul_tflops']:.0f} TFLOP/s\n")  # fmt: skip
    rows, checks, errors = [], [], []
    for line in lines:
        where = [line["op"], line.get("shape", ""), line.get("backend", "")]
        if line["op"] in ("ceilings", "states") and "error" not in line:
            continue
        if "error" in line:
            errors.append(f"- {', '.join(where)}: {line['error']}")
        elif line["op"] == "check":
            checks.append(
                [
                    ", ".join(where[1:]),
                    *(f"{line[name]:.1e}" for name in ("logprob", "entropy", "grad", "kl")),
                    str(line.get("wrong", "no")),
                ]
            )
        else:
            rows.append([*where, f"{line['ms']:.4g}", _number(line.get("graph_ms"), ".4f"), f"{line['gbs']:.0f}", f"{line['of_copy']:.0%}",
                         f"{line['of_read']:.0%}"])  # fmt: skip
    parts.append(table(["op", "shape", "backend", "ms", "graph ms", "GB/s", "of copy", "of read"], rows))
    if checks:
        parts.append(
            "\nLargest errors against fp64 on eight rows:\n\n"
            + table(["shape", "logprob", "entropy", "grad", "kl", "wrong"], checks)
        )
    if errors:
        parts.append("\nwithout a number:\n\n" + "\n".join(errors))
    return "\n".join(parts)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def settings(title: str, lines: Lines, name: str) -> str:
    """GB/s by setting (or label) and op."""
    ops = list(dict.fromkeys(line["op"] for line in lines if line["op"] not in ("ceilings", "states")))
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for line in lines:
        if line["op"] != "ceilings":
            cells[line["backend"], line[name]][line["op"]] = (
                "error" if "error" in line else f"{line['gbs']:.0f}" if "gbs" in line else ""
            )
    rows = [
        [f"{backend}, {setting or 'as it is'}", *(cell.get(op, cell.get("states", "")) for op in ops)]
        for (backend, setting), cell in cells.items()
    ]
    shape = next((line["shape"] for line in lines if "shape" in line), "")
    errors = sorted({f"- {line[name]}, {line['op']}: {line['error']}" for line in lines if "error" in line})
    return f"## {title}, GB/s at {shape}\n\n{table(['', *ops], rows)}" + (
        "\n\n" + "\n".join(errors) if errors else ""
    )


# What is read off ncu's table: (column, section, metric).
COUNTERS = (
    ("us", "GPU Speed Of Light Throughput", "Duration"),
    ("dram %", "GPU Speed Of Light Throughput", "DRAM Throughput"),
    ("L2 %", "GPU Speed Of Light Throughput", "L2 Cache Throughput"),
    ("SM %", "GPU Speed Of Light Throughput", "Compute (SM) Throughput"),
    ("issue %", "Scheduler Statistics", "One or More Eligible"),
    ("occupancy %", "Occupancy", "Achieved Occupancy"),
    ("registers", "Launch Statistics", "Registers Per Thread"),
)  # fmt: skip


def counters(path: Path) -> str:
    """Per kernel: what ncu measured, and the stall that its rules name first."""
    text = [
        line
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith('"')
    ]
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(text):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"][:90]})
        for column, section, metric in COUNTERS:
            if row.get("Section Name") == section and row.get("Metric Name") == metric:
                value = row["Metric Value"].replace(",", "")
                scale = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}.get(
                    row.get("Metric Unit", ""), 1.0
                )
                kernel[column] = f"{float(value) * scale:.4g}" if column == "us" else value
        stall = re.search(
            r"([\d.]+) cycles being stalled waiting for ([^.,]+)", row.get("Rule Description") or ""
        )
        if stall and "stall" not in kernel:
            kernel["stall"] = f"{stall[2]} ({stall[1]} cycles)"
    columns = ["kernel", *(column for column, _, _ in COUNTERS), "stall"]
    return "## Counters\n\n" + table(
        columns, [[kernel.get(column, "") for column in columns] for kernel in kernels.values()]
    )


def report(folders: list[Path]) -> str:
    parts = []
    for folder in folders:
        for path in sorted(folder.glob("stage?.json")):
            parts.append(stage(json.loads(path.read_text(encoding="utf-8"))))
        if lines := read_lines(folder / "tests.jsonl"):
            parts.append(tests(lines))
        if lines := read_lines(folder / "table.jsonl"):
            parts.append(bandwidth(lines))
        swept = read_lines(folder / "sweep.jsonl")
        if lines := [line for line in swept if line["mode"] == "sweep"]:
            parts.append(settings("Sweep", lines, "setting"))
        if lines := [line for line in swept if line["mode"] == "variant"]:
            parts.append(settings("Variants", lines, "label"))
        if (folder / "ncu.csv").exists():
            parts.append(counters(folder / "ncu.csv"))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders that benchmarks/gpu_gate.sh left")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        if not list(folder.glob("stage?.json")):
            parser.error(f"{folder} holds no stage1.json or stage2.json")
    print(report(arguments.folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
