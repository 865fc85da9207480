"""What was checked in forward may have changed until backward (a buffer shared with NumPy, `.data`): backward
writes every entry of its gradient and nothing outside of it, on every backend. Numbers that a narrower type
cannot hold are refused, not cut off."""

from __future__ import annotations

import pytest
import torch
from cuda_emu.plugin import SENTINEL

import fastalign as fa
from fastalign.testing import make_batch

CU = {
    "a little beyond the end": [0, 2, 4, 6, 9, 11, 40], "far beyond the end": [0, 4_000_000, 8_000_000, 0, 0, 0, 12_000_000],
    "before the start": [-40, 2, 4, 6, 9, 11, 20], "backwards": [20, 16, 12, 8, 4, 2, 0], "not from 0": [7, 8, 9, 10, 11, 12, 13],
    "not to the end": [0, 1, 2, 3, 4, 5, 6], "up and down": [0, 15, 3, 18, 2, 16, 1], "int32's ends": [0, -(2**31), 2**31 - 1, 5, 5, 6, 7],
}  # fmt: skip
PAIRS = (
    [[0, 6], [1, 2], [3, 4]],
    [[-1, 0], [1, 2], [3, 4]],
    [[4_000_000, -4_000_000], [0, 0], [2**31 - 1, -(2**31)]],
)
OFFSETS = ([0, 7, 40], [-5, 2, 6], [5, 2, 0], [4_000_000, -1, 8_000_000], [3, 4, 5])


def given(device):
    batch = make_batch(3, min_len=1, max_len=4, device=device)
    cu = torch.tensor([0, 3, 6, 9, 12, 15, 18], dtype=torch.int32, device=device)
    lp, ref, kl = (
        torch.cat([x, x, x])[:18].clone() for x in (batch.logprobs, batch.ref_logprobs, batch.kl_ref_policy)
    )
    mask = torch.arange(18, device=device) % 5 != 0
    return lp.requires_grad_(), ref, kl, cu, mask


LOSSES = {
    "sequence_sum": lambda lp, ref, kl, cu, mask: fa.sequence_sum(lp, cu, mask=mask),
    "sequence_sum, weights": lambda lp, ref, kl, cu, mask: fa.sequence_sum(lp, cu, weights=ref, mean=True),
    "preference": lambda lp, ref, kl, cu, mask: fa.preference_loss(lp, ref, cu, mask=mask).loss,
    "preference, no mask": lambda lp, ref, kl, cu, mask: fa.preference_loss(lp, ref, cu).loss,
    "preference, token by token": lambda lp, ref, kl, cu, mask: fa.preference_loss(
        lp, ref, cu, mask=mask, weights=ref, ld_alpha=0.5, token_clamp=(-2.0, 2.0), sft_weight=0.1, sft_include_prompt=True, reduction="none"
    ).loss,
    "preference, KL": lambda lp, ref, kl, cu, mask: fa.preference_loss(lp, ref, cu, loss="tdpo1", kl_ref_policy=kl).loss,
    "sorted": lambda lp, ref, kl, cu, mask: fa.preference_loss(lp, ref, cu, loss="aot").loss,
    "listwise": lambda lp, ref, kl, cu, mask: fa.listwise_loss(
        lp, ref, cu, cu.new_tensor([0, 2, 6]), torch.arange(6.0, device=lp.device), mask=mask, reduction="none"
    ).loss,
    "unpaired": lambda lp, ref, kl, cu, mask: fa.unpaired_loss(
        lp, ref, cu, torch.arange(6, device=lp.device) % 2 == 0, mask=mask, baseline=0.1
    ).loss,
}  # fmt: skip


def backward(loss, lp, memory):
    (grad,) = torch.autograd.grad(loss.sum(), lp)
    memory.check("backward")
    assert not bool((grad == SENTINEL).any()), "entries of the gradient were not written"
    assert bool((grad.isfinite() | grad.isnan()).all())
    return grad


@pytest.mark.parametrize("name", LOSSES)
def test_boundaries_that_change_before_backward(backend, device, memory, name):
    for how, values in CU.items():
        lp, ref, kl, cu, mask = given(device)
        loss = LOSSES[name](lp, ref, kl, cu, mask)
        cu.data.copy_(torch.tensor(values, dtype=torch.int32))
        grad = backward(loss, lp, memory)
        if how in ("not to the end", "not from 0") and name.startswith(
            ("preference", "sequence_sum", "listwise")
        ):
            held = torch.zeros(18, dtype=torch.bool, device=device)
            held[values[0] : values[-1]] = True
            assert torch.equal(grad.isfinite(), held), (
                "a token that is in no sequence has no gradient, and every other has"
            )


