"""What leaves its legal range: rewards, settings, vocabularies, devices, lines. Refused at the start or
handled, in one line."""

import argparse
import dataclasses
import json
import math
import re
import time

import numpy as np
import pytest
import torch
import transformers
from tiny import make_model, make_rows, make_tokenizer

from fastalign.cli import main as cli
from fastalign.train import (
    OnlineConfig,
    TrainConfig,
    TrainingError,
    UserError,
    train,
    train_dpo,
    train_online,
)
from fastalign.train.config import from_arguments
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.methods import make_method
from fastalign.train.optimise import Optimizer
from fastalign.train.sampling.rewards import FunctionReward, ModelReward
from fastalign.train.sampling.rollout import Rollout

# --- rewards ------------------------------------------------------------------------------------------------

ROLLOUTS = [
    Rollout(TokenExample(torch.tensor([1]), (torch.tensor([2]),), {"prompt": "p"}), True, "text")
    for _ in range(3)
]


class Infinite:
    def __iter__(self):
        raise ValueError("no end")


@pytest.mark.parametrize(
    "values, want",
    [
        ([1, 2.5, None], [1, 2.5, math.nan]),
        ((math.nan, True, False), [math.nan, 1, 0]),
        (np.array([1.0, 2.0, np.nan]), [1, 2, math.nan]),
        ([np.float32(0.5), np.int64(3), np.float64(-1)], [0.5, 3, -1]),
        (torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [1, 2, 3]),
        ([torch.tensor(1), torch.tensor([2.0]), torch.tensor(3.0, dtype=torch.bfloat16)], [1, 2, 3]),
        ((x for x in (1, 2, 3)), [1, 2, 3]),
        ([math.inf, -math.inf, 0], [math.inf, -math.inf, 0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_reward_function_may_return(values, want):
    found = FunctionReward(lambda completions: values, "f")(ROLLOUTS)
    assert found.dtype == torch.float32 and torch.equal(
        found.nan_to_num(7.0), torch.tensor(want).float().nan_to_num(7.0)
    )


@pytest.mark.parametrize(
    "values",
    [
        None, 1.0, "123", b"123", {0: 1.0, 1: 2.0, 2: 3.0}, {1.0, 2.0, 3.0}, ["1", "2", "3"], ["1.5", 1, 1], [[1], [2], [3]], [1, 2], [1, 2, 3, 4], [],
        torch.tensor(1.0), torch.ones(3, 1), torch.ones(3, 2), np.ones((3, 1)), np.array(1.0), [torch.ones(2)] * 3, [1j, 1, 1], [{}, {}, {}],
        [10**400, 1, 1], [10**5000, 1, 1], [1e300, 1, 1], [-1e39, 1, 1], [b"1", 1, 1], Infinite(), [object()] * 3,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_a_reward_function_may_not_return(values):
    with pytest.raises(TrainingError, match="^--reward f") as caught:
        FunctionReward(lambda completions: values, "f")(ROLLOUTS)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_model_that_is_broken(value):
    class Scorer:
        to_device = staticmethod(lambda batch: batch)

        def scores(self, packed):
            return torch.tensor([1.0, value, 2.0])

    with pytest.raises(
        TrainingError, match=f"--reward-model: 1 of 3 scores are not finite; the first is {value}"
    ):
        ModelReward(Scorer(), 100, None)([dataclasses.replace(rollout, ended=False) for rollout in ROLLOUTS])


def run_online(tmp_path, method="grpo", model=None, tokenizer=None, reward=None, **settings):
    config = OnlineConfig(
        **{
            "output": str(tmp_path / "out"), "batch_size": 2, "max_steps": 1, "max_new_tokens": 4, "learning_rate": 1e-3, "progress": False,
            "tensorboard": False, **({} if method == "ppo" else {"samples_per_prompt": 2}), **settings,
        }
    )  # fmt: skip
    prompts = [{"prompt": c + ":"} for c in "abcd"]
    return train_online(
        method,
        config,
        model=model or make_model(),
        tokenizer=tokenizer or make_tokenizer(),
        reward=reward,
        prompts=prompts,
    )


def test_an_infinite_reward_in_an_evaluation(tmp_path):
    with pytest.raises(TrainingError, match="evaluation: the reward of .* is not finite; the first is inf"):
        run_online(tmp_path, reward=lambda completions: [math.inf] * len(completions), eval_fraction=0.5)
    result = run_online(
        tmp_path, reward=lambda completions: [None] * len(completions), eval_fraction=0.5, overwrite=True
    )
    assert result.history[0]["eval_num_unscored"] == 2


# --- what training makes of numbers that are not finite -----------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_made(config, where):
    """A clear stop, with the weights as they were."""
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model.parameters(), config(), 3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = float(optimizer.clip())
    bad = {"loss": math.nan, "grad_norm": norm} if where == "loss" else {"loss": 1.0, "grad_norm": math.inf}
    with pytest.raises(TrainingError, match="step 3: loss .* gradient norm .*; no update was made"):
        optimizer.update(2, bad)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_weights_that_an_update_has_spoiled_are_not_saved(config):
    for settings in ({}, {"save_every": 3}):
        model = make_model()

        def spoil(record, model=model):
            if record["step"] == 3:
                model.lm_head.weight.data[0, 0] = math.nan

        with pytest.raises(
            TrainingError, match="step 3: the weights of lm_head.weight are not finite any more"
        ):
            train(
                "dpo",
                config(model=None, overwrite=True, **settings),
                model=model,
                tokenizer=make_tokenizer(),
                callback=spoil,
            )
        assert not (config().output_dir() / "model.safetensors").exists() and not list(
            config().output_dir().glob("checkpoints/*")
        )


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 1e30}, {"weight_decay": 1e30, "learning_rate": 1.0}, {"max_grad_norm": 1e-300}],
)
def test_settings_at_the_ends_of_their_ranges_end_in_one_line(config, settings):
    try:
        train_dpo(config(**settings, max_steps=4))
    except TrainingError as error:
        assert re.match(r"step \d: (loss|the weights of) ", str(error))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm"])
def test_numbers_beyond_float32(name):
    with pytest.raises(UserError, match="its magnitude must be at most 1e"):
        TrainConfig(**{name: 1e300})
    for bad in (1e300, -1e300, 10**100):
        with pytest.raises(
            UserError, match=r"loss_options\['beta'\] is .*: its magnitude must be at most 1e"
        ):
            TrainConfig(loss_options={"beta": bad})
    with pytest.raises(UserError, match="--temperature is 1e-300: it must be at least 1e-6"):
        OnlineConfig(temperature=1e-300)


# --- settings -----------------------------------------------------------------------------------------------


def numeric(kind):
    hints = {name: str(field.type) for name, field in kind.__dataclass_fields__.items()}
    return [name for name, hint in hints.items() if hint.startswith(("int", "float"))]


@pytest.mark.parametrize("kind", [TrainConfig, OnlineConfig])
def test_every_number_has_a_range(kind):
    for name in numeric(kind):
        for bad in (
            math.nan,
            math.inf,
            -math.inf,
            -1,
            -1.5,
            True,
            np.bool_(True),
            10**400,
            -(10**400),
            10**5000,
            "1",
            [1],
            1j,
            np.float64("nan"),
            np.ones(1),
        ):
            with pytest.raises(UserError) as caught:
                kind(**{name: bad})
            flag = "--" + name.replace("_", "-")
            assert (name in str(caught.value) or flag in str(caught.value)) and len(
                str(caught.value)
            ) < 250, (name, bad, str(caught.value))


@pytest.mark.parametrize(
    "value", ["nan", "inf", "0", "-1", "true", "x", "9" * 400, "9" * 5000], ids=lambda value: value[:5]
)
def test_the_bound_of_wpos_weights(value):
    option = from_arguments(argparse.Namespace(loss_options=[f"clamp={value}"], loss="wpo"), TrainConfig)
    with pytest.raises(
        UserError, match="--set clamp=.*: a positive number, or None for weights without an upper bound"
    ):
        make_method("dpo", option)


def test_numpys_numbers_are_numbers(config):
    made = TrainConfig(
        learning_rate=np.float64(1e-3),
        batch_size=np.int64(4),
        weight_decay=np.float32(0.5),
        loss_options={"beta": np.float32(0.25)},
    )
    values = [made.learning_rate, made.batch_size, made.weight_decay, made.loss_options["beta"]]
    assert [type(value) for value in values] == [float, int, float, float] and values == [1e-3, 4, 0.5, 0.25]
    settings = {
        "learning_rate": np.float64(1e-3),
        "loss_options": {"beta": np.float64(0.2)},
        "save_every": np.int32(1),
    }
    train_dpo(config(**settings, max_steps=2))
    train_dpo(config(**settings, max_steps=3, resume=True))


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), object(), {"a": 1}, [object()], np.ones(2)],
    ids=lambda value: type(value).__name__,
)
def test_options_of_a_loss_are_plain(value):
    with pytest.raises(
        UserError, match=r"loss_options\['beta'\] must be a number, a text, True, False or None"
    ):
        TrainConfig(loss_options={"beta": value})


