"""In-place gradients: the same gradient as out of place, or an error, whoever else needs the logits and
however autograd keeps them."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastalign as fa
from fastalign.runtime import overwrite
from fastalign.testing import make_labels, make_logits

ROWS, VOCAB = 6, 11
LABELS, REF = make_labels(ROWS, VOCAB), make_logits(ROWS, VOCAB, seed=1)
WEIGHT = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(0))


def _hooks(pack, unpack=lambda x: x):
    return lambda: saved_tensors_hooks(pack, unpack)


def _from_storage(packed):
    storage, like = packed
    return torch.empty(0, dtype=like[0]).set_(storage, *like[1:])


HOOKS = {
    "none": contextlib.nullcontext,
    "identity": _hooks(lambda x: x),
    "clone": _hooks(lambda x: x.clone()),
    "data": _hooks(lambda x: x.data, lambda x: x.data),
    "numpy": _hooks(
        lambda x: x.detach().numpy(), lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    ),
    "storage": _hooks(
        lambda x: (x.untyped_storage(), (x.dtype, x.storage_offset(), x.shape, x.stride())), _from_storage
    ),
    "save_on_cpu": save_on_cpu,
}
PRODUCERS = {
    "matmul": lambda h: h @ WEIGHT.T,
    "tanh": lambda h: (h @ WEIGHT.T).tanh(),
    "softmax": lambda h: (h @ WEIGHT.T).softmax(-1),
    "view": lambda h: torch.nn.functional.linear(h.view(2, 3, 8), WEIGHT, torch.ones(VOCAB)).view(
        ROWS, VOCAB
    ),
    "slice": lambda h: (h @ torch.cat([WEIGHT, WEIGHT]).T)[:, :VOCAB],
}
CONSUMERS = {
    "nobody": lambda z, inplace: z.new_zeros(()),
    "logsumexp": lambda z, inplace: (z.logsumexp(-1) ** 2).sum(),
    "a view": lambda z, inplace: (z.reshape(-1) ** 2).sum(),
    "ours": lambda z, inplace: logprobs(z, inplace),
    "a checkpoint": lambda z, inplace: checkpoint(lambda x: x.exp().sum(), z, use_reentrant=False),
    "its closure": lambda z, inplace: checkpoint(
        lambda x: (z.exp() * x).sum(), torch.ones((), requires_grad=True), use_reentrant=False
    ),
}


def logprobs(z, inplace):
    return fa.token_logprobs(z, LABELS, inplace_backward=inplace).sum()


def kl_loss(z, inplace):
    return 2.0 * fa.token_kl_loss(z, REF, torch.full((), 0.3), inplace=inplace).loss


OPS = {"token_logprobs": logprobs, "token_kl_loss": kl_loss}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def hidden():
    return torch.linspace(-1.0, 1.0, ROWS * 8).view(ROWS, 8).requires_grad_()


def same_or_error(loss):
    """`loss(hidden, inplace)` has the gradient of inplace=False, or raises. Whether it had."""
    h, want = hidden(), hidden()
    loss(want, False).backward()
    try:
        loss(h, True).backward()
    except (RuntimeError, ValueError):
        return False
    torch.testing.assert_close(h.grad, want.grad, rtol=1e-5, atol=1e-5)
    return True


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("op", OPS)
def test_under_saved_tensor_hooks(op, producer, consumer, first):
    """Every hook around all three, and around each of producer, op and other consumer alone."""
    for name, hooks in HOOKS.items():
        for around in [
            (hooks,) * 3,
            *([hooks if i == k else contextlib.nullcontext for i in range(3)] for k in range(3)),
        ]:

            def loss(h, inplace, around=around):
                with around[0]():
                    z = PRODUCERS[producer](h)
                parts = [(around[1], OPS[op]), (around[2], CONSUMERS[consumer])]
                total = 0.0
                for context, part in parts if first else parts[::-1]:
                    with context():
                        total = total + part(z, inplace)
                return total

            # With nobody who reads the logits again, the gradient must come.
            assert same_or_error(loss) or consumer != "nobody" or producer in ("tanh", "softmax"), name


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("op", OPS)
def test_inside_a_checkpoint(op, producer, consumer):
    def head(h, inplace):
        z = PRODUCERS[producer](h)
        other = CONSUMERS[consumer](z, inplace)
        return other + OPS[op](z, inplace)

    for nested in (head, lambda h, inplace: checkpoint(head, h, inplace, use_reentrant=False)):
        assert (
            same_or_error(lambda h, inplace, f=nested: checkpoint(f, h, inplace, use_reentrant=False))
            or consumer != "nobody"
        )


@pytest.mark.parametrize("producer", ["matmul", "view"])
@pytest.mark.parametrize("op", OPS)
def test_it_is_in_place_where_nobody_else_has_the_memory(op, producer):
    z = PRODUCERS[producer](hidden())
    before, seen = z.data_ptr(), []
    z.register_hook(lambda g: seen.append(g.data_ptr()))
    OPS[op](z, True).backward()
    assert seen == [before] and z.shape == (ROWS, 0)
    with pytest.raises(
        ValueError, match=r"vocabulary of 0 \(an in-place gradient was written over these logits\)"
    ):
        fa.token_logprobs(z, LABELS)


def test_it_is_in_place_inside_a_checkpoint_as_well(monkeypatch):
    calls, retire = [], overwrite.retire
    monkeypatch.setattr(overwrite, "retire", lambda x: (calls.append(1), retire(x)))
    h = hidden()
    checkpoint(lambda h: logprobs(h @ WEIGHT.T, True), h, use_reentrant=False).backward()
    assert calls


HELD = {
    "detach": lambda z: z.detach(),
    "data": lambda z: z.data,
    "a slice": lambda z: z[2:4],
    "a view of a view": lambda z: z.view(3, 2, VOCAB)[1].detach(),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "storage": lambda z: z.untyped_storage(),
    "expanded": lambda z: z.detach().unsqueeze(0).expand(3, -1, -1),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("held", HELD)
def test_what_the_user_still_holds_is_left_alone(op, held):
    h, want = hidden(), hidden()
    z = h @ WEIGHT.T
    alias, before = HELD[held](z), z.detach().clone()
    OPS[op](z, True).backward()
    OPS[op](want @ WEIGHT.T, False).backward()
    assert torch.equal(h.grad, want.grad)
    if not isinstance(alias, torch.Tensor):
        alias = torch.empty(0).set_(alias, 0, (ROWS, VOCAB))
    assert torch.equal(alias, HELD[held](before) if held != "storage" else before)


class _Alias(torch.autograd.Function):
    """A non-leaf in the memory of a tensor that knows nothing of it."""

    @staticmethod
    def forward(ctx, x, memory):
        return memory.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad.sum(), None


LEAVES = {
    "itself": lambda p: p,
    "view": lambda p: p.view(ROWS, VOCAB),
    "detach": lambda p: p.detach().requires_grad_(),
    "detach, view": lambda p: p.detach().view(ROWS, VOCAB).requires_grad_(),
    "view, detach, view": lambda p: p.view(-1).detach().view(ROWS, VOCAB).requires_grad_(),
    "data": lambda p: p.data.requires_grad_(),
    "data of a view": lambda p: p.view(-1).data.view(ROWS, VOCAB).requires_grad_(),
    "view of detach": lambda p: p.detach().requires_grad_().view(ROWS, VOCAB),
    "slice": lambda p: p[:],
    "numpy": lambda p: torch.from_numpy(p.detach().numpy()).requires_grad_(),
}


@pytest.mark.parametrize(
    "name, option", [("token_logprobs", "inplace_backward"), ("token_kl_loss", "inplace")]
)
@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_are_refused(name, option, leaf):
    p = torch.nn.Parameter(make_logits(ROWS, VOCAB))
    with pytest.raises(ValueError, match=f"{option}=True would overwrite a leaf tensor"):
        OPS[name](LEAVES[leaf](p), True)
    with pytest.raises(ValueError, match="share memory"):
        OPS[name]((p[:1] * 1).expand(ROWS, VOCAB), True)


NON_LEAVES = {
    "a function's alias": lambda p, x: _Alias.apply(x, p),
    "an alias changed in place": lambda p, x: p.detach().view(ROWS, VOCAB).mul_(x),
    "data changed in place": lambda p, x: p.data.mul_(x),
    "numpy changed in place": lambda p, x: torch.from_numpy(p.detach().numpy()).mul_(x),
    "set_": lambda p, x: (p * x).detach().set_(p.data).mul_(x),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("alias", NON_LEAVES)
def test_a_parameter_behind_a_non_leaf_is_left_alone(op, alias):
    p, x = torch.nn.Parameter(make_logits(ROWS, VOCAB)), torch.ones((), requires_grad=True)
    before = p.detach().clone()
    OPS[op](NON_LEAVES[alias](p, x), True).backward()
    assert torch.equal(p, before)


def test_without_gradient_nothing_is_written():
    p = make_logits(ROWS, VOCAB)
    before = p.clone()
    fa.token_logprobs(p, LABELS, inplace_backward=True)
    with torch.no_grad():
        fa.token_kl_loss(p.requires_grad_(), REF, torch.ones(()), inplace=True)
    assert torch.equal(p, before)


def test_one_warning_where_nothing_is_saved(monkeypatch):
    monkeypatch.setattr(overwrite, "_warned", False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            z = hidden() @ WEIGHT.T
            kept = z.detach()
            logprobs(z, True).backward()
            logprobs(hidden() @ WEIGHT.T, True).backward()
    assert [str(w.message)[:50] for w in seen] == [
        "fastalign: inplace_backward=True saved no memory: "
    ] and kept.shape == (ROWS, VOCAB)


@pytest.mark.parametrize("op", OPS)
def test_where_torch_does_not_count_users_nothing_is_written(monkeypatch, op):
    monkeypatch.setattr(overwrite, "_use_count", None)
    monkeypatch.setattr(overwrite, "_warned", False)
    grads = []
    for inplace in (False, True):
        h = hidden()
        z = h @ WEIGHT.T
        before = z.detach().clone()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            OPS[op](z, inplace).backward()
        assert torch.equal(z, before)
        grads.append(h.grad)
    assert torch.equal(*grads) and [
        f"torch {torch.__version__} does not tell" in str(w.message) for w in seen
    ] == [True]


@pytest.mark.parametrize("op", OPS)
def test_a_second_backward_raises(op):
    for hooks in HOOKS.values():
        h = hidden()
        with hooks():
            loss = OPS[op](h @ WEIGHT.T, op == "token_logprobs")
        loss.backward(retain_graph=True)
        once = h.grad.clone()
        try:
            loss.backward()
        except RuntimeError:
            continue
        torch.testing.assert_close(h.grad, 2 * once)
