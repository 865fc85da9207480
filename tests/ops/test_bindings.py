"""An op's arguments are a tuple in Python and a struct in C++, and nothing but their order says which is
which. Here the three places that hold the order are compared: the structs of csrc/ops.h, their lists of
members in bindings.cpp, and the tuples that ops/*/native.py pass."""

from __future__ import annotations

import itertools
import re
import sys
import typing
from pathlib import Path

import pytest
import torch

from fastalign import _C
from fastalign.ops.token_stats.contract import OUTPUT_BITS
from fastalign.runtime import ffi
from fastalign.runtime.op import OPS

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ROW_RESULTS = re.search(
    r"#define FA_ROW_RESULTS\(X\)((?:.*\\\n)*.*)", (CSRC / "math" / "row_state.h").read_text()
).group(1)
FIELDS = "\n".join(f"void* {name};" for name in re.findall(r"X\(\w+, (\w+)\)", ROW_RESULTS))
LIST = "#define FA_FIELD(bit, name) void* name;\n  FA_ROW_RESULTS(FA_FIELD)\n#undef FA_FIELD"
HEADER = (CSRC / "ops.h").read_text().replace(LIST, FIELDS)
CPP_OPS = dict(re.findall(r"^ +X\((\w+), (\w+)\)", HEADER, re.MULTILINE))

