"""Losses of reward models: one score per response in place of log-probs, through the pair table and the list
kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign import losses
from fastalign.preference.list import listwise_loss_from_sums
from fastalign.preference.list_output import ListwiseOutput
from fastalign.preference.output import PreferenceOutput
from fastalign.preference.pair import preference_loss_from_sums
from fastalign.runtime.checks import check_number, check_shape, global_count, per_token


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    soft_labels: Tensor | None = None,
    centering: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> PreferenceOutput:
    """Bradley-Terry loss of a reward model: sp(-d) with d = chosen - rejected - margin, sp(x) = log(1 + e^x);
    with soft labels P P sp(-d) + (1 - P) sp(d); plus centering * (chosen + rejected)^2 per pair, which keeps
    the scores around 0.

    Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155; margin: Touvron et al. 2023 (Llama 2), arXiv
    2307.09288; soft labels: Lee et al. 2023 (RLAIF), arXiv 2309.00267; centering: Eisenstein et al. 2023,
    arXiv 2312.09244 (they use 0.01).

    Args:
        chosen, rejected: [P] scores of the two responses, read at each sequence's last token:
            values[cu_seqlens[1:].long() - 1] of packed per-token values (no sequence empty). Differentiable.
        margin: [P], by how much the chosen score should lead; a constant. soft_labels: [P], the probability
            that the chosen one is better; 1/2 is a tie.
        reduction: "mean" over the pairs, "sum", or "none" ([P]). num_items: the number of pairs over all
            micro-batches and ranks, for "mean".

    Returns:
        PreferenceOutput; its rewards are the scores.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, a negative centering.
    """
    check_number("centering", centering, low=0.0)
    preset = losses.get("bt_rm")
    tensors = {}
    if margin is not None:
        check_shape("margin", margin, tuple(chosen.shape))
        tensors["gamma_ext"] = margin
    if soft_labels is not None:
        preset, tensors["soft_labels"] = preset.replace(labels="soft"), soft_labels
    out = preference_loss_from_sums(
        chosen, rejected, loss=preset, reduction=reduction, num_items=num_items, **tensors
    )
    if centering == 0.0:
        return out
    each = centering * (per_token("chosen", chosen) + per_token("rejected", rejected)) ** 2
    if reduction == "mean":
        items = global_count("num_items", num_items, each)
        count = max(each.numel(), 1) if items is None else torch.where(items > 0, items, 1.0)
        return out._replace(loss=out.loss + each.sum() / count)
    return out._replace(loss=out.loss + (each if reduction == "none" else each.sum()))


def kwise_reward_loss(
    rewards: Tensor,
    list_offsets: Tensor,
    scores: Tensor,
    *,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> ListwiseOutput:
    """Ranking loss of a reward model over lists of K responses: the mean of sp(-(r_i - r_j)) over the pairs
    of a list in which i has the higher score (Ouyang et al. 2022, arXiv 2203.02155). Equal scores make no
    pair; a list without a pair gives 0.

    Args:
        rewards: [S] the reward model's scores; differentiable.
        list_offsets: [L + 1] integers, from 0 to S; at most 64 responses per list. scores: [S] the labels,
            higher is better (a rank r as -r).
        reduction: "mean" over the lists, "sum", or "none" ([L]). num_items: the number of lists over all
            micro-batches and ranks, for "mean".

    Returns:
        ListwiseOutput; loss "kwise_rm" of `listwise_loss_from_sums`.
    """
    return listwise_loss_from_sums(
        rewards, None, list_offsets, scores, loss="kwise_rm", reduction=reduction, num_items=num_items
    )
