"""The online methods end to end: what a step's numbers are, exact resume, what is left out, what is refused
while running."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from online_cases import TEXTS, resumed, save, steps
from safetensors.torch import load_file
from tiny import make_model

from fastalign.arena import demo, review_task
from fastalign.arena.demos import common, ppo
from fastalign.train import TrainingError, UserError

RUNS = [
    ("ppo", {"minibatches": 1, "rollout_epochs": 1}),
    (
        "ppo",
        {
            "minibatches": 1,
            "rollout_epochs": 1,
            "loss": "cispo",
            "kl_in": "loss",
            "kl_kind": "k2",
            "entropy_coef": 0.01,
        },
    ),
    (
        "ppo",
        {
            "minibatches": 1,
            "rollout_epochs": 1,
            "whiten_rewards": True,
            "bootstrap_truncated": True,
            "gamma": 0.9,
            "temperature": 0.7,
        },
    ),
    ("grpo", {"samples_per_prompt": 3, "kl_coef": 0.1}),
    ("grpo", {"samples_per_prompt": 3, "loss": "dr_grpo"}),
    ("grpo", {"samples_per_prompt": 3, "loss": "dapo", "drop_equal_groups": True, "overlong_buffer": 3}),
    ("grpo", {"samples_per_prompt": 3, "loss": "gspo", "loss_options": {"clip_high": 0.1}}),
    ("grpo", {"samples_per_prompt": 3, "loss": "sapo", "kl_in": "reward", "kl_kind": "k1", "kl_coef": 0.1}),
    ("grpo", {"samples_per_prompt": 3, "loss": "vespo"}),
    ("rloo", {}),
    ("reinforce_pp", {}),
    ("reinforce_pp", {"samples_per_prompt": 3, "loss": "reinforce"}),
    ("online_dpo", {"samples_per_prompt": 3, "loss": "ipo"}),
    ("xpo", {"loss": "simpo"}),
    ("nash_md", {"samples_per_prompt": 2}),
]


@pytest.mark.parametrize(
    "method, settings", RUNS, ids=[f"{method} {' '.join(map(str, s.values()))}" for method, s in RUNS]
)
def test_every_method_runs_and_starts_at_the_reference(online, method, settings):
    """The KL of the first step is 0 to the last bit and, as the step makes one update, so is the log-ratio:
    policy, old policy and reference are the same function of the same packs."""
    result = online(method, eval_fraction=0.25, **settings)
    first, last = steps(result)[0], steps(result)[-1]
    assert first.get("objective/kl", 0.0) == 0.0
    if method not in ("online_dpo", "xpo"):
        assert (first["val/ratio"], first["val/ratio_var"], first["policy/approxkl"]) == (1.0, 0.0, 0.0)
    assert all(math.isfinite(value) for record in result.history for value in record.values())
    assert last["step"] == 2 and last["episode"] == 2 * 4 * settings.get(
        "samples_per_prompt", {"rloo": 4, "xpo": 2}.get(method, 1)
    )
    assert {"eval_loss", "eval_objective/scores"} <= result.history[-1].keys()
    transformers.AutoModelForCausalLM.from_pretrained(result.output)


LEARNT = [
    ("ppo", {"minibatches": 2, "rollout_epochs": 2}),
    ("grpo", {}),
    ("online_dpo", {"loss_options": {"beta": 0.02}}),
]


@pytest.mark.parametrize("method, settings", LEARNT, ids=[method for method, _ in LEARNT])
def test_the_reward_rises(online, method, settings):
    def letters(completions):
        return [sum("a" <= letter <= "z" for letter in text) / max(1, len(text)) for text in completions]

    common = {
        "max_steps": 10,
        "batch_size": 12,
        "samples_per_prompt": 4,
        "learning_rate": 1e-2,
        "max_new_tokens": 4,
        "tokens_per_batch": 2000,
    }
    scores = [
        record["objective/scores"] for record in steps(online(method, reward=letters, **common, **settings))
    ]
    assert sum(scores[-2:]) / 2 > scores[0] + 0.12, scores


def test_packs_change_nothing(online):
    """A minibatch is the same update whatever number of packs it needs."""
    weights = []
    for budget in (2000, 60):
        online(
            "ppo",
            tokens_per_batch=budget,
            rollout_epochs=2,
            minibatches=2,
            max_steps=1,
            out=str(budget),
            ptx_coef=0.5,
            texts=TEXTS,
        )
        weights.append(torch.cat([p.detach().flatten() for p in run_model(online).parameters()]))
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    moved = (weights[0] - start).abs().max()
    # Adam divides a gradient by its own size: where it is rounding alone, the step still has its full length.
    assert moved > 1e-4 and ((weights[0] - weights[1]).abs() > 1e-2 * moved).float().mean() < 1e-2


def run_model(online):
    return online.model


RESUMED = [
    ("ppo", {"kl_target": 1.0, "kl_horizon": 100.0, "ptx_coef": 0.5, "rollout_epochs": 2, "minibatches": 2}),
    ("grpo", {"samples_per_prompt": 2, "rollout_epochs": 2, "loss": "gspo"}),
    ("online_dpo", {"loss": "beta_dpo", "ref_update_every": 1, "ref_mix": 0.6}),
]


@pytest.mark.parametrize("method, settings", RESUMED, ids=[method for method, _ in RESUMED])
def test_resumed_equals_uninterrupted(online, method, settings):
    settings = {
        "max_steps": 5,
        "save_every": 2,
        "eval_fraction": 0.25,
        "eval_every": 2,
        "texts": TEXTS if "ptx_coef" in settings else None,
        **settings,
    }
    expected = resumed(online, method, **settings)
    if method == "ppo":
        coefficients = [record["objective/kl_coef"] for record in steps(expected)]
        assert coefficients[0] == 0.05 and len(set(coefficients)) == 5  # the controller is at work
        assert load_file(expected.output / "value_head.safetensors")["linear.weight"].abs().max() > 0


def test_equal_rewards_teach_nothing(online):
    """Groups of equal rewards: not a bit of the weights moves."""
    for settings in ({}, {"drop_equal_groups": True}):
        result = online(
            "grpo",
            samples_per_prompt=3,
            reward=lambda completions: [0.1] * len(completions),
            out=str(len(settings)),
            **settings,
        )
        assert all(torch.equal(a, b) for a, b in zip(online.model.parameters(), make_model().parameters()))
        assert [record["frac_zero_std"] for record in steps(result)] == [1.0, 1.0]
        assert [record["policy/updates"] for record in steps(result)] == ([0, 0] if settings else [1, 1])
    result = online("online_dpo", reward=lambda completions: [0.1] * len(completions), out="dpo")
    assert [record["num_pairs"] for record in steps(result)] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(online.model.parameters(), make_model().parameters()))


def test_no_response_ends(online):
    """Nothing comes to its EOS: the penalty counts for all, nothing breaks."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[1] = 0.0
        model.generation_config.eos_token_id = None
    free = online("ppo", model=model, reward=lambda completions: [1.0] * len(completions), max_new_tokens=1)
    fined = online(
        "ppo",
        reward=lambda completions: [1.0] * len(completions),
        missing_eos_penalty=3.0,
        max_new_tokens=1,
        out="fined",
    )
    for result, score in ((free, 1.0), (fined, -2.0)):
        record = steps(result)[0]
        assert record["num_eos"] == 0 and record["objective/length"] == 1.0
        assert record["objective/scores"] == record["objective/rlhf_reward"] == score
    masked = online("grpo", mask_truncated=True, out="masked")
    assert steps(masked)[0]["frac_kept"] == 0.0 and steps(masked)[0]["policy/updates"] == 0


