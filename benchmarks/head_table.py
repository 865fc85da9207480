"""The table of the fused head in docs/fused_head.md, from a report of `fastalign bench --no-compile --json FILE
--op linear_token_logprobs --op linear_token_logprobs_backward --op linear_token_logprobs_frozen`."""

from __future__ import annotations

from typing import Any

OPS = {
    "linear_token_logprobs": "forward",
    "linear_token_logprobs_backward": "forward and backward",
    "linear_token_logprobs_frozen": "frozen weight",
}


def table(report: dict[str, Any]) -> str:
    """A line per contestant: milliseconds, and in brackets the multiple of the products alone, of the same
    run."""
    cases = {case["op"]: case for case in report["cases"]}
    ops = {op: title for op, title in OPS.items() if op in cases}
    names = list(dict.fromkeys(_shown(line) for op in ops for line in cases[op]["results"]))
    machine, shape = report["machine"], next(iter(cases.values()))["shape"]
    lines = [
        f"{shape}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}:",
        "",
        "| | " + " | ".join(ops.values()) + " |",
        "|---" * (1 + len(ops)) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(_cell(cases[op], name) for op in ops) + " |" for name in names]
    return "\n".join(lines)


def _shown(line: dict[str, Any]) -> str:
    return "the products alone" if line["kind"] == "floor" else line["name"]


def _cell(case: dict[str, Any], name: str) -> str:
    floor = next(line["ms"] for line in case["results"] if line["kind"] == "floor")
    line = next((line for line in case["results"] if _shown(line) == name), None)
    if line is None:
        return ""
    return f"{line['ms']:,.0f} ms ({line['ms'] / floor:.2f})" if line["ms"] else line["status"]
