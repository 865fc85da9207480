"""Training a policy on its own samples with any of the online methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fastalign.train.data.prompts import load_prompts, load_texts, sequence_limit
from fastalign.train.errors import UserError
from fastalign.train.loop import TrainResult
from fastalign.train.methods import METHODS, check_kind, make_method
from fastalign.train.methods.online import OnlineMethod
from fastalign.train.models import packed as models
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.models.reference import check_mixable
from fastalign.train.online_config import OnlineConfig
from fastalign.train.sampling.actor import Actor
from fastalign.train.sampling.rewards import FunctionPreference, make_reward
from fastalign.train.sampling.rollout import Sampler
from fastalign.train.session import Session


def train_online(
    method: str,
    config: OnlineConfig,
    *,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    reward: Callable[..., Any] | None = None,
    preference: Callable[..., Any] | None = None,
    prompts: Iterable[Any] | None = None,
    eval_prompts: Iterable[Any] | None = None,
    texts: Iterable[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a model by one of the online methods.

    Args:
        method: a name of `fastalign.train.methods.METHODS` with an `OnlineConfig`: ppo, grpo, rloo, ...
        config: the settings. `output` is always needed; `model`, `data` and a reward unless they are given in
            memory.
        model, tokenizer: in place of `config.model`; the model is trained where it is, in float32.
        reward: in place of `config.reward`, called in the same way (see
            `fastalign.train.sampling.rewards.FunctionReward`).
        preference: in place of `config.preference`, likewise (see `FunctionPreference` there): of the methods that
            compare responses.
        prompts, eval_prompts: in place of the data files: rows with a "prompt" and any other columns.
        texts: in place of `config.ptx_data`.
        callback: called with every record (training and evaluation) as it is logged.

    Returns:
        TrainResult. The trained model, its tokenizer and (ppo) its value head are saved in `config.output`.

    Raises:
        UserError: anything wrong with settings, paths or data; before the first step.
        TrainingError: a gradient that is not finite; a reward function that fails, or returns what is no
            score.
    """
    check_kind(method, config, OnlineConfig)
    learner = make_method(method, config, texts_in_memory=texts is not None)
    config, compares = learner.config, "preference" in METHODS[method].settings
    if preference is not None and not compares:
        raise UserError(f"{method} learns from a reward: it takes no preference")
    with Session(learner, model, tokenizer) as session:
        tokenizer, positions = session.tokenizer, session.positions
        splits = load_prompts(config, tokenizer, positions, prompts, eval_prompts)
        mixed_in = (
            load_texts(config, tokenizer, positions, texts, stops=session.stops) if config.ptx_coef else []
        )
        limit = sequence_limit(config, positions)
        session.check_beside(limit)
        everything = [*splits[0], *splits[1], *mixed_in]
        responses = min(limit, config.max_new_tokens + max(len(e.prompt) for split in splits for e in split))
        longest = max([responses, *(text.tokens() for text in mixed_in)])
        pack = min(config.tokens_per_batch, longest * config.batch_size * config.samples_per_prompt)
        lengths = models.Lengths(longest, pack)
        sources = {"function": reward, "preference": preference, "compares": compares}
        score = make_reward(config, tokenizer, limit, config.device, **sources, lengths=lengths)
        score.check([*splits[0], *splits[1]])
        lm = session.open(lengths, everything)
        actor = Actor(lm, config.temperature)
        learner.start(actor, score, None if model is not None else config.model)
        known = [torch.tensor([number for number in models.token_ids(tokenizer) if number < lm.vocabulary()])]
        actor.dpo = session.beside("dpo_model", known) if config.dpo_model is not None else None
        actor.reference = _reference(learner, session, known)
        lm.check_generation(responses)
        if learner.samples_reference or isinstance(score, FunctionPreference):
            actor.reference.check_generation(responses)
        frozen = {
            "ref_model": actor.reference,
            "dpo_model": actor.dpo,
            "reward_model": getattr(score, "scorer", None),
        }
        vocabulary = min((other.vocabulary() for other in frozen.values() if other is not None), default=None)
        frozen["judge"] = getattr(score, "judge_lm", None)  # it reads texts, by its own vocabulary
        sampler = Sampler(lm, tokenizer, config, vocabulary)
        learner.begin(actor, sampler, score, *splits, mixed_in)
        return session.fit(learner, frozen, callback)


def _reference(
    method: OnlineMethod, session: Session, known: Sequence[torch.Tensor]
) -> PackedCausalLM | None:
    """The model that the policy is held to: --ref-model, or a copy of the policy as it is now, where anything
    asks for one. It knows every token that the tokenizer gives, which are those that are sampled; rows of the
    vocabulary beyond them may differ in number, if a tokenizer of its own says that they are beyond."""
    lm, config = session.lm, method.config
    if config.ref_model is None:
        return lm.frozen_copy() if method.needs_reference else None
    reference = session.beside("ref_model", known)
    if config.ref_update_every:
        check_mixable(reference, lm)
    return reference
