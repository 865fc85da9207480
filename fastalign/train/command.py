"""`fastalign train METHOD`: flags to a configuration, errors to one line and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from fastalign.console import Parser
from fastalign.train.config import RunConfig, TrainConfig, add_arguments, from_arguments
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.methods import METHODS as OFFLINE
from fastalign.train.online import METHODS as ONLINE
from fastalign.train.online.config import OnlineConfig


class Command(NamedTuple):
    """A method on the command line. `home`: "module:function" that takes (method, config), imported when used: --help answers without
    loading transformers. `settings`: those of the configuration class `config` that the method has, besides the common ones."""

    summary: str
    home: str
    config: type[RunConfig]
    settings: tuple[str, ...]


COMMANDS = {
    **{name: Command(entry.summary, "fastalign.train.offline:train", TrainConfig, entry.settings) for name, entry in OFFLINE.items()},
    **{
        name: Command(entry.summary, "fastalign.train.online.run:train_online", OnlineConfig, entry.settings)
        for name, entry in ONLINE.items()
    },
}


def main(argv: list[str]) -> int:
    """0: done; 1: training broke off; 2: the user's mistake, before training; 130: interrupted."""
    parser = Parser(prog="fastalign train", description="Train a Hugging Face causal LM.")
    commands = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        add_arguments(own, command.config, command.settings)
    arguments = parser.parse_args(argv)
    command = COMMANDS[arguments.method]
    try:
        _load(command)(arguments.method, from_arguments(arguments, command.config))
    except UserError as error:
        return _fail(error, 2)
    except TrainingError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; if --save-every has made a checkpoint, --resume goes on from it", 130)
    return 0


def _load(command: Command) -> Callable[[str, RunConfig], Any]:
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"fastalign train needs transformers and tokenizers: pip install 'fastalign[train]' ({error})") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    module, function = command.home.split(":")
    return getattr(importlib.import_module(module), function)


def _fail(error: object, code: int) -> int:
    print(f"fastalign train: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
