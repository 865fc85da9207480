"""Generalised advantage estimation over packed sequences: advantages, returns and the moments that whitening needs, in one launch."""

from __future__ import annotations

import torch

from fastalign.runtime.checks import (
    check_cu_seqlens_values,
    check_number,
)
from fastalign.runtime.dispatch import Op, scalar_dtypes, standard_kernels


def _check_values(rewards, values, cu_seqlens, mask, bootstrap, gamma_tensor, lam_tensor, gamma, lam):
    check_cu_seqlens_values(cu_seqlens, rewards.numel())
    for name, tensor in (("gamma", gamma_tensor), ("lam", lam_tensor)):
        if tensor is not None:
            check_number(name, float(tensor), low=0.0, high=1.0)


gae_fwd = Op(
    "gae_fwd",
    "(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, Tensor? bootstrap, Tensor? gamma_tensor, Tensor? lam_tensor, float gamma,"
    " float lam) -> (Tensor, Tensor, Tensor)",
    lambda rewards, *rest: (torch.empty_like(rewards), torch.empty_like(rewards), rewards.new_empty(3)),
    standard_kernels("gae", "gae_fwd"), scalar_dtypes(),
    "rewards[T] values[T] cu_seqlens[S+1]:int32 mask[T]:bool bootstrap[S] gamma_tensor[] lam_tensor[]", check=_check_values,
)  # fmt: skip
# Results: advantages [T], returns [T], moments [3] (count, mean, m2). A tensor for gamma or lam stands in place of the number.
