"""Short online runs of a tiny model, for the tests of the online half."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import make_model, without_times

from fastalign.train import OnlineConfig, train_online
from fastalign.train.methods.policy_gradient import PolicyGradient
from fastalign.train.models.heads import ValueHead
from fastalign.train.optimise import Optimizer
from fastalign.train.sampling import rollout

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
        preference=None,
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
            preference=preference,
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


class Interruption(Exception):
    pass


def resumed(online, method, **settings):
    """A run that nobody interrupts, after one that was broken off in its third step has been resumed to the same
    records and the same bits."""
    expected = online(method, out="whole", **settings)

    def stop(record):
        torch.rand(3)  # nothing hangs on torch's own random state
        if record["step"] == 3 and "loss" in record:
            raise Interruption

    with pytest.raises(Interruption):
        online(method, callback=stop, **settings)
    result = online(method, resume=True, **settings)
    assert plain(result.history) == plain(expected.history)
    files = sorted(path.name for path in expected.output.glob("*.safetensors"))
    assert files == sorted(path.name for path in result.output.glob("*.safetensors")) != []
    for name in files:
        ours, theirs = (load_file(run.output / name) for run in (result, expected))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return expected


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


FEW = [{"prompt": f"the {'cat ' * i}number {i}:"} for i in range(4)]


class Stop(Exception):
    pass


@pytest.fixture
def first_update(tmp_path, monkeypatch, tokenizer):
    """`first_update(method, ...)` -> (model, value head, reference, rollouts, scores) as the first update
    finds them, its gradients in .grad."""

    def build(method, **settings):
        sampled, head, model = [], ValueHead(32), make_model()
        with torch.no_grad():
            model.lm_head.weight.mul_(4.0)  # a distribution that is not flat
            head.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
        reference = make_model(seed=1)
        reference.save_pretrained(tmp_path / "reference")
        sample = rollout.Sampler.__call__

        def remember(*arguments):
            found = sample(*arguments)
            sampled.extend(found)
            return found

        def stop(*arguments):
            raise Stop

        monkeypatch.setattr(rollout.Sampler, "__call__", remember)
        monkeypatch.setattr(PolicyGradient, "_value_head", lambda *arguments: head)
        monkeypatch.setattr(Optimizer, "update", stop)
        config = OnlineConfig(
            output=str(tmp_path / "out"), ref_model=str(tmp_path / "reference"), batch_size=4, minibatches=1,
            tokens_per_batch=70, max_new_tokens=6, max_grad_norm=0.0, progress=False, tensorboard=False,
            **settings,
        )  # fmt: skip

        def reward(completions):
            return [math.sin(7.0 * i) for i in range(len(completions))]

        texts = TEXTS if settings.get("ptx_coef") else None
        with pytest.raises(Stop):
            train_online(
                method, config, model=model, tokenizer=tokenizer, reward=reward, prompts=FEW, texts=texts
            )
        return model, head, reference, sampled, reward(sampled)

    return build


def look(model, rollouts, temperature, head=None):
    """Per response: log-probs, entropies and values of its tokens, one sequence at a time."""
    out = []
    for each in rollouts:
        ids = torch.cat([each.example.prompt, *each.example.completions]).long()
        result = model(input_ids=ids[None], output_hidden_states=True)
        rows = slice(len(each.example.prompt) - 1, len(ids) - 1)
        logp = F.log_softmax(result.logits[0, rows] / temperature, -1)
        values = None if head is None else head(result.hidden_states[-1][0, rows])
        out.append((logp.gather(-1, ids[1:][rows, None]).squeeze(-1), -(logp.exp() * logp).sum(-1), values))
    return out


def check(parameters, loss):
    parameters = list(parameters)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    for parameter, gradient in zip(parameters, expected):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert float((parameter.grad - gradient).abs().max()) < 2e-5 * scale
    assert scale > 1e-3
