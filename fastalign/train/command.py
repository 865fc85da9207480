"""`fastalign train METHOD`: flags to a configuration, errors to one line and an exit code."""

from __future__ import annotations

import difflib
import importlib

from fastalign.cli.console import Parser
from fastalign.train import help
from fastalign.train.config import (
    TrainConfig,
    add_arguments,
    common_settings,
    flag_of,
    from_arguments,
)
from fastalign.train.methods import METHODS
from fastalign.train.online_config import OnlineConfig
from fastalign.train.program import answer

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

    def work() -> int:
        module, function = _FUNCTIONS[config].split(":")
        train = getattr(importlib.import_module(module), function)
        train(arguments.method, from_arguments(arguments, config))
        return 0

    return answer("fastalign train", work, "if --save-every has made a checkpoint, --resume goes on from it")


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
