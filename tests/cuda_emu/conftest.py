"""Everything here runs on backend "cuda" through the emulator: `pytest tests/cuda_emu`, a run of its own,
with no other option."""

from __future__ import annotations

import pytest

import fastalign as fa


def pytest_configure(config):
    config.option.backend = "cuda"


@pytest.fixture
def emulated(emulator):
    """The emulated extension, forced as the backend."""
    with fa.use_backend("cuda"):
        yield emulator
