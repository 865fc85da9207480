"""Each method against what it is defined to be: baselines, running means, value head, reward model, lists,
exact KL, columns of the data."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import ROWS, make_lists, make_model, make_responses, make_rows, without_times

import fastalign
from fastalign.train import OnlineConfig, TrainConfig, UserError, load_tokenizer, train
from fastalign.train.data.formats import UNPAIRED
from fastalign.train.data.tokenise import tokenise
from fastalign.train.methods import METHODS, make_method, of_kind
from fastalign.train.methods.dpo import COLUMNS

LN2 = math.log(2)


@pytest.fixture
def run(config, tmp_path):
    """`run(method, rows, **settings)`: a short run on these rows, in a directory of its own."""
    outputs = iter(range(100))

    def build(method, rows, **settings):
        settings = {
            "output": str(tmp_path / f"run{next(outputs)}"),
            "token_metrics": method != "reward",
            **settings,
        }
        if method == "reward":
            del settings["token_metrics"]
        return train(method, config(data=None, **settings), examples=rows)

    return build


def close(one, other, rel=2e-4, tolerance=2e-5):
    assert len(one.history) == len(other.history)
    for a, b in zip(without_times(one.history), without_times(other.history)):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=rel, abs=tolerance), key


CASES = [
    ("dpo", "beta_dpo", "pairs"),
    ("dpo", "alpha_dpo", "pairs"),
    ("dpo", "bco", "pairs"),
    ("dpo", "aot", "pairs"),
    ("dpo", "aot_unpaired", "pairs"),
    ("dpo", "wpo", "pairs"),
    ("dpo", "sigmoid=0.8,bco_pair=0.2,sft=1.0", "pairs"),
    ("dpo", "sigmoid,beta_dpo=0.5", "pairs"),
    ("kto", "kto", "responses"),
    ("kto", "apo_zero_unpaired", "responses"),
    ("bco", "bco", "responses"),
    ("dro", "dro", "responses"),
    ("reward", "bt_rm", "pairs"),
    ("reward", "kwise_rm", "lists"),
    ("listwise", "rrhf", "lists"),
    ("sft", "sft", "demonstrations"),
]


@pytest.mark.parametrize("method, loss, rows", CASES, ids=[f"{m}-{loss}" for m, loss, _ in CASES])
def test_the_number_of_packs_changes_nothing(run, tmp_path, method, loss, rows):
    """A step in one pack or in many: the same numbers up to rounding, for losses that sort or remember as
    well. The reference is another model, so that no statistic is one of rounding errors."""
    settings = {"loss": loss, "batch_size": 4, "eval_fraction": 0.2, "learning_rate": 3e-4}
    if method not in ("reward", "sft"):
        make_model(seed=3).save_pretrained(tmp_path / "reference")
        settings["ref_model"] = str(tmp_path / "reference")
    if loss == "rrhf":
        del settings["ref_model"]
    # alpha-DPO divides by a standard deviation, which passes on errors of the log-probs many times over.
    close(
        *(run(method, ROWS[rows], tokens_per_batch=budget, **settings) for budget in (2048, 96)),
        rel=5e-4 if loss == "alpha_dpo" else 2e-4,
    )


def test_every_loss_is_served_or_refused_with_a_reason(config):
    refused = {}
    for name in fastalign.losses.available().names():
        try:
            make_method("dpo", config(loss=name))
        except UserError as error:
            refused[name] = str(error)
    assert refused.keys() == {"tdpo1", "tdpo2", "bt_rm"}
    assert (
        all("'fastalign train tdpo'" in refused[name] for name in ("tdpo1", "tdpo2"))
        and "'fastalign train reward'" in refused["bt_rm"]
    )
    for name in fastalign.losses.LISTWISE:
        if name == "kwise_rm":
            with pytest.raises(UserError, match="fastalign train reward --loss kwise_rm"):
                make_method("listwise", config(loss=name))
        else:
            make_method("listwise", config(loss=name))


# --- columns of the data, mixtures --------------------------------------------------------------------------


def test_columns_enter_the_loss(run, capsys):
    """At step 0 the implicit rewards are 0, so the loss is a function of the columns alone."""
    rows = make_rows(4)
    numbers = [0.1, 0.2, 0.7, 0.9]

    def first(loss, **columns):
        data = [
            {**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)
        ]
        return run("dpo", data, loss=loss, max_steps=1).history[0]["loss"]

    assert first("dpo", weight=numbers) == pytest.approx(LN2 * sum(numbers) / 4, rel=1e-6)
    margins = torch.tensor(numbers, dtype=torch.float64)
    assert first("odpo", margin=numbers) == pytest.approx(
        torch.nn.functional.softplus(margins).mean().item(), rel=1e-6
    )
    assert first("rpo_sq", target=numbers) == pytest.approx((margins**2).mean().item(), rel=1e-6)
    entropy = torch.distributions.Bernoulli(margins).entropy().mean().item()
    assert first("rpo_bwd_kl", soft_label=numbers) == pytest.approx(LN2 - entropy, rel=1e-5)
    capsys.readouterr()
    assert first("aot", weight=numbers) == pytest.approx(LN2, rel=1e-6)
    assert "column weight: not used by --loss aot" in capsys.readouterr().out


def test_the_wpo_weight_is_that_of_the_policy(run, model_dir):
    row = {"prompt": "the cat number", "chosen": " good good", "rejected": " bad"}
    record = run("dpo", [row], loss="wpo", max_steps=1, batch_size=1).history[0]
    tokenizer, model = (
        load_tokenizer(str(model_dir)),
        transformers.AutoModelForCausalLM.from_pretrained(model_dir).double(),
    )
    prompt, total = tokenizer(row["prompt"])["input_ids"], 0.0
    for side in (row["chosen"], row["rejected"]):
        ids = torch.tensor([tokenizer(row["prompt"] + side)["input_ids"] + [tokenizer.eos_token_id]])
        logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total += (logp.gather(-1, ids[0, len(prompt) :, None])[:, 0] - (2 * logp).logsumexp(-1)).mean().item()
    assert record["omega_mean"] == pytest.approx(min(1.0, math.exp(total)), rel=1e-5)
    assert record["loss"] == pytest.approx(LN2 * record["omega_mean"], rel=1e-6)


def test_a_mixture_is_the_sum_of_its_losses(run):
    record = run("dpo", make_rows(4), loss="dpo=0.5,sft=2.0", max_steps=1).history[0]
    assert record["loss"] == pytest.approx(0.5 * LN2 + 2.0 * record["nll_loss"], rel=1e-6)
    weighted = [{**row, "weight": 2.0} for row in make_rows(4)]  # no use for it in a mixture, not even of one
    assert run("dpo", weighted, loss="dpo=0.5", max_steps=1).history[0]["loss"] == pytest.approx(
        0.5 * LN2, rel=1e-6
    )
    options = {"simpo.beta": 2.0, "simpo.gamma": 0.0}
    parts = [run("dpo", make_rows(4), max_steps=1, loss=loss, loss_options=o).history[0]["loss"]
             for loss, o in (("simpo,dpo=3", options), ("simpo", {"beta": 2.0, "gamma": 0.0}))]  # fmt: skip
    assert parts[0] == pytest.approx(parts[1] + 3 * LN2, rel=1e-6)


def test_an_sft_term_over_the_prompt(run, model_dir):
    row = {"prompt": "the cat number", "chosen": " good good", "rejected": " bad"}
    record = run(
        "dpo", [row], loss="sft", loss_options={"sft_include_prompt": True}, max_steps=1, batch_size=1
    ).history[0]
    tokenizer, model = (
        load_tokenizer(str(model_dir)),
        transformers.AutoModelForCausalLM.from_pretrained(model_dir).double(),
    )
    ids = torch.tensor([tokenizer(row["prompt"] + row["chosen"])["input_ids"] + [tokenizer.eos_token_id]])
    assert record["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_rules_show_what_they_did_and_evaluation_does_not_teach_them(run):
    rows = make_rows(10)
    quiet, watched = (run("dpo", rows, loss="beta_dpo", eval_fraction=0.2, eval_every=n) for n in (0, 1))
    assert [r for r in without_times(watched.history) if "loss" in r] == [
        r for r in without_times(quiet.history) if "loss" in r
    ]
    record = quiet.history[1]
    assert record["kept_fraction"] == 0.75 and record["beta_used"] == pytest.approx(0.1, rel=0.2)
    assert watched.history[0]["eval_kept_fraction"] == 1.0


# --- single responses ---------------------------------------------------------------------------------------


def response_ratio(example, models, completion=None):
    """Sum of policy minus reference log-probs of a completion, in float64."""
    completion = example.completions[0] if completion is None else completion
    ids = torch.cat([example.prompt, completion]).long()
    rows = torch.arange(len(example.prompt) - 1, len(ids) - 1)
    own, ref = (model(ids[None]).logits[0].log_softmax(-1)[rows, completion.long()].sum() for model in models)
    return own - ref


def test_ktos_baseline_pairs_prompts_with_the_completion_before(run, tmp_path, model_dir, tokenizer):
    make_model(seed=3).save_pretrained(tmp_path / "reference")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path).double()
        for path in (model_dir, tmp_path / "reference")
    ]
    rows = make_responses(5)
    settings = {
        "ref_model": str(tmp_path / "reference"),
        "batch_size": 5,
        "max_steps": 1,
        "tokens_per_batch": 64,
    }
    record = run("kto", rows, loss_options={"beta": 0.2, "undesirable_weight": 1.5}, **settings).history[0]
    examples, _ = tokenise(
        ((str(i), row) for i, row in enumerate(rows)),
        tokenizer,
        UNPAIRED,
        budget=64,
        max_length=None,
        overlong="error",
    )
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    mismatched = [
        response_ratio(examples[i], models, examples[order[k - 1]].completions[0])
        for k, i in enumerate(order)
    ]
    z0 = torch.stack(mismatched).mean().clamp(min=0)
    assert record["kl"] == pytest.approx(z0.item(), rel=1e-5, abs=1e-6)
    expected = sum(
        (1.0 - torch.sigmoid(0.2 * (d - z0))) if row["label"] else 1.5 * (1.0 - torch.sigmoid(0.2 * (z0 - d)))
        for row, d in zip(rows, (response_ratio(example, models) for example in examples))
    )
    assert record["loss"] == pytest.approx(expected.item() / 5, rel=1e-5)
    assert (
        record["count/chosen"] == sum(row["label"] for row in rows)
        and record["count/rejected"] == 5 - record["count/chosen"]
    )
    assert record["rewards/margins"] == pytest.approx(record["rewards/chosen"] - record["rewards/rejected"])


def test_a_class_that_a_step_lacks_has_no_metrics(run):
    rows = [{**row, "label": True} for row in make_responses(4)]
    for method in ("kto", "bco"):
        record = run(method, rows, max_steps=1).history[0]
        assert (
            "rewards/chosen" in record
            and not {"rewards/rejected", "rewards/margins", "logits/rejected"} & record.keys()
        )
        assert all(math.isfinite(value) for value in record.values()) and record["count/rejected"] == 0


def test_a_response_left_over_at_the_end_of_an_epoch_borrows_from_its_neighbour(run):
    history = run("kto", make_responses(5), batch_size=4, max_steps=2).history
    assert history[1]["count/chosen"] + history[1]["count/rejected"] == 1 and math.isfinite(history[1]["kl"])


def test_bcos_delta_is_the_mean_of_all_rewards_seen(run):
    quiet, watched = (
        run("bco", make_responses(10), eval_fraction=0.2, eval_every=n, max_steps=4) for n in (0, 1)
    )
    training = [record for record in quiet.history if "loss" in record]
    assert [r for r in without_times(watched.history) if "loss" in r] == without_times(training)
    total = seen = 0.0
    for record in training:
        for side in ("chosen", "rejected"):
            total += record.get(f"rewards/{side}", 0.0) * record[f"count/{side}"]
            seen += record[f"count/{side}"]
        assert record["delta"] == pytest.approx(total / seen, rel=1e-5, abs=1e-9)
    assert watched.history[-1]["eval_delta"] == watched.history[-2]["delta"]


def test_bcos_weights_are_of_undesirable_responses(run):
    rows = [{**row, "weight": 3.0} for row in make_responses(4)]
    bad = sum(not row["label"] for row in rows)
    assert run("bco", rows, max_steps=1).history[0]["loss"] == pytest.approx(
        LN2 * (4 - bad + 3 * bad) / 4, rel=1e-6
    )


def test_dros_rewards_are_standardised_and_its_head_learns(run):
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"], "score": 10.0 + 5.0 * i}
        for i, row in enumerate(make_responses(8))
    ]
    result = run("dro", rows, batch_size=8, max_steps=20, learning_rate=3e-3, loss_options={"tau": 0.5})
    first, last = result.history[0], result.history[-1]
    assert (
        first["loss"] == pytest.approx(0.5, rel=1e-6)
        and first["value/mean"] == 0
        and first["value/squared_error"] == pytest.approx(1.0)
    )
    assert last["loss"] < 0.2
    head = load_file(result.output / "value_head.safetensors")
    assert head["linear.weight"].dtype == torch.float32 and head["linear.weight"].abs().sum() > 0
    raw = run("dro", rows, batch_size=8, max_steps=1, loss_options={"standardise": False})
    assert raw.history[0]["loss"] == pytest.approx(sum(row["score"] ** 2 for row in rows) / 16, rel=1e-6)


# --- reward models ------------------------------------------------------------------------------------------


def test_a_reward_model_loads_with_transformers_and_scores_padded_batches(run, tokenizer):
    rows = [{**row, "margin": 0.5} for row in make_rows(8)]
    result = run(
        "reward", rows, max_steps=12, learning_rate=3e-3, loss_options={"centering": 0.01}, eval_fraction=0.25
    )
    assert {"accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens"} <= result.history[
        1
    ].keys()
    assert (
        result.metrics["eval_accuracy"] == 1
        and result.metrics["min_reward"] < result.metrics["mean_reward"] < result.metrics["max_reward"]
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result.output)
    saved = transformers.AutoTokenizer.from_pretrained(result.output)
    assert (
        model.config.num_labels == 1 and model.config.pad_token_id == saved.pad_token_id != saved.eos_token_id
    )
    texts = [row["prompt"] + row[side] + "</s>" for row in rows for side in ("chosen", "rejected")]
    alone = torch.cat(
        [model(**saved(text, return_tensors="pt", return_token_type_ids=False)).logits for text in texts]
    )
    for side in ("left", "right"):
        saved.padding_side = side
        padded = model(**saved(texts, return_tensors="pt", padding=True, return_token_type_ids=False)).logits
        torch.testing.assert_close(padded, alone, rtol=1e-3, atol=1e-4)
    # The trainer reads the same scores: the saved model, trained further, starts from them.
    again = run("reward", rows, model=str(result.output), batch_size=8, max_steps=1).history[0]
    chosen, rejected = alone.view(-1, 2).unbind(1)
    assert again["accuracy"] == 1 and again["mean_reward"] == pytest.approx(alone.mean().item(), abs=1e-4)
    assert again["loss"] == pytest.approx(
        torch.nn.functional.softplus(0.5 - chosen + rejected).mean().item(), rel=1e-4
    )


def test_a_tokenizer_with_nothing_to_pad_with_gets_a_token(config, model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.bos_token = None
    settings = make_model(vocabulary=len(tokenizer)).config
    settings.num_labels = 1
    model = transformers.LlamaForSequenceClassification(settings)
    result = train(
        "reward",
        config(model=None, data=None, max_steps=1),
        model=model,
        tokenizer=tokenizer,
        examples=make_rows(4),
    )
    saved = transformers.AutoTokenizer.from_pretrained(result.output)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(result.output)
    assert saved.pad_token == "<|pad|>" and again.config.pad_token_id == saved.pad_token_id == len(tokenizer)
    assert again.get_input_embeddings().weight.shape[0] == len(saved) and tokenizer.pad_token is None


def test_lists_of_two_train_the_same_reward_model_as_pairs(run):
    lists = [
        {"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "scores": [0, 1]}
        for r in make_rows(6)
    ]
    one, other = run("reward", make_rows(6)), run("reward", lists, loss="kwise_rm")
    for a, b in zip(one.history, other.history):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["accuracy"] == a["accuracy"]


# --- lists and exact KL -------------------------------------------------------------------------------------


def test_lists_of_two_are_pairs(run):
    """Plackett-Luce over two is DPO."""
    lists = [
        {"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "scores": [-1.5, 2]}
        for r in make_rows(6)
    ]
    dpo, listwise = run("dpo", make_rows(6)), run("listwise", lists)
    for a, b in zip(dpo.history, listwise.history):
        for key in (
            "loss",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "entropy",
        ):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key


def test_listwise_with_a_precomputed_reference(run):
    close(*(run("listwise", make_lists(6), precompute_ref=p) for p in (False, True)), rel=1e-3)


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_tdpo_against_its_formula(run, tmp_path, model_dir, tokenizer, loss):
    make_model(seed=3).save_pretrained(tmp_path / "reference")
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(path).double()
        for path in (model_dir, tmp_path / "reference")
    )
    row = {"prompt": "the cat number", "chosen": " good good", "rejected": " bad"}
    settings = {"ref_model": str(tmp_path / "reference"), "max_steps": 1, "batch_size": 1, "loss": loss}
    record = run("tdpo", [row], loss_options={"beta": 0.3}, **settings).history[0]
    prompt, sums = tokenizer(row["prompt"])["input_ids"], {}
    for side in ("chosen", "rejected"):
        ids = torch.tensor([tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]])
        p, q = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (policy, reference))
        ratio = (p - q).gather(-1, ids[0, len(prompt) :, None]).sum()
        sums[side] = ratio, (q.exp() * (q - p)).sum()
    (a_w, k_w), (a_l, k_l) = sums["chosen"], sums["rejected"]
    h = 0.3 * (a_w - a_l - (1.0 if loss == "tdpo1" else 0.5) * (k_l - k_w))
    assert record["loss"] == pytest.approx(torch.nn.functional.softplus(-h).item(), rel=1e-5)
    assert record["seqkl/chosen"] == pytest.approx(k_w.item(), rel=1e-4) and record[
        "seqkl/rejected"
    ] == pytest.approx(k_l.item(), rel=1e-4)
    assert record["rewards/chosen"] == pytest.approx(0.3 * (a_w + k_w).item(), rel=1e-4)
    assert record["rewards/rejected"] == pytest.approx(0.3 * (a_l + k_l).item(), rel=1e-4)


def test_a_reward_model_needs_its_weights_when_it_is_one(run, tmp_path, model_dir):
    from safetensors.torch import save_file

    result = run("reward", make_rows(4), max_steps=1)
    weights = load_file(result.output / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, result.output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="lacks weights of its sequence classifier: model.layers.0.mlp.up_proj.weight"
    ):
        run("reward", make_rows(4), model=str(result.output))


def test_the_guide_names_every_method_loss_and_column():
    guide = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(" `"): row for row in guide.splitlines() if row.startswith("| `")}
    for name in of_kind(TrainConfig):
        method = importlib.import_module(f"fastalign.train.methods.{METHODS[name].home.split(':')[0]}")
        assert getattr(method, METHODS[name].home.split(":")[1]).default_loss in rows[name], name
    assert all(f"`{loss}`" in guide for loss in fastalign.losses.LISTWISE) and all(
        column in rows for column in COLUMNS
    )


def test_every_method_has_a_summary():
    assert set(of_kind(TrainConfig)) == {"dpo", "tdpo", "kto", "bco", "dro", "listwise", "reward", "sft"}
    assert set(METHODS) == {*of_kind(TrainConfig), *of_kind(OnlineConfig)}
    assert all(entry.summary and "loss" in entry.settings for entry in METHODS.values())
