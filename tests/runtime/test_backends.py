"""Backend choice: forced, explained, loud; by whom, where and for how long."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign.ops.gae.op import GaeFwd
from fastalign.runtime import backends, ffi, op
from fastalign.runtime.op import OPS
from fastalign.testing import make_labels, make_logits

ROOT = Path(__file__).resolve().parents[2]


def test_priority_and_explain():
    x = make_logits(2, 9)
    text = fa.explain("token_logprobs", x)
    assert (
        "cpu" in text.splitlines()[0]
        and "the CUDA kernels do not serve cpu tensors" in text
        or "without CUDA" in text
    )
    assert "chosen" in text and all(name in text for name in backends.BACKENDS)
    assert fa.backends()["reference"] == fa.backends()["cpu"] == "available"
    with fa.use_backend("reference"):
        assert "reference" in fa.explain("sequence_sum", torch.ones(3)).splitlines()[0]
    with pytest.raises(ValueError, match="op='gea' is unknown; legal: .*token_stats_fwd"):
        fa.explain("gea", x)


def _gae(length):
    cu = torch.tensor([0, length], dtype=torch.int32)
    return GaeFwd(torch.ones(length), torch.zeros(length), cu, None, None, None, None, 1.0, 1.0)


def test_an_op_has_an_order_of_its_own(monkeypatch):
    op = OPS["gae_fwd"]
    monkeypatch.setattr(op, "_able", {})
    monkeypatch.setattr(op, "order", {"cpu": ("reference", "cpu")})
    assert fa.explain("gae", torch.ones(3)).splitlines()[0].endswith(": reference")
    assert op.select(torch.ones(3)).__module__ == "fastalign.ops.gae.reference"
    assert fa.explain("sequence_sum", torch.ones(3)).splitlines()[0].endswith(": cpu")


def test_a_backend_declines_a_call_by_its_arguments(monkeypatch):
    """The next one serves it, `explain` says why, and a forced backend that declines is an error with the
    reason."""
    op, why = OPS["gae_fwd"], "more than 8 tokens, for the test"
    monkeypatch.setattr(op, "declines", {"cpu": lambda a: why if a.rewards.shape[0] > 8 else None})
    short, long = _gae(3), _gae(9)
    assert fa.explain("gae", short).splitlines()[0].endswith(": cpu")
    text = fa.explain("gae_fwd", long)
    assert text.splitlines()[0].endswith(": reference") and f"cpu       {why}" in text
    assert op.select(long.rewards, short) is not op.select(long.rewards, long)
    assert fa.gae(long.rewards, long.values, long.cu_seqlens, lam=1.0).returns[0] == 9.0
    with fa.use_backend("cpu"), pytest.raises(fa.BackendError, match=why):
        fa.gae(long.rewards, long.values, long.cu_seqlens)


def test_a_call_that_nobody_serves_is_asked_anew(monkeypatch):
    """A backend may come after the first refusal: an emulator, a device."""
    x, cu = torch.ones(2), torch.tensor([0, 2], dtype=torch.int32)
    monkeypatch.setattr(OPS["sequence_sum_fwd"], "_able", {})
    monkeypatch.setattr(ffi, "_extension", None)
    with fa.use_backend("cpu"):
        with pytest.raises(fa.BackendError):
            fa.sequence_sum(x, cu)
        monkeypatch.undo()
        assert fa.sequence_sum(x, cu).tolist() == [2.0]


def test_what_is_available_is_what_can_run_here(monkeypatch):
    """Kernels without a device are not available, whatever was built and installed."""
    monkeypatch.setattr(ffi, "_extension_has_cuda", True)
    monkeypatch.setattr(ffi, "_triton_error", "")
    monkeypatch.setattr(ffi, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "triton"):
        assert fa.backends()[name].startswith("no CUDA device is visible to torch")
        assert backends.why_not(name, "cuda") == fa.backends()[name]
    monkeypatch.setattr(ffi, "TRITON_INTERPRETED", True)
    assert fa.backends()["triton"] == "available"
    monkeypatch.setattr(ffi, "_emulator", object())
    assert fa.backends()["cuda"] == "available"
    monkeypatch.setattr(ffi, "_emulator", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fa.backends()["cuda"] == "available"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert fa.backends() == fa.backends() | {
        "cuda": "CUDA C++ kernels do not run on ROCm",
        "triton": "available",
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ffi, "TRITON_INTERPRETED", False)
    assert fa.backends()["triton"] == "no ROCm device is visible to torch"


def test_cpu_calls_do_not_ask_for_a_device(monkeypatch):
    def refuse():
        raise AssertionError("torch.cuda.is_available was asked")

    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    monkeypatch.setattr(OPS["sequence_sum_fwd"], "_able", {})
    assert fa.sequence_sum(torch.ones(2), torch.tensor([0, 2], dtype=torch.int32)).tolist() == [2.0]


@pytest.mark.parametrize(
    "version,able",
    [("3.2.0", False), ("3.10.0+git1a2b", True), (None, False)],
)
def test_the_oldest_triton(version, able, tmp_path):
    """pyproject.toml names the version that the package insists on. (None: something else of that name.)"""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"__version__ = {version!r}" if version else "")
    path = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH"))))
    out = _python(
        "import fastalign; print(fastalign.runtime.ffi.missing_backends(), fastalign.backends()['triton'])",
        PYTHONPATH=path,
    )
    assert out.returncode == 0, out.stderr
    oldest = ".".join(map(str, ffi.MIN_TRITON))
    refusal = (
        f"triton {version} is older than {oldest}, the oldest that fastalign supports"
        if version
        else "triton is not importable"
    )
    assert (refusal in out.stdout) is not able and (refusal in out.stderr) is not able
    assert f'"triton>={oldest}"' in (ROOT / "pyproject.toml").read_text()


def test_forced_backend_never_falls_back():
    with fa.use_backend("cuda"), pytest.raises(fa.BackendError, match="cuda: "):
        fa.token_logprobs(make_logits(2, 9), make_labels(2, 9))
    with pytest.raises(ValueError, match="backend='cdua' is unknown; legal: reference, cpu, triton, cuda"):
        fa.use_backend("cdua")
    assert backends.forced() is None


def test_plain_call_forces_for_good():
    fa.use_backend("reference")
    assert backends.forced() == "reference"
    fa.use_backend(None)
    assert backends.forced() is None


def _in_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


def test_threads_choose_for_themselves():
    """Each thread sees its own choice, those without one the main thread's; neither order of entering and
    leaving disturbs the others."""
    entered, left = threading.Barrier(3, timeout=60), threading.Barrier(3, timeout=60)

    def work(name, first_out):
        seen = [backends.forced()]
        with fa.use_backend(name):
            entered.wait()
            seen.append(backends.forced())
            left.wait() if not first_out else None
        left.wait() if first_out else None
        return [*seen, backends.forced()]

    with fa.use_backend("triton"), ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(work, "reference", True), pool.submit(work, "cpu", False)
        entered.wait()
        assert backends.forced() == "triton"
        left.wait()
        assert one.result() == ["triton", "reference", "triton"] and two.result() == [
            "triton",
            "cpu",
            "triton",
        ]
    assert backends.forced() is None and _in_thread(backends.forced) is None
    fa.use_backend("reference")
    assert _in_thread(backends.forced) == "reference"
    assert (
        _in_thread(lambda: (fa.use_backend("cpu"), backends.forced())[1]) == "cpu"
        and backends.forced() == "reference"
    )
    fa.use_backend(None)
    assert _in_thread(backends.forced) is None


def test_tasks_choose_for_themselves():
    async def work(name, steps):
        with fa.use_backend(name):
            for _ in range(steps):
                await asyncio.sleep(0)
                assert backends.forced() == name

    async def together():
        await asyncio.gather(work("cpu", 5), work("reference", 9), work(None, 2))

    asyncio.run(together())
    assert backends.forced() is None and _in_thread(backends.forced) is None


def test_backward_runs_on_the_backend_of_forward(monkeypatch):
    """Also on another thread, as autograd's for a GPU is, and after the choice has ended or changed."""
    ran, select = [], op.Op.select
    monkeypatch.setattr(
        op.Op,
        "select",
        lambda self, *call: (ran.append((self.name, backends.forced())), select(self, *call))[1],
    )
    x = make_logits(2, 9).requires_grad_()

    def forward(name):
        with fa.use_backend(name):
            return fa.token_logprobs(x, make_labels(2, 9)).sum()

    for name in ("reference", "cpu"):
        for where in (lambda f: f(), _in_thread):
            loss = forward(name)
            with fa.use_backend("triton"):
                where(loss.backward)
                assert backends.forced() == "triton"
            assert ran == [("token_stats_fwd", name), ("token_stats_bwd", name)]
            ran.clear()
    loss = _in_thread(lambda: forward("reference"))
    loss.backward()
    assert ran == [("token_stats_fwd", "reference"), ("token_stats_bwd", "reference")]


