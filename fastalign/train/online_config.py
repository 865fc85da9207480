"""The settings of the methods that learn from the policy's own samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastalign.train.config import LossConfig
from fastalign.train.errors import UserError
from fastalign.train.settings import NOT_BELOW_0, POSITIVE, SHARE, setting

# Settings of published pipelines (`--preset`); what a flag gives goes before them.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    # Ouyang et al. 2022, arXiv 2203.02155
    "instructgpt": {"kl_coef": 0.02, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0, "value_clip": 0.2, "entropy_coef": 0.0,
                    "ptx_coef": 27.8},
    # Bai et al. 2022, arXiv 2204.05862
    "anthropic_hh": {"kl_coef": 0.001, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0, "entropy_coef": 0.0},
    # Zhong et al. 2024, arXiv 2404.18922
    "rto": {"kl_coef": 0.01, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0, "dpo_coef": 0.05, "dpo_clip": 0.05, "reward_clip": 10.0},
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OnlineConfig(LossConfig):
    """Settings of the methods that learn from the policy's own samples. None: the method's own default
    (`OnlineMethod` fills it in)."""

    # Common settings that mean something of their own here
    data: str | None = setting(
        None, "required: prompts, one JSON object per line (docs/training_online.md)", metavar="FILE"
    )
    batch_size: int = setting(
        32, "prompts per step; a step samples responses to them, scores these and learns from them", POSITIVE
    )
    overlong: str = setting(
        "error",
        "what to do with a prompt that leaves no room for --max-new-tokens in --max-length or "
        "--tokens-per-batch: stop, leave it out, or "
        "cut its start",
        choices=("error", "drop", "truncate_prompt"),
    )
    loss_options: dict[str, Any] = setting(
        {},
        "an option of the loss, for example --set clip_high=0.28 (repeatable)",
        flag="--set",
        metavar="OPTION=VALUE",
    )

    # Reward
    reward_model: str | None = setting(
        None,
        "this, --reward or --judge is required (or --preference, where the method has it): directory of a reward "
        "model (sequence classifier with one label)",
        metavar="DIR",
    )
    reward: str | None = setting(
        None,
        "reward function of your own, imported and run: function(completions=[...], prompts=[...], and the "
        "data's other columns) -> a "
        "number per completion",
        metavar="MODULE:FUNCTION",
    )
    judge: str | None = setting(
        None,
        "directory of a causal LM that is asked how good each response is, from 1 to 10; the reward is the mean "
        "of its answer's distribution, brought into [-1, 1] (direct RLAIF)",
        metavar="DIR",
    )
    reward_clip: float | None = setting(
        None, "rewards are clipped to at most this magnitude; default: not at all", POSITIVE
    )
    missing_eos_penalty: float | None = setting(
        None, "subtracted from the reward of a response that did not end by itself", NOT_BELOW_0
    )
    preference: str | None = setting(
        None,
        "in place of a reward: pairwise judge of your own, imported and run: function(prompts=[...], "
        "completions=[(first, second), ...], and the data's other columns) -> P(first is better) per pair",
        metavar="MODULE:FUNCTION",
    )

    # Pairs of samples
    pair_rule: str = setting(
        "max_min",
        "which samples for a prompt become pairs: the best with the worst, with a random other, with the "
        "second best, with every "
        "other (margin), or every two (all)",
        choices=("max_min", "max_random", "max_max", "margin", "all"),
    )
    pair_margin: float = setting(
        0.0, "a pair whose scores differ by no more is a tie and is dropped", NOT_BELOW_0
    )
    length_penalty: float = setting(
        0.0, "taken off a response's score per token of it, before pairs are made", NOT_BELOW_0
    )
    label_temperature: float = setting(
        1.0,
        "T of what a loss or method takes from two scores: P(first is better) = sigmoid(difference / T), and "
        "the difference / T itself "
        "as margin and target",
        POSITIVE,
    )
    optimism_coef: float = setting(
        1e-5,
        "alpha of XPO: weight of the log-prob of the reference's sample, which the loss lowers",
        NOT_BELOW_0,
    )
    mixture_coef: float = setting(
        0.5, "share of the reference in the geometric mixture that the opponent's samples come from", SHARE
    )

    # Sampling
    samples_per_prompt: int | None = setting(
        None,
        "responses sampled for each prompt; default: ppo, reinforce_pp, nash_md 1, online_dpo 2, rloo 4, grpo 8",
        POSITIVE,
    )
    max_new_tokens: int = setting(128, "longest response in tokens", POSITIVE)
    temperature: float = setting(1.0, "the policy samples, and is scored, at this temperature", POSITIVE)
    top_p: float = setting(
        1.0,
        "nucleus sampling; below 1 the samples are no longer the policy's own distribution, which scoring "
        "assumes",
        POSITIVE,
        SHARE,
    )
    top_k: int = setting(0, "sample among the most likely tokens only; 0: all of them", NOT_BELOW_0)
    sample_batch: int = setting(64, "responses that are generated at once", POSITIVE)

    # Updates
    preset: str | None = setting(
        None, f"settings of a published pipeline: {', '.join(PRESETS)}", choices=tuple(PRESETS)
    )
    minibatches: int | None = setting(
        None, "optimizer updates per pass over a step's samples; default: ppo 4, else 1", POSITIVE
    )
    rollout_epochs: int | None = setting(
        None, "passes over a step's samples; default: ppo 4, else 1", POSITIVE
    )
    target_kl: float | None = setting(
        None, "skip the rest of a step's updates once policy/approxkl exceeds 1.5 times this", POSITIVE
    )
    entropy_coef: float | None = setting(None, "weight of the entropy bonus; default: 0", NOT_BELOW_0)
    ptx_data: str | None = setting(
        None, 'texts to mix in by PPO-ptx, one {"text": ...} per line', metavar="FILE"
    )
    ptx_coef: float | None = setting(
        None,
        "weight of the mean token loss on --ptx-data; default: 0, of --preset instructgpt 27.8",
        NOT_BELOW_0,
    )
    ptx_batch: int = setting(8, "texts of --ptx-data per update", POSITIVE)

    # KL to the reference
    kl_coef: float | None = setting(
        None,
        "weight of the KL to the reference; default: nash_md 0.1, ppo, rloo 0.05, reinforce_pp 0.01, grpo 0",
        NOT_BELOW_0,
    )
    kl_in: str | None = setting(
        None,
        "whether the KL is taken off the reward or added to the loss; default: grpo loss, else reward",
        choices=("reward", "loss"),
    )
    kl_kind: str | None = setting(
        None,
        "estimator of the KL: k1, k2, k3, abs; in the loss also k3+; default: grpo k3, else k1",
        choices=("k1", "k2", "k3", "abs", "k3+"),
    )
    kl_target: float | None = setting(
        None,
        "adapt --kl-coef so that the KL per response (in nats) comes to this; default: --kl-coef is fixed",
        POSITIVE,
    )
    kl_horizon: float = setting(10_000.0, "responses over which the adaptation takes place", POSITIVE)

    # Advantages per token
    gamma: float | None = setting(None, "discount per token; default: 1", SHARE)
    lam: float | None = setting(None, "decay of generalised advantage estimation; default: 0.95", SHARE)
    vf_coef: float | None = setting(None, "weight of the value loss; default: 0.1", NOT_BELOW_0)
    value_clip: float | None = setting(
        None, "a value may move this far in the value loss; 0: any distance; default: 0.2", NOT_BELOW_0
    )
    bootstrap_truncated: bool = setting(
        False, "a response that was cut off is worth what the value head expects after its last token, not 0"
    )
    whiten_rewards: bool = setting(
        False, "divide the rewards per token by their standard deviation over the step (their mean stays)"
    )
    dpo_model: str | None = setting(
        None,
        "directory of a DPO-trained model whose log-ratio to the reference is a reward per token (RTO)",
        metavar="DIR",
    )
    dpo_coef: float | None = setting(None, "weight of that reward; default: 0.05", POSITIVE)
    dpo_clip: float | None = setting(
        None, "largest magnitude of that reward per token, after weighting; default: 0.05", POSITIVE
    )

    # Groups of samples for one prompt
    scale_rewards: bool = setting(
        True, "divide by the standard deviation of the group's rewards (--loss dr_grpo: never)"
    )
    overlong_buffer: int = setting(
        0,
        "the last tokens of --max-new-tokens over which the reward falls linearly by 1 (DAPO); 0: none",
        NOT_BELOW_0,
    )
    drop_equal_groups: bool = setting(
        False,
        "leave groups whose scores are all equal, before any penalty, out of the loss and its denominators "
        "(DAPO)",
    )
    mask_truncated: bool = setting(
        False, "leave responses that were cut off out of the loss and its denominators (DAPO)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < 1e-6:  # logits divided by it must stay within float32
            raise UserError(f"--temperature is {self.temperature}: it must be at least 1e-6")
        if self.overlong_buffer > self.max_new_tokens:
            raise UserError(
                f"--overlong-buffer {self.overlong_buffer} exceeds --max-new-tokens {self.max_new_tokens}"
            )
