"""Everything here runs on backend "cuda" through the emulator, whatever --backend says."""
from __future__ import annotations

import pytest

import fastalign as fa


@pytest.fixture
def emulated(emulator):
    """The emulated extension, forced as the backend."""
    with fa.use_backend("cuda"):
        yield emulator
