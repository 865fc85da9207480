"""The last tables of `fastalign bench --peers`: each case beside the fastest of the others, whoever is faster;
and who did not run, with the reason."""

from __future__ import annotations

from typing import Any

from fastalign.cli.console import table

OTHERS = ("eager", "compiled", "peer")


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each case: ours, the fastest other, and `times`, how many times as long that takes (below 1 it
    is the faster one); the same of the memory of a call, against the leanest other."""
    found = []
    for case in report["cases"]:
        timed = [r for r in case["results"] if r["ms"] is not None]
        ours = next((r for r in timed if r["kind"] == "ours"), None)
        others = [r for r in timed if r["kind"] in OTHERS and not r["name"].startswith("fastalign")]
        if ours is None or not others:
            continue
        fastest = min(others, key=lambda r: r["ms"])
        lean = [r["extra_mb"] for r in others if r["extra_mb"] is not None]
        found.append(
            {
                "op": case["op"],
                "shape": case["shape"],
                "fastalign": ours["name"],
                "ms": ours["ms"],
                "floor": ours["floor"],
                "other": fastest["name"],
                "other_ms": fastest["ms"],
                "times": fastest["ms"] / ours["ms"],
                "mb": ours["extra_mb"],
                "other_mb": min(lean, default=None),
            }
        )
    return found


def render(report: dict[str, Any]) -> str:
    return f"side by side\n{beside(report)}{absent(report)}"


def beside(report: dict[str, Any]) -> str:
    """`times`: of the fastest other, over ours. MB: peak memory of a call, and that of the leanest other."""

    def megabytes(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    lines = [
        [
            f"{r['op']}, {r['shape']}",
            f"{r['ms']:.4g}",
            "" if r["floor"] is None else f"{r['floor']:.0%}",
            r["other"],
            f"{r['other_ms']:.4g}",
            f"{r['times']:.2f}",
            megabytes(r["mb"]),
            megabytes(r["other_mb"]),
        ]
        for r in report["side_by_side"]
    ]
    head = ["", "fastalign ms", "of floor", "fastest other", "ms", "times", "MB", "least MB of others"]
    return table(head, lines)


def absent(report: dict[str, Any]) -> str:
    """Who has no time, and why; what is the same for several cases stands once."""
    why: dict[tuple[str, str], list[str]] = {}
    for case in report["cases"]:
        for r in case["results"]:
            if r["ms"] is None:
                why.setdefault((r["name"], f"{r['status']}: {r['message']}"), []).append(case["op"])
    lines = [f"  {name} ({', '.join(dict.fromkeys(ops))}): {text}" for (name, text), ops in why.items()]
    return "\nwithout a time\n" + "\n".join(lines) if lines else ""
