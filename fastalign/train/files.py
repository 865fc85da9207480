"""Files that are written completely or not at all, by one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastalign.train.errors import TrainingError, UserError

LOCK = "run.lock"
# How a full disk shows: torch and safetensors have names of their own for it.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def inside(output: Path, *parts: str) -> Path:
    """The path of something in the output directory. Refuses one that leads out of it, through a symbolic
    link for example."""
    path = output.joinpath(*parts)
    if not path.resolve().is_relative_to(output):
        raise UserError(f"{path} leads out of the output directory {output}")
    return path


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file completely or not at all: `write` gets a new file beside it, which then takes the place of
    `path`. The new file's name cannot be guessed, so that no link can lie in wait there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666))
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a directory, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync_tree(folder: Path) -> None:
    """Have everything in a directory on the disk, so that renaming it cannot come before its contents."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def move_into(source: Path, target: Path) -> None:
    """Move everything in one directory into another; files of the same name are replaced."""
    for path in source.iterdir():
        if path.is_dir() and (target / path.name).is_dir():
            move_into(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    source.rmdir()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """A full disk, or another failure to write, becomes one line that says what was not written."""
    try:
        yield
    except TrainingError:
        raise
    except WRITE_ERRORS as error:
        raise TrainingError(f"cannot write {what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an exception says, in one line of bearable length; of one that followed from the system's, what
    the system said."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__context__
    text = cause.strerror if isinstance(cause, OSError) else " ".join(str(error).split())
    return (text if len(text) <= 300 else text[:297] + "...") or type(error).__name__


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold off every other run from a directory. The lock goes with the process: what one that was killed has
    left behind holds nobody off."""
    handle = _acquire(output)
    try:
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)  # before the lock is let go: see `_acquire`
        os.close(handle)


def check_unlocked(output: Path) -> None:
    """Refuse a directory that another run is writing into."""
    if os.path.lexists(output / LOCK):
        os.close(_acquire(output))


def _acquire(output: Path) -> int:
    path = output / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 100).decode(errors="replace").strip()
            os.close(handle)
            raise UserError(
                f"another run ({owner}) is writing into the output directory {output}; wait for it, or choose "
                "another"
            ) from None
        except OSError as error:
            print(f"warning: {path}: {error.strerror}; nothing here holds off a second run in this directory")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False)):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return handle
        os.close(handle)  # its owner has removed this file in the meantime
