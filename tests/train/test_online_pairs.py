"""The online methods that learn from which of two responses is better: pairs and their numbers, pairwise judges,
XPO and Nash-MD against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from online_cases import check, look, resumed, steps
from tiny import make_model

from fastalign.train import OnlineConfig, TrainingError, UserError
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.methods import make_method
from fastalign.train.methods.online_dpo import OptimisticPreference
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.models.reference import LiveReference
from fastalign.train.offline import Split, accumulate
from fastalign.train.sampling.pair_rules import PAIR_RULES
from fastalign.train.sampling.rewards import FunctionPreference, make_reward
from fastalign.train.sampling.rollout import Rollout, Sampler


def rollout(token, length=1, prompt="p"):
    example = TokenExample(
        torch.tensor([1]),
        (torch.full((length,), token, dtype=torch.int32),),
        {"prompt": prompt, "wanted": token},
    )
    return Rollout(example, True, f"text {token}")


def shown(pairs):
    return [(int(pair.chosen[0]), int(pair.rejected[0])) for pair in pairs]


# --- pairs and their numbers ---------------------------------------------------------------------------------


def test_pairs_of_a_step():
    def of(scores, lengths=(1,) * 8, **settings):
        method = make_method("online_dpo", OnlineConfig(samples_per_prompt=4, **settings))
        return method.pairs(0, [rollout(i, length) for i, length in enumerate(lengths)], scores)

    scores = [1, math.nan, 3, 2, 5, 5, math.nan, 5]
    assert shown(of(scores)) == [(2, 0)] and not of(scores)[0].values
    assert shown(of(scores, pair_rule="max_max")) == [(2, 3)]
    assert shown(of(scores, pair_margin=2.0)) == [] and shown(of(scores, pair_margin=1.9)) == [(2, 0)]
    longer = [1, 1, 9, 1, 1, 1, 1, 2]
    assert shown(of(scores, longer, length_penalty=0.5)) == [(3, 2), (4, 7)]
    assert shown(of(scores, pair_rule="margin")) == [(2, 0), (2, 3)]
    # What a loss reads of a pair, by the penalised scores: 3 - 4.5 = -1.5 and 2 - 0.5 = 1.5.
    first, second = of(scores, longer, length_penalty=0.5, loss="sppo", label_temperature=2.0)
    assert first.values == {"soft_label": pytest.approx(1 / (1 + math.exp(-1.5)))}
    assert second.values == {"soft_label": pytest.approx(1 / (1 + math.exp(-0.25)))}
    assert of(scores, loss="odpo", label_temperature=0.5)[0].values == {"margin": 4.0}
    assert of(scores, loss="rpo_sq")[0].values == {"target": 2.0}


def test_the_rules_are_those_of_pick():
    field = OnlineConfig.__dataclass_fields__["pair_rule"]
    assert {*field.metadata["choices"]} == {*PAIR_RULES} - {"rejection"}


@pytest.mark.parametrize("loss", ["sppo", "dno", "rpo_bwd_kl", "rpo_fwd_kl", "odpo", "rpo_sq"])
def test_losses_of_the_loop_at_step_0(online, loss):
    """Policy and reference are equal, so that the loss is a function of the scores alone."""
    scores = {}

    def reward(completions):
        scores["gaps"] = [abs(len(a) - len(b)) / 4 for a, b in zip(completions[::2], completions[1::2])]
        return [len(text) / 4 for text in completions]

    record = steps(online("online_dpo", reward=reward, loss=loss, max_steps=1))[0]
    gaps = torch.tensor([gap for gap in scores["gaps"] if gap], dtype=torch.float64)
    p, ln2 = gaps.sigmoid(), math.log(2)
    expected = {
        "sppo": lambda: (((p - 0.5) / 1e-3) ** 2).mean(),
        "dno": lambda: ln2,
        "rpo_bwd_kl": lambda: ln2 - torch.distributions.Bernoulli(p).entropy().mean(),
        "rpo_fwd_kl": lambda: (0.5 * (0.5 / p).log() + 0.5 * (0.5 / (1 - p)).log()).mean(),
        "odpo": lambda: F.softplus(gaps).mean(),
        "rpo_sq": lambda: (gaps**2).mean(),
    }[loss]()
    assert record["loss"] == pytest.approx(float(expected), rel=1e-5) and record["num_pairs"] == len(gaps) > 1


# --- judges ---------------------------------------------------------------------------------------------------


def test_a_judges_scores():
    """Two responses: the log-odds themselves. More: exact where the judge is a Bradley-Terry model, its least
    squares else. An unjudged pair leaves its two responses without a score."""
    worth = {0: 0.3, 1: -1.2, 2: 2.0, 3: 0.1, 4: 0.0, 5: -0.4}
    seen = []

    def judge(prompts, completions, wanted):
        seen.append((prompts, completions, wanted))
        return [torch.sigmoid(torch.tensor(worth[int(a[5:])] - worth[int(b[5:])])) for a, b in completions]

    rollouts = [rollout(i) for i in range(6)]
    for count in (2, 3):
        groups = FunctionPreference(judge, "judge", count)(rollouts).view(-1, count)
        truth = torch.tensor([*worth.values()]).view(-1, count)
        torch.testing.assert_close(groups, truth - truth.mean(1, keepdim=True), atol=1e-5, rtol=0)
    assert seen[1] == (["p"] * 6, [(f"text {i}", f"text {j}") for i, j in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5))],
                       [0, 0, 1, 3, 3, 4])  # fmt: skip
    sure = FunctionPreference(lambda completions: [1.0, 0.5, None], "judge", 2)(rollouts)
    assert sure[0] == -sure[1] > 6.9 and sure[2] == sure[3] == 0.0 and sure[4:].isnan().all()
    partly = FunctionPreference(lambda completions: [0.9, None, 0.5], "judge", 3)(rollouts[:3])
    assert partly.isnan().tolist() == [True, False, True]


def test_a_judge_trains_each_of_them(online):
    def judge(completions):
        """Which has more of the letter a; a tie for the same number."""
        return [1 / (1 + 2.0 ** (b.count("a") - a.count("a"))) for a, b in completions]

    for method, settings in (("online_dpo", {"loss": "sppo"}), ("xpo", {}), ("nash_md", {})):
        settings = {"eval_fraction": 0.25, "missing_eos_penalty": 0.1, "max_steps": 1, **settings}
        result = online(method, reward=None, preference=judge, out=method, **settings)
        assert all(math.isfinite(value) for record in result.history for value in record.values())
        assert -0.11 < result.history[0]["eval_objective/scores"] < 1.0


@pytest.mark.parametrize("method", ["xpo", "nash_md"])
def test_a_policy_that_always_wins_still_learns(online, capsys, method):
    """All its responses score the same, since the others are not among them."""
    record = steps(online(method, reward=None, preference=lambda completions: [0.9] * len(completions)))[0]
    assert record["objective/win_rate"] == pytest.approx(1.0 if method == "xpo" else 0.9)
    assert record["objective/scores_std"] == 0.0 < record["grad_norm"]
    assert "teaches nothing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda completions: [1.5] * len(completions), "returned 1.5; legal: a probability from 0 to 1"),
        (lambda completions: [-0.1] * len(completions), "returned -0.1; legal"),
        (lambda completions: [0.5], "returned 1 values for 4 pairs"),
        (lambda completions: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["above", "below", "count", "exception"],
)
def test_judges_that_fail(online, function, words):
    with pytest.raises(
        TrainingError, match=f"--preference <lambda>:? .*{words}|--preference <lambda>: {words}"
    ):
        online("xpo", reward=None, preference=function)


REFUSED = [
    ("online_dpo", {"label_temperature": 2.0}, {}, "--label-temperature has no effect: --loss dpo takes nothing but"),
    ("online_dpo", {}, {"reward": None}, "no reward: .* or --preference MODULE:FUNCTION"),
    ("nash_md", {}, {"preference": lambda completions: []}, "--reward and --preference exclude each other"),
    ("nash_md", {"label_temperature": 2.0}, {"reward": None, "preference": lambda completions: []}, "no effect with --pref"),
    ("ppo", {}, {"preference": lambda completions: []}, "ppo learns from a reward: it takes no preference"),
    ("xpo", {"samples_per_prompt": 4}, {}, "fastalign train xpo has no setting --samples-per-prompt"),
    ("nash_md", {"reward_clip": 1.0}, {}, "has no setting --reward-clip"),
    ("grpo", {"pair_rule": "max_max"}, {}, "has no setting --pair-rule"),
    ("online_dpo", {"ref_mix": 0.5}, {}, "--ref-mix has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(
    "method, settings, given, words", REFUSED, ids=[f"{m} {[*s, *g]}" for m, s, g, _ in REFUSED]
)
def test_refused(online, method, settings, given, words):
    with pytest.raises(UserError, match=words):
        online(method, **settings, **given)


def test_a_judge_by_name(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text("def first(completions):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = make_method("xpo", OnlineConfig(preference="my_judge:first")).config
    found = make_reward(config, tokenizer, 64, "cpu", compares=True)
    assert (
        found.compare([rollout(1)], [rollout(2)]).tolist() == [1.0]
        and found.name == "--preference my_judge:first"
    )
    with pytest.raises(UserError, match="fastalign train ppo has no setting --preference"):
        make_method("ppo", OnlineConfig(preference="my_judge:first"))
    with pytest.raises(UserError, match="--preference my_judge:second: AttributeError"):
        make_reward(OnlineConfig(preference="my_judge:second"), tokenizer, 64, "cpu", compares=True)


# --- the geometric mixture ------------------------------------------------------------------------------------


def sharp(seed, **options):
    model = make_model(seed=seed, **options)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    return model


def test_samples_of_the_mixture(tokenizer):
    """Every token's distribution: the two models' logits, mixed, at the temperature, whatever the padding.
    The ends of the mixture are its models."""
    torch.manual_seed(1)
    settings = {
        "vocab_size": 300,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "initializer_range": 0.5,
    }
    absolute = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))  # knows where a token stands
    models = [PackedCausalLM(model, device="cpu") for model in (sharp(0), absolute)]
    config = OnlineConfig(max_new_tokens=5, temperature=0.7, sample_batch=3)
    sampler, share = Sampler(models[0], tokenizer, config), 0.3
    prompts = [TokenExample(torch.arange(3, 3 + n, dtype=torch.int32), (), {"prompt": ""}) for n in (2, 7, 4)]

    def tokens(of):
        return [r.example.completions[0].tolist() for r in of(prompts, 4, seed=5)]

    mixture = sampler.of(models[0], models[1], share)
    drawn = tokens(mixture)
    assert drawn == tokens(mixture)
    assert tokens(sampler.of(models[0], models[1], 0.0)) == tokens(sampler)
    assert tokens(sampler.of(models[0], models[1], 1.0)) == tokens(sampler.of(models[1])) != tokens(sampler)
    # Drawn again from the definition, token by token, without padding or cache.
    seen = []

    def multinomial(probs, *args, **kwargs):
        seen.append(probs.clone())
        return original(probs, *args, **kwargs)

    original, torch.multinomial = torch.multinomial, multinomial
    try:
        rollouts = mixture(prompts, 1, seed=6)
    finally:
        torch.multinomial = original
    for model in models:
        model.restore()
    for row, sample in enumerate(rollouts):
        ids = torch.cat([sample.example.prompt, sample.example.completions[0]]).long()
        own, ref = (model.model(ids[None]).logits[0].log_softmax(-1) for model in models)
        truth = (((1 - share) * own + share * ref) / 0.7).softmax(-1)
        for t in range(sample.length):
            at = len(sample.example.prompt) - 1 + t
            torch.testing.assert_close(seen[t][row], truth[at], atol=1e-5, rtol=1e-4)


def test_a_mixture_of_vocabularies_of_two_sizes(tokenizer):
    """What one of the two does not know is never drawn."""
    for sizes, share in (((300, 310), 0.5), ((310, 300), 1.0)):
        own, other = (PackedCausalLM(sharp(seed, vocabulary=n), device="cpu") for seed, n in enumerate(sizes))
        sampler = Sampler(own, tokenizer, OnlineConfig(max_new_tokens=8), 300).of(own, other, share)
        prompts = [TokenExample(torch.arange(3, 6, dtype=torch.int32), (), {"prompt": ""})]
        assert all(int(r.example.completions[0].max()) < 300 for r in sampler(prompts, 20, seed=1))


# --- XPO and Nash-MD against their definitions -----------------------------------------------------------------


def test_xpo(tokenizer):
    """Value and gradient of a step, over several packs, ties left out."""
    model, reference = make_model(), make_model(seed=1)
    method = make_method(
        "xpo", OnlineConfig(optimism_coef=0.3, loss_options={"beta": 0.5}, tokens_per_batch=16)
    )
    lm = PackedCausalLM(model, device="cpu")
    method.learner.start(lm)
    draw = torch.Generator().manual_seed(3)
    rollouts = [
        Rollout(
            TokenExample(prompt, (torch.randint(3, 300, (n,), generator=draw, dtype=torch.int32),)), True, ""
        )
        for prompt in (torch.tensor([1, 5]), torch.tensor([1, 6, 7]), torch.tensor([1, 8]))
        for n in (3, 4)
    ]
    pairs = method.pairs(0, rollouts, [1.0, 0.0, 0.0, 1.0, 2.0, 2.0])
    assert [pair.values for pair in pairs] == [{"reference_side": 1.0}, {"reference_side": 0.0}]
    other = PackedCausalLM(reference, device="cpu")
    assert isinstance(method.learner, OptimisticPreference)
    split = Split(pairs, LiveReference(other, method.learner.token_stats))
    sums, _ = accumulate(lm, method.learner, split, range(2), backward=True)
    lm.restore(), other.restore()
    policy, ref = ([logp.sum() for logp, _, _ in look(m, rollouts, 1.0)] for m in (model, reference))
    d = [a - b.detach() for a, b in zip(policy, ref)]
    loss = (F.softplus(-0.5 * (d[0] - d[1])) + F.softplus(-0.5 * (d[3] - d[2]))) / 2
    loss = loss + 0.3 * (policy[1] + policy[3]) / 2
    assert sums.means()["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sums.means()["objective/win_rate"] == 0.5
    check(model.parameters(), loss)


def test_nash_md(first_update):
    """The gradient of a step: P - 1/2 less the KL of what follows, a tie from the KL alone."""
    model, _, reference, rollouts, scores = first_update(
        "nash_md", kl_coef=0.3, temperature=0.8, label_temperature=0.5
    )
    own, count = rollouts[:4], 4
    probabilities = [torch.sigmoid(torch.tensor((scores[i] - scores[i + count]) / 0.5)) for i in range(count)]
    total = 0.0
    for (logp, _, _), (ref, _, _), p in zip(look(model, own, 0.8), look(reference, own, 0.8), probabilities):
        d = (logp - ref).detach()
        kl = torch.stack([d[t:].sum() for t in range(len(d))])
        total = total - ((p - 0.5 - 0.3 * kl) * logp).sum() / count
    check(model.parameters(), total)


# --- whole runs -------------------------------------------------------------------------------------------------

RESUMED = [
    ("xpo", {"loss": "dno", "ref_update_every": 2, "ref_mix": 0.6}),
    ("nash_md", {"minibatches": 2, "ref_update_every": 3, "mixture_coef": 0.25}),
]


@pytest.mark.parametrize("method, settings", RESUMED, ids=[method for method, _ in RESUMED])
def test_resumed_equals_uninterrupted(online, method, settings):
    settings = {"max_steps": 4, "save_every": 2, "eval_fraction": 0.25, "eval_every": 2, **settings}
    expected = resumed(online, method, **settings)
    assert steps(expected)[0]["objective/kl"] == 0.0


def test_nash_md_leaves_out_what_cannot_be_judged(online):
    record = steps(
        online(
            "nash_md",
            reward=None,
            preference=lambda completions: [None, 1.0, 1.0, 0.0],
            max_steps=1,
            kl_coef=0.0,
        )
    )[0]
    assert record["num_unscored"] == 1 and record["objective/scores"] == pytest.approx(1 / 6)
    assert record["objective/win_rate"] == pytest.approx(2 / 3)
    nothing = online(
        "nash_md", reward=None, preference=lambda completions: [None] * 4, max_steps=1, out="none"
    )
    assert steps(nothing)[0]["policy/updates"] == 0
