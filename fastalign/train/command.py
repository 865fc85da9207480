"""`fastalign train METHOD`: flags to a configuration, errors to one line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from typing import Any

from fastalign.cli.console import Parser
from fastalign.train import help
from fastalign.train.config import (
    RunConfig,
    TrainConfig,
    add_arguments,
    common_settings,
    flag_of,
    from_arguments,
)
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.methods import METHODS
from fastalign.train.online_config import OnlineConfig

# The function for training with a class of configuration, "module:function": imported when used.
_FUNCTIONS = {
    TrainConfig: "fastalign.train.offline:train",
    OnlineConfig: "fastalign.train.online:train_online",
}


def main(argv: list[str]) -> int:
    """0: done; 1: training broke off; 2: the user's mistake, before training; 130: interrupted."""
    parser = Parser(
        prog="fastalign train",
        description="Train a Hugging Face causal LM. 'fastalign train METHOD --help' says what a method is.",
    )
    commands = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, row in METHODS.items():
        page = {
            "usage": help.usage(name, row.config),
            "description": help.description(row),
            "formatter_class": help.Formatter,
        }
        own = commands.add_parser(name, help=row.summary, allow_abbrev=False, **page)
        add_arguments(own, row.config, row.settings, help.GROUPS)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        own.prog = f"fastalign train {arguments.method}"
        own.error(f"unrecognized arguments: {' '.join(unknown)}{hint(unknown, arguments.method)}")
    config = METHODS[arguments.method].config
    try:
        _load(_FUNCTIONS[config])(arguments.method, from_arguments(arguments, config))
    except UserError as error:
        return _fail(error, 2)
    except TrainingError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; if --save-every has made a checkpoint, --resume goes on from it", 130)
    return 0


# TRL's words for a setting of ours.
_OF_TRL = {
    "--completion-only-loss": "--loss-on completion",
    "--assistant-only-loss": "--loss-on assistant",
}


def hint(unknown: list[str], method: str) -> str:
    """What somebody who wrote these unknown arguments may have meant; "" where nothing comes near."""
    flag, _, value = unknown[0].partition("=")
    if not flag.startswith("--"):
        return ""
    value = value or next((word for word in unknown[1:2] if not word.startswith("--")), "")
    if flag.replace("_", "-") in _OF_TRL:
        return f"; that is {_OF_TRL[flag.replace('_', '-')]} of fastalign train sft"
    name = flag[2:].replace("-", "_")
    if name in help.loss_options():
        return f"; an option of the loss is given by --set {name}={value or 'VALUE'}"
    flags = {
        flag_of(setting, METHODS[method].config)
        for setting in (*common_settings(), *METHODS[method].settings)
    }
    if near := difflib.get_close_matches(flag, flags, n=1):
        return f"; did you mean {near[0]}?"
    others = [other for other, row in METHODS.items() if name in row.settings]
    return f"; {flag} belongs to {', '.join(others)}" if others else ""


def _load(home: str) -> Callable[[str, RunConfig], Any]:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"fastalign train needs transformers and tokenizers: pip install 'fastalign[train]' ({error})"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    module, function = home.split(":")
    return getattr(importlib.import_module(module), function)


def _fail(error: object, code: int) -> int:
    print(f"fastalign train: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
