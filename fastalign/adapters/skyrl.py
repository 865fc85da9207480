"""SkyRL: policy losses and advantages for its registries, `register()`.

A loss there is a sum over tokens whose advantages SkyRL has divided (loss_reduction). Its clip range, its
temperatures of SAPO and its off-policy correction are read from the config, as its own losses do. SkyRL is
not on the package index: this is tested against the signature of skyrl.backends.skyrl_train.utils.ppo_utils."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from fastalign.adapters import padded
from fastalign.adapters.common import Adapter
from fastalign.losses.policy import PRESETS

ADAPTER = Adapter(
    "skyrl", "skyrl", "",
    registers=(
        "policy losses, after fastalign.adapters.skyrl.register(): "
        "trainer.algorithm.policy_loss_type=fastalign_NAME",
    ),
)  # fmt: skip

_UTILS = "skyrl.backends.skyrl_train.utils"


def policy_loss(
    name: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    *,
    dual_clip: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """(sum over the scored tokens, metrics), of [B, T] tensors. config: eps_clip_low, eps_clip_high; of
    dual_clip clip_ratio_c; of cispo cispo.cispo_eps_clip_low, _high and cispo.cispo_anchor; of sapo sapo.tau_pos,
    tau_neg; off_policy_correction."""
    preset = PRESETS[name]
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    low, high = config.eps_clip_low, config.eps_clip_high
    behaviour = old_log_probs
    if preset.surrogate == "cispo":
        low, high = config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high
        if getattr(config.cispo, "cispo_anchor", "old") == "rollout":
            if rollout_logprobs is None:
                raise ValueError("cispo_anchor=rollout needs rollout_logprobs; got None")
            if config.off_policy_correction.tis_ratio_type is not None:
                raise ValueError(
                    "cispo_anchor=rollout corrects already: off_policy_correction.tis_ratio_type must be None"
                )
            behaviour = rollout_logprobs
    options = padded.clip_options(preset, low, high, config.clip_ratio_c if dual_clip else None)
    if preset.surrogate == "sapo":
        options |= {"tau_pos": config.sapo.tau_pos, "tau_neg": config.sapo.tau_neg}
    # What SkyRL multiplies a token's loss by, and the tokens that are left: its correction of ones.
    correct = importlib.import_module(f"{_UTILS}.off_policy_correction_utils").apply_off_policy_correction
    weight, mask, metrics = correct(
        torch.ones_like(log_probs), old_log_probs, rollout_logprobs, mask, config.off_policy_correction
    )
    # vespo takes no weights, and where there is no correction there are none.
    is_weight = None if config.off_policy_correction.tis_ratio_type is None else weight.detach()
    loss, numbers = padded.policy_loss(
        preset, log_probs, behaviour, advantages, mask, is_weight=is_weight, aggregation="token_sum", **options
    )  # fmt: skip
    return loss, {"clip_ratio": numbers["clipfrac"].item(), **metrics}


# policy_loss_type -> function, for `PolicyLossRegistry.register`.
POLICY_LOSSES = {f"fastalign_{name}": functools.partial(policy_loss, name) for name in PRESETS}
POLICY_LOSSES["fastalign_dual_clip"] = functools.partial(policy_loss, "ppo", dual_clip=True)


def register() -> None:
    """Register every loss with SkyRL's PolicyLossRegistry. Call it before ray starts, or in the process that
    starts the training: SkyRL carries its registry to its workers. Names that are there already are left."""
    registry = importlib.import_module(f"{_UTILS}.ppo_utils").PolicyLossRegistry
    taken = set(registry.list_available())
    for name, function in POLICY_LOSSES.items():
        if name not in taken:
            registry.register(name, function)
