"""Runs of TRL's DPOTrainer and of ours on the same pairs, models and settings, and what they logged."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io

import datasets
import torch
import transformers
from train.tiny import make_model, make_rows, make_tokenizer
from trl import DPOConfig, DPOTrainer

from fastalign.adapters.trl import PackedDPOTrainer

datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
atexit.register(gc.unfreeze)
gc.freeze()  # Trainer collects garbage at its end: not among all that has been imported
TIMES = ("runtime", "per_second", "total_flos", "epoch", "step_time")
LIMIT = 1e-5  # of `difference`
PAD = "ÿ"  # a byte that no text has


def tokenizer():
    made = make_tokenizer()
    made.pad_token = PAD
    return made


def mixtral(seed):
    torch.manual_seed(seed)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5,
            output_router_logits=True, max_position_embeddings=256,
        )
    )  # fmt: skip


def gpt2(seed):
    """With a table of positions."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=48)
    return transformers.GPT2LMHeadModel(config)


def make_config(folder, **options):
    return DPOConfig(
        **{
            "output_dir": str(folder),
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
            "max_length": 40,
            "optim": "sgd",  # Adam makes steps of full length from gradients that are rounding
            "learning_rate": 0.05,
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            **options,
        }
    )


def make_trainer(
    kind, folder, *, policy=None, reference="other", rows=None, evaluate=False, given=None, **options
):
    """kind: the trainer's class. policy: a model; reference: a model, None, or "other": one of other weights, so
    that log-ratios are not 0. given: further arguments of the trainer."""
    data = datasets.Dataset.from_list(rows or make_rows(24))
    return kind(
        make_model() if policy is None else policy,
        ref_model=make_model(seed=1) if isinstance(reference, str) else reference,
        args=make_config(folder, **options),
        train_dataset=data,
        eval_dataset=data.select(range(7)) if evaluate else None,
        processing_class=tokenizer(),
        **(given or {}),
    )


def train(trainer):
    """What it logged: [{name: number}], without times."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return [
        {name: value for name, value in record.items() if not any(part in name for part in TIMES)}
        for record in trainer.state.log_history
    ]


def run(kind, folder, **options):
    return train(make_trainer(kind, folder, **options))


def both(folder, make=dict, **options):
    """(TRL's log, ours). make: builds what each run needs for itself, models above all."""
    return run(DPOTrainer, folder, **make(), **options), run(PackedDPOTrainer, folder, **make(), **options)


def difference(theirs, ours):
    """(the largest difference of any logged number, relative to its size where that is above 1; its name)."""
    assert [sorted(record) for record in theirs] == [sorted(record) for record in ours]
    found = [
        (abs(a[name] - b[name]) / max(1.0, abs(a[name])), name)
        for a, b in zip(theirs, ours)
        for name in a
        if not (a[name] != a[name] and b[name] != b[name])
    ]
    assert any("grad_norm" in record for record in theirs)
    return max(found)
