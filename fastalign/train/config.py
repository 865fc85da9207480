"""The settings of a training run: name, type, default, documentation and bounds of each in one line. The
flags of the command line are made from them (`add_arguments`, `from_arguments`).

`RunConfig` holds what every method has, `LossConfig` what both halves have; `TrainConfig` is of the methods
that learn from a data file, `OnlineConfig` (online_config.py) of those that learn from the policy's own
samples. A method that does not have one of its class's settings refuses a value for it (`check_settings`)."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import numbers
import os
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.runtime.checks import shown
from fastalign.train.errors import UserError

LARGEST = 1e30  # of any number: training computes in float32, which ends at 3.4e38
# What every generator takes, NumPy's among them; the order of an epoch multiplies it by 10^6.
MAX_SEED = 2**32 - 1


class Bound(NamedTuple):
    """Which numbers a setting may have, other than None. `words` complete "it must"."""

    words: str
    fits: Callable[[float], bool]


POSITIVE = Bound("be positive", lambda x: x > 0 and math.isfinite(x))
NOT_NEGATIVE = Bound("not be negative", lambda x: x >= 0 and math.isfinite(x))
NOT_BELOW_0 = Bound("be not negative", NOT_NEGATIVE.fits)
SHARE = Bound("lie in [0, 1]", lambda x: 0 <= x <= 1)
SHARE_BELOW_1 = Bound("lie in [0, 1)", lambda x: 0 <= x < 1)
SEED = Bound(f"lie in [0, {MAX_SEED}]", lambda x: 0 <= x <= MAX_SEED)


def setting(default: Any, doc: str, *bounds: Bound, **how: Any) -> Any:
    """A dataclass field with its one line of documentation (`--help` shows it) and the numbers that it may have. `how`:
    `choices`, the words that it may be; `flag` and `metavar`, how its flag is spelled."""
    metadata = {"doc": doc, "bounds": bounds, "choices": None, "flag": None, "metavar": None, **how}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings that every trainer has. An "example" is one line of the data: a pair, a response, a list of
    responses, a prompt."""

    # What is trained on what
    model: str | None = setting(
        None, "required: directory of a Hugging Face causal LM: config, weights, tokenizer", metavar="DIR"
    )
    data: str | None = setting(
        None,
        "required: training data, one JSON object per line, in TRL's formats (docs/training.md)",
        metavar="FILE",
    )
    output: str | None = setting(
        None, "required: directory that receives the model, metrics and checkpoints", metavar="DIR"
    )

    # Data
    eval_data: str | None = setting(None, "data to evaluate on, in the same format", metavar="FILE")
    eval_fraction: float = setting(
        0.0, "share of the training examples that is held out for evaluation instead", SHARE_BELOW_1
    )
    max_length: int | None = setting(
        None, "longest sequence in tokens (prompt + completion); default: the model's positions", POSITIVE
    )
    overlong: str = setting(
        "error",
        "what to do with an example that exceeds --max-length or --tokens-per-batch: stop, leave it out, "
        "cut the start of its prompt, or cut the end of its completions (the last two leave out "
        "examples that cannot be cut to fit)",
        choices=("error", "drop", "truncate_prompt", "truncate_completion"),
    )

    template_options: dict[str, Any] = setting(
        {},
        "a variable of the tokenizer's chat template, for example --template enable_thinking=false (repeatable)",
        flag="--template",
        metavar="VARIABLE=VALUE",
    )

    # Steps
    batch_size: int = setting(32, "examples per optimizer step", POSITIVE)
    tokens_per_batch: int = setting(
        8192,
        "token budget of one forward pass; a step is split into as many passes as it needs, and the split does not change its result",
        POSITIVE,
    )
    epochs: int = setting(1, "passes over the training examples", POSITIVE)
    max_steps: int | None = setting(None, "number of optimizer steps, in place of --epochs", POSITIVE)
    learning_rate: float = setting(1e-6, "peak learning rate of AdamW", POSITIVE)
    warmup_ratio: float = setting(
        0.1,
        "share of the steps over which the learning rate rises; afterwards it falls as a cosine to 0",
        SHARE,
    )
    weight_decay: float = setting(0.0, "weight decay of AdamW, on matrices only", NOT_NEGATIVE)
    max_grad_norm: float = setting(
        1.0, "gradients are scaled down to this global norm; 0: no clipping", NOT_NEGATIVE
    )
    seed: int = setting(0, "seed of the data order and of the evaluation split", SEED)

    # Machine
    dtype: str = setting(
        "float32",
        "precision of the forward pass; weights, gradients and optimizer are float32 either way, since "
        "updates of a typical size vanish in bfloat16 weights",
        choices=("float32", "bfloat16"),
    )
    attention: str = setting(
        "auto",
        "attention implementation; packed: sdpa per sequence, sdpa and eager: one mask over the whole "
        "pack, auto: the first of flash_attention_2 (where installed), packed, sdpa, eager that "
        "keeps packed sequences apart",
        choices=("auto", "packed", "sdpa", "eager", "flash_attention_2"),
    )
    device: str = setting("auto", "torch device; auto: cuda if there is one, else cpu")
    trust_remote_code: bool = setting(False, "run Python code that the model directory brings along")

    # Output
    log_every: int = setting(10, "steps between lines on the console; metrics.jsonl has every step", POSITIVE)
    eval_every: int = setting(
        0, "steps between evaluations; 0: only before the first and after the last step", NOT_NEGATIVE
    )
    save_every: int = setting(0, "steps between checkpoints; 0: none", NOT_NEGATIVE)
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints are kept", POSITIVE)
    resume: bool = setting(False, "go on from the newest checkpoint in the output directory")
    overwrite: bool = setting(
        False,
        "start afresh in an output directory that holds an earlier run, whose files are removed, or another model, which is replaced at the "
        "end; nothing else there is touched",
    )
    tensorboard: bool = setting(True, "write TensorBoard events where tensorboard is installed")
    progress: bool = setting(True, "show a progress bar on a terminal")

    def __post_init__(self) -> None:
        self._check_types()
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), flag_of(field.name, type(self))
            # No float need hold such an integer: nothing below could look at it.
            if isinstance(value, int) and abs(value) >= 1 << 63 and field.name != "seed":
                raise UserError(f"{flag} is {shown(value)}: its magnitude must be below 2^63")
            if isinstance(value, float) and LARGEST < abs(value) < math.inf:
                raise UserError(f"{flag} is {value}: its magnitude must be at most {LARGEST:g}")
            for bound in field.metadata["bounds"] if value is not None else ():
                if not bound.fits(value):
                    raise UserError(f"{flag} is {shown(value)}: it must {bound.words}")
            choices = field.metadata["choices"]
            if choices and value not in (*choices, field.default):
                raise UserError(f"{flag} is '{value}'; legal: {', '.join(choices)}")
        if self.eval_data is not None and self.eval_fraction:
            raise UserError("--eval-data and --eval-fraction exclude each other")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other")

    def _check_types(self) -> None:
        """Refuse a value of another type than its setting's; a path object becomes its text, NumPy's numbers
        become Python's. The command line has converted its texts before."""
        for name, hint in typing.get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), typing.get_args(hint) or (hint,)
            if isinstance(value, os.PathLike) and str in kinds:
                value = os.fspath(value)
            elif isinstance(value, dict):
                value = {key: _plain(f"{name}[{key!r}]", option) for key, option in value.items()}
            object.__setattr__(self, name, value := _number(value))
            if value is None and type(None) in kinds:
                continue
            kind = dict if typing.get_origin(hint) is dict else next(k for k in kinds if k is not type(None))
            legal, noun = _TYPES[kind]
            if not isinstance(value, legal) or isinstance(value, bool) and kind is not bool:
                raise UserError(
                    f"{name} must be {noun}{' or None' * (type(None) in kinds)}, got {shown(value)}"
                )
            if isinstance(value, str) and (not value or "\0" in value):
                raise UserError(
                    f"{flag_of(name, type(self))} is empty"
                    if not value
                    else f"{flag_of(name, type(self))} holds a zero byte"
                )

    def output_dir(self) -> Path:
        """The output directory as an absolute path, symbolic links resolved."""
        if not self.output:
            raise UserError(
                "--output is missing: it names the directory for the model, metrics and checkpoints"
            )
        return Path(self.output).expanduser().resolve()