def test_unscored_responses(online):
    def some(completions):
        return [None if i % 2 else float(i) for i in range(len(completions))]

    result = online("grpo", reward=some, samples_per_prompt=4)
    assert steps(result)[0]["num_unscored"] == 8 and all(math.isfinite(v) for v in steps(result)[0].values())
    online("online_dpo", reward=lambda completions: [math.nan] * len(completions), out="dpo")
    with pytest.raises(
        TrainingError,
        match="step 1: the reward of 2 of 4 responses is not finite.*ppo needs a score for each",
    ):
        online("ppo", reward=some, out="ppo")
    with pytest.raises(TrainingError, match="inf"):
        online("grpo", reward=lambda completions: [math.inf] * len(completions), out="inf")


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda completions: [1.0], "returned 1 values for 4 completions"),
        (lambda completions: 1.0, "TypeError"),
        (lambda completions: ["good"] * len(completions), "ValueError: could not convert"),
        (lambda completions: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["count", "no list", "text", "exception"],
)
def test_reward_functions_that_fail(online, function, words):
    with pytest.raises(TrainingError, match=words):
        online("ppo", reward=function)


def test_what_a_reward_function_is_given(online):
    seen = []

    def everything(**columns):
        seen.append(columns)
        return torch.zeros(len(columns["completions"]))

    chat = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": i} for i in range(4)]
    online("grpo", reward=everything, prompts=chat, samples_per_prompt=2, max_steps=1, batch_size=4)
    (columns,) = seen
    assert columns.keys() == {"prompts", "completions", "answer"} and sorted(columns["answer"]) == sorted(
        [*range(4)] * 2
    )
    for prompt, completion, answer in zip(*(columns[name] for name in ("prompts", "completions", "answer"))):
        assert prompt == [{"role": "user", "content": f"{answer}?"}]
        assert completion[0]["role"] == "assistant" and isinstance(completion[0]["content"], str)
    with pytest.raises(UserError, match="needs the column 'missing', which no line of the data has"):
        online("ppo", reward=lambda completions, missing: [], out="other")
    with pytest.raises(UserError, match="keyword arguments"):
        online("ppo", reward=lambda *texts: [], out="other")


