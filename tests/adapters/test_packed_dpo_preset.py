"""PackedDPOTrainer with presets of fastalign, and what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch
import transformers
from dpo_runs import LIMIT, make_model, make_rows, make_trainer, mixtral, run, train
from peft import PromptTuningConfig
from trl import DPOConfig, DPOTrainer

import fastalign
from fastalign.adapters import AdapterError
from fastalign.adapters.preset import PresetLoss
from fastalign.adapters.trl import PackedDPOTrainer, refusals


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def preset(name, **options):
    return {"given": {"preset": name, "preset_options": options or None}}


def test_a_preset_is_the_loss_type_that_it_is(tmp_path):
    theirs = run(DPOTrainer, tmp_path, loss_type=["ipo"], beta=0.3, precompute_ref_log_probs=True)
    for precomputed in (False, True):
        ours = run(PackedDPOTrainer, tmp_path, precompute_ref_log_probs=precomputed, **preset("ipo", tau=0.3))
        for name in theirs[0]:
            assert ours[0][name] == pytest.approx(theirs[0][name], rel=LIMIT, abs=LIMIT), name
        assert {"loss_rewards/margins", "n_empty"} <= set(ours[0])
    for make, options, name, own in (
        (dict, {"use_weighting": True, "beta": 0.2}, "wpo", {"beta": 0.2, "clamp": None}),
        (
            lambda: {"policy": mixtral(0), "reference": mixtral(1)},
            {},
            "dpo",
            {},
        ),  # and the loss of its router
    ):
        theirs = run(DPOTrainer, tmp_path, **make(), **options)
        ours = run(PackedDPOTrainer, tmp_path, **make(), **preset(name, **own))
        for a, b in zip(theirs[:2], ours):
            assert [b["loss"], b["grad_norm"]] == pytest.approx([a["loss"], a["grad_norm"]], rel=LIMIT), name


# One of every kind of preset: a KL between whole distributions, no reference, a rule with memory, numbers of
# the pairs, a mixture.
def kinds():
    rule = fastalign.BetaDPO()
    mixture = [("dpo", 0.5), (fastalign.losses.get("cpo"), 0.5)]
    return {
        "tdpo2": preset("tdpo2"), "simpo": preset("simpo", gamma=0.3), "ld_dpo": preset("ld_dpo"),
        "sft": preset("sft"),
        "beta_dpo": preset("beta_dpo", state=rule), "odpo": preset("odpo"), "mixture": preset(mixture),
    }  # fmt: skip


@pytest.mark.parametrize("name", kinds())
def test_presets_of_every_kind_train_and_evaluate(tmp_path, name):
    """Against `preference_loss` on each sequence alone."""
    options = kinds()[name]
    rows = [{**row, "gamma_ext": 0.1 * i} for i, row in enumerate(make_rows(8))]
    lone = name in ("simpo", "sft")
    trainer = make_trainer(
        PackedDPOTrainer,
        tmp_path,
        reference=None if lone else "other",
        rows=rows,
        max_steps=1,
        evaluate=True,
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    loss, (batch,) = trainer.preset, [trainer.data_collator([trainer.train_dataset[i] for i in (5, 2, 7)])]
    wanted = alone(loss, batch, make_model(), make_model(seed=1))
    for rule in loss.rules:
        rule.eval()
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
    assert float(found) == pytest.approx(float(wanted), rel=LIMIT)
    trainer._metrics["eval"].clear()
    log = train(trainer)
    assert all(
        torch.isfinite(torch.tensor(list(record.values()))).all() for record in log if "loss" in record
    )
    assert any("eval_loss" in record for record in log)
    assert ("rewards/margins" in log[0]) == (name != "sft")
    assert (trainer.ref_model is None) == lone == (not loss.needs_reference)


def alone(loss, batch, policy, reference):
    """The loss of log-probs that every sequence has alone."""
    mask = batch["attention_mask"].bool()
    packed = fastalign.pack(
        [row[keep] for row, keep in zip(batch["input_ids"], mask)],
        [row[keep] for row, keep in zip(batch["completion_mask"], mask)],
    )
    logits = []
    with torch.no_grad():
        for model in (policy, reference):
            parts = [
                model(input_ids=row[keep][None]).logits[0] for row, keep in zip(batch["input_ids"], mask)
            ]
            logits.append(torch.cat(parts))
    stats = fastalign.token_stats(
        logits[0], packed.labels, ref_logits=logits[1], outputs=("logprob", "ref_logprob", "kl_ref_policy")
    )
    count = len(mask) // 2
    pairs = torch.tensor([[i, count + i] for i in range(count)])
    per_pair = {name: batch[name] for name in loss.columns}
    state = {"state": [type(rule)().eval() for rule in loss.rules]} if loss.rules else {}
    return fastalign.preference_loss(
        stats.logprob, stats.ref_logprob, packed.cu_seqlens, loss=loss.loss, pairs=pairs, mask=packed.mask,
        kl_ref_policy=stats.kl_ref_policy, **per_pair, **state,
    ).loss  # fmt: skip


def test_what_a_rule_remembers_is_in_checkpoints(tmp_path):
    def rule_after(steps, resume=None):
        rule = fastalign.BetaDPO()
        trainer = make_trainer(
            PackedDPOTrainer,
            tmp_path,
            max_steps=steps,
            save_strategy="steps",
            save_steps=1,
            **preset("beta_dpo", state=rule),
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: float(value) for name, value in rule.state_dict().items()}

    through = rule_after(2)
    assert rule_after(2, str(tmp_path / "checkpoint-1")) == pytest.approx(through, rel=1e-6)


# Of DPOConfig's own fields: what TRL's code does with them is done by TRL's code.
BY_TRL = {
    "learning_rate", "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout",
    "dataset_num_proc", "max_length", "precompute_ref_log_probs", "precompute_ref_batch_size", "loss_weights",
    "activation_offloading", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "pad_token",
    "padding_free", *refusals.OF_LOSS_TYPE,
}  # fmt: skip
CHECKED = {"truncation_mode", "pad_to_multiple_of"}


def test_every_field_of_the_config_is_known():
    own = set(DPOConfig.__annotations__)
    assert own == BY_TRL | CHECKED
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(refusals.LOSS_TYPES)
    assert set(re.findall(r'f_divergence_type == "(\w+)"', source)) == set(refusals.DIVERGENCES)
    assert set(refusals.REFUSED) <= {field.name for field in dataclasses.fields(DPOConfig)}


@pytest.mark.parametrize(
    "options,words",
    [
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8"),
        ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha=1.0"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"loss_type": ["sigmoid", "no"]}, "loss_type='no' is unknown; legal: sigmoid"),
        ({"f_divergence_type": "no"}, "f_divergence_type='no' is unknown; legal: reverse_kl"),
        ({"loss_type": ["ipo", "hinge"], "use_weighting": True},
            "use_weighting=True with loss_type='hinge': TRL writes"),
        ({"ld_alpha": 1.5}, r"ld_alpha=1.5 must be None or in \[0, 1\]"),
        ({"truncation_mode": "no"}, "truncation_mode='no' is unknown; legal: keep_start"),
        *(
            ({name: value, **preset("dpo")}, f"{name}=.* preset='dpo' takes its place")
            for name, value in {
                "loss_type": ["ipo"], "loss_weights": [2.0], "ld_alpha": 0.5, "f_divergence_type": "js_divergence",
                "f_alpha_divergence_coef": 0.2, "label_smoothing": 0.1, "beta": 0.3, "use_weighting": True,
                "discopop_tau": 0.3,
            }.items()
        ),
        ({"precompute_ref_log_probs": True, **preset("simpo")},
            "precompute_ref_log_probs=True: .* has no reference"),
        ({"sync_ref_model": True, **preset("cpo")}, "sync_ref_model=True: .* has no reference"),
        ({"precompute_ref_log_probs": True, **preset("tdpo1")}, "precompute_ref_log_probs=True keeps one number"),
        (preset("no"), "preset: loss='no' is unknown; legal: "),
        (preset("kto"), "preset: .* single responses"),
        (preset("bt_rm"), "preset='bt_rm' is of a reward model"),
        (preset("beta_dpo"), "preset: loss 'beta_dpo' needs state="),
        (preset("dpo", gama=1.0), "preset_options: .*gama"),
        (preset("dpo", omega=torch.ones(4)), "preset_options has omega"),
        (preset([("dpo", 1.0), ("odpo", 1.0)]), "one number per pair, which a mixture cannot share"),
        (preset("odpo"), "train_dataset has no column 'gamma_ext'"),
        ({"given": {"preset_options": {"beta": 0.1}}}, "preset_options are options of a preset"),
        ({"given": {"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}},
            "prompt learning"),
        ({"rows": [{"image": 0, "prompt": "a", "chosen": "b", "rejected": "c"}]},
            "train_dataset has the column 'image'"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_before_any_work(tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(DPOTrainer, "__init__", lambda *args, **kwargs: pytest.fail("TRL's constructor ran"))
    with pytest.raises(AdapterError, match=words) as refused:
        make_trainer(PackedDPOTrainer, tmp_path, policy=torch.nn.Module(), reference=None, **options)
    assert "\n" not in str(refused.value)


def test_batches_with_more_than_tokens_are_refused(tmp_path):
    trainer = make_trainer(PackedDPOTrainer, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with pytest.raises(AdapterError, match="the batch has token_type_ids"):
        trainer.compute_loss(trainer.model, {**batch, "token_type_ids": batch["input_ids"]})
    with pytest.raises(AdapterError, match="row 0 of attention_mask has no token"):
        trainer.compute_loss(trainer.model, {**batch, "attention_mask": 0 * batch["attention_mask"]})


def test_a_model_whose_sequences_cannot_be_kept_apart_is_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(AdapterError, match="MambaForCausalLM cannot train on packed sequences"):
        make_trainer(PackedDPOTrainer, tmp_path, policy=transformers.MambaForCausalLM(config))


def test_arguments_that_do_not_fit_are_refused():
    spread = torch.nn.Module()
    spread.hf_device_map = {"a": 0, "b": "cpu"}
    with pytest.raises(AdapterError, match="model is spread over 0, cpu; legal: one device"):
        refusals.check_inputs({"model": spread}, None)
    processor = object.__new__(transformers.ProcessorMixin)
    with pytest.raises(AdapterError, match="processing_class is of a vision model"):
        refusals.check_inputs({"processing_class": processor}, None)
    with pytest.raises(AdapterError, match="args is of the type TrainingArguments; legal: trl.DPOConfig"):
        refusals.check_inputs({"args": object.__new__(transformers.TrainingArguments)}, None)
    with pytest.raises(
        AdapterError, match="ref_model is given, and preset='simpo' has no reference; legal: None"
    ):
        refusals.check_inputs({"ref_model": torch.nn.Module()}, PresetLoss("simpo", {}))
