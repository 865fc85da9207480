"""The fused head on every backend of the row kernels: tiles of rows and vocabulary, two towers, a frozen
head, products of one shape. More of it, on the CPU, in tests/rows/test_linear.py."""

from __future__ import annotations

import pytest
from checks.linear import check_frozen, check_invariant, check_outputs, check_two_towers

# On each test: the emulator's file takes the functions alone.
SMALL = pytest.mark.usefixtures("small_tiles")


@SMALL
@pytest.mark.parametrize("budget", ["all", "parts"])
def test_outputs_and_gradients(backend, device, budget):
    check_outputs(device, budget)


@SMALL
def test_two_towers(backend, device):
    check_two_towers(device, "parts")


@SMALL
@pytest.mark.parametrize("output", ["logprob", "kl_ref_policy"])
def test_frozen_head(backend, device, output):
    check_frozen(device, output, "some rows")


@SMALL
def test_batch_invariant(backend, device):
    check_invariant(device)
