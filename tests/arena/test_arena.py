"""`fastalign arena` end to end on a tiny model, its resumption, its entries, the annotator, wrong input."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastalign.arena import cell, contest, labels, review_task, workers
from fastalign.arena.cell import make_examples
from fastalign.arena.entries import ENTRIES, FAMILIES, Cell, Stage
from fastalign.arena.labels import Annotator, OwnJudge
from fastalign.arena.review_task import Sample
from fastalign.arena.settings import ArenaConfig, check_entries, stage_config
from fastalign.cli import main as cli
from fastalign.train.errors import DataError, TrainingError, UserError
from fastalign.train.methods import METHODS, make_method

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS_RUN = ("dpo", "rto", "online_dpo")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ArenaConfig(
        output=str(tmp_path_factory.mktemp("arena")), method=METHODS_RUN, steps=2, responses_per_step=16,
        judged=8, sft_steps=60,
        hidden=32, layers=1, heads=2, max_new_tokens=12, workers=1, progress=False,
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
    for times in ("seconds", "core_seconds"):
        assert all(each.pop(times) > 0 for each in same)
    assert same[0] == same[1]  # from the seed alone
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
    run_stage = cell.run_stage

    def fail(*arguments):
        if arguments[2].entry.name == "orpo":
            raise TrainingError("the loss is not finite")
        return run_stage(*arguments)

    monkeypatch.setattr(cell, "run_stage", fail)
    found = contest.run(dataclasses.replace(config, method=("orpo", "dpo")))
    assert found["broken"] == {"orpo-seed0-1": "the loss is not finite"}
    assert [row["verdict"] for row in found["methods"] if row["name"] == "orpo"] == ["broke off"]
    assert "orpo-seed0-1: broke off: the loss is not finite" in capsys.readouterr().out
    assert not (config.output_dir() / "cells" / "orpo-seed0-1.json").exists()


def test_methods_of_the_same_loss_and_data_have_the_same_labels(config, results):
    found = contest.run(dataclasses.replace(config, method=("dpo", "gpo_logistic")))
    one, other = (
        {k: v for k, v in cell.items() if k not in ("entry", "seconds", "core_seconds")}
        for cell in found["cells"]
    )
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


class Words:
    """A tokenizer as far as the tasks ask one."""

    def decode(self, prompt):
        return "review of the mug:"


@pytest.mark.parametrize(
    "name", [name for name, entry in ENTRIES.items() if any(s.data for s in entry.stages)]
)
def test_the_data_of_an_entry_are_its_methods(name):
    groups = [[sample(f" it is {word}.") for word in ("great", "awful", "solid", "dull")] for _ in range(8)]
    for stage in ENTRIES[name].stages:
        if stage.data:
            made = stage_config(ArenaConfig(), stage, ENTRIES[name].beta, 0, "out", "sft", {})
            method = make_method(stage.method, made)
            examples = make_examples(stage, made, groups, Annotator(0.1, "0", [0.0, 0.5, 1.0]), Words())
            for i, example in enumerate(examples):
                method.format.check_values(str(i), example.values, examples[0].values)
            method.read(examples, [])
            of_each = ArenaConfig().per_prompt if stage.data == "best" else len(examples[0].completions)
            used = made.batch_size * of_each  # the best alone is learnt from, all are labelled
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


def test_the_best_and_the_worst_of_a_group_by_any_judge():
    class Lengths:
        def rate(self, samples):
            return [len(s.text) for s in samples]

    short, middle, long = (sample(text) for text in (" a.", " it is.", " it is great."))
    groups = [[middle, long, short], [short, short]]
    (made,) = labels.best_worst(groups, Lengths())  # the second group is rated alike
    assert [side.tolist() for side in made.completions] == [long.completion, short.completion]
    assert [each.completions[0].tolist() for each in labels.best(groups, Lengths())] == [
        long.completion, short.completion,
    ]  # fmt: skip


def test_a_policy_rates_by_its_implicit_reward(config, results):
    start = cell.open_start(config.output_dir(), 0)
    policy = start.copy()
    assert OwnJudge(policy, start.sft).rate([GOOD, BAD]) == [0.0, 0.0]
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    rated = OwnJudge(policy, start.sft).rate([GOOD, BAD])
    for one, value in zip((GOOD, BAD), rated):
        ids = torch.tensor([one.prompt + one.completion])
        with torch.no_grad():
            truth = [
                model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1,
                    ids[0, 1:, None])[len(one.prompt) - 1 :].sum()
                for model in (policy, start.sft)
            ]  # fmt: skip
        assert value == pytest.approx(float(truth[0] - truth[1]), abs=1e-3) and value != 0


def test_parts_from_the_same_start_are_merged(config, results, monkeypatch):
    """Linear: the mean of what each part alone comes to."""
    start = cell.open_start(config.output_dir(), 0)
    first = dataclasses.replace(ENTRIES["dpo"].stages[0], from_sft=True)
    second = dataclasses.replace(first, rate=2 * first.rate)
    trained = []
    monkeypatch.setattr(
        cell, "judge", lambda policy, *a: trained.append(policy) or {"rewards": start.judged["rewards"]}
    )
    monkeypatch.setattr(cell, "Annotator", lambda noise, seed, scores: Annotator(0.0, seed, scores))
    for stages, merge in (((first,), {}), ((second,), {}), ((first, second), {"method": "linear"})):
        entry = dataclasses.replace(ENTRIES["dpo"], stages=stages, merge=merge)
        cell.run_cell(config, start, Cell(entry, 0, 0.5), config.output_dir() / "work")
    for a, b, merged in zip(*(model.parameters() for model in trained)):
        torch.testing.assert_close(merged, (a + b) / 2, rtol=0, atol=1e-6)
        assert not torch.equal(a, b)


def test_reward_models_labels_are_a_part_of_the_budget(config, results, monkeypatch):
    start = cell.open_start(config.output_dir(), 0)
    seen = []
    monkeypatch.setattr(
        cell, "run_stage", lambda *a: seen.append((a[3].method, len(a[5]), a[5] == start.groups)) or 0
    )
    monkeypatch.setattr(cell, "sample_groups", lambda *a: [None] * len(a[2]))
    cell.run_cell(config, start, Cell(ENTRIES["anthropic_hh"], 0, 0.05), config.output_dir() / "work")
    half = len(start.groups) // 2
    assert seen == [("reward", half, False), ("ppo", 0, False)] * 2


# --- side by side -------------------------------------------------------------------------------------------


def test_cells_run_in_processes_give_the_same_files(config, results, tmp_path, capfd):
    config = dataclasses.replace(config, output=str(tmp_path), method=("dpo", "orpo"), workers=2)
    found = {cell["entry"]: cell for cell in contest.run(config)["cells"]}
    here = {cell["entry"]: cell for cell in results["cells"]}
    times = {"seconds": 0, "core_seconds": 0}
    assert found["dpo"] | times == here["dpo"] | times and not (tmp_path / contest.WORK).exists()
    assert "resource_tracker" not in capfd.readouterr().err


def threads(piece):
    return torch.get_num_threads()


def test_a_worker_has_one_thread_and_this_process_only_for_a_while():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert [done[1] for done in workers.each(threads, [0, 1], 1)] == [1, 1]
        assert [done[1] for done in workers.each(threads, [0, 1], 2)] == [1, 1]  # and so has every other
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_own_coefficients_come_before_the_frontiers_and_the_longest_of_a_seed_first():
    dpo, ppo = ENTRIES["dpo"], ENTRIES["ppo"]
    cells = [Cell(e, seed, beta) for seed in (0, 1) for e in (dpo, ppo) for beta in (e.grid[0], e.beta)]
    names = [cell.name for cell in sorted(cells, key=contest._turn)]
    assert names[:4] == ["ppo-seed0-0.03", "dpo-seed0-0.5", "ppo-seed1-0.03", "dpo-seed1-0.5"]
    assert not any(cell.beta == cell.entry.beta for cell in sorted(cells, key=contest._turn)[4:])


def fail_or_die(what, piece):
    if piece == 1:
        raise {"broken": TrainingError, "wrong": DataError}[what](
            *("x", "f", "is bad")[: 1 if what == "broken" else 3]
        )
    return piece


def test_what_a_piece_raises_comes_back_from_its_process():
    found = sorted(workers.each(fail_or_die, [0, 1, 2], 2, "broken"), key=lambda done: done[0])
    assert [done[1] for done in found] == [0, None, 2] and str(found[1][2]) == "x"
    with pytest.raises(UserError, match="x: field 'f': is bad"):
        list(workers.each(fail_or_die, [0, 1, 2], 2, "wrong"))


# --- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "kta"], "--method 'kta' is unknown; did you mean kto?; legal: dpo, ipo, "),
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--label-noise", "0.5"], "--label-noise is 0.5: it must lie in [0, 0.5)"),
        (["--workers", "0"], "--workers is 0: it must be positive"),
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
