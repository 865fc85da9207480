"""How it is measured: interleaved medians with inputs in turns, a read-only bandwidth of the same run, peak memory of one call."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastalign.bench.cases import Case, Contestant

# A sample of a short call repeats it until it takes about this long: the first call finds the caches full of other contestants' code and data, and
# must not count for much.
SAMPLE_SECONDS = 1e-2


@dataclass
class Result:
    """One line of the table. `status`: "ok", "wrong" (no number is given) or "n/a"; `message` says why. `error`: largest absolute error against
    fp64 on the sampled rows. `gbs`: the op's least traffic over the time; `share`: of the read-only bandwidth. `extra_mb`: peak memory of a call
    beyond what was there before it, results included."""

    name: str
    kind: str
    status: str = "ok"
    message: str = ""
    ms: float | None = None
    samples: int = 0
    gbs: float | None = None
    share: float | None = None
    error: float | None = None
    extra_mb: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def raw(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as int64 (up to seven bytes at the end are left out): integers need no arithmetic worth mentioning."""
    raw = x.reshape(-1).view(torch.uint8)
    return raw[: raw.numel() // 8 * 8].view(torch.int64)


# Reductions that read every byte once. Which one is fastest differs from machine to machine; the fastest is the machine's read bandwidth.
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
    """What else bounds this machine: GB/s of a copy (bytes read and bytes written) of a buffer of `size` bytes, TFLOP/s of a bf16 matmul."""
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    target, n = torch.empty_like(source), 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    times = Timer(device).medians({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, rounds)
    return {"copy_gbs": 2 * size / times["copy"] / 1e9, "matmul_tflops": 2 * n**3 / times["matmul"] / 1e12}


class Timer:
    """Seconds of calls: by CUDA events on a GPU (the host runs ahead), by the clock on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, calls: Iterable[Callable[[], Any]]) -> float:
        """Of all calls together."""
        calls = list(calls)
        if not self.cuda:
            start = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def medians(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(rounds + 1):
            for name, call in calls.items():
                seconds = self.seconds([call])
                if i:  # the first is warm-up
                    times[name].append(seconds)
        return {name: statistics.median(t) for name, t in times.items()}


def cache_bytes(device: torch.device) -> int:
    """The largest cache between the kernels and memory: L2 of a GPU, the last level of a CPU (64 MiB where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [_size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=64 << 20)


def _size(text: str) -> int:
    """ "32768K" -> bytes."""
    text = text.strip()
    return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of one call beyond what was in use before: torch's counter on CUDA, on Linux the kernel's own high-water mark of the
    process (which sees every allocation, ours in C++ included); None elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


class Runner:
    """Calls of one contestant on the case's inputs, in turns; an input that a call would destroy is first copied to a buffer."""

    def __init__(self, case: Case, contestant: Contestant):
        self.case, self.contestant = case, contestant
        self.turn = itertools.cycle(range(len(case.inputs)))
        self.buffer = torch.empty_like(case.inputs[0][0], requires_grad=False) if contestant.overwrites else None

    def call(self, index: int | None = None) -> Callable[[], Tensor]:
        """The next call, its inputs ready."""
        first, *rest = self.case.inputs[next(self.turn) if index is None else index]
        if self.buffer is not None:
            first = self.buffer.detach().copy_(first)  # depends on the input and is no leaf: may be overwritten
        return lambda: self.contestant.run(first, *rest)


def measure(case: Case, device: torch.device, *, seconds: float, least: int = 5, most: int = 50, memory: bool = True) -> list[Result]:
    """Check every contestant, then time those that are right, in turns, until `seconds` are spent: `least` to `most` samples each."""
    results = [Result(name, "peer", "n/a", why) for name, why in case.missing.items()]
    running: list[tuple[Result, Runner, int]] = []
    timer = Timer(device)
    for contestant in case.contestants:
        result = Result(contestant.name, contestant.kind)
        results.insert(len(results) - len(case.missing), result)
        try:
            runner = Runner(case, contestant)
            if contestant.computes:
                output = runner.call(0)()
                result.error = case.error(output)
                if why := case.check(contestant, output):
                    result.status, result.message = "wrong", why
                    continue
                del output
            if memory and contestant.computes:
                extra = peak_extra_bytes(runner.call(0), device)
                result.extra_mb = None if extra is None else extra / 1e6
            timer.synchronize()
            once = timer.seconds([runner.call(0)])
        except Exception as error:  # whatever a contestant raises (out of memory, no compiler, ...) concerns its own line only
            result.status, result.message = "n/a", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        running.append((result, runner, 1 if contestant.overwrites else max(1, min(1000, int(SAMPLE_SECONDS / max(once, 1e-9))))))
    times: dict[str, list[float]] = {result.name: [] for result, _, _ in running}
    started = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - started > seconds:
            break
        shift = turn % max(1, len(running))
        for result, runner, repeats in running[shift:] + running[:shift]:
            calls = [runner.call() for _ in range(repeats)]
            times[result.name].append(timer.seconds(calls) / repeats)
    for result, _, _ in running:
        result.ms, result.samples = 1e3 * statistics.median(times[result.name]), len(times[result.name])
    return results


def add_bandwidth(case: Case, results: list[Result], machine_gbs: float) -> float:
    """Fill in gbs and share. The bandwidth they refer to (returned) is that of the plain read among the contestants, which ran between
    them, or the machine's where there is none."""
    reader = next((r for r in results if r.kind == "read" and r.ms), None)
    if reader is not None:
        reader.gbs = sum(x.nbytes for x in case.inputs[0][: case.read]) / reader.ms / 1e6
    gbs = machine_gbs if reader is None else reader.gbs
    for result in results:
        if result.ms and result.kind != "read":
            result.gbs = case.traffic / result.ms / 1e6
            result.share = result.gbs / gbs
    return gbs
