"""TRL's trainers with fastalign's functions in them beside TRL's own: every loss, accumulation, models whose
heads differ, LoRA, checkpointing, two ranks, and every field of three configs. `python
benchmarks/adapters/trl_sweep.py OUT.json` runs them, writes what each gave and prints the table of
docs/adapters.md. With words besides, only the runs whose names hold one of them; the others stay as they are
in the file. About twenty minutes on one core."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_fields import SHARED, TABLES, Probe
from trl_runs import GRANTED, Case, Difference, both, compare, contestant, run, save
from trl_table import sweep as table

HERE = Path(__file__).resolve().parent
PAIR_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
GROUP_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
TWO_RANKS = [
    Case("dpo"), Case("kto"), Case("grpo", {"beta": 0.1}), Case("rloo"), Case("sft"), Case("cpo"),
    Case("distillation"),
    Case("dpo", model="lora"), Case("dpo", {"gradient_accumulation_steps": 4}),
]  # fmt: skip


def cases() -> dict[str, list[Case]]:
    """By what they show."""
    twice = [{}, {"gradient_accumulation_steps": 4}]
    losses = {
        "dpo": [
            {"loss_type": [x], **({"label_smoothing": 0.1} if x in SMOOTHED else {})} for x in PAIR_LOSSES
        ]
        + [{"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
            {"use_weighting": True}],
        "kto": [{"loss_type": x} for x in ("kto", "apo_zero_unpaired")],
        "grpo": [{"loss_type": x, "num_iterations": 2, "temperature": 0.8} for x in GROUP_LOSSES]
        + [{"beta": 0.1, "importance_sampling_level": "sequence"},
            {"entropy_coef": 0.1, "top_entropy_quantile": 0.6}],
        "rloo": [{}, {"beta": 0.0, "num_iterations": 2, "temperature": 0.8}],
        "sft": [{"loss_type": x} for x in ("nll", "dft")] + [{"packing": True, "max_length": 32}],
        "cpo": [{"loss_type": x} for x in ("sigmoid", "hinge", "ipo", "simpo", "alphapo")],
        "orpo": [{}], "tpo": [{"loss_type": x} for x in ("sigmoid", "hinge", "ipo")], "reward": [{}],
        "distillation": [{"beta": x, "temperature": 0.8} for x in (0.0, 0.5, 1.0)],
    }  # fmt: skip
    # With experts, a token on the border of two goes over by a rounding: steps small enough that none does.
    heads = ("bias", "softcap", "scale", "divided", "experts")
    checkpointed = {"gradient_checkpointing": True}
    return {
        "losses": [
            Case(trainer, {**own, **more})
            for trainer, each in losses.items()
            for own, more in itertools.product(each, twice)
        ],
        "heads": [
            Case(trainer, {"optim": "sgd"} if model == "experts" else {}, model)
            for trainer, model in itertools.product(("dpo", "kto", "grpo", "sft", "cpo", "distillation"), heads)
        ],
        "checkpointing": [Case(trainer, checkpointed) for trainer in losses] + [Case("dpo", checkpointed, "lora")],
        "LoRA": [Case(trainer, model="lora") for trainer in ("dpo", "kto", "grpo", "rloo", "sft", "cpo", "orpo", "tpo", "distillation")]
        + [Case("grpo", {"entropy_coef": 0.1}, "lora")],
    }  # fmt: skip


def two_ranks(case: Case) -> Difference:
    """The first rank's logs of two gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        command += [
            str(HERE / "trl_runs.py"),
            json.dumps(case[:3]),
            str(save(case, Path(folder, "model"))),
            str(out),
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, capture_output=True, check=True)
        found = json.loads(out.read_text(encoding="utf-8"))
    assert found["ranks"] == 2
    return compare(found["ours"], found["theirs"])


def probe(trainer: str, field: str, value: Probe | str) -> dict[str, Any]:
    """What a field does: equal with and without ours, and whether it changes TRL's own run at all."""
    if isinstance(value, str):
        return {"result": "cannot reach it", "kind": "equal", "worst": 0.0, "at": value}
    base, case = value.cases(trainer, field)
    found, theirs = both(case, value.granted, value.without)
    with contestant("theirs"):
        effect = compare(theirs, run(base)).kind
    kind = {
        "equal": "loss-neutral" if effect == "equal" else "honoured",
        "both refused": "refused by TRL",
    }.get(found.kind, "different")
    return {"result": kind, **_said(found)}


def _said(found: Difference) -> dict[str, Any]:
    return {"kind": found.kind, "worst": float(f"{found.worst:.3g}"), "at": found.at}


def everything() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of a run, with its group in front -> the run."""
    runs = {}
    for group, each in cases().items():
        runs |= {
            f"{group}: {case.name}": functools.partial(lambda x: _said(both(x)[0]), case) for case in each
        }
    runs |= {f"two ranks: {x.name}": functools.partial(lambda x: _said(two_ranks(x)), x) for x in TWO_RANKS}
    for trainer, fields in TABLES.items():
        for field, value in {**SHARED, **fields}.items():
            runs[f"fields of {trainer}: {field}"] = functools.partial(probe, trainer, field, value)
    return runs


def main(out: Path, words: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    before = json.loads(out.read_text(encoding="utf-8"))["results"] if words and out.exists() else []
    found = {f"{result['group']}: {result['case']}": result for result in before}
    runs = everything()
    for name, run_it in runs.items():
        if not words or any(word in name for word in words):
            group, case = name.split(": ", 1)
            found[name] = {"group": group, "case": case, **run_it()}
            print(f"{name}: {found[name]}", flush=True)
    packages = ("trl", "torch", "transformers", "accelerate", "peft")
    report = {
        "date": str(datetime.date.today()),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "granted": GRANTED,
        "results": [found[name] for name in runs if name in found],
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    if any(result["kind"] == "different" for result in report["results"]):
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
