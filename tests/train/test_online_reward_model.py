"""Online runs that are judged by a reward model, and the value heads that come from one."""

import dataclasses
import json

import pytest
import torch
import transformers
from online_cases import PROMPTS, reward, save_tokenizer_with
from safetensors.torch import load_file, save_file
from tiny import make_lists, make_model, make_rows, make_tokenizer

from fastalign.train import OnlineConfig, TrainConfig, UserError, train, train_online
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.sampling.rewards import make_reward
from fastalign.train.sampling.rollout import Rollout, Sampler


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, model_dir):
    """A reward model as `fastalign train reward` makes it."""
    folder = tmp_path_factory.mktemp("reward")
    train(
        "reward",
        TrainConfig(
            model=str(model_dir),
            output=str(folder),
            batch_size=4,
            max_steps=3,
            learning_rate=1e-2,
            progress=False,
            tensorboard=False,
        ),
        examples=make_rows(4),
    )
    return folder


def test_reward_model(online, reward_model):
    """Its scores are transformers' own; its head is where the value head starts."""
    heads = []
    result = online(
        "ppo", reward=None, reward_model=str(reward_model), max_steps=1, learning_rate=1e-12, save_every=1
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model)
    heads = load_file(result.output / "value_head.safetensors")["linear.weight"], theirs.score.weight
    assert torch.allclose(*heads, atol=1e-9) and heads[1].abs().max() > 0
    config = OnlineConfig(reward_model=str(reward_model), max_new_tokens=5, tokens_per_batch=60)
    lm, tokenizer = PackedCausalLM(make_model()), make_tokenizer()
    rollouts = Sampler(lm, tokenizer, config)(
        [TokenExample(torch.arange(3, 5 + i, dtype=torch.int32), (), {}) for i in range(4)], 2, 0
    )
    scores = make_reward(config, tokenizer, 100, "cpu")(rollouts)
    with torch.no_grad():
        for rollout, score in zip(rollouts, scores):
            ids = torch.cat([rollout.example.prompt, *rollout.example.completions]).long()
            assert torch.allclose(theirs(input_ids=ids[None]).logits.squeeze(), score, atol=1e-5)


def test_reward_models_that_do_not_fit(online, reward_model, model_dir, tmp_path):
    with pytest.raises(UserError, match="lacks weights of its sequence classifier"):
        online("ppo", reward=None, reward_model=str(model_dir))
    folder = tmp_path / "other"
    transformers.AutoModelForSequenceClassification.from_pretrained(reward_model).save_pretrained(folder)
    tokenizer = make_tokenizer()
    save_tokenizer_with(tokenizer, {"q": 7}, folder)
    with pytest.raises(
        UserError,
        match=r"--reward-model .*other: its tokenizer differs from the policy's: '.*' is \d+ there and \d+ here",
    ):
        online("ppo", reward=None, reward_model=str(folder))
    with pytest.raises(UserError, match="exclude each other"):
        online("ppo", reward_model=str(reward_model))
    with pytest.raises(UserError, match="no reward"):
        online("ppo", reward=None)


def test_a_second_ppo_run_goes_on_with_the_first_ones_value_head(online, tokenizer, tmp_path, capsys):
    """Iterated RLHF: --model points at a PPO run's output, whose value head goes along; another method's does
    not."""
    first = online("ppo")
    left = load_file(first.output / "value_head.safetensors")
    assert left["linear.weight"].abs().max() > 0

    def again():
        """The value head after a step that changes nothing."""
        config = OnlineConfig(
            model=str(first.output), output=str(tmp_path / "second"), overwrite=True, batch_size=4,
            tokens_per_batch=200, max_steps=1, max_new_tokens=6, learning_rate=1e-12, progress=False,
            tensorboard=False,
        )  # fmt: skip
        result = train_online("ppo", config, tokenizer=tokenizer, reward=reward, prompts=PROMPTS)
        return load_file(result.output / "value_head.safetensors")

    taken = again()
    assert "value head: that of the PPO run in" in capsys.readouterr().out
    assert all(torch.allclose(taken[name], left[name], atol=1e-9) for name in left)

    record = json.loads((first.output / "train_config.json").read_text())
    (first.output / "train_config.json").write_text(json.dumps(record | {"method": "dro"}))
    assert again()["linear.weight"].abs().max() < 1e-6

    (first.output / "train_config.json").write_text(json.dumps(record))
    save_file(
        {"linear.weight": torch.zeros(1, 3), "linear.bias": torch.zeros(1)},
        first.output / "value_head.safetensors",
    )
    with pytest.raises(UserError, match=r"value_head\.safetensors: not a value head for this model"):
        again()


@pytest.mark.parametrize("loss", ["bt_rm", "kwise_rm"])
def test_scores_shifted_to_demonstrations(online, config, tokenizer, tmp_path, loss):
    """After a run with --normalize-reward the chosen (of a list: best) responses score 0 on average: for
    whoever reads the model with fastalign, for a run that goes on from it, and in the value head."""
    rows = make_rows(6) if loss == "bt_rm" else make_lists(6)
    settings = {"data": None, "loss": loss, "max_steps": 2, "learning_rate": 1e-2, "token_metrics": True}
    plain, shifted = (
        train(
            "reward", config(**settings, output=str(tmp_path / str(by)), normalize_reward=by), examples=rows
        )
        for by in (False, True)
    )
    weights = [load_file(run.output / "model.safetensors") for run in (plain, shifted)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    best = [row.get("chosen") or row["completions"][row["scores"].index(max(row["scores"]))] for row in rows]
    sampled = [rollout_of(tokenizer, row["prompt"], text) for row, text in zip(rows, best)]
    raw, centred = (
        make_reward(OnlineConfig(reward_model=str(run.output), tokens_per_batch=60), tokenizer, 100, "cpu")(
            sampled
        )
        for run in (plain, shifted)
    )
    assert abs(centred.mean()) < 1e-5 < 1e-2 < abs(raw.mean())
    torch.testing.assert_close(raw - raw.mean(), centred, atol=1e-5, rtol=0)
    again = config(
        **{**settings, "model": str(shifted.output), "max_steps": 1, "batch_size": 6, "learning_rate": 1e-12}
    )
    again = train("reward", dataclasses.replace(again, normalize_reward=True), examples=rows)
    shifts = [json.loads((run.output / "config.json").read_text())["score_shift"] for run in (shifted, again)]
    assert shifts[0] == pytest.approx(-float(raw.mean()), abs=1e-5) and shifts[1] == pytest.approx(
        shifts[0], abs=1e-4
    )
    if loss == "bt_rm":
        ppo = online(
            "ppo", reward=None, reward_model=str(shifted.output), max_steps=1, learning_rate=1e-12, out="ppo"
        )
        head = load_file(ppo.output / "value_head.safetensors")
        assert head["linear.bias"].item() == pytest.approx(shifts[0], abs=1e-6)


def rollout_of(tokenizer, prompt, text):
    ids = torch.tensor([*tokenizer(prompt + text)["input_ids"], tokenizer.eos_token_id], dtype=torch.int32)
    return Rollout(TokenExample(ids[:1], (ids[1:],), {"prompt": prompt}), True, text)
