"""What the online trainer's statistics are statistics of: the step's tokens and responses, whatever packs
they came in; the reward's own scores."""

import math

import pytest
import torch
from test_online_parts import SCORES, settings, step  # noqa: F401

import fastalign
from fastalign.runtime.metric import Deviation
from fastalign.train.sampling.advantages import estimate

PROMPTS = [{"prompt": p} for p in ("a:", "bc:", "review of it:", "d", "ee ee", "f f f f")]


def rising(completions):
    return [5.0 * i for i in range(len(completions))]


@pytest.mark.parametrize(
    "method,options",
    [("ppo", {"kl_coef": 0.05}), ("grpo", {"kl_coef": 0.05, "loss": "gspo", "samples_per_prompt": 2})],
)
def test_packs_change_no_statistic(online, method, options):
    """Few packs or many: every metric of the updates is over all their tokens."""
    runs = [
        online(method, reward=rising, prompts=PROMPTS, out=str(budget), minibatches=1, rollout_epochs=2, batch_size=6, max_steps=1,
               max_new_tokens=12, learning_rate=1e-2, tokens_per_batch=budget, **options).history[-1]
        for budget in (4096, 40)
    ]  # fmt: skip
    assert runs[0].keys() == runs[1].keys()
    if method == "ppo":
        assert runs[0]["returns/var"] > 10 * runs[0]["val/ratio_var"] > 0
    for name, value in runs[0].items():
        if name not in ("eps", "time/sampling", "step_time", "num_tokens"):
            assert runs[1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_rewards_over_their_deviation(step, monkeypatch):  # noqa: F811
    """r / std: what has no reward gets none, and no response's return depends on its number of tokens."""
    seen = {}
    plain = fastalign.returns_to_go
    monkeypatch.setattr(
        fastalign,
        "returns_to_go",
        lambda rewards, *args, **options: seen.update(r=rewards) or plain(rewards, *args, **options),
    )
    for whiten in (False, True):
        estimate("reinforce_pp", settings("reinforce_pp", kl_coef=0.0, whiten_rewards=whiten), step, 0.0)
        seen[whiten] = seen["r"][step.seen.packed.mask].double()
    assert (seen[False] == 0).any() and torch.equal(seen[True] == 0, seen[False] == 0)
    assert torch.allclose(seen[True], seen[False] / seen[False].std(), rtol=1e-6)


def test_groups_are_judged_by_the_scores_of_the_reward(step):  # noqa: F811
    """Equal scores teach nothing, though penalties for length, end and KL make the rewards differ; unscored
    responses are left out."""
    step.scores[:3], step.scores[3:] = -1.0, torch.tensor([0.5, 0.5, math.nan])
    for options in ({}, {"overlong_buffer": 4, "max_new_tokens": 5}):
        for method, kl in (("grpo", {}), ("rloo", {"kl_coef": 0.3})):
            config = settings(method, drop_equal_groups=True, **options, **kl)
            found = estimate(method, config, step, 0.3)
            assert (
                float(found.metrics["frac_zero_std"][0]) == 1.0
                and float(found.metrics["frac_kept"][0]) == 0.0
            )
            assert not found.mask.any() and found.advantages.any()  # the rewards do differ
            kept = estimate(method, settings(method, **options, **kl), step, 0.3)
            assert (
                float(kept.metrics["frac_kept"][0]) == 5.0
                and not kept.mask[step.seen.packed.cu_seqlens[5] :].any()
            )
    step.scores[1] = 2.0
    found = estimate("grpo", settings("grpo", drop_equal_groups=True), step, 0.0)
    assert float(found.metrics["frac_zero_std"][0]) == 0.5 and float(found.metrics["frac_kept"][0]) == 3.0


def test_deviation_of_the_scores(step):  # noqa: F811
    metric = estimate("reinforce_pp", settings("reinforce_pp"), step, 0.0).metrics["objective/scores_std"]
    want = torch.tensor(
        [1.5, -1.5, 10.0, 0.25, -0.5, -2.0]
    ).std()  # clipped at 10, less 1 where a response did not end
    assert isinstance(metric, Deviation) and float(metric) == pytest.approx(float(want)) and len(SCORES) == 6
