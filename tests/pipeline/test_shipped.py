"""Every recipe that ships, from its first stage to its last on a tiny model; and the pages on it."""

import json
import shlex
from pathlib import Path

import pytest

from fastalign.cli import main as cli
from fastalign.pipeline import methods, plan, recipe
from fastalign.pipeline.run import run

# What makes a stage short; a recipe's own settings are what a user's models and data want.
SHORT = ("max_steps=1", "batch_size=4", "max_new_tokens=4", "tensorboard=false")
FEW = {"sample": ("samples=2", "max_new_tokens=4"), "critique": ("max_new_tokens=4",)}


def planned(name, inputs, output):
    found = recipe.read(recipe.shipped()[name])
    given = [f"{each}={inputs[each]}" for each in found.inputs if each in inputs]
    known = {
        x for stage in found.stages if plan.steps.trains(stage.do) for x in plan.steps.settings_of(stage.do)
    }
    short = [f"defaults.{each}" for each in SHORT if each.split("=")[0] in known]
    few = [f"{stage.name}.{each}" for stage in found.stages for each in FEW.get(stage.do, ())]
    few += [
        f"{stage.name}.max_new_tokens=4" for stage in found.stages if stage.settings.get("ask") == "rubric"
    ]
    return plan.Plan(found, output, *plan.read_settings([*given, *short, *few], found), 0)


@pytest.mark.parametrize("name", recipe.shipped())
def test_recipe_runs(name, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("fastalign.pipeline.report.draw", lambda title, records, path: path.touch())
    # What this model writes ends in no score.
    monkeypatch.setattr("fastalign.feedback.judges.language.points_of", lambda review: float(len(review) % 6))
    found = planned(name, inputs, tmp_path / "out")
    done = run(found, progress=False)
    assert len(done) == len(found.recipe.stages) and not any("skipped" in stage for stage in done)
    assert (tmp_path / "out" / "run.json").exists()
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained = [stage.label for stage in found.recipe.stages if plan.steps.trains(stage.do)]
    assert list(dict.fromkeys(record["stage"] for record in records)) == trained


def test_pages():
    """Whatever a recipe names is there, and its page shows the recipe as it is."""
    listing, table = methods.listing(), methods.markdown()
    for name, found in methods.everything().items():
        formula, _ = methods.formula_of(found.formula)
        page = methods.page(name)
        assert formula in page and found.paper in page and recipe.shipped()[name].read_text().strip() in page
        assert found.title and found.about and found.family and not found.about.endswith("."), name
        assert name in listing and f"| `{name}` |" in table


def test_printed_commands(inputs, tmp_path, monkeypatch, capsys):
    """What a method's page says to run has nothing wrong, with the user's files under the names it uses."""
    monkeypatch.chdir(tmp_path)
    for name, path in inputs.items():
        Path(f"{name}{Path(path).suffix}").symlink_to(path)
    for name, found in methods.everything().items():
        command = methods.command(name, found)
        assert command in methods.page(name)
        assert cli.main([*shlex.split(command)[1:], "--check"]) == 0, capsys.readouterr().err
