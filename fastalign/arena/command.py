"""`fastalign arena`: every method on a task whose true reward is known, from the same SFT model on the same
budget."""

from __future__ import annotations

from fastalign.arena.settings import ArenaConfig
from fastalign.cli.console import Parser
from fastalign.train.config import add_arguments, from_arguments
from fastalign.train.program import answer

GROUPS = {
    "what is run": ("method", "quick", "full", "seeds", "seed", "workers", "output", "progress"),
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
    arguments = parser.parse_args(argv)

    def work() -> int:
        from fastalign.arena.contest import run

        return 1 if run(from_arguments(arguments, ArenaConfig))["broken"] else 0

    return answer("fastalign arena", work, "the same command goes on after the last finished cell")
