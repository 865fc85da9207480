"""Every field of TRL's DPOConfig, KTOConfig and GRPOConfig that is their own, and those of transformers' TrainingArguments
that reach the loss: a value to try it at, or why it cannot reach what fastalign takes the place of."""

from __future__ import annotations

from typing import Any, NamedTuple

from trl_runs import GRANTED, Case


class Probe(NamedTuple):
    """value: not the field's default. beside: what the field needs to have an effect. granted, without: of
    trl_runs.compare."""

    value: Any
    beside: dict[str, Any] = {}
    model: str = "llama"
    rollout: bool = False
    granted: tuple[float, float] = GRANTED
    without: tuple[str, ...] = ()

    def cases(self, trainer: str, field: str) -> tuple[Case, Case]:
        """(without the field, with it)."""
        base = Case(trainer, dict(self.beside), self.model, self.rollout)
        return base, base._replace(options={**self.beside, field: self.value})


DATA, LOADING, GENERATION, LOGGING = (
    "data preparation, before the model",
    "how a model is loaded",
    "generation, before the loss",
    "logging only",
)
ENGINE = "vLLM's or DeepSpeed's own settings"
OFFLOAD = "where activations lie; needs an accelerator"
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2}

# Of transformers, the same for all trainers.
SHARED: dict[str, Probe | str] = {
    "gradient_accumulation_steps": Probe(4), "gradient_checkpointing": Probe(True), "max_grad_norm": Probe(0.1, {"optim": "sgd"}), "weight_decay": Probe(0.1),
    "lr_scheduler_type": Probe("constant"), "optim": Probe("sgd"), "per_device_train_batch_size": Probe(6), "average_tokens_across_devices": Probe(False),
    # TRL rounds logits to bf16, and of equal ones the first is the largest: whether the label is counts in that metric.
    "bf16": Probe(True, granted=(0.03, 3e-3), without=("mean_token_accuracy",)), "neftune_noise_alpha": Probe(1.0),
    "use_liger_kernel": Probe(True), "learning_rate": Probe(1e-2),
    "label_smoothing_factor": Probe(0.1), "auto_find_batch_size": Probe(True), "torch_compile_backend": Probe("aot_eager"),
    "full_determinism": "how torch computes, the same for both",
}  # fmt: skip

DPO: dict[str, Probe | str] = {
    "learning_rate": Probe(1e-2), "model_init_kwargs": Probe({"attn_implementation": "eager"}), "trust_remote_code": LOADING,
    "router_aux_loss_coef": Probe(0.5, model="experts"), "disable_dropout": Probe(False, model="dropout"), "dataset_num_proc": DATA,
    "max_length": Probe(12), "truncation_mode": Probe("keep_end", {"max_length": 12}), "padding_free": Probe(True), "pad_to_multiple_of": Probe(16),
    "precompute_ref_log_probs": Probe(True), "precompute_ref_batch_size": Probe(2, {"precompute_ref_log_probs": True}), "loss_type": Probe(["ipo"]),
    "loss_weights": Probe([0.3, 0.7], {"loss_type": ["sigmoid", "sft"]}), "ld_alpha": Probe(0.5), "f_divergence_type": Probe("js_divergence"),
    "f_alpha_divergence_coef": Probe(0.3, {"f_divergence_type": "alpha_divergence"}), "label_smoothing": Probe(0.2, {"loss_type": ["robust"]}),
    "beta": Probe(0.4), "use_weighting": Probe(True), "discopop_tau": Probe(0.2, {"loss_type": ["discopop"]}), "activation_offloading": OFFLOAD,
    "sync_ref_model": Probe(True, {"ref_model_sync_steps": 2}), "ref_model_mixup_alpha": Probe(0.2, SYNCED),
    "ref_model_sync_steps": Probe(1, {"sync_ref_model": True}), "pad_token": DATA,
}  # fmt: skip

KTO: dict[str, Probe | str] = {
    "learning_rate": Probe(1e-2), "train_sampling_strategy": Probe("random", {"loss_type": "apo_zero_unpaired"}),
    "model_init_kwargs": Probe({"attn_implementation": "eager"}),
    "trust_remote_code": LOADING, "router_aux_loss_coef": Probe(0.5, model="experts"), "disable_dropout": Probe(False, model="dropout"),
    "dataset_num_proc": DATA, "max_length": Probe(12), "pad_to_multiple_of": Probe(16), "precompute_ref_log_probs": Probe(True),
    "precompute_ref_batch_size": Probe(2, {"precompute_ref_log_probs": True}), "loss_type": Probe("apo_zero_unpaired"), "beta": Probe(0.4),
    "desirable_weight": Probe(2.0), "undesirable_weight": Probe(2.0), "activation_offloading": OFFLOAD,
    "sync_ref_model": Probe(True, {"ref_model_sync_steps": 2}), "ref_model_mixup_alpha": Probe(0.2, SYNCED),
    "ref_model_sync_steps": Probe(1, {"sync_ref_model": True}),
}  # fmt: skip

