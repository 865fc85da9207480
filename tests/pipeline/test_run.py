"""A recipe carried out: what stages are given, resumption between and inside stages, stopping, one log; and
what is wrong with a recipe, in one line, before any work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign.pipeline import command, plan, recipe, steps
from fastalign.pipeline.run import run
from fastalign.pipeline.select import SelectConfig
from fastalign.pipeline.select import run as select
from fastalign.train.errors import UserError
from fastalign.train.metrics import RunLog

TWO_STAGES = """
title: two stages
inputs: [model, pairs]
defaults: {batch_size: 2, learning_rate: 1e-3, save_every: 1, tensorboard: false}
stages:
  - {name: half, do: select, data: $pairs, stop: 0.5}
  - {name: first, do: dpo, data: $half, max_steps: 2}
  - repeat: 2
    stages:
      - {name: again, do: dpo, loss: simpo, data: $pairs, max_steps: 2}
  - {name: last, do: dpo, data: $pairs, ref_model: $first, max_steps: 1}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def planned(path, inputs, output, *settings, seed=0, skip=()):
    found = recipe.read(path)
    given, own = plan.read_settings(
        [f"{name}={inputs[name]}" for name in found.inputs if name in inputs] + list(settings), found
    )
    return plan.Plan(found, output, given, own, seed, frozenset(skip))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_stages_get_what_was_made_before(write, inputs, tmp_path):
    found = planned(write(TWO_STAGES), inputs, tmp_path / "out")
    settings = [found.resolve(i, range(i)) for i in range(5)]
    folders = [found.folder(i).name for i in range(5)]
    assert folders == ["01-half", "02-first", "03-round1-again", "04-round2-again", "05-last"]
    out = tmp_path / "out"
    assert (
        settings[1]["data"] == str(out / "01-half" / "data.jsonl") and settings[1]["model"] == inputs["model"]
    )
    assert settings[2]["model"] == str(out / "02-first") and settings[3]["model"] == str(
        out / "03-round1-again"
    )
    assert settings[4]["ref_model"] == str(out / "02-first") and settings[4]["model"] == settings[3][
        "output"
    ].replace("03-round1", "04-round2")
    assert len({each.get("seed") for each in settings}) == 5


def broken_off(monkeypatch, after):
    """The run stops as by Ctrl-C once this many records have been written."""
    written, write = [], RunLog.write

    def counting(self, record):
        write(self, record)
        written.append(record)
        if len(written) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "write", counting)


def test_a_run_goes_on_between_and_inside_stages(write, inputs, tmp_path, monkeypatch, capsys):
    """Broken off in the second step of round 2 and before the last stage, it ends with the bits of a run that
    nobody broke off, and each record stands in the log once."""
    path = write(TWO_STAGES)
    whole = run(planned(path, inputs, tmp_path / "whole"), progress=False)
    assert [stage["label"] for stage in whole] == ["half", "first", "round1-again", "round2-again", "last"]
    for after in (5, 2):
        with monkeypatch.context() as patch:
            broken_off(patch, after)
            with pytest.raises(KeyboardInterrupt):
                run(planned(path, inputs, tmp_path / "broken"), resume=after == 2, progress=False)
    capsys.readouterr()
    run(planned(path, inputs, tmp_path / "broken"), resume=True, progress=False)
    said = capsys.readouterr().out
    assert "== round1-again: done before" in said and said.count("resumed from ") == 1
    for folder in ("02-first", "04-round2-again", "05-last"):
        assert same(weights(tmp_path / "whole" / folder), weights(tmp_path / "broken" / folder)), folder
    first, second = (
        [
            {**json.loads(line), "step_time": 0}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "broken")
    )
    assert first == second and len(first) == 7 and {record["stage"] for record in first} == {
        "first", "round1-again", "round2-again", "last"
    }  # fmt: skip
    assert (tmp_path / "broken" / "run.png").read_bytes()[:4] == b"\x89PNG"


STOPPING = """
inputs: [model, pairs]
defaults: {batch_size: 2, learning_rate: 1e-3, tensorboard: false}
stages:
  - repeat: 3
    stop_when: {stage: dpo, metric: loss, below: 1.0}
    stages:
      - {name: dpo, do: dpo, data: $pairs, max_steps: 1}
  - {name: last, do: select, data: $pairs, limit: 1}
"""


def test_a_repetition_ends_when_it_may(write, inputs, tmp_path):
    done = run(planned(write(STOPPING), inputs, tmp_path / "out"), progress=False)
    assert ["skipped" in stage for stage in done] == [False, True, True, False]


