"""Losses over pairs of responses: every member of the DPO family, and mixtures of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.losses.pair import TENSOR_FIELDS, TENSOR_ONLY, Preset
from fastalign.ops.columns import REDUCTIONS
from fastalign.ops.preference.op import (
    PAIR_TENSORS,
    PairSumsFunction,
    PairTensors,
    PairTokens,
    PreferenceFromSumsFunction,
    PreferenceFunction,
)
from fastalign.preference import mixture
from fastalign.preference.output import PreferenceOutput
from fastalign.preference.rules import BatchRule
from fastalign.runtime.checks import (
    as_int32,
    check_choice,
    check_cu_seqlens,
    check_same_device,
    check_shape,
    global_count,
    per_token,
    row_mask,
)

assert {*TENSOR_ONLY, *TENSOR_FIELDS} == {*PAIR_TENSORS}


def preference_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    *,
    loss: str | Preset | Sequence[tuple[str | Preset, float]] = "dpo",
    pairs: Tensor | None = None,
    mask: Tensor | None = None,
    kl_ref_policy: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    state: BatchRule | Sequence[BatchRule] | None = None,
    **options: Any,
) -> PreferenceOutput:
    """A preference loss over pairs of packed sequences; the formula of every loss is in
    `fastalign.losses.available()`.

    Args:
        logprobs: [T] policy log-probs, row-aligned (row t scores the next token), 0 at unscored rows;
            differentiable.
        ref_logprobs: [T] reference log-probs, never differentiated; None where the loss needs none (it is
            accepted and not read then).
        cu_seqlens: [S + 1] int32, from 0 to T.
        loss: a name of `losses.available()`, a Preset, or a mixture [(name or Preset, weight), ...] whose
            losses share one pass and add up; a mixture takes no further options (put them into Presets), and
            its rewards are those of its first loss (in metrics(): of the first that is not SFT).
        pairs: [P, 2] integers, (chosen, rejected) sequence numbers; default (0, 1), (2, 3), ... A sequence
            may be in several pairs.
        mask: [T] bool, row-aligned: the response tokens. Required by losses that use lengths.
        kl_ref_policy: [T] exact KL(ref || policy) per token, for losses with sequence KLs; differentiable.
        weights: [T] token weights, any sign, on log-probs and reference alike; not differentiated, and not
            applied to the SFT term.
        reduction: "mean" over the valid pairs, "sum", or "none" ([P]; its mean over the valid pairs is
            "mean").
        num_items: the number of valid pairs over all micro-batches and ranks, for "mean" under gradient
            accumulation; number or 0-dim tensor.
        num_sft_tokens: likewise the number of tokens of the SFT term (sft_norm="token_mean_global").
        state: the rule object (`fastalign.BetaDPO`, `AlphaDPO`, `BCODelta`) that beta_dpo, alpha_dpo and bco
            need; it remembers between calls.
        options: the loss's own options and fields of Preset, by name. beta, target and anchor may be tensors,
            0-dim or [P]; omega (pair weights), gamma_ext (extra margin), soft_labels (P(chosen wins)) and
            valid (bool) are tensors [P]. Tensors are constants here.

    Returns:
        PreferenceOutput. A pair whose two responses are both empty is not valid and counts nowhere.

    Raises:
        ValueError, TypeError: unknown loss or option, impossible combination, shapes, dtypes, devices,
            missing mask or reference log-probs.
        IndexError: pairs outside [0, S) (checked on the CPU).
    """
    components, tensors = mixture.components(loss, options)
    presets = [p for p, _ in components]
    check_choice("reduction", reduction, REDUCTIONS)
    logprobs = per_token("logprobs", logprobs)
    cu_seqlens = check_cu_seqlens(cu_seqlens, logprobs)
    for p in presets:
        if mask is None and p.needs_lengths:
            raise ValueError(
                f"loss {p.name!r} uses response lengths: mask is required (row-aligned, True at response "
                "tokens)"
            )
        if p.needs_reference and ref_logprobs is None:
            raise ValueError(f"loss {p.name!r} needs ref_logprobs")
        if p.needs_kl and kl_ref_policy is None:
            raise ValueError(f"loss {p.name!r} needs kl_ref_policy, the per-token KL(ref || policy)")
    ref = (
        per_token("ref_logprobs", ref_logprobs, logprobs).detach()
        if any(p.needs_reference for p in presets)
        else None
    )
    kl = per_token("kl_ref_policy", kl_ref_policy, logprobs) if any(p.needs_kl for p in presets) else None
    mask = row_mask(mask, logprobs)
    if weights is not None:
        weights = per_token("weights", weights, logprobs).detach()
    pairs, count = check_pairs(pairs, cu_seqlens)
    tokens = PairTokens(logprobs, ref, kl, cu_seqlens, pairs, mask, weights)
    if mixture.is_plain(components, state):
        given = pair_tensors(presets[0], tensors, count, num_items, num_sft_tokens, logprobs)
        value, table, sums = PreferenceFunction.apply(
            logprobs, kl, tokens, given, presets[0].params(reduction), count
        )
        return PreferenceOutput(
            value, presets[0], table, sums, presets[0].sft_weight != 0, (), tensors.get("target")
        )
    sums = PairSumsFunction.apply(logprobs, kl, tokens, mixture.shared_params(presets), count)
    return _from_sums(components, sums, tensors, state, reduction, num_items, num_sft_tokens)


def check_pairs(pairs: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor | None, int]:
    """Sequence numbers as int32, or None for the default pairs (0, 1), (2, 3), ..., and how many pairs there
    are."""
    sequences = cu_seqlens.shape[0] - 1
    if pairs is None:
        if sequences % 2:
            raise ValueError(
                "pairs is required: the default pairs sequences (0, 1), (2, 3), ... but there are "
                f"{sequences} sequences"
            )
        return None, sequences // 2
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype.is_floating_point or pairs.dtype == torch.bool:
        raise ValueError(f"pairs must be integers of shape [P, 2], got {pairs.dtype} {tuple(pairs.shape)}")
    check_same_device("pairs", pairs, "logprobs", cu_seqlens)
    return as_int32(pairs), pairs.shape[0]


def _from_sums(
    components: list[tuple[Preset, float]],
    sums: Tensor,
    tensors: dict[str, Tensor],
    state: Any,
    reduction: str,
    num_items: Any,
    num_sft_tokens: Any,
) -> PreferenceOutput:
    """The table of every component from the same sums (with log-ratios against the reference where any
    component has one), added up."""
    total, first = None, None
    rules = mixture.rules_of(components, state)
    with_reference = any(p.needs_reference for p, _ in components)
    for preset, weight in components:
        own, own_tensors = mixture.prepare(preset, sums, tensors, rules.get(preset.rule), with_reference)
        given = pair_tensors(preset, own_tensors, sums.shape[0], num_items, num_sft_tokens, sums)
        value, table = PreferenceFromSumsFunction.apply(own, given, preset.params(reduction))
        total = weight * value if total is None else total + weight * value
        if first is None:
            first = preset, mixture.own_rewards(preset, table, sums, tensors), sums.detach()
    has_sft = any(p.sft_weight for p, _ in components)
    return PreferenceOutput(total, *first, has_sft, tuple(p for p, _ in components), tensors.get("target"))


def preference_loss_from_sums(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss: str | Preset | Sequence[tuple[str | Preset, float]] = "dpo",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_kl: Tensor | None = None,
    rejected_kl: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    state: BatchRule | Sequence[BatchRule] | None = None,
    **options: Any,
) -> PreferenceOutput:
    """The same losses for trainers that have already summed their log-probs over tokens.

    Args:
        chosen, rejected: [P] sums (never means) of the policy's log-probs over the response tokens;
            differentiable.
        ref_chosen, ref_rejected: [P], the reference's; needed where the loss needs a reference. fp64 is worth
            its bytes: the sums cancel.
        chosen_lengths, rejected_lengths: [P] numbers of response tokens; required by losses that use lengths.
            Without them every response counts as non-empty.
        chosen_kl, rejected_kl: [P] sequence KLs, differentiable, for losses with sequence KLs.
        loss, reduction, num_items, num_sft_tokens, state, options: as in `preference_loss`. Options that act
            on single tokens (ld_alpha, token_clamp, sft_include_prompt) raise here.

    Returns:
        PreferenceOutput.
    """
    components, tensors = mixture.components(loss, options)
    presets = [p for p, _ in components]
    check_choice("reduction", reduction, REDUCTIONS)
    for p in presets:
        if p.ld_alpha != 1.0 or p.token_clamp is not None or p.sft_include_prompt:
            raise ValueError(
                "ld_alpha, token_clamp and sft_include_prompt act on single tokens; use preference_loss on "
                "packed log-probs"
            )
        if p.needs_reference and (ref_chosen is None or ref_rejected is None):
            raise ValueError(f"loss {p.name!r} needs ref_chosen and ref_rejected")
        if p.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
            raise ValueError(
                f"loss {p.name!r} uses response lengths: chosen_lengths and rejected_lengths are required"
            )
        if p.needs_kl and (chosen_kl is None or rejected_kl is None):
            raise ValueError(
                f"loss {p.name!r} needs chosen_kl and rejected_kl, the sequence sums of KL(ref || policy)"
            )
    chosen = per_token("chosen", chosen)
    if rejected.dtype == torch.float64 and chosen.dtype != torch.float64:
        chosen = chosen.double()
    rejected = per_token("rejected", rejected, chosen)
    if any(p.needs_reference for p in presets):
        ratios = []
        for name, policy, ref in (
            ("ref_chosen", chosen, ref_chosen),
            ("ref_rejected", rejected, ref_rejected),
        ):
            check_shape(name, ref, tuple(chosen.shape))
            check_same_device(name, ref, "chosen", chosen)
            # Subtract in the wider type, then round once. Equal infinities differ by 0; equal numbers do too,
            # but pass the gradient on.
            difference = (policy - ref.detach()).to(policy.dtype)
            ratios.append(
                torch.where((policy == ref) & torch.isinf(policy), torch.zeros_like(policy), difference)
            )
    else:
        ratios = [chosen, rejected]

    def column(name: str, value: Tensor | None, default: float) -> Tensor:
        if value is None:
            return torch.full_like(chosen, default)
        check_shape(name, value, tuple(chosen.shape))
        check_same_device(name, value, "chosen", chosen)
        return value.to(chosen.dtype)

    sides = []
    for policy, ratio, lengths, kl, side in ((chosen, ratios[0], chosen_lengths, chosen_kl, "chosen"),
                                             (rejected, ratios[1], rejected_lengths, rejected_kl, "rejected")):  # fmt: skip
        length = column(f"{side}_lengths", lengths, 1.0).detach()
        kl = column(f"{side}_kl", kl if any(p.needs_kl for p in presets) else None, 0.0)
        sides.append(torch.stack([policy, ratio, length, kl, policy, length], -1))
    return _from_sums(components, torch.stack(sides, 1), tensors, state, reduction, num_items, num_sft_tokens)


def pair_tensors(
    preset: Preset, tensors: dict[str, Tensor], count: int, num_items: Any, num_sft_tokens: Any, like: Tensor
) -> PairTensors:
    """What a call gives per pair and the two global counts; constants of the loss."""
    if preset.needs_soft_labels and "soft_labels" not in tensors:
        raise ValueError(f"loss {preset.name!r} needs soft_labels, a tensor [P]")
    if missing := [name for name in preset.requires if name not in tensors]:
        hint = f" (fastalign.{preset.weights} computes it)" if preset.weights else ""
        raise ValueError(f"loss {preset.name!r} needs {', '.join(missing)}, a tensor [P]{hint}")
    if "soft_labels" in tensors and not preset.takes_soft_labels:
        raise ValueError(f"loss {preset.name!r} does not use soft_labels (labels='soft' does)")
    out: dict[str, Tensor] = {}
    for name in PAIR_TENSORS:
        t = tensors.get(name)
        if t is not None:
            may_be_scalar = name in TENSOR_FIELDS or name in ("omega", "gamma_ext")
            if tuple(t.shape) != (count,) and not (may_be_scalar and t.numel() == 1):
                raise ValueError(
                    f"{name} has shape {tuple(t.shape)}; legal: ({count},)"
                    + " or a single value" * may_be_scalar
                )
            check_same_device(name, t, "the log-probs", like)
            t = t.detach().to(torch.bool if name == "valid" else like.dtype).contiguous()
            t = t.reshape(()) if t.dim() and tuple(t.shape) != (count,) else t
            out[name] = t
    counts = {
        name: global_count(name, value, like)
        for name, value in (("num_items", num_items), ("num_sft_tokens", num_sft_tokens))
    }
    return PairTensors(**out, **counts)
