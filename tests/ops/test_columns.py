"""Columns and codes have one name in C++, Python and Triton, and one number; no line of Python or Triton
writes such a number itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fastalign
from fastalign.ops import columns
from fastalign.ops.kl_estimate.op import KINDS as KL_ESTIMATES
from fastalign.ops.token_stats.contract import OUTPUT_BITS
from fastalign.runtime import ffi
from fastalign.train.data import formats

PACKAGE = Path(fastalign.__file__).parent
CSRC = PACKAGE.parent / "csrc"
OURS = {name: value for name, value in vars(columns).items() if name.isupper() and isinstance(value, int)}
# Python's own: C++ has no words for them.
PYTHON_ONLY = {
    "CHOSEN",
    "REJECTED",
    "MOMENT_COUNT",
    "MOMENT_MEAN",
    "MOMENT_M2",
    "MOMENT_WIDTH",
    "PART_MEAN",
    "PART_M2",
    "PART_WIDTH",
}


def python_name(name):
    """TAB_KL_CHOSEN of kTabKlChosen, POLICY_RATIO_M2 of kPolicy_ratio_m2."""
    widths = {"kPolicyStats": "POLICY_WIDTH", "kValueStats": "VALUE_WIDTH"}
    return widths.get(name) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removeprefix("k")).upper()


def test_every_number_is_that_of_the_extension():
    theirs = {python_name(name): value for name, value in ffi._extension.numbers.items()}
    assert theirs == {name: value for name, value in OURS.items() if name not in PYTHON_ONLY}


def test_the_extension_exports_every_enumerator():
    for header in sorted((CSRC / "math").glob("*.h")):
        for body in re.findall(
            r"enum \w+ : int \{(.*?)\}", re.sub(r"//.*", "", header.read_text()), re.DOTALL
        ):
            assert set(re.findall(r"\bk[A-Z]\w*", body)) <= set(ffi._extension.numbers), header.name


@pytest.mark.parametrize(
    "names, prefix",
    [
        (columns.TRANSFORMS, ""), (columns.LINKS, ""), (columns.LABELS, ""), (columns.SFT_NORMS, ""), (columns.REDUCTIONS, ""),
        (columns.PAIR_GAINS, "GAIN_"), (columns.SURROGATES, ""), (columns.RATIOS, "RATIO_"), (columns.AGGREGATIONS, ""),
        (columns.IS_MODES[1:], "IS_"), (columns.KL_KINDS, ""), (columns.KINDS, ""), (columns.STATS, "POLICY_"), (columns.VALUE_STATS, "VALUE_"),
    ],
)  # fmt: skip
def test_a_code_is_the_position_of_its_name(names, prefix):
    other = {"k3+": "K3_PLUS"} | ({"exo": "EXO_LIST"} if names is columns.KINDS else {})
    first = 1 if names == columns.IS_MODES[1:] else 0  # None, as given, comes first
    assert [OURS[prefix + other.get(name, name.upper())] for name in names] == list(
        range(first, first + len(names))
    )


def test_lists_that_share_codes_or_places():
    assert columns.KL_KINDS[: len(KL_ESTIMATES)] == KL_ESTIMATES
    assert (columns.POLICY_ITEMS, columns.POLICY_LOSS) == (columns.VALUE_ITEMS, columns.VALUE_LOSS)
    assert list(OUTPUT_BITS.values()) == [1 << i for i in range(len(OUTPUT_BITS))]
    assert formats.MAX_LIST == columns.MAX_LIST


def test_triton_reads_the_same_numbers():
    import triton

    from fastalign.ops.math import columns as of_kernels

    assert {
        n: v.value for n, v in vars(of_kernels).items() if isinstance(v, triton.language.constexpr)
    } == OURS


# --- no bare numbers ----------------------------------------------------------------------------------------

FILES = [
    p for folder in ("ops", "preference", "policy", "train") for p in sorted((PACKAGE / folder).rglob("*.py"))
]
FILES.remove(PACKAGE / "ops" / "columns.py")
TABLES = {"table", "sums", "state", "stats", "slopes"}
CODES = {"kind", "kl_kind", "link", "point_link", "labels", "transform", "surrogate", "surrogate_kind", "ratio", "aggregation", "is_mode",
         "reduction", "sft_norm", "pair_gain", "gain"}  # fmt: skip
# Neither columns nor codes: the end of a sequence or list, which is where the next one begins; a pair's
# second sequence; the pair after a sequence's own; the token after this one; a last dim of 1 to broadcast.
ALLOWED = {
    "cu_seqlens + i + 1", "list_offsets + n + 1", "pairs + 2 * i + 1", "s // 2 + 1", "t + 1", "ratio[:, :1]", "positions[..., :1]",
    "shares[:, -1:]", "output.logits[:, -1]",  # of the last token
}  # fmt: skip


def is_number(node):
    return isinstance(node, ast.Constant) and type(node.value) is int


def is_column(node):
    """An int other than 0 (the first dim's only entry, or the first of a list), or a slice bounded by one."""
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    if isinstance(node, ast.Slice):
        return any(is_column(bound) for bound in (node.lower, node.upper) if bound is not None)
    return is_number(node) and node.value != 0


def name_of(node):
    return getattr(node, "id", getattr(node, "attr", "")).lower()


def is_kernel(node):
    return isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)


def bare_numbers(tree):
    """What addresses a column, or compares a code, by a number."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            base, index = node.value, node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            of_a_table = name_of(base) in TABLES
            whole = any(isinstance(i, ast.Slice) or ast.unparse(i) == "..." for i in index[:-1])
            unbound = isinstance(base, ast.Call) and name_of(base.func) == "unbind"
            last_of_table = (
                of_a_table and is_number(index[-1]) and (len(index) > 1 or name_of(base) == "stats")
            )
            if last_of_table or ((of_a_table or whole or unbound) and any(is_column(i) for i in index)):
                yield node
        elif (
            isinstance(node, ast.Compare)
            and name_of(node.left) in CODES
            and isinstance(node.ops[0], (ast.Eq, ast.NotEq, ast.In, ast.NotIn))
        ):
            if any(is_number(n) for n in ast.walk(node.comparators[0])):
                yield node
        elif (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.BitAnd)
            and name_of(node.left) == "outputs"
            and is_number(node.right)
        ):
            yield node
        if is_kernel(node):
            for call in (c for c in ast.walk(node) if isinstance(c, ast.Call)):
                yield from (
                    a
                    for a in call.args
                    if isinstance(a, ast.BinOp) and isinstance(a.op, ast.Add) and is_number(a.right)
                )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_column_and_no_code_is_a_bare_number(path):
    found = [(node.lineno, ast.unparse(node)) for node in bare_numbers(ast.parse(path.read_text()))]
    assert [(line, text) for line, text in found if text not in ALLOWED] == []


@pytest.mark.parametrize(
    "line",
    [
        "table[:, 5]", "sums[:, :, 2]", "self.sums[:, 0, 3]", "table[:, 2:4]", "x[..., 1]", "sums[i, 1 - side, 2]", "stats[0]",
        "state.unbind(-1)[:7]", "p.surrogate == 5", "KIND == 9", "p.labels in (1, 3)", "OUTPUTS & 2",
        "@triton.jit\ndef f(p):\n    tl.load(p + 8)", "@triton.jit\ndef f(row):\n    tl.store(row + 3 * s + 1, x)",
    ],
)  # fmt: skip
def test_the_search_finds(line):
    assert list(bare_numbers(ast.parse(line)))
