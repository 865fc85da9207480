"""What `PackedDPOTrainer` refuses of TRL's arguments, before any work: one line that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin
from trl import DPOConfig

from fastalign.adapters.common import AdapterError
from fastalign.adapters.preset import PresetLoss

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
UNWEIGHTED = (
    "hinge",
    "sft",
)  # TRL's in-place product with the weights fails: of a relu, of an expanded scalar
# Fields that say what a loss_type is. A preset has options of its own.
OF_LOSS_TYPE = (
    "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
    "label_smoothing", "beta",
    "use_weighting", "discopop_tau",
)  # fmt: skip
# Field -> why packed sequences cannot honour it. Refused where it is set to anything but nothing.
REFUSED = {
    "fsdp": "the models are tried in one piece; legal: data parallel training",
    "fsdp_config": "the models are tried in one piece; legal: data parallel training",
    "deepspeed": "the models are tried in one piece; legal: data parallel training",
    "torch_compile": "every batch has another number of tokens; legal: False",
    "torch_compile_backend": "every batch has another number of tokens; legal: None",
    "torch_compile_mode": "every batch has another number of tokens; legal: None",
    "use_liger_kernel": "its layers were not tried on packed sequences; legal: False",
    "neftune_noise_alpha": "its noise depends on the padded length, which there is none; legal: None",
    "pad_to_multiple_of": "nothing is padded; legal: None, 'auto'",
}


def check_config(config: DPOConfig, preset: PresetLoss | None) -> None:
    """Refuse what cannot be honoured, and what TRL itself would refuse only at the first step."""
    for name, why in REFUSED.items():
        value = getattr(config, name, None)
        if value and not (
            name == "fsdp_config" and not config.fsdp
        ):  # it has entries of its own without fsdp
            raise AdapterError(f"{name}={value!r} cannot be honoured: {why}")
    parallel = getattr(config, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size", "dp_shard_size"):
        if parallel is not None and (getattr(parallel, name, 1) or 1) > 1:
            raise AdapterError(
                f"parallelism_config.{name}={getattr(parallel, name)} cannot be honoured; legal: 1"
            )
    wrong = [name for name in config.loss_type if name not in LOSS_TYPES]
    if wrong:
        raise AdapterError(f"loss_type={wrong[0]!r} is unknown; legal: {', '.join(LOSS_TYPES)}; or a preset=")
    if config.f_divergence_type not in DIVERGENCES:
        raise AdapterError(
            f"f_divergence_type={config.f_divergence_type!r} is unknown; legal: {', '.join(DIVERGENCES)}"
        )
    if config.ld_alpha is not None and not 0 <= config.ld_alpha <= 1:
        raise AdapterError(f"ld_alpha={config.ld_alpha!r} must be None or in [0, 1]")
    if config.truncation_mode not in ("keep_start", "keep_end"):
        raise AdapterError(
            f"truncation_mode={config.truncation_mode!r} is unknown; legal: keep_start, keep_end"
        )
    unweighted = [name for name in config.loss_type if name in UNWEIGHTED]
    if config.use_weighting and unweighted:
        raise AdapterError(
            f"use_weighting=True with loss_type={unweighted[0]!r}: TRL writes weights over what its backward needs"
        )
    if preset is not None:
        _check_beside(config, preset)


def _check_beside(config: DPOConfig, preset: PresetLoss) -> None:
    """What the preset replaces must be left alone."""
    for field in dataclasses.fields(DPOConfig):
        if field.name not in OF_LOSS_TYPE:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if (value := getattr(config, field.name)) != default:
            raise AdapterError(
                f"{field.name}={value!r} is of TRL's loss_type, and preset={preset.name!r} takes its place; "
                "legal: either; a preset has preset_options"
            )
    if not preset.needs_reference:
        for name in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(config, name):
                raise AdapterError(f"{name}=True: preset={preset.name!r} has no reference; legal: False")
    if config.precompute_ref_log_probs and preset.needs_tokens:
        raise AdapterError(
            f"precompute_ref_log_probs=True keeps one number per response, and preset={preset.name!r} needs the "
            "reference's tokens; legal: False"
        )


def check_inputs(given: Mapping[str, Any], preset: PresetLoss | None) -> None:
    """The other arguments of DPOTrainer."""
    config = given.get("args")
    if config is not None and not isinstance(config, DPOConfig):
        raise AdapterError(f"args is of the type {type(config).__name__}; legal: trl.DPOConfig")
    if preset is not None and not preset.needs_reference and given.get("ref_model") is not None:
        raise AdapterError(f"ref_model is given, and preset={preset.name!r} has no reference; legal: None")
    if isinstance(given.get("processing_class"), ProcessorMixin):
        raise AdapterError("processing_class is of a vision model; PackedDPOTrainer takes text alone")
    for what, model in (("model", given.get("model")), ("ref_model", given.get("ref_model"))):
        spread = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(spread) > 1:
            raise AdapterError(f"{what} is spread over {', '.join(sorted(spread))}; legal: one device")
        if any(
            getattr(c, "is_prompt_learning", False)
            for c in (getattr(model, "peft_config", None) or {}).values()
        ):
            raise AdapterError(
                f"{what} has virtual tokens (prompt learning), which every packed sequence would need"
            )
    if getattr(given.get("peft_config"), "is_prompt_learning", False):
        raise AdapterError(
            "peft_config makes virtual tokens (prompt learning), which every packed sequence would need"
        )
    sets = {"train_dataset": given.get("train_dataset"), "eval_dataset": given.get("eval_dataset")}
    if isinstance(sets["eval_dataset"], dict):
        sets |= {f"eval_dataset[{name!r}]": each for name, each in sets.pop("eval_dataset").items()}
    for what, data in sets.items():
        sample = next(iter(data), None) if data is not None else None
        if sample is None:
            continue
        if images := [name for name in ("image", "images") if name in sample]:
            raise AdapterError(f"{what} has the column {images[0]!r}; PackedDPOTrainer takes text alone")
        missing = [name for name in (preset.columns if preset is not None else ()) if name not in sample]
        if missing:
            raise AdapterError(
                f"{what} has no column {missing[0]!r}, the number of every pair that preset={preset.name!r} needs"
            )
