"""The word by which a launch knows its last block belongs to that launch alone. CUDA graphs, several streams
and recorders of memory pools depend on it (tests/gpu holds them on a device); what shows it on any machine is
here, for every backend."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from checks.calls import WITH_A_LAST_BLOCK, calls_with_a_last_block
from checks.compare import same

from fastalign.runtime import ffi


def watch(monkeypatch):
    """The words that calls take from now on."""
    words, counter = [], ffi.counter

    def watched(tensor):
        words.append(counter(tensor))
        return words[-1]

    monkeypatch.setattr(ffi, "counter", watched)
    return words


@pytest.mark.parametrize("name", WITH_A_LAST_BLOCK)
def test_what_stopped_in_the_middle_leaves_nothing_behind(backend, device, name, monkeypatch):
    """A launch that does not come to its end (a capture that is never replayed, a graph on another stream at
    the same time) leaves its word at any value. The next call must not find it there."""
    call = calls_with_a_last_block(device)[name]
    words = watch(monkeypatch)
    wanted = call()
    for word in words:
        word.fill_(5)
    assert same(call(), wanted)
    if backend in ("triton", "cuda"):
        assert len(words) == 2, "a forward call has one word"
        assert words[0].data_ptr() != words[1].data_ptr()
        assert int(words[0]) == 5, "the second call took the first one's word"


@pytest.mark.parametrize("name", WITH_A_LAST_BLOCK)
def test_two_calls_at_once(backend, device, name, monkeypatch):
    """A call begins after another one has taken its word and before it is launched, as two streams or two
    captures do."""
    outer, inner = (calls_with_a_last_block(device)[name] for _ in range(2))
    wanted, nested, counter = outer(), [], ffi.counter

    def interrupted(tensor):
        word = counter(tensor)
        if not nested:
            nested.append(())
            with torch.enable_grad():  # off inside of autograd's forward
                nested[0] = inner()
        return word

    monkeypatch.setattr(ffi, "counter", interrupted)
    assert same(outer(), wanted)
    assert backend not in ("triton", "cuda") or same(nested[0], wanted)


@pytest.mark.parametrize("name", WITH_A_LAST_BLOCK)
def test_no_tensor_of_ours_outlives_a_call(backend, device, name, monkeypatch):
    """Recorders of memory pools (CUDA graph trees under torch.compile's reduce-overhead) refuse tensors that
    stay alive in their pool."""
    call = calls_with_a_last_block(device)[name]
    # The tests' own allocator remembers what it gave out.
    monkeypatch.setattr(
        ffi, "empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device)
    )

    def alive():
        gc.collect()
        return {id(x): x for x in gc.get_objects() if isinstance(x, torch.Tensor)}

    before = alive()
    results = call()
    assert not any(math.isnan(float(x.sum())) for x in results)
    del results
    left = [tuple(x.shape) for i, x in alive().items() if i not in before]
    assert not left, f"tensors of shapes {left} are still alive"
