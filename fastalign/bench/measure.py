"""How it is measured: interleaved medians with inputs in turns, a read-only bandwidth of the same run, peak
memory of one call."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign.bench.timing import Sample, Timer, disturbed

if TYPE_CHECKING:
    from fastalign.bench.cases.case import Case, Contestant

# A sample of a short call repeats it until it takes about this long: the first call finds the caches full of
# other contestants' code and data, and must not count for much.
SAMPLE_SECONDS = 1e-2
SLOW_SECONDS = 8.0  # of one call
# Calls per sample at most: on a GPU as many as can be issued ahead.
MOST_CALLS, MOST_CALLS_CUDA = 1000, 100
# On a GPU a call that takes less is launch-bound: it is also timed as a graph of this many calls.
LAUNCH_BOUND, GRAPH_CALLS = 2e-4, 20
# Timing starts again where most samples are disturbed, so many times in all; a line with fewer undisturbed
# samples than this gets no time.
ATTEMPTS, LEAST_SAMPLES = 3, 3


@dataclass
class Result:
    """One line of the table. `status`: "ok", "wrong" (no number is given), "disturbed" (too few samples are
    of the op) or "n/a"; `message` says why. `error`: largest absolute error against fp64 on the sampled rows.
    `gbs`: the op's least traffic over the time; `share`: of the read-only bandwidth; `floor`: what the
    case's floor takes (the plain read where it has no other) over the time. `extra_mb`: peak memory
    of a call beyond what was there before it, results included.

    `ms`: the median of `samples` samples, without the `set_aside` ones that `timing.disturbed` names;
    `attempts`: how often timing was begun. `each`: [ms, system time in ms, page faults, set aside] per call
    of every sample of the last attempt. CUDA: `host_ms` is what the host takes to issue a call; `graph_ms`
    the time of a call that is replayed in a graph, for launch-bound ones."""

    name: str
    kind: str
    status: str = "ok"
    message: str = ""
    ms: float | None = None
    samples: int = 0
    gbs: float | None = None
    share: float | None = None
    floor: float | None = None
    error: float | None = None
    extra_mb: float | None = None
    set_aside: int = 0
    attempts: int = 1
    host_ms: float | None = None
    graph_ms: float | None = None
    each: list[list[float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def raw(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as int64 (up to seven bytes at the end are left out): integers need no
    arithmetic worth mentioning."""
    raw = x.reshape(-1).view(torch.uint8)
    return raw[: raw.numel() // 8 * 8].view(torch.int64)


# Reductions that read every byte once. Which one is fastest differs from machine to machine; the fastest is
# the machine's read bandwidth.
READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "int64 sum": lambda x: raw(x).sum(),
    "int64 max": lambda x: raw(x).max(),
    "int32 max": lambda x: raw(x).view(torch.int32).max(),
    "float32 sum": lambda x: raw(x).view(torch.float32).sum(),
}
_fastest_reader = "int64 sum"


def read(x: Tensor) -> Tensor:
    """Read all of `x` by the fastest reader (after `read_bandwidth` has found it)."""
    return READERS[_fastest_reader](x)