@pytest.mark.parametrize("name", ["preference", "preference, token by token"])
def test_pairs_that_change_before_backward(backend, device, memory, name):
    for values in PAIRS:
        lp, ref, kl, cu, mask = given(device)
        pairs = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32, device=device)
        options = {} if name == "preference" else {"weights": ref, "ld_alpha": 0.5}
        loss = fa.preference_loss(lp, ref, cu, pairs=pairs, mask=mask, **options).loss
        pairs.data.copy_(torch.tensor(values, dtype=torch.int32))
        backward(loss, lp, memory)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_list_offsets_that_change_before_backward(backend, device, memory, reduction):
    for values in OFFSETS:
        lp, ref, _, cu, mask = given(device)
        offsets, scores = (
            torch.tensor([0, 2, 6], dtype=torch.int32, device=device),
            torch.arange(6.0, device=device),
        )
        loss = fa.listwise_loss(lp, ref, cu, offsets, scores, mask=mask, reduction=reduction).loss
        offsets.data.copy_(torch.tensor(values, dtype=torch.int32))
        backward(loss, lp, memory)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("labels", [(1,), (3, 4)])
def test_labels_that_change_before_backward(backend, device, memory, labels, inplace):
    for values in (11, 4_000_000, -1, -(2**62), 2**62, 2**32 + 3):
        x = torch.randn(4, 11, device=device).requires_grad_()
        y = torch.tensor([labels] * 4, device=device)
        loss = fa.token_stats(x * 1, y, inplace_backward=inplace).logprob.sum()
        y.data.fill_(values)
        (grad,) = torch.autograd.grad(loss, x)
        memory.check("backward")
        assert not bool((grad == SENTINEL).any())


WRAPPED = 2**32  # what int32 cuts off to 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32])
def test_numbers_are_compared_before_they_are_narrowed(backend, device, dtype):
    """As 2^32 + 18 would pass for 18."""
    lp, ref, _, cu, mask = given(device)
    if device != "cpu":
        pytest.skip("values on a device are not looked at; they give NaN, see below")
    wide = cu.to(torch.int64)
    wide[-1] += WRAPPED
    scores, wrapped = torch.arange(6.0), torch.tensor([0, 2, 6 + WRAPPED])
    pairs = torch.tensor([[0, 1 + WRAPPED], [2, 3], [4, 5]])
    calls = {
        "cu_seqlens": lambda: fa.sequence_sum(lp, wide),
        "cu_seqlens ": lambda: fa.preference_loss(lp, ref, wide),
        "cu_seqlens  ": lambda: fa.gae(lp, ref, wide),
        "cu_seqlens   ": lambda: fa.policy_loss(lp, ref, scores, loss="gspo", cu_seqlens=wide, mask=mask),
        "cu_seqlens    ": lambda: fa.shift_labels(torch.arange(18), wide),
        "list_offsets": lambda: fa.listwise_loss(lp, ref, cu, wrapped, scores),
        "list_offsets ": lambda: fa.kwise_reward_loss(scores, wrapped, scores),
        "pairs": lambda: fa.preference_loss(lp, ref, cu, pairs=pairs),
        "pairs ": lambda: fa.wpo_weights(lp, ref, cu, mask=mask, pairs=pairs),
    }
    if dtype != torch.int64:  # of 32 bits without a sign: 2^32 - 1 is not -1
        calls = {
            "pairs": lambda: fa.preference_loss(lp, ref, cu, pairs=torch.tensor([[0, 2**32 - 1]]).to(dtype))
        }
    for name, call in calls.items():
        with pytest.raises((ValueError, IndexError), match=name.strip()):
            call()


def test_wide_numbers_reach_the_kernels_as_themselves(backend, device):
    """Legal int64 boundaries, pairs and offsets give the bits of int32."""
    lp, ref, _, cu, mask = given(device)
    pairs, offsets, scores = (
        torch.tensor([[0, 1], [5, 2]], device=device),
        torch.tensor([0, 2, 6], device=device),
        torch.arange(6.0, device=device),
    )
    for a, b in (
        (
            fa.preference_loss(lp, ref, cu, pairs=pairs).loss,
            fa.preference_loss(lp, ref, cu.long(), pairs=pairs.int()).loss,
        ),
        (
            fa.listwise_loss(lp, ref, cu, offsets, scores).loss,
            fa.listwise_loss(lp, ref, cu.long(), offsets.int(), scores).loss,
        ),
    ):
        assert torch.equal(a, b)
