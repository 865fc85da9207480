"""Both schemes of the GAE kernels, forced: a block per sequence, and a block per tile."""

from __future__ import annotations

import math

import pytest
import torch
from checks.gae import (
    PACKS,
    check_by_hand,
    check_equals_the_loop,
    check_holes_are_no_steps,
    check_moments_of_awkward_values,
    check_nothing_leaks,
    check_two_runs_are_equal,
    gae_loop,
    make_gae_batch,
)

import fastalign as fa
from fastalign.ops.columns import GAE_TILE as TILE
from fastalign.runtime import ffi
from fastalign.runtime.op import OPS

CU = [
    0,
    3,
    3,
    TILE,
    2 * TILE,
    4 * TILE + 1,
    4 * TILE + 2,
    7 * TILE + 2,
]  # sequences of a tile, just more, and several


@pytest.fixture(params=[1, 2], ids=["sequences", "tiles"])
def scheme(request, emulated):
    emulated._emu_set_seed(20 + request.param)
    emulated.set_gae_scheme(request.param)
    return request.param


@pytest.mark.parametrize("cu", [*PACKS, CU], ids=str)
def test_equals_the_loop(scheme, cu):
    check_equals_the_loop("cpu", cu)


def test_contract(scheme):
    check_by_hand("cpu")
    check_holes_are_no_steps("cpu")
    check_nothing_leaks("cpu")
    check_two_runs_are_equal("cpu")
    check_moments_of_awkward_values("cpu")


def test_both_schemes_give_the_same_bits(emulated):
    rewards, values, cu_seqlens, mask, bootstrap = make_gae_batch(CU)
    results = []
    for number in (1, 2):
        emulated.set_gae_scheme(number)
        results.append(fa.gae(rewards, values, cu_seqlens, mask=mask, bootstrap=bootstrap, gamma=0.99))
    for a, b in zip(results[0][:2], results[1]):
        assert torch.equal(a, b)


def test_one_long_sequence_is_served_by_tiles(emulated):
    """What the launcher itself chooses, on both sides of its bound."""
    for tokens in (16 * TILE - 1, 16 * TILE + 5):
        arguments = make_gae_batch([0, tokens])[:3]
        for got, want in zip(fa.gae(*arguments), gae_loop(*arguments)):
            assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(
    "cu", [[0, 4, 3000], [0, 7, 3, 2500], [-2, 4, 2500], [2, 4, 2500], [0, 2000]], ids=str
)
def test_malformed_packing_gives_nan_and_writes_everything(scheme, monkeypatch, cu):
    """On a GPU cu_seqlens is not checked: the moments are NaN, and so is every token that belongs to no
    sequence."""
    monkeypatch.setattr(OPS["gae_fwd"], "check", None)
    empty = ffi.empty
    monkeypatch.setattr(ffi, "empty", lambda *args: empty(*args).fill_(-7.0))
    out = fa.gae(torch.ones(2500), torch.ones(2500), torch.tensor(cu, dtype=torch.int32))
    assert all(math.isnan(float(m)) for m in out.moments)
    for x in out[:2]:
        assert not bool((x == -7.0).any())
        if cu != [0, 7, 3, 2500]:  # there every token belongs to a sequence, some to two
            assert bool(torch.isnan(x).any())


def test_scheme_is_checked(emulated):
    for number in (-1, 3):
        with pytest.raises(ValueError, match="0 .automatic., 1 .a block per sequence. or 2"):
            emulated.set_gae_scheme(number)
