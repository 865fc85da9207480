"""What happens between a pair's sums and its row of the table: mixtures of losses, rules that look at the
whole batch, sorted order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.losses.options import resolve
from fastalign.losses.pair import Preset
from fastalign.ops.columns import (
    CHOSEN,
    REJECTED,
    REWARDS,
    SUM_LENGTH,
    SUM_POLICY,
    SUM_RATIO,
    SUM_SFT,
    SUM_SFT_LENGTH,
    TAB_VALID,
)
from fastalign.ops.preference.params import PairParams
from fastalign.preference.rules import BatchRule, PairValues
from fastalign.runtime.checks import check_number

Components = list[tuple[Preset, float]]


def components(loss: Any, options: Mapping[str, Any]) -> tuple[Components, dict[str, Tensor]]:
    """(loss, options) as [(preset, weight)] and the options that are tensors."""
    if isinstance(loss, (str, Preset)):
        preset, tensors = resolve(loss, options)
        return [(preset, 1.0)], tensors
    if (
        not isinstance(loss, Sequence)
        or not loss
        or any(not isinstance(c, Sequence) or len(c) != 2 for c in loss)
    ):
        raise TypeError(f"loss must be a name, a Preset, or a list of (name or Preset, weight), got {loss!r}")
    if options:
        raise ValueError(
            f"a mixture takes no options (got {', '.join(options)}): put them into its Presets, "
            "losses.get(name).replace(...)"
        )
    for _, weight in loss:
        check_number("the weight of a mixture's loss", weight)
    return [(resolve(part, {})[0], float(weight)) for part, weight in loss], {}


def is_plain(parts: Components, state: Any) -> bool:
    """Whether the fused kernel serves the call: one loss, nothing between sums and table."""
    return (
        len(parts) == 1
        and parts[0][1] == 1.0
        and parts[0][0].order is None
        and parts[0][0].rule is None
        and state is None
    )


def shared_params(presets: list[Preset]) -> PairParams:
    """Parameters of the one pass of sums that all presets use."""
    first = presets[0]
    for name in ("ld_alpha", "token_clamp", "sft_include_prompt"):
        if any(getattr(p, name) != getattr(first, name) for p in presets):
            raise ValueError(
                f"the losses of a mixture share one pass over the tokens and must agree in {name}"
            )
    reference = any(p.needs_reference for p in presets)
    uses_policy_sums = any(p.order is not None or (reference and not p.reference) for p in presets)
    if first.token_clamp is not None and uses_policy_sums:
        raise ValueError(
            "token_clamp cannot be combined with sorted order, nor with losses that do and losses that do not "
            "use the reference"
        )
    return first.params()._replace(
        reference=float(reference), sft_weight=float(any(p.sft_weight for p in presets))
    )


def rules_of(parts: Components, state: Any) -> dict[str | None, BatchRule]:
    """The rule object for every preset that needs one; a missing, foreign or superfluous one raises."""
    given = [] if state is None else list(state) if isinstance(state, (list, tuple)) else [state]
    wrong = [type(s).__name__ for s in given if not isinstance(s, BatchRule)]
    if wrong:
        raise TypeError(
            "state must be a rule object (BetaDPO, AlphaDPO, BCODelta) or a list of them, got "
            f"{', '.join(wrong)}"
        )
    rules = {s.rule: s for s in given}
    needed = {p.rule: p.name for p, _ in parts if p.rule is not None}
    for rule, name in needed.items():
        if rule not in rules:
            raise ValueError(
                f"loss {name!r} needs state=, the rule object that remembers between calls (rule {rule!r} of "
                "fastalign.preference.rules)"
            )
    unused = [type(s).__name__ for s in given if s.rule not in needed]
    if unused:
        raise ValueError(f"state holds {', '.join(unused)}, which no loss of this call uses")
    return rules


def prepare(
    preset: Preset, sums: Tensor, tensors: dict[str, Tensor], rule: BatchRule | None, with_reference: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums as this preset's table needs them, and its tensors per pair, the rule's included."""
    tensors = dict(tensors)
    valid = is_valid(sums, tensors)
    if preset.order is not None:
        own = [name for name, t in tensors.items() if name != "valid" and t.numel() > 1]
        if own:
            raise ValueError(
                f"loss {preset.name!r} compares ranks, not pairs, and takes no value per pair: {own[0]} must "
                "be a single number"
            )
    if rule is not None:
        beta = tensors["beta"].detach() if "beta" in tensors else preset.beta
        for name, value in rule(preset, PairValues(sums, valid, beta)).items():
            if name == "gamma_ext" and name in tensors:
                value = value + tensors[name].detach()
            elif name in tensors and name not in ("valid", "beta"):
                raise ValueError(
                    f"{name} comes from the rule of loss {preset.name!r} and cannot be given as well"
                )
            tensors[name] = value
    if with_reference and not preset.reference:
        policy = sums[:, :, SUM_POLICY : SUM_POLICY + 1]
        sums = torch.cat([policy, policy, sums[:, :, SUM_LENGTH:]], -1)
    if preset.order is not None:
        sums = _sorted(sums, preset.order, valid)
        tensors.pop("valid", None)
    return sums, tensors


def is_valid(sums: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """[P]: the pairs that have tokens and are not excluded by the caller."""
    valid = (sums.detach()[:, :, SUM_LENGTH] > 0).any(-1)
    return valid & tensors["valid"].to(torch.bool) if "valid" in tensors else valid


def _sorted(sums: Tensor, order: str, valid: Tensor) -> Tensor:
    """AOT: row i compares the i-th smallest values across the valid pairs; the gradient goes back through the
    permutation. Stable."""
    policy, ratio = sums[:, :, SUM_POLICY], sums[:, :, SUM_RATIO]
    if order == "paired":
        reference = (policy - ratio).detach()
        left, right = policy[:, CHOSEN] - policy[:, REJECTED], reference[:, CHOSEN] - reference[:, REJECTED]
    else:
        left, right = ratio[:, CHOSEN], ratio[:, REJECTED]
    sides = []
    count = valid.sum()
    for side, values in ((CHOSEN, left), (REJECTED, right)):
        permutation = (
            values.detach().sort(stable=True).indices
        )  # by value (NaN last), then the valid ones first
        permutation = permutation[(~valid)[permutation].sort(stable=True).indices]
        row = sums[permutation, side]
        filled = (torch.arange(len(values), device=sums.device) < count).to(sums.dtype)
        zero = torch.zeros_like(filled)
        # A length of 1 or 0 says whether the row is valid; the log-ratio column holds the sorted value; the
        # SFT columns stay the pair's own.
        sorted_values = torch.where(filled > 0, values[permutation], zero)
        sides.append(
            torch.stack(
                [row[:, SUM_POLICY], sorted_values, filled, zero, row[:, SUM_SFT], row[:, SUM_SFT_LENGTH]], -1
            )
        )
    return torch.stack(sides, 1)


def own_rewards(preset: Preset, table: Tensor, sums: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The table with rewards that belong to the pairs: of a sorted one they belong to ranks."""
    if preset.order is None:
        return table
    beta = tensors["beta"].detach().reshape(-1, 1) if "beta" in tensors else preset.beta
    table = table.detach().clone()
    table[:, REWARDS] = beta * sums.detach()[:, :, SUM_RATIO]
    table[:, TAB_VALID] = is_valid(sums, tensors).to(table.dtype)
    return table
