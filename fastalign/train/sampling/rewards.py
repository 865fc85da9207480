"""Where the rewards of sampled responses come from: a function of the user's that scores or compares, or a trained
reward model."""

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

CERTAIN = 1e-6  # a judge's probability is taken as at least this, and as at most 1 less this

Reward = Callable[
    [Sequence[Rollout]], torch.Tensor
]  # [responses] float32 on the CPU; NaN: this one cannot be scored


class UserFunction:
    """A Python function of the user's, called with keyword arguments, lists with one entry per item: those that
    its signature names, or all of them with **columns. `flag`: the setting that names it; `noun`: what it gives a
    number for."""

    flag, noun = "--reward", "completion"

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.name = function, f"{self.flag} {name}"
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise UserError(f"{self.name}: not a function whose arguments can be read") from None
        if any(p.kind is p.POSITIONAL_ONLY or p.kind is p.VAR_POSITIONAL for p in parameters):
            raise UserError(
                f"{self.name}: the function is called with keyword arguments (completions, prompts, the "
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
                    f"{self.name}: the function needs the column '{name}', which no line of the data has"
                )

    def numbers(self, rollouts: Sequence[Rollout], completions: list[Any]) -> torch.Tensor:
        """What it returns for these `completions`, [n] float32, NaN where it cannot say. `rollouts`: whose prompts
        and columns go with them."""
        rows = [rollout.example.values for rollout in rollouts]
        columns = {
            name: [row.get(name) for row in rows]
            for name in {name: None for row in rows for name in row}
            if name != "prompt"
        }
        arguments = {**columns, "prompts": [row["prompt"] for row in rows], "completions": completions}
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
            raise TrainingError(f"{self.name}: {type(error).__name__}: {error}") from error
        if len(numbers) != len(rollouts):
            raise TrainingError(
                f"{self.name} returned {len(numbers)} values for {len(rollouts)} {self.noun}s"
            )
        scores = torch.tensor(numbers, dtype=torch.float64)
        beyond = scores.isfinite() & ~scores.float().isfinite()
        if beyond.any():
            raise TrainingError(
                f"{self.name} returned {float(scores[beyond][0])}: rewards are kept in float32, "
                "which ends at 3.4e38"
            )
        return scores.float()


def spoken(rollout: Rollout) -> Any:
    """A response as a function of the user's is given it."""
    chat = isinstance(rollout.example.values["prompt"], list)
    return [{"role": "assistant", "content": rollout.text}] if chat else rollout.text


class FunctionReward(UserFunction):
    """A Python function as the reward, called once per step with keyword arguments, lists with one entry per response:

        completions   the responses: texts, or [{"role": "assistant", "content": text}] for conversational prompts
        prompts       the prompts as the data has them
        ...           every other column of the data (None where a line lacks it)

    It may take any of them, or **columns. It returns a number per response; None or NaN: the response cannot
    be scored."""

    def __call__(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        return self.numbers(rollouts, [spoken(rollout) for rollout in rollouts])


class FunctionPreference(UserFunction):
    """A Python function as a pairwise judge, called as a `FunctionReward` is, with pairs in place of responses:

        completions   [(first, second), ...], each as a reward function is given it
        prompts, ...  one entry per pair

    It returns P(first is better), from 0 to 1, per pair; None or NaN: the pair cannot be judged. As a reward
    (`__call__`) it scores the `count` responses to each prompt by how they fare against one another."""

    flag, noun = "--preference", "pair"

    def __init__(self, function: Callable[..., Any], name: str, count: int):
        super().__init__(function, name)
        self.count = count

    def compare(self, first: Sequence[Rollout], second: Sequence[Rollout]) -> torch.Tensor:
        """P(first is better), [pairs] float32 on the CPU."""
        found = self.numbers(first, [(spoken(a), spoken(b)) for a, b in zip(first, second, strict=True)])
        beyond = (found < 0) | (found > 1)
        if beyond.any():
            raise TrainingError(
                f"{self.name} returned {float(found[beyond][0]):g}; legal: a probability from 0 to 1, None or "
                "NaN per pair"
            )
        return found

    def __call__(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """Scores [responses] with the differences that the comparisons of all pairs say: logit P(i better
        than j) = score_i - score_j, exactly for two responses and in least squares for more. They add up to 0
        per prompt. A response that could not be compared with all the others of its prompt has none (NaN)."""
        n, k = len(rollouts) // self.count, self.count
        i, j = torch.triu_indices(k, k, offset=1)
        starts = k * torch.arange(n)[:, None]
        first, second = ([rollouts[at] for at in (starts + side).flatten().tolist()] for side in (i, j))
        odds = torch.logit(self.compare(first, second).double(), eps=CERTAIN).view(n, -1)
        table = odds.new_zeros(n, k, k)
        table[:, i, j], table[:, j, i] = odds, -odds
        return table.mean(2).flatten().float()


def _numbers(values: Any) -> list[float]:
    """What a function returned, one number per item. Only what is in an order and holds numbers:
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
    preference: Callable[..., Any] | None = None,
    *,
    compares: bool = False,
    lengths: models.Lengths | None = None,
) -> Any:
    """The reward that the settings name; `function` stands in for --reward, `preference` for --preference, which
    serves where the method `compares`. `limit`: the most tokens of a sequence; `lengths`: what a reward model is
    tried at."""
    sources = {
        "--reward": config.reward or function,
        "--reward-model": config.reward_model,
        "--judge": config.judge,
        "--preference": config.preference or preference,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        judge = " or --preference MODULE:FUNCTION" if compares else ""
        raise UserError(
            f"{' and '.join(given)} exclude each other"
            if given
            else f"no reward: give --reward-model DIR, --reward MODULE:FUNCTION or --judge DIR{judge}"
        )
    if given[0] == "--judge":
        from fastalign.feedback.judges.as_reward import JudgeReward  # above this room: used only here

        return JudgeReward(config, device)
    if given[0] != "--reward-model":
        source = sources[given[0]]
        name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
        source = import_function(given[0], source) if isinstance(source, str) else source
        if given[0] == "--reward":
            return FunctionReward(source, name)
        return FunctionPreference(source, name, config.samples_per_prompt)
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


def import_function(flag: str, name: str) -> Callable[..., Any]:
    """What MODULE:FUNCTION names; `flag` is the setting that names it."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UserError(f"{flag} {name}: expected MODULE:FUNCTION")
    if str(Path.cwd()) not in sys.path:  # a console script does not look into the current directory by itself
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the user's own code
        raise UserError(f"{flag} {name}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{flag} {name}: not a function")
    return found
