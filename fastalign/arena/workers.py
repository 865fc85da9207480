"""Pieces of work side by side, each in a process with one thread of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import torch

from fastalign.train.errors import TrainingError, UserError

Work = Callable[..., Any]
Outcome = tuple[Any, Any, "TrainingError | None"]  # the piece, its result, what it broke off with


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(work: Work, pieces: Sequence[Any], workers: int, *arguments: Any) -> Iterator[Outcome]:
    """work(*arguments, piece) for every piece, `workers` of them at a time, in the order in which they end.
    Every one has one thread, so that its bits do not depend on how many run beside it; a single worker is this
    process. A piece that raises `TrainingError` does not stop the others. What else a piece raises, an
    interruption and the end of this process end the workers at once.

    Raises:
        TrainingError: a worker was killed."""
    if min(workers, len(pieces)) <= 1:
        with _one_thread():
            for piece in pieces:
                yield _outcome(work, arguments, piece)
        return
    pool = ProcessPoolExecutor(min(workers, len(pieces)), _context(work), initializer=_begin)
    whole = False
    try:
        for done in as_completed([pool.submit(_outcome, work, arguments, piece) for piece in pieces]):
            yield done.result()
        whole = True
    except BrokenProcessPool:
        raise TrainingError(
            "a worker was killed, perhaps for want of memory: --workers 1 needs the least"
        ) from None
    finally:
        if not whole:
            for child in multiprocessing.active_children():
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _context(work: Work) -> Any:
    """How processes begin: as copies of one that has done the imports and nothing else, where there is such a
    way."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    return context


def _outcome(work: Work, arguments: tuple[Any, ...], piece: Any) -> Outcome:
    try:
        return piece, work(*arguments, piece), None
    except UserError as error:
        raise UserError(str(error)) from None  # of its kinds not all can be sent to another process
    except TrainingError as error:
        return piece, None, error


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin() -> None:
    """Of a worker: one thread; an interruption is for the process that started it to hear, and it ends with
    that."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
