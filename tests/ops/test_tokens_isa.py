"""The CPU kernels over per-token scalars on every instruction set of this machine: against fp64, and the same
bits from all of them and for every thread count."""

from __future__ import annotations

import pytest
import torch
from checks.compare import same
from checks.policy import FULL, compare_policy, make_policy_batch, run_policy

import fastalign as fa
from fastalign import _C

CALLS = {
    "ppo": {"dual_clip": 1.5}, "grpo": {**FULL, "loss": "grpo"}, "gspo": {"loss": "gspo"}, "sapo": {"loss": "sapo"}, "vespo": {"loss": "vespo"},
    "gmpo": {"loss": "gmpo", "needs": ("ref_logprobs",), "kl_coef": 0.1, "kl_kind": "k3+"},
}  # fmt: skip


LENGTHS = (3000, 1, 0, 700, 5000, 33)


def packed():
    torch.manual_seed(0)
    return sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)


@pytest.fixture
def restored():
    threads = torch.get_num_threads()
    yield
    _C.set_cpu_isa("auto")
    torch.set_num_threads(threads)


def on_every_instruction_set(call):
    """The results of `call`, which are the same bits everywhere: the AVX kernels round as the generic ones
    do, for no multiply-add is fused but where the source says so."""
    results = []
    for isa in _C.cpu_isas():
        for threads in (1, 2):
            _C.set_cpu_isa(isa)
            torch.set_num_threads(threads)
            with fa.use_backend("cpu"):
                results.append(call())
    assert all(same(other, results[0]) for other in results[1:])
    return results[0]


@pytest.mark.parametrize("name", CALLS)
def test_policy(restored, name):
    batch = make_policy_batch("cpu", lengths=LENGTHS)
    on_every_instruction_set(lambda: run_policy(batch, **CALLS[name]))
    for isa in _C.cpu_isas():
        _C.set_cpu_isa(isa)
        with fa.use_backend("cpu"):
            compare_policy(batch, **CALLS[name])


@pytest.mark.parametrize("holes", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae(restored, dtype, holes):
    tokens, cu_seqlens = packed()
    rewards, values, bootstrap = (torch.randn(n, dtype=dtype) for n in (tokens, tokens, len(LENGTHS)))
    mask = torch.rand(tokens) >= holes
    rewards[~mask], values[~mask] = float("nan"), float("inf")

    def call(dtype=dtype):
        inputs = (x.to(dtype) for x in (rewards, values))
        return fa.gae(
            *inputs,
            cu_seqlens,
            mask=mask if holes else None,
            bootstrap=bootstrap.to(dtype),
            gamma=0.99,
            lam=0.9,
        )._asdict()

    got = on_every_instruction_set(call)
    with fa.use_backend("reference"):
        want = call(torch.float64)
    for name, value in got.items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_sequences(restored, dtype, masked):
    tokens, cu_seqlens = packed()
    logprobs, ref = (-4 * torch.rand(tokens, dtype=dtype) for _ in range(2))
    mask = torch.rand(tokens) < 0.7 if masked else None
    if masked:
        logprobs[~mask] = float("nan")

    def call(convert=lambda x: x):
        leaf = convert(logprobs).requires_grad_()
        out = fa.preference_loss(leaf, convert(ref), cu_seqlens, mask=mask, loss="dpo", beta=0.1)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return {
            "sum": fa.sequence_sum(convert(logprobs), cu_seqlens, mask=mask),
            "loss": out.loss.detach(),
            "gradient": gradient,
        }

    got = on_every_instruction_set(lambda: call(torch.clone))
    with fa.use_backend("reference"):
        want = call(lambda x: x.to(torch.float64, copy=True))
    for name, value in got.items():
        torch.testing.assert_close(value.double(), want[name], rtol=2e-6, atol=1e-6)
