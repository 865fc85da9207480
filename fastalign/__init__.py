"""fastalign: the fused loss head of LLM alignment. See README.md; the public names are below."""

__version__ = "0.1.0"

from fastalign.runtime import as_command as _as_command  # before torch is loaded

# isort: split
import warnings as _warnings

from fastalign import losses
from fastalign.losses import policy as policy_losses
from fastalign.losses.list import ListPreset
from fastalign.losses.pair import Preset
from fastalign.losses.policy import PolicyPreset
from fastalign.packing import PackedBatch, pack, repad, sequence_sum, shift_labels, unpad
from fastalign.policy.advantages import GAE, gae, returns_to_go, whiten
from fastalign.policy.groups import GroupAdvantages, dynamic_sampling_mask, group_advantages, overlong_penalty
from fastalign.policy.implicit_rewards import TokenRewards, rto_rewards, token_rewards
from fastalign.policy.kl_estimate import kl_estimate
from fastalign.policy.linear import linear_policy_loss
from fastalign.policy.loss import policy_loss, value_loss
from fastalign.policy.output import PolicyOutput, ValueOutput
from fastalign.policy.rejection import rejection_sample
from fastalign.policy.rewards import AdaptiveKLController, mean_sequence_kl, shape_rewards
from fastalign.preference.linear import linear_preference_loss
from fastalign.preference.list import listwise_loss, listwise_loss_from_sums
from fastalign.preference.list_output import ListwiseOutput
from fastalign.preference.output import PreferenceOutput
from fastalign.preference.pair import preference_loss, preference_loss_from_sums
from fastalign.preference.reward_model import kwise_reward_loss, reward_loss
from fastalign.preference.rules import AlphaDPO, BCODelta, BetaDPO, wpo_weights
from fastalign.preference.unpaired import UnpairedOutput, kto_baseline, unpaired_loss
from fastalign.rows.kl import TokenKLLoss, token_kl, token_kl_loss
from fastalign.rows.linear import linear_token_logprobs, linear_token_stats
from fastalign.rows.linear_kl import linear_token_kl_loss
from fastalign.rows.stats import (
    TokenStats,
    entropy_from_logits,
    selective_log_softmax,
    token_logprobs,
    token_stats,
)
from fastalign.rows.support import SupportLogprobs, logprobs_at
from fastalign.runtime import ffi as _ffi
from fastalign.runtime.backends import BackendError, backends, use_backend
from fastalign.runtime.distributed import global_denominator
from fastalign.runtime.metric import merge_metrics
from fastalign.runtime.op import explain

# A command does not begin with a warning about what nothing here could use.
if _missing := _ffi.missing_backends(of_use=_as_command.is_command()):
    _warnings.warn(
        "fastalign: "
        + "; ".join(_missing)
        + ". The next backend serves those calls (fastalign.explain says which).",
        stacklevel=2,
    )

__all__ = [
    "AdaptiveKLController", "AlphaDPO", "BCODelta", "BackendError", "BetaDPO", "GAE", "GroupAdvantages", "ListPreset", "ListwiseOutput",
    "PackedBatch", "PolicyOutput", "PolicyPreset", "PreferenceOutput", "Preset", "SupportLogprobs", "TokenKLLoss", "TokenRewards", "TokenStats",
    "UnpairedOutput", "ValueOutput", "__version__", "backends", "dynamic_sampling_mask", "entropy_from_logits", "explain", "gae",
    "global_denominator", "group_advantages", "kl_estimate", "kto_baseline", "kwise_reward_loss", "linear_policy_loss",
    "linear_preference_loss", "linear_token_kl_loss", "linear_token_logprobs", "linear_token_stats", "listwise_loss",
    "listwise_loss_from_sums", "logprobs_at", "losses", "mean_sequence_kl", "merge_metrics", "overlong_penalty", "pack", "policy_loss", "policy_losses",
    "preference_loss", "preference_loss_from_sums", "rejection_sample", "repad", "returns_to_go", "reward_loss", "rto_rewards",
    "selective_log_softmax", "sequence_sum", "shape_rewards", "shift_labels", "token_kl", "token_kl_loss", "token_logprobs",
    "token_rewards", "token_stats", "unpad", "unpaired_loss", "use_backend", "value_loss", "whiten", "wpo_weights",
]  # fmt: skip
