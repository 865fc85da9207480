"""TRL's trainers with fastalign's functions in them beside TRL's own: every loss, accumulation, models whose heads differ, LoRA,
checkpointing, two ranks, and every field of three configs. `python benchmarks/adapters/trl_sweep.py OUT.json` runs them, writes what each gave and
prints the table of docs/adapters.md; with words besides, only the cases whose names hold one of them. About twenty minutes
on one core."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trl_fields import SHARED, TABLES, Probe
from trl_runs import Case, Difference, both, compare, contestant, run

HERE = Path(__file__).resolve().parent
PAIR_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
GROUP_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
TWO_RANKS = [
    Case("dpo"), Case("kto"), Case("grpo", {"beta": 0.1}), Case("rloo"), Case("sft"), Case("cpo"), Case("distillation"),
    Case("dpo", model="lora"), Case("dpo", {"gradient_accumulation_steps": 4}),
]  # fmt: skip


def cases() -> dict[str, list[Case]]:
    """By what they show."""
    twice = [{}, {"gradient_accumulation_steps": 4}]
    losses = {
        "dpo": [
            {"loss_type": [x], **({"label_smoothing": 0.1} if x in SMOOTHED else {})} for x in PAIR_LOSSES
        ]
        + [{"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {"use_weighting": True}],
        "kto": [{"loss_type": x} for x in ("kto", "apo_zero_unpaired")],
        "grpo": [{"loss_type": x, "num_iterations": 2, "temperature": 0.8} for x in GROUP_LOSSES]
        + [{"beta": 0.1, "importance_sampling_level": "sequence"}, {"entropy_coef": 0.1, "top_entropy_quantile": 0.6}],
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
            Case(trainer, {**own, **more}) for trainer, each in losses.items() for own, more in itertools.product(each, twice)
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
        command += [str(HERE / "trl_runs.py"), json.dumps(case[:3]), str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, capture_output=True, check=True)
        found = json.loads(out.read_text(encoding="utf-8"))
    assert found["ranks"] == 2
    return compare(found["ours"], found["theirs"])


def probe(trainer: str, field: str, value: Probe) -> dict[str, Any]:
    """What a field does: equal with and without ours, and whether it changes TRL's own run at all."""
    base, case = value.cases(trainer, field)
    found, theirs = both(case, **({} if value.rtol is None else {"rtol": value.rtol}))
    with contestant("theirs"):
        effect = compare(theirs, run(base)).kind
    kind = {
        "equal": "loss-neutral" if effect == "equal" else "honoured",
        "both refused": "refused by TRL",
    }.get(found.kind, "different")
    return {"result": kind, **_said(found)}


def _said(found: Difference) -> dict[str, Any]:
    return {"kind": found.kind, "worst": float(f"{found.worst:.3g}"), "at": found.at}


def main(out: str, only: list[str]) -> None:
    import torch

    torch.set_num_threads(1)

    def wanted(name: str) -> bool:
        return not only or any(word in name for word in only)

    results: list[dict[str, Any]] = []

    def add(group: str, name: str, found: dict[str, Any]) -> None:
        results.append({"group": group, "case": name, **found})
        print(
            f"{group}: {name}: {found.get('result', found['kind'])}, {found['worst']} at {found['at']}",
            flush=True,
        )

    for group, each in cases().items():
        for case in each:
            if wanted(f"{group}: {case.name}"):
                add(group, case.name, _said(both(case)[0]))
    for case in TWO_RANKS:
        if wanted(f"two ranks: {case.name}"):
            add("two ranks", case.name, _said(two_ranks(case)))
    for trainer, table in TABLES.items():
        for field, value in {**SHARED, **table}.items():
            if wanted(f"fields: {trainer} {field}"):
                outside = {"result": "cannot reach it", "kind": "equal", "worst": 0.0, "at": value}
                add(
                    f"fields of {trainer}",
                    field,
                    outside if isinstance(value, str) else probe(trainer, field, value),
                )
    versions = {
        name: importlib.metadata.version(name)
        for name in ("trl", "torch", "transformers", "accelerate", "peft")
    }
    report = {"date": str(datetime.date.today()), "versions": versions, "rtol": 1e-4, "results": results}
    Path(out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    if any(r["kind"] == "different" for r in results):
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
