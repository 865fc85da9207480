"""The CPU policy kernels on every instruction set of this machine: against fp64, and the same bits from all of them and for every thread count."""

from __future__ import annotations

import pytest
import torch
from test_contract_policy import FULL, compare, make, run

import fastalign as fa
from fastalign import _C

CALLS = {
    "ppo": {"dual_clip": 1.5}, "grpo": {**FULL, "loss": "grpo"}, "gspo": {"loss": "gspo"}, "sapo": {"loss": "sapo"}, "vespo": {"loss": "vespo"},
    "gmpo": {"loss": "gmpo", "needs": ("ref_logprobs",), "kl_coef": 0.1, "kl_kind": "k3+"},
}  # fmt: skip


@pytest.fixture
def restored():
    threads = torch.get_num_threads()
    yield
    _C.set_cpu_isa("auto")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CALLS)
def test_every_instruction_set_and_thread_count(restored, name):
    """The AVX kernels round as the generic ones do: no multiply-add is fused but where the source says so."""
    batch = make("cpu", lengths=(3000, 1, 0, 700, 5000, 33))
    results = []
    for isa in _C.cpu_isas():
        for threads in (1, 2):
            _C.set_cpu_isa(isa)
            torch.set_num_threads(threads)
            with fa.use_backend("cpu"):
                results.append(run(batch, **CALLS[name]))
        compare(batch, **CALLS[name])
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(other[key], value), key
