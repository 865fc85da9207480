"""Checks of the fused head: inputs, the plans that a budget leads to, fp64 truth."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.rows import walk
from fastalign.testing import assert_close

ROWS, WIDTH, REF_WIDTH, VOCAB = 23, 8, 5, 201
# With the fixture `small_tiles`: room for all logits; for the whole vocabulary of some rows; for a part of
# it.
BUDGETS = {"all": None, "some rows": 9 * VOCAB * 4, "parts": ROWS * 64 * 4}


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor

    @property
    def ref(self) -> dict[str, Tensor]:
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Of a masked row's garbage, 0."""
        hidden = torch.where((self.labels != -100).unsqueeze(-1), self.hidden, 0.0)
        return hidden.to(dtype) @ self.weight.to(dtype).t() + self.bias.to(dtype)

    def ref_logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.ref_hidden.to(dtype) @ self.ref_weight.to(dtype).t()


def make_case(
    dtype: torch.dtype = torch.float32, device: str = "cpu", garbage: float = float("nan"), seed: int = 0
) -> Case:
    """Every fifth row is ignored and holds `garbage`."""
    g = torch.Generator().manual_seed(seed)
    draw = [
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,), (ROWS, REF_WIDTH), (VOCAB, REF_WIDTH))
    ]
    labels = torch.randint(VOCAB, (ROWS,), generator=g)
    labels[::5] = -100
    draw[0][::5] = garbage
    return Case(*(x.to(device, dtype) for x in draw), labels.to(device))


def leaves(
    case: Case, hidden: bool = True, weight: bool = True, bias: bool = True
) -> tuple[Case, list[Tensor]]:
    """The same case whose tensors of these names take gradients, and those."""
    asked = {"hidden": hidden, "weight": weight, "bias": bias}
    new = {name: getattr(case, name).detach().clone().requires_grad_(on) for name, on in asked.items()}
    return case._replace(**new), [x for x in new.values() if x.requires_grad]


def composed(case: Case, outputs: tuple[str, ...], **options: object) -> fa.TokenStats:
    """`token_stats` of the logits in fp64 (on a backend that has it)."""
    ref = {"ref_logits": case.ref_logits()} if any("ref" in name for name in outputs) else {}
    with fa.use_backend("reference"):
        return fa.token_stats(case.logits(), case.labels, outputs=outputs, **ref, **options)


OUTPUTS = ("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "is_top1")
KLS = ("logprob", "ref_logprob", "kl_policy_ref", "kl_ref_policy")


def doubled(case: Case, needs: tuple[bool, ...]) -> tuple[Case, list[Tensor]]:
    """The case in fp64 with the same leaves."""
    return leaves(
        case._replace(**{name: getattr(case, name).double() for name in ("hidden", "weight", "bias")}), *needs
    )


def compare(
    case: Case,
    outputs: tuple[str, ...],
    names: tuple[str, ...],
    got: Any,
    want: Any,
    asked: Any,
    wanted: Any,
    upstream: Any = None,
) -> None:
    """Values and gradients; terms are of the logits' magnitude, some units."""
    for name in outputs:
        assert_close(getattr(got, name), getattr(want, name), scale=8.0, what=name)
    upstream = (
        torch.linspace(-1, 1, ROWS, dtype=torch.float64, device=case.hidden.device)
        if upstream is None
        else upstream
    )
    total = sum((getattr(want, name) * upstream).sum() for name in names)
    found = sum((getattr(got, name) * upstream.to(getattr(got, name).dtype)).sum() for name in names)
    for a, b in zip(torch.autograd.grad(found, asked), torch.autograd.grad(total, wanted)):
        assert_close(a, b, scale=8.0 * ROWS**0.5, what="gradient")


def check_outputs(device: str, budget: str, needs: tuple[bool, ...] = (True, True, True)) -> None:
    """Every output of one model and the gradients of those that have one."""
    case = make_case(device=device)
    own, asked = leaves(case, *needs)
    truth, wanted = doubled(case, needs)
    got = fa.linear_token_stats(
        own.hidden, own.weight, own.labels, bias=own.bias, outputs=OUTPUTS, workspace_bytes=BUDGETS[budget]
    )
    compare(case, OUTPUTS, ("logprob", "entropy", "logsumexp"), got, composed(truth, OUTPUTS), asked, wanted)


def check_two_towers(device: str, budget: str, frozen: bool = False) -> None:
    """Policy and reference of other widths: both log-probs, both KLs, under every transform of the logits."""
    case = make_case(device=device)
    needs = (True, not frozen, not frozen)
    own, asked = leaves(case, *needs)
    truth, wanted = doubled(case, needs)
    options = {"softcap": 6.0, "logit_scale": 1.25, "temperature": 0.8, "workspace_bytes": BUDGETS[budget]}
    got = fa.linear_token_stats(
        own.hidden, own.weight, own.labels, bias=own.bias, **own.ref, outputs=KLS, **options
    )
    options.pop("workspace_bytes")
    compare(
        case,
        KLS,
        ("logprob", "kl_policy_ref", "kl_ref_policy"),
        got,
        composed(truth, KLS, **options),
        asked,
        wanted,
    )


def check_frozen(device: str, output: str, budget: str) -> None:
    """A frozen head and one differentiable output: the gradient of hidden is made in the forward pass."""
    case = make_case(device=device)
    own, asked = leaves(case, weight=False, bias=False)
    truth, wanted = doubled(case, (True, False, False))
    ref = own.ref if "kl" in output else {}
    room = None if BUDGETS[budget] is None else BUDGETS[budget] * (1 + len(ref) // 2)
    got = fa.linear_token_stats(
        own.hidden, own.weight, own.labels, bias=own.bias, outputs=(output,), workspace_bytes=room, **ref
    )
    upstream = torch.linspace(-1, 1, ROWS, dtype=torch.float64, device=device)
    upstream[7] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("logits_of", "bring_back"):
            patch.setattr(walk, name, lambda *a, **k: pytest.fail("backward multiplies"))
        compare(case, (output,), (output,), got, composed(truth, (output,)), asked, wanted, upstream)


def check_invariant(device: str) -> None:
    """Products of one shape, states of shards merged as a tree."""
    case = make_case(device=device)
    whole = fa.linear_token_stats(
        *case[:2], case.labels, bias=case.bias, **case.ref, outputs=KLS, batch_invariant=True
    )
    rows = torch.tensor([3, 8, 6, 2], device=device)
    part = fa.linear_token_stats(
        case.hidden[rows],
        case.weight,
        case.labels[rows],
        bias=case.bias,
        ref_hidden=case.ref_hidden[rows],
        ref_weight=case.ref_weight,
        outputs=KLS,
        batch_invariant=True,
    )
    want = composed(case, KLS)
    for name in KLS:
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
        assert_close(getattr(whole, name), getattr(want, name), scale=8.0, what=name)
