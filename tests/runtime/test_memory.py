"""Tensors whose memory does not hold their values, or that have none: every public function traces them,
resolves them, or refuses them by an error. And none of them looks at values or brings any from the host,
which on a device is a synchronisation and cannot be captured in a graph."""

from __future__ import annotations

import pytest
import torch
from every_call import NAMES, WITHOUT_TENSORS, calls, inputs
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign as fa
from fastalign.runtime.op import OPS


def test_every_public_function_is_called():
    functions = {n for n in fa.__all__ if callable(getattr(fa, n)) and not isinstance(getattr(fa, n), type)}
    assert functions == {name.split()[0] for name in NAMES} | WITHOUT_TENSORS - {"use_backend"}


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


# --- a device's eyes ----------------------------------------------------------------------------------------


class NoTraffic(TorchDispatchMode):
    """The meta device stands for a GPU: what has a meta tensor must not meet a tensor of the CPU, and nobody
    may ask for values or for sizes that depend on them."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = [
            a
            for x in (*args, *kwargs.values())
            for a in (x if isinstance(x, (list, tuple)) else (x,))
            if isinstance(a, torch.Tensor)
        ]
        devices = {a.device.type for a in flat}
        target = kwargs.get("device")
        name = func._schema.name.split("::")[1]
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        assert len(devices) < 2, f"{name} mixes host and device"
        assert target is None or not devices or devices == {torch.device(target).type}, (
            f"{name} copies from {devices} to {target}"
        )
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not boolean, "an index by a mask waits for the device"
        return func(*args, **kwargs)


class NoHostData(TorchFunctionMode):
    """A tensor made of Python numbers is made on the host and copied; torch.full is filled where it lies."""

    FACTORIES = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in self.FACTORIES, f"{func.__name__} copies {args[-1]} from the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_copied_or_waited_for(name):
    """Forward and backward."""
    call = calls({n: t.to("meta") for n, t in inputs().items()})[name]
    with NoTraffic(), NoHostData():
        results = call()
    assert results and all(t.device.type == "meta" for t in results)


@pytest.mark.parametrize(
    "what",
    [
        lambda x: torch.tensor([True, False], device="meta"),
        lambda x: torch.as_tensor(0.1, device="meta"),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.ones(3).to("meta"),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[x > 0],
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: (x > 0).nonzero(),
    ],
)
def test_traffic_is_noticed(what):
    with pytest.raises(AssertionError), NoTraffic(), NoHostData():
        what(torch.ones(3, device="meta"))


# --- no memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name):
    """Shapes and types of the results are those of real tensors, without any mode around."""
    results = calls({n: t.to("meta") for n, t in inputs().items()})[name]()
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in calls(inputs())[name]()]


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name):
    given = inputs()
    with FakeTensorMode() as mode:
        results = calls({n: mode.from_tensor(t) for n, t in given.items()})[name]()
    assert results and all(isinstance(t, FakeTensor) for t in results)
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in calls(given)[name]()]


# Inputs where all-zero tensors make sense; the others (boundaries, labels, weights that are divided by) would
# be refused as any zeros are.
ZEROS = ("ref", "kl", "ref_logits", "weights", "logits", "logprobs", "totals")


@pytest.mark.parametrize("name", NAMES)
def test_zeros_without_memory(name):
    """`torch._efficientzerotensor`, which autograd uses for tangents and gradients that are not there."""
    given = inputs()
    lazy = {n: torch._efficientzerotensor(tuple(t.shape)) if n in ZEROS else t for n, t in given.items()}
    plain = {n: torch.zeros_like(t) if n in ZEROS else t for n, t in given.items()}
    try:
        got = calls(lazy)[name]()
    except RuntimeError as error:  # written in place: refused by torch
        assert "ZeroTensors are immutable" in str(error) and name in (
            "token_logprobs",
            "token_kl_loss inplace",
        )
        return
    same(got, calls(plain)[name]())


@pytest.mark.parametrize("name", NAMES)
def test_lazily_negated_tensors(name):
    """Memory holds the negative of every value, those of boundaries, labels and pairs too."""
    given = inputs()
    lazy = {n: t if t.dtype == torch.bool else torch._neg_view(-t) for n, t in given.items()}
    assert all(t.is_neg() for t in lazy.values() if t.dtype != torch.bool)
    same(calls(lazy)[name](), calls(given)[name]())


def test_imaginary_part_of_a_conjugate():
    """The way in which users meet such a tensor."""
    z = torch.complex(torch.zeros(8), -inputs()["logprobs"][:8])
    x, cu = z.conj().imag, torch.tensor([0, 3, 8], dtype=torch.int32)
    assert x.is_neg()
    assert torch.equal(fa.sequence_sum(x, cu), fa.sequence_sum(x.resolve_neg(), cu))


def test_lazily_negated_upstream_gradients():
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    x = torch.ones(8, requires_grad=True)
    upstream = torch._neg_view(torch.tensor([-1.0, -2.0]))
    (grad,) = torch.autograd.grad(fa.sequence_sum(x, cu), x, upstream)
    assert grad.tolist() == [1.0] * 3 + [2.0] * 5


@pytest.mark.parametrize(
    "name",
    ["sequence_sum", "preference_loss", "token_stats", "gae", "policy_loss", "listwise_loss", "kl_estimate"],
)
def test_functional_tensors(name):
    """What functionalization wraps outside of any transform: the forward pass is traced, with the numbers of
    plain tensors."""
    given = inputs()

    def forward(x):
        return {
            "sequence_sum": lambda: (fa.sequence_sum(x["logprobs"], x["cu"], mask=x["mask"]),),
            "preference_loss": lambda: (fa.preference_loss(x["logprobs"], x["ref"], x["cu"]).loss,),
            "token_stats": lambda: (fa.token_logprobs(x["logits"], x["labels"]),),
            "gae": lambda: fa.gae(x["logprobs"], x["ref"], x["cu"]),
            "policy_loss": lambda: (fa.policy_loss(x["logprobs"], x["ref"], x["kl"], mask=x["mask"]).loss,),
            "listwise_loss": lambda: (
                fa.listwise_loss(x["logprobs"], x["ref"], x["cu"], x["offsets"], x["scores"]).loss,
            ),
            "kl_estimate": lambda: (fa.kl_estimate(x["logprobs"], x["ref"]),),
        }[name]()

    wrapped = forward({n: torch._to_functional_tensor(t) for n, t in given.items()})
    same(
        [torch._from_functional_tensor(t) if torch._is_functional_tensor(t) else t for t in wrapped],
        list(forward(given)),
    )


@pytest.mark.parametrize("what", ["to_sparse", "to_mkldnn"])
def test_other_layouts_are_refused(what):
    x = getattr(inputs()["logprobs"], what)()
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
        fa.sequence_sum(x, inputs()["cu"])


def test_empty_tensors_do_not_take_the_long_way(monkeypatch):
    """A slice without elements has no address, and is as plain as any."""
    monkeypatch.setattr(
        OPS["sequence_sum_fwd"], "overload", lambda *args: (_ for _ in ()).throw(KeyError("dispatched"))
    )
    assert fa.sequence_sum(torch.ones(0), torch.tensor([0, 0], dtype=torch.int32)).tolist() == [0.0]
