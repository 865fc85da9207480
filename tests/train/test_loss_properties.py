"""What the trainer asks of a loss it asks of its row, never of its name: a loss under another name is served
alike."""

import dataclasses

import pytest
from tiny import make_lists, make_rows, write_jsonl

from fastalign import losses
from fastalign.train import UserError, train


@pytest.fixture
def named(monkeypatch):
    """named("mine", "wpo", field=value): a row like that of wpo with another name."""

    def add(name, like, **fields):
        for table in ("PRESETS", "LISTWISE"):
            rows = getattr(losses, table)
            if like in rows:
                more = {**rows, name: dataclasses.replace(rows[like], name=name, **fields)}
                for module in (losses, losses.options):
                    monkeypatch.setattr(module, table, more)

    return add


def test_weights_that_a_loss_does_not_make_are_read(config, data_file, named):
    """A loss that needs omega is not WPO: its weights are a column of the data."""
    named("weighted", "dpo", requires=("omega",))
    with pytest.raises(UserError, match="weight"):
        train("dpo", config(loss="weighted", max_steps=1))
    with pytest.raises(UserError, match="no option 'clamp'"):
        train("dpo", config(loss="weighted", loss_options={"clamp": 2.0}, max_steps=1))
    write_jsonl(data_file, [row | {"weight": 2.0} for row in make_rows()])
    weighted, plain = (
        train("dpo", config(loss=loss, max_steps=1, output=f"{data_file}.{loss}")).history[0]
        for loss in ("weighted", "ipo")
    )
    assert "omega_mean" not in weighted and weighted["loss"] == pytest.approx(2 * 0.693147, rel=1e-5)


def test_weights_that_a_loss_makes_are_made_under_any_name(config, named, tmp_path):
    named("mine", "wpo")
    mine, wpo = (
        train("dpo", config(loss=loss, output=str(tmp_path / loss))).history for loss in ("mine", "wpo")
    )
    assert [record["omega_mean"] for record in mine] == [record["omega_mean"] for record in wpo]
    assert [record["loss"] for record in mine] == [record["loss"] for record in wpo]


def test_losses_of_scores_are_sent_to_the_reward_models(config, data_file, named):
    named("bt_other", "bt_rm"), named("kwise_other", "kwise_rm")
    with pytest.raises(
        UserError, match="bt_other needs the scores of a reward model; 'fastalign train reward' trains one"
    ):
        train("dpo", config(loss="bt_other"))
    write_jsonl(data_file, make_lists())
    words = "kwise_other needs the scores of a reward model; 'fastalign train reward --loss kwise_other' trains one"
    with pytest.raises(UserError, match=words):
        train("listwise", config(loss="kwise_other"))
