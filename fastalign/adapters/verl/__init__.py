"""verl: functions that take the place of its own, and what is registered under names of its registries.

The registrations are made by verl itself, which loads the entry points of the group `verl.plugins` as it is
imported (`plugin.py`); they change nothing until a config names one. The functions are replaced where
`fastalign.adapters.verl.everywhere` is imported, which verl does by itself, in every process, for
`VERL_USE_EXTERNAL_MODULES`."""

from __future__ import annotations

from fastalign.adapters.common import Adapter, Seam

_FUNCTIONS = "verl.utils.torch_functional"
_ALGORITHMS = "verl.trainer.ppo.core_algos"

ADAPTER = Adapter(
    "verl",
    "verl",
    ">=0.9.1,<0.10",
    seams=(
        Seam(
            f"{_FUNCTIONS}:logprobs_from_logits", "fastalign.adapters.verl.rows:logprobs_from_logits",
            "one pass, without a [N, V] temporary",
        ),
        Seam(
            f"{_FUNCTIONS}:entropy_from_logits", "fastalign.adapters.verl.rows:entropy_from_logits",
            "one pass, without a [N, V] temporary; logits of -inf are legal",
        ),
        Seam(
            f"{_FUNCTIONS}:entropy_from_logits_with_chunking",
            "fastalign.adapters.verl.rows:entropy_from_logits_with_chunking",
            "the same; nothing is left to be chunked",
        ),
        Seam(
            "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
            "fastalign.adapters.verl.rows:linear_cross_entropy",
            "the fused head, on CPUs too and at any width; with a group of several ranks verl's own kernel runs",
        ),
        Seam(
            "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward",
            "fastalign.adapters.verl.rows:fused_linear_forward",
            "the fused head, for both impl_backends; logits are summed and kept in fp32",
        ),
        Seam(
            f"{_ALGORITHMS}:compute_value_loss", "fastalign.adapters.verl.losses:compute_value_loss",
            "one launch; what the mask leaves out may be NaN; without a scored token the loss is 0, not NaN",
        ),
        Seam(
            f"{_ALGORITHMS}:kl_penalty", "fastalign.adapters.verl.losses:kl_penalty",
            "one launch; k3 keeps its digits near 0",
        ),
        Seam(
            f"{_ALGORITHMS}:compute_gae_advantage_return",
            "fastalign.adapters.verl.advantages:compute_gae_advantage_return",
            "one launch in place of a loop over the tokens",
        ),
    ),
    registers=(
        "policy losses, by the entry point verl.plugins: actor.policy_loss.loss_mode=fastalign_NAME",
        "advantage estimators, likewise: algorithm.adv_estimator=fastalign_NAME",
        "distillation losses, likewise: distillation.distillation_loss.loss_mode=fastalign_KIND",
    ),
)  # fmt: skip
