"""`selective_log_softmax` and `entropy_from_logits` in place of TRL's helpers of these names: the same calls,
the same results."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from trl.trainer import utils

import fastalign as fa

SHAPES = [((3, 5), ()), ((7,), ()), ((3, 5), (4,))]


def data(rows, extra, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = (3.0 * torch.randn(*rows, 40, generator=draw)).to(dtype)
    index = torch.randint(40, (*rows, *extra), generator=draw)
    return logits, index, torch.rand(index.shape, generator=draw) > 0.3


@pytest.mark.parametrize("masked", [None, torch.bool, torch.int64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows,extra", SHAPES)
def test_selective_log_softmax(rows, extra, temperature, masked):
    logits, index, keep = data(rows, extra, torch.float32)
    mask = None if masked is None else keep.to(masked)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want, got = (
        utils.selective_log_softmax(x, index, temperature, mask),
        fa.selective_log_softmax(y, index, temperature, mask),
    )
    assert got.dtype == want.dtype and got.shape == want.shape and torch.allclose(got, want, atol=2e-6)
    if mask is not None:
        assert not bool(got[~keep].any())
    upstream = torch.linspace(-1.0, 2.0, got.numel()).view(got.shape)
    (a,), (b,) = torch.autograd.grad(want, x, upstream), torch.autograd.grad(got, y, upstream)
    assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_result_dtypes(dtype):
    """fp32 (fp64) as TRL's kernel gives; the logits' own, as its eager form gives, on request."""
    logits, index, keep = data((3, 5), (), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert fa.selective_log_softmax(logits, index).dtype == fa.entropy_from_logits(logits).dtype == wide
    pairs = (
        (
            utils.selective_log_softmax(logits, index, row_mask=keep),
            fa.selective_log_softmax(logits, index, row_mask=keep, dtype=dtype),
        ),
        (utils.entropy_from_logits(logits, 4), fa.entropy_from_logits(logits, 4, dtype=dtype)),
    )
    for want, got in pairs:
        # TRL's eager form rounds inside; ours once, at the end.
        assert got.dtype == want.dtype == dtype and torch.allclose(
            got, want, atol=16 * torch.finfo(dtype).eps * 8
        )


def test_entropy():
    logits, _, _ = data((3, 5), (), torch.float32)
    for chunk in (1, 128):
        assert torch.allclose(
            fa.entropy_from_logits(logits, chunk), utils.entropy_from_logits(logits, chunk), atol=2e-6
        )
        assert torch.allclose(
            fa.entropy_from_logits(logits, chunk_size=chunk, temperature=0.7),
            utils.entropy_from_logits(logits / 0.7),
            atol=4e-6,
        )


@pytest.mark.parametrize("extra", [(), (4,)])
def test_what_is_masked_may_hold_anything(extra):
    logits, index, keep = data((3, 5), extra, torch.float32)
    keep[0], keep[1] = True, False
    logits[1], index[~keep] = math.nan, -100
    x = logits.requires_grad_()
    got = fa.selective_log_softmax(x, index, row_mask=keep)
    assert torch.equal(got == 0, ~keep)
    (g,) = torch.autograd.grad(got.sum(), x)
    assert bool(torch.isfinite(g).all()) and not bool(g[1].any())


def test_every_parameter_of_theirs_is_ours():
    for name in ("selective_log_softmax", "entropy_from_logits"):
        theirs, ours = (list(inspect.signature(getattr(module, name)).parameters) for module in (utils, fa))
        assert ours[: len(theirs)] == theirs, name


def test_errors_name_themselves():
    logits, index, keep = data((3, 5), (), torch.float32)
    for error, words, call in (
        (ValueError, "temperature", lambda: fa.selective_log_softmax(logits, index, 0.0)),
        (
            ValueError,
            "row_mask has shape",
            lambda: fa.selective_log_softmax(logits, index, row_mask=keep[:1]),
        ),
        (ValueError, "chunk_size", lambda: fa.entropy_from_logits(logits, 0)),
        (IndexError, "index|label", lambda: fa.selective_log_softmax(logits, index + 40)),
    ):
        with pytest.raises(error, match=words):
            call()
