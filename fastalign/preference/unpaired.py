"""Losses on binary feedback: each response alone, desirable or not, against an anchor. A pair whose other
side is empty: a desirable response is its chosen side, h = beta D - anchor, an undesirable one its rejected
side, h = anchor - beta D."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.losses import peers
from fastalign.losses.pair import Preset
from fastalign.ops.columns import (
    REDUCTIONS,
    SUM_LENGTH,
    SUM_POLICY,
    SUM_RATIO,
    TAB_REWARD_CHOSEN,
    TAB_REWARD_REJECTED,
    TAB_VALID,
)
from fastalign.ops.preference.op import (
    PairSumsFunction,
    PairTokens,
    PreferenceFromSumsFunction,
    PreferenceFunction,
)
from fastalign.packing import sequence_sum
from fastalign.preference.pair import pair_tensors
from fastalign.preference.rules import BCODelta, PairValues
from fastalign.runtime import memo
from fastalign.runtime.checks import (
    check_choice,
    check_cu_seqlens,
    check_number,
    check_same_device,
    check_shape,
    global_count,
    one_element,
    per_token,
    row_mask,
)
from fastalign.runtime.distributed import sum_over_group
from fastalign.runtime.frozen import copies_without_graph
from fastalign.runtime.metric import Metric

UNPAIRED = {
    "kto": Preset(
        "kto", "desirable_weight sg(beta (z0 - D)) | undesirable_weight sg(beta (D - z0))", "Ethayarajh et al. 2024, arXiv 2402.01306",
        link="sigmoid",
    ),
    "apo_zero_unpaired": Preset("apo_zero_unpaired", "sg(-beta D) | sg(beta D)", "D'Oosterlinck et al. 2024, arXiv 2408.06266", link="sigmoid"),
    "bco": Preset("bco", "sp(-(beta D - delta)) | omega sp(beta D - delta)", "Jung et al. 2024, arXiv 2404.04656", beta=0.01),
}  # fmt: skip
NAMES = (*UNPAIRED, "dro")
_WEIGHTS = ("desirable_weight", "undesirable_weight")
_OPTIONS = {"kto": ("beta", *_WEIGHTS), "apo_zero_unpaired": ("beta", *_WEIGHTS), "bco": ("beta", *_WEIGHTS, "omega"),
            "dro": ("tau", "rescale", "rewards", "values")}  # fmt: skip


@copies_without_graph
class UnpairedOutput(NamedTuple):
    """loss: scalar, or [S] with reduction="none". rewards, logprobs: [S], detached: beta D and the policy's
    sums. desirable, valid: [S] bool. anchor: what rewards were compared with, 0-dim (kto: beta z0; bco:
    delta; otherwise 0)."""

    loss: Tensor
    rewards: Tensor
    logprobs: Tensor
    desirable: Tensor
    valid: Tensor
    anchor: Tensor

    def metrics(self) -> dict[str, Metric]:
        """TRL's keys -> Metric (sum, count); a class that is absent from the batch has count 0 (its mean is
        NaN: leave it out)."""
        zero = torch.zeros_like(self.rewards)
        out = {}
        for side, where in (
            ("chosen", self.valid & self.desirable),
            ("rejected", self.valid & ~self.desirable),
        ):
            count = where.sum(dtype=zero.dtype)
            out[f"rewards/{side}"] = Metric(torch.where(where, self.rewards, zero).sum(), count)
            out[f"logps/{side}"] = Metric(torch.where(where, self.logprobs, zero).sum(), count)
        out["anchor"] = Metric(self.anchor, torch.ones_like(self.anchor))
        return out


def kto_baseline(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """KTO's reference point z0 = max(0, mean over sequences of D), D = sum (logprobs - ref_logprobs), of mismatched prompt-response pairs.

    Args:
        logprobs, ref_logprobs: [T], of responses paired with other prompts (x_i with y_{i-1}). mask: [T]
            bool, row-aligned.
        group: sum and count are taken over all ranks of it.

    Returns:
        0-dim, detached. Empty responses do not count; without any, 0.
    """
    logprobs = per_token("logprobs", logprobs).detach()
    ref = per_token("ref_logprobs", ref_logprobs, logprobs).detach()
    difference = torch.where(logprobs == ref, torch.zeros_like(logprobs), logprobs - ref)
    sums = sequence_sum(difference, cu_seqlens, mask=mask)
    filled = sequence_sum(torch.ones_like(logprobs), cu_seqlens, mask=mask) > 0
    total, count = torch.where(filled, sums, 0.0).sum(), filled.sum(dtype=sums.dtype)
    if group is not None:
        total, count = sum_over_group(total, group), sum_over_group(count, group)
    return (total / count.clamp(min=1.0)).clamp(min=0.0)


def unpaired_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    desirable: Tensor,
    *,
    loss: str = "kto",
    mask: Tensor | None = None,
    baseline: float | Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    state: BCODelta | None = None,
    **options: Any,
) -> UnpairedOutput:
    """A loss on single responses with binary feedback. With D = sum over the response of (logprobs - ref_logprobs), per response:

    - kto (arXiv 2402.01306): desirable_weight sigmoid(beta (z0 - D)) if desirable, undesirable_weight
      sigmoid(beta (D - z0)) if not; z0 = `baseline`.
    - apo_zero_unpaired (arXiv 2408.06266): kto with z0 = 0.
    - bco (arXiv 2404.04656): softplus(-(beta D - delta)) if desirable, omega softplus(beta D - delta) if not;
      delta = `baseline`, or the
      running mean of beta D that `state` (a BCODelta) keeps.
    - dro (arXiv 2405.19107): (r - V - tau D)^2 / 2 with `rewards` r and `values` V; `desirable` is used for
      metrics only.

    Args:
        logprobs: [T], row-aligned, differentiable. ref_logprobs: [T]. cu_seqlens: [S + 1] int32. mask: [T]
            bool.
        desirable: [S] bool.
        baseline: kto: z0, required (`kto_baseline`); bco: delta, required without `state`. A number or 0-dim
            tensor, a constant of the loss.
        reduction: "mean" over all non-empty responses of both classes, "sum", "none". num_items: their global
            number, for "mean".
        options: beta (default 0.1; bco 0.01; a number or 0-dim tensor), desirable_weight, undesirable_weight
            (default 1); bco: omega [S], weights of undesirable responses; dro: tau (default 1), rewards [S],
            values [S] (differentiable), rescale (default True: the policy's gradient divided by tau, as in
            the paper's algorithm 1; the value's is not).

    Returns:
        UnpairedOutput. An empty response counts nowhere.

    Raises:
        ValueError, TypeError: unknown loss or option, missing baseline, state, rewards or values, shapes,
            dtypes, devices.
    """
    check_choice("loss", loss, NAMES)
    check_choice("reduction", reduction, REDUCTIONS)
    unknown = [name for name in options if name not in _OPTIONS[loss]]
    if unknown:
        hint = peers.preference_hint(unknown[0], options[unknown[0]])
        raise ValueError(
            f"loss {loss!r} has no option {unknown[0]!r}{hint}; legal: {', '.join(_OPTIONS[loss])}"
        )
    logprobs = per_token("logprobs", logprobs)
    ref = per_token("ref_logprobs", ref_logprobs, logprobs).detach()
    cu_seqlens = check_cu_seqlens(cu_seqlens, logprobs)
    count = cu_seqlens.shape[0] - 1
    check_shape("desirable", desirable, (count,))
    check_same_device("desirable", desirable, "logprobs", logprobs)
    if desirable.dtype != torch.bool:
        raise TypeError(
            f"desirable must be bool, got {desirable.dtype} (labels of +1 and -1 would both count as True)"
        )
    if baseline is not None and loss not in ("kto", "bco"):
        raise ValueError(f"loss {loss!r} has no baseline")
    if state is not None and (loss != "bco" or not isinstance(state, BCODelta)):
        raise ValueError(f"state is a BCODelta for loss 'bco'; got {type(state).__name__} for loss {loss!r}")

    # Pair i: sequence i on one side, on the other an empty sequence behind the last.
    is_chosen = torch.ones_like(desirable) if loss == "dro" else desirable
    sides = torch.stack([is_chosen, ~is_chosen], -1)
    pairs = torch.where(sides, torch.arange(count, device=logprobs.device).unsqueeze(-1), count).int()
    tokens = PairTokens(
        logprobs, ref, None, torch.cat([cu_seqlens, cu_seqlens[-1:]]), pairs, row_mask(mask, logprobs)
    )
    if loss == "dro":
        sums = PairSumsFunction.apply(logprobs, None, tokens, UNPAIRED["kto"].params(), count)
        return _dro(sums, desirable, num_items, reduction, **options)

    if loss == "bco" and (baseline is None) == (state is None):
        raise ValueError("loss 'bco' needs either baseline= (delta) or state= (a BCODelta that keeps it)")
    if loss == "kto" and baseline is None:
        raise ValueError(
            "loss 'kto' needs baseline=, the z0 of mismatched pairs (fastalign.kto_baseline); "
            "'apo_zero_unpaired' has z0 = 0"
        )
    beta = options.get("beta", UNPAIRED[loss].beta)
    tensors = _weights(desirable, options, logprobs)
    if isinstance(beta, Tensor):
        preset, beta = UNPAIRED[loss], _constant("beta", beta, logprobs)
        tensors["beta"] = beta
    else:
        check_number("beta", beta, above=0.0)
        preset, _ = _with_beta(loss, {"beta": beta})
    if state is None:
        anchor = _constant("baseline", baseline, logprobs) * (beta if loss == "kto" else 1.0)
        tensors["gamma_ext"] = torch.where(desirable, anchor, -anchor)
        given = pair_tensors(preset, tensors, count, num_items, None, logprobs)
        value, table, sums = PreferenceFunction.apply(
            logprobs, None, tokens, given, preset.params(reduction), count
        )
    else:  # delta needs all sums before the first loss
        sums = PairSumsFunction.apply(logprobs, None, tokens, preset.params(), count)
        seen = sums.detach().sum(1, keepdim=True)
        anchor = state(None, PairValues(seen, seen[:, 0, SUM_LENGTH] > 0, beta))["anchor"]
        tensors["gamma_ext"] = torch.where(desirable, anchor, -anchor)
        given = pair_tensors(preset, tensors, count, num_items, None, logprobs)
        value, table = PreferenceFromSumsFunction.apply(sums, given, preset.params(reduction))
    # Of a pair's two rewards and sums the empty side's are 0.
    rewards, totals = (
        table[:, TAB_REWARD_CHOSEN] + table[:, TAB_REWARD_REJECTED],
        sums.detach()[:, :, SUM_POLICY].sum(-1),
    )
    return UnpairedOutput(value, rewards, totals, desirable, table[:, TAB_VALID] > 0, anchor)


@memo.by_options
def _with_beta(loss: str, options: dict[str, Any]) -> tuple[Preset, dict[str, Tensor]]:
    return UNPAIRED[loss].replace(**options), {}


def _weights(desirable: Tensor, options: dict[str, Any], like: Tensor) -> dict[str, Tensor]:
    """The weights of both classes, and those of single undesirable responses, as the pair kernel's omega;
    nothing where all are 1."""
    good, bad = (options.get(name, 1.0) for name in _WEIGHTS)
    for name, weight in zip(_WEIGHTS, (good, bad)):
        check_number(name, weight, low=0.0)
    single = options.get("omega")
    if "omega" in options:
        check_shape("omega", single, tuple(desirable.shape))
        check_same_device("omega", single, "logprobs", like)
    if good == 1.0 == bad and single is None:
        return {}
    bad_weights = like.new_full((), float(bad)) if single is None else bad * single.detach().to(like.dtype)
    return {"omega": torch.where(desirable, like.new_full((), float(good)), bad_weights)}


def _constant(name: str, value: Any, like: Tensor) -> Tensor:
    """A 0-dim constant of the loss; None: 0."""
    if isinstance(value, Tensor):
        return one_element(name, value, like)
    if value is not None:
        check_number(name, value)
    return torch.full((), float(value or 0.0), dtype=like.dtype, device=like.device)


def _dro(sums: Tensor, desirable: Tensor, num_items: Any, reduction: str, *, rewards: Tensor | None = None, values: Tensor | None = None,
         tau: float = 1.0, rescale: bool = True) -> UnpairedOutput:  # fmt: skip
    """A squared residual of three numbers per response: plain PyTorch over the sums, which carry the gradient
    to the tokens."""
    valid = sums.detach()[:, 0, SUM_LENGTH] > 0
    items = (
        valid.sum(dtype=sums.dtype).clamp(min=1.0)
        if num_items is None
        else global_count("num_items", num_items, sums)
    )
    check_number("tau", tau, above=0.0)
    if not isinstance(rescale, bool):
        raise TypeError(f"rescale must be True or False, got {rescale!r}")
    if rewards is None or values is None:
        raise ValueError("loss 'dro' needs rewards= and values=, tensors [S]")
    for name, t in (("rewards", rewards), ("values", values)):
        check_shape(name, t, tuple(valid.shape))
        check_same_device(name, t, "logprobs", sums)
    d = sums[:, 0, SUM_RATIO]
    if rescale:
        d = d.detach() + (d - d.detach()) / tau
    residual = torch.where(valid, rewards.detach().to(d.dtype) - values.to(d.dtype) - tau * d, 0.0)
    each = 0.5 * residual * residual
    value = each if reduction == "none" else each.sum() if reduction == "sum" else each.sum() / items
    detached = sums.detach()
    return UnpairedOutput(
        value,
        tau * detached[:, 0, SUM_RATIO],
        detached[:, 0, SUM_POLICY],
        desirable,
        valid,
        detached.new_zeros(()),
    )
