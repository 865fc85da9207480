"""Row states on every backend: parts of the vocabulary pushed by themselves, merged, finished and pulled from
give what one pass over the rows gives."""

from __future__ import annotations

import math

import pytest
import torch

import fastalign as fa
from fastalign.ops.columns import (
    COL_LARGEST,
    COL_M,
    COL_REF_M,
    COL_REF_S0,
    COL_REF_UMAX,
    COL_S0,
    COL_SZ,
    COL_T,
    COL_TOP,
    COL_TR,
    COL_UMAX,
    COL_VALID,
    STATE_WIDTH,
)  # fmt: skip
from fastalign.ops.token_stats.contract import (
    DIFFERENTIABLE,
    NEED_REF,
    OUTPUT_BITS,
    PER_LABEL,
    RowGradients,
    RowStatesMerge,
    TokenStatsFwd,
)
from fastalign.ops.token_stats.op import row_states_merge, token_stats_fwd
from fastalign.rows.spec import row_spec
from fastalign.rows.states import RowStates, finish, merge, pull, push
from fastalign.testing import assert_close

ALL = tuple(OUTPUT_BITS)
PLAIN = tuple(name for name in ALL if name not in NEED_REF)
VOCAB = 97
CUTS = [(), (30,), (1, 2, 3), (16, 64, 80), (33, 96)]


def spec_of(x, labels, ref=None, **options):
    return row_spec(
        tuple(x.shape[:-1]),
        x.shape[-1],
        x.dtype,
        x,
        labels=labels,
        outputs=PLAIN if ref is None else ALL,
        with_ref=ref is not None,
        **options,
    )


def parts_of(x, cuts):
    """(first column, view of the columns), whose rows lie as far apart as those of the whole."""
    edges = [0, *cuts, x.shape[-1]]
    return [(lo, x[..., lo:hi]) for lo, hi in zip(edges, edges[1:])]


def pushed(spec, x, ref, cuts):
    refs = [None] * (len(cuts) + 1) if ref is None else [y for _, y in parts_of(ref, cuts)]
    return [push(spec, tile, other, start=lo) for (lo, tile), other in zip(parts_of(x, cuts), refs)]


def pulled(spec, states, upstream, x, ref, cuts):
    refs = [None] * (len(cuts) + 1) if ref is None else [y for _, y in parts_of(ref, cuts)]
    return torch.cat(
        [
            pull(spec, states, upstream, tile, other, start=lo)
            for (lo, tile), other in zip(parts_of(x, cuts), refs)
        ],
        -1,
    )


def upstream_of(x, labels, names):
    """Of every differentiable output, another number in each row."""
    base = torch.linspace(
        -1.0,
        1.5,
        x[..., 0].numel(),
        device=x.device,
        dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
    )
    given = {}
    for i, name in enumerate(n for n in DIFFERENTIABLE if n in names):
        g = base.roll(i) * (1.0, 0.3, -0.2, 0.5, -0.7)[i]
        given[f"g_{name}"] = (
            g.unsqueeze(-1).expand(-1, 1 if labels.dim() == x.dim() - 1 else labels.shape[-1]).contiguous()
            if name in PER_LABEL
            else g
        )
    return RowGradients(**given)


def one_pass(x, labels, ref, names, upstream=None, **options):
    """({name: output}, gradient) of the public function."""
    leaf = x.clone().requires_grad_()
    stats = fa.token_stats(leaf, labels, ref_logits=ref, outputs=names, **options)._asdict()
    stats = {name: stats[name] for name in names}
    if upstream is None:
        return {n: s.detach() for n, s in stats.items()}, None
    total = sum(
        (s * g.view(s.shape)).sum()
        for n, s in stats.items()
        if (g := getattr(upstream, f"g_{n}", None)) is not None
    )
    return {n: s.detach() for n, s in stats.items()}, torch.autograd.grad(total, leaf)[0]


def compare(x, labels, ref, cuts, *, scale=16.0, **options):
    """The whole walk against one pass and against fp64."""
    names = PLAIN if ref is None else ALL
    spec = spec_of(x, labels, ref, **options)
    upstream = upstream_of(x, labels, names)
    states = merge(pushed(spec, x, ref, cuts))
    got, grad = finish(spec, states), pulled(spec, states, upstream, x, ref, cuts)
    want, want_grad = one_pass(x, labels, ref, names, upstream, **options)
    assert set(got) == set(names)
    truth = want
    with fa.use_backend("reference"):
        wide = RowGradients(*(None if g is None else g.double() for g in upstream))
        truth, truth_grad = one_pass(
            x.double(), labels, None if ref is None else ref.double(), names, wide, **options
        )
    for name in names:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype
        size = torch.nan_to_num(truth[name].abs(), nan=0.0, posinf=0.0, neginf=0.0).clamp(min=8.0)
        assert_close(got[name], truth[name], want[name], what=f"{name} in parts {cuts}", scale=size)
    assert_close(grad, truth_grad, want_grad, what=f"gradient in parts {cuts}", scale=scale)


