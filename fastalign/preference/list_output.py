"""What a listwise loss returns, and its metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.losses.list import ListPreset
from fastalign.ops.columns import (
    LIST_BEST,
    LIST_CORRECT,
    LIST_MARGIN,
    LIST_NLL,
    LIST_PAIRS,
    LIST_TERM,
    LIST_TOP,
    LIST_VALID,
    LIST_WORST,
    SUM_LENGTH,
    SUM_POLICY,
)
from fastalign.runtime.frozen import copies_without_graph
from fastalign.runtime.metric import AnyMetric, Metric, Total


@copies_without_graph
class ListwiseOutput(NamedTuple):
    """What a listwise loss returns. `loss` is differentiable: a scalar, or [L] with reduction="none".
    Everything else is detached, and read from the kernel's own `table` and `sums` only when asked for."""

    loss: Tensor
    rewards: (
        Tensor  # [S]: beta * a, with the method's own aggregation (token means where the method averages)
    )
    preset: ListPreset
    list_offsets: Tensor
    table: Tensor
    sums: Tensor

    @property
    def logprobs(self) -> Tensor:
        """[S]: sums of the policy's log-probs over the scored tokens (means for the reference-free methods
        that average)."""
        total = self.sums[:, SUM_POLICY]
        if self.preset.reference or not self.preset.length_norm:
            return total
        return total / self.sums[:, SUM_LENGTH].clamp(min=1.0) ** self.preset.length_norm

    @property
    def valid(self) -> Tensor:
        """[L] bool: which lists counted."""
        return self.table[:, LIST_VALID] > 0

    @property
    def best(self) -> Tensor:
        """[L]: sequence number of the highest score, the first of several. Of a list of none: any number."""
        return self._sequence(LIST_BEST)

    @property
    def worst(self) -> Tensor:
        """[L]: sequence number of the lowest score, the last of several."""
        return self._sequence(LIST_WORST)

    def _sequence(self, column: int) -> Tensor:
        number = self.list_offsets[:-1].long() + self.table[:, column].nan_to_num().long()
        return number.clamp(0, max(self.rewards.shape[0] - 1, 0))

    def metrics(self) -> dict[str, AnyMetric]:
        """TRL's keys -> Metric (sum, count). For lists of two they are the metrics of the pair.

        Over the pairs of every valid list whose scores differ, the higher first: rewards/margins,
        rewards/accuracies (the reward is higher too, strictly). Over the valid lists: rewards/chosen and
        rewards/rejected, logps/chosen and logps/rejected, of the responses with the highest and the lowest
        score; rewards/top1_accuracies, over the lists with such a pair: the best response has a higher reward
        than every response of a lower score; nll_loss (per token) with an SFT term. n_empty: the number of
        responses without a token; nonfinite_lists: of lists whose values are not finite (a Total each)."""
        valid, zero = self.valid, torch.zeros_like(self.table[:, LIST_TERM])
        count, pairs = valid.sum(dtype=zero.dtype), self.table[:, LIST_PAIRS]

        def over_lists(x: Tensor, n: Tensor = count) -> Metric:
            return Metric(torch.where(valid, x, zero).sum(), n)

        def of(values: Tensor, sequence: Tensor) -> Tensor:
            return values[sequence] if values.numel() else zero

        best, worst, logprobs = self.best, self.worst, self.logprobs
        all_pairs, contrasted = over_lists(pairs).sum, (valid & (pairs > 0)).sum(dtype=zero.dtype)
        out = {
            "rewards/chosen": over_lists(of(self.rewards, best)),
            "rewards/rejected": over_lists(of(self.rewards, worst)),
            "rewards/margins": over_lists(self.table[:, LIST_MARGIN], all_pairs),
            "rewards/accuracies": over_lists(self.table[:, LIST_CORRECT], all_pairs),
            "rewards/top1_accuracies": over_lists(self.table[:, LIST_TOP], contrasted),
            "logps/chosen": over_lists(of(logprobs, best)),
            "logps/rejected": over_lists(of(logprobs, worst)),
        }
        if self.preset.sft_weight:
            out["nll_loss"] = over_lists(
                of(-self.sums[:, SUM_POLICY], best), over_lists(of(self.sums[:, SUM_LENGTH], best)).sum
            )
        lists = torch.ones_like(zero).sum()
        out["n_empty"] = Total((self.sums[:, SUM_LENGTH] == 0).sum(dtype=zero.dtype), lists)
        out["nonfinite_lists"] = Total(
            (~torch.isfinite(self.table[:, LIST_TERM] + self.table[:, LIST_NLL])).sum(dtype=zero.dtype), lists
        )
        return out
