"""Several tasks in one run of pairs: weights against their closed forms, the loss against those of the tasks
alone."""

import json
import math

import pytest
import torch
from tiny import make_rows, without_times

from fastalign.train import DataError, TrainConfig, UserError, train
from fastalign.train.data.formats import TASK_PREFERENCE, parse_preference
from fastalign.train.data.tokenise import token_pair
from fastalign.train.methods.tasks import TaskWeights

TASKS = ("code", "chat", 7)


def rows(count=11):
    return [{**row, "task": TASKS[(0, 0, 1, 0, 2)[i % 5]]} for i, row in enumerate(make_rows(count))]


def weights(examples="aaaaaaaab", **settings):
    found = TaskWeights.of(TrainConfig(**settings))
    token = torch.tensor([1], dtype=torch.int32)
    found.read([token_pair(token, token, token, task=name) for name in examples], [])
    return found


# --- the weights ------------------------------------------------------------------------------------------------


def test_fixed_and_proportional():
    assert weights(task_weights="fixed").weights == {"a": 0.5, "b": 0.5}
    assert weights(task_weights="fixed", task_weight={"a": 3}).weights == {"a": 0.75, "b": 0.25}
    assert weights(task_weights="proportional").weights == pytest.approx({"a": 8 / 9, "b": 1 / 9})
    share = 8 ** (1 / 3)
    assert weights(task_weights="proportional", task_temperature=3.0).weights["a"] == pytest.approx(
        share / (share + 1)
    )
    kept = weights(task_weights="fixed")
    kept.update({"a": 5.0, "b": 1.0})
    assert kept.weights == {"a": 0.5, "b": 0.5}


def test_robust():
    """w <- w exp(eta L) / Z over the tasks of the step; one that is absent keeps its weight."""
    found = weights("abc", task_weights="robust", task_weight={"a": 2}, task_step=0.3)
    assert found.weights == {"a": 0.5, "b": 0.25, "c": 0.25}
    found.update({"a": 1.0, "c": 3.0})
    a, c = 0.5 * math.exp(0.3), 0.25 * math.exp(0.9)
    assert found.weights == pytest.approx({"a": 0.75 * a / (a + c), "b": 0.25, "c": 0.75 * c / (a + c)})
    assert sum(found.weights.values()) == pytest.approx(1.0) and found.weights["b"] == 0.25
    found.update({})
    before = dict(found.weights)
    found.update({"b": 700.0})  # alone it has nobody to take from
    assert found.weights == pytest.approx(before)
    found.update({"a": 1e6, "b": 0.0, "c": 0.0})
    assert found.weights == pytest.approx({"a": 1.0, "b": 0.0, "c": 0.0})


# --- the loss ---------------------------------------------------------------------------------------------------

LOSSES = [
    {"loss": "rpo", "token_metrics": False},
    {"loss": "dpo=0.5,sft=1.0"},
    {"loss": "aot"},
    {"loss": "wpo"},
]


@pytest.mark.parametrize("settings", LOSSES, ids=[s["loss"] for s in LOSSES])
def test_the_loss_is_the_weighted_sum_of_the_tasks_own(config, tmp_path, settings):
    """Also with terms that no weight per pair reaches, and in whatever number of packs."""
    weighted = [{**row, "weight": 0.5 + i} for i, row in enumerate(rows())]
    data = weighted if settings["loss"] == "wpo" else rows()
    outputs = iter(range(9))

    def first(examples, **more):
        known = {"batch_size": 11, "max_steps": 2, "tokens_per_batch": 2048, **settings, **more}
        return train(
            "dpo", config(data=None, output=str(tmp_path / str(next(outputs))), **known), examples=examples
        ).history

    given = {"task_weights": "fixed", "task_weight": {"code": 1, "chat": 2, "7": 5}}
    one, many = first(data, **given), first(data, tokens_per_batch=96, **given)
    alone = {str(t): first([row for row in data if row["task"] == t], max_steps=1)[0]["loss"] for t in TASKS}
    assert {name: one[0][f"task/{name}/loss"] for name in alone} == pytest.approx(alone, rel=1e-5)
    assert one[0]["loss"] == pytest.approx(
        sum(w * alone[name] for name, w in zip(alone, (0.125, 0.25, 0.625))), rel=1e-5
    )
    for a, b in zip(without_times(one), without_times(many)):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=5e-4, abs=5e-5)


