"""A model of a trainer of TRL's, on packed sequences where TRL gives it padded ones.

TRL asks a model for per-token numbers by `model(**batch, labels=labels, fused_lm_head=True)`, policy and
reference, adapters on or off, and sums them itself. What is attached here answers that call: the padding is
dropped, the model runs on one row of tokens, and the numbers are laid out as TRL wants them. Every other call
of the model is what it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

import fastalign
from fastalign.adapters.common import AdapterError
from fastalign.rows.model_head import HeadRefused, plain_layer
from fastalign.train.errors import UserError
from fastalign.train.models.causal import PackedCausalLM, Scores
from fastalign.train.models.companions import max_positions
from fastalign.train.models.packed import IMPLEMENTATION
from fastalign.train.models.probe import SHORT, Lengths

# Output of `token_stats` -> field of TRL's output.
FIELDS = {
    "logprob": "log_probs",
    "entropy": "entropy",
    "mean_logit": "mean_logits",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}
_UNTRIED = 1024  # tokens of the longest sequence that a model is tried on, where max_length says nothing


class Pass(NamedTuple):
    """A forward pass of T tokens. indices: [T], where they are in the padded batch of `shape`."""

    batch: fastalign.PackedBatch
    indices: Tensor
    shape: torch.Size
    scores: Scores
    stats: fastalign.TokenStats

    @property
    def aux_loss(self) -> Tensor | None:
        """The load-balancing loss over the T tokens, where it was asked for."""
        return self.scores.lm.aux_loss

    def for_trl(self) -> FusedCausalLMOutput:
        """[B, padded length - 1] each: column t is of token t + 1; 0 where nothing is scored."""
        fields = {
            theirs: fastalign.repad(getattr(self.stats, ours), self.indices, self.shape)[:, :-1]
            for ours, theirs in FIELDS.items()
            if getattr(self.stats, ours) is not None
        }
        if "is_top1" in fields:
            fields["is_top1"] = fields["is_top1"].bool()
        return FusedCausalLMOutput(**fields, aux_loss=self.aux_loss)


class PackedForward(PackedCausalLM):
    """A causal LM that TRL owns. Device, dtype, mode and, outside of `attending`, attention stay what they
    are; adapters come and go.

    Args:
        model: of transformers, below PEFT's and accelerate's wrappers.
        accelerator: whose precision the model runs in.
        longest: tokens of the longest sequence; None: not known.

    Raises:
        AdapterError: packed sequences would see each other, in every attention that the model has."""

    def __init__(self, model: torch.nn.Module, accelerator: Any, longest: int | None):
        self.accelerator = accelerator
        self.outputs: tuple[str, ...] = ("logprob",)
        self.against: Scores | None = None  # the reference's pass, where the KL against it is to be known
        self.router_logits, self.aux_loss = False, None
        longest = min(longest or _UNTRIED, max_positions(model.config) or _UNTRIED)
        modes = {module: module.training for module in model.modules()}
        try:
            super().__init__(model, head=None, lengths=Lengths(longest, 2 * longest + SHORT))
        except UserError as error:
            raise AdapterError(str(error)) from None
        finally:
            for module, mode in modes.items():
                module.training = mode
        self.router = None  # TRL adds the load-balancing loss
        self.restore()

    def _place(self, model: torch.nn.Module, device: str, dtype: str) -> None:
        self.model, self.dtype = model.eval(), torch.float32
        self.device = next(model.parameters()).device

    def can_be_exact(self) -> bool:
        return (
            super().can_be_exact()
            and not self.accelerator.native_amp
            and all(p.dtype is torch.float32 for p in self.model.parameters())
        )

    def autocast(self) -> Any:
        return contextlib.nullcontext() if self.exact else self.accelerator.autocast()

    def _candidates(self) -> tuple[str, ...]:
        own = (self._original,) if self._original == "flash_attention_2" else ()
        return (*own, "packed", "sdpa", "eager")

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """Within: the model's attention is the one that keeps packed sequences apart. Backward belongs in it,
        too: checkpointed layers run again."""
        before, wanted = self.model.config._attn_implementation, IMPLEMENTATION[self.attention]
        if before == wanted:
            yield
            return
        self.model.set_attn_implementation(wanted)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def forward(self, module: Any, batch: Any) -> Any:
        options = {"output_router_logits": True} if self.router_logits else {}
        output = super().forward(partial(module, **options), batch)
        self.aux_loss = getattr(output, "aux_loss", None) if self.router_logits else None
        return output

    def scores(self, batch: Any) -> Scores:
        """Of a copy that keeps the head of now: another adapter may have another one."""
        now = copy.copy(self)
        if now.fused is not None:
            try:
                now.fused = now.fused._replace(module=plain_layer(self.model))
            except HeadRefused as error:
                raise AdapterError(f"{type(self.model).__name__}: {error}") from None
        return super(PackedForward, now).scores(batch)

    def run(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **other: Any,
    ) -> Pass:
        """The padded batch, packed. labels: [B, padded length], token-aligned, -100 where nothing is scored."""
        foreign = [name for name, value in other.items() if value is not None]
        if foreign:
            raise AdapterError(
                f"the batch has {', '.join(foreign)}, which packed sequences do not carry; legal: input_ids, "
                "attention_mask, completion_mask"
            )
        batch, indices = _packed(input_ids, attention_mask, labels)
        self.router_logits = bool(output_router_logits)
        with self.attending():
            scores = self.scores(batch)
        outputs, differentiable = self.outputs, ("logprob",)
        if self.against is not None:
            outputs, differentiable = (*outputs, "kl_ref_policy"), (*differentiable, "kl_ref_policy")
        stats = scores.stats(batch.labels, outputs=outputs, differentiable=differentiable, ref=self.against)
        return Pass(batch, indices, input_ids.shape, scores, stats)

    def attach(self, note: Callable[[Pass], None]) -> None:
        """Answer TRL's calls of the model. note: is told of every pass."""
        before = self.model.forward

        @functools.wraps(type(self.model).forward)  # `generate` reads the signature
        def forward(model: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return before(*args, **kwargs)
            found = self.run(**kwargs)
            note(found)
            return found.for_trl()

        self.model.forward = types.MethodType(forward, self.model)


def _packed(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[fastalign.PackedBatch, Tensor]:
    ids, cu_seqlens, indices = fastalign.unpad(input_ids, attention_mask)
    lengths = cu_seqlens.diff().tolist()
    if 0 in lengths:
        raise AdapterError(f"row {lengths.index(0)} of attention_mask has no token; every response needs one")
    positions = (attention_mask != 0).long().cumsum(1).flatten()[indices] - 1
    scored = (labels != -100).flatten()[indices]
    targets = fastalign.shift_labels(ids, cu_seqlens, scored)
    batch = fastalign.PackedBatch(ids, positions, targets, targets != -100, cu_seqlens, max(lengths))
    return batch, indices
