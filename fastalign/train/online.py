"""Training a policy on its own samples with any of the online methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastalign.train import checkpoint
from fastalign.train.config import check_kind
from fastalign.train.data.prompts import load_prompts, load_texts, sequence_limit
from fastalign.train.errors import UserError
from fastalign.train.loop import Run, TrainResult
from fastalign.train.methods import METHODS as OFFLINE
from fastalign.train.methods.online_dpo import OnlineDPOTask, make_learner
from fastalign.train.methods.policy_gradient import PolicyGradientTask, resolve_loss
from fastalign.train.models import packed as models
from fastalign.train.models.heads import ValueHead
from fastalign.train.models.reference import weights_of
from fastalign.train.models.scorer import score_head
from fastalign.train.offline import check_one_process, check_vocabulary
from fastalign.train.online_config import OnlineConfig, resolve
from fastalign.train.sampling.actor import Actor
from fastalign.train.sampling.rewards import ModelReward, make_reward
from fastalign.train.sampling.rollout import Sampler


def train_online(
    method: str,
    config: OnlineConfig,
    *,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    reward: Callable[..., Any] | None = None,
    prompts: Iterable[Any] | None = None,
    eval_prompts: Iterable[Any] | None = None,
    texts: Iterable[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a model by one of the online methods.

    Args:
        method: ppo, grpo, rloo, reinforce_pp or online_dpo.
        config: the settings. `output` is always needed; `model`, `data` and a reward unless they are given in memory.
        model, tokenizer: in place of `config.model`; the model is trained where it is, in float32.
        reward: in place of `config.reward`, called in the same way (see `fastalign.train.sampling.rewards.FunctionReward`).
        prompts, eval_prompts: in place of the data files: rows with a "prompt" and any other columns.
        texts: in place of `config.ptx_data`.
        callback: called with every record (training and evaluation) as it is logged.

    Returns:
        TrainResult. The trained model, its tokenizer and (ppo) its value head are saved in `config.output`.

    Raises:
        UserError: anything wrong with settings, paths or data; before the first step.
        TrainingError: a gradient that is not finite; a reward function that fails, or returns what is no score.
    """
    check_kind("train_online", method, config, OnlineConfig, ("train", "TrainConfig", OFFLINE))
    config = resolve(method, config, texts is not None)
    check_one_process()
    models.check_device(config.device)
    (make_learner(config) if method == "online_dpo" else resolve_loss(method, config))  # refuses a wrong --loss before anything is loaded
    if model is None and config.model is None:
        raise UserError("--model is missing: it names the directory of the model to train")
    trust = {"trust_remote_code": config.trust_remote_code}
    if tokenizer is None:
        tokenizer = models.load_tokenizer(config.model, **trust)
    model_config = model.config if model is not None else models.load_config(config.model, **trust)
    output = checkpoint.check_output(config)
    positions = models.max_positions(model_config)
    splits = load_prompts(config, tokenizer, positions, prompts, eval_prompts)
    stops = models.load_stops(config.model, model_config, model)
    mixed_in = load_texts(config, tokenizer, positions, texts, stops=stops) if config.ptx_coef else []
    limit = sequence_limit(config, positions)
    for flag, directory in (("--ref-model", config.ref_model), ("--dpo-model", config.dpo_model)):
        if directory is not None:
            models.check_companion(flag, directory, tokenizer, limit, **trust)
    responses = min(limit, config.max_new_tokens + max(len(example.prompt) for split in splits for example in split))
    longest = max([responses, *(text.tokens() for text in mixed_in)])
    lengths = models.Lengths(longest, min(config.tokens_per_batch, longest * config.batch_size * config.samples_per_prompt))
    score = make_reward(config, tokenizer, limit, config.device, reward, lengths=lengths)
    score.check([*splits[0], *splits[1]])
    options = {"attention": config.attention, "dtype": config.dtype, "device": config.device, "lengths": lengths}
    lm = models.PackedCausalLM(model if model is not None else models.load_model(config.model, **trust), **options)
    try:
        check_vocabulary([*splits[0], *splits[1], *mixed_in], lm, "model")
        actor = Actor(lm, config.temperature)
        if method == "ppo":
            actor.value_head = _value_head(lm, score, None if model is not None else config.model)
        actor.reference = _reference(method, config, lm, tokenizer)
        if config.dpo_model is not None:
            actor.dpo = _frozen(config.dpo_model, "DPO", config, lm, tokenizer)
        lm.check_generation(responses)
        beside = [other for other in (actor.reference, actor.dpo, getattr(score, "scorer", None)) if other is not None]
        sampler = Sampler(lm, tokenizer, config, min((other.vocabulary() for other in beside), default=None))
        parts = (method, config, actor, sampler, score, *splits)
        task = OnlineDPOTask(*parts) if method == "online_dpo" else PolicyGradientTask(*parts, texts=mixed_in)
        frozen = {"ref_model": actor.reference, "dpo_model": actor.dpo, "reward_model": getattr(score, "scorer", None)}
        named = {name: other.model for name, other in frozen.items() if getattr(config, name) is not None}
        weights = weights_of(config, {"model": lm.model, **named})
        with checkpoint.opened(output, config, method):
            return Run(config, output, lm, tokenizer, task, callback, weights).fit()
    finally:
        lm.restore()


