"""What a preference loss returns, and its metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.metric import Metric
from fastalign.preset import Preset


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. `loss` is differentiable: a scalar, or [P] with reduction="none". Everything else is detached, and read
    from the kernel's own `table` and `sums` only when asked for."""

    loss: Tensor
    preset: Preset
    table: Tensor
    sums: Tensor
    has_sft: bool

    @property
    def chosen_rewards(self) -> Tensor:
        """[P]: beta * a, with the method's own aggregation (token means where the method averages)."""
        return self.table[:, 5]

    @property
    def rejected_rewards(self) -> Tensor:
        """[P], as `chosen_rewards`."""
        return self.table[:, 6]

    @property
    def margins(self) -> Tensor:
        """[P]: chosen_rewards - rejected_rewards."""
        return self.table[:, 5] - self.table[:, 6]

    @property
    def chosen_logprobs(self) -> Tensor:
        """[P]: sums of the policy's log-probs over the scored tokens, each times its weight where tokens have weights (`weights`, ld_alpha); means
        for the reference-free methods that average, as TRL logs them."""
        return self._logprobs(0)

    @property
    def rejected_logprobs(self) -> Tensor:
        """[P], as `chosen_logprobs`."""
        return self._logprobs(1)

    @property
    def valid(self) -> Tensor:
        """[P] bool: which pairs counted."""
        return self.table[:, 8] > 0

    def _logprobs(self, side: int) -> Tensor:
        total = self.sums[:, side, 0]
        if self.preset.reference or not self.preset.length_norm:
            return total
        return total / self.sums[:, side, 2].clamp(min=1.0) ** self.preset.length_norm

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
