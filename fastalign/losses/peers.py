"""How options of other trainers are spelled here: hints for names that are not ours.

Read when an option is refused, never on the way to a loss."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

_LOSS = "it is the loss itself, named by loss= (--loss)"
_TRAINER = "it is a setting of the trainer, not of the loss: {flag}"


def _trainer(flag: str) -> str:
    return _TRAINER.format(flag=flag)


# Spellings of TRL (DPOConfig, CPOConfig, ORPOConfig, KTOConfig, RewardConfig) -> ours.
_PREFERENCE = {
    "loss_type": _LOSS,
    "loss_weights": "a mixture carries its weights: loss=[(name, weight), ...] (--loss sigmoid=0.8,sft=1)",
    "f_divergence_type": "choose the loss: forward_kl f_dpo_fkl, js_divergence f_dpo_js, alpha_divergence f_dpo_alpha, reverse_kl dpo",
    "f_alpha_divergence_coef": "TRL's coefficient is 1 - alpha of the paper: write loss f_dpo_alpha with alpha={one_minus}",
    "discopop_tau": "write tau={value} (loss discopop)",
    "simpo_gamma": "write gamma={value} (losses simpo, cpo_simpo, alphapo)",
    "cpo_alpha": 'the weight of the NLL: write sft_weight={value} (cpo_simpo: with sft_norm="token_mean_global", as in TRL)',
    "rpo_alpha": "the weight of the NLL: write loss rpo with alpha={value}",
    "use_weighting": "choose the loss wpo (fastalign.wpo_weights; clamp=None for TRL's unbounded weights)",
    "reference_free": "write reference=False, or choose a loss without a reference: simpo, cpo, orpo",
    "center_rewards_coefficient": "write centering={value} (reward_loss, fastalign train reward)",
    "precompute_ref_log_probs": _trainer("--precompute-ref"),
    "sync_ref_model": _trainer("--ref-update-every of the online methods"),
    "ref_model_mixup_alpha": _trainer("--ref-mix of the online methods"),
    "ref_model_sync_steps": _trainer("--ref-update-every of the online methods"),
    "max_length": _trainer("--max-length"),
}  # fmt: skip

# Spellings of TRL (GRPOConfig, RLOOConfig, PPOConfig), verl and OpenRLHF -> ours.
_BOTH_CLIPS = "write clip_low={value}, clip_high={value}"
_POLICY = {
    "loss_type": _LOSS,
    "beta": "the weight of the KL: write kl_coef={value} (--kl-coef; TRL also corrects it by default: kl_bias_correction=True)",
    "epsilon": _BOTH_CLIPS,
    "epsilon_low": "write clip_low={value}",
    "epsilon_high": "write clip_high={value}; of cispo, where it bounds the ratio itself, ratio_max={value}",
    "delta": "write dual_clip={value} (the same where it is at least 1 + clip_high; TRL's smaller values also cap positive advantages: "
             "clip_high={minus_one})",
    "importance_sampling_level": 'write ratio="token" or ratio="seq_mean" (TRL\'s "sequence"), or choose the loss gspo',
    "scale_rewards": "advantages are made before the loss: group_advantages(kind='grpo' or 'dr_grpo') (--scale-rewards, --no-scale-rewards)",
    "top_entropy_quantile": "it has no equivalent: give the loss a mask that holds only the tokens of high entropy",
    "off_policy_mask_threshold": "it has no equivalent: give the loss a mask without such sequences",
    "reward_weights": "one number per response is expected: add the rewards, weighted, in the reward function",
    "num_iterations": _trainer("--rollout-epochs"),
    "steps_per_generation": _trainer("--minibatches"),
    "num_mini_batches": _trainer("--minibatches"),
    "num_ppo_epochs": _trainer("--rollout-epochs"),
    "num_generations": _trainer("--samples-per-prompt"),
    "rloo_k": _trainer("--samples-per-prompt"),
    "max_completion_length": "it is --max-new-tokens in the trainer; of dr_grpo's loss, write norm_length={value}",
    "mask_truncated_completions": _trainer("--mask-truncated"),
    "use_bias_correction_kl": "write kl_bias_correction={value}",
    "sapo_temperature_pos": "write tau_pos={value} (loss sapo)",
    "sapo_temperature_neg": "write tau_neg={value} (loss sapo)",
    "vespo_k_pos": "write k_pos={value} (loss vespo)",
    "vespo_k_neg": "write k_neg={value} (loss vespo)",
    "vespo_lambda_pos": "write lam_pos={value} (loss vespo)",
    "vespo_lambda_neg": "write lam_neg={value} (loss vespo)",
    "cliprange": _BOTH_CLIPS,
    "cliprange_value": "write clip={value} (value_loss; --value-clip)",
    "vf_coef": "multiply value_loss by it (--vf-coef)",
    "kl_estimator": "write kl_kind={value!r}",
    "kl_loss_coef": "write kl_coef={value} (--kl-coef)",
    "kl_loss_type": "write kl_kind (--kl-kind): kl is k1, mse k2, low_var_kl k3, abs abs",
    "clip_ratio": _BOTH_CLIPS,
    "clip_ratio_low": "write clip_low={value}",
    "clip_ratio_high": "write clip_high={value}",
    "clip_ratio_c": "write dual_clip={value}",
    "eps_clip": _BOTH_CLIPS,
    "loss_agg_mode": 'write aggregation="token_mean", "seq_mean_token_sum", "seq_mean_token_mean" or "seq_mean_token_sum_norm"',
    "entropy_coeff": "write entropy_coef={value} (--entropy-coef)",
    "reward_clip_range": _trainer("--reward-clip"),
    "normalize_advantages": "advantages are made before the loss: fastalign.whiten",
    "whiten_rewards": _trainer("--whiten-rewards"),
    "missing_eos_penalty": _trainer("--missing-eos-penalty"),
    "ref_model_sync_steps": _trainer("--ref-update-every"),
    "ref_model_mixup_alpha": _trainer("--ref-mix"),
}  # fmt: skip


def preference_hint(option: str, value: Any) -> str:
    """'; ' and what another trainer's option is here; empty for names that are nobody's."""
    return _hint(_PREFERENCE, option, value)


def policy_hint(option: str, value: Any) -> str:
    """As `preference_hint`, for the policy-gradient losses."""
    return _hint(_POLICY, option, value)


def _hint(table: Mapping[str, str], option: str, value: Any) -> str:
    return f"; {option}: {_filled(table[option], value)}" if option in table else ""


def _filled(text: str, value: Any) -> str:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return text.format(
        value=value if isinstance(value, (Real, str)) else "...",
        one_minus=f"{1.0 - float(value):.6g}" if number else "1 - ...",
        minus_one=f"{float(value) - 1.0:.6g}" if number else "... - 1",
    )
