"""`fastalign demo`: from random weights through SFT to an aligned model on a task whose true reward is known,
in minutes on two cores.

Nothing is downloaded. The task, model and tokenizer are those of `fastalign.arena.review_task`; training is
`fastalign.train`'s own."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from fastalign.cli.console import Parser, integer
from fastalign.train.errors import UserError
from fastalign.train.program import answer
from fastalign.train.settings import MAX_SEED

# Name -> (what it shows, its default number of optimizer steps). Each is a module of fastalign.arena.demos
# with run(seed, steps, output).
DEMOS = {
    "dpo": ("DPO on sampled pairs, and the fused path's time against plain PyTorch", 60),
    "tdpo": ("DPO, TDPO1 and TDPO2 side by side at equal steps: gold reward against sequence KL", 60),
    "ppo": ("a reward model from sampled pairs, and PPO on the true reward and on that model", 30),
}


def main(argv: list[str]) -> int:
    """0: done; 1: training broke off; 2: a wrong option or output directory."""
    parser = Parser(prog="fastalign demo", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False)
    shown = "; ".join(f"{name}: {what} ({steps} steps)" for name, (what, steps) in DEMOS.items())
    parser.add_argument(
        "method",
        nargs="?",
        choices=DEMOS,
        default="dpo",
        metavar="METHOD",
        help=f"what to show (default: dpo). {shown}",
    )
    parser.add_argument(
        "--seed",
        type=integer(0, MAX_SEED // 1000 - 1),
        default=0,
        help="seed of data, weights, sampling and training (default: 0)",
    )
    parser.add_argument(
        "--steps", type=integer(1), default=None, help="optimizer steps of the method instead of its default"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fastalign-demo"),
        metavar="DIR",
        help="directory for curves.png, metrics.json and the models (default: ./fastalign-demo)",
    )
    arguments = parser.parse_args(argv)

    def work() -> int:
        prepare(arguments.output)
        demo = importlib.import_module(f"fastalign.arena.demos.{arguments.method}")
        demo.run(arguments.seed, arguments.steps or DEMOS[arguments.method][1], arguments.output)
        return 0

    return answer("fastalign demo", work, "the same command begins again")


def prepare(output: Path) -> None:
    """What a command of the arena needs before its work: libraries, and a directory that can be written."""
    import matplotlib  # noqa: F401  (now, not after the work)

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the output directory {output}: {error.strerror}") from None
    if not os.access(output, os.W_OK):
        raise UserError(f"cannot write into the output directory {output}")
