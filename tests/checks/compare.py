"""Results by name, compared; and a call done twice: on the backend in force, and in fp64 on the reference."""

from __future__ import annotations

import contextlib

import torch

import fastalign as fa
from fastalign.testing import assert_close


def on_reference(truth):
    """A context: the reference for the truth, and the backend in force for what is tested."""
    return fa.use_backend("reference") if truth else contextlib.nullcontext()


def in_fp64(value):
    """Floating-point tensors as fp64, in dicts too; everything else as it is."""
    if isinstance(value, dict):
        return {k: in_fp64(v) for k, v in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def same(got, want):
    """Whether the tensors of two results are equal bit for bit: mappings by name, sequences in order."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        got, want = got.values(), want.values()
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def assert_results_close(got, want, *, what, scales=None):
    """Every result is as exact as 40 ulp of its own largest finite entry, and at least of 1: sums of a dozen
    tokens, one exponential, a division. `scales`: another size for the results that it names."""
    assert got.keys() == want.keys()
    for name, truth in want.items():
        size = max(float(truth.abs().nan_to_num(posinf=0.0).max()), 1.0) if truth.numel() else 1.0
        assert_close(got[name], truth, what=f"{name} of {what}", scale=(scales or {}).get(name, 10.0 * size))
