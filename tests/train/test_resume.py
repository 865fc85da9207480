"""Interrupted and resumed equals uninterrupted, to the last bit, wherever the interruption falls."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import (
    make_demonstrations,
    make_lists,
    make_model,
    make_responses,
    make_rows,
    without_times,
    write_jsonl,
)

from fastalign.train import UserError, checkpoint, load_tokenizer, train, train_dpo

SETTINGS = {
    "max_steps": 7,
    "batch_size": 5,
    "save_every": 2,
    "eval_fraction": 0.25,
    "eval_every": 3,
    "weight_decay": 0.01,
    "tokens_per_batch": 64,
}


class Interruption(Exception):
    pass


def interrupted(config, after, **settings):
    """Run until the record of step `after` has been logged, then break off."""

    def stop(record):
        if record["step"] == after and "loss" in record:
            raise Interruption

    with pytest.raises(Interruption):
        train_dpo(config(**SETTINGS, **settings), callback=stop)


def same(result, expected):
    assert without_times(result.history) == without_times(expected.history)
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert without_times(lines) == without_times(expected.history)
    weights, reference = (load_file(run.output / "model.safetensors") for run in (result, expected))
    assert weights.keys() == reference.keys() and all(
        torch.equal(weights[name], reference[name]) for name in weights
    )


@pytest.fixture
def uninterrupted(config, tmp_path):
    return train_dpo(config(**SETTINGS, output=str(tmp_path / "whole")))


@pytest.mark.parametrize("precompute", [False, True], ids=["live reference", "precomputed reference"])
def test_resumed_equals_uninterrupted(config, tmp_path, precompute):
    expected = train_dpo(config(**SETTINGS, precompute_ref=precompute, output=str(tmp_path / "whole")))
    interrupted(config, 5, precompute_ref=precompute)
    same(train_dpo(config(**SETTINGS, precompute_ref=precompute, resume=True)), expected)


FAMILIES = [
    ("dpo", {"loss": "beta_dpo"}, make_rows),
    ("dpo", {"loss": "alpha_dpo=0.5,bco,sft=0.1"}, make_rows),
    ("kto", {}, make_responses),
    ("bco", {"loss_options": {"momentum": 0.8}}, make_responses),
    ("dro", {}, make_responses),
    ("listwise", {"loss": "pro", "tokens_per_batch": 128}, make_lists),
    ("reward", {}, make_rows),
    ("sft", {"l1_coef": 0.3, "tokens_per_batch": 128}, make_demonstrations),
]


@pytest.mark.parametrize(
    "method, changes, rows",
    FAMILIES,
    ids=[f"{method} {changes.get('loss', '')}" for method, changes, _ in FAMILIES],
)
def test_every_family_resumes_exactly(config, tmp_path, data_file, method, changes, rows):
    """Rules, running means, value heads and baselines are where they were."""
    write_jsonl(data_file, rows())
    settings = {**SETTINGS, **changes}

    def stop(record):
        if record["step"] == 5 and "loss" in record:
            raise Interruption

    expected = train(method, config(**settings, output=str(tmp_path / "whole")))
    with pytest.raises(Interruption):
        train(method, config(**settings), callback=stop)
    resumed = train(method, config(**settings, resume=True))
    same(resumed, expected)
    if method == "dro":
        heads = [load_file(result.output / "value_head.safetensors") for result in (resumed, expected)]
        assert heads[0]["linear.weight"].any() and all(
            torch.equal(heads[0][name], heads[1][name]) for name in heads[1]
        )


def test_another_method_is_refused(config, data_file):
    write_jsonl(data_file, make_responses())
    train("kto", config(**SETTINGS))
    with pytest.raises(UserError, match="started as 'fastalign train kto', not bco"):
        train("bco", config(**SETTINGS, resume=True))


def test_with_a_model_in_memory(config, uninterrupted):
    interrupted(
        config,
        5,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(config().model)
    same(
        train_dpo(config(**SETTINGS, resume=True), model=model, tokenizer=load_tokenizer(config().model)),
        uninterrupted,
    )


def test_an_interruption_while_saving_is_harmless(config, uninterrupted, monkeypatch):
    """The third checkpoint breaks off after the model, before the optimizer; a log line is cut off as
    well."""
    calls, save = [], torch.save

    def breaking(state, path):
        calls.append(path)
        if len(calls) == 3:
            raise Interruption
        save(state, path)

    monkeypatch.setattr(torch, "save", breaking)
    with pytest.raises(Interruption):
        train_dpo(config(**SETTINGS))
    monkeypatch.undo()
    output = config().output_dir()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
        "step-00000006.tmp",
    ]
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')
    same(train_dpo(config(**SETTINGS, resume=True)), uninterrupted)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]


def test_a_finished_run_resumes_from_its_last_checkpoint(config, uninterrupted, tmp_path):
    same(train_dpo(config(**SETTINGS, output=str(tmp_path / "whole"), resume=True)), uninterrupted)


def test_a_checkpoint_is_a_model_directory(config):
    interrupted(config, 5)
    path = checkpoint.newest(config().output_dir())
    assert path.name == "step-00000004"
    transformers.AutoModelForCausalLM.from_pretrained(path)
    assert transformers.AutoTokenizer.from_pretrained(path).eos_token == "</s>"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"learning_rate": 2e-3}, "--learning-rate was 0.001, is 0.002"),
        ({"loss_options": {"beta": 0.2}}, "--set was {}, is {'beta': 0.2}"),
        ({"max_steps": 6}, "--max-steps was 7, is 6"),
    ],
)
def test_other_settings_are_refused(config, change, words):
    interrupted(config, 5)
    with pytest.raises(UserError, match=words):
        train_dpo(config(**{**SETTINGS, **change, "resume": True}))


def test_more_steps_go_on(config, capsys):
    interrupted(config, 5)
    longer = train_dpo(config(**{**SETTINGS, "max_steps": 9, "resume": True}))
    assert [record["step"] for record in longer.history if "loss" in record] == list(range(1, 10))
    assert "goes on to step 9, not 7" in capsys.readouterr().out
    assert (
        longer.history[-2]["learning_rate"]
        < longer.history[-4]["learning_rate"]
        < longer.history[-6]["learning_rate"]
    )
    again = train_dpo(config(**{**SETTINGS, "max_steps": 11, "resume": True}))  # of a run that was finished
    assert again.history[-1]["step"] == 11


def test_paths_are_compared_by_what_they_lead_to(
    config, uninterrupted, model_dir, data_file, tmp_path, monkeypatch
):
    """Another spelling, a copy, a link: the same run. Other weights under the same path: another."""
    interrupted(config, 5)
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    (tmp_path / "link").symlink_to(data_file)
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, "model": "copy/../copy", "data": "link", "output": "out", "resume": True}
    other = make_model(seed=5)
    with monkeypatch.context() as changed:
        changed.setattr("fastalign.train.models.packed.load_model", lambda *args, **options: other)
        with pytest.raises(
            UserError, match="the weights of --model are not those that the run was started with"
        ):
            train_dpo(config(**settings))
    reference = tmp_path / "reference"
    make_model(seed=3).save_pretrained(reference)
    with pytest.raises(UserError, match="the weights of --ref-model are not those"):
        train_dpo(config(**settings, ref_model=str(reference)))
    assert copy.is_dir()
    same(train_dpo(config(**settings)), uninterrupted)


def test_other_data_is_refused(config, data_file):
    interrupted(config, 5)
    write_jsonl(data_file, make_rows()[::-1])
    with pytest.raises(UserError, match="data or its tokenisation has changed"):
        train_dpo(config(**SETTINGS, resume=True))


def test_a_checkpoint_runs_no_code(config, tmp_path):
    """trainer.pt from elsewhere is data: a pickle that would call something is refused, and the call does not
    happen."""

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    interrupted(config, 5)
    torch.save({"step": Malicious()}, checkpoint.newest(config().output_dir()) / "trainer.pt")
    with pytest.raises(UserError, match="cannot be read"):
        train_dpo(config(**SETTINGS, resume=True))
    assert not (tmp_path / "pwned").exists()


def test_an_earlier_run_is_not_overwritten_unasked(config):
    first = train_dpo(config(save_every=1, max_steps=2))
    with pytest.raises(UserError, match="holds an earlier run.*--resume or --overwrite"):
        train_dpo(config(max_steps=1))
    again = train_dpo(config(max_steps=1, overwrite=True))
    assert len(again.history) == 1 and not (first.output / "checkpoints").exists()


def test_nothing_is_written_outside_the_output_directory(config, tmp_path):
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    output.mkdir()
    elsewhere.mkdir()
    (output / "checkpoints").symlink_to(elsewhere)
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="leads out of the output directory"):
            train_dpo(config(save_every=1, **settings))
    assert not list(elsewhere.iterdir())


def test_stale_weights_do_not_survive_in_the_output_directory(config):
    """from_pretrained would prefer a single file over the shards of a later save."""
    output = config().output_dir()
    output.mkdir()
    make_model(seed=9).save_pretrained(output, max_shard_size="20KB")
    assert len(list(output.glob("model-*"))) > 1
    train_dpo(config(max_steps=1, overwrite=True))
    assert [path.name for path in output.glob("model*.safetensors*")] == ["model.safetensors"]
