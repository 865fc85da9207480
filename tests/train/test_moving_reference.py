"""A reference that follows the policy, in the methods that learn from a file (TR-DPO)."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROWS, make_model

from fastalign.train import TrainConfig, UserError, checkpoint, train
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.models.reference import mix_weights

METHODS = [
    ("dpo", "pairs"),
    ("tdpo", "pairs"),
    ("kto", "responses"),
    ("bco", "responses"),
    ("listwise", "lists"),
]


@pytest.mark.parametrize("method, rows", METHODS, ids=[method for method, _ in METHODS])
def test_the_last_policy_is_the_reference(config, method, rows):
    """After an update of the reference the log-ratios are 0 to the last bit, and only then."""
    settings = config(data=None, ref_update_every=2, max_steps=4, learning_rate=1e-2)
    records = train(method, settings, examples=ROWS[rows]).history
    rewards = [
        [v for name, v in record.items() if name.startswith("rewards/") and name[8:] != "accuracies"]
        for record in records
    ]
    assert [any(each) for each in rewards] == [False, True, False, True] and all(rewards)


def test_a_share_of_the_policy():
    old, new = (PackedCausalLM(make_model(seed=seed), device="cpu") for seed in (0, 1))
    mix_weights(old, new, 0.6)
    for mixed, a, b in zip(old.model.parameters(), make_model(seed=0).parameters(), new.model.parameters()):
        torch.testing.assert_close(mixed, 0.4 * a + 0.6 * b)


def test_resumed_equals_uninterrupted(config, tmp_path):
    settings = {
        "max_steps": 5,
        "save_every": 3,
        "ref_update_every": 2,
        "ref_mix": 0.6,
        "loss": "bco",
        "learning_rate": 1e-2,
    }
    expected = train("dpo", config(**settings, output=str(tmp_path / "whole")))

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("dpo", config(**settings), callback=stop)
    resumed = train("dpo", config(**settings, resume=True))
    ours, theirs = (load_file(run.output / "model.safetensors") for run in (resumed, expected))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    still = train(
        "dpo", config(**{**settings, "ref_update_every": 0, "ref_mix": 1.0}, output=str(tmp_path / "still"))
    )
    assert still.history[-1]["loss"] != expected.history[-1]["loss"]


REFUSED = [
    ("dpo", {"ref_mix": 0.6}, "--ref-mix has no effect without --ref-update-every"),
    (
        "dpo",
        {"ref_update_every": 1, "precompute_ref": True},
        "--ref-update-every changes the reference.*exclude",
    ),
    ("dpo", {"ref_update_every": 1, "loss": "simpo"}, "--loss simpo uses no reference: .*--ref-update-every"),
    ("listwise", {"ref_update_every": 1, "loss": "rrhf"}, "--loss rrhf uses no reference"),
    ("reward", {"ref_update_every": 1}, "fastalign train reward has no setting --ref-update-every"),
]


@pytest.mark.parametrize("method, settings, words", REFUSED, ids=[f"{m} {[*s]}" for m, s, _ in REFUSED])
def test_refused(config, method, settings, words):
    with pytest.raises(UserError, match=words):
        train(method, config(**settings))


def test_a_reference_of_other_shapes(config, tmp_path):
    make_model(hidden_size=16).save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match="--ref-update-every: the reference model's weights do not have the policy's shapes"
    ):
        train("dpo", config(ref_model=str(tmp_path / "other"), ref_update_every=1))


def test_a_checkpoint_from_before_a_setting_came():
    """Its run did what the setting's default does."""
    config = TrainConfig(batch_size=7, head="logits")
    kept = {
        name: value
        for name, value in checkpoint.settings(config).items()
        if not name.startswith("ref_") and name != "head"
    }
    state = {"method": "dpo", "settings": kept, "steps": 3, "models": {}, "data": "x"}
    checkpoint.check_same_run(state, config, "dpo", "x", {}, 3)
    with pytest.raises(
        UserError,
        match="--ref-mix was 1.0, is 0.5; --ref-update-every was 0, is 2|--ref-update-every was 0, is 2; --ref-mix",
    ):
        checkpoint.check_same_run(
            state, TrainConfig(batch_size=7, ref_update_every=2, ref_mix=0.5), "dpo", "x", {}, 3
        )