TWICE = {"num_iterations": 2}  # the ratio is 1 throughout the first
KL = {"beta": 0.2}
# Where policy and reference are one, the gradient of the KL is rounding noise, which AdamW makes as large as any other.
ONE = {**KL, "sync_ref_model": True, "optim": "sgd", "learning_rate": 0.3}
BONUS = {"use_adaptive_entropy": True, "entropy_target": 4.0}
IS = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.2}
MASKED = {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.5}
GRPO: dict[str, Probe | str] = {
    "learning_rate": Probe(1e-2), "model_init_kwargs": Probe({"attn_implementation": "eager"}), "trust_remote_code": LOADING,
    "router_aux_loss_coef": Probe(0.5, model="experts"), "disable_dropout": Probe(True, model="dropout"), "cast_lm_head_to_fp32": Probe(True),
    "remove_unused_columns": DATA, "num_generations": Probe(4), "num_generations_eval": DATA, "max_completion_length": Probe(4),
    "ds3_gather_for_generation": ENGINE, "shuffle_dataset": Probe(False), "pad_to_multiple_of": Probe(8), "generation_batch_size": Probe(8),
    "steps_per_generation": Probe(2), "temperature": Probe(0.7), "top_p": Probe(0.8), "top_k": Probe(5), "min_p": Probe(0.5),
    "generation_kwargs": Probe({"num_beams": 1, "typical_p": 0.8}), "chat_template_kwargs": DATA, "repetition_penalty": Probe(1.5),
    "cache_implementation": GENERATION, "use_vllm": ENGINE, "vllm_mode": ENGINE, "vllm_model_impl": ENGINE, "vllm_enable_sleep_mode": ENGINE,
    "vllm_structured_outputs_regex": ENGINE, "vllm_server_base_url": ENGINE, "vllm_server_host": ENGINE, "vllm_server_port": ENGINE,
    "vllm_server_timeout": ENGINE, "vllm_group_port": ENGINE, "vllm_gpu_memory_utilization": ENGINE, "vllm_max_model_length": ENGINE,
    "vllm_tensor_parallel_size": ENGINE, "beta": Probe(0.2), "num_iterations": Probe(2), "epsilon": Probe(0.001, TWICE),
    "delta": Probe(1.001, TWICE), "epsilon_high": Probe(0.0005, {**TWICE, "epsilon": 0.001}),
    "sapo_temperature_neg": Probe(3.0, {**TWICE, "loss_type": "sapo"}), "sapo_temperature_pos": Probe(3.0, {**TWICE, "loss_type": "sapo"}),
    **{name: Probe(1.7, {**TWICE, "loss_type": "vespo"}) for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")},
    "importance_sampling_level": Probe("sequence", TWICE), "reward_weights": Probe([0.2, 0.8]),
    "multi_objective_aggregation": Probe("normalize_then_sum", {"reward_weights": [0.2, 0.8]}), "scale_rewards": Probe("batch"),
    "loss_type": Probe("grpo"), "mask_truncated_completions": Probe(True), "sync_ref_model": Probe(True, {**KL, "ref_model_sync_steps": 2}),
    "ref_model_mixup_alpha": Probe(0.2, {**KL, **SYNCED}), "ref_model_sync_steps": Probe(1, ONE),
    "top_entropy_quantile": Probe(0.4), "entropy_coef": Probe(0.2), "use_adaptive_entropy": Probe(True, {"entropy_coef": 0.2, "entropy_target": 4.0}),
    "entropy_coef_min": Probe(0.15, {**BONUS, "entropy_target": 3.165, "entropy_coef": 0.2, "entropy_coef_delta": 0.19}),
    "entropy_coef_max": Probe(0.05, {**BONUS, "entropy_coef": 0.01, "entropy_coef_delta": 0.3}),
    "entropy_coef_delta": Probe(0.1, BONUS), "entropy_target": Probe(4.0, {"use_adaptive_entropy": True, "entropy_coef": 0.2}),
    "max_tool_calling_iterations": GENERATION, "vllm_importance_sampling_correction": Probe(False, IS, rollout=True),
    "vllm_importance_sampling_mode": Probe("token_mask", {"vllm_importance_sampling_clip_max": 1.2}, rollout=True),
    "vllm_importance_sampling_clip_max": Probe(1.05, {"vllm_importance_sampling_mode": "token_truncate"}, rollout=True),
    "vllm_importance_sampling_clip_min": Probe(0.9, MASKED, rollout=True),
    "off_policy_mask_threshold": Probe(0.0001, TWICE), "use_bias_correction_kl": Probe(False, {**TWICE, "beta": 2.0, "learning_rate": 3e-2}),
    "log_completions": LOGGING, "log_multimodal": LOGGING, "num_completions_to_print": LOGGING, "log_unique_prompts": LOGGING,
    "log_completions_hub_repo": LOGGING, "use_transformers_continuous_batching": GENERATION, "transformers_continuous_batching_config": GENERATION,
    "use_transformers_paged": GENERATION, "vllm_importance_sampling_cap": "deprecated name of vllm_importance_sampling_clip_max",
}  # fmt: skip

TABLES = {"dpo": DPO, "kto": KTO, "grpo": GRPO}


def own_fields(trainer: str) -> list[str]:
    """What TRL's config adds to transformers', or gives another default."""
    import trl
    from transformers import TrainingArguments
    from trl.trainer.base_config import _BaseConfig

    config = getattr(trl, f"{trainer.upper()}Config")
    kept = {*TrainingArguments.__dataclass_fields__, *_BaseConfig.__dataclass_fields__}
    added = [name for name in config.__dataclass_fields__ if name not in kept]
    return [*added, *(name for name in vars(config)["__annotations__"] if name in kept)]
