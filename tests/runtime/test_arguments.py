"""What an op's arguments declare: the schema, the layout, and the way from the object to single arguments and
back."""

from __future__ import annotations

import importlib
import inspect
from typing import NamedTuple

import pytest
import torch

from fastalign.ops.preference.op import PairTensors, PairTokens
from fastalign.runtime import ffi
from fastalign.runtime.arguments import Declaration, In, Maybe, SymInt, Unchecked
from fastalign.runtime.op import OPS


class Numbers(NamedTuple):
    """As a preset's: floats first."""

    beta: float
    tau: float
    kind: int
    flag: bool


class Part(NamedTuple):
    x: In("T")
    mask: Maybe("T", "bool") = None


class Whole(NamedTuple):
    part: Part
    cu_seqlens: In("S+1", "int32")
    given: Unchecked
    numbers: Numbers
    count: SymInt
    table: bool


SCHEMA = "Tensor x, Tensor? mask, Tensor cu_seqlens, Tensor? given, float[] scalars, int[] switches, SymInt count, bool table"


def test_the_schema_and_the_layout_follow():
    d = Declaration(Whole)
    assert d.schema == SCHEMA and d.layout == "x[T] mask[T]:bool cu_seqlens[S+1]:int32"
    assert Declaration(Whole, writes="x").schema == SCHEMA.replace("Tensor x", "Tensor(a!) x")


def test_there_and_back():
    x, cu = torch.ones(3), torch.tensor([0, 3], dtype=torch.int32)
    a = Whole(Part(x), cu, None, Numbers(0.1, 0.2, 3, 1), 4, True)
    flat = Declaration(Whole).flatten(a)
    assert flat == (x, None, cu, None, [0.1, 0.2], [3, 1], 4, True)
    again = Declaration(Whole).build(flat)
    assert again == a and type(again.part) is Part and type(again.numbers) is Numbers


@pytest.mark.parametrize("name", OPS)
def test_ops_are_registered_as_declared(name):
    op = OPS[name]
    registered = str(op.overload._schema).removeprefix(f"fastalign::{name}")
    assert registered == f"({op.declaration.schema}) -> {op.results}"
    assert op.writes in ("", *(leaf.name for leaf in op.declaration.leaves))
    assert [op.public] == [tuple(dict.fromkeys(op.public))] and set(op.kernels) == {"reference", "cpu", "triton", "cuda"}


def test_tensors_are_found_in_parts():
    x = torch.ones(3)
    assert ffi.first_tensor(Whole(Part(x), None, None, Numbers(0.0, 0.0, 0, 0), 0, False)) is x
    assert ffi.first_tensor((None, Part(None, x), 3)) is x and ffi.first_tensor((None, 1.0)) is None

    class Other(torch.Tensor):
        pass

    assert ffi.are_plain(Whole(Part(x), None, None, Numbers(0.0, 0.0, 0, 0), 0, False))
    assert not ffi.are_plain(Whole(Part(x.as_subclass(Other)), None, None, Numbers(0.0, 0.0, 0, 0), 0, False))


# Triton kernels that are given the fields of such parts one by one (what lies in a tuple, Triton specialises on).
BY_PARTS = {
    ("preference", "preference_fwd_kernel"): (PairTokens, PairTensors),
    ("preference", "preference_bwd_kernel"): (PairTokens,),
}


@pytest.mark.parametrize("op, name", BY_PARTS)
def test_kernels_name_the_fields_as_the_parts_do(op, name):
    kernel = getattr(importlib.import_module(f"fastalign.ops.{op}.triton"), name)
    fields = [field for part in BY_PARTS[op, name] for field in part._fields]
    assert [*inspect.signature(kernel.fn).parameters][: len(fields)] == fields
