"""The methods that compare a response with the others for the same prompt: GRPO and RLOO."""

from __future__ import annotations

from typing import Any

from fastalign.train.methods.policy_gradient import PolicyGradient
from fastalign.train.online_config import OnlineConfig

# Losses whose paper leaves the rewards of a group unscaled.
_UNSCALED = ("dr_grpo",)


class GRPO(PolicyGradient):
    """GRPO (Shao et al. 2024, arXiv 2402.03300) and its variants (--loss)."""

    name, estimator = "grpo", "grpo"

    def __init__(self, config: OnlineConfig, **options: Any):
        super().__init__(config, **options)
        if not self.config.scale_rewards or self.config.loss in _UNSCALED:
            self.estimator = "dr_grpo"


class RLOO(PolicyGradient):
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740)."""

    name, estimator = "rloo", "rloo"
