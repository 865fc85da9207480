"""The methods that learn from the policy's own samples: PPO, GRPO, RLOO, REINFORCE++, online DPO.

`METHODS` is read without importing torch or transformers, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_REWARD = ("reward_model", "reward", "reward_clip", "missing_eos_penalty", "ref_model", "ref_update_every", "ref_mix")
_SAMPLING = ("samples_per_prompt", "max_new_tokens", "temperature", "top_p", "top_k", "sample_batch")
_UPDATES = ("loss", "loss_options", "minibatches", "rollout_epochs", "target_kl", "entropy_coef", "ptx_data", "ptx_coef", "ptx_batch")
_KL = ("kl_coef", "kl_in", "kl_kind", "kl_target", "kl_horizon")
_COMMON = (*_REWARD, *_SAMPLING, *_UPDATES, *_KL)
_STEPS = ("gamma", "whiten_rewards")  # of methods whose advantages differ from token to token
_VALUES = ("lam", "vf_coef", "value_clip", "bootstrap_truncated", "dpo_model", "dpo_coef", "dpo_clip", "preset")
_GROUPS = ("overlong_buffer", "drop_equal_groups", "mask_truncated")


class Entry(NamedTuple):
    """A method on the command line: what --help says, the settings of `OnlineConfig` that it has, and its own defaults for them."""

    summary: str
    settings: tuple[str, ...]
    defaults: Mapping[str, Any]


_DEFAULTS = {"minibatches": 1, "rollout_epochs": 1, "entropy_coef": 0.0, "ptx_coef": 0.0, "samples_per_prompt": 1}
METHODS = {
    "ppo": Entry(
        "RLHF by PPO with a value head",
        (*_COMMON, *_STEPS, *_VALUES),
        _DEFAULTS | {"loss": "ppo", "minibatches": 4, "rollout_epochs": 4, "kl_coef": 0.05, "kl_in": "reward", "kl_kind": "k1",
                     "gamma": 1.0, "lam": 0.95, "vf_coef": 0.1, "value_clip": 0.2},
    ),
    "grpo": Entry(
        "RLHF by GRPO: rewards relative to other samples for the same prompt (--loss: dapo, gspo, dr_grpo, ...)",
        (*_COMMON, *_GROUPS, "scale_rewards"),
        _DEFAULTS | {"loss": "grpo", "samples_per_prompt": 8, "kl_coef": 0.0, "kl_in": "loss", "kl_kind": "k3"},
    ),
    "rloo": Entry(
        "RLHF by RLOO: rewards against the mean of the other samples for the same prompt",
        (*_COMMON, *_GROUPS),
        _DEFAULTS | {"loss": "rloo", "samples_per_prompt": 4, "kl_coef": 0.05, "kl_in": "reward", "kl_kind": "k1"},
    ),
    "reinforce_pp": Entry(
        "RLHF by REINFORCE++: returns whitened over the batch, no value head",
        (*_COMMON, *_STEPS),
        _DEFAULTS | {"loss": "ppo", "kl_coef": 0.01, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0},
    ),
    "online_dpo": Entry(
        "RLHF by DPO on the best and the worst of several samples (--loss)",
        (*_REWARD, *_SAMPLING, "loss", "loss_options"),
        {"loss": "dpo", "samples_per_prompt": 2},
    ),
}  # fmt: skip

# Settings of published pipelines (`--preset`); what a flag gives goes before them.
PRESETS: dict[str, dict[str, Any]] = {
    # Ouyang et al. 2022, arXiv 2203.02155
    "instructgpt": {"kl_coef": 0.02, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0, "value_clip": 0.2, "entropy_coef": 0.0,
                    "ptx_coef": 27.8},
    # Bai et al. 2022, arXiv 2204.05862
    "anthropic_hh": {"kl_coef": 0.001, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0, "entropy_coef": 0.0},
    # Zhong et al. 2024, arXiv 2404.18922
    "rto": {"kl_coef": 0.01, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0, "dpo_coef": 0.05, "dpo_clip": 0.05, "reward_clip": 10.0},
}  # fmt: skip