def test_a_stage_that_is_left_out_hands_on_its_model(write, inputs, tmp_path):
    found = planned(write(TWO_STAGES), inputs, tmp_path / "out", skip=["first"])
    assert found.resolve(2, range(2))["model"] == inputs["model"]
    assert found.resolve(4, range(4))["ref_model"] == inputs["model"]
    plan.check(found)


def test_settings_over_the_recipe(write, inputs, tmp_path):
    found = planned(
        write(TWO_STAGES),
        inputs,
        tmp_path / "out",
        "first.loss_options.beta=0.3",
        "defaults.epochs=2",
        "last.seed=7",
    )
    assert found.resolve(1, range(1))["loss_options"] == {"beta": 0.3}
    assert found.resolve(4, range(4))["seed"] == 7 and found.resolve(2, range(2))["epochs"] == 2


def test_another_recipe_is_no_continuation(write, inputs, tmp_path, capsys):
    path, out = write(STOPPING), str(tmp_path / "out")
    given = [each for name in ("model", "pairs") for each in ("--set", f"{name}={inputs[name]}")]
    assert command.main([str(path), "--output", out, *given, "--no-progress"]) == 0
    assert command.main([str(path), "--output", out, *given]) == 2
    assert "--resume or --overwrite" in capsys.readouterr().err
    assert command.main([str(path), "--output", out, *given, "--resume", "--set", "dpo.epochs=2"]) == 2
    assert "stage round1-dpo had epochs None, and has 2 now" in capsys.readouterr().err
    keep = tmp_path / "out" / "mine.txt"
    keep.write_text("mine")
    assert command.main([str(path), "--output", out, *given, "--overwrite", "--no-progress"]) == 0
    assert keep.read_text() == "mine"


STAGE = "{name: a, do: dpo, data: $pairs}"
WRONG = {
    "stages: [": "not YAML",
    "stages: []": "stages must be a list of stages",
    "stage: []": "unknown key stage; legal:",
    f"stages: [{STAGE}]\nstages: []": "stages stands twice",
    f"inputs: [pears]\nstages: [{STAGE}]": "'pears' is neither one of model,",
    "stages: [{name: a}]": "stages[0]: a stage needs name and do",
    "stages: [{name: a, do: dpoo}]": "stages[0] (a): do: 'dpoo' is unknown; did you mean dpo?",
    "inputs: [model]\nstages: [{name: a, do: dpo, data: $pears}]": "$pears is made by no stage before this one",
    "INstages: [{name: a, do: dpo, data: $pairs, bta: 1}]": "dpo has no setting 'bta'",
    "INstages: [{name: a, do: dpo, data: $pairs, output: x}]": "output is given by the run",
    "INstages: [{name: a, do: dpo, data: $pairs, loss: dppo}]": "stages[0] (a): loss='dppo' is unknown",
    "INstages: [{name: a, do: dpo, data: $pairs, epochs: two}]": "epochs must be an integer",
    "INstages: [{name: a, do: kto, data: $pairs}]": "line 1: field 'completion': missing",
    "INstages: [{name: a, do: dpo, data: $pairs, loss: rlaif_soft}]": "line 1: field 'soft_label': missing: the chosen method",
    "INstages: [{name: a, do: dpo, data: nowhere.jsonl}]": "cannot read the data file nowhere.jsonl",
    "INstages: [{name: a, do: dpo, data: $pairs, ref_model: nowhere}]": "ref_model: ",
    "INstages: [{name: a, do: select, data: $pairs, stop: 2}]": "--stop is 2: it must lie in [0, 1]",
    "INstages: [{name: a, do: select, data: $pairs}, {name: b, do: dpo, data: $pairs, ref_model: $a}]": "ref_model must be a model",
    "INstages: [{name: a, do: dpo, data: $pairs}, {name: b, do: dpo, data: $a}]": "data must be data",
    "INstages: [{name: a, do: dpo, data: $pairs}, {name: a, do: dpo, data: $pairs}]": "another stage has the name a",
    "INstages: [{repeat: 0, stages: []}]": "repeat must be an integer from 1",
    "INstages: [{repeat: 2, stop_when: {stage: b, metric: loss, above: 1}, STAGES}]": "no stage 'b' is repeated here",
    "INstages: [{repeat: 2, stop_when: {stage: a, metric: loss}, STAGES}]": "above or below is missing",
    "INdefaults: {bach_size: 2}\nstages: [{name: a, do: dpo, data: $pairs}]": "no training stage has a setting 'bach_size'",
    "inputs: [model, pairs, reward]\nstages: [{name: a, do: dpo, data: $pairs, loss: $reward}]": "the input reward is not given: --set reward=",
}  # fmt: skip