@pytest.mark.parametrize(
    "number",
    ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e400", "nan", "-inf"],
    ids=["400", "-400", "5000", "1e400", "nan", "inf"],
)
@pytest.mark.parametrize(
    "flag",
    [
        "--batch-size",
        "--learning-rate",
        "--seed",
        "--max-grad-norm",
        "--set beta",
        "--set label_smoothing",
        "--loss sigmoid",
    ],
)
def test_long_numbers_on_the_command_line(config, capsys, model_dir, data_file, tmp_path, flag, number):
    flags = [*flag.split()[:1], "=".join((*flag.split()[1:], number))]
    argv = [
        "train",
        "dpo",
        "--model",
        str(model_dir),
        "--data",
        str(data_file),
        "--output",
        str(tmp_path / "out"),
        "=".join(flags),
    ]
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert (
        code == 2
        and re.fullmatch(r"fastalign train( dpo)?: error: [^\n]+\n", error)
        and not (tmp_path / "out").exists()
    ), error[:500]


def test_variables_of_a_template_may_be_structures():
    assert TrainConfig(template_options={"tools": [{"name": "f", "n": np.int64(1)}]}).template_options == {
        "tools": [{"name": "f", "n": 1}]
    }
    with pytest.raises(UserError, match=r"template_options\['tools'\]\['x'\] must be a number, a text"):
        TrainConfig(template_options={"tools": [{"x": object()}]})


