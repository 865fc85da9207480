"""What a run computes: step 0, accumulation, reference, losses, precision, the saved model."""

import json
import math

import pytest
import torch
import transformers
from tiny import make_model, make_rows, without_times, write_jsonl

import fastalign
from fastalign.train import (
    PackedCausalLM,
    PreferenceMethod,
    TrainConfig,
    TrainingError,
    UserError,
    load_model,
    load_tokenizer,
    token_pair,
    train_dpo,
)
from fastalign.train.data.examples import load_examples
from fastalign.train.data.formats import PREFERENCE
from fastalign.train.methods.base import Split
from fastalign.train.models.reference import LiveReference, precompute, weights_fingerprint
from fastalign.train.offline import accumulate
from fastalign.train.optimise import learning_rate

LN2 = math.log(2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention": "sdpa"}, {"attention": "eager"}, {"dtype": "bfloat16"}, {"token_metrics": False}],
    ids=["float32", "sdpa", "eager", "bfloat16", "plain"],
)
def test_step_0_is_ln_2_with_rewards_exactly_0(config, settings):
    result = train_dpo(config(max_steps=1, eval_fraction=0.25, **settings))
    before, first = result.history[:2]
    assert before["step"] == 0 and first["step"] == 1
    for record, prefix in ((before, "eval_"), (first, "")):
        assert abs(record[prefix + "loss"] - LN2) < 1e-6
        assert all(
            record[f"{prefix}rewards/{name}"] == 0 for name in ("chosen", "rejected", "margins", "accuracies")
        )


def test_step_0_with_a_precomputed_reference(config):
    """Other packs than in training: equal to rounding."""
    first = train_dpo(config(max_steps=1, precompute_ref=True, tokens_per_batch=64)).history[0]
    assert (
        abs(first["loss"] - LN2) < 1e-6
        and abs(first["rewards/chosen"]) < 1e-6
        and abs(first["rewards/rejected"]) < 1e-6
    )


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "ipo", "hinge_norm", "simpo", "slic_hf", "cpo"])
def test_micro_batching_changes_nothing(config, loss, tmp_path):
    """One pack per step or several: the same run, up to rounding."""
    runs, packs = [], []
    for name, budget in (("one", 2048), ("many", 48)):
        calls = []

        def loss_fn(*args, calls=calls, **kwargs):
            calls.append(kwargs["num_items"])
            return fastalign.preference_loss(*args, **kwargs)

        runs.append(
            train_dpo(
                config(
                    loss=loss,
                    batch_size=7,
                    tokens_per_batch=budget,
                    output=str(tmp_path / name),
                    weight_decay=0.1,
                    max_grad_norm=0.5,
                ),
                loss_fn=loss_fn,
            )
        )
        packs.append(len(calls))
    assert packs[0] == 3 and packs[1] > 6
    for one, many in zip(without_times(runs[0].history), without_times(runs[1].history)):
        assert one.keys() == many.keys()
        for key, value in one.items():
            assert many[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key
    weights = [transformers.AutoModelForCausalLM.from_pretrained(run.output).state_dict() for run in runs]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=2e-5)


def random_pairs(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        token_pair(*(torch.randint(300, (n,), dtype=torch.int32, generator=generator) for n in size))
        for size in sizes
    ]


def preference_method(config):
    method = PreferenceMethod(config)
    return method, method.token_stats


