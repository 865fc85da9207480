"""`fastalign arena`: every method on a task whose true reward is known, from the same SFT model on the same
budget."""

from __future__ import annotations

import sys
from typing import Any

from fastalign.arena.settings import ArenaConfig
from fastalign.cli.console import Parser
from fastalign.train.config import add_arguments, from_arguments
from fastalign.train.errors import TrainingError, UserError

GROUPS = {
    "what is run": ("method", "quick", "full", "seeds", "seed", "output", "progress"),
    "labels and verdict": ("label_noise", "kl_bound"),
    "budget and sizes": (
        "steps", "responses_per_step", "per_prompt", "max_new_tokens", "judged", "sft_steps", "hidden", "layers", "heads",
    ),
}  # fmt: skip


def main(argv: list[str]) -> int:
    """0: every method came to its end; 1: one broke off; 2: the user's mistake, before any work; 130:
    interrupted."""
    what = (
        f"{__doc__.split(':', 1)[1].strip()} Writes a table, pictures, a page (index.html) and results.json."
    )
    parser = Parser(prog="fastalign arena", description=what, allow_abbrev=False)
    add_arguments(parser, ArenaConfig, [name for names in GROUPS.values() for name in names], GROUPS)
    try:
        results = _run(from_arguments(parser.parse_args(argv), ArenaConfig))
    except UserError as error:
        return _fail(error, 2)
    except TrainingError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on after the last finished cell", 130)
    return 1 if results["broken"] else 0


def _run(config: ArenaConfig) -> dict[str, Any]:
    from fastalign.arena.contest import run

    return run(config)


def _fail(error: object, code: int) -> int:
    print(f"fastalign arena: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
