"""A judge as the reward of an online method: the scores of `fastalign label`, as rewards."""

import math

import pytest
import torch
from fake_server import read
from train.tiny import make_model, make_tokenizer, write_jsonl

from fastalign.feedback.judges.as_reward import JudgeReward
from fastalign.train import OnlineConfig, train_online
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.sampling.rollout import Rollout


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    make_model(seed=3, num_hidden_layers=1, max_position_embeddings=1024).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def rollout(prompt, text):
    return Rollout(TokenExample(torch.empty(0, dtype=torch.int32), (), {"prompt": prompt}), True, text)


def test_rewards_are_the_labels(desk, judge):
    texts = [" a cat", " a dog on a mat", ""]
    code, lines = desk("label", [{"prompt": "who is it?", "completions": texts}], model=judge)
    assert code == 0
    rewards = JudgeReward(OnlineConfig(judge=judge), "cpu")([rollout("who is it?", text) for text in texts])
    assert rewards.tolist() == pytest.approx(lines[0]["scores"], abs=1e-6) and len(set(rewards.tolist())) == 3
    assert all(-1 <= reward <= 1 for reward in rewards.tolist())
    too_long = JudgeReward(OnlineConfig(judge=judge), "cpu")([rollout("who?", " word" * 1100)])
    assert math.isnan(too_long[0])


def test_a_method_learns_from_it(judge, model_dir, tmp_path):
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "who is it?"}, {"prompt": "the cat"}])
    settings = {
        "model": model_dir,
        "data": str(data),
        "max_new_tokens": 4,
        "max_steps": 1,
        "tensorboard": False,
    }
    config = OnlineConfig(**settings, judge=judge, output=str(tmp_path / "out"), progress=False)
    result = train_online("rloo", config)
    assert math.isfinite(result.metrics["objective/scores"]) and -1 <= result.metrics["objective/scores"] <= 1
    assert read(tmp_path / "out" / "metrics.jsonl")
    with pytest.raises(UserError, match="--reward and --judge exclude each other"):
        train_online("rloo", OnlineConfig(**settings, judge=judge, reward="m:f", output=str(tmp_path / "no")))
