"""Preference losses from hidden states and the LM head's weight: pair by pair, so that no more than a chunk
of pairs has logits at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.losses.pair import Preset
from fastalign.ops.columns import CHOSEN, SUM_SFT_LENGTH, TAB_VALID
from fastalign.preference import mixture
from fastalign.preference.output import PreferenceOutput
from fastalign.preference.pair import preference_loss
from fastalign.preference.rules import BatchRule
from fastalign.rows.known import Chunk, KnownLoss, KnownLossFunction, chunks_of
from fastalign.rows.linear import linear_head, split_options
from fastalign.rows.stats import TokenStats
from fastalign.runtime.checks import check_cu_seqlens, row_mask


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    loss: str | Preset | Sequence[tuple[str | Preset, float]] = "dpo",
    mask: Tensor | None = None,
    pairs: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    state: BatchRule | Sequence[BatchRule] | None = None,
    **options: Any,
) -> PreferenceOutput:
    """`preference_loss` of `linear_token_stats(hidden, weight, labels, ...)`, value and gradients.

    Where every pair's share of the loss is known from that pair alone (all losses but those with a rule or an
    order over the whole batch, with reduction "mean" or "sum", the default pairs and `host_counts`), whole
    pairs are walked at a time and their gradient is made in the forward pass: 3 products instead of 4. A pair
    longer than the workspace has rows is multiplied again for its gradient. Otherwise the two functions are
    composed.

    Args:
        hidden: [T, H]; weight: [V, H]; bias: [V]; labels: [T], as in `linear_token_stats`.
        cu_seqlens: [S + 1] int32.
        ref_logprobs: [T]; or ref_hidden [T, H'] with ref_weight and ref_bias, from which they are made too,
            and the sequence KLs of losses that have them. None where the loss needs no reference.
        mask: [T] bool, the response tokens; None: the rows whose label is not ignored.
        loss, pairs, reduction, num_items, num_sft_tokens, state: as in `preference_loss`.
        options: those of `linear_token_stats` (temperature, logit_scale, softcap, ignore_index,
            head_precision, workspace_bytes, batch_invariant, host_counts, tp_group) by name; `weights` [T]
            and all others go to `preference_loss`.

    Returns:
        PreferenceOutput.

    Raises:
        ValueError, TypeError, IndexError: as both.
    """
    head_options, options = split_options(options)
    parts, tensors = mixture.components(loss, {k: v for k, v in options.items() if k != "weights"})
    presets = [p for p, _ in parts]
    if any(p.needs_reference for p in presets) and (ref_logprobs is None) == (ref_hidden is None):
        raise ValueError(f"loss {presets[0].name!r} needs a reference: either ref_logprobs or ref_hidden")
    with_kl = any(p.needs_kl for p in presets)
    if with_kl and ref_hidden is None:
        raise ValueError(
            f"loss {next(p.name for p in presets if p.needs_kl)!r} needs ref_hidden (and ref_weight), from "
            "which the KL is made"
        )
    if not any(p.needs_reference or p.needs_kl for p in presets):
        ref_hidden = ref_weight = ref_bias = None
    outputs = (
        "logprob",
        *(("ref_logprob",) if ref_hidden is not None else ()),
        *(("kl_ref_policy",) if with_kl else ()),
    )
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        raise ValueError("labels must be a tensor of integers, [T]")
    scored = labels != head_options.ignore_index
    mask = scored if mask is None else row_mask(mask, labels) & scored
    walked = None if any(p.sft_include_prompt for p in presets) else mask
    head = linear_head(
        hidden, weight, bias, (ref_hidden, ref_weight, ref_bias), labels, walked, outputs, head_options
    )
    arguments = {"loss": loss, "reduction": reduction, "state": state, **options}

    def of(
        stats: TokenStats, tokens: slice, cu: Tensor, counts: dict[str, Any], **more: Any
    ) -> PreferenceOutput:
        ref = (
            stats.ref_logprob
            if ref_hidden is not None
            else None
            if ref_logprobs is None
            else ref_logprobs[tokens]
        )
        return preference_loss(
            stats.logprob,
            ref,
            cu,
            mask=mask[tokens],
            kl_ref_policy=stats.kl_ref_policy,
            **arguments | counts | more,
        )

    counts = {"num_items": num_items, "num_sft_tokens": num_sft_tokens}
    everything = slice(0, labels.shape[0])
    cu_seqlens = check_cu_seqlens(cu_seqlens, hidden)
    at_zero = None
    if state is None:  # raises what is to be raised; a rule would remember it
        at_zero = of(_zeros(labels), everything, cu_seqlens, counts, pairs=pairs)
    spec, call = head.call(known=head.counts() and _is_known(presets, parts, state, reduction, pairs))
    if call.plan.kind != "known":
        return of(head.run(spec, call), everything, cu_seqlens, counts, pairs=pairs)

    borders = cu_seqlens[::2].tolist()
    known = _counts(at_zero, counts)
    outcome = []

    def part(chunk: Chunk, stats: TokenStats) -> Tensor:
        units = slice(2 * chunk.units.start, 2 * chunk.units.stop + 1)
        own = {k: v[chunk.units] for k, v in tensors.items() if v.dim() and v.shape[0] == len(borders) - 1}
        if "weights" in options:
            own["weights"] = options["weights"][chunk.tokens]
        return of(stats, chunk.tokens, cu_seqlens[units] - cu_seqlens[units.start], known, **own).loss

    def whole(stats: TokenStats) -> Tensor:
        outcome.append(of(stats, everything, cu_seqlens, counts))
        return outcome[0].loss

    value = KnownLossFunction.apply(
        call.hidden, head.weight, head.bias, call, KnownLoss(chunks_of(call, borders), part, whole)
    )
    return outcome[0]._replace(loss=value)


def _is_known(presets: list[Preset], parts: Any, state: Any, reduction: str, pairs: Any) -> bool:
    """Whether a pair's share of the loss follows from that pair, and pairs lie side by side."""
    per_pair = mixture.is_plain(parts, state) and presets[0].nonfinite != "drop"
    return (
        per_pair
        and pairs is None
        and (reduction == "mean" or (reduction == "sum" and not presets[0].sft_weight))
    )


def _counts(at_zero: PreferenceOutput, given: dict[str, Any]) -> dict[str, Any]:
    """What the loss is divided by, of all pairs: it depends on lengths only, so log-probs of 0 tell it
    too."""
    valid = at_zero.table[:, TAB_VALID] > 0
    sft_tokens = torch.where(valid, at_zero.sums[:, CHOSEN, SUM_SFT_LENGTH], 0.0).sum()
    found = {"num_items": valid.sum(), "num_sft_tokens": sft_tokens}
    return {name: found[name] if value is None else value for name, value in given.items()}


def _zeros(labels: Tensor) -> TokenStats:
    zeros = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    return TokenStats(logprob=zeros, ref_logprob=zeros, kl_ref_policy=zeros)
