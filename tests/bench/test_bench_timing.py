"""What counts as a sample of `fastalign bench`: the op's time, not the host's on a GPU and not the memory
management's on a CPU."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from fastalign.bench import SHAPES, command, measure, timing
from fastalign.bench.cases import make_case
from fastalign.bench.timing import Sample

CPU = torch.device("cpu")
CLEAN = Sample(0.010, system=0.0, faults=3)
FAULTING = Sample(0.040, system=0.030, faults=128_000)  # half a gigabyte that the system took away in between


def test_faults_and_system_time_are_seen():
    """Pages touched for the first time are faults of the sample, and of no other."""
    timer = timing.Timer(CPU)
    fresh = timer.sample([lambda: torch.empty(64 << 20, dtype=torch.uint8).fill_(1)])
    nothing = timer.sample([lambda: None])
    assert (
        fresh.faults > 16 and nothing.faults < fresh.faults and fresh.system >= 0.0 and nothing.host is None
    )


@pytest.mark.parametrize(
    "sample,allocates,expected",
    [
        (CLEAN, False, False),
        (FAULTING, False, True),
        (FAULTING, True, True),  # its own is what the others have
        (Sample(0.040, system=0.030, faults=0), False, True),  # system time without faults: compaction, say
        (Sample(0.010, system=0.004, faults=0), False, False),  # one tick of the system's clock says nothing
        (Sample(0.012, system=0.0, faults=2000), False, True),  # faults are counted exactly
    ],
)
def test_what_is_disturbed(sample, allocates, expected):
    assert timing.disturbed([CLEAN, CLEAN, sample], allocates) == [False, False, expected]


def test_a_call_that_allocates_has_faults_of_its_own():
    assert timing.disturbed([FAULTING] * 3, allocates=True) == [False] * 3
    assert timing.disturbed([FAULTING] * 3, allocates=False) == [True] * 3


def scripted(monkeypatch, samples):
    """Timer.sample gives these, one after the other; the last for ever."""
    samples = list(samples)
    monkeypatch.setattr(
        timing.Timer, "sample", lambda self, calls: samples.pop(0) if len(samples) > 1 else samples[0]
    )


def ours(case):
    case.contestants = case.contestants[:1]
    return case


def measured(monkeypatch, samples, least=5, most=5):
    case = ours(
        make_case(
            "kl_estimate", SHAPES["tiny"]["kl_estimate"][0], CPU, compile=False, backends=("reference",)
        )
    )
    monkeypatch.setattr(measure, "peak_extra_bytes", lambda call, device: 0)
    scripted(monkeypatch, samples)
    return next(r for r in measure.measure(case, CPU, seconds=0, least=least, most=most) if r.kind == "ours")


def test_disturbed_samples_are_set_aside_and_counted(monkeypatch):
    once = Sample(0.010)
    result = measured(monkeypatch, [once, CLEAN, FAULTING, CLEAN, CLEAN, FAULTING])
    assert (
        result.ms == pytest.approx(10.0)
        and result.samples == 3
        and result.set_aside == 2
        and result.attempts == 1
    )
    assert [line[3] for line in result.each] == [0, 1, 0, 0, 1] and result.each[1][:3] == [
        40.0,
        30.0,
        128_000,
    ]
    result.gbs = result.share = 1.0
    assert "2 of 5 of fastalign reference" in command.render([result])
    assert json.loads(json.dumps(result.as_dict()))["set_aside"] == 2


def test_timing_starts_again_where_most_are_disturbed(monkeypatch):
    result = measured(monkeypatch, [Sample(0.010), *[FAULTING] * 4, CLEAN, *[CLEAN] * 5])
    assert (
        result.attempts == 2
        and result.samples == 5
        and result.set_aside == 0
        and result.ms == pytest.approx(10.0)
    )
    result.gbs = result.share = 1.0
    assert "begun 2 times" in command.render([result])


def test_a_line_without_samples_of_its_own_gets_no_time(monkeypatch):
    result = measured(monkeypatch, [Sample(0.010), FAULTING])
    assert (
        result.status == "disturbed"
        and result.ms is None
        and result.attempts == measure.ATTEMPTS
        and "page faults" in result.message
    )
    assert "disturbed" in command.render([result])


def test_bandwidths_leave_disturbed_samples_out(monkeypatch):
    scripted(monkeypatch, [CLEAN, CLEAN, FAULTING, CLEAN])
    assert timing.Timer(CPU).medians({"read": lambda: None}, 3) == {"read": 0.010}
    scripted(monkeypatch, [FAULTING])
    assert timing.Timer(CPU).medians({"read": lambda: None}, 3) == {"read": 0.040}


class FakeDevice:
    """torch.cuda as far as Timer uses it: what was issued, in order; sleeping lasts a second per 1e9
    cycles."""

    def __init__(self, monkeypatch):
        self.issued, self.slept = [], 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.slept
                fake.issued.append(self)

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        def sleep(cycles):
            fake.issued.append(("sleep", cycles))
            fake.slept += cycles / 1e9

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)


def test_a_gpu_sleeps_while_the_host_issues(monkeypatch):
    """Sleep, first event, calls, second event: the host's time lies before the first event on the device."""
    device = FakeDevice(monkeypatch)
    sample = timing.Timer(torch.device("cuda")).sample([lambda: device.issued.append("call")] * 2)
    asleep, sleep, start, *calls, end = device.issued
    assert (
        sleep == ("sleep", 2 * timing.SLEEP_CYCLES)
        and calls == ["call", "call"]
        and asleep.at < start.at == end.at
    )
    assert sample.seconds == 0.0 and sample.host > 0.0


def test_the_sleep_grows_to_what_the_host_needs(monkeypatch):
    device = FakeDevice(monkeypatch)
    clock = iter(range(100))
    monkeypatch.setattr(
        timing.time, "perf_counter", lambda: float(next(clock))
    )  # issuing takes the host a second
    timer = timing.Timer(torch.device("cuda"))
    for _ in range(20):
        timer.sample([lambda: None])
    slept = [entry[1] for entry in device.issued if isinstance(entry, tuple)]
    assert slept[:3] == [timing.SLEEP_CYCLES, 4 * timing.SLEEP_CYCLES, 16 * timing.SLEEP_CYCLES]
    assert slept[-1] == timing.MOST_SLEEP_CYCLES


def test_ceilings_are_measured_on_much_memory_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    assert measure.ceiling_bytes(torch.device("cuda")) == 4 << 30 and measure.ceiling_bytes(CPU) == 512 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    assert measure.ceiling_bytes(torch.device("cuda")) == 2 << 30


def test_a_slow_contestant_is_timed_once(monkeypatch):
    """A peer that takes minutes does not hold the others up."""
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.02)
    shape = SHAPES["tiny"]["kl_estimate"][0]
    case = make_case("kl_estimate", shape, CPU, compile=False, backends=("reference",))
    own, peer = case.contestants[0], next(c for c in case.contestants if c.kind == "eager")

    def sluggish(*inputs):
        time.sleep(0.03)
        return peer.run(*inputs)

    case.contestants = [own, dataclasses.replace(peer, run=sluggish)]
    results = measure.measure(case, CPU, seconds=0, least=6, most=6, memory=False)
    slow, fast = (next(r for r in results if r.kind == kind) for kind in ("eager", "ours"))
    assert slow.samples + slow.set_aside == 1 and fast.samples + fast.set_aside == 6
