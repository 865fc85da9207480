"""The definition of the KL estimators in plain PyTorch; the twin of `kl_estimate` in csrc/math/scalar.h."""

from __future__ import annotations

import torch

from fastalign.ops.columns import ABS, K1, K2


def kl_estimate_fwd(a):
    value, slope = value_and_slope(a.logprobs, a.ref_logprobs, a.kind)
    return value, slope if a.with_slope else slope.new_empty(0)


def value_and_slope(logprobs, ref_logprobs, kind):
    d = torch.where(logprobs == ref_logprobs, torch.zeros_like(logprobs), logprobs - ref_logprobs)
    if kind == K1:
        return d, torch.ones_like(d)
    if kind == K2:
        return d * d / 2, d
    if kind == ABS:
        return d.abs(), torch.where(torch.isnan(d), d, d.sign())
    small = d.abs() < 0.05
    x = torch.clamp(-d, max=20.0)
    series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720)))))
    return torch.where(small, series, torch.expm1(x) - x), -torch.expm1(x)
