"""What `fastalign ...` and `python -m fastalign ...` need before torch is loaded; in a user's own program
nothing here has an effect.

Threads that wait spin for some ten microseconds and then sleep. Beside another busy process threads that spin
for long take one another's cores, and a minute becomes half an hour; threads that sleep at once are woken
late, and a small model trains at half its speed on an idle machine. torch's OpenMP runtime reads that setting
once, when it is loaded. Not under `bench`, which measures what a user's own program sees."""

import os
import sys
from typing import NoReturn


def is_command() -> bool:
    """Whether this process is the command line."""
    words = sys.orig_argv
    module = "-m" in words and words[words.index("-m") + 1 : words.index("-m") + 2] == ["fastalign"]
    return module or os.path.basename(sys.argv[0]) == "fastalign"


def end(message: str) -> NoReturn:
    """What is wrong with the environment, in one line, as every other mistake of the user's."""
    print(f"fastalign: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if is_command() and sys.argv[1:2] != ["bench"]:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
