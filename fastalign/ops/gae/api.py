"""Generalised advantage estimation over packed sequences: advantages, returns and the moments that whitening needs, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.checks import check_cu_seqlens, check_cu_seqlens_values, check_number, check_same_device, check_shape, per_token, row_mask
from fastalign.registry import Op, scalar_dtypes, standard_kernels


class GAE(NamedTuple):
    """What `gae` returns. advantages, returns: [T]. count, mean, m2: 0-dim, of the scored advantages; m2 = sum of (A - mean)^2, so that
    m2 / (count - 1) is the unbiased variance and moments of several batches can be merged (`whiten`)."""

    advantages: Tensor
    returns: Tensor
    count: Tensor
    mean: Tensor
    m2: Tensor


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
        mask: [T] bool, row-aligned: which tokens the policy emitted. Others get 0 for both results, whatever they hold (NaN included).
        bootstrap: [S], the value after each sequence's last token: 0 where the sequence ended by itself (terminal), the value head's estimate
            where it was cut off. None: all ended.
        gamma, lam: discount and trace decay, in [0, 1]; a number or a 0-dim tensor.

    Returns:
        GAE: advantages and returns [T], and count, mean, m2 (0-dim) of the scored advantages for `whiten`; without scored tokens all three
        are 0. fp32 (fp64 if rewards or values are fp64), whatever the inputs. A scored reward or value that is not finite makes NaN of
        its token's results and of those before it in its sequence, a bootstrap of the whole sequence's; nothing else is touched. Constants: no
        gradient flows through them. Fixed order of operations: two runs are bitwise equal.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices; gamma or lam outside [0, 1]; cu_seqlens not running monotonically from 0 to T (values of
            tensors are checked on the CPU).
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
    advantages, returns, moments = gae_fwd(rewards, values, cu_seqlens, mask, bootstrap, gamma_tensor, lam_tensor, gamma, lam)
    return GAE(advantages, returns, *moments.unbind())


def _discount(name: str, value: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """(tensor or None, number) of gamma or lam: one of the two counts."""
    if not isinstance(value, Tensor):
        check_number(name, value, low=0.0, high=1.0)
        return None, float(value)
    check_shape(name, value, ())
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but rewards is on {like.device}; they must share a device")
    return value.detach().to(like.dtype), 0.0
