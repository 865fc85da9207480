"""A process for the trainers' own functions: see checks/trainers.py."""

from __future__ import annotations

import tempfile

import pytest
import torch
from checks.trainers import add_entry_points, make_up


def pytest_sessionstart(session):
    make_up()
    session.config.folder = tempfile.TemporaryDirectory()
    add_entry_points(session.config.folder.name)


def pytest_sessionfinish(session):
    session.config.folder.cleanup()


@pytest.fixture
def draw():
    """Random numbers: draw(*shape), the same ones for every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def ragged(draw):
    """[5, 9]: a mask with holes, an empty row and one of a single token."""
    mask = draw(5, 9) > -0.6
    mask[1], mask[2, 1:], mask[2, 0] = False, False, True
    return mask
