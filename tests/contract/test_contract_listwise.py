"""The contract of the losses over ranked lists, on every backend; each against its paper's formula, typed
here independently in fp64 as loops over the lists."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from checks.lists import (
    PAPERS,
    check_list_loss,
    check_the_longest_list,
    compare_lists,
    list_loss,
    list_truth,
    make_lists,
    run_lists,
)

import fastalign as fa
from fastalign.losses.list import LIST_LINKS, ListPreset
from fastalign.ops.columns import KINDS, SFT_NORMS
from fastalign.runtime.op import OPS
from fastalign.testing import assert_close, gradient

# --- the papers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", PAPERS)
def test_loss_equals_its_paper(backend, device, name, ties):
    check_list_loss(name, make_lists(ties=ties, device=device))


@pytest.mark.parametrize("name", PAPERS)
def test_the_longest_list(backend, device, name):
    check_the_longest_list(device, name)


# --- every option, against the reference in fp64 ------------------------------------------------------------


VARIANTS = {
    **{f"link {f}": {"loss": ListPreset(link=f, beta=0.3, target=0.4)} for f in LIST_LINKS},
    **{f"half length norm {k}": {"loss": ListPreset(kind=k, length_norm=0.5, beta=0.7)} for k in KINDS},
    "lambda, mean over pairs": {"loss": "lipo", "pair_mean": True, "list_weight": 2.0},
    "temperature": {"loss": "exo_list", "alpha": 0.3},
    **{f"sft {n}": {"loss": "pro", "sft_weight": 0.7, "sft_norm": n} for n in SFT_NORMS},
    "sft of a list loss with a reference": {"loss": "nca", "sft_weight": 0.7, "sft_power": 1.0},
    "sft alone": {"loss": "rrhf", "list_weight": 0.0},
    "sum": {"loss": "rrhf", "reduction": "sum"},
    "none": {"loss": "rrhf", "reduction": "none"},
    "none, token mean": {"loss": "rrhf", "reduction": "none", "sft_norm": "token_mean_global"},
    "num_items": {"loss": "rrhf", "num_items": 11, "num_sft_tokens": 133.0, "sft_norm": "token_mean_global"},
    "drop": {"loss": "plackett_luce", "nonfinite": "drop"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_options(backend, device, name):
    compare_lists(make_lists((3, 0, 1, 4), device=device, seed=len(name)), **VARIANTS[name])


def test_beta_as_a_tensor(backend, device):
    lists = make_lists((3, 0, 1, 5), device=device)
    compare_lists(lists, loss="plackett_luce", beta=torch.tensor([0.1, 0.5, 0.0, 2.0], device=device))
    single = run_lists(lists, loss="nca", beta=torch.tensor(0.25, device=device))
    for key, value in run_lists(lists, loss="nca", beta=0.25).items():
        assert torch.equal(value, single[key])


def test_many_lists(backend, device):
    """More lists and sequences than the block that normalises has threads."""
    sizes = [i % 3 for i in range(270)]
    generator = torch.Generator().manual_seed(0)
    totals, scores = (
        torch.randn(sum(sizes), generator=generator, dtype=torch.float64).to(device) for _ in range(2)
    )
    offsets, lengths = (
        torch.tensor([0, *itertools.accumulate(sizes)], device=device),
        torch.arange(sum(sizes), device=device) % 5 + 1.0,
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = totals.to(dtype).requires_grad_()
        with contextlib.nullcontext() if dtype == torch.float32 else fa.use_backend("reference"):
            out = fa.listwise_loss_from_sums(leaf, None, offsets, scores, loss="rrhf", lengths=lengths)
        results.append((out.loss, gradient(out.loss, leaf), out.table))
    for got, want in zip(*results):
        assert_close(got, want, scale=10.0)


# --- invariances --------------------------------------------------------------------------------------------


def moved(lists, order, sizes):
    """The sequences in another order, and lists of other sizes."""
    batch, _, scores = lists
    cu = batch.packed.cu_seqlens.tolist()
    index = torch.cat([torch.arange(cu[s], cu[s + 1]) for s in order]).to(scores.device)
    offsets = torch.tensor(
        [0, *itertools.accumulate(cu[s + 1] - cu[s] for s in order)], dtype=torch.int32, device=scores.device
    )
    packed = batch.packed._replace(cu_seqlens=offsets, mask=batch.packed.mask[index])
    batch = batch._replace(
        packed=packed, logprobs=batch.logprobs[index], ref_logprobs=batch.ref_logprobs[index]
    )
    return (
        batch,
        torch.tensor([0, *itertools.accumulate(sizes)], device=scores.device),
        scores[order],
    ), index


@pytest.mark.parametrize("name", PAPERS)
def test_order_inside_a_list_does_not_matter(backend, device, name):
    lists = make_lists((4, 3), device=device)
    other, index = moved(lists, [2, 0, 3, 1, 6, 4, 5], (4, 3))
    a, b = run_lists(lists, loss=name), run_lists(other, loss=name)
    size = max(1.0, float(a["d logprobs"].abs().max()))
    assert_close(b["loss"], a["loss"].double(), scale=10.0 * max(1.0, float(a["loss"].abs())))
    assert_close(b["d logprobs"], a["d logprobs"][index].double(), scale=10.0 * size)


@pytest.mark.parametrize(
    "name,options",
    [("plackett_luce", {}), ("rrhf", {"sft_norm": "token_mean_global"}), ("pro", {}), ("lipo", {})],
)
def test_micro_batches(backend, device, name, options):  # C1
    lists = make_lists((3, 2, 0, 4), device=device)
    whole = list_loss(lists, loss=name, **options)
    tokens = float(whole.metrics()["nll_loss"].count) if name in ("rrhf", "pro") else None
    total, grads, cut = 0.0, [], int(lists[0].packed.cu_seqlens[5])
    for order, sizes in ((range(5), (3, 2)), (range(5, 9), (0, 4))):
        part, _ = moved(lists, list(order), sizes)
        lp = part[0].logprobs.clone().requires_grad_()
        out = list_loss(part, lp, loss=name, num_items=3, num_sft_tokens=tokens, **options)
        total, grads = total + out.loss.double(), [*grads, gradient(out.loss, lp)]
    lp = lists[0].logprobs.clone().requires_grad_()
    want = gradient(list_loss(lists, lp, loss=name, **options).loss, lp)
    assert grads[0].shape[0] == cut
    assert_close(whole.loss, total, scale=10.0 * max(1.0, float(total.detach().abs())))
    assert_close(torch.cat(grads), want.double(), scale=10.0 * max(1.0, float(want.abs().max())))


def test_lists_from_sums_equal_packed(backend, device):
    lists = make_lists((3, 1, 2), device=device)
    batch, offsets, scores = lists
    totals, refs, lengths = (
        fa.sequence_sum(x, batch.packed.cu_seqlens, mask=batch.packed.mask)
        for x in (batch.logprobs, batch.ref_logprobs, torch.ones_like(batch.logprobs))
    )
    first = [
        int(batch.packed.mask[a:b].nonzero()[0]) + a
        for a, b in itertools.pairwise(batch.packed.cu_seqlens.tolist())
    ]
    for name in ("plackett_luce", "rrhf", "pro"):
        leaf, lp = totals.clone().requires_grad_(), batch.logprobs.clone().requires_grad_()
        got = fa.listwise_loss_from_sums(leaf, refs, offsets, scores, loss=name, lengths=lengths)
        want = list_loss(lists, lp, loss=name)
        size = 50.0 * max(1.0, float(want.loss.detach().abs()))
        assert_close(got.loss, want.loss.double(), scale=size, what=name)
        assert_close(gradient(got.loss, leaf), gradient(want.loss, lp)[first].double(), scale=size, what=name)


def test_lists_are_bitwise_equal(backend, device):  # row 42
    lists = make_lists((4, 0, 3), device=device)
    for name in ("plackett_luce", "rrhf", "pro"):
        a, b = run_lists(lists, loss=name), run_lists(lists, loss=name)
        assert all(torch.equal(a[k], b[k]) for k in a)


# --- edges --------------------------------------------------------------------------------------------------


def test_lists_of_one_and_of_none(backend, device):  # 14b: K = 1
    lists = make_lists((1, 0, 1), device=device)
    for name in PAPERS:
        lp = lists[0].logprobs.clone().requires_grad_()
        out = list_loss(lists, lp, loss=name)
        assert out.valid.tolist() == [True, False, True]
        g = gradient(out.loss, lp)
        if name == "rrhf":  # the SFT term is left
            assert_close(out.loss.cpu(), list_truth("rrhf", lists)[0].sum() / 2)
        elif name == "nca":  # softplus(-s) + softplus(s)
            assert_close(out.loss.cpu(), list_truth("nca", lists)[0].sum() / 2)
        else:
            assert abs(float(out.loss.detach())) < 1e-6 and float(g.abs().max()) < 1e-6, name


def test_nothing_at_all(backend, device):  # row 1
    none = torch.empty(0, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    for offsets in (zero, torch.zeros(3, dtype=torch.int32, device=device)):
        lp = none.clone().requires_grad_()
        out = fa.listwise_loss(lp, none, zero, offsets, none, mask=none > 0)
        assert (
            float(out.loss.detach()) == 0.0
            and gradient(out.loss, lp).shape == (0,)
            and not bool(out.valid.any())
        )
        assert all(float(m.count) in (0.0, offsets.numel() - 1.0) for m in out.metrics().values())


def test_empty_responses(backend, device):  # row 3, J1
    packed = fa.pack(
        [[1, 2, 3], [1], [], [4, 5], [], []], [[0, 1, 1], [0], [], [0, 1], [], []], device=device
    )
    lp = torch.where(packed.mask, -1.0, 0.0)
    offsets, scores = (
        torch.tensor([0, 3, 4, 6], device=device),
        torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 2.0], device=device),
    )
    for name in PAPERS:
        x = lp.clone().requires_grad_()
        out = fa.listwise_loss(x, 1.5 * lp, packed.cu_seqlens, offsets, scores, mask=packed.mask, loss=name)
        assert out.valid.tolist() == [True, True, False], name
        assert bool(torch.isfinite(out.loss)) and bool(torch.isfinite(gradient(out.loss, x)).all()), name
        assert float(out.metrics()["n_empty"].sum) == 4
    x = lp.clone().requires_grad_()
    masked = fa.listwise_loss(
        x, lp, packed.cu_seqlens, offsets, scores, mask=torch.zeros_like(packed.mask), loss="rrhf"
    )
    assert float(masked.loss.detach()) == 0.0 and float(gradient(masked.loss, x).abs().sum()) == 0.0


def test_equal_scores(backend, device):
    """No contrast in rrhf, pro, lipo and kwise_rm; the order of the list in plackett_luce; a uniform target
    in the others."""
    batch, offsets, scores = make_lists((3,), device=device)
    lists = batch, offsets, torch.ones_like(scores)
    for name in PAPERS:
        check_list_loss(name, lists)
    for name in ("rrhf", "pro", "lipo", "kwise_rm"):
        options = {"sft_weight": 1e-30} if name in ("rrhf", "pro") else {}
        assert abs(float(list_loss(lists, loss=name, **options).loss)) < 1e-12
        assert math.isnan(float(list_loss(lists, loss=name).metrics()["rewards/accuracies"]))
    ranked_scores = list_loss(
        (batch, offsets, torch.arange(3.0, 0.0, -1.0, device=device)), loss="plackett_luce"
    ).loss
    assert torch.equal(list_loss(lists, loss="plackett_luce").loss, ranked_scores)


def test_masked_tokens_of_lists_do_not_leak(backend, device):  # row 4, J5
    lists = make_lists((3, 2), device=device)
    batch, mask = lists[0], lists[0].packed.mask
    for name in ("plackett_luce", "rrhf"):
        clean = run_lists(lists, loss=name)
        for garbage in (math.nan, math.inf, -math.inf):
            dirty = batch._replace(
                **{k: torch.where(mask, getattr(batch, k), garbage) for k in ("logprobs", "ref_logprobs")}
            )
            soiled = run_lists((dirty, *lists[1:]), loss=name)
            for key in clean:
                assert torch.equal(clean[key], soiled[key]), (name, key)
        assert bool((clean["d logprobs"][~mask] == 0).all())


@pytest.mark.parametrize("name", PAPERS)
def test_huge_log_ratios(backend, device, name):  # row 28
    offsets, scores = torch.tensor([0, 4], device=device), torch.tensor([3.0, 0.0, 2.0, 1.0], device=device)
    for size in (1e-3, 50.0, 1e4):
        totals = torch.tensor([-1.0, 1.0, 0.0, -2.0], device=device) * size
        leaf = totals.clone().requires_grad_()
        options = {"beta": 1.0, "lengths": torch.ones_like(totals)}
        out = fa.listwise_loss_from_sums(
            leaf, torch.zeros_like(totals), offsets, scores, loss=name, **options
        )
        g = gradient(out.loss, leaf)
        want_leaf = totals.double().cpu().requires_grad_()
        beta = {} if name in ("rrhf", "pro", "kwise_rm") else {"beta": 1.0}
        want = PAPERS[name](want_leaf, want_leaf, torch.ones(4).double(), scores.double().cpu(), **beta)
        assert_close(out.loss.cpu(), want, scale=10.0 * max(1.0, float(want.detach().abs())))
        want_g = gradient(want, want_leaf)
        assert_close(
            g.cpu(), want_g, scale=20.0 * max(1.0, float(want_g.abs().max())), what=f"gradient at {size}"
        )


def test_lists_that_are_not_finite(backend, device):
    offsets, scores = (
        torch.tensor([0, 2, 4], device=device),
        torch.tensor([1.0, 0.0, 1.0, 0.0], device=device),
    )
    totals = torch.tensor([-math.inf, -1.0, -1.0, -3.0], device=device)
    for name in ("plackett_luce", "kwise_rm", "infonca"):
        leaf = totals.clone().requires_grad_()
        out = fa.listwise_loss_from_sums(leaf, torch.zeros_like(totals), offsets, scores, loss=name, beta=1.0)
        assert not bool(torch.isfinite(out.loss)) and float(out.metrics()["nonfinite_lists"].sum) == 1
        kept = fa.listwise_loss_from_sums(
            leaf, torch.zeros_like(totals), offsets, scores, loss=name, beta=1.0, nonfinite="drop"
        )
        g = gradient(kept.loss, leaf)
        assert kept.valid.tolist() == [False, True] and bool(torch.isfinite(kept.loss))
        assert g[:2].tolist() == [0.0, 0.0] and bool((g[2:] != 0).all())
    nan = fa.listwise_loss_from_sums(torch.where(totals < -9, math.nan, totals), totals, offsets, scores)
    assert math.isnan(float(nan.loss))


def test_offsets_and_scores_are_checked(backend, device):
    if device != "cpu":
        return
    totals = torch.zeros(66)
    for words, offsets, scores in (
        ("list 1 holds 65 responses; legal: up to 64", [0, 1, 66], torch.zeros(66)),
        ("list_offsets must start at 0 and end at the number of sequences", [0, 65], torch.zeros(66)),
        ("list_offsets decreases at position 2", [0, 9, 3, 66], torch.zeros(66)),
        (r"scores\[65\] is nan", [0, 3, 66], torch.cat([torch.zeros(65), torch.tensor([math.nan])])),
    ):
        with pytest.raises(ValueError, match=words):
            fa.listwise_loss_from_sums(totals, totals, torch.tensor(offsets), scores)


@pytest.mark.parametrize("offsets", [[0, 3, 68, 70], [0, 7, 3, 70], [-2, 4, 70], [2, 4, 64], [0, 4, 90]])
def test_bad_lists_are_nan_where_values_are_not_looked_at(backend, device, monkeypatch, offsets):
    """On a GPU: no garbage, no stray access, no loss that looks right, and the lists beside a bad one keep
    their gradient."""
    if backend == "cpu":  # it looks at values always
        return
    monkeypatch.setattr(OPS["listwise_fwd"], "check", None)
    leaf = torch.zeros(70, device=device, requires_grad=True)
    scores = torch.arange(70.0, device=device)
    out = fa.listwise_loss_from_sums(
        leaf, leaf.detach(), torch.tensor(offsets, device=device), scores, loss="plackett_luce"
    )
    g = gradient(out.loss, leaf)
    assert bool(torch.isnan(g).any())
    assert math.isnan(float(out.loss.detach()))
    if offsets == [0, 3, 68, 70]:
        good = torch.ones(70, dtype=torch.bool, device=device)
        good[3:68] = False
        assert torch.equal(torch.isfinite(g), good)
    bad = scores.clone()
    bad[1] = math.inf
    out = fa.listwise_loss_from_sums(leaf, leaf.detach(), torch.tensor([0, 3, 35, 70], device=device), bad)
    assert math.isnan(float(out.loss.detach())) and torch.isnan(
        gradient(out.loss, leaf)
    ).nonzero().flatten().tolist() == [0, 1, 2]
