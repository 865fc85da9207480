"""What the policy kernel is told by number: a preset's numbers in order. The codes among them:
ops/columns.py. And what all kernels give where there are no tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PolicyParams(NamedTuple):
    """A preset and a call's layout as the kernels take them, in the order of FA_POLICY_SCALARS and
    FA_POLICY_SWITCHES of csrc/math/policy.h."""

    ratio_min: float  # of gmpo: bounds of the log-ratio
    ratio_max: float
    dual_clip: float  # inf: none
    tau_pos: float
    tau_neg: float
    k_pos: float
    lam_pos: float
    k_neg: float
    lam_neg: float
    kl_coef: float
    entropy_coef: float
    is_min: float
    is_max: float
    norm_length: float
    kl_clamp: float  # inf: none
    # switches
    surrogate: int
    ratio: int
    aggregation: int
    kl_kind: int
    kl_bias_correction: int
    is_mode: int
    advantages_per_sequence: int
    is_per_sequence: int


SCALAR_COUNT = PolicyParams._fields.index("surrogate")


def nothing(stats: Tensor) -> Tensor:
    """Statistics of no tokens: the number of items, first, is 1."""
    stats.zero_()[:1].fill_(1.0)
    return stats