def _reference(method: str, config: OnlineConfig, lm: models.PackedCausalLM, tokenizer: Any) -> models.PackedCausalLM | None:
    """The model that the policy is held to: --ref-model, or a copy of the policy as it is now, where anything asks for one."""
    if config.ref_model is not None:
        reference = _frozen(config.ref_model, "reference", config, lm, tokenizer)
        if config.ref_update_every and [p.shape for p in reference.model.parameters()] != [p.shape for p in lm.model.parameters()]:
            raise UserError("--ref-update-every: the reference model's weights do not have the policy's shapes")
        return reference
    return lm.frozen_copy() if method == "online_dpo" or config.kl_coef or config.dpo_model is not None else None


def _frozen(directory: str, what: str, config: OnlineConfig, lm: models.PackedCausalLM, tokenizer: Any) -> models.PackedCausalLM:
    """A model beside the policy. It knows every token that the tokenizer gives, which are those that are sampled; rows of the vocabulary beyond
    them may differ in number, if a tokenizer of its own says that they are beyond."""
    loaded = models.load_model(directory, trust_remote_code=config.trust_remote_code).requires_grad_(False)
    other = models.PackedCausalLM(loaded, attention=lm.attention, dtype=config.dtype, device=config.device, lengths=lm.lengths)
    known = [number for number in models.token_ids(tokenizer) if number < lm.vocabulary()]
    other.check_tokens(f"{what} model", [torch.tensor(known)])
    if other.vocabulary() != lm.vocabulary() and not models.has_tokenizer(directory):
        name = other.vocabulary_weight()[0]
        raise UserError(
            f"the {what} model's vocabulary has {other.vocabulary()} entries ({name}), the policy's {lm.vocabulary()}: without a tokenizer of its "
            "own it must have the same one"
        )
    return other


def _value_head(lm: models.PackedCausalLM, reward: Any, directory: str | None) -> ValueHead:
    """The value head that an earlier PPO run left beside the model in `directory`; else a new one: that of the reward model where its hidden
    states have the policy's size, or zeros."""
    size = lm.model.get_output_embeddings().weight.shape[1]
    head = ValueHead(size).to(lm.device)
    if directory is not None and head.load_beside(directory, method="ppo"):
        print(f"value head: that of the PPO run in {directory}")
        return head
    source = score_head(reward.scorer.model) if isinstance(reward, ModelReward) else None
    if source is not None and source.weight.shape == head.linear.weight.shape:
        with torch.no_grad():
            head.linear.weight.copy_(source.weight)
            if source.bias is not None:
                head.linear.bias.copy_(source.bias)
        print("value head: that of the reward model")
    return head
