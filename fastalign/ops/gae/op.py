"""Generalised advantage estimation over packed sequences: advantages, returns and the moments that whitening
needs, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastalign.ops.columns import MOMENT_WIDTH
from fastalign.runtime.arguments import In, Maybe
from fastalign.runtime.checks import check_cu_seqlens_values, check_number
from fastalign.runtime.op import SCALAR_DTYPES, Op


class GaeFwd(NamedTuple):
    """A tensor for gamma or lam stands in place of the number."""

    rewards: In("T")
    values: In("T")
    cu_seqlens: In("S+1", "int32")
    mask: Maybe("T", "bool")
    bootstrap: Maybe("S")
    gamma_tensor: Maybe("")
    lam_tensor: Maybe("")
    gamma: float
    lam: float


def _check_values(a: GaeFwd) -> None:
    check_cu_seqlens_values(a.cu_seqlens, a.rewards.numel())
    for name, tensor in (("gamma", a.gamma_tensor), ("lam", a.lam_tensor)):
        if tensor is not None:
            check_number(name, float(tensor), low=0.0, high=1.0)


gae_fwd = Op(
    "gae_fwd",
    GaeFwd,
    "(Tensor, Tensor, Tensor)",
    lambda a: (torch.empty_like(a.rewards), torch.empty_like(a.rewards), a.rewards.new_empty(MOMENT_WIDTH)),
    "gae",
    SCALAR_DTYPES,
    check=_check_values,
    public=("gae",),
)
# Results: advantages [T], returns [T], moments [3] (count, mean, m2).
