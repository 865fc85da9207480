"""What the policy and value losses return, and their metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.metric import Metric
from fastalign.ops.policy.reference import STATS, VALUE_STATS
from fastalign.policy_losses import PolicyPreset


def _variance(total: Tensor, squares: Tensor, count: Tensor) -> Metric:
    """Sum of squared deviations from this call's mean, and the number of terms."""
    return Metric((squares - total * total / count.clamp(min=1.0)).clamp(min=0.0), count)


def _items(stats: dict[str, Tensor], aggregation: str) -> Tensor:
    """How many tokens or sequences of this call the mean is over."""
    if aggregation == "token_sum":
        return torch.ones_like(stats["tokens"])
    return stats["tokens"] if aggregation == "token_mean" else stats["sequences"]


class PolicyOutput(NamedTuple):
    """What `policy_loss` returns. loss: scalar, differentiable. stats: the sums behind metrics(), a detached tensor; preset: the loss as it was
    evaluated; given: which optional tensors came along."""

    loss: Tensor
    stats: Tensor
    preset: PolicyPreset
    given: frozenset[str]

    def metrics(self) -> dict[str, Metric]:
        """Metric (sum, count) on the loss's device, detached, over the scored tokens unless said otherwise:

        loss/policy: the surrogate with its importance weights, aggregated as the loss is (count: tokens or sequences of this call), without KL
        and entropy. policy/approxkl: mean of lr^2 / 2. policy/clipfrac_low, _high: the lower and the upper bound hold; policy/clipfrac_lower: the
        dual clip holds; policy/clipfrac: any. val/ratio: mean of rho (a sequence's ratio counts once per token); val/ratio_var: its variance
        within the call. nonfinite_tokens. With ref_logprobs policy/kl (kl_kind), with entropy policy/entropy, with is_weight is_weight/mean
        (before truncation) and is_weight/clipped."""
        s = dict(zip(STATS, self.stats))
        tokens = s["tokens"]
        out = {"loss/policy": Metric(s["policy"], _items(s, self.preset.aggregation))}
        clipped = s["clip_low"] + s["clip_high"] + s["clip_dual"]
        named = {"policy/approxkl": s["approx_kl"], "policy/clipfrac": clipped, "policy/clipfrac_low": s["clip_low"],
                 "policy/clipfrac_high": s["clip_high"], "policy/clipfrac_lower": s["clip_dual"], "val/ratio": s["ratio"] + tokens}  # fmt: skip
        if "ref_logprobs" in self.given:
            named["policy/kl"] = s["kl"]
        if "entropy" in self.given:
            named["policy/entropy"] = s["entropy"]
        if "is_weight" in self.given:
            named |= {"is_weight/mean": s["is_weight"], "is_weight/clipped": s["is_clipped"]}
        named["nonfinite_tokens"] = s["nonfinite"]
        out |= {name: Metric(total, tokens) for name, total in named.items()}
        out["val/ratio_var"] = _variance(s["ratio"], s["ratio_sq"], tokens)
        return out


class ValueOutput(NamedTuple):
    """What `value_loss` returns. loss: scalar, differentiable. stats: the sums behind metrics() and explained_variance, detached."""

    loss: Tensor
    stats: Tensor
    aggregation: str

    @property
    def explained_variance(self) -> Tensor:
        """1 - Var(returns - values) / Var(returns) over the scored tokens of this call, 0-dim; NaN without variance in the returns. Variances are
        differences of fp32 sums of squares: about 1e-7 (mean / standard deviation)^2 of them is rounding, all of it from a ratio of 3000 on."""
        s = dict(zip(VALUE_STATS, self.stats))
        spread = _variance(s["returns"], s["returns_sq"], s["tokens"]).sum
        return 1.0 - _variance(s["error"], s["error_sq"], s["tokens"]).sum / torch.where(spread > 0, spread, torch.nan)

    def metrics(self) -> dict[str, Metric]:
        """Metric (sum, count), detached: loss/value (aggregated as the loss is), val/clipfrac, val/mean, val/error (mean of (v - R)^2),
        val/error_var, returns/mean, returns/var, nonfinite_tokens. 1 - val/error_var / returns/var is the explained variance."""
        s = dict(zip(VALUE_STATS, self.stats))
        tokens = s["tokens"]
        return {
            "loss/value": Metric(s["loss"], _items(s, self.aggregation)),
            "val/clipfrac": Metric(s["clipped"], tokens),
            "val/mean": Metric(s["value"], tokens),
            "val/error": Metric(s["error_sq"], tokens),
            "val/error_var": _variance(s["error"], s["error_sq"], tokens),
            "returns/mean": Metric(s["returns"], tokens),
            "returns/var": _variance(s["returns"], s["returns_sq"], tokens),
            "nonfinite_tokens": Metric(s["nonfinite"], tokens),
        }
