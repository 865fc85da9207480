"""--head fused: log-probs from hidden states and the LM head's weight are those of the model's logits, in
every method, and no logits are made."""

import math

import pytest
import torch
import transformers
from test_model_features import HEADS, build, sequences
from tiny import make_lists, make_model, make_responses, make_rows, without_times, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign
from fastalign.train import (
    OnlineConfig,
    PackedCausalLM,
    UserError,
    checkpoint,
    load_tokenizer,
    train,
    train_dpo,
    train_online,
)

OUTPUTS = ("logprob", "entropy", "mean_logit", "is_top1")


def as_dict(result):
    return {
        name: value.clone()
        for name, value in transformers.AutoModelForCausalLM.from_pretrained(result.output)
        .state_dict()
        .items()
    }


def same_run(fused, logits):
    """Metrics and weights, to rounding."""
    for a, b in zip(without_times(fused.history), without_times(logits.history), strict=True):
        assert {k: v for k, v in a.items() if k not in ("eps", "time/sampling")} == pytest.approx(
            {k: v for k, v in b.items() if k not in ("eps", "time/sampling")}, rel=2e-4, abs=2e-5
        )
    mine, other = as_dict(fused), as_dict(logits)
    for name, weight in other.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=2e-5, msg=name)


OFFLINE = [
    ("dpo", {}, make_rows),
    ("dpo", {"loss": "wpo"}, make_rows),
    ("dpo", {"loss": "simpo"}, make_rows),
    ("dpo", {"loss": "alpha_dpo", "tokens_per_batch": 64}, make_rows),
    ("dpo", {"precompute_ref": True}, make_rows),
    ("tdpo", {}, make_rows),
    ("kto", {}, make_responses),
    ("dro", {}, make_responses),
    ("listwise", {}, make_lists),
]


@pytest.mark.parametrize("method, changes, rows", OFFLINE, ids=[f"{m} {' '.join(c)}" for m, c, _ in OFFLINE])
def test_offline_methods_train_alike(config, data_file, tmp_path, capsys, method, changes, rows):
    write_jsonl(data_file, rows())
    runs = [
        train(method, config(max_steps=2, head=h, output=str(tmp_path / h), **changes))
        for h in ("fused", "logits")
    ]
    same_run(*runs)
    said = capsys.readouterr().out
    assert "head: fused\n" in said and "head: logits\n" in said


@pytest.mark.parametrize("method", ["ppo", "grpo", "online_dpo"])
def test_online_methods_train_alike(tmp_path, tokenizer, method):
    runs = []
    for head in ("fused", "logits"):
        own = (
            {"minibatches": 2, "entropy_coef": 0.01, "ptx_coef": 0.5}
            if method == "ppo"
            else {"samples_per_prompt": 2}
        )
        config = OnlineConfig(
            output=str(tmp_path / head), head=head, batch_size=4, max_steps=2, max_new_tokens=6,
            temperature=0.8, learning_rate=1e-3, progress=False, tensorboard=False, **own,
        )  # fmt: skip
        data = {
            "prompts": [{"prompt": c} for c in "abcd"],
            "reward": lambda completions: [float(len(set(text))) for text in completions],
        }
        texts = ["the cat sat on the mat"] if method == "ppo" else None
        runs.append(
            train_online(method, config, model=make_model(), tokenizer=tokenizer, texts=texts, **data)
        )
    same_run(*runs)


def with_bias():
    model = build("Phi")
    torch.nn.init.normal_(model.lm_head.bias)
    return model


