"""Runs of transformers' Trainer with a compute_loss_func: what it logs of its first step, and that step's
gradient."""

from __future__ import annotations

import atexit
import gc

from train.tiny import make_model, make_rows, make_tokenizer
from transformers import Trainer, TrainingArguments

from fastalign.adapters.transformers import PairCollator, with_reference

atexit.register(gc.unfreeze)
gc.freeze()  # Trainer collects garbage at its end: not among all that has been imported


def examples(count=6):
    tokenizer = make_tokenizer()

    def ids(text):
        return tokenizer(text)["input_ids"]

    return [
        {"prompt_ids": ids(r["prompt"]), "chosen_ids": ids(r["chosen"]), "rejected_ids": ids(r["rejected"]),
         "gamma_ext": 0.2 * i}
        for i, r in enumerate(make_rows(count))
    ]  # fmt: skip


def pairs(count=8):
    """Examples with the log-probs of another model."""
    return with_reference(examples(count), make_model(seed=1), PairCollator(0), batch_size=4)


def first_step(loss, data, collator, folder, size, accumulation, **options):
    """(loss that Trainer logs of its first step, the gradient of that step)."""
    found = []

    class Watched(Trainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            optimizer.register_step_pre_hook(
                lambda *_: found.append({n: p.grad.clone() for n, p in self.model.named_parameters()})
            )
            return optimizer

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1,
        logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = Watched(
        make_model(),
        arguments,
        data_collator=collator,
        train_dataset=data,
        eval_dataset=data[:2],
        compute_loss_func=loss,
    )
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    return trainer.state.log_history[0]["loss"], found[0], evaluated
