"""What a preference loss returns, and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.losses.pair import Preset
from fastalign.ops.columns import (
    ALPHA,
    CHOSEN,
    REJECTED,
    SUM_KL,
    SUM_LENGTH,
    SUM_POLICY,
    SUM_RATIO,
    SUM_SFT,
    SUM_SFT_LENGTH,
    TAB_REWARD_CHOSEN,
    TAB_REWARD_REJECTED,
    TAB_VALID,
)
from fastalign.ops.preference.reference import transform
from fastalign.runtime.frozen import copies_without_graph
from fastalign.runtime.metric import AnyMetric, Metric, Total


@copies_without_graph
class PreferenceOutput(NamedTuple):
    """What a preference loss returns. `loss` is differentiable: a scalar, or [P] with reduction="none".
    Everything else is detached, and read from the kernel's own `table` and `sums` only when asked for."""

    loss: Tensor
    preset: Preset
    table: Tensor
    sums: Tensor
    has_sft: bool
    parts: tuple[Preset, ...] = ()  # of a mixture: its losses
    target: Tensor | None = None  # of ipo, where it was given as a tensor

    @property
    def chosen_rewards(self) -> Tensor:
        """[P]: beta * a, with the method's own aggregation (token means where the method averages)."""
        return self.table[:, TAB_REWARD_CHOSEN]

    @property
    def rejected_rewards(self) -> Tensor:
        """[P], as `chosen_rewards`."""
        return self.table[:, TAB_REWARD_REJECTED]

    @property
    def margins(self) -> Tensor:
        """[P]: chosen_rewards - rejected_rewards."""
        return self.table[:, TAB_REWARD_CHOSEN] - self.table[:, TAB_REWARD_REJECTED]

    @property
    def chosen_logprobs(self) -> Tensor:
        """[P]: sums of the policy's log-probs over the scored tokens, each times its weight where tokens have
        weights (`weights`, ld_alpha); means for the reference-free methods that average, as TRL logs them."""
        return self._logprobs(CHOSEN)

    @property
    def rejected_logprobs(self) -> Tensor:
        """[P], as `chosen_logprobs`."""
        return self._logprobs(REJECTED)

    @property
    def valid(self) -> Tensor:
        """[P] bool: which pairs counted."""
        return self.table[:, TAB_VALID] > 0

    def _logprobs(self, side: int) -> Tensor:
        total = self.sums[:, side, SUM_POLICY]
        if self.preset.reference or not self.preset.length_norm:
            return total
        return total / self.sums[:, side, SUM_LENGTH].clamp(min=1.0) ** self.preset.length_norm

    def _peer_rewards(self) -> tuple[Sequence[Tensor], bool] | None:
        """(chosen and rejected [P], whether they differ from `chosen_rewards` and `rejected_rewards`): the
        rewards that TRL logs for this loss.

        With a reference beta times the sum of log-ratios, also where the loss averages them (ipo: tau times
        it); of a mixture those of its first loss that compares responses; without a reference beta times the
        log-probs as averaged, transformed (alphapo), times tau (ipo without a reference) or times pair_weight
        (orpo). None for SFT alone: TRL's need a reference, which the loss does not have."""
        p = next((p for p in self.parts or (self.preset,) if p.compares), None)
        if p is None:
            return None
        rewards, differ = [self.chosen_rewards, self.rejected_rewards], p is not self.preset
        lengths = [
            self.sums[:, side, SUM_LENGTH].clamp(min=1.0) ** p.length_norm for side in (CHOSEN, REJECTED)
        ]
        if differ:  # led by SFT
            column = SUM_RATIO if p.reference else SUM_POLICY
            rewards = [p.beta * self.sums[:, side, column] / lengths[side] for side in (CHOSEN, REJECTED)]
        if p.reference and p.length_norm:
            rewards, differ = [r * n for r, n in zip(rewards, lengths)], True
        if p.transform == "alpha" and not p.reference:
            means = [self.sums[:, side, SUM_POLICY] / lengths[side] for side in (CHOSEN, REJECTED)]
            shapes = [transform(ALPHA, a, p.transform_alpha)[0] / a for a in means]
            rewards, differ = (
                [torch.where(a == 0, r, r * shape) for r, a, shape in zip(rewards, means, shapes)],
                True,
            )
        if p.link == "squared" and p.length_norm == 1.0 and p.beta == 1.0:  # TRL's beta of ipo is tau
            tau = 1.0 / (2.0 * (p.target if self.target is None else self.target.to(rewards[0].dtype)))
            rewards, differ = [tau * r for r in rewards], True
        if p.peer_factor != 1.0:
            rewards, differ = [p.peer_factor * r for r in rewards], True
        return rewards, differ

    def metrics(self) -> dict[str, AnyMetric]:
        """TRL's keys -> Metric (sum, count) over the valid pairs: rewards/chosen, rewards/rejected,
        rewards/margins, rewards/accuracies (chosen > rejected, strictly) of the rewards that TRL logs (beta
        times the sum of log-ratios where there is a reference; none for SFT alone); where the loss compares
        other numbers, `chosen_rewards` and `rejected_rewards`, the same four of these as loss_rewards/...;
        logps/chosen, logps/rejected; nll_loss (per token) with an SFT term, seqkl/chosen and seqkl/rejected
        with sequence KLs; n_empty and nonfinite_pairs, a Total each: the number of pairs with an empty side,
        and of those with a non-finite margin."""
        valid, zero = self.valid, torch.zeros_like(self.margins)
        count = valid.sum(dtype=self.margins.dtype)

        def over_pairs(x: Tensor) -> Metric:
            return Metric(torch.where(valid, x, zero).sum(), count)

        out: dict[str, AnyMetric] = {}
        rewards, differ = self._peer_rewards() or (None, False)
        own = (self.chosen_rewards, self.rejected_rewards) if differ and self.preset.compares else None
        for name, sides in (("rewards", rewards), ("loss_rewards", own)):
            if sides is not None:
                chosen, rejected = sides
                out |= {
                    f"{name}/chosen": over_pairs(chosen),
                    f"{name}/rejected": over_pairs(rejected),
                    f"{name}/margins": over_pairs(chosen - rejected),
                    f"{name}/accuracies": over_pairs((chosen > rejected).to(zero.dtype)),
                }
        out |= {
            "logps/chosen": over_pairs(self.chosen_logprobs),
            "logps/rejected": over_pairs(self.rejected_logprobs),
        }
        if self.has_sft:
            out["nll_loss"] = Metric(
                torch.where(valid, -self.sums[:, CHOSEN, SUM_SFT], zero).sum(),
                torch.where(valid, self.sums[:, CHOSEN, SUM_SFT_LENGTH], zero).sum(),
            )
        if self.preset.needs_kl:
            out["seqkl/chosen"] = over_pairs(self.sums[:, CHOSEN, SUM_KL])
            out["seqkl/rejected"] = over_pairs(self.sums[:, REJECTED, SUM_KL])
        pairs = torch.ones_like(self.margins).sum()
        out["n_empty"] = Total((self.sums[:, :, SUM_LENGTH] == 0).any(-1).sum(dtype=zero.dtype), pairs)
        out["nonfinite_pairs"] = Total((~torch.isfinite(self.margins)).sum(dtype=zero.dtype), pairs)
        return out
