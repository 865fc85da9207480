"""Where the rewards of sampled responses come from: a function of the user's, or a trained reward model."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from fastalign.runtime.checks import shown
from fastalign.train.data.examples import pack_examples
from fastalign.train.data.specials import SpecialTokens
from fastalign.train.data.tokenise import ExampleTokenizer, TokenExample
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.models import companions
from fastalign.train.models import packed as models
from fastalign.train.models.scorer import PackedScorer, load_scorer
from fastalign.train.online_config import OnlineConfig
from fastalign.train.sampling.rollout import Rollout

Reward = Callable[
    [Sequence[Rollout]], torch.Tensor
]  # [responses] float32 on the CPU; NaN: this one cannot be scored


class FunctionReward:
    """A Python function as the reward, called once per step with keyword arguments, lists with one entry per response:

        completions   the responses: texts, or [{"role": "assistant", "content": text}] for conversational prompts
        prompts       the prompts as the data has them
        ...           every other column of the data (None where a line lacks it)

    It may take any of them, or **columns. It returns a number per response; None or NaN: the response cannot
    be scored."""

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.name = function, name
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise UserError(f"--reward {name}: not a function whose arguments can be read") from None
        if any(p.kind is p.POSITIONAL_ONLY or p.kind is p.VAR_POSITIONAL for p in parameters):
            raise UserError(
                f"--reward {name}: the function is called with keyword arguments (completions, prompts, the "
                "data's columns) only"
            )
        self.everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.accepted = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        self.required = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}

    def check(self, rows: Sequence[Any]) -> None:
        """Refuse data without a column that the function needs."""
        for name in sorted(self.required - {"completions", "prompts"}):
            if not any(name in row.values for row in rows):
                raise UserError(
                    f"--reward {self.name}: the function needs the column '{name}', which no line of the data "
                    "has"
                )

    def __call__(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        rows = [rollout.example.values for rollout in rollouts]
        chat = [isinstance(row["prompt"], list) for row in rows]
        texts = [
            [{"role": "assistant", "content": r.text}] if turn else r.text for r, turn in zip(rollouts, chat)
        ]
        columns = {
            name: [row.get(name) for row in rows]
            for name in {name: None for row in rows for name in row}
            if name != "prompt"
        }
        arguments = {**columns, "prompts": [row["prompt"] for row in rows], "completions": texts}
        try:
            values = self.function(
                **{
                    name: value
                    for name, value in arguments.items()
                    if self.everything or name in self.accepted
                }
            )
            numbers = _numbers(values)
        except Exception as error:  # the user's own code
            raise TrainingError(f"--reward {self.name}: {type(error).__name__}: {error}") from error
        if len(numbers) != len(rollouts):
            raise TrainingError(
                f"--reward {self.name} returned {len(numbers)} values for {len(rollouts)} completions"
            )
        scores = torch.tensor(numbers, dtype=torch.float64)
        beyond = scores.isfinite() & ~scores.float().isfinite()
        if beyond.any():
            raise TrainingError(
                f"--reward {self.name} returned {float(scores[beyond][0])}: rewards are kept in float32, "
                "which ends at 3.4e38"
            )
        return scores.float()


def _numbers(values: Any) -> list[float]:
    """What a reward function returned, one number per response. Only what is in an order and holds numbers:
    the keys of a dict and the characters of a text can be read as numbers, too."""
    if (
        isinstance(values, (str, bytes, Mapping, Set))
        or not isinstance(values, Iterable)
        and not isinstance(values, torch.Tensor)
    ):
        raise TypeError(
            f"it returned {shown(values)}; legal: a list with a number, None or NaN per completion"
        )
    if isinstance(getattr(values, "ndim", 1), int) and getattr(values, "ndim", 1) != 1:
        raise TypeError(
            f"it returned an array of shape {tuple(values.shape)}; legal: one number per completion, in one "
            "dimension"
        )
    numbers = []
    for value in values.detach() if isinstance(values, torch.Tensor) else values:
        if value is not None and not hasattr(value, "__float__"):  # a text of digits has none, either
            raise ValueError(
                f"could not convert {shown(value)}, returned for completion {len(numbers)}; legal: a number, "
                "None or NaN"
            )
        numbers.append(math.nan if value is None else float(value))
    return numbers


class ModelReward:
    """A trained reward model. It reads the very tokens that were sampled, except for the last one of a
    response that came to an end: that is the token which the trainer's data end with for such a prompt, since
    there the score was trained. A model may have several ways to stop."""

    def __init__(self, scorer: PackedScorer, budget: int, special: SpecialTokens):
        self.scorer, self.budget, self.special = scorer, budget, special

    def check(self, rows: Sequence[Any]) -> None: ...

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        scores = torch.empty(len(rollouts))
        for batch in pack_examples(
            [self._as_trained(rollout) for rollout in rollouts], range(len(rollouts)), self.budget
        ):
            scores[batch.members] = self.scorer.scores(self.scorer.to_device(batch.packed)).float().cpu()
        if not scores.isfinite().all():
            bad = scores[~scores.isfinite()]
            raise TrainingError(
                f"--reward-model: {len(bad)} of {len(scores)} scores are not finite; the first is "
                f"{float(bad[0])}"
            )
        return scores

    def _as_trained(self, rollout: Rollout) -> TokenExample:
        example = rollout.example
        if not rollout.ended:
            return example
        completion = example.completions[0].clone()
        completion[-1] = self.special.end_of(
            isinstance(example.values.get("prompt"), list), example.prompt.tolist()
        )
        return TokenExample(example.prompt, (completion,), example.values)


def make_reward(
    config: OnlineConfig,
    tokenizer: Any,
    limit: int,
    device: str,
    function: Callable[..., Any] | None = None,
    *,
    lengths: models.Lengths | None = None,
) -> Any:
    """The reward that the settings name; `function` stands in for --reward. `limit`: the most tokens of a
    sequence; `lengths`: what a reward model is tried at."""
    given = [
        name
        for name, value in (("--reward", config.reward or function), ("--reward-model", config.reward_model))
        if value is not None
    ]
    if len(given) != 1:
        raise UserError(
            "--reward and --reward-model exclude each other"
            if given
            else "no reward: give --reward-model DIR or --reward MODULE:FUNCTION"
        )
    if function is not None:
        return FunctionReward(function, getattr(function, "__name__", type(function).__name__))
    if config.reward is not None:
        return FunctionReward(_import(config.reward), config.reward)
    directory, trust = config.reward_model, {"trust_remote_code": config.trust_remote_code}
    what = f"--reward-model {directory}"
    theirs = models.load_tokenizer(directory, **trust)
    companions.check_tokenizer(what, theirs, tokenizer)
    companions.check_positions(what, models.load_config(directory, **trust), limit)
    scorer = PackedScorer(
        load_scorer(directory, **trust).requires_grad_(False),
        attention=config.attention,
        dtype=config.dtype,
        device=device,
        lengths=lengths,
    )
    scorer.check_tokens(f"reward model {directory}", [torch.tensor(sorted(models.token_ids(tokenizer)))])
    if theirs.chat_template != tokenizer.chat_template:
        print(f"{what}: its chat template is not the policy's, whose prompts it will read")
    to_tokens = ExampleTokenizer(tokenizer, template_options=config.template_options)
    return ModelReward(scorer, config.tokens_per_batch, to_tokens.special)


def _import(name: str) -> Callable[..., Any]:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UserError(f"--reward {name}: expected MODULE:FUNCTION")
    if str(Path.cwd()) not in sys.path:  # a console script does not look into the current directory by itself
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the user's own code
        raise UserError(f"--reward {name}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"--reward {name}: not a function")
    return found
