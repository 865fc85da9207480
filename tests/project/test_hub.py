"""The kernel for the Hub: hub/generate.py makes it, the `kernels` package loads it beside an imported fastalign,
and it gives the same numbers."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

ROOT = Path(__file__).resolve().parents[2]
HUB = runpy.run_path(str(ROOT / "hub" / "generate.py"))
BACKENDS = ("cpu", "cuda", "rocm")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "kernel"
    assert HUB["main"]([str(target), "--repo-id", "some-one/fastalign"]) == 0
    return target


def test_what_kernels_reads(kernel):
    """Its own parsers take build.toml and metadata.json, the hashes are those of the files, and a namespace is
    the variant's own."""
    assert [str(b).lower() for b in Build.open(kernel).general.backends] == list(BACKENDS)
    assert "some-one/fastalign" in (kernel / "build.toml").read_text()
    variants = [kernel / "build" / f"torch-{backend}" for backend in BACKENDS]
    assert sorted(variants) == sorted((kernel / "build").iterdir())
    found = [Metadata.read_from_file(v / "metadata.json") for v in variants]
    for variant, metadata in zip(variants, found):
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert metadata.id.isidentifier() and metadata.name.python_name == "fastalign"
        assert metadata.python_depends == [] and metadata.kernel_depends == []
    assert len({m.id for m in found}) == len(BACKENDS)


def test_imports_are_relative_or_of_torch(kernel):
    """What the Hub asks: the standard library, torch and the kernel itself, the latter by relative imports that
    lead somewhere. Triton comes with torch."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in (kernel / "build" / "torch-cpu").rglob("*.py"):
        text = path.read_text()
        typing_only = {"typing_extensions"} if "if TYPE_CHECKING:" in text else set()
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level:
                place = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
                assert place.is_dir() or place.with_suffix(".py").is_file(), (path, ast.unparse(node))
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert {n.split(".")[0] for n in names} <= allowed | typing_only, (path, names)


def test_card(kernel):
    card = (kernel / "CARD.md").read_text()
    assert (
        "@" not in card
        and 'get_kernel("some-one/fastalign", version=0' in card
        and "`token_logprobs`" in card
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{there}"], "exists; name a directory that does not"),
        (["{there}/a/b"], "does not exist"),
        (["{there}/a", "--repo-id", "fastalign"], "legal: OWNER/NAME"),
        (["{there}/a", "--version", "3"], "--version"),
    ],
)
def test_refusals(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        HUB["main"]([a.format(there=tmp_path) for a in arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(HUB["generate"].__globals__, "write_variant", lambda *a: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        HUB["main"]([str(tmp_path / "kernel")])
    assert not any(tmp_path.iterdir())


SIDE_BY_SIDE = """
import importlib.util, sys, warnings
from pathlib import Path

warnings.simplefilter("error")
import torch, kernels, fastalign
copy = kernels.get_kernel("some-one/fastalign", version=0)
warnings.simplefilter("default")
variant = Path(copy.__file__).parent
assert copy.__name__ in sys.modules and copy.__name__ != "fastalign" and variant.name == "torch-cpu"

g = torch.Generator().manual_seed(0)
logits = torch.randn(11, 70, generator=g)
labels, mask = torch.arange(11), torch.arange(11) != 4
logprobs, old = (-torch.rand(11, generator=g) for _ in range(2))
rewards, values = (torch.randn(11, generator=g) for _ in range(2))
cu = torch.tensor([0, 3, 5, 9, 11], dtype=torch.int32)


def with_gradient(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    weights = torch.linspace(0.5, 1.5, y.numel()).view(y.shape)
    return [y.detach(), torch.autograd.grad(y, x, weights)[0]]


def numbers(fa):
    yield from with_gradient(lambda x: fa.token_logprobs(x, labels), logits)
    yield from with_gradient(fa.entropy_from_logits, logits)
    yield from with_gradient(lambda x: fa.preference_loss(x, old, cu, mask=mask, loss="dpo").loss, logprobs)
    yield from with_gradient(lambda x: fa.policy_loss(x, old, rewards, mask=mask, loss="ppo").loss, logprobs)
    out = fa.gae(rewards, values, cu[[0, -1]], mask=mask, gamma=0.9, lam=0.8)
    yield from (out.advantages, out.returns)


with fastalign.use_backend("reference"):
    wanted = [*numbers(fastalign)]
with copy.use_backend("reference"):
    assert all(map(torch.equal, numbers(copy), wanted))
with copy.use_backend("triton"):
    assert "token_stats_fwd on cpu, torch.float32: triton" in copy.explain("token_logprobs", logits)
    for found, value in zip(numbers(copy), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
copy.use_backend("reference")

# Each has its own choice, its own ops and its own reasons.
assert fastalign.explain("gae", rewards).startswith("fastalign::gae_fwd on cpu, torch.float32: cpu")
assert copy.explain("gae", rewards).startswith(copy.__name__ + "::gae_fwd on cpu, torch.float32: reference")
assert getattr(torch.ops, copy.__name__).gae_fwd.default is not torch.ops.fastalign.gae_fwd.default
assert "no compiled extension" in copy.backends()["cpu"] and fastalign.backends()["cpu"] == "available"
compiled = torch.compile(lambda x: copy.token_logprobs(x, labels), backend="eager", fullgraph=True)
assert torch.equal(compiled(logits), copy.token_logprobs(logits, labels))

# As older versions of `kernels` load it.
spec = importlib.util.spec_from_file_location("older", variant / "fastalign" / "__init__.py")
older = importlib.util.module_from_spec(spec)
spec.loader.exec_module(older)
assert older.gae is copy.gae and older.__all__ == copy.__all__

# The benchmarks that come with it are right.
spec = importlib.util.spec_from_file_location("benchmark_module", variant.parents[1] / "benchmarks" / "benchmark.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.ROWS, module.VOCAB, module.LENGTH = 5, 300, 4
count = 0
for kind in (module.TokenLogprobs, module.PreferenceLoss):
    for name in [n.removeprefix("benchmark_") for n in dir(kind) if n.startswith("benchmark_")]:
        case = kind()
        case.kernel = copy
        case.setup()
        getattr(case, "benchmark_" + name)()
        assert torch.allclose(case.out, getattr(case, "verify_" + name)(), atol=1e-5), name
        count += 1
assert count == 3
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", str(variant.parents[1] / "tests")]))
"""


def test_the_same_numbers_side_by_side(kernel):
    """Loaded by LOCAL_KERNELS beside an imported fastalign: equal bits on the reference, and
    the interpreted Triton kernels agree."""
    env = {
        **os.environ,
        "LOCAL_KERNELS": f"some-one/fastalign={kernel}",
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "FASTALIGN_BACKEND": "",
    }
    command = [sys.executable, "-c", SIDE_BY_SIDE]
    done = subprocess.run(command, cwd=kernel, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
