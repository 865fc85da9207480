"""The settings of the online methods."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastalign.train.config import RunConfig, check_settings, flag_of, setting
from fastalign.train.errors import UserError
from fastalign.train.methods.online import METHODS, PRESETS


@dataclasses.dataclass(frozen=True)
class OnlineConfig(RunConfig):
    """Settings of the methods that learn from the policy's own samples. None: the method's own default (`resolve` fills it in)."""

    # Common settings that mean something of their own here
    data: str | None = setting(None, "required: prompts, one JSON object per line (docs/training_online.md)", metavar="FILE")
    batch_size: int = setting(32, "prompts per step; a step samples responses to them, scores these and learns from them")
    overlong: str = setting(
        "error",
        "what to do with a prompt that leaves no room for --max-new-tokens in --max-length or --tokens-per-batch: stop, leave it out, or "
        "cut its start",
        choices=("error", "drop", "truncate_prompt"),
    )

    # Reward
    reward_model: str | None = setting(
        None, "this or --reward is required: directory of a reward model (sequence classifier with one label)", metavar="DIR"
    )
    reward: str | None = setting(
        None,
        "reward function of your own, imported and run: function(completions=[...], prompts=[...], and the data's other columns) -> a "
        "number per completion",
        metavar="MODULE:FUNCTION",
    )
    reward_clip: float | None = setting(None, "rewards are clipped to at most this magnitude; default: not at all")
    missing_eos_penalty: float | None = setting(None, "subtracted from the reward of a response that did not end by itself")
    ref_model: str | None = setting(None, "directory of the reference model; default: the weights that training starts from", metavar="DIR")
    ref_update_every: int = setting(0, "steps after which the reference takes over the policy's weights (iterative training); 0: never")
    ref_mix: float = setting(1.0, "share of the policy in the updated reference, the rest stays (TR-DPO: 0.6)")

    # Sampling
    samples_per_prompt: int | None = setting(
        None, "responses sampled for each prompt; default: ppo, reinforce_pp 1, online_dpo 2, rloo 4, grpo 8"
    )
    max_new_tokens: int = setting(128, "longest response in tokens")
    temperature: float = setting(1.0, "the policy samples, and is scored, at this temperature")
    top_p: float = setting(1.0, "nucleus sampling; below 1 the samples are no longer the policy's own distribution, which scoring assumes")
    top_k: int = setting(0, "sample among the most likely tokens only; 0: all of them")
    sample_batch: int = setting(64, "responses that are generated at once")

    # Updates
    preset: str | None = setting(None, f"settings of a published pipeline: {', '.join(PRESETS)}", choices=tuple(PRESETS))
    loss: str | None = setting(None, "name of the loss; default: the method's own; an unknown name lists the legal ones", metavar="NAME")
    loss_options: dict[str, Any] = setting(
        {}, "an option of the loss, for example --set clip_high=0.28 (repeatable)", flag="--set", metavar="OPTION=VALUE"
    )
    minibatches: int | None = setting(None, "optimizer updates per pass over a step's samples; default: ppo 4, else 1")
    rollout_epochs: int | None = setting(None, "passes over a step's samples; default: ppo 4, else 1")
    target_kl: float | None = setting(None, "skip the rest of a step's updates once policy/approxkl exceeds 1.5 times this")
    entropy_coef: float | None = setting(None, "weight of the entropy bonus; default: 0")
    ptx_data: str | None = setting(None, 'texts to mix in by PPO-ptx, one {"text": ...} per line', metavar="FILE")
    ptx_coef: float | None = setting(None, "weight of the mean token loss on --ptx-data; default: 0, of --preset instructgpt 27.8")
    ptx_batch: int = setting(8, "texts of --ptx-data per update")

    # KL to the reference
    kl_coef: float | None = setting(None, "weight of the KL to the reference; default: ppo, rloo 0.05, reinforce_pp 0.01, grpo 0")
    kl_in: str | None = setting(
        None, "whether the KL is taken off the reward or added to the loss; default: grpo loss, else reward", choices=("reward", "loss")
    )
    kl_kind: str | None = setting(
        None,
        "estimator of the KL: k1, k2, k3, abs; in the loss also k3+; default: grpo k3, else k1",
        choices=("k1", "k2", "k3", "abs", "k3+"),
    )
    kl_target: float | None = setting(
        None, "adapt --kl-coef so that the KL per response (in nats) comes to this; default: --kl-coef is fixed"
    )
    kl_horizon: float = setting(10_000.0, "responses over which the adaptation takes place")

    # Advantages per token
    gamma: float | None = setting(None, "discount per token; default: 1")
    lam: float | None = setting(None, "decay of generalised advantage estimation; default: 0.95")
    vf_coef: float | None = setting(None, "weight of the value loss; default: 0.1")
    value_clip: float | None = setting(None, "a value may move this far in the value loss; 0: any distance; default: 0.2")
    bootstrap_truncated: bool = setting(
        False, "a response that was cut off is worth what the value head expects after its last token, not 0"
    )
    whiten_rewards: bool = setting(False, "divide the rewards per token by their standard deviation over the step (their mean stays)")
    dpo_model: str | None = setting(
        None, "directory of a DPO-trained model whose log-ratio to the reference is a reward per token (RTO)", metavar="DIR"
    )
    dpo_coef: float | None = setting(None, "weight of that reward; default: 0.05")
    dpo_clip: float | None = setting(None, "largest magnitude of that reward per token, after weighting; default: 0.05")

    # Groups of samples for one prompt
    scale_rewards: bool = setting(True, "divide by the standard deviation of the group's rewards (--loss dr_grpo: never)")
    overlong_buffer: int = setting(0, "the last tokens of --max-new-tokens over which the reward falls linearly by 1 (DAPO); 0: none")
    drop_equal_groups: bool = setting(
        False, "leave groups whose scores are all equal, before any penalty, out of the loss and its denominators (DAPO)"
    )
    mask_truncated: bool = setting(False, "leave responses that were cut off out of the loss and its denominators (DAPO)")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("samples_per_prompt", "max_new_tokens", "temperature", "top_p", "sample_batch", "minibatches", "rollout_epochs",
                    "target_kl", "kl_target", "kl_horizon", "reward_clip", "dpo_coef", "dpo_clip", "ptx_batch")  # fmt: skip
        not_negative = ("top_k", "kl_coef", "vf_coef", "value_clip", "entropy_coef", "ptx_coef", "missing_eos_penalty", "overlong_buffer",
                        "ref_update_every")  # fmt: skip
        for names, legal, fits in ((positive, "positive", lambda x: x > 0), (not_negative, "not negative", lambda x: x >= 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and fits(value)):
                    raise UserError(f"{flag_of(name, type(self))} is {value}: it must be {legal}")
        if self.temperature < 1e-6:  # logits divided by it must stay within float32
            raise UserError(f"--temperature is {self.temperature}: it must be at least 1e-6")
        for name in ("top_p", "gamma", "lam", "ref_mix"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise UserError(f"{flag_of(name, type(self))} is {value}: it must lie in [0, 1]")
        if self.overlong_buffer > self.max_new_tokens:
            raise UserError(f"--overlong-buffer {self.overlong_buffer} exceeds --max-new-tokens {self.max_new_tokens}")


def resolve(method: str, config: OnlineConfig, texts_in_memory: bool = False) -> OnlineConfig:
    """The configuration with the preset's and the method's values where none was given. Refuses settings that would have no effect."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; legal: {', '.join(METHODS)}")
    entry = METHODS[method]
    check_settings(config, entry.settings, f"fastalign train {method}")
    given = config
    defaults = {**entry.defaults, **PRESETS.get(config.preset or "", {})}
    if config.dpo_model is not None:
        defaults = {"dpo_coef": 0.05, "dpo_clip": 0.05, **defaults}
    config = dataclasses.replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})
    if config.kl_target is not None and not config.kl_coef:
        raise UserError("--kl-target adapts --kl-coef, which must not be 0 then")
    if config.kl_target is None and config.kl_horizon != OnlineConfig.kl_horizon:
        raise UserError("--kl-horizon has no effect without --kl-target")
    if not config.kl_coef and (given.kl_in is not None or given.kl_kind is not None):
        raise UserError("--kl-in and --kl-kind have no effect with --kl-coef 0")
    if config.kl_kind == "k3+" and config.kl_in == "reward":
        raise UserError("--kl-kind k3+ differs from k3 in its gradient only, and a reward has none; choose k3, or --kl-in loss")
    has_texts = texts_in_memory or config.ptx_data is not None
    if config.ptx_coef and not has_texts:
        raise UserError(f"--ptx-coef is {config.ptx_coef:g}, so texts are needed: give --ptx-data, or --ptx-coef 0")
    if (has_texts or config.ptx_batch != OnlineConfig.ptx_batch) and not config.ptx_coef:
        raise UserError("--ptx-data and --ptx-batch have no effect without --ptx-coef")
    if config.dpo_model is None and (config.dpo_coef is not None or config.dpo_clip is not None):
        raise UserError("--dpo-coef, --dpo-clip and --preset rto weigh the reward of --dpo-model, which is missing")
    if method in ("grpo", "rloo", "online_dpo") and config.samples_per_prompt < 2:
        raise UserError(
            f"{method} compares samples for the same prompt: --samples-per-prompt must be at least 2, not {config.samples_per_prompt}"
        )
    if config.ref_update_every and not (config.kl_coef or config.ref_model or config.dpo_model or method == "online_dpo"):
        raise UserError("--ref-update-every: without --kl-coef or --ref-model there is no reference to update")
    if config.ref_mix != 1.0 and not config.ref_update_every:
        raise UserError("--ref-mix has no effect without --ref-update-every")
    responses = config.batch_size * config.samples_per_prompt
    if given.minibatches is not None and given.minibatches > responses:
        raise UserError(f"--minibatches {given.minibatches} exceeds the {responses} responses of a step")
    return config
