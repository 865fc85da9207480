"""What the policy and value losses return, and their metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.losses.policy import PolicyPreset
from fastalign.ops.columns import STATS, VALUE_STATS
from fastalign.runtime.frozen import copies_without_graph
from fastalign.runtime.metric import AnyMetric, ExplainedVariance, Metric, Total, Variance


def _variance(total: Tensor, m2: Tensor, count: Tensor, shift: float = 0.0) -> Variance:
    """From the sum of `count` numbers, from each of which `shift` was taken off, and their squared
    deviations."""
    return Variance(count, total / count.clamp(min=1.0) + shift, m2)


def _aggregated(total: Tensor, stats: dict[str, Tensor], aggregation: str) -> AnyMetric:
    """A loss's terms, added up: their mean over the tokens or sequences of this call, or the sum that the
    loss is."""
    if aggregation == "token_sum":
        return Total(total, stats["tokens"])
    return Metric(total, stats["tokens"] if aggregation == "token_mean" else stats["sequences"])


@copies_without_graph
class PolicyOutput(NamedTuple):
    """What `policy_loss` returns. loss: scalar, differentiable. stats: the sums behind metrics(), a detached
    tensor; preset: the loss as it was evaluated; given: which optional tensors came along."""

    loss: Tensor
    stats: Tensor
    preset: PolicyPreset
    given: frozenset[str]

    def metrics(self) -> dict[str, AnyMetric]:
        """Metrics on the loss's device, detached, over the scored tokens unless said otherwise
        (`fastalign.merge_metrics` merges those of
        several calls):

        loss/policy: the surrogate with its importance weights, aggregated as the loss is (over the tokens or
        sequences of this call), without KL and entropy. policy/approxkl: mean of lr^2 / 2.
        policy/clipfrac_low, _high: the lower and the upper bound hold; policy/clipfrac_lower: the dual clip
        holds; policy/clipfrac: any. Where a sequence has one ratio these are shares of the sequences, as in
        TRL. val/ratio: mean of rho (a sequence's ratio counts once per token); val/ratio_var: its variance.
        nonfinite_tokens: the number of tokens whose terms are not finite. With ref_logprobs policy/kl (the
        estimate kl_kind itself, without kl_clamp and bias correction), with entropy policy/entropy, with
        is_weight is_weight/mean (before truncation) and is_weight/clipped."""
        s = dict(zip(STATS, self.stats))
        tokens = s["tokens"]
        out = {"loss/policy": _aggregated(s["policy"], s, self.preset.aggregation)}
        clips = {"policy/clipfrac": s["clip_low"] + s["clip_high"] + s["clip_dual"], "policy/clipfrac_low": s["clip_low"],
                 "policy/clipfrac_high": s["clip_high"], "policy/clipfrac_lower": s["clip_dual"]}  # fmt: skip
        clippable = s["sequences"] if self.preset.clips_sequences else tokens
        out["policy/approxkl"] = Metric(s["approx_kl"], tokens)
        out |= {name: Metric(total, clippable) for name, total in clips.items()}
        named = {"val/ratio": s["ratio"] + tokens}
        if "ref_logprobs" in self.given:
            named["policy/kl"] = s["kl"]
        if "entropy" in self.given:
            named["policy/entropy"] = s["entropy"]
        if "is_weight" in self.given:
            named |= {"is_weight/mean": s["is_weight"], "is_weight/clipped": s["is_clipped"]}
        out |= {name: Metric(total, tokens) for name, total in named.items()}
        out["nonfinite_tokens"] = Total(s["nonfinite"], tokens)
        out["val/ratio_var"] = _variance(s["ratio"], s["ratio_m2"], tokens, shift=1.0)
        return out


@copies_without_graph
class ValueOutput(NamedTuple):
    """What `value_loss` returns. loss: scalar, differentiable. stats: the sums behind metrics() and
    explained_variance, detached."""

    loss: Tensor
    stats: Tensor
    aggregation: str

    @property
    def explained_variance(self) -> Tensor:
        """1 - Var(returns - values) / Var(returns) over the scored tokens of this call, 0-dim; NaN without
        variance in the returns. Variances are means of squared deviations from the mean, whatever the
        mean."""
        s = dict(zip(VALUE_STATS, self.stats))
        return 1.0 - s["error_m2"] / torch.where(s["returns_m2"] > 0, s["returns_m2"], torch.nan)

    def metrics(self) -> dict[str, AnyMetric]:
        """Metrics, detached, over the scored tokens (`fastalign.merge_metrics` merges those of several
        calls): loss/value (aggregated as the loss is), val/clipfrac, val/mean, val/error (mean of (v - R)^2),
        val/error_var and returns/var (variances), returns/mean, val/explained_variance (1 - val/error_var /
        returns/var), nonfinite_tokens (their number)."""
        s = dict(zip(VALUE_STATS, self.stats))
        tokens = s["tokens"]
        errors, returns = (_variance(s[name], s[f"{name}_m2"], tokens) for name in ("error", "returns"))
        return {
            "loss/value": _aggregated(s["loss"], s, self.aggregation),
            "val/clipfrac": Metric(s["clipped"], tokens),
            "val/mean": Metric(s["value"], tokens),
            "val/error": Metric(s["error_sq"], tokens),
            "val/error_var": errors,
            "returns/mean": Metric(s["returns"], tokens),
            "returns/var": returns,
            "val/explained_variance": ExplainedVariance.of(returns, errors),
            "nonfinite_tokens": Total(s["nonfinite"], tokens),
        }
