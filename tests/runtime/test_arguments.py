"""What an op's arguments declare: the schema, the layout, and the way from the object to single arguments and
back."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastalign
from fastalign.ops.listwise.op import ListTensors
from fastalign.ops.policy.op import PolicyFwd
from fastalign.ops.preference.op import PairTensors, PairTokens
from fastalign.ops.token_stats.contract import OUTPUT_BITS, RowGradients
from fastalign.ops.token_stats.triton_rows import Outputs
from fastalign.runtime import ffi
from fastalign.runtime.arguments import Declaration, In, Maybe, SymInt, Unchecked
from fastalign.runtime.op import OPS

FOLDER = Path(fastalign.__file__).parent / "ops"


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
    assert [op.public] == [tuple(dict.fromkeys(op.public))] and set(op.kernels) == {
        "reference",
        "cpu",
        "triton",
        "cuda",
    }


def test_tensors_are_found_in_parts():
    x = torch.ones(3)
    assert ffi.first_tensor(Whole(Part(x), None, None, Numbers(0.0, 0.0, 0, 0), 0, False)) is x
    assert ffi.first_tensor((None, Part(None, x), 3)) is x and ffi.first_tensor((None, 1.0)) is None

    class Other(torch.Tensor):
        pass

    assert ffi.are_plain(Whole(Part(x), None, None, Numbers(0.0, 0.0, 0, 0), 0, False))
    assert not ffi.are_plain(Whole(Part(x.as_subclass(Other)), None, None, Numbers(0.0, 0.0, 0, 0), 0, False))


# Triton kernels that are given the fields of parts one by one, since Triton specialises on what lies in a
# tuple: (op, kernel) -> the names from some argument on.
BY_PARTS = {
    ("preference", "preference_fwd_kernel"): ("logprobs", (*PairTokens._fields, *PairTensors._fields)),
    ("preference", "preference_bwd_kernel"): ("logprobs", PairTokens._fields),
    ("listwise", "listwise_fwd_kernel"): ("beta", ListTensors._fields),
    ("policy", "policy_fwd_kernel"): ("logprobs", PolicyFwd._fields[: PolicyFwd._fields.index("params")]),
    ("token_stats", "token_stats_pair_bwd_kernel"): ("g_logprob", RowGradients._fields),
}


@pytest.mark.parametrize("op, name", BY_PARTS)
def test_kernels_name_the_fields_as_the_parts_do(op, name):
    modules = [
        importlib.import_module(f"fastalign.ops.{op}.{p.stem}") for p in FOLDER.glob(f"{op}/triton*.py")
    ]
    (kernel,) = {vars(module)[name] for module in modules if name in vars(module)}
    names, (start, fields) = [*inspect.signature(kernel.fn).parameters], BY_PARTS[op, name]
    at = names.index(start)
    assert names[at : at + len(fields)] == [*fields]


def test_outputs_stand_in_the_order_of_their_bits():
    whole = {"log_sum_sq": "log_sum_sq_probs"}
    assert [whole.get(name, name) for name in Outputs._fields] == [*OUTPUT_BITS]
