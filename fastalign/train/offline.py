"""Training from a fixed data file with any of the methods in `fastalign.train.methods`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalign.runtime.metric import Total
from fastalign.train.config import TrainConfig
from fastalign.train.data.examples import Schedule, fingerprint, load_examples
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.files import inside
from fastalign.train.loop import TrainResult
from fastalign.train.methods import check_kind, make_method
from fastalign.train.methods.base import LogprobFn, Method, Split, join
from fastalign.train.methods.dpo import PreferenceMethod
from fastalign.train.metrics import MetricSums
from fastalign.train.models import packed as models
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.models.reference import (
    LiveReference,
    check_mixable,
    mix_weights,
    precompute,
    weights_fingerprint,
)  # fmt: skip
from fastalign.train.optimise import Optimizer
from fastalign.train.session import Session, tokens


def train(
    method: str | Method,
    config: TrainConfig,
    *,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    examples: Iterable[Any] | None = None,
    eval_examples: Iterable[Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a model by one of the offline methods.

    Args:
        method: a name of `fastalign.train.methods.METHODS`, or a method made for this config.
        config: the settings. `output` is always needed; `model` and `data` unless they are given in memory.
        model, tokenizer: in place of `config.model`; the model is trained where it is, in float32.
        examples, eval_examples: in place of the data files: rows in the method's data format, or
            `TokenExample`s.
        callback: called with every record (training and evaluation) as it is logged.

    Returns:
        TrainResult. The trained model and its tokenizer are saved in `config.output`.

    Raises:
        UserError: anything wrong with settings, paths or data; before the first step.
        TrainingError: a gradient that is not finite.
    """
    check_kind(method.name if isinstance(method, Method) else method, config, TrainConfig)
    method = method if isinstance(method, Method) else make_method(method, config)
    config = method.config
    with Session(method, model, tokenizer) as session:
        data = load_examples(
            config,
            method.format,
            session.tokenizer,
            session.positions,
            examples,
            eval_examples,
            stops=session.stops,
        )
        method.read(*data)
        method.max_length = config.max_length or session.positions
        longest = method.longest(*data)
        session.check_beside(longest)
        everything = [example for part in data for example in part]
        pack = min(config.tokens_per_batch, sum(example.tokens() for example in everything))
        lm = session.open(models.Lengths(longest, pack), everything)
        method.start(lm)
        splits = Split(data[0]), Split(data[1])
        reference = _reference(method, session, everything) if method.needs_reference else None

        def prepare() -> None:
            if reference is not None:
                _attach_reference(method, session.output, reference, splits)

        return session.fit(
            OfflineTask(method, lm, *splits, reference), {"ref_model": reference}, callback, prepare=prepare
        )


def train_dpo(
    config: TrainConfig,
    *,
    logprob_fn: LogprobFn | None = None,
    loss_fn: Callable[..., Any] | None = None,
    **data: Any,
) -> TrainResult:
    """`train("dpo", config, ...)` with replaceable head functions (see `PreferenceMethod`)."""
    return train(PreferenceMethod(config, logprob_fn=logprob_fn, loss_fn=loss_fn), config, **data)


@dataclass
class OfflineTask:
    """A run over a training split, by one method: the loop's `Task`."""

    learner: Method
    lm: models.PackedModel
    train: Split
    evaluation: Split
    reference: PackedCausalLM | None = None

    def __post_init__(self) -> None:
        config = self.learner.config
        self.schedule = Schedule(len(self.train.examples), config)
        self.method, self.evaluates = self.learner.name, bool(self.evaluation.examples)
        self.steps, self.steps_per_epoch = self.schedule.steps, self.schedule.steps_per_epoch
        self.data = fingerprint(self.train.examples, self.evaluation.examples)

    def describe(self) -> str:
        config = self.learner.config
        return f"up to {config.batch_size} {self.learner.format.noun}s each, loss {config.loss}"

    def modules(self) -> dict[str, torch.nn.Module]:
        return self.learner.modules()

    def state_dict(self) -> dict[str, Any]:
        moves = (
            {"reference": self.reference.model.state_dict()} if self.learner.config.ref_update_every else {}
        )
        return self.learner.state_dict() | moves

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = dict(state)
        if "reference" in own:
            self.reference.model.load_state_dict(own.pop("reference"))
        self.learner.load_state_dict(own)

    def step(self, step: int, optimizer: Optimizer) -> tuple[dict[str, float], int]:
        sums, tokens = accumulate(
            self.lm, self.learner, self.train, self.schedule.indices(step), backward=True
        )
        sums.add({"grad_norm": (optimizer.clip(), 1)})
        metrics = self.learner.derived(sums.means())  # the step's only transfer from the device
        rate, config = optimizer.update(step, metrics), self.learner.config
        own = self.learner.updated(rate, metrics)
        if config.ref_update_every and (step + 1) % config.ref_update_every == 0:
            mix_weights(self.reference, self.lm, config.ref_mix)
        return metrics | {"learning_rate": rate} | own, tokens

    def conclude(self) -> None:
        self.learner.finish(self.lm, self.train)

    def evaluate(self) -> dict[str, float]:
        sums, _ = accumulate(self.lm, self.learner, self.evaluation, range(len(self.evaluation.examples)))
        return self.learner.derived(sums.means())


