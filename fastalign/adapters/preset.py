"""A preference preset as the loss of another trainer: what it needs, and its value on a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign.adapters.common import AdapterError

PER_PAIR = (
    "omega",
    "gamma_ext",
    "soft_labels",
    "valid",
)  # options that every pair has a number of its own for


class PresetLoss:
    """A preset, or a mixture, with its options; what it refuses, it refuses when it is made.

    preset, options: as `fastalign.preference_loss` takes `loss`, `state` and options; `clamp`: of weights that
    are made from the policy (`fastalign.wpo_weights`).

    columns: options that the loss needs of every pair. needs_reference, needs_kl, needs_tokens: whether it
    needs the reference's log-probs, whole distributions, or log-probs token by token. weighs: whether it
    needs the policy's `log_sum_sq_probs`. beta: what TRL's rewards are multiplied by."""

    def __init__(self, preset: Any, options: Mapping[str, Any]):
        options, mixed = dict(options), not isinstance(preset, (str, fastalign.Preset))
        try:
            parts = [part for part, _ in preset] if mixed else [preset]
            presets = [fastalign.losses.get(part) if isinstance(part, str) else part for part in parts]
        except (ValueError, TypeError) as error:
            raise AdapterError(f"preset: {_line(error)}") from None
        if wrong := [part for part in presets if not isinstance(part, fastalign.Preset)]:
            raise AdapterError(f"preset has a {type(wrong[0]).__name__}; legal: names and fastalign.Preset")
        self.name = "+".join(part.name for part in presets)
        state = options.pop("state", None)
        self.rules = [] if state is None else list(state) if isinstance(state, Sequence) else [state]
        self.weighs = any(part.weights for part in presets)
        self.clamp = options.pop("clamp", 1.0) if self.weighs else None
        if own := [n for n, value in options.items() if n in PER_PAIR or isinstance(value, Tensor)]:
            raise AdapterError(
                f"preset_options has {own[0]}; legal: numbers and words, and of every pair a column"
            )
        if mixed and options:
            raise AdapterError(
                f"preset_options has {', '.join(options)}; those of a mixture are in its Presets"
            )
        if not mixed:
            try:
                presets = [presets[0].replace(**options)]
            except (ValueError, TypeError) as error:
                raise AdapterError(f"preset_options: {_line(error)}") from None
        self.presets, self.loss = presets, presets[0]
        if mixed:
            self.loss = [(part, weight) for part, (_, weight) in zip(presets, preset)]
        self._read(mixed)

    def _read(self, mixed: bool) -> None:
        if scored := [p.name for p in self.presets if p.of_scores]:
            raise AdapterError(
                f"preset={scored[0]!r} is of a reward model's scores; legal: losses of log-probs"
            )
        needed = [n for p in self.presets for n in (*p.requires, *["soft_labels"] * p.needs_soft_labels)]
        if mixed and needed:
            raise AdapterError(
                f"preset={self.name!r}: {needed[0]} is one number per pair, which a mixture cannot share"
            )
        self.columns = tuple(n for n in dict.fromkeys(needed) if not (n == "omega" and self.weighs))
        self.needs_kl = any(p.needs_kl for p in self.presets)
        self.needs_reference = self.needs_kl or any(p.needs_reference for p in self.presets)
        self.needs_tokens = self.needs_kl or any(p.token_clamp or p.ld_alpha != 1.0 for p in self.presets)
        self.counts_sft = any(p.sft_weight and p.sft_norm == "token_mean_global" for p in self.presets)
        self.beta = next((p for p in self.presets if p.compares), self.presets[0]).beta
        token, ends = torch.zeros(2), torch.tensor([0, 1, 2], dtype=torch.int32)
        stats = fastalign.TokenStats(logprob=token, log_sum_sq_probs=token, kl_ref_policy=token)
        ones = {name: torch.ones(1) for name in self.columns}
        try:
            self(stats, token, ends, token == 0, ones, training=False)
        except (ValueError, TypeError) as error:
            raise AdapterError(f"preset: {_line(error)}") from None

    def __call__(
        self,
        stats: fastalign.TokenStats,
        ref_logprobs: Tensor | None,
        cu_seqlens: Tensor,
        mask: Tensor,
        per_pair: Mapping[str, Tensor],
        *,
        training: bool,
        num_items: Any = None,
    ) -> fastalign.PreferenceOutput:
        """Of a batch [chosen; rejected] of 2 P sequences. Arguments as of `fastalign.preference_loss`; rules
        remember what they see in training."""
        pairs = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device).view(2, -1).T
        options = dict(per_pair)
        if self.rules:
            options["state"] = [rule.train(training) for rule in self.rules]
        if self.weighs:
            options["omega"] = fastalign.wpo_weights(
                stats.logprob, stats.log_sum_sq_probs, cu_seqlens, mask=mask, pairs=pairs, clamp=self.clamp
            )
        return fastalign.preference_loss(
            stats.logprob, ref_logprobs, cu_seqlens, loss=self.loss, pairs=pairs, mask=mask,
            kl_ref_policy=stats.kl_ref_policy, num_items=num_items, **options,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {rule.rule: rule.state_dict() for rule in self.rules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for rule in self.rules:
            rule.load_state_dict(state[rule.rule])


def placed(sums: Tensor, cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    """[T]: of every sequence its sum at its first scored token, 0 elsewhere: log-probs token by token for a
    loss that only adds them up."""
    scored, starts = mask.long(), cu_seqlens.long()
    sequence = torch.repeat_interleave(torch.arange(len(sums), device=sums.device), starts.diff())
    before = torch.cat([scored.new_zeros(1), scored.cumsum(0)])[starts[:-1]]
    first = mask & (scored.cumsum(0) - before[sequence] == 1)
    return torch.where(first, sums[sequence], torch.zeros_like(sums[sequence]))


@dataclasses.dataclass
class Columns:
    """A collator that adds the pairs' own numbers, [B] each, to another one's batch."""

    inner: Any
    names: tuple[str, ...]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        own = {name: torch.tensor([float(example[name]) for example in examples]) for name in self.names}
        return {**self.inner(list(examples)), **own}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