def test_tasks_by_their_share_are_no_tasks(config, tmp_path):
    """A step of all the data, proportional at T = 1: the plain mean, to rounding."""
    settings = {"data": None, "batch_size": 11, "tokens_per_batch": 200, "max_steps": 2}
    plain = train("dpo", config(**settings, output=str(tmp_path / "plain")), examples=rows())
    tasks = train("dpo", config(**settings, task_weights="proportional"), examples=rows())
    for a, b in zip(without_times(plain.history), without_times(tasks.history)):
        assert {name: b[name] for name in a} == pytest.approx(a, rel=1e-4, abs=1e-5)


def test_robust_weights_follow_the_losses_and_survive_a_resumption(config, tmp_path):
    """Steps of a few pairs: some lack a task."""
    settings = {
        "task_weights": "robust", "task_step": 0.5, "batch_size": 3, "max_steps": 6, "save_every": 2,
        "eval_fraction": 0.2, "learning_rate": 1e-2, "data": None,
    }  # fmt: skip
    expected = train("tdpo", config(**settings, output=str(tmp_path / "whole")), examples=rows())
    records = [record for record in expected.history if "loss" in record]
    for now, after in zip(records, records[1:]):
        seen = {name: now[f"task/{name}/loss"] for name in map(str, TASKS) if f"task/{name}/loss" in now}
        grown = {name: now[f"task/{name}/weight"] * math.exp(0.5 * loss) for name, loss in seen.items()}
        mass = sum(now[f"task/{name}/weight"] for name in seen)
        for name in map(str, TASKS):
            wanted = mass * grown[name] / sum(grown.values()) if name in seen else now[f"task/{name}/weight"]
            assert after[f"task/{name}/weight"] == pytest.approx(wanted, rel=1e-6)
    assert records[-1]["task/7/weight"] != pytest.approx(1 / 3, rel=1e-3)
    assert any("task/7/loss" not in record for record in records)

    def stop(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("tdpo", config(**settings), examples=rows(), callback=stop)
    resumed = train("tdpo", config(**settings, resume=True), examples=rows())
    assert without_times(resumed.history) == without_times(expected.history)


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED = [
    ({"task_weight": {"code": 1}}, "--task-weight has no effect without --task-weights fixed or robust"),
    ({"task_weights": "proportional", "task_weight": {"a": 1}}, "--task-weight has no effect"),
    (
        {"task_weights": "fixed", "task_temperature": 2.0},
        "--task-temperature has no effect without --task-weights prop",
    ),
    ({"task_weights": "fixed", "task_step": 2.0}, "--task-step has no effect without --task-weights robust"),
    (
        {"task_weights": "fixed", "task_weight": {"cod": 1}},
        "--task-weight cod: .* no such task; it has: 7, chat, code",
    ),
    (
        {"task_weights": "fixed", "task_weight": {"code": -1}},
        "--task-weight code=-1: it must be a number, at least 0",
    ),
    ({"task_weights": "fixed", "task_weight": {"code": True}}, "--task-weight code=True"),
    ({"task_weights": "fixed", "task_weight": {"code": "x"}}, "--task-weight code='x'"),
    ({"task_weights": "fixed", "task_weight": {"code": 0, "chat": 0, "7": 0}}, "every task has weight 0"),
    ({"task_weights": "robust", "loss": "beta_dpo"}, "--loss beta_dpo has a memory of all pairs"),
]


@pytest.mark.parametrize("settings, words", REFUSED, ids=[" ".join(map(str, s.values())) for s, _ in REFUSED])
def test_refused(config, settings, words):
    with pytest.raises(UserError, match=words):
        train("dpo", config(data=None, **settings), examples=rows())


def test_data_without_tasks(config, tmp_path):
    with pytest.raises(UserError, match="training example 0: field 'task': missing"):
        train("dpo", config(data=None, task_weights="fixed"), examples=make_rows(3))
    for task, found in ((True, "a boolean"), ([], "a list"), ("", "an empty"), (1.5, "a number")):
        with pytest.raises(DataError, match=f"field 'task': expected a text or an integer, got {found}"):
            TASK_PREFERENCE.parse("line", {**make_rows(1)[0], "task": task})
    assert parse_preference("line", {**make_rows(1)[0], "task": []}).values == {}  # of no interest otherwise
    (tmp_path / "eval.jsonl").write_text(json.dumps({**make_rows(1)[0], "task": "new"}))
    with pytest.raises(
        UserError, match="the evaluation data's task 'new': the training data has no such task"
    ):
        train(
            "dpo",
            config(data=None, task_weights="fixed", eval_data=str(tmp_path / "eval.jsonl")),
            examples=rows(),
        )
    with pytest.raises(UserError, match="fastalign train kto has no setting --task-weights"):
        train("kto", config(data=None, task_weights="fixed"), examples=[])
