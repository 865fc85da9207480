"""PackedDPOTrainer against TRL's padded DPOTrainer on the same pairs: loss, gradient norm and every metric."""

from __future__ import annotations

import pytest
import torch
from dpo_runs import LIMIT, PAD, both, difference, gpt2, make_trainer, mixtral, run, tokenizer, train
from peft import LoraConfig
from trl import DPOTrainer

from fastalign.adapters.trl import PackedDPOTrainer


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


# What spans TRL's losses, divergences, weights and masks; benchmarks/adapters/packed_dpo_parity.py runs all.
SPAN = {
    "three losses, accumulated": {
        "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0],
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 2, "max_steps": 1,
    },
    "lengths from a cut prompt": {
        "loss_type": ["ipo", "sigmoid_norm"], "max_length": 7, "truncation_mode": "keep_end",
        "f_divergence_type": "js_divergence",
    },
    "tails, weights, checkpointing": {
        "loss_type": ["robust"], "label_smoothing": 0.1, "ld_alpha": 0.3, "use_weighting": True,
        "gradient_checkpointing": True,
    },
    "sorted, precomputed": {"loss_type": ["aot"], "precompute_ref_log_probs": True, "padding_free": True},
    "a reference that moves": {
        "loss_type": ["discopop"], "discopop_tau": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 1,
        "beta": 0.4,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", SPAN.values(), ids=SPAN)
def test_everything_that_is_logged_is_what_trl_logs(tmp_path, options):
    found, name = difference(*both(tmp_path, **options))
    assert found < LIMIT, name


def test_evaluation_and_lora_whose_reference_is_the_model_without_it(tmp_path):
    def make():
        return {
            "reference": None,
            "given": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)},
        }

    theirs, ours = both(
        tmp_path, make, evaluate=True, eval_strategy="steps", eval_steps=1, gradient_checkpointing=True
    )
    assert any("eval_rewards/margins" in record for record in ours)
    found, name = difference(theirs, ours)
    assert found < LIMIT, name


@pytest.mark.parametrize("model", [mixtral, gpt2])
def test_balanced_experts_and_tables_of_positions_are_trls(tmp_path, model):
    theirs, ours = both(tmp_path, lambda: {"policy": model(0), "reference": model(1)})
    assert (ours[0].get("aux_loss", 0.0) > 0) == (model is mixtral)
    found, name = difference(theirs, ours)
    assert found < LIMIT, name


@pytest.fixture
def seen(monkeypatch):
    """Token ids that embeddings were given: of every call a tensor."""
    ids = []
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding,
        "forward",
        lambda self, input: (ids.append(input.clone()), forward(self, input))[1],
    )
    return ids


def test_no_pad_token_reaches_a_model(tmp_path, seen):
    pad = tokenizer().convert_tokens_to_ids(PAD)
    run(DPOTrainer, tmp_path, max_steps=1)
    assert sum(int((ids == pad).sum()) for ids in seen) > 0  # it would be seen
    trainer = make_trainer(
        PackedDPOTrainer, tmp_path, max_steps=1, evaluate=True, eval_strategy="steps", eval_steps=1
    )
    seen.clear()  # what the models were tried on
    train(trainer)
    assert len(seen) == 2 + 2 * 3  # policy and reference, a step and the evaluation's batches
    for ids in seen:
        assert ids.shape[0] == 1 and not (ids == pad).any()


def test_sequences_that_see_each_other_would_be_noticed(tmp_path):
    trainer = make_trainer(PackedDPOTrainer, tmp_path)
    for forward in trainer._forwards.values():
        forward.attention = None  # the pack as one sequence
        forward.attending = lambda: torch.enable_grad()
    found, _ = difference(run(DPOTrainer, tmp_path), train(trainer))
    assert found > 100 * LIMIT


def test_the_models_keep_their_attention_and_generate(tmp_path):
    trainer = make_trainer(PackedDPOTrainer, tmp_path, max_steps=1)
    before = trainer.model.config._attn_implementation
    train(trainer)
    assert trainer.model.config._attn_implementation == before == "sdpa"
    assert trainer.model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
    assert trainer.model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 300)


def test_activations_may_be_kept_elsewhere(tmp_path):
    """As activation_offloading keeps them, for which TRL needs a GPU."""
    trainer, moved = make_trainer(PackedDPOTrainer, tmp_path, gradient_checkpointing=True, max_steps=1), []
    trainer.maybe_activation_offload_context = torch.autograd.graph.saved_tensors_hooks(
        lambda x: (moved.append(x), x.clone())[1], torch.clone
    )
    log = train(trainer)
    assert moved
    assert difference(run(PackedDPOTrainer, tmp_path, max_steps=1), log)[0] < LIMIT