def accumulate(
    lm: models.PackedModel, method: Method, split: Split, indices: Sequence[int], *, backward: bool = False
) -> tuple[MetricSums, int]:
    """(metrics, tokens) of the chosen examples taken as one batch, whatever number of forward passes they
    need. `backward` adds the gradient to the parameters, and lets the method update what it remembers."""
    batches = method.batches(split, indices)
    known = method.constants(lm, split, indices)
    sums, tokens = MetricSums(), sum(batch.packed.input_ids.numel() for batch in batches)
    if method.joint and len(batches) > 1:
        total = _jointly(lm, method, split, batches, known, backward, sums)
    else:
        total = 0.0
        for batch in batches:
            loss, metrics = method.loss(method.score(lm, split, batch), training=backward, **known)
            if lm.router is not None:
                loss = loss + lm.router.part(batch.packed.input_ids.numel(), tokens, sums)
            if backward:
                loss.backward()
            sums.add(metrics)
            total = total + loss.detach()
    sums.add({"loss": Total(total, 1)})
    return sums, tokens


def _jointly(
    lm: models.PackedModel,
    method: Method,
    split: Split,
    batches: Sequence[Any],
    known: dict[str, Any],
    backward: bool,
    sums: MetricSums,
) -> torch.Tensor:
    """A loss that must see every example of the step at once, over several packs. It is made of a few numbers
    per token, which a first pass without gradient gathers; the slopes of the loss in them then meet a second
    pass, pack by pack."""
    sizes, scored, router = [batch.packed.input_ids.numel() for batch in batches], [], 0.0
    with torch.no_grad():
        for batch, size in zip(batches, sizes):
            scored.append(method.score(lm, split, batch))
            router += lm.router.part(size, sum(sizes), sums) if lm.router is not None else 0.0
        whole = join(scored)
    leaves = {name: value.requires_grad_(backward) for name, value in whole.policy.items()}
    with torch.set_grad_enabled(backward):
        loss, metrics = method.loss(whole, training=backward, **known)
    if backward:
        loss.backward()
        slopes = {name: leaf.grad.split(sizes) for name, leaf in leaves.items() if leaf.grad is not None}
        for i, batch in enumerate(batches):
            again = method.score(lm, split, batch, policy_only=True).policy
            roots, gradients = [again[name] for name in slopes], [slopes[name][i] for name in slopes]
            if lm.router is not None:
                roots, gradients = [*roots, lm.router.part(sizes[i], sum(sizes))], [*gradients, None]
            torch.autograd.backward(roots, gradients)
    sums.add(metrics)
    return loss.detach() + router


def _reference(method: Method, session: Session, examples: Sequence[TokenExample]) -> PackedCausalLM:
    """The reference model: that of --ref-model, or the policy as it is now."""
    if method.config.ref_model is not None:
        reference = session.beside("ref_model", tokens(examples), exact=method.exact_kl)
        if method.config.ref_update_every:
            check_mixable(reference, session.lm)
        return reference
    return session.lm if method.config.precompute_ref else session.lm.frozen_copy()


def _attach_reference(
    method: Method, output: Path, reference: PackedCausalLM, splits: Sequence[Split]
) -> None:
    """Give the splits their reference log-probs: from a model that stays in memory, or computed once now,
    before any weight has changed."""
    config = method.config
    live = LiveReference(reference, method.token_stats)
    if not config.precompute_ref:
        for split in splits:
            split.reference = live
        return
    weights = weights_fingerprint(reference.model)
    for split, name in zip(splits, ("ref_logprobs.safetensors", "ref_logprobs_eval.safetensors")):
        if split.examples:
            path = inside(output, name)
            budget, progress = config.tokens_per_batch, config.progress
            split.reference = precompute(
                live, split.examples, path, weights=weights, budget=budget, progress=progress
            )
