"""The definition of generalised advantage estimation in plain PyTorch: the loop over time steps, all
sequences at once."""

from __future__ import annotations

import torch


def gae_fwd(a):
    gamma = a.gamma if a.gamma_tensor is None else a.gamma_tensor
    lam = a.lam if a.lam_tensor is None else a.lam_tensor
    advantages, returns = torch.zeros_like(a.rewards), torch.zeros_like(a.rewards)
    begin, end = (
        bound.long().clamp(0, a.rewards.shape[0]) for bound in (a.cu_seqlens[:-1], a.cu_seqlens[1:])
    )
    next_value = torch.zeros_like(end, dtype=a.rewards.dtype) if a.bootstrap is None else a.bootstrap
    next_advantage = torch.zeros_like(next_value)
    for step in range(int((end - begin).max()) if end.numel() else 0):
        t = end - 1 - step
        inside = t >= begin
        t = torch.where(inside, t, 0)
        scored = inside if a.mask is None else inside & a.mask[t]
        # Unscored tokens are skipped, not counted as steps: the state passes them unchanged.
        delta = a.rewards[t] + gamma * next_value - a.values[t]
        next_advantage = torch.where(scored, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(scored, a.values[t], next_value)
        here = t[scored]
        advantages[here] = next_advantage[scored]
        returns[here] = (next_advantage + next_value)[scored]
    nothing = advantages - advantages  # NaN where something is not finite, at this token or after it
    advantages, returns = advantages + nothing, returns + nothing
    return advantages, returns, moments(advantages, a.mask)


def moments(x, mask):
    """[3]: count, mean and sum of (x - mean)^2 over the scored entries, in fp64 and rounded once."""
    wide = x.double()
    scored = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = scored.sum(dtype=torch.float64)
    mean = torch.where(scored, wide, 0.0).sum() / count.clamp(min=1.0)
    m2 = torch.where(scored, (wide - mean) ** 2, 0.0).sum()
    return torch.stack([count, mean, m2]).to(x.dtype)
