"""fastalign: the fused loss head of LLM alignment. See README.md; the public names are below."""

__version__ = "0.1.0"

from fastalign import as_command as _as_command  # before torch is loaded

# isort: split
import warnings as _warnings

from fastalign import ffi as _ffi
from fastalign import losses, policy_losses
from fastalign.distributed import global_denominator
from fastalign.dpo_rewards import TokenRewards, rto_rewards, token_rewards
from fastalign.groups import GroupAdvantages, dynamic_sampling_mask, group_advantages, overlong_penalty
from fastalign.list_preset import ListPreset
from fastalign.metric import merge_metrics
from fastalign.ops.gae.api import GAE, gae
from fastalign.ops.kl_estimate.api import kl_estimate
from fastalign.ops.listwise.api import listwise_loss, listwise_loss_from_sums
from fastalign.ops.listwise.output import ListwiseOutput
from fastalign.ops.policy.api import PolicyOutput, ValueOutput, policy_loss, value_loss
from fastalign.ops.preference.api import PreferenceOutput, preference_loss, preference_loss_from_sums
from fastalign.ops.preference.unpaired import UnpairedOutput, kto_baseline, unpaired_loss
from fastalign.ops.sequence_sum.api import sequence_sum
from fastalign.ops.token_stats.api import TokenStats, entropy_from_logits, selective_log_softmax, token_logprobs, token_stats
from fastalign.ops.token_stats.kl import TokenKLLoss, token_kl, token_kl_loss
from fastalign.packing import PackedBatch, pack, repad, shift_labels, unpad
from fastalign.policy_losses import PolicyPreset
from fastalign.preset import Preset
from fastalign.registry import BackendError, backends, explain, use_backend
from fastalign.rejection import rejection_sample
from fastalign.reward import kwise_reward_loss, reward_loss
from fastalign.rl import AdaptiveKLController, mean_sequence_kl, returns_to_go, shape_rewards, whiten
from fastalign.rules import AlphaDPO, BCODelta, BetaDPO, wpo_weights

# A command does not begin with a warning about what nothing here could use.
if _missing := _ffi.missing_backends(of_use=_as_command.is_command()):
    _warnings.warn(
        "fastalign: " + "; ".join(_missing) + ". The next backend serves those calls (fastalign.explain says which).", stacklevel=2
    )

__all__ = [
    "AdaptiveKLController", "AlphaDPO", "BCODelta", "BackendError", "BetaDPO", "GAE", "GroupAdvantages", "ListPreset", "ListwiseOutput",
    "PackedBatch", "PolicyOutput", "PolicyPreset", "PreferenceOutput", "Preset", "TokenKLLoss", "TokenRewards", "TokenStats",
    "UnpairedOutput", "ValueOutput", "__version__", "backends", "dynamic_sampling_mask", "entropy_from_logits", "explain", "gae",
    "global_denominator", "group_advantages", "kl_estimate", "kto_baseline", "kwise_reward_loss", "listwise_loss",
    "listwise_loss_from_sums", "losses", "mean_sequence_kl", "merge_metrics", "overlong_penalty", "pack", "policy_loss", "policy_losses",
    "preference_loss", "preference_loss_from_sums", "rejection_sample", "repad", "returns_to_go", "reward_loss", "rto_rewards",
    "selective_log_softmax", "sequence_sum", "shape_rewards", "shift_labels", "token_kl", "token_kl_loss", "token_logprobs",
    "token_rewards", "token_stats", "unpad", "unpaired_loss", "use_backend", "value_loss", "whiten", "wpo_weights",
]  # fmt: skip
