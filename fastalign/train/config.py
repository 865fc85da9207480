"""Every setting of a training run, and the command-line flags generated from them."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

from fastalign.train.errors import UserError


def _setting(default: Any, doc: str, *, choices: tuple[str, ...] | None = None, flag: str | None = None, metavar: str | None = None) -> Any:
    """A dataclass field with its one line of documentation (`--help` shows it) and how its flag is spelled."""
    metadata = {"doc": doc, "choices": choices, "flag": flag, "metavar": metavar}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. A "pair" is one example: a prompt with a chosen and a rejected completion."""

    # What is trained on what
    model: str | None = _setting(None, "directory of a Hugging Face causal LM: config, weights, tokenizer", metavar="DIR")
    data: str | None = _setting(None, "training pairs, one JSON object per line, in TRL's preference formats", metavar="FILE")
    output: str | None = _setting(None, "directory that receives the model, metrics and checkpoints", metavar="DIR")
    ref_model: str | None = _setting(
        None, "directory of the reference model; default: the weights that training starts from", metavar="DIR"
    )
    precompute_ref: bool = _setting(
        False, "compute the reference log-probs once, cache them in the output directory, and free the reference model"
    )
    loss: str = _setting("dpo", "name of the loss; an unknown name lists the legal ones", metavar="NAME")
    loss_options: dict[str, Any] = _setting(
        {}, "an option of the loss, for example --set beta=0.05 (repeatable)", flag="--set", metavar="OPTION=VALUE"
    )

    # Data
    eval_data: str | None = _setting(None, "pairs to evaluate on, in the same formats", metavar="FILE")
    eval_fraction: float = _setting(0.0, "share of the training pairs that is held out for evaluation instead")
    max_length: int | None = _setting(None, "longest sequence in tokens (prompt + completion); default: the model's positions")
    overlong: str = _setting(
        "error",
        "what to do with a pair that exceeds --max-length or --tokens-per-batch: stop, leave it out, "
        "cut the start of its prompt, or cut the end of its completions (the last two leave out "
        "pairs that cannot be cut to fit)",
        choices=("error", "drop", "truncate_prompt", "truncate_completion"),
    )

    # Steps
    batch_size: int = _setting(32, "pairs per optimizer step")
    tokens_per_batch: int = _setting(
        8192, "token budget of one forward pass; a step is split into as many passes as it needs, and the split does not change its result"
    )
    epochs: int = _setting(1, "passes over the training pairs")
    max_steps: int | None = _setting(None, "number of optimizer steps, in place of --epochs")
    learning_rate: float = _setting(1e-6, "peak learning rate of AdamW")
    warmup_ratio: float = _setting(0.1, "share of the steps over which the learning rate rises; afterwards it falls as a cosine to 0")
    weight_decay: float = _setting(0.0, "weight decay of AdamW, on matrices only")
    max_grad_norm: float = _setting(1.0, "gradients are scaled down to this global norm; 0: no clipping")
    seed: int = _setting(0, "seed of the data order and of the evaluation split")

    # Machine
    dtype: str = _setting(
        "float32",
        "precision of the forward pass; weights, gradients and optimizer are float32 either way, since "
        "updates of a typical size vanish in bfloat16 weights",
        choices=("float32", "bfloat16"),
    )
    attention: str = _setting(
        "auto",
        "attention implementation; packed: sdpa per sequence, sdpa and eager: one mask over the whole "
        "pack, auto: the first of flash_attention_2 (where installed), packed, sdpa, eager that "
        "keeps packed sequences apart",
        choices=("auto", "packed", "sdpa", "eager", "flash_attention_2"),
    )
    device: str = _setting("auto", "torch device; auto: cuda if there is one, else cpu")
    trust_remote_code: bool = _setting(False, "run Python code that the model directory brings along")

    # Output
    token_metrics: bool = _setting(True, "also log entropy, mean logits and token accuracy; they come out of the same pass over the logits")
    log_every: int = _setting(10, "steps between lines on the console; metrics.jsonl has every step")
    eval_every: int = _setting(0, "steps between evaluations; 0: only before the first and after the last step")
    save_every: int = _setting(0, "steps between checkpoints; 0: none")
    keep_checkpoints: int = _setting(2, "how many of the newest checkpoints are kept")
    resume: bool = _setting(False, "go on from the newest checkpoint in the output directory")
    overwrite: bool = _setting(False, "start afresh in an output directory that holds an earlier run, whose files are removed")
    tensorboard: bool = _setting(True, "write TensorBoard events where tensorboard is installed")
    progress: bool = _setting(True, "show a progress bar on a terminal")

    def __post_init__(self) -> None:
        positive = ("batch_size", "tokens_per_batch", "epochs", "max_steps", "max_length", "log_every", "keep_checkpoints", "learning_rate")
        not_negative = ("weight_decay", "max_grad_norm", "eval_every", "save_every", "seed")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{flag_of(name)} is {value}: it must be positive")
        for name in not_negative:
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{flag_of(name)} is {getattr(self, name)}: it must not be negative")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"--warmup-ratio is {self.warmup_ratio}: it must lie in [0, 1]")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval-fraction is {self.eval_fraction}: it must lie in [0, 1)")
        if self.eval_data is not None and self.eval_fraction:
            raise UserError("--eval-data and --eval-fraction exclude each other")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        for setting in dataclasses.fields(self):
            choices = setting.metadata["choices"]
            if choices and getattr(self, setting.name) not in choices:
                raise UserError(f"{flag_of(setting.name)} is '{getattr(self, setting.name)}'; legal: {', '.join(choices)}")

    def output_dir(self) -> Path:
        """The output directory as an absolute path, symbolic links resolved."""
        if not self.output:
            raise UserError("--output is missing: it names the directory for the model, metrics and checkpoints")
        return Path(self.output).expanduser().resolve()


# Settings that may differ between a run and its continuation: none of them changes a number that training produces.
FREE_ON_RESUME = frozenset(
    {"resume", "overwrite", "output", "log_every", "save_every", "keep_checkpoints", "tensorboard", "progress", "trust_remote_code"}
)


def flag_of(name: str) -> str:
    """`tokens_per_batch` -> `--tokens-per-batch`."""
    setting = TrainConfig.__dataclass_fields__[name]
    return setting.metadata["flag"] or "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser one flag for every field of `TrainConfig`."""
    types = typing.get_type_hints(TrainConfig)
    for setting in dataclasses.fields(TrainConfig):
        options: dict[str, Any] = {"dest": setting.name, "help": setting.metadata["doc"].replace("%", "%%"), "default": argparse.SUPPRESS}
        kind = types[setting.name]
        kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind) if type(None) in typing.get_args(kind) else kind
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.name == "loss_options":
            options.update(action="append", metavar=setting.metadata["metavar"])
        else:
            options.update(type=kind, metavar=setting.metadata["metavar"], choices=setting.metadata["choices"])
            if setting.default is not None:
                options["help"] += f" (default: {setting.default})"
        parser.add_argument(flag_of(setting.name), **options)


def from_arguments(arguments: argparse.Namespace) -> TrainConfig:
    """The `TrainConfig` of a parsed command line."""
    names = {setting.name for setting in dataclasses.fields(TrainConfig)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    values["loss_options"] = dict(map(_parse_option, values.get("loss_options", [])))
    return TrainConfig(**values)


def _parse_option(text: str) -> tuple[str, Any]:
    """`beta=0.1` -> ("beta", 0.1). A value that is no Python literal is a word: `sft_norm=seq_mean`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set {text}: expected OPTION=VALUE")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return name.strip(), value.strip()
