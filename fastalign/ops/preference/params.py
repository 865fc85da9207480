"""What the pair kernel is told by number: a preset\'s numbers in order. The codes among them:
ops/columns.py."""

from __future__ import annotations

from typing import NamedTuple


class PairParams(NamedTuple):
    """A preset as the kernels take it, in the order of FA_PAIR_SCALARS and FA_PAIR_SWITCHES of
    csrc/math/pair.h. NaN: same as beta."""

    reference: float
    length_norm: float
    ld_alpha: float
    token_clamp_low: float
    token_clamp_high: float
    transform_alpha: float
    beta: float
    beta_rejected: float
    gamma: float
    gamma_beta_ratio: float
    len_coef: float
    pos_penalty: float
    kl_chosen: float
    kl_rejected: float
    target: float
    tau: float
    label_smoothing: float
    pair_weight: float
    point_beta: float
    point_beta_power: float
    point_target: float
    anchor: float
    chosen_pos: float
    chosen_neg: float
    rejected_pos: float
    rejected_neg: float
    sft_weight: float
    # switches
    transform: int
    link: int
    labels: int
    label_entropy: int
    detach_kl_chosen: int
    point_link: int
    point_soft_target: int
    sft_norm: int
    sft_include_prompt: int
    drop_nonfinite: int
    reduction: int


SCALAR_COUNT = PairParams._fields.index("transform")
