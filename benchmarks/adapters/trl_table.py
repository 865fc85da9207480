"""The tables of docs/adapters.md from the files that trl_sweep.py, trl_step.py and packed_dpo.py have written."""

from __future__ import annotations

import collections
import statistics
from typing import Any


def sweep(report: dict[str, Any]) -> str:
    """One line per group of runs, and one per config whose fields were tried."""
    groups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for found in report["results"]:
        groups[found["group"]].append(found)
    lines = [
        "| runs | cases | equal | refused by TRL too | different | largest difference, as a share of what is "
        "granted |",
        "|---|---|---|---|---|---|",
    ]
    for group, each in groups.items():
        if not group.startswith("fields"):
            count = collections.Counter(r["kind"] for r in each)
            numbers = [len(each), count["equal"], count["both refused"], count["different"]]
            worst = max(r["worst"] for r in each)
            lines.append(f"| {group} | {' | '.join(map(str, numbers))} | {worst:.2g} |")
    kinds = ("honoured", "loss-neutral", "refused by TRL", "cannot reach it", "different")
    lines += ["", f"| fields of | fields | {' | '.join(kinds)} |", "|---|---|" + "---|" * len(kinds)]
    for group, each in groups.items():
        if group.startswith("fields"):
            count = collections.Counter(r["result"] for r in each)
            shown = " | ".join(str(count[kind]) for kind in kinds)
            lines.append(f"| `{group.split()[-1].upper()}Config` | {len(each)} | {shown} |")
    return "\n".join(lines)


def step(report: dict[str, Any]) -> str:
    """Time and peak memory of one step of each trainer, with and without ours."""
    shape = report["shape"]
    lines = [
        f"{shape['rows']} sequences of {shape['tokens']} tokens, {shape['completion']} of them completion; hidden "
        f"{shape['hidden']}, {shape['layers']} layers, vocabulary {shape['vocab']:,}; {report['machine']}, "
        f"{shape['threads']} thread{'s' * (shape['threads'] > 1)}, TRL {report['versions']['trl']}:",
        "",
        "| step | TRL | TRL with ours | | peak memory, TRL | with ours | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in report["steps"].items():
        seconds = {who: min(found["seconds"]) for who, found in each.items()}
        peak = {who: min(found["peak_mib"]) for who, found in each.items()}
        lines.append(
            f"| {name} | {seconds['theirs']:.1f} s | {seconds['ours']:.1f} s | "
            f"{seconds['ours'] / seconds['theirs']:.2f} | "
            f"{peak['theirs']:,.0f} MiB | {peak['ours']:,.0f} MiB | {peak['ours'] / peak['theirs']:.2f} |"
        )
    return "\n".join(lines)


def packed(report: dict[str, Any]) -> str:
    """A DPO step padded, padded with our rows, and packed; medians."""
    first = report["runs"]["TRL"][0]
    lines = [
        f"{first['sequences'] // 2} pairs, {first['tokens']:,} tokens, {first['padded_tokens']:,} with padding",
        "", "| | seconds | peak MiB | loss | gradient norm |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, runs in report["runs"].items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"| {name} | {middle['seconds']:.2f} | {middle['peak_mib']:,.0f} | {middle['loss']:.5f} | "
            f"{middle['grad_norm']:.4f} |"
        )
    return "\n".join(lines)