def ceiling_bytes(device: torch.device) -> int:
    """The buffer by which a machine's bandwidths are found: on a GPU so large that the gaps between launches
    do not count (4 GiB, less where the memory is smaller), half a GiB on a CPU."""
    return 512 << 20 if device.type == "cpu" else min(4 << 30, torch.cuda.mem_get_info(device)[0] // 4)


def read_bandwidth(device: torch.device, size: int, *, rounds: int = 9) -> dict[str, float]:
    """Median GB/s of every reader over a buffer of `size` bytes, in turns; the fastest becomes `read`."""
    global _fastest_reader
    buffer = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    timer = Timer(device)
    times = {name: timer.medians({name: lambda f=f: f(buffer)}, rounds)[name] for name, f in READERS.items()}
    speeds = {name: size / seconds / 1e9 for name, seconds in times.items()}
    _fastest_reader = max(speeds, key=lambda name: speeds[name])
    return speeds


def ceilings(device: torch.device, size: int, *, rounds: int = 9) -> dict[str, float]:
    """What else bounds this machine: GB/s of a copy (bytes read and bytes written) of a buffer of `size`
    bytes, TFLOP/s of a bf16 matmul."""
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    # Processors without bf16 arithmetic take seconds for larger products.
    target, n = torch.empty_like(source), 8192 if device.type == "cuda" else 1024 if size > 1 << 24 else 128
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    times = Timer(device).medians({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, rounds)
    return {"copy_gbs": 2 * size / times["copy"] / 1e9, "matmul_tflops": 2 * n**3 / times["matmul"] / 1e12}


def cache_bytes(device: torch.device) -> int:
    """The largest cache between the kernels and memory: L2 of a GPU, the last level of a CPU (64 MiB where
    the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        _size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=64 << 20)


def _size(text: str) -> int:
    """ "32768K" -> bytes."""
    text = text.strip()
    return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of one call beyond what was in use before: torch's counter on CUDA, on Linux the kernel's
    own high-water mark of the process (which sees every allocation, ours in C++ included); None elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _give_back() -> None:
    """What was freed goes back to the system where the C library keeps it: a call that lives on it would seem
    to need nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


class Runner:
    """Calls of one contestant on the case's inputs, in turns; an input that a call would destroy is first
    copied to a buffer."""

    def __init__(self, case: Case, contestant: Contestant):
        self.case, self.contestant = case, contestant
        self.turn = itertools.cycle(range(len(case.inputs)))
        self.buffer: Tensor | None = None

    def call(self, index: int | None = None) -> Callable[[], Tensor]:
        """The next call, its inputs ready."""
        first, *rest = self.case.inputs[next(self.turn) if index is None else index]
        if not self.contestant.overwrites:
            return lambda: self.contestant.run(first, *rest)
        # Depends on the input, is no leaf, and has the buffer's memory to itself: may be overwritten.
        scratch = (
            torch.empty_like(first, requires_grad=False) if self.buffer is None else self.buffer.detach()
        )
        self.buffer = None
        scratch.copy_(first)

        def run() -> Tensor:
            result = self.contestant.run(scratch, *rest)
            # A gradient in place takes the memory over; without one it is still the scratch tensor's.
            self.buffer = (scratch if scratch.shape == first.shape else result).detach()
            return result

        return run


@dataclass
class _Line:
    """A contestant that is timed."""

    result: Result
    runner: Runner
    repeats: int
    replay: Callable[[], Any] | None = None  # GRAPH_CALLS calls
    samples: list[Sample] = field(default_factory=list)
    replays: list[float] = field(default_factory=list)
    slow: bool = False  # one call takes so long that one sample must do

    @property
    def allocates(self) -> bool:
        """Whether a call has page faults of its own."""
        return self.result.kind != "read" and (self.result.extra_mb is None or self.result.extra_mb > 0.25)

    def disturbed(self) -> list[bool]:
        return disturbed(self.samples, self.allocates)

    def finish(self, least: int) -> None:
        """Fill in the result."""
        result, bad = self.result, self.disturbed()
        clean = [sample.seconds / self.repeats for sample, b in zip(self.samples, bad) if not b]
        result.each = [
            [
                round(1e3 * s.seconds / self.repeats, 5),
                round(1e3 * s.system / self.repeats, 5),
                s.faults / self.repeats,
                int(b),
            ]
            for s, b in zip(self.samples, bad)
        ]
        result.samples, result.set_aside = len(clean), sum(bad)
        if len(clean) < (1 if self.slow else min(LEAST_SAMPLES, least)):
            result.status = "disturbed"
            result.message = f"{sum(bad)} of {len(bad)} samples carry page faults of the system's memory management; measure again"
            return
        result.ms = 1e3 * statistics.median(clean)
        if self.samples[0].host is not None:
            result.host_ms = (
                1e3 * statistics.median(s.host for s in self.samples if s.host is not None) / self.repeats
            )
        if self.replays:
            result.graph_ms = 1e3 * statistics.median(self.replays) / GRAPH_CALLS


def measure(
    case: Case, device: torch.device, *, seconds: float, least: int = 5, most: int = 50, memory: bool = True
) -> list[Result]:
    """Check every contestant, then time those that are right, in turns, until `seconds` are spent: `least` to
    `most` samples each. Samples that are the machine's rather than the op's are set aside; where they are the
    most, timing starts again."""
    results = [Result(name, "peer", "n/a", why) for name, why in case.missing.items()]
    lines: list[_Line] = []
    timer = Timer(device)
    for contestant in case.contestants:
        result = Result(contestant.name, contestant.kind)
        results.insert(len(results) - len(case.missing), result)
        try:
            line = _prepare(case, contestant, result, timer, device, memory)
        except Exception as error:  # whatever a contestant raises (out of memory, no compiler, ...) concerns its own line only
            result.status, result.message = (
                "n/a",
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            )
            continue
        if line is not None:
            lines.append(line)
    for attempt in range(1, ATTEMPTS + 1):
        _take_turns(lines, timer, seconds, least, most)
        for line in lines:
            line.result.attempts = attempt
        if not any(2 * sum(line.disturbed()) > len(line.samples) for line in lines if not line.slow):
            break
    for line in lines:
        line.finish(least)
    return results


def _prepare(
    case: Case, contestant: Contestant, result: Result, timer: Timer, device: torch.device, memory: bool
) -> _Line | None:
    """The contestant's line, or None (and the result says why) where it is wrong."""
    runner = Runner(case, contestant)
    if contestant.computes:
        output = runner.call(0)()
        result.error = case.error(output)
        if why := case.check(contestant, output):
            result.status, result.message = "wrong", why
            return None
        del output
    if memory and contestant.computes:
        extra = peak_extra_bytes(runner.call(0), device)
        result.extra_mb = None if extra is None else extra / 1e6
    timer.synchronize()
    once = timer.seconds([runner.call(0)])
    most = MOST_CALLS_CUDA if timer.cuda else MOST_CALLS
    line = _Line(
        result,
        runner,
        1 if contestant.overwrites else max(1, min(most, int(SAMPLE_SECONDS / max(once, 1e-9)))),
        slow=once > SLOW_SECONDS and contestant.kind not in ("ours", "floor"),
    )
    if timer.cuda and once < LAUNCH_BOUND and not contestant.overwrites:
        try:
            line.replay = timer.captured(runner.call() for _ in range(GRAPH_CALLS))
        except Exception as error:  # it reads a result on the host, say
            result.message = f"no graph: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return line


def _take_turns(lines: list[_Line], timer: Timer, seconds: float, least: int, most: int) -> None:
    """The samples of one attempt."""
    for line in lines:
        line.samples, line.replays = [], []
    started = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - started > seconds:
            break
        shift = turn % max(1, len(lines))
        for line in lines[shift:] + lines[:shift]:
            if line.slow and line.samples:
                continue
            line.samples.append(timer.sample([line.runner.call() for _ in range(line.repeats)]))
            if line.replay is not None:
                line.replays.append(timer.seconds([line.replay]))


def add_bandwidth(case: Case, results: list[Result], machine_gbs: float) -> float:
    """Fill in gbs and share. The bandwidth they refer to (returned) is that of the plain read among the
    contestants, which ran between them, or the machine's where there is none."""
    reader = next((r for r in results if r.kind == "read" and r.ms), None)
    if reader is not None:
        reader.gbs = sum(x.nbytes for x in case.inputs[0][: case.read]) / reader.ms / 1e6
    gbs = machine_gbs if reader is None else reader.gbs
    for result in results:
        if result.ms and result.kind != "read" and case.traffic:
            result.gbs = case.traffic / result.ms / 1e6
            result.share = result.gbs / gbs
    return gbs


def add_floor(results: list[Result]) -> None:
    """Fill in the share of the floor."""
    floors = {r.kind: r.ms for r in results if r.kind in ("read", "floor") and r.ms}
    least = floors.get("floor", floors.get("read"))
    for result in results:
        if result.ms and least and result.kind not in ("read", "floor"):
            result.floor = least / result.ms