# Sizes of the tensors by the letters of `In("T")`, all different ("tokens" is a dim too).
SIZES = {
    "T": 17,
    "tokens": 17,
    "S": 5,
    "L": 6,
    "count": 7,
    "rows": 9,
    "V": 23,
    "K": 4,
    "N": 11,
    "A": 12,
    "I": 13,
    "E": 14,
    "R": 15,
}
# What Python calls otherwise, C++ -> Python; sizes by their letters.
OTHER_NAMES = {
    "ref": "ref_logits", "temperature_ptr": "temperature_tensor", "gamma_ptr": "gamma_tensor", "lam_ptr": "lam_tensor",
    "pair_index": "pairs", "soft_label": "soft_labels", "log_sum_sq": "log_sum_sq_probs", "grad_logprobs": "d_logprobs",
    "grad_kl": "d_kl", "part_targets": "targets", "grad_entropy": "d_entropy",
    "sequences": "S", "lists": "L", "pairs": "count", "n": "N", "targets": "K",
}  # fmt: skip
DTYPES = {
    "": torch.float32,
    "acc": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


def members_in_header(struct):
    """Names in the order in which the header declares them, those of its bases first."""
    bases, body = re.search(rf"struct {struct}(?: : ([\w, ]+))? {{\n(.*?)\n}};", HEADER, re.DOTALL).groups()
    body = re.sub(r"//.*|/\*.*?\*/", "", body)
    names = [
        re.search(r"(\w+)$", part.strip()).group(1)
        for line in body.split(";")[:-1]
        for part in line.split(",")
    ]
    return [*(name for base in (bases or "").split(", ") if base for name in members_in_header(base)), *names]


@pytest.mark.parametrize("name", _C.argument_names)
def test_lists_of_members_are_the_structs(name):
    assert _C.argument_names[name] == members_in_header(CPP_OPS.get(name, name))


def test_every_op_is_bound():
    assert set(_C.argument_names) == {*CPP_OPS, "RowsView", "PairTensor"} and all(
        hasattr(_C, op) for op in CPP_OPS
    )


def tensor_of(place):
    sizes = [part.strip("?*") for part in place.dims.split(",") if part]
    shape = [int(s) if s.isdigit() else SIZES[s.removesuffix("+1")] + s.endswith("+1") for s in sizes]
    return torch.zeros(shape, dtype=DTYPES[place.kind])


def arguments_of(op):
    """{name: value} of all an op's arguments: tensors of their own memory, numbers that are not twice the
    same."""
    integers, floats = itertools.count(100), itertools.count(0.5)
    params = typing.get_type_hints(op.arguments).get("params")
    kinds = [*typing.get_type_hints(params).values()] if params else []
    made = {
        "int": lambda: next(integers),
        "float": lambda: next(floats),
        "bool": lambda: True,
        "float[]": lambda: [next(floats) for kind in kinds if kind is float],
        "int[]": lambda: [next(integers) for kind in kinds if kind is not float],
        "Tensor?": lambda: torch.zeros(2, SIZES["rows"], SIZES["K"]),  # target_in
    }
    values = {}
    for leaf in op.declaration.leaves:
        if leaf.name == "outputs":
            values[leaf.name] = sum(OUTPUT_BITS.values())
        elif leaf.type == "SymInt":
            values[leaf.name] = SIZES[OTHER_NAMES.get(leaf.name, leaf.name)]
        else:
            values[leaf.name] = made[leaf.type]() if leaf.place is None else tensor_of(leaf.place)
    if op.name == "preference_fwd":
        values["sums"] = None  # either tokens or sums are given; the kernel makes the sums here
    if op.name.startswith("token_stats_fused"):
        values |= {"state_in": None, "target_in": None}  # in C++ only: one op takes all the vocabulary
    return values


def launch_of(op, monkeypatch):
    """(the C++ op, its tuple, {name: value} of everything that Python has a name for) of a call of the native
    kernel, which then does nothing."""
    seen = []

    def launch(backend, function, tensor, arguments):
        seen.append((function, arguments, dict(sys._getframe(1).f_locals)))

    monkeypatch.setattr(ffi, "launch", launch)
    values = arguments_of(op)
    a = op.declaration.build([values[leaf.name] for leaf in op.declaration.leaves])
    op._kernel("cuda")(a)
    ((function, arguments, names),) = seen
    known = {**SIZES, **values, **names, "dtype": ffi.DTYPE_CODES[torch.float32], "grad_stride": 1}
    if function != "row_states_merge" and "results" in names:  # of token_stats, in the order of their bits
        known |= dict(zip((*OUTPUT_BITS, "state", "target"), names["results"]))
    return function, arguments, known


def as_passed(value, like):
    """What stands for a tensor in a tuple: an address, or a RowsView or a PairTensor where `like` is one."""
    if isinstance(value, torch.Tensor) or value is None:
        pass_on = {6: ffi.rows_view, 2: ffi.pair_ptr}[len(like)] if isinstance(like, tuple) else ffi.ptr
        return pass_on(value)
    return value


def check(function, arguments, known, in_place):
    names = _C.argument_names[function]
    assert len(names) == len(arguments), function
    for name, passed in zip(names, arguments):
        other = OTHER_NAMES.get(name, name)
        value = known[other if other in known else name]
        assert passed == as_passed(value, passed), (function, name)
    told = [repr(x) for x in arguments]
    assert in_place or len(set(told)) == len(told), (
        f"{function}: two arguments have the same value, so that this test could not tell them apart"
    )


@pytest.mark.parametrize("name", OPS)
def test_tuples_hold_the_members_in_order(name, monkeypatch):
    op = OPS[name]
    function, arguments, known = launch_of(op, monkeypatch)
    if function == "token_stats_fused":
        assert _C.argument_names[function] == ["forward", "backward"]
        check("token_stats_fwd", arguments[0], known, True)
        check("token_stats_bwd", arguments[1], known, True)
    else:
        check(function, arguments, known, name.endswith("_"))


def test_every_bound_op_is_called(monkeypatch):
    assert {launch_of(op, monkeypatch)[0] for op in OPS.values()} == set(CPP_OPS)


def test_parts_of_a_tuple():
    rows = torch.zeros(3, 5, 14).transpose(0, 1)[1:, :, :7]
    view = dict(zip(_C.argument_names["RowsView"], ffi.rows_view(rows), strict=True))
    assert view == {
        "data": rows.data_ptr(),
        "rows": 12,
        "inner": 3,
        "stride_outer": 14,
        "stride_inner": 70,
        "vocab": 7,
    }
    values = torch.zeros(6)[::2]
    pair = dict(zip(_C.argument_names["PairTensor"], ffi.pair_ptr(values), strict=True))
    assert pair == {"data": values.data_ptr(), "stride": 2}


@pytest.fixture
def preference(monkeypatch):
    """The arguments of a small call, which can be spoilt."""
    function, arguments, _ = launch_of(OPS["preference_fwd"], monkeypatch)

    def call(**changed):
        names = _C.argument_names[function]
        return getattr(_C, function)(
            -1, 0, tuple(changed.get(name, value) for name, value in zip(names, arguments))
        )

    return call


def test_a_wrong_count_is_refused(preference):
    with pytest.raises(ValueError, match=r"gae_fwd takes a tuple of 17 and got 2; .*rebuild the extension"):
        _C.gae_fwd(-1, 0, (0, 0))
    with pytest.raises(ValueError, match=r"preference_fwd\.beta takes a tuple of 2 and got 3"):
        preference(beta=(0, 0, 0))
    with pytest.raises(ValueError, match=r"preference_fwd\.beta takes a tuple of 2 and got none"):
        preference(beta=0)
    with pytest.raises(ValueError, match="parameters of a loss in Python and those in csrc/math differ"):
        preference(scalars=[0.0])
    with pytest.raises(ValueError, match="parameters of a loss in Python and those in csrc/math differ"):
        preference(switches=(0,))


@pytest.mark.parametrize(
    "changed, error",
    [
        ({"logprobs": "address"}, TypeError),
        ({"tokens": 1.5}, TypeError),
        ({"tokens": 1 << 63}, OverflowError),
        ({"stages": 1 << 31}, OverflowError),
        ({"beta": (0, None)}, TypeError),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(preference, changed, error):
    with pytest.raises(error):
        preference(**changed)