def make(rows=6, vocab=VOCAB, device="cpu", dtype=torch.float32, seed=0, ref=True):
    """(x, reference or None): views of wider memory, so that rows lie further apart than they are long."""
    g = torch.Generator().manual_seed(seed)
    wide = 2.0 * torch.randn(rows, vocab + 7, generator=g)
    other = wide + 0.5 * torch.randn(rows, vocab + 7, generator=g)
    return wide.to(device, dtype)[:, 3 : vocab + 3], other.to(device, dtype)[
        :, 5 : vocab + 5
    ] if ref else None


LABELS = torch.tensor([VOCAB - 1, 29, 30, 0, -100, 64])
MASK = torch.tensor([True, True, True, False, True, True])


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("with_ref", [False, True])
def test_parts_give_what_one_pass_gives(backend, device, slow_backend, cuts, with_ref):
    if slow_backend and not with_ref and cuts != CUTS[3]:
        return  # the same cuts with a reference row beside
    x, ref = make(device=device, ref=with_ref)
    compare(x, LABELS.to(device), ref, cuts, mask=MASK.to(device))


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_narrow_rows(backend, device, with_ref, dtype):
    x, ref = make(device=device, dtype=dtype, ref=with_ref)
    compare(x, LABELS.to(device), ref, (33, 96), mask=MASK.to(device))