def test_other_data_are_no_continuation(write, inputs, tmp_path, capsys):
    """The same name with other contents."""
    path, pairs = write(STOPPING), tmp_path / "pairs.jsonl"
    lines = Path(inputs["pairs"]).read_text().splitlines(keepends=True)
    pairs.write_text("".join(lines))
    again = [
        str(path),
        "--output",
        str(tmp_path / "out"),
        f"--set=pairs={pairs}",
        f"--set=model={inputs['model']}",
    ]
    assert command.main([*again, "--no-progress"]) == 0 and command.main([*again, "--resume"]) == 0
    pairs.write_text("".join(lines[:-1]))
    capsys.readouterr()
    assert command.main([*again, "--resume"]) == 2
    assert "the data of stage round1-dpo are not what they were" in capsys.readouterr().err


def test_what_lies_in_the_output_is_not_the_users(write, inputs, tmp_path, capsys):
    """--overwrite would remove it."""
    path, out = write(STOPPING), tmp_path / "out"
    given = ["--set", f"pairs={inputs['pairs']}"]
    assert (
        command.main(
            [str(path), "--output", str(out), *given, "--set", f"model={inputs['model']}", "--no-progress"]
        )
        == 0
    )
    capsys.readouterr()
    again = [
        str(path),
        "--output",
        str(out),
        *given,
        "--set",
        f"model={out / '01-round1-dpo'}",
        "--overwrite",
    ]
    assert command.main(again) == 2 and "lies in the output directory" in capsys.readouterr().err
    assert (out / "01-round1-dpo" / "model.safetensors").exists()


def test_a_recipe_that_contains_itself(write, inputs, tmp_path, capsys):
    path = write(
        "inputs: [model, pairs]\nstages: &s [{name: a, do: dpo, data: $pairs}, {repeat: 2, stages: *s}]"
    )
    assert command.main([str(path), "--output", str(tmp_path / "out")]) == 2
    assert "contains itself" in capsys.readouterr().err
    nested = "[{name: a, do: dpo, data: $pairs}]"
    for _ in range(4):
        nested = f"[{{repeat: 1000, stages: {nested}}}]"
    assert command.main([str(write(f"stages: {nested}")), "--output", str(tmp_path / "out")]) == 2
    assert "more than 1000 stages" in capsys.readouterr().err


def test_a_text_may_begin_with_a_dollar(write, inputs, tmp_path):
    found = planned(
        write("inputs: [pairs]\nstages: [{name: a, do: select, data: $pairs, columns: {price: $$5}}]"),
        inputs,
        tmp_path,
    )
    assert found.resolve(0, ())["columns"] == {"price": "$5"}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_recipes(write, inputs, tmp_path, capsys, text):
    recipe = text.replace("IN", "inputs: [model, pairs]\n").replace("STAGES", f"stages: [{STAGE}]")
    given = [
        f"--set={name}={inputs[name]}" for name in ("model", "pairs") if name in recipe.partition("stages")[0]
    ]
    assert command.main([str(write(recipe)), "--output", str(tmp_path / "out"), *given]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and WRONG[text] in err, err
    assert not (tmp_path / "out").exists()


def test_the_recipe_must_be_there(tmp_path, capsys):
    assert command.main(["dpoo", "--output", str(tmp_path / "out")]) == 2
    assert "no recipe 'dpoo': neither a file nor one of those that ship" in capsys.readouterr().err


def test_select(tmp_path, inputs):
    rows = [{"x": 3, "y": "c"}, {"x": 1, "y": "a"}, {"x": 2, "y": "b"}, {"x": 4, "y": "d"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def chosen(**settings):
        config = SelectConfig(output=str(tmp_path / "out.jsonl"), **{"data": str(path), **settings})
        select(config)
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    assert [row["y"] for row in chosen(sort_by="x", stop=0.5)] == ["a", "b"]
    assert [row["y"] for row in chosen(sort_by="x", start=0.5)] == ["c", "d"]
    assert [row["x"] for row in chosen(data=[str(path), str(path)], limit=5)] == [3, 1, 2, 4, 3]
    assert chosen(columns={"task": "t", "x": 9}, limit=1) == [{"x": 3, "y": "c", "task": "t"}]
    assert chosen(shuffle=True, seed=1) == chosen(shuffle=True, seed=1) != chosen()
    with pytest.raises(UserError, match="sort_by needs a number here, got 'c'"):
        chosen(sort_by="y")


def test_every_setting_of_a_step_is_known_to_the_plan():
    """What names a model or data among a step's settings is a setting of its configuration."""
    for name, step in steps.STEPS.items():
        if not steps.trains(name):
            assert {*step.models, *step.data} <= steps.settings_of(name), name
