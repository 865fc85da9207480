"""The CPU row kernels on every instruction set of this machine: against fp64, against each other, and bit by
bit against themselves under other thread counts, row counts, strides and alignments."""

from __future__ import annotations

import math

import pytest
import torch
from checks.rows import ALL, check_rows
from row_calls import rows_of

import fastalign as fa
from fastalign import _C
from fastalign.ops.token_stats.contract import RowGradients, RowOptions, TokenStatsBwd, TokenStatsFwd
from fastalign.ops.token_stats.op import token_stats_bwd, token_stats_bwd_, token_stats_fwd
from fastalign.rows.spec import LOG2E
from fastalign.testing import assert_close, gradient, make_labels, make_logits, token_stats_truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK, CHUNK = 2048, 16384  # csrc/cpu/rows.h
STATE = -2  # the place of the row states among the results


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    _C.set_cpu_isa(request.param)
    with fa.use_backend("cpu"):
        yield request.param
    _C.set_cpu_isa("auto")


@pytest.fixture
def threads():
    """Sets the thread count for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def forward(logits, labels, outputs=63, cap_scale=0.0):
    """Every result of the op: the six outputs, the states and the targets."""
    factor = LOG2E * (1.0 / cap_scale if cap_scale else 1.0)
    rows = rows_of(logits, labels, options=RowOptions(factor, cap_scale, 1.0, -100))
    return token_stats_fwd(TokenStatsFwd(rows, outputs, None, None))


def backward(op, logits, labels, state, g_logprob, g_entropy):
    return op(TokenStatsBwd(rows_of(logits, labels), state, RowGradients(g_logprob, g_entropy)))


def test_available(isa):
    assert _C.build_info()["cpu_isa"] == isa
    assert _C.cpu_isas()[-1] == "generic"
    with pytest.raises(ValueError, match="'sse9'.*auto, .*generic"):
        _C.set_cpu_isa("sse9")
    assert _C.build_info()["cpu_isa"] == isa


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 31, BLOCK - 1, BLOCK + 33, CHUNK, CHUNK + 1, 3 * CHUNK + 65])
def test_accuracy(isa, vocab, dtype, softcap):
    names = ALL if softcap is None else ALL[:-1]  # capping makes ties
    check_rows(make_logits(3, vocab, dtype=dtype), make_labels(3, vocab), names, softcap=softcap)


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "offset"])
def test_instruction_sets_agree(kind):
    logits, labels = make_logits(4, 50257, kind=kind), make_labels(4, 50257)
    results = {}
    for name in _C.cpu_isas():
        _C.set_cpu_isa(name)
        with fa.use_backend("cpu"):
            results[name] = fa.token_stats(logits, labels, outputs=ALL)
    _C.set_cpu_isa("auto")
    for name, stats in results.items():
        for output in ALL:
            assert_close(
                getattr(stats, output), getattr(results["generic"], output).double(), what=f"{name}: {output}"
            )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_bitwise_whatever_the_threads_and_rows(isa, threads, dtype):
    rows, vocab = 7, 2 * CHUNK + 77
    logits, labels = make_logits(rows, vocab, dtype=dtype), make_labels(rows, vocab).unsqueeze(1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    g_logprob, g_entropy = (
        torch.linspace(-1, 1, rows, dtype=acc).unsqueeze(1),
        torch.linspace(0.5, 2, rows, dtype=acc),
    )
    results = []
    for count in (1, 2, 3, 16):
        threads(count)
        results.append(forward(logits, labels))
        grad = backward(token_stats_bwd, logits, labels, results[-1][STATE], g_logprob, g_entropy)
        results[-1] = [*results[-1], grad]
        for n in (1, 2, rows):  # one and two rows are fewer than most thread counts: they are split
            some = forward(logits[:n], labels[:n])
            assert all(torch.equal(a, b[:n]) for a, b in zip(some, results[-1]))
            assert torch.equal(
                backward(token_stats_bwd, logits[:n], labels[:n], some[STATE], g_logprob[:n], g_entropy[:n]),
                grad[:n],
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_whatever_the_layout(isa, dtype):
    """Strided rows at odd addresses give the same bits, and nothing beside the rows is written."""
    rows, vocab = 5, BLOCK + 45
    logits, labels = make_logits(rows, vocab, dtype=dtype), make_labels(rows, vocab).unsqueeze(1)
    want = forward(logits, labels)
    g = torch.ones(rows, 1)
    want_grad = backward(token_stats_bwd, logits, labels, want[STATE], g, g[:, 0])
    for shift in (1, 3):
        wide = torch.full((rows, vocab + 8), 77.0, dtype=dtype)
        view = wide[:, shift : shift + vocab]
        view.copy_(logits)
        got = forward(view, labels)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        backward(token_stats_bwd_, view, labels, got[STATE], g, g[:, 0])
        assert torch.equal(view, want_grad)
        assert bool((wide[:, :shift] == 77).all()) and bool((wide[:, shift + vocab :] == 77).all())


@pytest.mark.parametrize("names", [("logprob", "entropy"), ALL[:4]])
@pytest.mark.parametrize("low", [-math.inf, -3.3e38, -1e38, -1e30, -1e10, -1e9, -1e4])
@pytest.mark.parametrize("hidden", [5, BLOCK, CHUNK + 100])
def test_masked_vocabulary(isa, hidden, low, names):
    """A prefix of -inf or of mask values, longer than a vector, a block and a chunk: as if these columns were
    not there."""
    kept = make_logits(2, 300)
    logits = torch.cat([torch.full((2, hidden), low), kept, torch.full((2, 9), low)], 1).requires_grad_()
    labels = torch.tensor([hidden, hidden + 17])
    stats = fa.token_stats(logits, labels, outputs=names)
    truth = token_stats_truth(kept, labels - hidden)
    for name in names:
        assert_close(getattr(stats, name), truth[name], what=name)
    g = gradient(stats.logprob.sum() + stats.entropy.sum(), logits)
    assert bool(torch.isfinite(g).all()) and bool((g[:, :hidden] == 0).all()) and bool((g[:, -9:] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", ["normal", "-inf", "negative"])
@pytest.mark.parametrize("at", [0, 40, BLOCK + 3, 2 * BLOCK + 6])
def test_nan_and_inf_reach_every_output(isa, dtype, rest, at):
    """NaN of either sign and +inf, in the first vector, in another block and in the last, partial vector."""
    vocab = 2 * BLOCK + 7
    for bad in (math.nan, -math.nan, math.inf):
        logits = make_logits(2, vocab, dtype=dtype)
        if rest != "normal":
            logits[0] = -math.inf if rest == "-inf" else logits[0] - 60.0
        logits[0, at] = bad
        if math.isnan(bad):
            logits[0, at] = torch.copysign(
                logits[0, at], torch.tensor(-1.0 if math.copysign(1.0, bad) < 0 else 1.0, dtype=dtype)
            )
        logits.requires_grad_()
        stats = fa.token_stats(
            logits, torch.tensor([3, 3]), outputs=("logprob", "entropy", "log_sum_sq_probs", "is_top1")
        )
        for name in ("logprob", "entropy", "log_sum_sq_probs", "is_top1"):
            value = getattr(stats, name)
            assert math.isnan(float(value[0].detach())) and math.isfinite(float(value[1].detach())), (
                name,
                bad,
            )
        g = gradient(stats.logprob.sum(), logits)
        assert bool(torch.isnan(g[0]).all()) and bool(torch.isfinite(g[1]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_rounded_once(isa, dtype):
    """The 16-bit gradient is the fp32 one rounded to nearest even, NaN included."""
    logits, labels = make_logits(4, 5003, dtype=dtype), make_labels(4, 5003).unsqueeze(1)
    state = forward(logits.float(), labels)[STATE]
    g = torch.tensor([[1.0], [-3e4], [1e-6], [math.nan]])
    got = backward(token_stats_bwd, logits, labels, state, g, torch.ones(4))
    want = backward(token_stats_bwd, logits.float(), labels, state, g, torch.ones(4)).to(dtype)
    assert torch.equal(torch.isnan(got), torch.isnan(want)) and bool(torch.isnan(want[3]).all())
    assert torch.equal(got[:3], want[:3])


def test_gradient_near_the_largest_float(isa):
    logits, labels = (
        torch.tensor([[0.0] + [-5.0, -6.3, -5.75] * 33]),
        torch.tensor([[1]]),
    )  # the sum is 1.3: g / sum may not be doubled
    state = forward(logits, labels)[STATE]
    for g in (3.3e38, -3.3e38, 1e-30):
        got = backward(token_stats_bwd, logits.clone(), labels, state, torch.tensor([[g]]), None).double()
        want = g * (torch.nn.functional.one_hot(labels[0], 100) - torch.softmax(logits.double(), -1))
        assert float(((got - want) / g).abs().max()) <= 1e-6, g


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_of_equal_maxima(isa, dtype):
    vocab = 2 * CHUNK + 50
    logits = make_logits(6, vocab, dtype=dtype).clamp(max=5.0)
    first = [0, 31, BLOCK - 1, BLOCK, CHUNK + 9, vocab - 1]
    for row, column in enumerate(first):
        logits[row, column] = 6.0
        logits[row, column + 1 :: 1000] = 6.0
    assert forward(logits, torch.tensor(first).unsqueeze(1))[5].tolist() == [1.0] * 6
    logits.neg_().sub_(100.0)  # all negative: 16-bit patterns run the other way
    labels = logits.argmax(1, keepdim=True)
    assert forward(logits, labels)[5].tolist() == [1.0] * 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_with_many_targets(isa, threads, dtype):
    """In place equals out of place bit by bit, with repeated targets on both sides of a chunk border, whoever
    sweeps the row."""
    vocab = CHUNK + 300
    logits = make_logits(2, vocab, dtype=dtype)
    labels = torch.tensor([[CHUNK - 1, CHUNK, 5, CHUNK, -100, vocab - 1], [0, 0, 0, 1, -100, -100]])
    state = forward(logits, labels)[STATE]
    g = torch.linspace(-1, 1, 12).view(2, 6)
    want = backward(token_stats_bwd, logits, labels, state, g, None)
    for count in (1, 2, 4):
        threads(count)
        grad = logits.clone()
        backward(token_stats_bwd_, grad, labels, state, g, None)
        assert torch.equal(grad, want)
    true = logits.double().requires_grad_()
    picked = torch.log_softmax(true, -1).gather(1, labels.clamp(min=0)) * (labels != -100)
    truth = gradient(picked, true, g.double())
    assert_close(want, truth, truth.to(dtype))