@pytest.mark.parametrize(
    "options",
    [{"softcap": 5.0, "logit_scale": 0.7}, {"temperature": 0.3}, {"temperature": torch.tensor(1.7)}],
    ids=str,
)
def test_parts_of_transformed_rows(backend, device, options):
    x, ref = make(device=device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    compare(x, LABELS.to(device), ref, (16, 64), scale=64.0, **options)


@pytest.mark.parametrize("with_ref", [False, True])
def test_parts_of_rows_of_several_labels(backend, device, with_ref):
    x, ref = make(device=device, ref=with_ref)
    labels = torch.tensor(
        [[96, 0, 0], [29, 30, 31], [5, 5, 5], [0, 0, 7], [0, 0, 0], [64, 0, 1]], device=device
    )  # 0: ignored
    names = tuple(n for n in (ALL if with_ref else PLAIN) if n != "is_top1")
    spec = row_spec(
        (6,),
        VOCAB,
        x.dtype,
        x,
        labels=labels,
        mask=MASK.to(device),
        outputs=names,
        with_ref=with_ref,
        ignore_index=0,
    )
    upstream = upstream_of(x, labels, names)
    want, want_grad = one_pass(x, labels, ref, names, upstream, mask=MASK.to(device), ignore_index=0)
    for cuts in ((30,), (1, 2, 31)):
        parts = pushed(spec, x, ref, cuts)
        states = merge(parts)
        ignored = ((labels == 0) | ~MASK.to(device).unsqueeze(-1)).repeat(1 + with_ref, 1)
        assert all(bool(torch.isneginf(s.target[ignored]).all()) for s in (*parts, states))
        assert bool(torch.isfinite(states.target[~ignored]).all())
        got = finish(spec, states)
        for name in names:
            assert_close(got[name], want[name].double(), what=name, scale=8.0)
        assert_close(
            pulled(spec, states, upstream, x, ref, cuts), want_grad.double(), what="gradient", scale=16.0
        )


def spoilt(x, ref):
    """-inf here and there, a part of nothing else, a label on it, NaN in a row and in a masked one, a row of
    -inf."""
    x[0, :30], x[1, 29], x[2, 1:97:3] = -math.inf, -math.inf, -math.inf
    x[3, 40], x[5, 50] = math.nan, math.nan
    x[4, 12] = math.inf  # ignored by its label
    if ref is not None:
        ref[0, :30], ref[2, 1:97:3], ref[3] = -math.inf, -math.inf, math.nan
    return x, ref


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("with_ref", [False, True])
def test_infinities_and_nan_stay_where_they_are(backend, device, cuts, with_ref):
    x, ref = spoilt(*make(device=device, ref=with_ref))
    names, labels, mask = ALL if with_ref else PLAIN, LABELS.to(device), MASK.to(device)
    spec, upstream = spec_of(x, labels, ref, mask=mask), upstream_of(x, labels, names)
    states = merge(pushed(spec, x, ref, cuts))
    got, grad = finish(spec, states), pulled(spec, states, upstream, x, ref, cuts)
    want, want_grad = one_pass(x, labels, ref, names, upstream, mask=mask)
    for name in names:
        assert_close(got[name], want[name].double(), what=name, scale=16.0)
    assert_close(grad, want_grad.double(), what="gradient", scale=32.0)
    assert (
        bool(torch.isneginf(got["logprob"][1]))
        and bool(torch.isnan(got["logprob"][5]))
        and bool((grad[3:5] == 0).all())
    )


@pytest.mark.parametrize("empty", ["policy", "reference", "both"])
def test_rows_of_which_only_one_part_has_mass(backend, device, empty):
    """KLs are +inf, or not, exactly as in one pass; a row that is -inf throughout is NaN."""
    x, ref = make(device=device)
    for tensor, name in ((x, "policy"), (ref, "reference")):
        if empty in (name, "both"):
            tensor[0, 16:], tensor[1, :64], tensor[2] = -math.inf, -math.inf, -math.inf
            tensor[5, :16], tensor[5, 80:] = -math.inf, -math.inf
    labels = LABELS.to(device)
    spec = spec_of(x, labels, ref)
    got = finish(spec, merge(pushed(spec, x, ref, (16, 64, 80))))
    want, _ = one_pass(x, labels, ref, ALL)
    for name in ALL:
        assert_close(got[name], want[name].double(), what=name, scale=16.0)


FAR = (-1e30, 3e9, 1e9, -1e9, 7.6e8, torch.finfo(torch.float32).max / 2)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 5.0])
def test_far_rows(backend, device, slow_backend, scale):
    """Rows whose logits are so large that neighbours among the floats lie many bits apart: their parts must
    not be taken for equals."""
    offset = torch.tensor(FAR, device=device).unsqueeze(-1)
    step = torch.arange(VOCAB, device=device) % 7
    x = (offset.double() * (1.0 + step * 2.0**-23)).float()
    ref = x.roll(1, 1)
    labels = torch.tensor([0, 6, 13, 29, 64, 96], device=device)
    spec = spec_of(x, labels, ref, logit_scale=scale)
    want, _ = one_pass(x, labels, ref, ALL, logit_scale=scale)
    every = ((1, 2, 3), (30,), tuple(range(1, VOCAB, 7)))
    for cuts in every[1:2] if slow_backend and scale != 1 else every[: 2 if slow_backend else 3]:
        got = finish(spec, merge(pushed(spec, x, ref, cuts)))
        for name in ALL:
            size = torch.nan_to_num(want[name].double().abs(), posinf=0.0, neginf=0.0).clamp(min=8.0)
            if name in NEED_REF:
                size = torch.maximum(size, (x.double() * scale).abs().amax(-1).clamp(max=1e30))
            assert_close(got[name], want[name].double(), what=f"{name} in {cuts}", scale=8.0 * size)


@pytest.mark.parametrize("step", range(4))
def test_neighbours_among_far_logits_are_no_equals(backend, device, slow_backend, step):
    """About 2^29.5 and the next float: fl(u c) may be one number, their odds are e^64."""
    if slow_backend and step in (1, 2):
        return  # the sums of two steps cover rounding up and down
    low = float(torch.tensor(2.0**29.5) + 64.0 * step)
    x = torch.tensor([[low] * 3 + [low + 64.0] * 2, [-low - 64.0] * 3 + [-low] * 2], device=device)
    labels = torch.tensor([4, 4], device=device)
    for ref in (None, x.flip(-1).contiguous()):
        spec = spec_of(x, labels, ref)
        for cuts in ((3,), (1, 4), (1, 2, 3, 4)) if not slow_backend else ((3, 4),):
            got = finish(spec, merge(pushed(spec, x, ref, cuts)))
            assert_close(
                got["logprob"], torch.full_like(got["logprob"], -math.log(2.0)).double(), what=str(cuts)
            )
            assert_close(
                got["entropy"], torch.full_like(got["entropy"], math.log(2.0)).double(), what=str(cuts)
            )
            state = target = None  # and one part after another
            refs = [None] * (len(cuts) + 1) if ref is None else [y for _, y in parts_of(ref, cuts)]
            for (lo, tile), other in zip(parts_of(x, cuts), refs):
                *outputs, state, target = token_stats_fwd(
                    TokenStatsFwd(spec.rows(tile, other, lo), spec.bits, state, target)
                )
            chained = spec.named(outputs)["logprob"]
            assert_close(chained, torch.full_like(chained, -math.log(2.0)).double(), what=f"chained {cuts}")


