"""How the commands around training end: errors in one line, an exit code for each kind."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fastalign.train.errors import TrainingError, UserError


def answer(command: str, work: Callable[[], int], interrupted: str) -> int:
    """What `work` returns, with transformers' own words turned off; 1: it broke off (`TrainingError`); 2: the
    user's mistake, before any work (`UserError`); 130: interrupted, and `interrupted` says what comes
    next."""
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        return work()
    except UserError as error:
        message, code = str(error), 2
    except TrainingError as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = f"interrupted; {interrupted}", 130
    print(f"{command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
