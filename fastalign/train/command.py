"""`fastalign train METHOD`: flags to `TrainConfig`, errors to one line and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from fastalign.console import Parser
from fastalign.train import config
from fastalign.train.errors import TrainingError, UserError

# name -> (one line of help, "module:function" that takes a TrainConfig). Imported when used: --help answers without loading transformers.
METHODS = {"dpo": ("direct preference optimisation and its variants (--loss)", "fastalign.train.dpo:train_dpo")}


def main(argv: list[str]) -> int:
    """0: done; 1: training broke off; 2: the user's mistake, before training; 130: interrupted."""
    parser = Parser(prog="fastalign train", description="Train a Hugging Face causal LM.")
    commands = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, (summary, _) in METHODS.items():
        config.add_arguments(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    arguments = parser.parse_args(argv)
    try:
        _load(arguments.method)(config.from_arguments(arguments))
    except UserError as error:
        return _fail(error, 2)
    except TrainingError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; if --save-every has made a checkpoint, --resume goes on from it", 130)
    return 0


def _load(method: str) -> Callable[[config.TrainConfig], Any]:
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"fastalign train needs transformers and tokenizers: pip install 'fastalign[train]' ({error})") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    module, function = METHODS[method][1].split(":")
    return getattr(importlib.import_module(module), function)


def _fail(error: object, code: int) -> int:
    print(f"fastalign train: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
