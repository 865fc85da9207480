"""The methods whose advantages differ from token to token: PPO, with a value head, and REINFORCE++,
without."""

from __future__ import annotations

from fastalign.train.methods.policy_gradient import PolicyGradient


class PPO(PolicyGradient):
    """RLHF by PPO (Ouyang et al. 2022, arXiv 2203.02155): generalised advantage estimation on a value head,
    whitened."""

    name, estimator = "ppo", "gae"


class ReinforcePP(PolicyGradient):
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): returns to go, whitened over the step."""

    name, estimator = "reinforce_pp", "reinforce_pp"
