"""Preference training: DPO and every loss of `fastalign.losses`, on packed pairs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import fastalign
from fastalign.train import checkpoint
from fastalign.train import model as models
from fastalign.train.config import TrainConfig
from fastalign.train.data import PairBatch, fingerprint, load_pairs, pack_pairs
from fastalign.train.errors import UserError
from fastalign.train.loop import Run, Split, TrainResult
from fastalign.train.reference import LiveReference, precompute, weights_fingerprint
from fastalign.train.tokenise import TokenPair

_TOKEN_METRICS = ("entropy", "mean_logit", "is_top1")

LogprobFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class PreferenceMethod:
    """How pairs become batches, and a packed batch a loss. This is all that the training loop knows of a method.

    Args:
        preset: the loss, a `fastalign.losses.Preset`.
        token_stats: (logits [T, V], labels [T]) -> an object with `.logprob` [T] and, if they are to be logged, `.entropy`, `.mean_logit`,
            `.is_top1` [T]. Policy and reference go through the same function.
        loss: called as `fastalign.preference_loss` is; returns an object with `.loss` and `.metrics()`.
        budget: tokens per packed batch.
    """

    def __init__(self, preset: Any, token_stats: Callable[..., Any], loss: Callable[..., Any], budget: int):
        self.preset, self.token_stats, self.loss_fn, self.budget = preset, token_stats, loss, budget

    def batches(self, split: Split, indices: Iterable[int]) -> list[PairBatch]:
        """The packed batches of one optimizer step (or of an evaluation)."""
        return pack_pairs(split.examples, indices, self.budget)

    def denominators(self, split: Split, batches: Sequence[PairBatch]) -> dict[str, int]:
        """What the loss divides by, counted over all batches of the step: the split into batches then changes nothing."""
        pairs = [i for batch in batches for i in batch.pairs]
        return {"num_items": len(pairs), "num_sft_tokens": sum(len(split.examples[i].chosen) for i in pairs)}

    def loss(self, lm: models.PackedCausalLM, split: Split, batch: PairBatch, **denominators: int) -> tuple[torch.Tensor, Any]:
        """(this batch's part of the step's loss, metrics as name -> (sum, count))."""
        packed = lm.to_device(batch.packed)
        ref_logprobs = split.reference(batch, packed) if split.reference is not None else None
        stats = self.token_stats(lm.logits(packed), packed.labels)
        output = self.loss_fn(stats.logprob, ref_logprobs, packed.cu_seqlens, loss=self.preset, mask=packed.mask, **denominators)
        return output.loss, {**output.metrics(), **_token_metrics(stats, packed)}


def _token_metrics(stats: Any, packed: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """TRL's per-token metrics over the scored tokens: entropy (both sides), logits/chosen, logits/rejected (mean over tokens and vocabulary),
    mean_token_accuracy (chosen side)."""
    # Sequences alternate chosen, rejected: a token's side is the parity of its sequence.
    rows = torch.arange(packed.mask.numel(), device=packed.mask.device, dtype=packed.cu_seqlens.dtype)
    even = torch.searchsorted(packed.cu_seqlens, rows, right=True) % 2 == 1
    chosen, rejected = packed.mask & even, packed.mask & ~even
    wanted = {
        "entropy": (stats.entropy, packed.mask),
        "logits/chosen": (stats.mean_logit, chosen),
        "logits/rejected": (stats.mean_logit, rejected),
        "mean_token_accuracy": (stats.is_top1, chosen),
    }
    return {name: (value.detach().where(where, 0).sum(), where.sum()) for name, (value, where) in wanted.items() if value is not None}


def resolve_loss(config: TrainConfig) -> Any:
    """The preset that --loss and --set name. Raises `UserError` that lists the legal names, or says why the trainer cannot serve it."""
    try:
        preset = fastalign.losses.get(config.loss).replace(**config.loss_options)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    lacking = {
        "soft labels per pair": preset.needs_soft_labels,
        "exact sequence KLs": preset.needs_kl,
        f"values per pair ({', '.join(preset.requires)})": bool(preset.requires),
        f"the {preset.rule} rule's memory of earlier batches": preset.rule is not None,
        "all pairs of a step in one forward pass, to sort them": preset.order is not None,
        "prompt tokens in the SFT term (sft_include_prompt)": preset.sft_include_prompt,
        'a count of pairs that is known before the forward pass (nonfinite="drop")': preset.nonfinite == "drop",
    }
    if any(lacking.values()):
        raise UserError(
            f"--loss {config.loss} needs {next(what for what, needed in lacking.items() if needed)}, which this trainer does not have"
        )
    if not preset.needs_reference and (config.precompute_ref or config.ref_model is not None):
        raise UserError(f"--loss {config.loss} uses no reference: --ref-model and --precompute-ref have no meaning for it")
    return preset


def train_dpo(
    config: TrainConfig,
    *,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    examples: Iterable[Any] | None = None,
    eval_examples: Iterable[Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    logprob_fn: LogprobFn | None = None,
    loss_fn: Callable[..., Any] | None = None,
) -> TrainResult:
    """Train a causal LM on preference pairs.

    Args:
        config: the settings. `output` is always needed; `model` and `data` unless they are given in memory.
        model, tokenizer: in place of `config.model`; the model is trained where it is, in float32.
        examples, eval_examples: in place of the data files: rows in one of TRL's formats, or `TokenPair`s.
        callback: called with every record (training and evaluation) as it is logged.
        logprob_fn: (logits [T, V], labels [T], -100 where nothing is scored) -> log-probs [T], in place of `fastalign.token_stats`; for
            comparisons. It yields no token metrics, so `config.token_metrics` must be off.
        loss_fn: in place of `fastalign.preference_loss`, called in the same way.

    Returns:
        TrainResult. The trained model and its tokenizer are saved in `config.output`.

    Raises:
        UserError: anything wrong with settings, paths or data; before the first step.
        TrainingError: a gradient that is not finite.
    """
    preset = resolve_loss(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this trainer is one process; started as several (WORLD_SIZE > 1) they would overwrite each other's output")
    if logprob_fn is not None and config.token_metrics:
        raise UserError("logprob_fn yields no token metrics: set token_metrics=False")
    if model is None and config.model is None:
        raise UserError("--model is missing: it names the directory of the model to train")
    load = functools.partial(models.load_model, trust_remote_code=config.trust_remote_code)
    if tokenizer is None:
        tokenizer = models.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    model_config = model.config if model is not None else models.load_config(config.model, trust_remote_code=config.trust_remote_code)
    if config.ref_model is not None:
        models.load_config(config.ref_model, trust_remote_code=config.trust_remote_code)
    output = checkpoint.check_output(config)
    train_pairs, eval_pairs = load_pairs(config, tokenizer, models.max_positions(model_config), examples, eval_examples)
    lm = models.PackedCausalLM(
        load(config.model) if model is None else model, attention=config.attention, dtype=config.dtype, device=config.device
    )
    try:
        _check_vocabulary(train_pairs + eval_pairs, lm, "model")
        checkpoint.create_output(output, overwrite=config.overwrite)
        token_stats = _token_stats(config, logprob_fn)
        train, evaluation = Split(train_pairs), Split(eval_pairs)
        if preset.needs_reference:
            _attach_reference(config, output, lm, load, token_stats, (train, evaluation))
        method = PreferenceMethod(preset, token_stats, loss_fn or fastalign.preference_loss, config.tokens_per_batch)
        data = fingerprint(train_pairs + eval_pairs)
        return Run(config, output, lm, tokenizer, method, train, evaluation, data, callback).fit()
    finally:
        lm.restore()


def _token_stats(config: TrainConfig, logprob_fn: LogprobFn | None) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    if logprob_fn is not None:
        nothing = dict.fromkeys(_TOKEN_METRICS)
        return lambda logits, labels: SimpleNamespace(logprob=logprob_fn(logits, labels), **nothing)
    outputs = ("logprob", *(_TOKEN_METRICS if config.token_metrics else ()))
    # The logits have no other consumer: their gradient is written over them.
    return functools.partial(fastalign.token_stats, outputs=outputs, inplace_backward=True)


def _attach_reference(
    config: TrainConfig,
    output: Path,
    lm: models.PackedCausalLM,
    load: Callable[[str], torch.nn.Module],
    token_stats: Callable[..., Any],
    splits: Sequence[Split],
) -> None:
    """Give the splits their reference log-probs: from a model that stays in memory, or computed once now, before any weight has changed."""
    if config.ref_model is not None:
        reference = models.PackedCausalLM(load(config.ref_model), attention=lm.attention, dtype=config.dtype, device=config.device)
        _check_vocabulary([pair for split in splits for pair in split.examples], reference, "reference model")
    else:
        reference = lm if config.precompute_ref else lm.frozen_copy()
    live = LiveReference(reference, token_stats)
    if not config.precompute_ref:
        for split in splits:
            split.reference = live
        return
    weights = weights_fingerprint(reference.model)
    for split, name in zip(splits, ("ref_logprobs.safetensors", "ref_logprobs_eval.safetensors")):
        if split.examples:
            split.reference = precompute(
                live,
                split.examples,
                checkpoint.inside(output, name),
                weights=weights,
                budget=config.tokens_per_batch,
                progress=config.progress,
            )


def _check_vocabulary(pairs: Sequence[TokenPair], lm: models.PackedCausalLM, what: str) -> None:
    largest, size = max(int(part.max()) for pair in pairs for part in pair), lm.vocabulary()
    if largest >= size:
        raise UserError(f"the tokenizer gives token id {largest}, but the {what}'s vocabulary has {size} entries")
