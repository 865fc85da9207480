"""`torch.ops.fastalign.*` is public: whatever tensors come, none is read beyond its end. Each is too short,
too long, of another type or device in turn."""

from __future__ import annotations

import pytest
import test_registry
import torch

from fastalign.runtime import backends
from fastalign.runtime.op import OPS

SAMPLES = list(test_registry._op_samples())
CASES = [
    (i, k) for i, (_, args) in enumerate(SAMPLES) for k, a in enumerate(args) if isinstance(a, torch.Tensor)
]
# Where no other tensor of the sample has a dim, any size of it is legal: (sample, argument).
FREE = {
    "1-token_stats_fwd-logits", "2-token_stats_bwd-logits", "3-token_stats_bwd_-logits", "0-token_stats_fwd-logits", "3-token_stats_bwd_-labels",
    "8-scale_rows_-x", "14-preference_bwd-cu_seqlens", "19-policy_bwd-stats",
    "20-row_states_merge-targets", "21-row_states_merge-states", "23-row_states_finish-state",
}  # fmt: skip


def copies(args):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def ident(case):
    name, args = SAMPLES[case[0]]
    return f"{case[0]}-{name}-{OPS[name]._names[case[1]]}"


def other_shapes(t):
    if t.dim() == 0:
        yield t.expand(2).clone()
        yield t.new_empty(0)
        return
    for dim in range(t.dim()):
        yield (
            t.narrow(dim, 0, t.shape[dim] - 1).clone()
            if t.shape[dim]
            else t.new_zeros([1 if d == dim else n for d, n in enumerate(t.shape)])
        )
        yield torch.cat([t, t.narrow(dim, 0, 1)], dim) if t.shape[dim] else t
    yield t.unsqueeze(0)
    if t.dim() > 1:
        yield t.flatten()


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_wrong_shapes_raise(case):
    index, place = case
    name, args = SAMPLES[index]
    op = OPS[name]
    accepted = []
    for wrong in other_shapes(args[place]):
        if tuple(wrong.shape) == tuple(args[place].shape):
            continue
        given = copies(args)
        given[place] = wrong
        try:
            op.overload(*given)
        except (ValueError, TypeError, IndexError):
            continue
        accepted.append(tuple(wrong.shape))
    if op._entries[
        [e.place for e in op._entries].index(place)
    ].rows:  # leading dims are free: one more of size 1 is the same call
        accepted = [s for s in accepted if s != (1, *args[place].shape)]
    allowed = ident(case) in FREE
    assert allowed or not accepted, (
        f"{op._names[place]} of shapes {accepted} was taken for {tuple(args[place].shape)}"
    )


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_wrong_types_and_devices_raise(case):
    index, place = case
    name, args = SAMPLES[index]
    op = OPS[name]
    for change in (
        lambda t: t.to(torch.int16),
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.float16),
        lambda t: t.double(),
    ):
        given = copies(args)
        given[place] = change(given[place])
        try:
            op.overload(*given)
        except (ValueError, TypeError, backends.BackendError):
            continue
        # The first tensor's type is the op's, where no other tensor has to have the same.
        assert given[place].dtype in op.takes("cpu") and place == min(
            k for k, a in enumerate(args) if isinstance(a, torch.Tensor)
        )


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_any_strides_give_the_same(index):
    """Tensors that are not contiguous are copied, not misread; results written in place need rows that can
    be."""
    name, args = SAMPLES[index]
    op, plain, spread = OPS[name], copies(args), copies(args)
    for k, a in enumerate(spread):
        if isinstance(a, torch.Tensor) and a.dim() and not (name.endswith("_") and k == 0):
            spread[k] = torch.stack([a, a], -1)[..., 0]
    want, got = op.overload(*plain), op.overload(*spread)
    for a, b in zip(*((r if isinstance(r, tuple) else (() if r is None else (r,))) for r in (want, got))):
        assert torch.equal(a.nan_to_num(3.0), b.nan_to_num(3.0))
    assert not name.endswith("_") or torch.equal(plain[0], spread[0])


def test_what_the_parameters_need_is_asked_for():
    sample = dict(SAMPLES)
    forward = list(sample["preference_fwd"])
    for place, words in ((1, "ref_logprobs"), (3, "cu_seqlens"), (0, "logprobs")):
        given = copies(forward)
        given[place] = None
        with pytest.raises(ValueError, match=words):
            OPS["preference_fwd"].overload(*given)
    given = copies(forward)
    given[-2] = 4  # pairs (6, 7): there are 6 sequences
    with pytest.raises(ValueError, match="4 pairs"):
        OPS["preference_fwd"].overload(*given)
    x = torch.randn(3, 17)
    for outputs, words in ((1, "labels"), (32, "labels"), (128, "ref_logits")):
        with pytest.raises(ValueError, match=words):
            torch.ops.fastalign.token_stats_fwd(
                x, None, None, None, None, 1.44, 0.0, 1.0, -100, 0, 17, outputs, None, None
            )
    with pytest.raises(ValueError, match="strides"):
        torch.ops.fastalign.scale_rows_(torch.randn(17, 3).T, torch.tensor(0.5))