# --- data ---------------------------------------------------------------------------------------------------

LINES = {
    "400 digits": '{"prompt": "a", "chosen": "b", "rejected": "c", "weight": ' + "9" * 400 + "}",
    "5000 digits": '{"prompt": "a", "chosen": "b", "rejected": "c", "weight": ' + "9" * 5000 + "}",
    "5000 digits elsewhere": '{"prompt": "a", "chosen": "b", "rejected": "c", "other": -' + "9" * 5000 + "}",
    "1e400": '{"prompt": "a", "chosen": "b", "rejected": "c", "weight": 1e400}',
    "NaN": '{"prompt": "a", "chosen": "b", "rejected": "c", "weight": NaN}',
    "20 MB": json.dumps({"prompt": "a" * 20_000_000, "chosen": "b", "rejected": "c"}),
    "20 MB of nothing": " " * 20_000_000,
    "20 MB of brackets": "[" * 20_000_000,
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_lines_that_no_run_can_use(config, data_file, line):
    data_file.write_text(json.dumps(make_rows()[0]) + "\n" + line + "\n")
    started = time.process_time()
    with pytest.raises(UserError, match="pairs.jsonl, line 2: ") as caught:
        train_dpo(config())
    assert time.process_time() - started < 5.0 and len(" ".join(str(caught.value).split())) < 400
    assert not config().output_dir().exists()


# --- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "meta", "nonsense", "cpu:x"])
@pytest.mark.parametrize("online", [False, True])
def test_a_device_is_looked_at_before_the_data(config, tmp_path, monkeypatch, device, online):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def unread(*args, **options):
        pytest.fail("the data was read")

    for module in ("offline.load_examples", "online.load_prompts"):
        monkeypatch.setattr(f"fastalign.train.{module}", unread)
    with pytest.raises(UserError, match=f"cannot use --device {device}: "):
        if online:
            run_online(tmp_path, reward=lambda completions: [0.0] * len(completions), device=device)
        else:
            train("dpo", config(device=device))


# --- vocabularies -------------------------------------------------------------------------------------------


def test_a_mismatch_names_the_tensor(config, tmp_path):
    with pytest.raises(
        UserError,
        match=r"token id \d+, but the model's vocabulary has 200 entries \(model.embed_tokens.weight is 200 x 32\)",
    ):
        train("dpo", config(model=None), model=make_model(200), tokenizer=make_tokenizer())
    model = make_model()
    model.lm_head = torch.nn.Linear(32, 150, bias=False)
    with pytest.raises(
        UserError, match=r"the model's vocabulary has 150 entries \(lm_head.weight is 150 x 32\)"
    ):
        train("dpo", config(model=None), model=model, tokenizer=make_tokenizer())
    folder = tmp_path / "saved"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "vocab_size": 310}))
    with pytest.raises(
        UserError, match=r"weights of another size: [a-z_.]+.weight is 300 x 32 there, and must be 310 x 32"
    ):
        train("dpo", config(model=str(folder)))


