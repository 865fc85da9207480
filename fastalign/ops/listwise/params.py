"""What the list kernel is told by number: a preset\'s numbers in order. The codes among them:
ops/columns.py."""

from __future__ import annotations

from typing import NamedTuple


class ListParams(NamedTuple):
    """A preset as the kernels take it, in the order of FA_LIST_SCALARS and FA_LIST_SWITCHES of
    csrc/math/list.h."""

    length_norm: float
    beta: float
    target: float
    reward_temperature: float
    list_weight: float
    sft_weight: float
    sft_power: float
    # switches
    kind: int
    link: int
    pair_gain: int
    pair_mean: int
    sft_norm: int
    drop_nonfinite: int
    reduction: int


LIST_SCALAR_COUNT = ListParams._fields.index("kind")
