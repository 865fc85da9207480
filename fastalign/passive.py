"""The commands' threads sleep while they wait, instead of spinning: beside another busy process spinning threads take one another's cores, and a
minute becomes half an hour. Imported before torch, whose OpenMP runtime reads the setting once, when it is loaded; in a user's own program, and in
`fastalign bench`, which measures what that program sees, nothing is set."""

import os
import sys


def _is_command() -> bool:
    """Whether this process is `fastalign ...` or `python -m fastalign ...`, other than bench."""
    words = sys.orig_argv
    module = "-m" in words and words[words.index("-m") + 1 : words.index("-m") + 2] == ["fastalign"]
    return (module or os.path.basename(sys.argv[0]) == "fastalign") and sys.argv[1:2] != ["bench"]


if _is_command():
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
