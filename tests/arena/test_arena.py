"""`fastalign arena` end to end on a tiny model, its resumption, its entries, the annotator, wrong input."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastalign.arena import contest, labels, review_task
from fastalign.arena.entries import ENTRIES, FAMILIES, Stage
from fastalign.arena.labels import FORMS, Annotator
from fastalign.arena.review_task import Sample
from fastalign.arena.settings import ArenaConfig, check_entries, stage_config
from fastalign.cli import main as cli
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.methods import METHODS, make_method

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS_RUN = ("dpo", "rto", "online_dpo")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ArenaConfig(
        output=str(tmp_path_factory.mktemp("arena")), method=METHODS_RUN, steps=2, responses_per_step=16, judged=8, sft_steps=60,
        hidden=32, layers=1, heads=2, max_new_tokens=12, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(config):
    return contest.run(config)


def test_a_contest_gives_a_row_for_each_method_and_its_files(config, results):
    rows = {row["name"]: row for row in results["methods"]}
    assert set(rows) == set(METHODS_RUN) and not results["broken"]
    for row in rows.values():
        assert 0 <= row["gold_reward"] <= 1 and row["kl_k3"] > 0 and 0 <= row["win_rate"] <= 1
        assert row["gain"] == pytest.approx(row["gold_reward"] - results["sft"]["0"]["gold_reward"])
        assert (
            row["labels"] <= 32 and row["seconds"] > 0
        )  # the budget; a stage of an odd share may lose a few
    output = config.output_dir()
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (output / "arena.png").stat().st_size > 10_000 and not (output / "frontier.png").exists()
    assert {path.name for path in output.iterdir()} == {
        "arena.json", "arena.png", "cells", "index.html", "results.json", "start", "table.md",
    }  # fmt: skip
    page = (output / "index.html").read_text()
    assert 'src="data:image/png;base64,' in page and "http" not in page
    assert all(f"<b>{ENTRIES[name].shown}</b>" in page for name in METHODS_RUN)


def test_a_second_call_runs_what_is_missing_only(config, results, monkeypatch, capsys):
    ran, run_cell = [], contest.run_cell
    monkeypatch.setattr(contest, "run_cell", lambda *a: (ran.append(a[2].name), run_cell(*a))[1])
    cells = config.output_dir() / "cells"
    before = {path.name: path.read_text() for path in cells.iterdir()}
    (cells / "rto-seed0-0.03.json").unlink()
    again = contest.run(config)
    assert ran == ["rto-seed0-0.03"]
    same = [
        json.loads(text)
        for text in (before["rto-seed0-0.03.json"], (cells / "rto-seed0-0.03.json").read_text())
    ]
    assert same[0] | {"seconds": 0} == same[1] | {"seconds": 0}  # from the seed alone
    assert len(again["methods"]) == len(METHODS_RUN)

    dpo = ENTRIES["dpo"]
    faster = dataclasses.replace(dpo, stages=(dataclasses.replace(dpo.stages[0], rate=1e-3),))
    monkeypatch.setattr("fastalign.arena.settings.ENTRIES", {**ENTRIES, "dpo": faster})
    contest.run(dataclasses.replace(config, method=("dpo",)))
    assert ran[1:] == ["dpo-seed0-0.5"]  # what a row has become since is run again


def test_another_arena_is_refused(config, results):
    with pytest.raises(
        UserError, match="other settings: --label-noise was 0.1, is 0.2; choose another --output"
    ):
        contest.run(dataclasses.replace(config, label_noise=0.2))


def test_a_method_that_breaks_off_is_said_and_the_others_go_on(config, results, monkeypatch, capsys):
    run_stage = contest.run_stage

    def fail(*arguments):
        if arguments[2].entry.name == "orpo":
            raise TrainingError("the loss is not finite")
        return run_stage(*arguments)

    monkeypatch.setattr(contest, "run_stage", fail)
    found = contest.run(dataclasses.replace(config, method=("orpo", "dpo")))
    assert found["broken"] == {"orpo-seed0-1": "the loss is not finite"}
    assert [row["verdict"] for row in found["methods"] if row["name"] == "orpo"] == ["broke off"]
    assert "orpo-seed0-1: broke off: the loss is not finite" in capsys.readouterr().out
    assert not (config.output_dir() / "cells" / "orpo-seed0-1.json").exists()


def test_methods_of_the_same_loss_and_data_have_the_same_labels(config, results):
    found = contest.run(dataclasses.replace(config, method=("dpo", "gpo_logistic")))
    one, other = ({k: v for k, v in cell.items() if k not in ("entry", "seconds")} for cell in found["cells"])
    assert one == other


# --- entries ------------------------------------------------------------------------------------------------


def test_the_trainer_accepts_every_entry_at_every_coefficient():
    assert {entry.name for entry in check_entries(ArenaConfig(full=True))} == set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_whole(name):
    entry = ENTRIES[name]
    assert entry.family in FAMILIES and (entry.beta in entry.grid if entry.grid else entry.beta is None)
    assert any(stage.knob for stage in entry.stages) == (entry.beta is not None)
    labelled = [
        s for i, s in enumerate(entry.stages) if not (i and entry.stages[i - 1].gives == "reward_model")
    ]
    assert sum(stage.share for stage in labelled) == pytest.approx(1.0)
    for stage in entry.stages:
        assert stage.method in METHODS and stage.online == (stage.data == "")
        values = [stage.numbers(beta) for beta in entry.grid]
        assert not stage.knob or len({str(value) for value in values}) == len(values)


@pytest.mark.parametrize(
    "name", [name for name, entry in ENTRIES.items() if any(s.data for s in entry.stages)]
)
def test_the_data_of_an_entry_are_its_methods(name):
    groups = [[sample(f" it is {word}.") for word in ("great", "awful", "solid", "dull")] for _ in range(8)]
    for stage in ENTRIES[name].stages:
        if stage.data:
            made = stage_config(ArenaConfig(), stage, ENTRIES[name].beta, 0, "out", "sft", {})
            method = make_method(stage.method, made)
            examples = FORMS[stage.data][0](groups, Annotator(0.1, "0", [0.0, 0.5, 1.0]))
            for i, example in enumerate(examples):
                method.format.check_values(str(i), example.values, examples[0].values)
            method.read(examples, [])
            used = made.batch_size * len(examples[0].completions)
            assert used == ArenaConfig().responses_per_step


# --- the annotator ------------------------------------------------------------------------------------------


def sample(text: str) -> Sample:
    return Sample([5, 6], [*text.encode(), 1], text)


GOOD, BAD = sample(" it is great and lovely. i love it."), sample(" it is awful. i hate it.")


def test_an_annotator_without_noise_tells_the_truth():
    annotator = Annotator(0.0, "seed", [0.2, 0.5, 0.8])
    assert annotator.compare(BAD, GOOD) == (GOOD, BAD, 1.0) and annotator.compare(GOOD, GOOD) is None
    assert annotator.good(GOOD.text) and not annotator.good(BAD.text)
    assert annotator.reward([GOOD.text, BAD.text]) == [1.0, review_task.gold_reward(BAD.text)]
    assert annotator.answers == 8


def test_noise_is_the_share_of_wrong_labels_of_every_kind():
    annotator = Annotator(0.2, "seed", [0.25])
    told = [annotator.compare(GOOD, BAD) for _ in range(4000)]
    wrong = [chosen is BAD for chosen, _, _ in told]
    assert sum(wrong) / 4000 == pytest.approx(0.2, abs=0.02)
    assert all(sure == (0.2 if bad else 0.8) for bad, (_, _, sure) in zip(wrong, told))
    assert sum(not annotator.good(GOOD.text) for _ in range(4000)) / 4000 == pytest.approx(0.2, abs=0.02)
    scores = [annotator.score(GOOD.text) for _ in range(4000)]
    assert set(scores) == {1.0, 0.25} and scores.count(0.25) / 4000 == pytest.approx(0.2, abs=0.02)


def test_rejection_sampling_keeps_better_responses():
    words = ["great", "awful", "solid", "dull"]
    groups = [[sample(f" it is {word} and {other}.") for word in words] for other in words for _ in range(4)]
    made = labels.rso_pairs(groups, Annotator(0.0, "0", [0.0, 1.0]))
    mean = [review_task.gold_reward(s.text) for group in groups for s in group]
    rewards = {tuple(s.completion): review_task.gold_reward(s.text) for group in groups for s in group}
    kept = [[rewards[tuple(side.tolist())] for side in pair.completions] for pair in made]
    assert 0 < len(made) <= 8 and all(chosen > rejected for chosen, rejected in kept)
    assert sum(map(sum, kept)) / (2 * len(kept)) > sum(mean) / len(mean)


# --- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "kta"], "--method 'kta' is unknown; did you mean kto?; legal: dpo, ipo, "),
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--label-noise", "0.5"], "--label-noise is 0.5: it must lie in [0, 0.5)"),
        (["--seeds", "0"], "--seeds is 0: it must be positive"),
        (["--seed", "5000000"], "--seed is 5000000: it must lie in [0, "),
        (["--responses-per-step", "12"], "must be a multiple of twice --per-prompt, 8"),
        (["--hidden", "30"], "--hidden is 30: it must be a multiple of 2 x --heads 4"),
    ],
)
def test_wrong_settings_are_one_line_and_nothing_is_made(words, said, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["arena", *words, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastalign arena: error: ") and said in error and len(error.splitlines()) == 1
    assert not output.exists()


def test_a_stage_that_the_trainer_refuses_ends_the_command_before_work(monkeypatch, tmp_path):
    wrong = dataclasses.replace(ENTRIES["dpo"], stages=(Stage("dpo", "dpo", "pairs", options={"gama": 1.0}),))
    monkeypatch.setattr("fastalign.arena.settings.ENTRIES", {"dpo": wrong})
    with pytest.raises(UserError, match="gama"):
        contest.run(ArenaConfig(output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
