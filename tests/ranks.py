"""Several gloo processes on one machine, for tests of what is summed over ranks."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(rank, *args)`, a function of a test module, returns on each of `world` ranks of the default
    group. The processes are copies of one that has imported torch and fastalign once for all tests."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fastalign", "torch.distributed"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, folder, work, args), nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()  # the file of the meeting goes with the last
    finally:
        dist.destroy_process_group()