KINDS = {
    **{name: HEADS[name] for name in ("gemma2", "cohere", "granite")},
    "a scale that multiplies": lambda: build("HyperCLOVAX", logits_scaling=0.25),
    "a bias": with_bias,
    "tied": lambda: make_model(tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_head(name):
    """Scale, softcap, bias and tied embeddings: all statistics, and the gradients of all weights."""
    batch, found = fastalign.pack(sequences(12, 30, 7)), []
    for head in ("fused", "logits"):
        lm = PackedCausalLM(KINDS[name](), head=head)
        stats = lm.scores(batch).stats(
            batch.labels, outputs=OUTPUTS, differentiable=("logprob", "entropy"), temperature=0.7
        )
        (stats.logprob.sum() + 0.3 * stats.entropy.square().sum()).backward()
        found.append((stats, {n: p.grad for n, p in lm.model.named_parameters()}))
        assert all("forward" not in vars(module) for module in lm.model.modules())
    (mine, grads), (other, wanted) = found
    for output in OUTPUTS:
        torch.testing.assert_close(getattr(mine, output), getattr(other, output), rtol=1e-5, atol=1e-5)
    for parameter, grad in wanted.items():
        torch.testing.assert_close(
            grads[parameter], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=parameter
        )


def test_autocast():
    """The operands are rounded as the model's own head rounds them; the logits are not."""
    batch, lm = (
        fastalign.pack(sequences(12, 30, 7)),
        PackedCausalLM(make_model(), head="fused", dtype="bfloat16"),
    )
    scores = lm.scores(batch)
    hidden, weight = (x.detach().bfloat16().double() for x in (scores.hidden, lm.head().weight))
    wanted = (
        (hidden @ weight.T)
        .log_softmax(-1)
        .gather(-1, batch.labels.clamp(min=0)[:, None])
        .squeeze(-1)
        .where(batch.labels >= 0, 0.0)
    )
    torch.testing.assert_close(scores.stats(batch.labels).logprob.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.fixture
def small_workspace(monkeypatch):
    monkeypatch.setattr("fastalign.rows.linear.WORKSPACE_BYTES", 16 << 10)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


@pytest.mark.parametrize("method", ["dpo", "tdpo"])
def test_no_logits_are_made(config, small_workspace, method):
    """Neither by the steps nor before them, while the model is tried."""
    largest, model = {}, make_model(vocabulary=2000, hidden_size=8, intermediate_size=16)
    for head in ("fused", "logits"):
        with Largest() as seen:
            result = train(
                method,
                config(
                    model=None,
                    max_steps=1,
                    batch_size=12,
                    tokens_per_batch=1024,
                    head=head,
                    overwrite=head == "logits",
                ),
                model=model,
                tokenizer=load_tokenizer(config().model),
            )
        largest[head] = seen.numbers / (2000 * result.history[0]["num_tokens"])
    assert largest["fused"] < 0.2 and largest["logits"] >= 1


@pytest.mark.parametrize("frozen", [False, True])
def test_step_0_through_tiles(config, small_workspace, frozen):
    """Policy and reference are the same numbers where the logits come in parts, too."""
    model = make_model()
    model.lm_head.requires_grad_(not frozen)
    before = model.lm_head.weight.clone()
    result = train_dpo(
        config(model=None, eval_fraction=0.25, max_steps=1),
        model=model,
        tokenizer=load_tokenizer(config().model),
    )
    for record, prefix in zip(result.history, ("eval_", "")):
        assert record[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-6 if frozen else 1e-7)
        assert all(
            abs(record[f"{prefix}rewards/{side}"]) <= (1e-6 if frozen else 0.0)
            for side in ("chosen", "rejected")
        )
    assert torch.equal(before, model.lm_head.weight) == frozen


# --- checkpoints --------------------------------------------------------------------------------------------

RUN = {"max_steps": 5, "save_every": 2, "eval_fraction": 0.25, "tokens_per_batch": 64}


def broken_off(config, **settings):
    """A run that stops behind its first checkpoint."""

    class Interruption(Exception):
        pass

    def stop(record):
        if record["step"] == 3 and "loss" in record:
            raise Interruption

    with pytest.raises(Interruption):
        train_dpo(config(**RUN, **settings), callback=stop)
    return checkpoint.newest(config().output_dir()) / "trainer.pt"


@pytest.mark.parametrize("older", [False, True])
def test_a_run_goes_on_by_the_head_that_it_began_with(config, tmp_path, older):
    """A checkpoint from before there was a choice is one of logits, and goes on to the same bits."""
    head = "logits" if older else None
    expected = train_dpo(config(**RUN, head=head, output=str(tmp_path / "whole")))
    path = broken_off(config, head=head)
    state = torch.load(path, weights_only=True)
    assert state["settings"]["head"] == ("logits" if older else "fused")
    if older:
        del state["settings"]["head"]
        torch.save(state, path)
    with pytest.raises(UserError, match="--head was (logits|fused), is (logits|fused)"):
        train_dpo(config(**RUN, resume=True, head="fused" if older else "logits"))
    result = train_dpo(config(**RUN, resume=True))
    assert without_times(result.history) == without_times(expected.history)
    weights, wanted = as_dict(result), as_dict(expected)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_an_older_checkpoint_of_a_reward_model(config):
    """It has no LM head, and no setting of one."""
    settings = {**RUN, "max_steps": 2}
    train("reward", config(**settings))
    path = checkpoint.newest(config().output_dir()) / "trainer.pt"
    state = torch.load(path, weights_only=True)
    assert state["settings"].pop("head") is None
    torch.save(state, path)
    train("reward", config(**settings, resume=True))
    with pytest.raises(UserError, match="reward has no setting --head"):
        train("reward", config(head="logits", overwrite=True))
