"""The functions of verl, OpenRLHF and LLaMA-Factory beside those that take their place: random ragged
batches, random options, fp32 and fp64, values, gradients and result types. `PYTHONPATH=<the trainers> python
benchmarks/adapters/functions_sweep.py OUT.json [DRAWS]` writes what was found and prints the table of
docs/adapters.md; tests/run_all.py says where the trainers are (TRAINERS). 300 draws take about a minute on
one core."""

from __future__ import annotations

import collections
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from functions_cases import Batch, Call, llamafactory_cases, openrlhf_cases, verl_cases
from functions_table import table

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # of values and gradients, relative and absolute


def largest_difference(call: Call) -> float:
    """Of values and gradients, as a share of the tolerance; infinite where a result's type or shape differs."""
    results, gradients = [], []
    for function in (call.ours, call.theirs):
        out = function()
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        results.append([x.detach() for x in outputs])
        total = sum(
            (x.double() * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum()
            for x in outputs
            if x.requires_grad
        )
        gradients.append(torch.autograd.grad(total, call.wrt, retain_graph=True) if call.wrt else ())
    worst = 0.0
    for one, other in zip([*results[0], *gradients[0]], [*results[1], *gradients[1]], strict=True):
        if one.dtype != other.dtype or one.shape != other.shape:
            return float("inf")
        share = (one.double() - other.double()).abs() / (TOLERANCE * (1.0 + other.double().abs()))
        worst = max(worst, float(share.nan_to_num(nan=float("inf")).max())) if share.numel() else worst
    return worst


def sweep(draws: int) -> dict[str, dict[str, Any]]:
    """By function: how many calls, how many were equal, the largest difference, the values that options had."""
    found: dict[str, dict[str, Any]] = {}
    for seed in range(draws):
        for cases in (verl_cases, openrlhf_cases, llamafactory_cases):
            for name, call in cases(Batch(seed)).items():
                entry = found.setdefault(
                    name,
                    {
                        "calls": 0,
                        "equal": 0,
                        "worst": 0.0,
                        "options": collections.defaultdict(set),
                        "different": [],
                    },
                )
                worst = largest_difference(call)
                entry["calls"] += 1
                entry["equal"] += worst <= 1.0
                entry["worst"] = max(entry["worst"], worst)
                if worst > 1.0:
                    entry["different"].append([seed, worst])
                for option, value in call.options.items():
                    entry["options"][option].add(str(value))
    for entry in found.values():
        entry["options"] = {option: sorted(values) for option, values in entry["options"].items()}
    return found


def main(out: str, draws: str = "300") -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from checks import trainers
    from run_all import TRAINERS

    trainers.make_up()
    importlib.import_module("fastalign.adapters.verl.plugin")
    found = sweep(int(draws))
    Path(out).write_text(
        json.dumps(
            {"trainers": TRAINERS, "torch": torch.__version__, "draws": int(draws), "functions": found},
            indent=1,
        )
        + "\n"
    )
    print(table(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