def _python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


def test_environment_variable():
    out = _python(
        "import fastalign, torch; print(fastalign.explain('sequence_sum', torch.ones(2)).splitlines()[0])",
        FASTALIGN_BACKEND="reference",
    )
    assert out.stdout.strip().endswith("reference"), out
    assert (
        "FASTALIGN_BACKEND: backend='x' is unknown"
        in _python("import fastalign", FASTALIGN_BACKEND="x").stderr
    )


@pytest.mark.parametrize("blocked", ["triton", "fastalign._C"])
def test_import_without_a_backend_is_loud_once(blocked):  # M5, N2
    code = f"""
import sys, warnings
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == {blocked!r} or name.startswith({blocked!r} + "."):
            raise ImportError("blocked for the test", name=name)
sys.meta_path.insert(0, Block())
import torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import fastalign as fa
ours = [str(w.message) for w in seen if "fastalign" in str(w.message)]
assert len(ours) == 1 and "blocked for the test" in ours[0], ours
x = torch.randn(3, 11, requires_grad=True)
fa.token_logprobs(x, torch.tensor([1, 2, 3])).sum().backward()
print(fa.explain("token_logprobs", x).splitlines()[0])
"""
    out = _python(code)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().endswith("cpu" if blocked == "triton" else "reference")
