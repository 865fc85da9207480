"""Tests that need a CUDA or ROCm device: `pytest tests/gpu --device cuda --backend triton,cuda`
(benchmarks/gpu_gate.sh does). Not collected by a plain `pytest`; asked for without a device they fail, they
are never skipped for want of one."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    if not items:
        return
    if config.getoption("--device") != "cuda":
        raise pytest.UsageError("tests/gpu runs on a GPU: add --device cuda --backend triton,cuda")
    if not torch.cuda.is_available() and not config.option.collectonly:
        raise pytest.UsageError("tests/gpu needs a CUDA or ROCm device, and torch sees none")


@pytest.fixture(autouse=True)
def no_memory_left_behind():
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