def test_loss_and_gradient_are_those_of_the_formula(config):
    """All pairs in several packs, against DPO written out on single sequences in float64."""
    pairs = random_pairs((5, 3, 9), (2, 1, 4), (8, 6, 6))
    method, token_stats = preference_method(config(loss_options={"beta": 0.3}, tokens_per_batch=40))
    lm, reference = PackedCausalLM(make_model()), PackedCausalLM(make_model(seed=1))
    sums, tokens = accumulate(
        lm, method, Split(pairs, LiveReference(reference, token_stats)), range(3), backward=True
    )
    assert tokens == sum(pair.tokens() for pair in pairs) and len(method.batches(Split(pairs), range(3))) > 1

    truth, ref_truth = make_model().double().eval(), make_model(seed=1).double().eval()

    def ratio(pair, side):
        ids = torch.cat([pair.prompt, side]).long()
        rows = torch.arange(len(pair.prompt) - 1, len(ids) - 1)
        own, ref = (
            model(ids[None]).logits[0].log_softmax(-1)[rows, side.long()].sum()
            for model in (truth, ref_truth)
        )
        return own - ref.detach()

    margins = torch.stack([ratio(pair, pair.chosen) - ratio(pair, pair.rejected) for pair in pairs])
    expected = -torch.nn.functional.logsigmoid(0.3 * margins).mean()
    expected.backward()
    means = sums.means()
    assert means["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert means["rewards/margins"] == pytest.approx(0.3 * margins.mean().item(), rel=1e-5)
    assert means["rewards/accuracies"] == (margins > 0).double().mean().item()
    for (name, parameter), exact in zip(lm.model.named_parameters(), truth.parameters()):
        torch.testing.assert_close(parameter.grad.double(), exact.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_token_metrics_are_trl_s(config):
    """Means over scored tokens: logits over tokens and vocabulary per side, entropy over both sides, top-1
    accuracy on the chosen side."""
    (pair,) = random_pairs((4, 6, 3))
    model = make_model().eval()
    record = train_dpo(
        config(max_steps=1, model=None, data=None),
        model=make_model(),
        tokenizer=load_tokenizer(config().model),
        examples=[pair],
    ).history[0]
    logits = {
        name: model(torch.cat([pair.prompt, side]).long()[None]).logits[0, 3:-1].double()
        for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    for name, rows in logits.items():
        assert record[f"logits/{name}"] == pytest.approx(rows.mean().item(), abs=1e-6)
    both = torch.cat(list(logits.values()))
    assert record["entropy"] == pytest.approx(
        torch.distributions.Categorical(logits=both).entropy().mean().item(), rel=1e-5
    )
    assert (
        record["mean_token_accuracy"] == (logits["chosen"].argmax(-1) == pair.chosen).double().mean().item()
    )
    assert record["logps/chosen"] == pytest.approx(
        logits["chosen"].log_softmax(-1)[range(6), pair.chosen.long()].sum().item(), rel=1e-5
    )


def test_training_learns_and_the_saved_model_is_the_trained_one(config):
    result = train_dpo(
        config(max_steps=None, epochs=12, learning_rate=3e-3, eval_data=config().data, eval_every=18)
    )
    records = [record for record in result.history if "eval_loss" in record]
    assert [record["step"] for record in records] == [0, 18, 36]
    assert records[0]["eval_loss"] == pytest.approx(LN2, abs=1e-6)
    assert records[-1]["eval_loss"] < 0.3 and records[-1]["eval_rewards/accuracies"] == 1
    assert (
        len(result.step_times) == 36
        and result.metrics["step"] == 36
        and result.metrics["eval_loss"] == records[-1]["eval_loss"]
    )
    # The same pairs with the saved model: nothing left to learn, and its reference is itself again.
    again = train_dpo(
        config(
            model=str(result.output),
            output=str(result.output / "again"),
            eval_data=config().data,
            max_steps=1,
        )
    )
    assert again.history[0]["eval_logps/chosen"] == pytest.approx(records[-1]["eval_logps/chosen"], abs=1e-4)
    model = transformers.AutoModelForCausalLM.from_pretrained(result.output)
    assert (
        transformers.AutoTokenizer.from_pretrained(result.output)("good")["input_ids"]
        == load_tokenizer(config().model)("good")["input_ids"]
    )
    assert model.config._attn_implementation != "fastalign_packed"


def test_the_record_of_a_run(config, capsys):
    result = train_dpo(config(eval_fraction=0.25, tensorboard=True))
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    trl = {
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "mean_token_accuracy",
        "num_tokens",
    }
    assert trl <= lines[1].keys() and all(
        f"eval_{name}" in lines[0] for name in trl - {"grad_norm", "learning_rate", "epoch", "num_tokens"}
    )
    assert list((result.output / "tensorboard").iterdir())
    assert json.loads((result.output / "train_config.json").read_text())["config"]["loss"] == "dpo"
    out = capsys.readouterr().out
    assert (
        "training data: 12 pairs" in out
        and "step 3/3: loss" in out
        and "eval 3/3: loss" in out
        and "attention: packed" in out
    )


def test_precomputed_reference_is_cached_by_what_it_depends_on(config, capsys, data_file, tmp_path):
    def said():
        return capsys.readouterr().out

    train_dpo(config(precompute_ref=True, eval_fraction=0.25))
    assert said().count("computed and cached") == 2
    (tmp_path / "out" / "metrics.jsonl").unlink()  # keep the caches, which --overwrite would remove
    caches = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("ref_logprobs*")}
    assert set(caches) == {"ref_logprobs.safetensors", "ref_logprobs_eval.safetensors"}

    def again(**settings):
        output = tmp_path / f"again{len(list(tmp_path.iterdir()))}"
        output.mkdir()
        for name, content in caches.items():
            (output / name).write_bytes(content)
        # A cache in the directory counts as an earlier run; resuming is the way to use it, so call the
        # function itself.
        method, token_stats = preference_method(config())
        head, dtype = settings.pop("head", None), settings.pop("dtype", "float32")
        lm = PackedCausalLM(load_model(settings.pop("model", config().model)), dtype=dtype, head=head)
        pairs, _ = load_examples(
            config(eval_fraction=0.25, **settings), PREFERENCE, load_tokenizer(config().model), None
        )
        precompute(
            LiveReference(lm, token_stats),
            pairs,
            output / "ref_logprobs.safetensors",
            weights=weights_fingerprint(lm.model),
            budget=256,
            progress=False,
        )
        return said()

    assert "read from" in again()
    other = tmp_path / "other"
    make_model(seed=5).save_pretrained(other)
    assert "belongs to other weights" in again(model=str(other))
    assert "belongs to other weights" in again(dtype="bfloat16")
    assert "belongs to other weights" in again(head="logits")
    write_jsonl(data_file, make_rows()[::-1])
    assert "belongs to other weights, data" in again()
    write_jsonl(data_file, make_rows())
    caches["ref_logprobs.safetensors"] = caches["ref_logprobs.safetensors"][:40]
    text = again()
    assert "unreadable and is computed again" in text and "computed and cached" in text


def test_a_reference_of_its_own(config, tmp_path):
    make_model(seed=3).save_pretrained(tmp_path / "reference")
    live = train_dpo(config(ref_model=str(tmp_path / "reference")))
    cached = train_dpo(
        config(ref_model=str(tmp_path / "reference"), precompute_ref=True, output=str(tmp_path / "cached"))
    )
    assert abs(live.history[0]["rewards/chosen"]) > 1e-3
    for a, b in zip(without_times(live.history), without_times(cached.history)):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)


def test_replaced_head_functions(config, tmp_path):
    """The plain PyTorch path through the same loop gives the same run."""

    def logprobs(logits, labels):
        rows = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
        return rows.where(labels >= 0, 0)

    calls = []

    def loss(*args, **kwargs):
        calls.append(kwargs)
        return fastalign.preference_loss(*args, **kwargs)

    fused = train_dpo(config(token_metrics=False))
    plain = train_dpo(
        config(token_metrics=False, output=str(tmp_path / "plain")), logprob_fn=logprobs, loss_fn=loss
    )
    assert calls and plain.metrics["loss"] == pytest.approx(fused.metrics["loss"], rel=1e-4)
    with pytest.raises(UserError, match="token_metrics=False"):
        train_dpo(config(), logprob_fn=logprobs)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(config):
    model = make_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(logprobs, *args, **kwargs):
        output = fastalign.preference_loss(logprobs, *args, **kwargs)
        return output._replace(loss=output.loss * math.inf)

    with pytest.raises(TrainingError, match="step 1: loss .*no update was made"):
        train_dpo(config(model=None), model=model, tokenizer=load_tokenizer(config().model), loss_fn=loss)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_learning_rate_rises_then_falls():
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert (
        rates[:3] == [0.5, 1.0, 1.0]
        and all(a > b for a, b in zip(rates[2:], rates[3:]))
        and 0 < rates[-1] < 0.05
    )
    assert learning_rate(0, 1, TrainConfig(learning_rate=1.0, warmup_ratio=0.0)) == 1.0


def test_several_processes_are_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        train_dpo(config())


def test_data_in_memory_and_in_a_file_is_ambiguous(config):
    with pytest.raises(UserError, match="both in memory and as the file"):
        train_dpo(config(), examples=make_rows())
    with pytest.raises(UserError, match="evaluation examples are given both"):
        train_dpo(config(eval_data=config().data), eval_examples=make_rows())
