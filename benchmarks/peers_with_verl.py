"""`fastalign bench --peers` with verl's functions where verl is not installed as a whole: they need torch alone,
but its package imports ray and others at once.

    pip install --no-deps --target DIR verl==0.9.1
    python benchmarks/peers_with_verl.py DIR [options of fastalign bench]

What verl imports and is not installed here is made up, as in the tests of the adapters
(tests/checks/trainers.py); no function that is timed uses it, and each result is held to fp64 as ever."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from fastalign.bench import command

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> int:
    if not argv or not (Path(argv[0]) / "verl").is_dir():
        print(
            f"peers_with_verl.py: error: the first argument must be a directory with verl in it, got {argv[:1]}",
            file=sys.stderr,
        )
        return 2
    sys.path[:0] = [str(ROOT / "tests")]
    from checks import trainers

    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # which the tests need; torch.compile takes part here
    os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # verl as it is, without our adapter
    trainers.MADE_UP = tuple(n for n in trainers.MADE_UP if importlib.util.find_spec(n) is None)
    sys.meta_path.append(trainers.MadeUpModules())
    sys.path.append(argv[0])
    print(f"made up for verl's imports: {', '.join(trainers.MADE_UP)}")
    return command.main(["--peers", *argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
