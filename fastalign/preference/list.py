"""Losses over ranked lists of responses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.losses.list import ListPreset
from fastalign.losses.options import resolve_listwise
from fastalign.losses.pair import Preset
from fastalign.ops.columns import REDUCTIONS
from fastalign.ops.listwise.op import ListTensors, ListwiseFromSumsFunction, ListwiseFunction
from fastalign.preference.list_output import ListwiseOutput
from fastalign.runtime.checks import (
    check_choice,
    check_cu_seqlens,
    check_same_device,
    check_shape,
    global_count,
    per_token,
    row_mask,
)

# The pair kernel's parameters for sums without and with a reference.
_SUMS = tuple(Preset(reference=reference) for reference in (False, True))


def listwise_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    list_offsets: Tensor,
    scores: Tensor,
    *,
    loss: str | ListPreset = "plackett_luce",
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    **options: Any,
) -> ListwiseOutput:
    """A loss over lists of responses to the same prompt, ranked by scores; the formula of every loss is in
    `losses.available_listwise()`.

    Args:
        logprobs: [T] policy log-probs, row-aligned (row t scores the next token); differentiable.
        ref_logprobs: [T] reference log-probs, never differentiated; None where the loss needs none (it is
            accepted and not read then).
        cu_seqlens: [S + 1] int32, from 0 to T.
        list_offsets: [L + 1] integers, from 0 to S: list l holds the sequences list_offsets[l] to
            list_offsets[l + 1] - 1, at most 64 of them. Lists of none or one are legal.
        scores: [S] finite numbers, higher is better; constants. The ranking comes from them: equal scores
            keep the order of the list in plackett_luce and are no contrast in rrhf, pro and lipo; infonca,
            nca and exo_list take them as rewards, lipo as graded labels (its gain is 2^score: give a bounded
            scale).
        loss: a name of `losses.available_listwise()` or a ListPreset.
        mask: [T] bool, row-aligned: the response tokens. Required by losses that use lengths.
        reduction: "mean" over the valid lists, "sum", or "none" ([L]; its mean over the valid lists is
            "mean").
        num_items: the number of valid lists over all micro-batches and ranks, for "mean" under gradient
            accumulation; number or 0-dim tensor.
        num_sft_tokens: likewise the number of tokens of the SFT term (sft_norm="token_mean_global").
        options: the loss's own options and fields of ListPreset, by name. beta may be a tensor, 0-dim or [L],
            a constant here.

    Returns:
        ListwiseOutput. A list without any scored token is not valid and counts nowhere.

    Raises:
        ValueError, TypeError: unknown loss or option, shapes, dtypes, devices, missing mask or reference
            log-probs; on the CPU also offsets that do not run from 0 to S, a list of more than 64 responses
            and scores that are not finite. On a GPU, where values are not looked at, the loss of such a list
            is NaN (`fastalign.runtime.op.debug_checks` raises there too).
    """
    preset, tensors = resolve_listwise(loss, options)
    check_choice("reduction", reduction, REDUCTIONS)
    logprobs = per_token("logprobs", logprobs)
    cu_seqlens = check_cu_seqlens(cu_seqlens, logprobs)
    if mask is None and preset.needs_lengths:
        raise ValueError(
            f"loss {preset.name!r} uses response lengths: mask is required (row-aligned, True at response "
            "tokens)"
        )
    if preset.reference and ref_logprobs is None:
        raise ValueError(f"loss {preset.name!r} needs ref_logprobs")
    ref = per_token("ref_logprobs", ref_logprobs, logprobs).detach() if preset.reference else None
    count = cu_seqlens.shape[0] - 1
    lists, scores, given = _list_inputs(
        list_offsets, scores, tensors, num_items, num_sft_tokens, count, logprobs
    )
    pair = _SUMS[ref is not None].params()
    value, rewards, table, sums = ListwiseFunction.apply(
        logprobs,
        ref,
        cu_seqlens,
        row_mask(mask, logprobs),
        lists,
        scores,
        given,
        pair,
        preset.params(reduction),
        count,
    )
    return ListwiseOutput(value, rewards, preset, lists, table, sums)


def listwise_loss_from_sums(
    totals: Tensor,
    ref_totals: Tensor | None,
    list_offsets: Tensor,
    scores: Tensor,
    *,
    loss: str | ListPreset = "plackett_luce",
    lengths: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    **options: Any,
) -> ListwiseOutput:
    """The same losses for trainers that have already summed their log-probs over tokens.

    Args:
        totals: [S] sums (never means) of the policy's log-probs over the response tokens; differentiable.
        ref_totals: [S], the reference's; needed where the loss needs a reference. fp64 is worth its bytes:
            the sums cancel.
        lengths: [S] numbers of response tokens; required by losses that use lengths. Without them every
            response counts as non-empty.
        list_offsets, scores, loss, reduction, num_items, num_sft_tokens, options: as in `listwise_loss`.

    Returns:
        ListwiseOutput.
    """
    preset, tensors = resolve_listwise(loss, options)
    check_choice("reduction", reduction, REDUCTIONS)
    totals = per_token("totals", totals)
    count = totals.shape[0]
    for name, value, needed in (
        ("ref_totals", ref_totals, preset.reference),
        ("lengths", lengths, preset.needs_lengths),
    ):
        if value is None and needed:
            raise ValueError(f"loss {preset.name!r} needs {name}, a tensor [S]")
        if value is not None:
            check_shape(name, value, (count,))
            check_same_device(name, value, "totals", totals)
    policy = totals.detach()
    # Subtract in the wider type, then round once.
    ratio = (
        torch.where(policy == ref_totals, 0.0, policy - ref_totals.detach()) if preset.reference else policy
    )
    length = torch.ones_like(policy) if lengths is None else lengths.detach().to(policy.dtype)
    sums = torch.stack([policy, ratio.to(policy.dtype), length, torch.zeros_like(policy), policy, length], -1)
    lists, scores, given = _list_inputs(
        list_offsets, scores, tensors, num_items, num_sft_tokens, count, totals
    )
    value, rewards, table = ListwiseFromSumsFunction.apply(
        totals, sums, lists, scores, given, preset.params(reduction)
    )
    return ListwiseOutput(value, rewards, preset, lists, table, sums)


def _list_inputs(
    list_offsets: Tensor,
    scores: Tensor,
    tensors: dict[str, Tensor],
    num_items: Any,
    num_sft_tokens: Any,
    count: int,
    like: Tensor,
) -> tuple[Tensor, Tensor, ListTensors]:
    """Offsets, scores, and what else the op takes; constants of the loss."""
    list_offsets = check_cu_seqlens(list_offsets, like, name="list_offsets", total="sequences")
    check_shape("scores", scores, (count,))
    check_same_device("scores", scores, "the log-probs", like)
    beta = tensors.get("beta")
    if beta is not None:
        lists = list_offsets.shape[0] - 1
        if beta.numel() != 1 and tuple(beta.shape) != (lists,):
            raise ValueError(f"beta has shape {tuple(beta.shape)}; legal: ({lists},) or a single value")
        check_same_device("beta", beta, "the log-probs", like)
        beta = beta.detach().to(like.dtype).contiguous()
        beta = beta.reshape(()) if tuple(beta.shape) != (lists,) else beta
    counts = [
        global_count(name, value, like)
        for name, value in (("num_items", num_items), ("num_sft_tokens", num_sft_tokens))
    ]
    return list_offsets, scores.detach().to(like.dtype).contiguous(), ListTensors(beta, *counts)
