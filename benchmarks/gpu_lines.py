"""The lines that the scripts of the GPU gate leave on disk: JSON, one per case, written as soon as it is
known; a process that has lost its CUDA context, or hangs, starts itself again behind the case."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What says that the CUDA context, and with it the process, is lost.
LOST = re.compile(
    r"CUDA error|Triton Error \[CUDA\]|unspecified launch failure|illegal memory access|device-side "
    r"assert|misaligned address"
)
CASE_SECONDS = 40  # a case that takes longer hangs


class Lines:
    """The lines of FILE, and the keys of those that were there before."""

    def __init__(self, path: Path, mode: str, label: str):
        self.path, self.common = path, {"mode": mode, "label": label}
        self.done = {self.key(line) for line in read_lines(path)}
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 open while the process lives

    @staticmethod
    def key(line: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(line.get(name)) for name in ("mode", "label", "op", "shape", "backend", "setting"))

    def emit(self, **line: Any) -> None:
        line = {**self.common, **line}
        self.done.add(self.key(line))
        self.file.write(json.dumps(line) + "\n")
        print(
            " ".join(
                f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                for k, v in line.items()
                if v not in ("", None)
            ),
            flush=True,
        )

    @contextmanager
    def case(self, **key: Any) -> Iterator[dict[str, Any] | None]:
        """The line to fill in, or None where it is on disk. An error becomes part of the line; one that is
        for good, or a hang, of the process."""
        if self.key({**self.common, **key}) in self.done:
            yield None
            return
        line: dict[str, Any] = {}
        watch = threading.Timer(
            CASE_SECONDS, lambda: self.again(**key, error=f"no answer within {CASE_SECONDS} s")
        )
        watch.daemon = True
        watch.start()
        try:
            yield line
        except Exception as error:  # whatever a case raises is its line's text, and the next case runs
            text = f"{type(error).__name__}: {error}"[:300]
            if LOST.search(str(error)):
                self.again(**key, error=text)
            line = {"error": text}
        finally:
            watch.cancel()
        self.emit(**key, **line)

    def again(self, **line: Any) -> None:
        self.emit(**line)
        print("starting again with the next case", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last may have been cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
