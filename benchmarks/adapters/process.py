"""A contestant of a benchmark as a process of its own, whose high-water mark of memory the kernel reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def measured(script: str, words: list[str], one: list[str], threads: int) -> dict[str, Any]:
    """What `script OUT.json WORDS --one ONE` writes into OUT.json, and its peak memory. One that fails ends this
    process with the end of what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, script, str(out), *words, "--one", *one]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
        with open(Path(folder, "log"), "w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                log.seek(0)
                sys.exit(f"{Path(script).name}: {', '.join(one)} failed:\n{log.read()[-2000:]}")
        return {**json.loads(out.read_text(encoding="utf-8")), "peak_mib": usage.ru_maxrss / 1024}
