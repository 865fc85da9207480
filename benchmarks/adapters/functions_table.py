"""The table of docs/adapters.md from what functions_sweep.py has found."""

from __future__ import annotations

from typing import Any


def table(functions: dict[str, dict[str, Any]]) -> str:
    """By function: calls, equal ones, the largest difference."""
    lines = ["| function | calls | equal | largest difference, as a share of 1e-5 |", "|---|---|---|---|"]
    lines += [f"| {name} | {e['calls']} | {e['equal']} | {e['worst']:.2g} |" for name, e in functions.items()]
    return "\n".join(lines)
