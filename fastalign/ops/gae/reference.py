"""The definition of generalised advantage estimation in plain PyTorch: the loop over time steps, all sequences at once."""

from __future__ import annotations

import torch


def gae_fwd(rewards, values, cu_seqlens, mask, bootstrap, gamma_tensor, lam_tensor, gamma, lam):
    gamma = gamma if gamma_tensor is None else gamma_tensor
    lam = lam if lam_tensor is None else lam_tensor
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    begin, end = (bound.long().clamp(0, rewards.shape[0]) for bound in (cu_seqlens[:-1], cu_seqlens[1:]))
    next_value = torch.zeros_like(end, dtype=rewards.dtype) if bootstrap is None else bootstrap
    next_advantage = torch.zeros_like(next_value)
    for step in range(int((end - begin).max()) if end.numel() else 0):
        t = end - 1 - step
        inside = t >= begin
        t = torch.where(inside, t, 0)
        scored = inside if mask is None else inside & mask[t]
        # Unscored tokens are skipped, not counted as steps: the state passes them unchanged.
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = torch.where(scored, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(scored, values[t], next_value)
        here = t[scored]
        advantages[here] = next_advantage[scored]
        returns[here] = (next_advantage + next_value)[scored]
    nothing = advantages - advantages  # NaN where something is not finite, at this token or after it
    advantages, returns = advantages + nothing, returns + nothing
    return advantages, returns, moments(advantages, mask)


def moments(x, mask):
    """[3]: count, mean and sum of (x - mean)^2 over the scored entries, in fp64 and rounded once."""
    wide = x.double()
    scored = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = scored.sum(dtype=torch.float64)
    mean = torch.where(scored, wide, 0.0).sum() / count.clamp(min=1.0)
    m2 = torch.where(scored, (wide - mean) ** 2, 0.0).sum()
    return torch.stack([count, mean, m2]).to(x.dtype)
