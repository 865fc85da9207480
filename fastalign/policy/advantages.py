"""Advantages over packed sequences: GAE, returns, whitening."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.gae.op import GaeFwd, gae_fwd
from fastalign.runtime.checks import (
    check_cu_seqlens,
    check_number,
    check_same_device,
    check_shape,
    per_token,
    row_mask,
)
from fastalign.runtime.distributed import moments_over_group


class GAE(NamedTuple):
    """What `gae` returns. advantages, returns: [T]. count, mean, m2: 0-dim, of the scored advantages; m2 =
    sum of (A - mean)^2, so that m2 / (count - 1) is the unbiased variance and moments of several batches can
    be merged (`whiten`)."""

    advantages: Tensor
    returns: Tensor
    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(count, mean, m2), as `whiten` takes them."""
        return self.count, self.mean, self.m2


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
) -> GAE:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438) within each packed sequence:

    delta_t = r_t + gamma V_next - V_t,    A_t = delta_t + gamma lam A_next,    R_t = A_t + V_t,

    where "next" is the next scored token of the same sequence. Unscored tokens in between (tool output, observations) are skipped: they are
    no steps, discount nothing, and their rewards and values are not read. After the last scored token V_next = bootstrap[i] and A_next = 0.
    lam = 1 gives Monte-Carlo returns, lam = 0 one-step targets.

    Args:
        rewards: [T], floating: the reward of emitting the token that row t predicts (`shape_rewards`).
        values: [T], floating: the value head's output at row t, the state before that token is emitted.
        cu_seqlens: [S + 1] int32, from 0 to T. Zero-length sequences are legal.
        mask: [T] bool, row-aligned: which tokens the policy emitted. Others get 0 for both results, whatever
            they hold (NaN included).
        bootstrap: [S], the value after each sequence's last token: 0 where the sequence ended by itself
            (terminal), the value head's estimate where it was cut off. None: all ended.
        gamma, lam: discount and trace decay, in [0, 1]; a number or a 0-dim tensor.

    Returns:
        GAE: advantages and returns [T], and count, mean, m2 (0-dim) of the scored advantages for `whiten`;
        without scored tokens all three are 0. fp32 (fp64 if rewards or values are fp64), whatever the inputs.
        A scored reward or value that is not finite makes NaN of its token's results and of those before it in
        its sequence, a bootstrap of the whole sequence's; nothing else is touched. Constants: no gradient
        flows through them. Fixed order of operations: two runs are bitwise equal.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices; gamma or lam outside [0, 1]; cu_seqlens not running
            monotonically from 0 to T (values of tensors are checked on the CPU).
    """
    rewards = per_token("rewards", rewards).detach()
    check_shape("values", values, tuple(rewards.shape))
    check_same_device("values", values, "rewards", rewards)
    if values.dtype == torch.float64:
        rewards = rewards.double()
    values = per_token("values", values, rewards).detach()
    cu_seqlens = check_cu_seqlens(cu_seqlens, rewards)
    mask = row_mask(mask, rewards)
    if bootstrap is not None:
        check_shape("bootstrap", bootstrap, (cu_seqlens.shape[0] - 1,))
        check_same_device("bootstrap", bootstrap, "rewards", rewards)
        bootstrap = bootstrap.detach().to(rewards.dtype).contiguous()
    gamma_tensor, gamma = _discount("gamma", gamma, rewards)
    lam_tensor, lam = _discount("lam", lam, rewards)
    advantages, returns, moments = gae_fwd(
        GaeFwd(rewards, values, cu_seqlens, mask, bootstrap, gamma_tensor, lam_tensor, gamma, lam)
    )
    return GAE(advantages, returns, *moments.unbind())


def _discount(name: str, value: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """(tensor or None, number) of gamma or lam: one of the two counts."""
    if not isinstance(value, Tensor):
        check_number(name, value, low=0.0, high=1.0)
        return None, float(value)
    check_shape(name, value, ())
    if value.device != like.device:
        raise ValueError(
            f"{name} is on {value.device} but rewards is on {like.device}; they must share a device"
        )
    return value.detach().to(like.dtype), 0.0


def returns_to_go(
    rewards: Tensor, cu_seqlens: Tensor, *, mask: Tensor | None = None, gamma: float | Tensor = 1.0
) -> Tensor:
    """Discounted sum of the rewards from each token to its sequence's end, R_t = r_t + gamma R_next: `gae` with values 0 and lam = 1.

    The advantages of REINFORCE and, whitened over the whole rollout, of REINFORCE++ (Hu 2025, arXiv
    2501.03262). Arguments, masking and errors as `gae`; [T] fp32 (fp64 for fp64 rewards), no gradient."""
    rewards = per_token("rewards", rewards)
    return gae(rewards, torch.zeros_like(rewards), cu_seqlens, mask=mask, gamma=gamma, lam=1.0).returns


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    group: dist.ProcessGroup | None = None,
    moments: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the scored entries, var unbiased (divided by count - 1);
    shift_mean=False adds the mean again.

    Whiten once per rollout, over all of it, never per micro-batch. With fewer than two entries or var = 0
    nothing is divided: the result is x - mean (that is 0), with shift_mean=False x itself.

    Args:
        x: any shape, floating. mask: the same shape, bool; False entries are 0 in the result, whatever they
            hold.
        group: a process group; mean and variance are those of all its ranks' entries (merged in fp64, the
            same on every rank). Every rank must take part, those without scored entries too.
        moments: (count, mean, m2) where they are known: `out = gae(...)` has them, so `whiten(out.advantages,
            mask, moments=out.moments)` reads the advantages once less. Those of x's own scored entries (that
            many) are taken as a first guess, which their rounding to fp32 makes of them, and refined in fp64;
            those of other or more entries as they are.

    Returns:
        x's shape, fp32 (fp64 for fp64 input), no gradient.
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(
            f"x must be a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    mask = row_mask(mask, x)
    if moments is None:
        moments = _moments(x, mask)
    else:
        if len(moments) != 3:
            raise ValueError(f"moments has {len(moments)} entries; legal: 3 (count, mean, m2)")
        for name, value in zip(("count", "mean", "m2"), moments):
            check_shape(f"moments ({name})", value, ())
        moments = _refined(x, mask, *(m.double() for m in moments))
    if group is not None:
        moments = moments_over_group(*moments, group)
    count, mean, m2 = (m.double() for m in moments)
    scale = torch.where((count < 2) | (m2 == 0), 1.0, torch.rsqrt(m2 / (count - 1.0).clamp(min=1.0) + 1e-8))
    y = (x.double() - mean) * scale  # in fp64: the mean may be large against the deviation
    y = (y if shift_mean else y + mean).to(x.dtype)
    return y if mask is None else torch.where(mask, y, 0.0)


def _moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.double() if mask is None else torch.where(mask, x.double(), 0.0)
    count = (
        torch.full((), x.numel(), dtype=torch.float64, device=x.device)
        if mask is None
        else mask.sum(dtype=torch.float64)
    )
    mean = wide.sum() / count.clamp(min=1.0)
    squares = (wide - mean) ** 2
    return count, mean, (squares if mask is None else torch.where(mask, squares, 0.0)).sum()


def _refined(
    x: Tensor, mask: Tensor | None, count: Tensor, mean: Tensor, m2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The moments in fp64, given them with a mean that was rounded: sums of x - mean and of its square lose
    nothing near the mean."""
    d = x.double() - mean if mask is None else torch.where(mask, x.double() - mean, 0.0)
    n = torch.full_like(count, x.numel()) if mask is None else mask.sum(dtype=torch.float64)
    total, own = d.sum(), count == n
    offset = total / n.clamp(min=1.0)
    return (
        count,
        torch.where(own, mean + offset, mean),
        torch.where(own, ((d * d).sum() - total * offset).clamp(min=0.0), m2),
    )