def test_negative_token_ids(config):
    rows = [
        TokenExample(
            torch.tensor([1, -5], dtype=torch.int32),
            (torch.tensor([2], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)),
        )
    ] * 4
    with pytest.raises(UserError, match="token id -5"):
        train(
            "dpo",
            config(model=None, data=None),
            model=make_model(),
            tokenizer=make_tokenizer(),
            examples=rows,
        )


def beside(folder, vocabulary, kind, tokenizer=True):
    model = make_model(vocabulary, pad_token_id=2)
    if kind == "reward_model":
        model.config.num_labels = 1
        model = transformers.LlamaForSequenceClassification(model.config)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["reward_model", "ref_model", "dpo_model"])
def test_padded_vocabularies_of_different_size(tmp_path, kind):
    """A policy padded far beyond the tokenizer: it never samples what another model does not know."""
    tokens = len(make_tokenizer())
    policy = make_model(900)
    with torch.no_grad():
        policy.lm_head.weight[tokens:] = (
            policy.lm_head.weight[5] * 3
        )  # tokens that no text has, and that would be drawn
    settings = {kind: beside(tmp_path / kind, tokens, kind)}
    if kind != "reward_model":
        settings["reward"] = lambda completions: [float(len(text)) for text in completions]
    settings |= {"kl_coef": 0.1} if kind == "ref_model" else {}
    result = run_online(tmp_path, method="ppo", model=policy, batch_size=4, max_new_tokens=16, **settings)
    assert math.isfinite(result.history[-1]["loss"])
    (tmp_path / kind / "tokenizer.json").unlink()
    (tmp_path / kind / "tokenizer_config.json").unlink()
    words = (
        "cannot load the tokenizer"
        if kind == "reward_model"
        else "without a tokenizer of its own it must have the same one"
    )
    with pytest.raises(UserError, match=words):
        run_online(tmp_path, method="ppo", model=make_model(900), overwrite=True, **settings)


@pytest.mark.parametrize("kind", ["reward_model", "ref_model", "dpo_model"])
def test_a_model_beside_that_lacks_tokens(tmp_path, kind):
    settings = {kind: beside(tmp_path / kind, len(make_tokenizer()) - 1, kind)}
    if kind != "reward_model":
        settings["reward"] = lambda completions: [0.0] * len(completions)
    with pytest.raises(
        UserError,
        match=r"token id \d+, but the .* model.*vocabulary has \d+ entries \(.*embed_tokens.weight is",
    ):
        run_online(tmp_path, method="ppo", **settings)
    assert not (tmp_path / "out").exists()


def test_a_padding_token_that_the_model_does_not_have(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    while len(tokenizer) <= 300:
        tokenizer.add_tokens([f"<{len(tokenizer)}>"])
    tokenizer.pad_token = "<300>"
    run_online(
        tmp_path, tokenizer=tokenizer, reward=lambda completions: [float(len(text)) for text in completions]
    )
