"""What a preference loss returns, and its metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.preset import Preset


class Metric(NamedTuple):
    """A mean as its (sum, count), both 0-dim tensors on the loss's device: add them over micro-batches and ranks, divide at the end."""

    sum: Tensor
    count: Tensor

    def __float__(self) -> float:
        count = float(self.count)
        return float(self.sum) / count if count else float("nan")


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. `loss` is differentiable; everything else is detached, [P] per pair.

    loss: scalar, or [P] with reduction="none". chosen_rewards, rejected_rewards: beta * a, with the method's own aggregation (token means where
    the method averages). margins: their difference. chosen_logprobs, rejected_logprobs: sums of the policy's log-probs over the scored tokens
    (means for the reference-free methods that average, as TRL logs them). valid: bool, which pairs counted."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    valid: Tensor
    preset: Preset
    table: Tensor
    sums: Tensor
    has_sft: bool

    def metrics(self) -> dict[str, Metric]:
        """TRL's keys -> Metric (sum, count) over the valid pairs: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies
        (chosen > rejected, strictly), logps/chosen, logps/rejected; nll_loss (per token) with an SFT term, seqkl/chosen and seqkl/rejected with
        sequence KLs; n_empty (pairs with an empty side), nonfinite_pairs."""
        valid, zero = self.valid, torch.zeros_like(self.margins)
        count = valid.sum(dtype=self.margins.dtype)

        def over_pairs(x: Tensor) -> Metric:
            return Metric(torch.where(valid, x, zero).sum(), count)

        out = {
            "rewards/chosen": over_pairs(self.chosen_rewards),
            "rewards/rejected": over_pairs(self.rejected_rewards),
            "rewards/margins": over_pairs(self.margins),
            "rewards/accuracies": over_pairs((self.chosen_rewards > self.rejected_rewards).to(zero.dtype)),
            "logps/chosen": over_pairs(self.chosen_logprobs),
            "logps/rejected": over_pairs(self.rejected_logprobs),
        }
        if self.has_sft:
            out["nll_loss"] = Metric(
                torch.where(valid, -self.sums[:, 0, 4], zero).sum(), torch.where(valid, self.sums[:, 0, 5], zero).sum()
            )
        if self.preset.needs_kl:
            out["seqkl/chosen"], out["seqkl/rejected"] = over_pairs(self.sums[:, 0, 3]), over_pairs(self.sums[:, 1, 3])
        pairs = torch.ones_like(self.margins).sum()
        out["n_empty"] = Metric((self.sums[:, :, 2] == 0).any(-1).sum(dtype=zero.dtype), pairs)
        out["nonfinite_pairs"] = Metric((~torch.isfinite(self.margins)).sum(dtype=zero.dtype), pairs)
        return out


def make_output(value: Tensor, table: Tensor, sums: Tensor, preset: Preset) -> PreferenceOutput:
    chosen, rejected = sums[:, 0, 0], sums[:, 1, 0]
    if not preset.reference and preset.length_norm:
        lengths = sums[:, :, 2].clamp(min=1.0) ** preset.length_norm
        chosen, rejected = chosen / lengths[:, 0], rejected / lengths[:, 1]
    rewards = table[:, 5], table[:, 6]
    return PreferenceOutput(
        value, *rewards, rewards[0] - rewards[1], chosen, rejected, table[:, 8] > 0, preset, table, sums, preset.sft_weight != 0
    )
