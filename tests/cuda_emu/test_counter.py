"""Graphs, without a device: a capture runs nothing, it notes the fills and launches; a replay runs what was
noted, on the same memory."""

from __future__ import annotations

import pytest
import torch
from checks.calls import calls_with_a_last_block
from checks.compare import same

from fastalign.runtime import ffi


class Graph:
    """What `torch.cuda.graph` does to a call, as far as the words of the last blocks go: during the capture
    torch.zeros has memory that holds anything, and neither its fill nor the kernels run; both do in every
    replay, in order."""

    def __init__(self, monkeypatch, call):
        self.steps = []
        launch, zeros = ffi.launch, torch.zeros

        def captured_zeros(*args, **kwargs):
            word = zeros(*args, **kwargs).fill_(77)
            self.steps.append(word.zero_)
            return word

        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", captured_zeros)
            # What a launch points to has to live as long as the graph: its pool.
            patch.setattr(ffi, "launch", lambda *args: self.steps.append(lambda: launch(*args)))
            patch.setattr(ffi, "empty", lambda *args, empty=ffi.empty: self.keep(empty(*args)))
            self.pool = []
            self.results = self.pool[: len(call())]

    def keep(self, tensor):
        self.pool.append(tensor)
        return tensor

    def replay(self):
        for step in self.steps:
            step()
        return self.results


@pytest.fixture
def gae(emulated):
    """An op without a backward: its results are its first allocations."""
    call = calls_with_a_last_block("cpu")["gae"]
    return lambda: call()[:2]


def test_a_second_graph_whose_first_was_never_replayed(gae, monkeypatch):
    Graph(monkeypatch, gae)
    second = Graph(monkeypatch, gae)
    assert len(second.steps) == 2, "a fill and a launch"
    assert same(second.replay(), gae())


def test_two_graphs_replayed_in_turns(gae, monkeypatch):
    """One's launch lies between the other's fill and launch, as on two streams."""
    wanted = gae()
    first, second = Graph(monkeypatch, gae), Graph(monkeypatch, gae)
    assert len(first.steps) == len(second.steps) == 2, "a fill and a launch"
    for _ in range(3):
        for a, b in zip(first.steps, second.steps):
            a()
            b()
        assert same(first.results, wanted) and same(second.results, wanted)
        for x in (*first.results, *second.results):
            x.fill_(float("nan"))
