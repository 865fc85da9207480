"""What every run is made of, whatever it learns from: model, tokenizer, models beside it, output folder, log.
Set up once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from fastalign.train import checkpoint
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.loop import Run, Task, TrainResult
from fastalign.train.methods.base import Learner
from fastalign.train.models import companions
from fastalign.train.models import packed as models
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.models.reference import weights_of

# Settings that name a causal LM beside the policy -> what it is called.
_BESIDE = {"ref_model": "reference", "dpo_model": "DPO"}


class Session:
    """The setup of a run, in the order in which mistakes can be found: made from the settings, before any
    data are read; `check_beside`, when the data are known; `open`, which loads the model; `beside`, which
    loads another; `fit`. As a context it leaves a model of the caller's as it was.

    Args:
        method: what is trained; its `config` has the settings.
        model, tokenizer: in place of `config.model`.

    Attributes:
        tokenizer: the one that is saved with the model. `open` may replace it.
        positions: the most tokens that the model has positions for; None: any number.
        stops: token ids at which its generation stops.
        output: the output directory. Nothing is written there before `fit`.
        lm: the model on packed sequences, once it is open."""

    lm: models.PackedModel

    def __init__(self, method: Learner, model: torch.nn.Module | None = None, tokenizer: Any = None):
        self.method, self.config, self.model = method, method.config, model
        self.others: list[PackedCausalLM] = []
        self.trust = {"trust_remote_code": self.config.trust_remote_code}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "this trainer is one process; started as several (WORLD_SIZE > 1) they would overwrite each "
                "other's output"
            )
        models.check_device(self.config.device)
        if model is None and self.config.model is None:
            raise UserError("--model is missing: it names the directory of the model to train")
        directory = self.config.model
        self.tokenizer = models.load_tokenizer(directory, **self.trust) if tokenizer is None else tokenizer
        own = model.config if model is not None else models.load_config(directory, **self.trust)
        for other in self._named().values():
            models.load_config(other, **self.trust)
        self.output = checkpoint.check_output(self.config)
        self.positions, self.stops = companions.max_positions(own), models.load_stops(directory, own, model)

    def _named(self) -> dict[str, str]:
        """Setting -> directory of each model beside the policy that is named."""
        settings = {name: getattr(self.config, name, None) for name in _BESIDE}
        return {name: directory for name, directory in settings.items() if directory is not None}

    def check_beside(self, longest: int) -> None:
        """Refuse models beside the policy that do not fit its tokenizer, or sequences of `longest` tokens; no
        weight is read."""
        for name, directory in self._named().items():
            companions.check_companion(
                "--" + name.replace("_", "-"), directory, self.tokenizer, longest, **self.trust
            )

    def open(self, lengths: models.Lengths, examples: Iterable[TokenExample]) -> models.PackedModel:
        """The model, on packed sequences of these lengths. It must have every token of the examples."""
        self.options = {
            "dtype": self.config.dtype,
            "device": self.config.device,
            "lengths": lengths,
            "head": self._wanted_head(),
        }
        model = (
            self.model if self.model is not None else self.method.load_model(self.config.model, **self.trust)
        )
        self.lm, self.tokenizer = self.method.make_lm(
            model, self.tokenizer, attention=self.config.attention, **self.options
        )
        self.lm.check_tokens("model", tokens(examples))
        return self.lm

    def _wanted_head(self) -> str | None:
        """What --head says; where it says nothing, what a run that goes on did before."""
        config = self.config
        return (
            checkpoint.saved_setting(self.output, "head")
            if config.resume and config.head is None
            else config.head
        )

    def beside(self, name: str, ids: Iterable[torch.Tensor], *, exact: bool = False) -> PackedCausalLM:
        """The frozen model of this setting, on the policy's path. It must have the token ids `ids`, and where
        it has no tokenizer that says what its others mean, or with `exact`, as many as the policy."""
        directory, what = self._named()[name], f"{_BESIDE[name]} model"
        loaded = models.load_model(directory, **self.trust).requires_grad_(False)
        head = "logits" if self.lm.head_used == "logits" else self.options["head"]
        other = PackedCausalLM(loaded, attention=self.lm.attention, **{**self.options, "head": head})
        other.check_tokens(what, ids)
        size, own = other.vocabulary(), self.lm.vocabulary()
        if size != own and (exact or not companions.has_tokenizer(directory)):
            reason = (
                "their distributions cannot be compared"
                if exact
                else "without a tokenizer of its own it must have the same one"
            )
            layer = other.vocabulary_weight()[0]
            raise UserError(
                f"the {what}'s vocabulary has {size} entries, the model's {own} ({layer}): {reason}"
            )
        self.others.append(other)
        self._same_head(other, what, exact)
        return other

    def _same_head(self, other: PackedCausalLM, what: str, exact: bool) -> None:
        """Both models' log-probs come on the same path. exact: they are compared token by token of the
        vocabulary."""
        if self.lm.head_used == "logits":
            return
        reason = other.head_note
        if exact and other.fused is not None and not other.fused.transforms_as(self.lm.fused):
            reason = "it scales or caps its logits in another way"
        if not reason:
            return
        if self.options["head"] == "fused":
            raise UserError(f"--head fused: the {what}: {reason}")
        for lm in (self.lm, *self.others):
            lm.use_logits(f"the {what}: {reason}")

    def fit(
        self,
        task: Task,
        beside: Mapping[str, models.PackedModel | None],
        callback: Callable[[dict[str, Any]], None] | None = None,
        *,
        prepare: Callable[[], None] = lambda: None,
    ) -> TrainResult:
        """Run the task and save what it trains. `beside`: setting -> the frozen model; the weights of those
        that are named must be the same when the run is resumed. `prepare` is called when the output directory
        is this run's."""
        named = {
            name: lm.model for name, lm in beside.items() if lm and getattr(self.config, name) is not None
        }
        weights = weights_of(self.config, {"model": self.lm.model, **named})
        config = (
            dataclasses.replace(self.config, head=self.lm.head_used)
            if isinstance(self.lm, PackedCausalLM)
            else self.config
        )
        with checkpoint.opened(self.output, config, task.method):
            prepare()
            return Run(config, self.output, self.lm, self.tokenizer, task, callback, weights).fit()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        if hasattr(self, "lm"):
            self.lm.restore()


def tokens(examples: Iterable[TokenExample]) -> Iterable[torch.Tensor]:
    """The token ids of prompts and completions."""
    return (part for example in examples for part in (example.prompt, *example.completions))
