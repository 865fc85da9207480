"""The controlled task: an exact reward, a byte tokenizer, seeded sampling, KL estimates; the two loss heads
that the demo compares; the demo."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastalign
from fastalign.arena import comparison, demo, review_task
from fastalign.arena.demos import common, dpo, tdpo
from fastalign.train import TrainConfig
from fastalign.train.data.tokenise import token_pair

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def byte_tokenizer():
    return review_task.make_tokenizer()


@pytest.fixture(scope="module")
def small(byte_tokenizer):
    """A model with random weights, too small to learn much."""
    return review_task.make_model(byte_tokenizer, seed=1, hidden=32, layers=1, heads=2)


# --- the task -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,reward",
    [
        (" it is great and lovely. i love it.", 1.0),
        (" it is awful and dull. i hate it.", 0.0),
        (" it is great and dull. i love it.", 2 / 3),
        (" it is great and great. i love it.", 5 / 6),  # a word counts once
        (" it is great and lovvly. i love it.", 7 / 8 * 5 / 6),  # one word of eight is unknown
        (" great" * 32, 0.5 * 2 / 3),  # 32 words where 16 are allowed
        ("", 0.0),
        ("...", 0.0),
        ("zzz", 0.0),
    ],
)
def test_gold_reward(text, reward):
    assert review_task.gold_reward(text) == pytest.approx(reward, abs=1e-12)


def test_reviews_are_seeded_fluent_and_balanced():
    reviews = review_task.make_reviews(2000, seed=3)
    assert reviews == review_task.make_reviews(2000, seed=3) != review_task.make_reviews(2000, seed=4)
    sixths = [6 * review_task.gold_reward(r.completion) for r in reviews]
    assert all(abs(x - round(x)) < 1e-9 for x in sixths)  # all words are known
    assert 0.45 < sum(review_task.gold_reward(r.completion) for r in reviews) / 2000 < 0.55
    assert max(len(r.completion.encode()) for r in reviews) < review_task.MAX_NEW_TOKENS


def test_tokenizer_has_one_token_per_byte_and_round_trips(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 258 and tokenizer.padding_side == "left" and tokenizer.bos_token is None
        for text in (
            "review of the lamp:",
            "  two  spaces\n\ttab ",
            "naïve – 日本語 🙂",
            "\x00\x7f",
            "ends with </s",
        ):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.encode()) and min(ids) >= 2
            assert tokenizer.decode(ids) == text
        assert tokenizer("a</s>")["input_ids"][-1] == tokenizer.eos_token_id


def test_model_saves_and_loads(byte_tokenizer, small, tmp_path):
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    again = review_task.make_model(byte_tokenizer, seed=1, hidden=32, layers=1, heads=2)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters()))


def test_sft_learns_from_completions_only(byte_tokenizer, small):
    model = copy.deepcopy(small)
    losses = review_task.train_sft(
        model,
        byte_tokenizer,
        review_task.make_reviews(64, seed=0),
        steps=25,
        batch_size=16,
        learning_rate=1e-2,
    )
    assert (
        len(losses) == 25 and losses[0] == pytest.approx(5.55, abs=0.2) and losses[-1] < 3.2
    )  # ln 258 at the start
    assert model.config._attn_implementation == small.config._attn_implementation
    example = review_task.Example("review of the mug:", " it is dull.")
    batch = review_task._pack(byte_tokenizer, [example])
    assert batch.labels[batch.mask].tolist() == byte_tokenizer(example.completion)["input_ids"] + [
        byte_tokenizer.eos_token_id
    ]


# --- sampling and scoring -----------------------------------------------------------------------------------


def test_generate_is_seeded_and_leaves_the_global_generator_alone(byte_tokenizer, small):
    prompts = ["review of the lamp:", "short", "review of the kettle:"]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other = (
        review_task.generate(small, byte_tokenizer, prompts, seed=s, max_new_tokens=12) for s in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert first == same != other
    for prompt, sample in zip(prompts, first):
        assert byte_tokenizer.decode(sample.prompt) == prompt  # without its padding
        assert 0 < len(sample.completion) <= 12
        assert byte_tokenizer.eos_token_id not in sample.completion[:-1]
        assert sample.text == byte_tokenizer.decode(sample.completion, skip_special_tokens=True)


def test_padding_does_not_change_greedy_samples(byte_tokenizer, small):
    prompts = ["review of the lamp:", "a"]
    options = {"seed": 0, "max_new_tokens": 8, "do_sample": False}
    together = review_task.generate(small, byte_tokenizer, prompts, **options)
    assert together == [review_task.generate(small, byte_tokenizer, [p], **options)[0] for p in prompts]


def test_scores_are_the_models_logprobs(byte_tokenizer, small):
    samples = review_task.generate(
        small, byte_tokenizer, ["review of the pen:", "x"], seed=3, max_new_tokens=6
    )
    for sample, scores in zip(samples, review_task.score_samples(small, samples, batch_size=2)):
        ids = torch.tensor([sample.prompt + sample.completion])
        with torch.no_grad():
            want = F.log_softmax(small(ids).logits[0, :-1].double(), -1).gather(-1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(scores.double(), want[len(sample.prompt) - 1 :], atol=1e-5)


def test_sampled_kl(byte_tokenizer, small):
    other = review_task.make_model(byte_tokenizer, seed=2, hidden=32, layers=1, heads=2)
    samples = review_task.generate(small, byte_tokenizer, ["a", "b"] * 16, seed=3, max_new_tokens=10)
    assert set(review_task.sampled_kl(small, small, samples).values()) == {0.0}
    kl = review_task.sampled_kl(small, other, samples)
    d = [
        p.double() - q.double()
        for p, q in zip(review_task.score_samples(small, samples), review_task.score_samples(other, samples))
    ]
    k3 = [torch.expm1(-x) + x for x in d]
    assert kl["k1_per_sequence"] == pytest.approx(float(torch.stack([x.sum() for x in d]).mean()), rel=1e-4)
    assert kl["k3_per_token"] == pytest.approx(float(torch.cat(k3).mean()), rel=1e-4)
    assert kl["k3_per_token"] > 0


def test_pairs_are_ranked_by_the_reward(byte_tokenizer, small, monkeypatch):
    monkeypatch.setattr(review_task, "gold_reward", lambda text: len(text) % 5 / 4)
    pairs = review_task.sample_pairs(
        small, byte_tokenizer, review_task.make_prompts(6, 0), seed=1, per_prompt=3, max_new_tokens=9
    )
    assert pairs
    for pair in pairs:
        chosen, rejected = (
            byte_tokenizer.decode(side, skip_special_tokens=True) for side in pair.completions
        )
        assert review_task.gold_reward(chosen) > review_task.gold_reward(rejected)
        assert byte_tokenizer.decode(pair.prompt).startswith("review of the ")
    monkeypatch.setattr(review_task, "gold_reward", lambda text: 0.5)
    assert (
        review_task.sample_pairs(
            small, byte_tokenizer, review_task.make_prompts(3, 0), seed=1, per_prompt=2, max_new_tokens=4
        )
        == []
    )


# --- the two loss heads -------------------------------------------------------------------------------------


def test_plain_and_fused_loss_heads_agree():
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(50, (n,), generator=generator) for n in (5, 9, 4, 4)]
    packed = fastalign.pack(sequences, [[False] * 2 + [True] * (len(s) - 2) for s in sequences])
    source = torch.randn(packed.labels.numel(), 50, generator=generator).requires_grad_()
    ref = torch.where(packed.mask, -torch.rand(packed.labels.numel(), generator=generator), 0.0)
    results = []
    for logprobs, loss in comparison.PATHS.values():
        logits = source * 1
        out = loss(
            logprobs(logits, packed.labels),
            ref,
            packed.cu_seqlens,
            loss=fastalign.losses.get("dpo"),
            mask=packed.mask,
            num_items=2,
        )
        metrics = {name: float(total) / float(count) for name, (total, count) in out.metrics().items()}
        results.append((float(out.loss.detach()), torch.autograd.grad(out.loss, source)[0], metrics))
    (fused, fused_grad, fused_metrics), (plain, plain_grad, plain_metrics) = results
    assert fused == pytest.approx(plain, rel=1e-6) and torch.allclose(fused_grad, plain_grad, atol=1e-6)
    assert plain_metrics == {
        name: pytest.approx(fused_metrics[name], rel=1e-5, abs=1e-6) for name in plain_metrics
    }
    with pytest.raises(ValueError, match="simpo"):
        comparison.plain_preference_loss(
            ref, ref, packed.cu_seqlens, loss=fastalign.losses.get("simpo"), num_items=2
        )


def test_both_paths_take_the_same_steps(byte_tokenizer, small, tmp_path):
    ids = [
        torch.tensor(byte_tokenizer(text)["input_ids"], dtype=torch.int32)
        for text in ("the lamp:", " good", " bad.")
    ]
    config = TrainConfig(output=str(tmp_path), batch_size=4, learning_rate=1e-3, overwrite=True)
    before = [p.clone() for p in small.parameters()]
    timing = comparison.time_steps(small, [token_pair(*ids)] * 4, config, steps=6)
    assert timing["timed_steps"] == 4 and timing["ratio"] > 0 and timing["largest_loss_difference"] < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters()))  # copies were trained


# --- the demo -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--steps", "many"], ["--seed", "-1"], ["--colour"], ["extra"]]
)
def test_demo_wrong_option_is_one_line_and_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and arguments[0] in error and len(error.strip().splitlines()) == 1


def test_demo_output_that_is_no_directory_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--output", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and len(error.strip().splitlines()) == 1


@pytest.fixture
def small_demo(monkeypatch, byte_tokenizer, small):
    """All stages on a model that learns nothing, ranked by a reward that random bytes can differ in."""
    for module, sizes in (
        (common, {"SFT_STEPS": 2}),
        (dpo, {"PROMPTS": 6, "HELD_OUT_PROMPTS": 4, "JUDGED": 4, "BATCH_SIZE": 4}),
        (tdpo, {"PROMPTS": 6, "HELD_OUT_PROMPTS": 4, "SAMPLES": 4, "BATCH_SIZE": 4}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(review_task, "make_model", lambda tokenizer, seed: copy.deepcopy(small))
    monkeypatch.setattr(review_task, "gold_reward", lambda text: len(text) % 7 / 6)
    monkeypatch.setattr(comparison, "time_steps", functools.partial(comparison.time_steps, steps=3))
    monkeypatch.setattr(
        comparison, "time_head_large", functools.partial(comparison.time_head_large, vocab=300, rounds=1)
    )


def test_demo_of_token_level_dpo_in_small(small_demo, tmp_path, capsys):
    assert demo.main(["tdpo", "--steps", "2", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(report["curves"]) == {"DPO", "TDPO1", "TDPO2"}
    for points in report["curves"].values():
        assert [point["step"] for point in points][0] == 0 and points[-1]["step"] == 2
        assert (
            points[0]["seqkl_rejected"] == 0.0
            and points[-1]["seqkl_rejected"] > 0.0
            and points[-1]["kl"] > 0.0
        )
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "TDPO2" in capsys.readouterr().out


def test_demo_from_start_to_end_in_small(small_demo, tmp_path, capsys):
    """Every number and file is there."""
    assert demo.main(["--steps", "3", "--seed", "7", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [point["step"] for point in report["curve"]] == [0, 1, 2, 3]
    assert report["before"]["kl"]["k1_per_token"] == 0.0 and report["before"]["reward_accuracy"] is None
    assert report["after"]["kl"]["k3_per_token"] > 0.0 and 0.0 <= report["after"]["reward_accuracy"] <= 1.0
    assert {name for name, t in report["timing"].items() if t["fused_ms"] > 0 and t["plain_ms"] > 0} == set(
        report["timing"]
    )
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    out = capsys.readouterr().out
    for words in (
        "gold reward",
        "KL to SFT, nats per token (k1",
        "KL to SFT, nats per sequence (k3",
        "reward accuracy",
        "plain / fused",
    ):
        assert words in out