def test_every_metric_is_documented(online):
    runs = [
        online("ppo", kl_target=1.0, ptx_coef=0.5, texts=TEXTS, out="ppo"),
        online("grpo", kl_coef=0.1, samples_per_prompt=2, drop_equal_groups=True, out="grpo"),
        online("online_dpo", out="online_dpo"),
    ]
    page = (Path(__file__).parents[2] / "docs" / "training_online.md").read_text(encoding="utf-8")
    of_dpo = {name for name in runs[2].history[0] if name.startswith(("rewards/", "logps/", "logits/"))}
    of_all = {
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "step_time",
        "entropy",
        "mean_token_accuracy",
    }
    suffixes = {"policy/clipfrac_low", "policy/clipfrac_high", "policy/clipfrac_lower"}
    known = of_dpo | of_all | suffixes | {"n_empty", "nonfinite_pairs"}
    assert [
        name for run in runs for name in run.history[0] if name not in known and f"`{name}`" not in page
    ] == []


def test_target_kl_stops_the_updates(online):
    far = online("ppo", rollout_epochs=4, minibatches=2, learning_rate=0.05, max_steps=1, target_kl=1e-4)
    assert steps(far)[0]["policy/updates"] < 8
    near = online("ppo", rollout_epochs=4, minibatches=2, max_steps=1, target_kl=1e4, out="near")
    assert steps(near)[0]["policy/updates"] == 8


def test_the_reference_follows(online):
    """A reference that takes over the policy's weights after every second step is the policy in every
    third."""
    result = online("rloo", max_steps=5, ref_update_every=2)
    assert [record["objective/kl"] == 0.0 for record in steps(result)] == [True, False, True, False, True]
    mixed = online("rloo", max_steps=3, ref_update_every=2, ref_mix=0.5, out="mixed")
    assert (
        steps(mixed)[1]["objective/kl"] == steps(result)[1]["objective/kl"]
        and steps(mixed)[2]["objective/kl"] != 0.0
    )


def test_token_rewards_of_a_dpo_model(online, tmp_path):
    """RTO: beta1 (log pi_dpo - log pi_ref), clipped per token, is part of the reward."""
    make_model(seed=1).save_pretrained(tmp_path / "dpo")
    result = online("ppo", dpo_model=str(tmp_path / "dpo"), preset="rto", dpo_clip=1e-3, dpo_coef=100.0)
    extra = steps(result)[0]["objective/non_score_reward"]  # the KL is 0 in the first step
    assert 0 < abs(extra) <= 6 * 1e-3 * 1.0001
    same = online("ppo", dpo_model=str(save(make_model(), tmp_path / "same")), preset="rto", out="second")
    assert steps(same)[0]["objective/non_score_reward"] == 0.0


def test_demo_from_start_to_end_in_small(tmp_path, monkeypatch, capsys):
    """All stages on a model that learns nothing, ranked by a reward that random bytes can differ in: every
    number and file is there."""
    small = review_task.make_model(review_task.make_tokenizer(), seed=1, hidden=32, layers=1, heads=2)
    monkeypatch.setattr(review_task, "make_model", lambda tokenizer, seed: small)
    monkeypatch.setattr(review_task, "gold_reward", lambda text: len(text) % 7 / 6)
    monkeypatch.setattr(common, "SFT_STEPS", 1)
    for name, value in {
        "PROMPTS": 6,
        "HELD_OUT_PROMPTS": 4,
        "JUDGED": 4,
        "BATCH_SIZE": 4,
        "REWARD_STEPS": 2,
        "REWARD_BATCH": 4,
    }.items():
        monkeypatch.setattr(ppo, name, value)
    monkeypatch.setattr(review_task, "MAX_NEW_TOKENS", 24)
    assert demo.main(["ppo", "--steps", "2", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["policies"].keys() == {"sft", "gold", "model"} and report["curves"].keys() == {
        "gold",
        "model",
    }
    assert (
        report["policies"]["sft"]["kl"]["k1_per_token"]
        == 0.0
        < report["policies"]["gold"]["kl"]["k3_per_token"]
    )
    assert [point["step"] for point in report["curves"]["model"]] == [0, 1, 2] and 0 <= report[
        "reward_model"
    ]["held_out_accuracy"] <= 1
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "ppo_model")
    out = capsys.readouterr().out
    assert all(
        words in out
        for words in (
            "gold reward",
            "PPO, reward model",
            "KL to SFT, nats per sequence (k3",
            "held-out pairs",
        )
    )
