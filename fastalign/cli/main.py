"""`fastalign COMMAND ...`: each command is a module with `main(argv) -> exit code`, imported when it is
used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import fastalign
from fastalign.cli.console import Parser
from fastalign.runtime.backends import BackendError

COMMANDS = {
    "info": ("versions, build flags, and which backend serves which operation", "fastalign.cli.info"),
    "losses": ("every named loss with its formula and paper", "fastalign.cli.loss_list"),
    "demo": ("build a small model, train it by SFT and DPO, show what changed", "fastalign.arena.demo"),
    "arena": (
        "every method from one SFT model on one budget: table, pictures, page",
        "fastalign.arena.command",
    ),
    "train": ("train a Hugging Face causal LM", "fastalign.train.command"),
    "methods": ("every alignment method by its name, with a recipe", "fastalign.pipeline.methods"),
    "run": ("carry out a recipe: stages of training, sampling, labelling", "fastalign.pipeline.command"),
    "sample": ("responses to prompts, by a model or a server", "fastalign.feedback.sample"),
    "label": ("scores or soft labels by a judge, a reward model or a function", "fastalign.feedback.label"),
    "pairs": ("preference pairs from scored responses", "fastalign.feedback.pairs"),
    "critique": ("criticise and revise responses under a constitution", "fastalign.feedback.critique"),
    "merge": ("merge models that started from the same one", "fastalign.train.merge_files"),
    "adapters": ("other trainers: what of theirs fastalign takes the place of", "fastalign.adapters.command"),
    "bench": ("measure the operations on this machine", "fastalign.bench"),
}
# The modules of the extra `train` of pyproject.toml.
TRAIN_EXTRA = ("transformers", "safetensors", "tokenizers", "tqdm", "matplotlib", "jinja2", "yaml")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Everything after the command's name is the command's own. What
    no command can answer for ends here in one line: a backend that cannot serve or a package that is not
    installed (2), an interruption (130), a reader that went away (141)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="fastalign",
        description="Loss head for LLM alignment.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(
            f"  {name:<{max(map(len, COMMANDS))}} {summary}" for name, (summary, _) in COMMANDS.items()
        )
        + "\n\n'fastalign COMMAND --help' says more.",
    )
    parser.add_argument("--version", action="version", version=f"fastalign {fastalign.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(argv[:1]).command
    backend = os.environ.get("FASTALIGN_BACKEND")
    if (
        backend
        and command in ("demo", "arena", "train", "run", "label", "bench")
        and (why := fastalign.backends()[backend]) != "available"
    ):
        parser.error(
            f"FASTALIGN_BACKEND={backend}: {why}"
        )  # now, not at the first op after a model has been loaded
    try:
        code = importlib.import_module(COMMANDS[command][1]).main(argv[1:])
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in TRAIN_EXTRA:
            raise
        print(
            f"fastalign {command}: error: it needs {missing}, which is not installed: pip install "
            "'fastalign[train]'",
            file=sys.stderr,
        )
        return 2
    except BackendError as error:
        print(f"fastalign {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastalign {command}: interrupted", file=sys.stderr)
        return 130
    except (
        BrokenPipeError
    ):  # `| head`: nobody reads on, which is no fault; what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