def _number(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else as it is."""
    if isinstance(value, (bool, int, str)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _plain(name: str, value: Any) -> Any:
    """An option of a loss, or a variable of a template, as it can be kept in the record of a run: a number, a
    text, true, false, None, or a sequence of such."""
    value = _number(value)
    if isinstance(value, dict) and not name.startswith("loss_options"):  # a template may take structures
        return {key: _plain(f"{name}[{key!r}]", each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(name, each) for each in value)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(f"{name} must be a number, a text, True, False or None, got {shown(value)}")
    if (
        isinstance(value, (int, float)) and LARGEST < abs(value) <= sys.float_info.max
    ):  # what no float holds, the loss refuses itself
        raise UserError(f"{name} is {shown(value)}: its magnitude must be at most {LARGEST:g}")
    return value


# The type of a setting -> what its value may be, and what that is called.
_TYPES: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"), int: (int, "an integer"), float: ((int, float), "a number"), str: (str, "a text"), dict: (dict, "a dict"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LossConfig(RunConfig):
    """Settings that methods of both halves have."""

    head: str | None = setting(
        None,
        "fused: log-probs come from hidden states and the LM head's weight, a part of the logits at a time; logits: all logits of a "
        "forward pass are made; default: fused, and logits, with a line that says why, for a model whose head is not a linear layer",
        choices=("fused", "logits"),
    )
    ref_model: str | None = setting(
        None,
        "directory of the reference model; default: the weights that training starts from",
        metavar="DIR",
    )
    loss: str | None = setting(
        None,
        "name of the loss; default: the method's own; an unknown name lists the legal ones",
        metavar="NAME",
    )
    loss_options: dict[str, Any] = setting(
        {},
        "an option of the loss, for example --set beta=0.05 (repeatable)",
        flag="--set",
        metavar="OPTION=VALUE",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(LossConfig):
    """Settings of the methods that learn from a fixed data file."""

    precompute_ref: bool = setting(
        False,
        "compute the reference log-probs once, cache them in the output directory, and free the reference model",
    )
    token_metrics: bool = setting(
        True,
        "also log entropy, mean logits and token accuracy; they come out of the same pass over the logits",
    )


# Settings that name a directory with a model: no run may write over one.
MODEL_DIRECTORIES = ("model", "ref_model", "reward_model", "dpo_model")

# Settings that may differ between a run and its continuation: none of them changes a number that training
# produces. What the paths among them lead to is compared by its contents.
FREE_ON_RESUME = frozenset(
    {
        "resume",
        "overwrite",
        "output",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "tensorboard",
        "progress",
        "trust_remote_code",
    }
    | {*MODEL_DIRECTORIES, "data", "eval_data", "ptx_data"}
)

# Settings that the oldest checkpoints lack -> what runs did before there was a choice.
BEFORE = {"head": "logits"}


def flag_of(name: str, kind: type[RunConfig] = TrainConfig) -> str:
    """`tokens_per_batch` -> `--tokens-per-batch`."""
    return kind.__dataclass_fields__[name].metadata["flag"] or "--" + name.replace("_", "-")


def common_settings() -> tuple[str, ...]:
    """The names that every method has."""
    return tuple(field.name for field in dataclasses.fields(RunConfig))


def check_settings(config: RunConfig, names: Collection[str], method: str) -> None:
    """Refuse a setting that was given although the method has none of this name: it would be ignored.
    `names`: those it has besides the common ones."""
    for field in dataclasses.fields(config):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if field.name not in (*common_settings(), *names) and getattr(config, field.name) != default:
            own = ", ".join(flag_of(name, type(config)) for name in names) or "none"
            raise UserError(
                f"{method} has no setting {flag_of(field.name, type(config))}; beside the common ones it has: {own}"
            )


def check_booleans(options: Mapping[str, Any], preset: Any) -> None:
    """Refuse an option of --set that is not true or false although the preset's field of its name is."""
    for name, value in options.items():
        if isinstance(getattr(preset, name, None), bool) and not isinstance(value, bool):
            raise UserError(f"--set {name} must be true or false, got {value!r}")


def add_arguments(
    parser: argparse.ArgumentParser,
    kind: type[RunConfig],
    names: Collection[str],
    groups: Mapping[str, Collection[str]],
) -> None:
    """Give the parser a flag for every setting of `kind`, in `groups` (title -> settings). Those outside
    `names` and the common ones stay out of
    --help; that they are refused with a reason is the work of `check_settings`."""
    types = typing.get_type_hints(kind)
    of_group = {
        name: group
        for title, members in groups.items()
        for group in [parser.add_argument_group(title)]
        for name in members
    }
    order = list(of_group)
    for field in sorted(dataclasses.fields(kind), key=lambda field: order.index(field.name)):
        options: dict[str, Any] = {
            "dest": field.name,
            "help": field.metadata["doc"].replace("%", "%%"),
            "default": argparse.SUPPRESS,
        }
        hint = types[field.name]
        hint = (
            next((k for k in typing.get_args(hint) if k is not type(None)), hint)
            if type(None) in typing.get_args(hint)
            else hint
        )
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.default is dataclasses.MISSING:  # a dict: OPTION=VALUE, repeatable
            options.update(action="append", metavar=field.metadata["metavar"])
        else:
            metavar = field.metadata["metavar"] or {int: "N", float: "X"}.get(hint)
            options.update(type=hint, metavar=metavar, choices=field.metadata["choices"])
            if field.default is not None:
                options["help"] += f" (default: {field.default})"
        if field.name not in (*common_settings(), *names):
            options["help"] = argparse.SUPPRESS
        of_group[field.name].add_argument(flag_of(field.name, kind), **options)


def from_arguments(arguments: argparse.Namespace, kind: type[RunConfig]) -> RunConfig:
    """The `kind` of configuration that a parsed command line gives."""
    values = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(kind)
        if hasattr(arguments, field.name)
    }
    for field in dataclasses.fields(kind):
        if (
            field.default is dataclasses.MISSING and field.name in values
        ):  # options as OPTION=VALUE, collected
            values[field.name] = dict(
                _parse_option(flag_of(field.name, kind), text) for text in values[field.name]
            )
    return kind(**values)


def _parse_option(flag: str, text: str) -> tuple[str, Any]:
    """`beta=0.1` -> ("beta", 0.1), `reference=false` -> ("reference", False) in any case. A value that is no Python literal is a word:
    `sft_norm=seq_mean`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"{flag} {text}: expected OPTION=VALUE")
    name, value = name.strip(), value.strip()
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return name, value