def test_the_first_maximum_of_rows_that_a_softcap_flattens(backend, device):
    """Large logits are equal after tanh; which of them is the first maximum is asked of the raw ones, from
    part to part too."""
    x = torch.zeros(4, VOCAB, device=device)
    x[0, 10], x[0, 70], x[1, 70], x[1, 10], x[2, 10], x[2, 70], x[3, 70] = 1e3, 2e3, 1e3, 2e3, 1e3, 1e3, 1e3
    labels = torch.tensor([70, 10, 10, 70], device=device)
    spec = spec_of(x, labels, softcap=1.0)
    for cuts in ((30,), (70,), (11, 70)):
        got = finish(spec, merge(pushed(spec, x, None, cuts)))
        assert got["is_top1"].tolist() == [1.0] * 4, cuts
        state = target = None
        for lo, tile in parts_of(x, cuts):
            *outputs, state, target = token_stats_fwd(
                TokenStatsFwd(spec.rows(tile, start=lo), spec.bits, state, target)
            )
        assert spec.named(outputs)["is_top1"].tolist() == [1.0] * 4, cuts


# --- the states themselves ----------------------------------------------------------------------------------


def bits(t):
    return t.contiguous().view(torch.int32)


@pytest.mark.parametrize("with_ref", [False, True])
def test_one_part_stays_as_it_is_to_the_bit(backend, device, with_ref):
    x, ref = spoilt(*make(device=device, ref=with_ref))
    x[0, 60] = math.nan
    state, target = pushed(spec_of(x, LABELS.to(device), ref, mask=MASK.to(device)), x, ref, ())[0]
    got = row_states_merge(RowStatesMerge(state.unsqueeze(0), target.unsqueeze(0)))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, (state, target)))


@pytest.mark.parametrize("with_ref", [False, True])
def test_the_empty_state_leaves_no_trace(backend, device, with_ref):
    x, ref = spoilt(*make(device=device, ref=with_ref))
    spec = spec_of(x, LABELS.to(device), ref)
    (whole,) = pushed(spec, x, ref, ())
    (nothing,) = pushed(
        spec_of(x, LABELS.to(device), ref, mask=torch.zeros(6, dtype=torch.bool, device=device)), x, ref, ()
    )
    for parts in ([nothing, whole], [whole, nothing], [nothing, nothing, whole, nothing]):
        for got, want in zip(merge(parts), whole):
            assert torch.equal(torch.nan_to_num(got, nan=1e9), torch.nan_to_num(want, nan=1e9))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(merge([nothing, nothing]), nothing))


@pytest.mark.parametrize("with_ref", [False, True])
def test_rows_that_are_not_scored_hold_the_empty_state(backend, device, with_ref):
    """By mask, by label, or because every label is ignored, whatever the row holds."""
    x, ref = make(device=device, ref=with_ref)
    x[1], x[2], x[3, 0] = math.nan, math.inf, -math.inf
    labels = torch.tensor(
        [[-100, -100], [-100, -100], [3, 4], [-100, -100], [8, 9], [1, -100]], device=device
    )
    mask = torch.tensor([True, False, False, True, False, True], device=device)
    names = tuple(n for n in (ALL if with_ref else PLAIN) if n != "is_top1")
    spec = row_spec((6,), VOCAB, x.dtype, x, labels=labels, mask=mask, outputs=names, with_ref=with_ref)
    empty = torch.zeros(STATE_WIDTH, device=device)
    empty[[COL_M, COL_UMAX, COL_LARGEST]], empty[COL_TOP] = -math.inf, -1.0
    empty[COL_REF_M] = -math.inf if with_ref else 0.0
    parts = pushed(spec, x, ref, (30, 64))
    for states in (*parts, merge(parts)):
        assert torch.equal(states.state[:5], empty.expand(5, -1)) and bool(
            torch.isneginf(states.target.view(-1, 6, 2)[:, :5]).all()
        )
        assert float(states.state[5, COL_VALID]) == 1.0 and float(states.state[5, COL_S0]) > 0
    assert all(bool((value[:5] == 0).all()) for value in finish(spec, merge(parts)).values())


