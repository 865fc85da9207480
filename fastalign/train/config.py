"""The settings of a training run (how one is declared: settings.py). The
flags of the command line are made from them (`add_arguments`, `from_arguments`).

`RunConfig` holds what every method has, `LossConfig` what both halves have; `TrainConfig` is of the methods
that learn from a data file, `OnlineConfig` (online_config.py) of those that learn from the policy's own
samples. A method that does not have one of its class's settings refuses a value for it (`check_settings`)."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastalign.train.errors import UserError
from fastalign.train.settings import (
    NOT_BELOW_0,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_1,
    Settings,
    setting,
)


@dataclasses.dataclass(frozen=True)
class RunConfig(Settings):
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
        "token budget of one forward pass; a step is split into as many passes as it needs, and the split "
        "does not change its result",
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
        "start afresh in an output directory that holds an earlier run, whose files are removed, or another "
        "model, which is replaced at the "
        "end; nothing else there is touched",
    )
    tensorboard: bool = setting(True, "write TensorBoard events where tensorboard is installed")
    progress: bool = setting(True, "show a progress bar on a terminal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_data is not None and self.eval_fraction:
            raise UserError("--eval-data and --eval-fraction exclude each other")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other")

    def output_dir(self) -> Path:
        """The output directory as an absolute path, symbolic links resolved."""
        if not self.output:
            raise UserError(
                "--output is missing: it names the directory for the model, metrics and checkpoints"
            )
        return Path(self.output).expanduser().resolve()


@dataclasses.dataclass(frozen=True)
class LossConfig(RunConfig):
    """Settings that methods of both halves have."""

    head: str | None = setting(
        None,
        "fused: log-probs come from hidden states and the LM head's weight, a part of the logits at a time; "
        "logits: all logits of a "
        "forward pass are made; default: fused, and logits, with a line that says why, for a model whose head "
        "is not a linear layer",
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
    ref_update_every: int = setting(
        0,
        "steps after which the reference takes over the policy's weights (iterative training); 0: never",
        NOT_BELOW_0,
    )
    ref_mix: float = setting(
        1.0, "share of the policy in the updated reference, the rest stays (TR-DPO: 0.6)", SHARE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ref_mix != 1.0 and not self.ref_update_every:
            raise UserError("--ref-mix has no effect without --ref-update-every")


@dataclasses.dataclass(frozen=True)
class TrainConfig(LossConfig):
    """Settings of the methods that learn from a fixed data file."""

    precompute_ref: bool = setting(
        False,
        "compute the reference log-probs once, cache them in the output directory, and free the reference model",
    )
    loss_on: str | None = setting(
        None,
        "which tokens are learnt; completion: what follows the prompt, or the last turn of a conversation, "
        "assistant: every "
        "turn of the assistant, all: prompts, too; default: of a line with a prompt its completion, of "
        "messages the assistant's turns, of a text all",
        choices=("completion", "assistant", "all"),
    )
    l1_coef: float = setting(
        0.0,
        "weight of the L1 norm of the weights' change (PAFT): every update is followed by a soft threshold of "
        "learning rate * l1_coef on the "
        "change since the start; AdamW's updates are about as large as the learning rate, so 0.1 to 1 is felt",
        NOT_NEGATIVE,
    )
    normalize_reward: bool = setting(
        False,
        "after the last step, shift the scores so that the mean over the training data's chosen (of a list: "
        "best) responses is 0",
    )
    task_weights: str | None = setting(
        None,
        "the data's column 'task' names tasks; the loss is the weighted sum of each task's own: weights as "
        "given, by a task's "
        "share of the data, or raised where the loss is high (group-robust)",
        choices=("fixed", "proportional", "robust"),
    )
    task_weight: dict[str, Any] = setting(
        {},
        "weight of a task (repeatable; 1 where none is given; they are divided by their sum), of robust the "
        "first one",
        flag="--task-weight",
        metavar="NAME=W",
    )
    task_temperature: float = setting(1.0, "T of proportional: n^(1/T), n the pairs of the task", POSITIVE)
    task_step: float = setting(
        0.01, "eta of robust: after a step a weight grows by exp(eta loss of its task)", POSITIVE
    )
    token_metrics: bool = setting(
        True,
        "also log entropy, mean logits and token accuracy; they come out of the same pass over the logits",
    )


# Settings that name a directory with a model: no run may write over one.
MODEL_DIRECTORIES = ("model", "ref_model", "reward_model", "dpo_model", "judge")

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


def flag_of(name: str, kind: type[Settings] = TrainConfig) -> str:
    """`tokens_per_batch` -> `--tokens-per-batch`."""
    return kind.flag(name)


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
                f"{method} has no setting {flag_of(field.name, type(config))}; beside the common ones it has: "
                f"{own}"
            )


def check_booleans(options: Mapping[str, Any], preset: Any) -> None:
    """Refuse an option of --set that is not true or false although the preset's field of its name is."""
    for name, value in options.items():
        if isinstance(getattr(preset, name, None), bool) and not isinstance(value, bool):
            raise UserError(f"--set {name} must be true or false, got {value!r}")


def add_arguments(
    parser: argparse.ArgumentParser,
    kind: type[Settings],
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
        elif field.default is dataclasses.MISSING or isinstance(field.default, tuple):
            # A dict, as OPTION=VALUE, or several texts: repeatable.
            options.update(action="append", metavar=field.metadata["metavar"])
        else:
            metavar = field.metadata["metavar"] or {int: "N", float: "X"}.get(hint)
            options.update(type=hint, metavar=metavar, choices=field.metadata["choices"])
            if field.default is not None:
                options["help"] += f" (default: {field.default})"
        if field.name not in (*common_settings(), *names):
            options["help"] = argparse.SUPPRESS
        of_group[field.name].add_argument(flag_of(field.name, kind), **options)


def from_arguments(arguments: argparse.Namespace, kind: type[Settings]) -> Any:
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
                parse_option(flag_of(field.name, kind), text) for text in values[field.name]
            )
    return kind(**values)


def parse_option(flag: str, text: str) -> tuple[str, Any]:
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
