"""verl's GAE, and the advantage estimators that are registered with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign as fa
from fastalign.adapters.padded import boundaries, common_dtype

# verl's epsilon behind a group's standard deviation.
_EPS = 1e-6


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
) -> tuple[Tensor, Tensor]:
    """(whitened advantages, returns), [B, T]. Where the mask is 0 they are verl's too: of the next scored token
    the advantage, which makes the return of the value there."""
    dtype = common_dtype(token_level_rewards, values, response_mask)
    mask = response_mask.bool()
    out = fa.gae(
        token_level_rewards.flatten(), values.flatten(), boundaries(mask), mask=mask.flatten(), gamma=gamma,
        lam=lam
    )  # fmt: skip
    advantages = _carried_back(out.advantages.view(mask.shape), mask)
    returns = advantages + values.detach()
    return fa.whiten(advantages, moments=out.moments).to(dtype), returns.to(dtype)


def gae(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    values: Tensor | None = None,
    gamma: Any = None,
    lam: Any = None,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """GAE for trainers that give values to what the registry has; verl's own does to its `gae` alone. gamma, lam:
    None: algorithm.gamma, algorithm.lam."""
    if values is None or (config is None and (gamma is None or lam is None)):
        raise ValueError(
            "adv_estimator=fastalign_gae needs values, gamma and lam, and verl gives values to its own gae alone: "
            "VERL_USE_EXTERNAL_MODULES=fastalign.adapters.verl.everywhere with adv_estimator=gae runs ours in "
            "its place"
        )
    gamma, lam = (config.gamma if gamma is None else gamma, config.lam if lam is None else lam)
    return compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam)


def _carried_back(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: at tokens outside the mask the value of the next one inside, 0 behind the last."""
    columns = torch.arange(x.shape[1], device=x.device)
    following = torch.where(mask, columns, x.shape[1]).flip(1).cummin(1).values.flip(1)
    return F.pad(x, (0, 1)).gather(1, following)


def _numbered(index: Any, like: Tensor) -> Tensor:
    """Groups as integers, from verl's uids."""
    return torch.from_numpy(np.unique(np.asarray(index), return_inverse=True)[1].reshape(-1)).to(like.device)


def _of_groups(
    kind: str, token_level_rewards: Tensor, index: Any, single: float = 1.0, **options: Any
) -> Tensor:
    """[B]: advantages of the rewards' sums. A group of one has its own reward, times `single`."""
    scores, groups = token_level_rewards.detach().sum(-1), None
    groups = _numbered(index, scores)
    advantages = fa.group_advantages(scores, groups, kind=kind, **options).advantages
    alone = torch.bincount(groups)[groups] == 1
    return torch.where(alone, scores * single, advantages)


def _spread(advantages: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    spread = advantages.unsqueeze(-1) * response_mask
    return spread, spread


def grpo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """(r - mean) / (std + 1e-6); algorithm.norm_adv_by_std_in_grpo=False: r - mean (Dr. GRPO)."""
    if config is None or config.get("norm_adv_by_std_in_grpo", True):
        advantages = _of_groups("grpo", token_level_rewards, index, 1.0 / (1.0 + _EPS), eps=_EPS)
    else:
        advantages = _of_groups("dr_grpo", token_level_rewards, index)
    return _spread(advantages, response_mask)


def rloo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """r - mean of the others of its group."""
    return _spread(_of_groups("rloo", token_level_rewards, index), response_mask)


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """r - mean of the group, whitened over the tokens of the batch."""
    spread = _spread(_of_groups("dr_grpo", token_level_rewards, index), response_mask)[0]
    whitened = fa.whiten(spread, response_mask.bool()).to(spread.dtype)
    return whitened, whitened


def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Discounted returns by algorithm.gamma, whitened over the tokens of the batch."""
    if config is None:
        raise ValueError(
            "adv_estimator=fastalign_reinforce_plus_plus needs verl's algorithm config; got None"
        )
    mask = response_mask.bool()
    returns = fa.returns_to_go(
        token_level_rewards.flatten(), boundaries(mask), mask=mask.flatten(), gamma=config.gamma
    ).view(mask.shape)
    dtype = token_level_rewards.dtype
    return fa.whiten(returns, mask).to(dtype), returns.to(dtype)


# adv_estimator -> function, for `register_adv_est`.
ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    f"fastalign_{f.__name__}": f for f in (gae, grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline)
}  # fmt: skip
