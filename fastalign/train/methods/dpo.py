"""Preference pairs: DPO and every loss of `fastalign.losses`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastalign
from fastalign.train.config import TrainConfig
from fastalign.train.errors import UserError
from fastalign.train.formats import PREFERENCE
from fastalign.train.methods.base import LogprobFn, Method, Scored, Split, token_metrics
from fastalign.train.metrics import Metrics


class PreferenceMethod(Method):
    """DPO and its variants.

    Args:
        logprob_fn: (logits [T, V], labels [T], -100 where nothing is scored) -> log-probs [T], in place of `fastalign.token_stats`; for
            comparisons. It yields no token metrics, so `config.token_metrics` must be off.
        loss_fn: in place of `fastalign.preference_loss`, called in the same way.
    """

    name, format, default_loss = "dpo", PREFERENCE, "dpo"

    def __init__(self, config: TrainConfig, *, logprob_fn: LogprobFn | None = None, loss_fn: Callable[..., Any] | None = None):
        super().__init__(config, logprob_fn=logprob_fn)
        self.preset, self.loss_fn = resolve_loss(self.config), loss_fn or fastalign.preference_loss
        self.needs_reference = self.preset.needs_reference

    def constants(self, lm: Any, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        return {"num_items": len(indices), "num_sft_tokens": sum(len(split.examples[i].chosen) for i in indices)}

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        packed = scored.packed
        output = self.loss_fn(
            scored.policy["logprob"], scored.fixed.get("ref_logprobs"), packed.cu_seqlens, loss=self.preset, mask=packed.mask, **known
        )
        chosen = torch.arange(len(packed.cu_seqlens) - 1, device=packed.mask.device) % 2 == 0
        return output.loss, {**output.metrics(), **token_metrics(scored, chosen)}


def resolve_loss(config: TrainConfig) -> Any:
    """The preset that --loss and --set name. Raises `UserError` that lists the legal names, or says why the trainer cannot serve it."""
    try:
        preset = fastalign.losses.get(config.loss or "dpo").replace(**config.loss_options)
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
