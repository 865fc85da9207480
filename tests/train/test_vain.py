"""A run that learns nothing says so."""

from __future__ import annotations

import pytest
from tiny import make_lists, make_model, make_responses, make_rows, write_jsonl

from fastalign.train import OnlineConfig, train, train_online


@pytest.mark.parametrize(
    "method,rows,settings,said",
    [
        (
            "dpo",
            [{**row, "rejected": row["chosen"]} for row in make_rows(4)],
            {},
            "4 of 4 pairs teach nothing: chosen and rejected are the same",
        ),
        (
            "dpo",
            make_rows(4),
            {"loss_options": {"beta": 0.0}},
            "nothing was learnt: 3 of 3 steps taught nothing",
        ),
        (
            "dpo",
            [{**row, "weight": 0.0} for row in make_rows(4)],
            {},
            "step 1 teaches nothing: the gradient is exactly 0",
        ),
        (
            "kto",
            make_responses(4),
            {"loss_options": {"desirable_weight": 0, "undesirable_weight": 0}},
            "nothing was learnt",
        ),
        (
            "listwise",
            [{**row, "completions": row["completions"][:1], "scores": [1.0]} for row in make_lists(4)],
            {},
            "4 of 4 lists teach nothing",
        ),
        (
            "listwise",
            [{**row, "scores": [1.0] * len(row["scores"])} for row in make_lists(4)],
            {},
            "no two responses of different score",
        ),
        (
            "reward",
            [{**row, "rejected": row["chosen"]} for row in make_rows(4)],
            {},
            "4 of 4 pairs teach nothing",
        ),
        (
            "dpo",
            make_rows(4),
            {"loss": "sdpo"},
            "sdpo is dpo's loss; the method is the loop: train on the data part by part",
        ),
    ],
)
def test_offline(method, rows, settings, said, config, data_file, capsys):
    write_jsonl(data_file, rows)
    train(method, config(**settings))
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_run_that_learns_says_nothing(config, capsys):
    train("dpo", config())
    assert "note: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "method,reward,said",
    [
        (
            "grpo",
            lambda completions: [0.5] * len(completions),
            "step 1 teaches nothing: all responses have the same reward",
        ),
        (
            "rloo",
            lambda completions: [None] * len(completions),
            "step 1 teaches nothing: no response could be scored",
        ),
        ("online_dpo", lambda completions: [0.5] * len(completions), "teaches nothing: "),
    ],
)
def test_online(method, reward, said, tmp_path, tokenizer, capsys):
    config = OnlineConfig(
        output=str(tmp_path / "out"),
        batch_size=2,
        max_steps=2,
        max_new_tokens=4,
        progress=False,
        tensorboard=False,
    )
    prompts = [{"prompt": row["prompt"]} for row in make_rows(4)]
    train_online(method, config, model=make_model(), tokenizer=tokenizer, prompts=prompts, reward=reward)
    shown = capsys.readouterr().out
    assert said in shown and "nothing was learnt: 2 of 2 steps taught nothing" in shown
