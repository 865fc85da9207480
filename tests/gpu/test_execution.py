"""How the ops behave on a device: no synchronisation, CUDA graphs, streams, launch counts, torch.compile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks.calls import NAMES, public_calls

import fastalign as fa
from fastalign.runtime.op import debug_checks
from fastalign.testing import make_batch, make_labels, make_logits


@pytest.mark.parametrize("name", NAMES)
def test_no_synchronisation(backend, name):
    """Forward and backward neither read a device tensor nor copy one to the host."""
    _, call = public_calls("cuda")[name]
    call()  # compiles, loads, fills caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _warm_up(call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)


def _change(tensor):
    with torch.no_grad():
        tensor.mul_(1.25)


@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph(backend, name):
    """A captured forward and backward, replayed on new input values, gives the bits of a plain call."""
    tensor, call = public_calls("cuda")[name]
    _warm_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        _change(tensor)
        graph.replay()
        for got, want in zip(captured, call()):
            assert torch.equal(got, want)


# The ops that count their blocks to know the last one; tests/contract/test_contract_counter.py holds on any
# machine what the tests below hold on a device.
WITH_LAST_BLOCK = ("preference_loss", "listwise_loss", "gae", "policy_loss", "value_loss")


def _two_graphs(name):
    """Two captures of an op, of unequal sizes, none of them replayed yet: [(graph, its outputs, what they
    must be)]."""
    calls = [public_calls("cuda", pairs=pairs)[name][1] for pairs in (5, 9)]
    found = []
    for call in calls:
        _warm_up(call)
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        found.append((graph, outputs, call()))
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("name", WITH_LAST_BLOCK)
def test_second_graph_does_not_depend_on_the_first(backend, name):
    """Two captures share the capture stream; the second must be right even if the first is never replayed, or
    gone. No other graph may have run before, and memory that was never written must not be zero by chance: a
    process of its own, whose free memory is garbage."""
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import torch
import fastalign as fa
from test_execution import _two_graphs
torch.full((1 << 28,), -1, dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
torch.cuda.empty_cache()
with fa.use_backend({backend!r}):
    (first, _, _), (second, outputs, want) = _two_graphs({name!r})
del first
for _ in range(2):
    for x in outputs:
        x.fill_(-7)
    second.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, want, strict=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", WITH_LAST_BLOCK)
def test_two_graphs_on_two_streams(backend, name):
    """Both in flight at the same time, over and over: neither counts the other's blocks."""
    graphs = _two_graphs(name)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(200):
        for (graph, _, _), stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for graph, outputs, want in graphs:
        for got, expected in zip(outputs, want, strict=True):
            assert torch.equal(got, expected)
            got.fill_(-7)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(outputs, want, strict=True))


@pytest.mark.parametrize("name", WITH_LAST_BLOCK)
def test_two_streams_at_once(backend, name):
    """Plain calls, queued on two streams without waiting for each other."""
    calls = [public_calls("cuda", pairs=pairs)[name][1] for pairs in (5, 9)]
    wanted = [call() for call in calls]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # so that both streams' work is queued before any of it runs
    for _ in range(50):
        for call, stream, want in zip(calls, streams, wanted):
            with torch.cuda.stream(stream):
                results.append((call(), want))
    torch.cuda.synchronize()
    for got, want in results:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compile_reduce_overhead(backend):
    """CUDA graph trees record the ops, forward and backward, and refuse whatever of ours stays alive in their
    pool."""
    batch = make_batch(4, device="cuda", vocab=200)
    logits = make_logits(batch.packed.labels.numel(), 200, device="cuda")
    cu_seqlens, mask, ref = batch.packed.cu_seqlens, batch.packed.mask, batch.ref_logprobs
    offsets, scores = torch.tensor([0, 3, 8], device="cuda"), torch.arange(8, device="cuda")

    def loss(logits):
        logprobs = fa.token_logprobs(logits, batch.packed.labels)
        advantages = fa.gae(ref, logprobs, cu_seqlens, mask=mask).advantages
        out = (
            fa.preference_loss(logprobs, ref, cu_seqlens, mask=mask).loss
            + fa.policy_loss(logprobs, ref, advantages, mask=mask).loss
        )
        return out + fa.listwise_loss(logprobs, ref, cu_seqlens, offsets, scores, mask=mask).loss

    compiled, results = torch.compile(loss, fullgraph=True, mode="reduce-overhead"), []
    for function in (loss, *[compiled] * 4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        (grad,) = torch.autograd.grad(value, leaf)
        results.append((value.detach().clone(), grad.clone()))
    for again in results[1:]:
        for a, b in zip(results[0], again):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_current_stream(backend, name):
    """On a stream of one's own the ops wait for that stream's work: their input is written late on it."""
    tensor, call = public_calls("cuda")[name]
    original = tensor.detach().clone()
    _change(tensor)
    want = call()
    with torch.no_grad():
        tensor.copy_(original)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        _change(tensor)
        got = call()
    stream.synchronize()
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def _kernels(call):
    """Names of the GPU kernels of one call, PyTorch's own and copies left out, and how many kernels there
    were in all."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        call()
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [
        name for name in events if not name.startswith(("Memcpy", "Memset")) and "Synchronize" not in name
    ]
    return [name for name in kernels if "at::" not in name], len(kernels)


@pytest.mark.parametrize("name", ["preference", "unpaired", "policy"])
def test_launches(backend, record_property, name):
    """One kernel forward, one kernel backward; what the public function adds (metrics, the pairs of single
    responses) is recorded."""
    batch = make_batch(64, min_len=800, max_len=1100, device="cuda")
    logprobs = batch.logprobs.clone().requires_grad_()
    one, outputs = torch.ones((), device="cuda"), []
    cu_seqlens, mask = batch.packed.cu_seqlens, batch.packed.mask
    desirable = torch.arange(128, device="cuda") % 3 == 0
    calls = {
        "preference": lambda: fa.preference_loss(logprobs, batch.ref_logprobs, cu_seqlens, mask=mask),
        "unpaired": lambda: fa.unpaired_loss(
            logprobs, batch.ref_logprobs, cu_seqlens, desirable, mask=mask, baseline=0.1
        ),
        "policy": lambda: fa.policy_loss(logprobs, batch.ref_logprobs, batch.logprobs, mask=mask),
    }

    def forward():
        outputs.append(calls[name]())

    def backward():
        torch.autograd.grad(outputs[-1].loss, logprobs, one, retain_graph=True)

    for direction, call in (("forward", forward), ("backward", backward)):
        call()  # warm-up
        ours, total = _kernels(call)
        record_property(f"{backend}_{name}_{direction}_kernels", f"{len(ours)} of {total}")
        assert len(ours) == 1, (direction, ours)


def test_compile_fullgraph(backend):
    """A compiled loss function with the ops inside gives the eager bits."""
    batch = make_batch(4, device="cuda", vocab=200)
    logits = make_logits(batch.packed.labels.numel(), 200, device="cuda")

    def loss(logits):
        logprobs = fa.token_logprobs(logits, batch.packed.labels)
        return fa.preference_loss(
            logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask
        ).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_debug_checks_name_the_label(backend):
    """Without a synchronisation a label outside the vocabulary gives NaN; under debug_checks it raises as on
    the CPU."""
    logits, labels = make_logits(3, 20, device="cuda"), make_labels(3, 20, device="cuda")
    labels[1] = 20
    assert bool(torch.isnan(fa.token_logprobs(logits, labels)[1]))
    with debug_checks(), pytest.raises(IndexError, match=r"labels\[1\]"):
        fa.token_logprobs(logits, labels)
