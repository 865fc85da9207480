"""What a new loss costs. Of existing parts: one row in fastalign/losses/tables.py and its test
(test_contract_packed.py adds a row while it runs). A new link or transform: one formula each in
csrc/math/pair.h, fastalign/ops/math/pair.py and ops/preference/reference.py, and a name in ops/columns.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign import losses
from fastalign.losses import pair
from fastalign.losses.pair import Preset
from fastalign.ops.columns import LINKS, TRANSFORMS
from fastalign.ops.preference import reference
from fastalign.testing import gradient, make_batch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "fastalign").rglob("*.py"))
FORMULAS = {"csrc/math/pair.h", "fastalign/ops/math/pair.py", "fastalign/ops/preference/reference.py"}


def where(pattern):
    """Files of the package and of csrc with a line that matches."""
    sources = [
        *PACKAGE,
        *(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")),
    ]
    return {str(p.relative_to(ROOT)) for p in sources if re.search(pattern, p.read_text(), re.MULTILINE)}


def strings(path):
    """String constants of a Python file that are not docstrings."""
    return {
        n.value
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


def test_a_link_is_a_name_and_its_formulas(monkeypatch):
    """The name at the end of LINKS and the definition's formula are all that the Python side needs; the
    kernels take the code likewise."""
    plain = reference.link

    def link(kind, h, *rest):
        if kind == len(LINKS):
            return torch.log1p((h - 1) ** 2), 2 * (h - 1) / (1 + (h - 1) ** 2)
        return plain(kind, h, *rest)

    monkeypatch.setattr(pair, "LINKS", (*LINKS, "cauchy"))
    monkeypatch.setattr(reference, "link", link)
    batch = make_batch(4, dtype=torch.float64)
    lp, leaf = (batch.logprobs.clone().requires_grad_() for _ in range(2))
    with fa.use_backend("reference"):
        loss = fa.preference_loss(
            lp,
            batch.ref_logprobs,
            batch.packed.cu_seqlens,
            mask=batch.packed.mask,
            loss=Preset(link="cauchy", beta=0.5),
        ).loss
        g = gradient(loss, lp)
    d = 0.5 * fa.sequence_sum(leaf - batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask)
    want = torch.log1p((d[::2] - d[1::2] - 1) ** 2).mean()
    assert (
        abs(float((loss - want).detach())) < 1e-12 and float((g - gradient(want, leaf)).abs().max()) < 1e-12
    )


@pytest.mark.parametrize("function", ["link", "transform"])
def test_every_formula_stands_in_three_files(function):
    assert where(rf"^(def|template <class T> FA_HD ValueSlope<T>) {function}\(") == FORMULAS


# Words that other vocabularies have too.
COMMON = {"alpha", "linear", "squared", "sigmoid", "exp", "logistic", "sft", "dpo"}
# file: name. Rules are classes of their own (rules.py), lists have an exo of their own, reward models have
# one preset; presets say what combines.
SPECIAL = {
    "losses/pair.py: beta_dpo", "losses/pair.py: alpha_dpo", "losses/pair.py: bco", "preference/rules.py: beta_dpo",
    "preference/rules.py: alpha_dpo", "preference/rules.py: bco", "preference/unpaired.py: bco",
    "preference/reward_model.py: bt_rm",
}  # fmt: skip
MAY_NAME_PARTS = ("losses/pair.py", "losses/list.py")


def test_names_are_data():
    """Losses are named in losses/tables.py, links and transforms in ops/columns.py; no other code
    asks for one by its name."""
    parts = {*LINKS, *TRANSFORMS} - COMMON
    names = ({*losses.PRESETS} - COMMON) | parts
    users = {"train", "adapters", "bench", "arena"}
    files = [p for p in PACKAGE if not users & {*p.relative_to(ROOT).parts} and p.name != "tables.py"]
    found = {f"{p.relative_to(ROOT / 'fastalign')}: {s}" for p in files for s in strings(p) & names}
    found -= {f"{file}: {name}" for file in MAY_NAME_PARTS for name in parts}
    assert found - SPECIAL == {f"ops/columns.py: {name}" for name in parts}


def test_kernels_know_no_loss():
    """They get numbers: no name of a loss stands in their code."""
    for path in [
        *(p for p in (ROOT / "csrc").rglob("*") if p.is_file()),
        *(ROOT / "fastalign").rglob("triton*.py"),
    ]:
        code = re.sub(r'//.*|#.*|"""(?s:.*?)"""', "", path.read_text())
        assert not re.findall(rf"\b({'|'.join({*losses.PRESETS, *losses.LISTWISE} - {'sft'})})\b", code), path
