"""Second derivatives: every differentiable function raises where a graph of its gradient is asked for, and
none loses a term silently."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import fastalign as fa
from fastalign.runtime import distributed
from fastalign.runtime.function import Function
from fastalign.testing import make_batch, make_labels, make_logits

BATCH = make_batch(3, dtype=torch.float64)
REF, CU, MASK = BATCH.ref_logprobs, BATCH.packed.cu_seqlens, BATCH.packed.mask
LABELS, REF_LOGITS = make_labels(4, 7), make_logits(4, 7, seed=1).double()
LISTS, SCORES = torch.tensor([0, 2, 6]), torch.arange(6.0)
DESIRABLE = torch.tensor([True, False] * 3)


def _sides(x):
    sums = fa.sequence_sum(x, CU).view(-1, 2)
    return sums[:, 0], sums[:, 1]


ON_LOGITS = {
    "token_stats": lambda x: fa.token_stats(x, LABELS, outputs=("logprob", "entropy")).entropy.sum(),
    "token_logprobs": lambda x: fa.token_logprobs(x, LABELS).sum(),
    "in place": lambda x: fa.token_logprobs(x * 1, LABELS, inplace_backward=True).sum(),
    "token_kl": lambda x: fa.token_kl(x, REF_LOGITS).sum(),
    "token_kl_loss": lambda x: fa.token_kl_loss(x, REF_LOGITS, torch.ones(())).loss,
    "entropy_from_logits": lambda x: fa.entropy_from_logits(x).sum(),
    "selective_log_softmax": lambda x: fa.selective_log_softmax(x, LABELS).sum(),
}
ON_TOKENS = {
    "kl_estimate": lambda x: fa.kl_estimate(x, REF).sum(),
    "sequence_sum": lambda x: fa.sequence_sum(x, CU).sum(),
    "preference_loss": lambda x: fa.preference_loss(x, REF, CU, mask=MASK).loss,
    "a mixture": lambda x: fa.preference_loss(x, REF, CU, mask=MASK, loss=[("dpo", 1.0), ("ipo", 0.5)]).loss,
    "a sorted loss": lambda x: fa.preference_loss(x, REF, CU, mask=MASK, loss="aot").loss,
    "a rule": lambda x: fa.preference_loss(x, REF, CU, mask=MASK, loss="alpha_dpo", state=fa.AlphaDPO()).loss,
    "preference_loss_from_sums": lambda x: (
        fa.preference_loss_from_sums(_sides(x)[0], _sides(x)[1].detach(), *_sides(REF)).loss
    ),
    "unpaired_loss": lambda x: fa.unpaired_loss(x, REF, CU, DESIRABLE, mask=MASK, baseline=0.0).loss,
    "bco": lambda x: fa.unpaired_loss(x, REF, CU, DESIRABLE, loss="bco", mask=MASK, state=fa.BCODelta()).loss,
    "dro": lambda x: (
        fa.unpaired_loss(x, REF, CU, DESIRABLE, loss="dro", mask=MASK, rewards=SCORES, values=SCORES).loss
    ),
    "listwise_loss": lambda x: fa.listwise_loss(x, REF, CU, LISTS, SCORES, mask=MASK).loss,
    "listwise_loss_from_sums": lambda x: fa.listwise_loss_from_sums(x[:6], REF[:6], LISTS, SCORES).loss,
    "policy_loss": lambda x: fa.policy_loss(x, REF, REF, mask=MASK).loss,
    "gspo": lambda x: fa.policy_loss(x, REF, SCORES, loss="gspo", cu_seqlens=CU, mask=MASK).loss,
    "value_loss": lambda x: fa.value_loss(x, REF, REF, mask=MASK).loss,
}
ALL = {**ON_LOGITS, **ON_TOKENS}


def leaf(name):
    return (REF_LOGITS * 0.5 if name in ON_LOGITS else BATCH.logprobs.clone()).requires_grad_()


@pytest.mark.parametrize("name", ALL)
def test_a_graph_of_the_gradient_is_refused(name):
    loss, x = ALL[name], leaf(name)
    want = torch.autograd.grad(loss(x), x)[0]
    assert bool((want != 0).any())
    for second in (
        lambda: torch.autograd.grad(loss(x), x, create_graph=True),
        lambda: loss(x).backward(create_graph=True),
        lambda: torch.autograd.functional.hessian(loss, x),
        lambda: torch.autograd.functional.hvp(loss, x, torch.ones_like(x)),
        lambda: torch.autograd.gradgradcheck(loss, x),
    ):
        with pytest.raises(RuntimeError, match="can be differentiated once: create_graph=True"):
            second()
    assert torch.equal(torch.autograd.functional.jacobian(loss, x), want)  # first order stays


@pytest.mark.parametrize("name", ALL)
def test_functional_transforms_are_refused_or_right(name):
    """torch.func and forward mode: an error, never a derivative that is missing."""
    loss, x = ALL[name], leaf(name).detach()
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises((RuntimeError, NotImplementedError)):
            transform(loss)(x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        loss(forward_ad.make_dual(x, torch.ones_like(x)))


def test_every_function_of_the_package_is_one_of_ours():
    """A new autograd function that is not a `Function` would lose second-order terms."""
    ours = {
        c.__name__
        for c in torch.autograd.Function.__subclasses__()
        if c.__module__.startswith("fastalign") and ".bench." not in c.__module__
    }
    assert ours == {"Function"}
    functions = Function.__subclasses__()
    assert distributed._SumOverGroup in functions and all(c.names for c in functions)
