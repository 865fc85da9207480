"""Short online runs of a tiny model, for the tests of the online half."""

import json

import pytest
from tiny import make_model, without_times

from fastalign.train import OnlineConfig, train_online

PROMPTS = [{"prompt": f"the {'cat ' * (i % 4)}number {i}:", "wanted": "a"} for i in range(12)]
TEXTS = ["the cat sat on the mat", "a dog is good", "that is bad"]


def reward(completions, wanted):
    """The share of the characters that are the wanted one."""
    return [text.count(letter) / max(1, len(text)) for text, letter in zip(completions, wanted)]


@pytest.fixture
def online(tmp_path, tokenizer):
    """`online(method, name=value, ...)`: a short run of the tiny model in tmp_path/out."""

    def run(
        method,
        *,
        reward=reward,
        prompts=PROMPTS,
        model=None,
        callback=None,
        texts=None,
        out="out",
        **settings,
    ):
        settings = {
            "batch_size": 4,
            "tokens_per_batch": 200,
            "max_steps": 2,
            "max_new_tokens": 6,
            "learning_rate": 1e-3,
            **settings,
        }
        config = OnlineConfig(output=str(tmp_path / out), progress=False, tensorboard=False, **settings)
        model = make_model() if model is None else model
        run.model = model
        return train_online(
            method,
            config,
            model=model,
            tokenizer=tokenizer,
            reward=reward,
            prompts=prompts,
            texts=texts,
            callback=callback,
        )

    return run


def steps(result):
    return [record for record in result.history if "loss" in record]


def plain(history):
    """Without what the clock says."""
    return [
        {name: value for name, value in record.items() if name not in ("eps", "time/sampling")}
        for record in without_times(history)
    ]


def save(model, folder, tokenizer=None):
    for part in (model, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    return folder


def save_tokenizer_with(tokenizer, moved, folder):
    """The tokenizer with some tokens' numbers exchanged."""
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for token, number in moved.items():
        other = next(name for name, value in vocabulary.items() if value == number)
        vocabulary[token], vocabulary[other] = number, vocabulary[token]
    (folder / "tokenizer.json").write_text(json.dumps(content))
