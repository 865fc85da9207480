"""The parts of the online trainer: advantages against their definitions, sampling, prompts, settings, the
command line."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
import transformers
from tiny import CHAT_TEMPLATE, make_model, make_tokenizer, write_jsonl

import fastalign
from fastalign.cli import main as cli
from fastalign.train import DataError, OnlineConfig, UserError
from fastalign.train.data.prompts import load_prompts, load_texts
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.methods import METHODS, make_method, of_kind
from fastalign.train.methods.base import Scored
from fastalign.train.methods.online import split_evenly
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.sampling.actor import Actor
from fastalign.train.sampling.advantages import Rewarded, estimate
from fastalign.train.sampling.rollout import Sampler

# --- advantages ---------------------------------------------------------------------------------------------

LENGTHS, GROUPS = (3, 1, 5, 2, 4, 2), (0, 0, 0, 1, 1, 1)
SCORES = (1.5, -0.5, 30.0, 0.25, 0.5, -2.0)
FINISHED = (True, False, True, True, False, True)


@pytest.fixture
def step():
    draw = torch.Generator().manual_seed(5)
    masks = [[False] * 2 + [True] * n for n in LENGTHS]
    packed = fastalign.pack([[3] * len(mask) for mask in masks], masks)
    policy = {
        name: torch.randn(len(packed.labels), generator=draw) for name in ("logprob", "entropy", "value")
    }
    fixed = {"ref_logprobs": torch.randn(len(packed.labels), generator=draw)}
    return Rewarded(
        Scored([], packed, policy, fixed),
        torch.tensor(SCORES),
        torch.tensor(FINISHED),
        torch.tensor(LENGTHS),
        torch.tensor(GROUPS),
    )


def rows_of(step):
    """The scored rows of every sequence: those that predict a token of the response."""
    bounds = step.seen.packed.cu_seqlens.tolist()
    return [range(a + 1, b - 1) for a, b in zip(bounds, bounds[1:])]


def final_score(i, clip=10.0, penalty=1.0):
    return max(-clip, min(clip, SCORES[i])) - (0 if FINISHED[i] else penalty)


def whitened(values, mask):
    kept = values[mask]
    return torch.where(mask, (values - kept.mean()) / torch.sqrt(kept.var() + 1e-8), 0.0)


def resolved(method, **options):
    return make_method(method, OnlineConfig(**options)).config


def settings(method, **options):
    return resolved(method, reward_clip=10.0, missing_eos_penalty=1.0, **options)


def k1(step):
    return (step.seen.policy["logprob"].double() - step.seen.fixed["ref_logprobs"].double()).tolist()


@pytest.mark.parametrize("bootstrap", [False, True])
def test_ppo(step, bootstrap):
    found = estimate("gae", settings("ppo", gamma=0.9, lam=0.8, bootstrap_truncated=bootstrap), step, 0.3)
    kl, values, mask = k1(step), step.seen.policy["value"].double().tolist(), step.seen.packed.mask
    advantages, returns = (
        torch.zeros(len(values), dtype=torch.float64),
        torch.zeros(len(values), dtype=torch.float64),
    )
    for i, rows in enumerate(rows_of(step)):
        following, trace = values[rows[-1] + 1] if bootstrap and not FINISHED[i] else 0.0, 0.0
        for t in reversed(rows):
            reward = -0.3 * kl[t] + (final_score(i) if t == rows[-1] else 0.0)
            trace = reward + 0.9 * following - values[t] + 0.9 * 0.8 * trace
            advantages[t], returns[t], following = trace, trace + values[t], values[t]
    assert torch.allclose(found.advantages.double(), whitened(advantages, mask), atol=1e-5)
    assert torch.allclose(found.returns.double()[mask], returns[mask], atol=1e-5) and torch.equal(
        found.mask, mask
    )
    error = (returns - step.seen.policy["value"].double())[mask].var() / returns[mask].var()
    assert float(found.metrics["val/explained_variance"][0]) == pytest.approx(1 - float(error), abs=1e-5)


@pytest.mark.parametrize("samples", [1, 3])
def test_reinforce_pp(step, samples):
    """Returns to go, whitened; with several samples per prompt their mean score goes off first."""
    found = estimate("reinforce_pp", settings("reinforce_pp", samples_per_prompt=samples), step, 0.3)
    returns = torch.zeros(len(step.seen.packed.mask), dtype=torch.float64)
    for i, rows in enumerate(rows_of(step)):
        peers = [final_score(j) for j in range(6) if GROUPS[j] == GROUPS[i]]
        total = final_score(i) - (sum(peers) / 3 if samples > 1 else 0.0)
        for t in reversed(rows):
            total -= 0.3 * k1(step)[t]
            returns[t] = total
    assert torch.allclose(found.advantages.double(), whitened(returns, step.seen.packed.mask), atol=1e-5)


@pytest.mark.parametrize(
    "method, options",
    [("grpo", {}), ("grpo", {"scale_rewards": False}), ("grpo", {"loss": "dr_grpo"}), ("grpo", {"kl_in": "reward", "kl_kind": "k1"}), ("rloo", {})],
    ids=["grpo", "unscaled", "dr_grpo", "kl in reward", "rloo"],
)  # fmt: skip
def test_groups(step, method, options):
    given = {"kl_coef": 0.3, "samples_per_prompt": 3, "reward_clip": 10.0, "missing_eos_penalty": 1.0}
    learner = make_method(method, OnlineConfig(**given, **options))
    config = learner.config
    found = estimate(learner.estimator, config, step, 0.3)
    penalty = 0.3 if config.kl_in == "reward" else 0.0
    rewards = [
        final_score(i) - penalty * sum(k1(step)[t] for t in rows) for i, rows in enumerate(rows_of(step))
    ]
    for i in range(6):
        peers = torch.tensor([rewards[j] for j in range(6) if GROUPS[j] == GROUPS[i]], dtype=torch.float64)
        expected = rewards[i] - peers.mean()
        if method == "rloo":
            expected = rewards[i] - (peers.sum() - rewards[i]) / 2
        elif not options or "kl_in" in options:
            expected = expected / (peers.std() + 1e-4)
        assert float(found.advantages[i]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    assert not found.per_token and torch.equal(found.mask, step.seen.packed.mask)


def test_what_is_left_out(step):
    step = dataclasses.replace(
        step,
        scores=torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan, 2.0]),
        finished=torch.tensor([True] * 5 + [False]),
    )
    config = resolved("grpo", drop_equal_groups=True, mask_truncated=True, samples_per_prompt=3)
    found = estimate("grpo", config, step, 0.0)
    assert found.advantages[:3].tolist() == [0.0] * 3 and found.advantages[4] == 0
    assert (
        float(found.advantages[5]) == -float(found.advantages[3]) == pytest.approx(1 / math.sqrt(2), abs=1e-3)
    )
    kept = [bool(found.mask[rows[0]]) for rows in rows_of(step)]
    assert kept == [False, False, False, True, False, False]
    assert [float(found.metrics[name][0]) for name in ("frac_zero_std", "frac_kept", "num_unscored")] == [
        0.5,
        1.0,
        1.0,
    ]


def test_overlong_penalty(step):
    """DAPO: the last tokens before the limit cost up to 1."""
    config = resolved("grpo", max_new_tokens=5, overlong_buffer=2, samples_per_prompt=3, scale_rewards=False)
    found = estimate("dr_grpo", config, dataclasses.replace(step, scores=torch.zeros(6)), 0.0)
    assert found.advantages.tolist() == pytest.approx([1 / 3, 1 / 3, -2 / 3, 1 / 6, -1 / 3, 1 / 6], abs=1e-6)


def test_split_evenly():
    assert [list(part) for part in split_evenly(range(7), 3)] == [[0, 1], [2, 3, 4], [5, 6]]
    assert [list(part) for part in split_evenly(range(2), 5)] == [[0], [1]]


# --- sampling -----------------------------------------------------------------------------------------------


def prompts_of(*lengths):
    return [TokenExample(torch.arange(3, 3 + n, dtype=torch.int32), (), {"prompt": ""}) for n in lengths]


def test_samples_come_from_the_distribution_that_is_scored():
    """At another temperature, left-padded, with generation settings of the model's own that would distort it:
    the mean of -log p over the samples is the mean entropy, which is known exactly for every prefix."""
    torch.manual_seed(0)
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    model.generation_config.update(top_k=5, repetition_penalty=1.5, temperature=0.1)
    lm, config = PackedCausalLM(model), OnlineConfig(temperature=0.6, max_new_tokens=12, sample_batch=100)
    rollouts = Sampler(lm, make_tokenizer(), config)(prompts_of(2, 9, 5), 100, seed=1)
    packed = fastalign.pack(
        [torch.cat([r.example.prompt, *r.example.completions]) for r in rollouts],
        [[False] * len(r.example.prompt) + [True] * r.length for r in rollouts],
    )
    with torch.no_grad():
        seen = Actor(lm, 0.6).score(packed)
    surprise = (-seen["logprob"] - seen["entropy"])[packed.mask]
    assert 1.0 < float(seen["entropy"][packed.mask].mean()) < 5.0
    assert abs(surprise.mean()) < 4 * surprise.std() / math.sqrt(
        len(surprise)
    )  # a martingale difference: uncorrelated
    assert lm.model.generation_config.top_k == 5 and lm.model.config._attn_implementation != "sdpa"


def test_samples_hang_on_the_seed_alone():
    sampler = Sampler(PackedCausalLM(make_model()), make_tokenizer(), OnlineConfig(max_new_tokens=4))
    state = torch.get_rng_state()
    first = sampler(prompts_of(2, 4), 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = sampler(prompts_of(2, 4), 3, seed=1), sampler(prompts_of(2, 4), 3, seed=2)

    def ids(rollouts):
        return [r.example.completions[0].tolist() for r in rollouts]

    assert ids(first) == ids(again) != ids(other)
    assert [len(r.example.prompt) for r in first] == [2, 2, 2, 4, 4, 4]


def test_a_response_ends_with_its_eos():
    model, ends = make_model(), {1, *range(7, 40)}
    model.generation_config.eos_token_id = sorted(ends - {1})
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    sampler = Sampler(PackedCausalLM(model), make_tokenizer(), OnlineConfig(max_new_tokens=12))
    assert set(sampler.eos) == ends and sampler.pad == 1  # EOS, as the tokenizer has no padding
    rollouts = sampler(prompts_of(3), 60, seed=0)
    for rollout in rollouts:
        ids = rollout.example.completions[0].tolist()
        assert (
            rollout.ended == (ids[-1] in ends)
            and not ends & set(ids[:-1])
            and (rollout.ended or len(ids) == 12)
        )
        assert "</s>" not in rollout.text
    assert 10 < sum(rollout.ended for rollout in rollouts) < 60


# --- data ---------------------------------------------------------------------------------------------------


def load(rows, tmp_path, tokenizer=None, positions=64, **options):
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    return load_prompts(
        OnlineConfig(data=str(path), max_new_tokens=8, **options), tokenizer or make_tokenizer(), positions
    )


def test_prompts(tmp_path):
    rows = [{"prompt": "the cat", "answer": 3}, {"prompt": [{"role": "user", "content": "hi"}]}]
    (standard, chat), held_out = load(rows, tmp_path, make_tokenizer(CHAT_TEMPLATE))
    assert held_out == [] and standard.values == rows[0] and standard.completions == ()
    assert make_tokenizer().decode(standard.prompt) == "the cat"
    assert make_tokenizer().decode(chat.prompt) == "<s>[user]hi</s>\n[assistant]"
    one, other = load([{"prompt": str(i)} for i in range(8)], tmp_path, eval_fraction=0.25)
    assert (len(one), len(other)) == (6, 2)


@pytest.mark.parametrize(
    "row, words",
    [
        ([], "line 2: expected a JSON object, got a list"),
        ({"text": "a"}, "line 2: field 'prompt': missing"),
        ({"prompt": 3}, "field 'prompt': expected text, got a number"),
        ({"prompt": [{"role": "user"}]}, r"field 'prompt\[0\].content': missing"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "ends with an assistant turn"),
        ({"prompt": ""}, "gives no token to sample from"),
        ({"prompt": "a " * 80}, "leave room for --max-new-tokens 8"),
        ({"prompt": "a", "tools": [1]}, "field 'tools': not supported"),
    ],
)
def test_lines_that_are_refused(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        load([{"prompt": "a"}, row], tmp_path)


def test_overlong_prompts(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "number " * 40}]
    assert len(load(rows, tmp_path, overlong="drop")[0]) == 1
    cut = load(rows, tmp_path, overlong="truncate_prompt")[0][1]
    whole = make_tokenizer()(rows[1]["prompt"])["input_ids"]
    assert cut.prompt.tolist() == whole[len(whole) - 56 :]
    with pytest.raises(UserError, match="has over-long ones only"):
        load(rows[1:], tmp_path, overlong="drop")
    with pytest.raises(
        UserError, match="--max-new-tokens 8 leaves no room for a prompt: a sequence has at most 8 tokens"
    ):
        load(rows, tmp_path, positions=8)


def test_texts(tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "the cat"}, {"text": "a dog is good " * 30}])
    short, long = load_texts(OnlineConfig(ptx_data=str(path)), make_tokenizer(), 16)
    assert (
        short.completions[0][-1] == 1 and short.tokens() == len(make_tokenizer()("the cat")["input_ids"]) + 1
    )
    assert long.tokens() == 16 and 1 not in long.completions[0]
    write_jsonl(path, [{"text": "a"}, {"body": "b"}])
    with pytest.raises(DataError, match="line 2: field 'text': missing"):
        load_texts(OnlineConfig(ptx_data=str(path)), make_tokenizer(), 16)


# --- settings -----------------------------------------------------------------------------------------------


def test_defaults_and_presets():
    assert resolved("ppo").kl_coef == 0.05 and resolved("grpo").samples_per_prompt == 8
    config = resolved("ppo", preset="instructgpt", ptx_data="texts.jsonl")
    assert (config.kl_coef, config.kl_in, config.kl_kind, config.ptx_coef, config.value_clip) == (
        0.02,
        "reward",
        "k1",
        27.8,
        0.2,
    )
    config = resolved("ppo", preset="anthropic_hh", kl_coef=0.5)
    assert (config.kl_coef, config.gamma, config.entropy_coef) == (0.5, 1.0, 0.0)
    assert make_method("grpo", OnlineConfig(loss="dr_grpo", max_new_tokens=77)).preset.norm_length == 77


WRONG = [
    ("ppo", {"preset": "instructgpt"}, "--ptx-coef is 27.8, so texts are needed"),
    ("ppo", {"preset": "rto"}, "--dpo-model, which is missing"),
    ("ppo", {"ptx_data": "texts.jsonl"}, "--ptx-data and --ptx-batch have no effect without --ptx-coef"),
    (
        "ppo",
        {"loss": "gspo"},
        "gspo takes one advantage per response, and ppo has one per token; legal: ppo, reinforce",
    ),
    ("ppo", {"loss": "pqo"}, "'pqo' is unknown; legal: ppo, reinforce"),
    ("ppo", {"loss_options": {"clip": 1}}, "no option 'clip'; legal"),
    ("ppo", {"loss_options": {"kl_clamp": 5}}, "--set kl_clamp has no effect: it is of the KL in the loss"),
    (
        "grpo",
        {"loss_options": {"epsilon": 0.1}},
        "no option 'epsilon'; epsilon: write clip_low=0.1, clip_high=0.1",
    ),
    (
        "grpo",
        {"loss_options": {"num_iterations": 2}},
        "a setting of the trainer, not of the loss: --rollout-epochs",
    ),
    ("ppo", {"loss_options": {"kl_coef": 1}}, "--set kl_coef is given by --kl-coef here"),
    (
        "ppo",
        {"loss_options": {"is_mode": "mask", "is_max": 2.0}},
        "this trainer samples from the policy itself",
    ),
    ("ppo", {"drop_equal_groups": True}, "fastalign train ppo has no setting --drop-equal-groups"),
    ("ppo", {"minibatches": 64}, "--minibatches 64 exceeds the 32 responses of a step"),
    ("ppo", {"kl_horizon": 100.0}, "--kl-horizon has no effect without --kl-target"),
    ("grpo", {"kl_kind": "k2"}, "--kl-in and --kl-kind have no effect with --kl-coef 0"),
    ("grpo", {"gamma": 0.9}, "fastalign train grpo has no setting --gamma"),
    ("grpo", {"samples_per_prompt": 1}, "--samples-per-prompt must be at least 2, not 1"),
    ("grpo", {"kl_target": 6.0}, "--kl-target adapts --kl-coef, which must not be 0"),
    ("rloo", {"kl_kind": "k3+"}, "choose k3, or --kl-in loss"),
    ("grpo", {"ref_update_every": 2}, "there is no reference to update"),
    ("ppo", {"ref_mix": 0.5}, "--ref-mix has no effect without --ref-update-every"),
    ("online_dpo", {"kl_coef": 0.1}, "fastalign train online_dpo has no setting --kl-coef"),
]


@pytest.mark.parametrize("method, options, words", WRONG, ids=[" ".join([m, *o]) for m, o, _ in WRONG])
def test_settings_that_are_refused(method, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_method(method, OnlineConfig(**options))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": 0.0}, "--temperature is 0.0: it must be positive"),
        ({"top_p": 1.5}, "--top-p is 1.5: it must lie in [0, 1]"),
        ({"kl_coef": -1.0}, "--kl-coef is -1.0: it must be not negative"),
        ({"kl_in": "both"}, "--kl-in is 'both'; legal: reward, loss"),
        ({"overlong_buffer": 200}, "--overlong-buffer 200 exceeds --max-new-tokens 128"),
        ({"eval_every": -1}, "--eval-every is -1"),
    ],
)
def test_numbers_that_are_refused(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        OnlineConfig(**options)


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, model_dir):
    """`command(method, *flags)` -> argv of a short run with a reward function in a file."""
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"number {i}:"} for i in range(4)])
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions):\n    return [float(len(text)) for text in completions]\n\nnumber = 3\n"
    )

    def build(method, *flags, reward="my_rewards:length"):
        common = {
            "--model": model_dir,
            "--data": data,
            "--output": tmp_path / "out",
            "--reward": reward,
            "--max-steps": 2,
            "--batch-size": 2,
        }
        argv = ["train", method, "--max-new-tokens", "4", "--no-tensorboard"]
        return [
            *argv,
            *(str(part) for pair in common.items() for part in pair if pair[1] is not None),
            *flags,
        ]

    return build


def test_the_real_command(command, tmp_path):
    """The current directory is where MODULE is looked for."""
    argv = command("ppo", "--preset", "anthropic_hh", "--set", "clip_high=0.3")
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", *argv], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2: loss" in done.stdout and "objective/scores" in done.stdout
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "train_config.json").read_text())
    assert (
        config["method"] == "ppo"
        and config["config"]["kl_coef"] == 0.001
        and (tmp_path / "out" / "value_head.safetensors").exists()
    )


@pytest.mark.parametrize(
    "method, flags, reward, words",
    [
        ("ppo", [], None, "no reward: give --reward-model DIR, --reward MODULE:FUNCTION or --judge DIR"),
        ("ppo", [], "my_rewards", "--reward my_rewards: expected MODULE:FUNCTION"),
        ("ppo", [], "my_rewards:missing", "AttributeError: module 'my_rewards' has no attribute 'missing'"),
        ("ppo", [], "no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("ppo", [], "my_rewards:number", "--reward my_rewards:number: not a function"),
        ("ppo", ["--reward-model", "nowhere"], None, "the model directory nowhere does not exist"),
        ("grpo", ["--loss", "gpro"], "my_rewards:length", "'gpro' is unknown; legal:"),
        (
            "grpo",
            ["--kl-coef", "0.1", "--set", "kl_bias_correction=yes"],
            "my_rewards:length",
            "--set kl_bias_correction must be true or false, got 'yes'",
        ),
        ("grpo", ["--vf-coef", "1"], "my_rewards:length", "fastalign train grpo has no setting --vf-coef"),
        ("online_dpo", ["--loss", "rpo_paired"], "my_rewards:length", "rpo_paired"),
        (
            "ppo",
            ["--ref-model", "nowhere"],
            "my_rewards:length",
            "the model directory nowhere does not exist",
        ),
    ],
)
def test_errors_are_one_line_with_exit_code_2(
    command, capsys, monkeypatch, tmp_path, method, flags, reward, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(command(method, *flags, reward=reward)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"fastalign train: error: .*\n", error) and words in error, error
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("method", of_kind(OnlineConfig))
def test_help_shows_the_methods_own_settings(method, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", method, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and ("--samples-per-prompt" in text) == (method != "xpo")
    assert ("--vf-coef" in text) == (method == "ppo") and ("--[no-]drop-equal-groups" in text) == (
        method in ("grpo", "rloo")
    )
    assert METHODS[method].settings == tuple(dict.fromkeys(METHODS[method].settings))
