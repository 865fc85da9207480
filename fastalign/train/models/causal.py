"""A causal LM on packed sequences: its logits, or what they say, from its hidden states, without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import fastalign
from fastalign.rows.model_head import CANNOT_RUN, HeadRefused, ModelHead, plain_layer, shortly, tried_head
from fastalign.train.errors import UserError
from fastalign.train.models import packed as models
from fastalign.train.models import probe

HEADS = ("fused", "logits")


class Scores(NamedTuple):
    """A forward pass. hidden: [T, H], what the LM head is given; None where the model does not say what that
    is. logits: [T, V], or None where the head is fused: then `stats` multiplies a part of them at a time."""

    lm: PackedCausalLM
    hidden: torch.Tensor | None
    logits: torch.Tensor | None

    def stats(
        self,
        labels: torch.Tensor,
        *,
        outputs: Sequence[str] = ("logprob",),
        differentiable: Sequence[str] = ("logprob",),
        ref: Scores | None = None,
        temperature: float = 1.0,
    ) -> fastalign.TokenStats:
        """`fastalign.token_stats` of the pass, once: the gradient of logits is written over them. `ref`: the
        reference's pass on the same batch. `differentiable`: the outputs through which a gradient comes
        back."""
        known = {"outputs": outputs, "temperature": temperature}
        if self.logits is not None:
            ref_logits = None if ref is None else ref.logits
            return fastalign.token_stats(
                self.logits, labels, ref_logits=ref_logits, inplace_backward=True, **known
            )
        other = None if ref is None else (ref.lm.fused, ref.hidden)
        known["differentiable"] = [name for name in differentiable if name in outputs]
        with self.lm.autocast():  # as the head itself would be multiplied
            return self.lm.fused.stats(self.hidden, labels, ref=other, host_counts=True, **known)


class PackedCausalLM(models.PackedModel):
    """A causal LM on packed sequences.

    Args:
        head: "fused": `scores` make no logits; a model whose head cannot be had is refused. None: the same,
            but for such a model they do, and `head_note` says why. "logits": they do.
        options: of `PackedModel`."""

    def __init__(self, model: torch.nn.Module, *, head: str | None = "logits", **options: Any):
        self.fused: ModelHead | None = None
        self.head_note = ""
        if head != "logits":
            self._read_head(model)
        super().__init__(model, **options)
        if self.fused is not None and not self._try_head():
            self._choose(options.get("attention", "auto"))  # by its logits, which may tell more
        if head == "fused" and self.fused is None:
            raise UserError(
                f"--head fused: {type(model).__name__}: {self.head_note}; --head logits trains it"
            )

    @property
    def head_used(self) -> str:
        """One of HEADS."""
        return "logits" if self.fused is None else "fused"

    def describe_head(self) -> str:
        return self.head_used + (f" ({self.head_note})" if self.head_note else "")

    def use_logits(self, note: str) -> None:
        """From now on `scores` make logits; why."""
        self.fused, self.head_note = None, note

    def _read_head(self, model: torch.nn.Module) -> None:
        try:
            self.fused = ModelHead(plain_layer(model))
        except HeadRefused as error:
            self.head_note = str(error)

    @torch.no_grad()
    def _try_head(self) -> bool:
        """Whether the logits can be had from the hidden states, on short sequences and in a pack as long as
        there will be."""
        generator = torch.Generator().manual_seed(0)
        longest, total = self.lengths

        def run(*lengths: int) -> torch.Tensor:
            ids = [torch.randint(self.vocabulary(), (length,), generator=generator) for length in lengths]
            return self.logits(self.to_device(fastalign.pack(ids)))

        self.exact = self.can_be_exact()
        try:
            short, long = (probe.SHORT,) * 2, [longest] * max(1, total // longest)
            self.fused = tried_head(self.model, self.fused.module, lambda: run(*short), lambda: run(*long))
        except HeadRefused as error:
            self.use_logits(str(error))
        finally:
            self.exact = False
        return self.fused is not None

    def logits(self, batch: Any) -> torch.Tensor:
        """Logits [T, V] of the packed batch: row t predicts the token after `batch.input_ids[t]`."""
        return self.forward(self.model, batch).logits.squeeze(0)

    def rows(self, batch: Any) -> torch.Tensor:
        """What the sequences of a pack are told apart by: hidden states, or the logits where these are
        made."""
        if self.fused is None:
            return self.logits(batch)
        try:
            return self.scores(batch).hidden
        except (HeadRefused, *CANNOT_RUN) as error:
            logits = self.logits(batch)  # where these fail too, it is not for the head
            self.use_logits(shortly(error))
            return logits

    def scores(self, batch: Any) -> Scores:
        """One forward pass on the packed batch."""
        if self.fused is None:
            known = self.model.get_output_embeddings() is not None
            logits, hidden = self.logits_and_hidden(batch) if known else (self.logits(batch), None)
            return Scores(self, hidden, logits)
        hidden, _ = self.fused.hidden_of(lambda: self.forward(self.model, batch))
        return Scores(self, hidden.reshape(-1, hidden.shape[-1]), None)

    def head(self) -> torch.nn.Module:
        """The layer from hidden states to logits."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise UserError(f"{type(self.model).__name__} does not say which module is its LM head")
        return head

    def logits_and_hidden(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits, and the last hidden states [T, H] that the LM head made them from: what a value head
        reads."""
        seen = []
        hook = self.head().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            logits = self.logits(batch)
        finally:
            hook.remove()
        return logits, seen[-1].reshape(logits.shape[0], -1)

    def frozen_copy(self) -> PackedCausalLM:
        twin = super().frozen_copy()
        if self.fused is not None:
            twin.fused = self.fused._replace(module=plain_layer(twin.model))
        return twin

    def load_weights(self, directory: str, *, trust_remote_code: bool = False) -> None:
        self.model.load_state_dict(
            models.load_model(directory, trust_remote_code=trust_remote_code).state_dict()
        )
