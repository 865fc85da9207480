"""One sample of a timed call: on a GPU without the host's time, on a CPU with the system time and page faults
that came with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

try:
    import resource
except ImportError:  # not on this system: samples then carry no system time, and none is set aside
    resource = None  # type: ignore[assignment]

# On a GPU the calls of a sample are issued while the device sleeps: what is timed between two events is then
# the device's work alone. Cycles of sleep per call to begin with (about a quarter of a millisecond), and at
# most per sample.
SLEEP_CYCLES, MOST_SLEEP_CYCLES = 500_000, 100_000_000
# A page fault costs about a quarter of a microsecond and more: beyond this many per second, a sample says
# something of the machine's memory management. The system's clock of system time ticks every few
# milliseconds, so that a share of a short sample says nothing.
FAULTS_PER_SECOND, SYSTEM_SHARE, SYSTEM_TICK = 1e5, 0.1, 0.01


@dataclass(frozen=True)
class Sample:
    """Seconds of the calls of one sample together. CPU: the system time (of all threads) and the page faults
    in them; CUDA: the host's time to issue them."""

    seconds: float
    system: float = 0.0
    faults: int = 0
    host: float | None = None


def usage() -> tuple[float, int]:
    """(seconds of system time, page faults) of this process so far."""
    if resource is None:
        return 0.0, 0
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_stime, used.ru_minflt + used.ru_majflt


def disturbed(samples: Sequence[Sample], allocates: bool) -> list[bool]:
    """Which samples carry page faults or system time that are not the op's own. A call that allocates has
    both of its own: what its samples have in the median. A call that does not has none: memory that was
    touched before faults only if the system took it away in between."""
    own_faults, own_system = 0.0, 0.0
    if allocates and samples:
        own_faults, own_system = (
            statistics.median(s.faults for s in samples),
            statistics.median(s.system for s in samples),
        )
    return [
        s.faults - own_faults > FAULTS_PER_SECOND * s.seconds
        or s.system - own_system > max(SYSTEM_SHARE * s.seconds, SYSTEM_TICK)
        for s in samples
    ]


class Timer:
    """Times calls: by CUDA events on a GPU (the host runs ahead), by the clock on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.cycles = SLEEP_CYCLES  # per call; grows to what the host was seen to need

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sample(self, calls: Iterable[Callable[[], Any]]) -> Sample:
        """Of all calls together."""
        calls = list(calls)
        if not self.cuda:
            system, faults = usage()
            start = time.perf_counter()
            for call in calls:
                call()
            seconds = time.perf_counter() - start
            after = usage()
            return Sample(seconds, after[0] - system, after[1] - faults)
        asleep, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        cycles = min(self.cycles * max(1, len(calls)), MOST_SLEEP_CYCLES)
        asleep.record()
        torch.cuda._sleep(cycles)
        start.record()
        began = time.perf_counter()
        for call in calls:
            call()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        slept = asleep.elapsed_time(start) / 1e3
        if host > slept:  # the device woke before all was issued: sleep longer from now on
            self.cycles = min(MOST_SLEEP_CYCLES, int(self.cycles * min(4.0, 1.25 * host / max(slept, 1e-6))))
        return Sample(start.elapsed_time(end) / 1e3, host=host)

    def seconds(self, calls: Iterable[Callable[[], Any]]) -> float:
        """Of all calls together."""
        return self.sample(calls).seconds

    def medians(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Of calls that take turns, without the samples that are `disturbed`, unless those are the most."""
        samples: dict[str, list[Sample]] = {name: [] for name in calls}
        for i in range(rounds + 1):
            for name, call in calls.items():
                sample = self.sample([call])
                if i:  # the first is warm-up
                    samples[name].append(sample)
        return {
            name: statistics.median(s.seconds for s in kept(found) or found)
            for name, found in samples.items()
        }

    def captured(self, calls: Iterable[Callable[[], Any]]) -> Callable[[], Any]:
        """The calls as one CUDA graph: what returns replays them without the host."""
        calls, side = list(calls), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay


def kept(samples: Sequence[Sample], allocates: bool = False) -> list[Sample]:
    """Those that are not `disturbed`; none where these are less than half."""
    clean = [s for s, bad in zip(samples, disturbed(samples, allocates)) if not bad]
    return clean if 2 * len(clean) >= len(samples) else []