def test_states_without_reference_have_none(backend, device):
    x, _ = make(device=device, ref=False)
    states = merge(pushed(spec_of(x, LABELS.to(device)), x, None, (30, 64)))
    assert bool((states.state[:, [COL_REF_M, COL_REF_S0, COL_T, COL_TR, COL_REF_UMAX]] == 0).all())
    assert states.target.shape == (6, 1) and bool(torch.isfinite(states.state[0, COL_SZ]))


def test_order_and_number_of_parts_do_not_matter_beyond_rounding(backend, device, slow_backend):
    x, ref = make(device=device)
    spec = spec_of(x, LABELS.to(device), ref)
    parts = pushed(spec, x, ref, tuple(range(8, VOCAB, 40 if slow_backend else 8)))
    first, other = merge(parts), merge(parts[::-1])
    for name, want in finish(spec, first).items():
        assert_close(finish(spec, other)[name], want.double(), what=name, scale=16.0)
    assert all(torch.equal(a, b) for a, b in zip(merge(parts), first))  # and twice the same is the same


def test_finishing_gives_the_bits_of_the_pass_that_made_the_states(backend, device):
    x, ref = spoilt(*make(device=device))
    for other in (None, ref):
        spec = spec_of(x, LABELS.to(device), other, mask=MASK.to(device))
        (states,) = pushed(spec, x, other, ())
        want, _ = one_pass(x, LABELS.to(device), other, PLAIN if other is None else ALL, mask=MASK.to(device))
        for name, value in finish(spec, states).items():
            assert torch.equal(bits(value), bits(want[name])), name


def test_without_labels_and_without_rows(backend, device):
    x, ref = make(device=device)
    names = ("entropy", "logsumexp", "kl_policy_ref", "kl_ref_policy")
    for given, other in ((x, ref), (x[:0], ref[:0])):
        spec = row_spec((len(given),), VOCAB, x.dtype, x, outputs=names, with_ref=True)
        want, _ = one_pass(given, None, other, names)
        for name, value in finish(spec, merge(pushed(spec, given, other, (30, 96)))).items():
            assert_close(value, want[name].double(), what=name, scale=16.0)
    spec = spec_of(x[:0], LABELS[:0].to(device))
    assert finish(spec, merge(pushed(spec, x[:0], None, (30,))))["logprob"].shape == (0,)


def test_leading_dims(backend, device):
    x, ref = (t.reshape(2, 3, VOCAB) for t in make(device=device))
    labels = LABELS.view(2, 3).to(device)
    spec = row_spec((2, 3), VOCAB, x.dtype, x, labels=labels, outputs=ALL, with_ref=True)
    want, _ = one_pass(x, labels, ref, ALL)
    for name, value in finish(spec, merge(pushed(spec, x, ref, (30,)))).items():
        assert_close(value, want[name].double(), what=name, scale=16.0)


def test_a_label_outside_the_vocabulary(backend, device):
    x, ref = make(device=device)
    labels = LABELS.clone().to(device)
    labels[2] = VOCAB
    spec = spec_of(x, labels, ref)
    states = RowStates(*merge(pushed(spec_of(x, LABELS.to(device), ref), x, ref, (30,))))
    if device == "cpu":
        with pytest.raises(IndexError, match=r"labels\[2\]"):
            push(spec, x, ref)
        with pytest.raises(IndexError, match=r"labels\[2\]"):
            finish(spec, states)
    else:
        got = finish(spec, states)
        assert all(
            bool(torch.isnan(v[2]).all()) and not bool(torch.isnan(v[[0, 1, 3, 4, 5]]).any())
            for v in got.values()
        )


def test_bad_states_are_refused(backend, device):
    op = torch.ops.fastalign
    states, targets = torch.zeros(2, 6, STATE_WIDTH, device=device), torch.zeros(2, 6, 1, device=device)
    for wrong, message in (
        ((states[:0], None), "no part"),
        ((states, targets[:1]), "targets has shape"),
        ((states, targets[:, :5]), "targets has 5"),
    ):
        with pytest.raises(ValueError, match=message):
            op.row_states_merge(*wrong)
    with pytest.raises(ValueError, match="states has shape"):
        op.row_states_merge(states[..., :-1], None)
    labels, rest = LABELS.to(device).unsqueeze(-1), (None, None, 1.44, 1.0, -100, VOCAB)
    for wrong, message in (
        ((states[0], None, labels, *rest, 1), "given together"),
        ((states[0], targets[0, :3], labels, *rest, 1), "target has 3 rows"),
        ((states[0], None, None, *rest, 1), "labels is required"),
        ((states[0], targets[0], labels, *rest, 64), "ref_logits is required"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            op.row_states_finish(*wrong)
