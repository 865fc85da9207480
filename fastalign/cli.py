"""`fastalign COMMAND ...`: each command is a module with `main(argv) -> exit code`, imported when it is used."""

from __future__ import annotations

import argparse
import importlib
import sys

from fastalign.console import Parser

COMMANDS = {
    "info": ("versions, build flags, and which backend serves which operation", "fastalign.info"),
    "demo": ("build a small model, train it by SFT and DPO, show what changed", "fastalign.train.demo"),
    "train": ("train a Hugging Face causal LM", "fastalign.train.command"),
    "bench": ("measure the operations on this machine", "fastalign.bench"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Everything after the command's name is the command's own."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="fastalign",
        description="Loss head for LLM alignment.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<7} {summary}" for name, (summary, _) in COMMANDS.items())
        + "\n\n'fastalign COMMAND --help' says more.",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(argv[:1]).command
    return importlib.import_module(COMMANDS[command][1]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
