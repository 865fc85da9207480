"""The README against the code: its example runs, its tables are those the code prints. `python
tests/project/test_readme.py` rewrites the tables."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

import fastalign as fa
from fastalign.bench import side_by_side
from fastalign.pipeline import methods

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
WHY = {"reference": "reference (any device)", "cpu": "cpu (C++)", "triton": "triton", "cuda": "cuda (C++)"}


def ops_table():
    """op x backend, with the storage types each accepts for its first tensor."""
    from fastalign.runtime.backends import BACKENDS
    from fastalign.runtime.op import OPS

    lines = ["| op | " + " | ".join(WHY[b] for b in BACKENDS) + " |", "|---" * (1 + len(BACKENDS)) + "|"]
    for name, op in OPS.items():
        cells = [
            " ".join(
                str(d).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf") for d in op.takes(b)
            )
            for b in BACKENDS
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seeds_table(name):
    """What several seeds of a demonstration ended with, from the committed file."""
    seeds = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["seeds"]
    return runpy.run_path(str(ROOT / "benchmarks" / "demo_seeds.py"))["table"](seeds)


def head_memory(what):
    """What a training step saves without logits, from the committed file."""
    results = json.loads((ROOT / "benchmarks" / "results" / "2026-11-28-head-memory.json").read_text())
    return runpy.run_path(str(ROOT / "benchmarks" / "head_memory.py"))[what](results)


def head_cpu(name):
    """What the fused head costs beside its products, from the committed file."""
    report = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    return runpy.run_path(str(ROOT / "benchmarks" / "head_table.py"))["table"](report)


def adapter_functions():
    """Functions of other trainers beside ours, from the committed file."""
    report = json.loads((ROOT / "benchmarks" / "results" / "2026-11-28-adapter-functions.json").read_text())
    folder = ROOT / "benchmarks" / "adapters"
    return runpy.run_path(str(folder / "functions_table.py"))["table"](report["functions"])


def trl_table(what, result):
    """TRL's trainers with and without ours, from the committed file."""
    report = json.loads((ROOT / "benchmarks" / "results" / result).read_text())
    return runpy.run_path(str(ROOT / "benchmarks" / "adapters" / "trl_table.py"))[what](report)


def peers():
    """Ours beside the fastest other, whoever is faster, from the committed file."""
    report = json.loads((ROOT / "benchmarks" / "results" / "2026-11-28-peers-cpu.json").read_text())
    return side_by_side.beside(report)


LOSSES = ROOT / "docs" / "losses.md"
HEAD = ROOT / "docs" / "fused_head.md"
ADAPTERS = ROOT / "docs" / "adapters.md"
TABLES = {
    "ops": (README, ops_table),
    "demo_ppo": (README, lambda: seeds_table("2026-11-28-demo-ppo-seeds-0-1-2-3.json")),
    "demo_tdpo": (README, lambda: seeds_table("2026-11-28-demo-tdpo-seeds-0-1-2.json")),
    "head_saves": (README, lambda: head_memory("summary")),
    "head_memory": (README, lambda: head_memory("table")),
    "head_cpu": (HEAD, lambda: head_cpu("2026-11-28-head-cpu-epyc-2-threads.json")),
    "head_frozen": (HEAD, lambda: head_cpu("2026-11-28-head-frozen-cpu-epyc-2-threads.json")),
    "trl_step": (README, lambda: trl_table("step", "2026-11-28-trl-step.json")),
    "packed_dpo": (ADAPTERS, lambda: trl_table("packed", "2026-11-28-packed-dpo.json")),
    "peers": (README, peers),
    "adapter_functions": (ADAPTERS, adapter_functions),
    "trl_sweep": (ADAPTERS, lambda: trl_table("sweep", "2026-11-28-trl-sweep.json")),
    "losses": (LOSSES, lambda: fa.losses.available().markdown()),
    "listwise": (LOSSES, lambda: fa.losses.available_listwise().markdown()),
    "methods": (ROOT / "docs" / "methods.md", methods.markdown),
    "policy": (ROOT / "docs" / "policy_losses.md", fa.policy_losses.available),
}


def section(text, name):
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_current(name):
    path, table = TABLES[name]
    assert section(path.read_text(), name).group(1).strip() == table(), (
        "run: python tests/project/test_readme.py"
    )


def test_example_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("0.6931")


def test_every_loss_has_a_row_of_documentation():
    for preset in (*fa.losses.available(), *fa.losses.available_listwise()):
        assert preset.formula and (preset.paper or preset.name == "sft"), preset.name


if __name__ == "__main__":
    for name, (path, table) in TABLES.items():
        text = path.read_text()
        found = section(text, name)
        path.write_text(text[: found.start(1)] + table() + "\n" + text[found.end(1) :])
