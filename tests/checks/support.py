"""Checks of supports: rows whose distribution is renormalised over some tokens of the vocabulary. The truth
masks the full logits in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fastalign as fa
from fastalign.testing import assert_close, token_stats_truth

ROWS, WIDTH, VOCAB, KEPT = 11, 8, 37, 6
OUTSIDE, UNSCORED, ONE, EMPTY, TWICE = 1, 2, 3, 5, 7  # rows with something of their own


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    indices: Tensor
    labels: Tensor
    mask: Tensor

    def doubled(self) -> tuple[Case, list[Tensor]]:
        """In fp64, and its leaves."""
        new = [x.detach().double().requires_grad_() for x in self[:3]]
        return Case(*new, *self[3:]), new

    def leaves(self) -> tuple[Case, list[Tensor]]:
        new = [x.detach().clone().requires_grad_() for x in self[:3]]
        return Case(*new, *self[3:]), new

    def logits(self) -> Tensor:
        """Of a masked row's garbage, 0."""
        return torch.where(self.mask.unsqueeze(-1), self.hidden, 0.0) @ self.weight.t() + self.bias

    def csr(self) -> tuple[Tensor, Tensor]:
        """(indices, offsets) of the same supports, without -1."""
        real = self.indices >= 0
        return self.indices[real], torch.cat([real.new_zeros(1, dtype=torch.long), real.sum(-1).cumsum(0)])


def make_case(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Case:
    """The top KEPT tokens of each row, fewer in some; a label outside its support, a masked row of NaN whose
    support is none, rows of one token and of no token, a token listed twice."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*s, generator=g).to(dtype) for s in ((ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    logits = hidden.double() @ weight.double().t() + bias.double()
    ordered = logits.argsort(-1, descending=True)
    indices = ordered[:, :KEPT].clone()
    labels = indices[torch.arange(ROWS), torch.arange(ROWS) % 3]
    indices[::2, 4:] = -1
    labels[OUTSIDE] = ordered[OUTSIDE, KEPT]
    indices[ONE, 1:] = -1
    labels[ONE] = indices[ONE, 0]
    indices[EMPTY] = -1
    indices[TWICE, 5] = indices[TWICE, 1]
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[UNSCORED] = False
    hidden[UNSCORED], indices[UNSCORED, 1], labels[UNSCORED] = float("nan"), VOCAB + 5, -7
    return Case(*(x.to(device) for x in (hidden, weight, bias, indices, labels, mask)))


def call(case: Case, **options: object) -> fa.SupportLogprobs:
    """`logprobs_at` without labels, unless `options` has some."""
    return fa.logprobs_at(case.hidden, case.weight, case.indices, bias=case.bias, mask=case.mask, **options)


class Truth(NamedTuple):
    logprobs: Tensor
    label_logprob: Tensor
    log_mass: Tensor


def masked_logits(logits: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """(logits, -inf outside the support; which rows count). Rows that do not are as they were."""
    legal = (case.indices >= 0) & case.mask.unsqueeze(-1)
    member = torch.zeros(*legal.shape[:-1], VOCAB + 1, dtype=torch.bool, device=logits.device)
    member = member.scatter(-1, case.indices.masked_fill(~legal, VOCAB), True)[..., :VOCAB]
    rows = member.any(-1)
    return logits.masked_fill(~member & rows.unsqueeze(-1), float("-inf")), rows


def truth_of(
    case: Case, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Truth:
    """case: in fp64."""
    x = case.logits() * logit_scale
    z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    over, rows = masked_logits(z, case)
    log_p = torch.log_softmax(over, -1)
    legal = (case.indices >= 0) & rows.unsqueeze(-1)
    logprobs = torch.where(legal, log_p.gather(-1, case.indices.clamp(0, VOCAB - 1)), 0.0)
    label = torch.where(rows, log_p.gather(-1, case.labels.clamp(0).unsqueeze(-1)).squeeze(-1), 0.0)
    return Truth(logprobs, label, torch.where(rows, over.logsumexp(-1) - z.logsumexp(-1), 0.0))


def check_logprobs_at(
    device: str, dtype: torch.dtype = torch.float32, counts: bool | None = None, **options: object
) -> None:
    """Every result and the gradients of hidden, weight and bias, from [T, K] and from CSR."""
    case = make_case(dtype, device)
    plain, wanted = case.doubled()
    transform = {n: x for n, x in options.items() if n in ("temperature", "logit_scale", "softcap")}
    want = truth_of(plain, **transform)
    slopes = torch.linspace(-1, 1, ROWS * KEPT, dtype=torch.float64, device=device).view(ROWS, KEPT)
    finite = want.label_logprob.isfinite()
    total = (want.logprobs * slopes).sum() + want.label_logprob[finite].sum() - 2 * want.log_mass.sum()
    wanted = torch.autograd.grad(total, wanted)
    own, asked = case.leaves()
    real = case.indices >= 0
    for indices, offsets in ((case.indices, None), case.csr()):
        got = fa.logprobs_at(
            own.hidden, own.weight, indices, own.labels, bias=own.bias, offsets=offsets, with_mass=True,
            mask=own.mask, host_counts=counts, **options,
        )  # fmt: skip
        pick = (lambda x: x) if offsets is None else (lambda x: x[real])
        assert_close(got.logprobs, pick(want.logprobs), scale=8.0, what="logprobs")
        assert_close(got.label_logprob, want.label_logprob, scale=8.0, what="label_logprob")
        assert_close(got.log_mass, want.log_mass, scale=8.0, what="log_mass")
        assert bool((got.log_mass <= 0).all())
        found = (got.logprobs * pick(slopes)).sum() + got.label_logprob[finite].sum() - 2 * got.log_mass.sum()
        for name, a, b in zip(("hidden", "weight", "bias"), torch.autograd.grad(found, asked), wanted):
            assert_close(a, b, scale=8.0 * ROWS**0.5, what=name)


STATS = ("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "is_top1")
KLS = ("logprob", "ref_logprob", "kl_policy_ref", "kl_ref_policy")


def check_token_stats(device: str, dtype: torch.dtype = torch.float32, **options: object) -> None:
    """Outputs of one model and the gradients of those that have one."""
    case = make_case(device=device)
    logits = case.logits().detach().to(dtype)
    logits[UNSCORED] = float("nan")
    own, plain = logits.clone().requires_grad_(), logits.double().nan_to_num().requires_grad_()
    over, rows = masked_logits(plain, case)
    cap = options.get("softcap")
    if cap is not None:  # a cap makes ordinary logits of infinite ones: the truth caps first
        over, _ = masked_logits(cap * torch.tanh(plain * options["logit_scale"] / cap), case)
    rest = {n: x for n, x in options.items() if n == "temperature" or (cap is None and n == "logit_scale")}
    want = token_stats_truth(over, case.labels, mask=rows, **rest)
    got = fa.token_stats(own, case.labels, support=case.indices, outputs=STATS, mask=case.mask, **options)
    for name in STATS:
        assert_close(getattr(got, name), want[name], scale=8.0, what=name)
    for name in ("logprob", "entropy", "logsumexp"):
        finite = want[name].isfinite()
        (a,) = torch.autograd.grad(getattr(got, name)[finite].sum(), own, retain_graph=True)
        (b,) = torch.autograd.grad(
            plain_output(over, rows, case, name, rest)[finite].sum(), plain, retain_graph=True
        )
        assert_close(a, b, scale=8.0, what=f"gradient of {name}")
        assert not bool(a[~rows].any())


def plain_output(over: Tensor, rows: Tensor, case: Case, name: str, rest: dict[str, float]) -> Tensor:
    """Again, in a form whose gradient holds at -inf."""
    z = over * rest.get("logit_scale", 1.0) / rest.get("temperature", 1.0)
    lse = z.logsumexp(-1)
    p = torch.softmax(z, -1)
    found = {"logsumexp": lambda: lse, "logprob": lambda: z.gather(-1, case.labels.clamp(0)[:, None])[:, 0] - lse,
             "entropy": lambda: lse - (p * z.masked_fill(p == 0, 0.0)).sum(-1)}[name]()  # fmt: skip
    return torch.where(rows, found, 0.0)


def check_two_models(device: str) -> None:
    """Both KLs over the policy's support, both models renormalised over it."""
    case, other = make_case(device=device), make_case(device=device, seed=1)
    logits, ref = (x.logits().detach() for x in (case, other))
    own, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (over, rows), (ref_over, _) = masked_logits(plain, case), masked_logits(ref.double(), case)
    p, q = (torch.log_softmax(x, -1) for x in (over, ref_over))
    none = ~over.isfinite()
    p, q = p.masked_fill(none, 0.0), q.masked_fill(none, 0.0)
    mass, ref_mass = (x.exp().masked_fill(none, 0.0) for x in (p, q))
    want = {"kl_policy_ref": (mass * (p - q)).sum(-1), "kl_ref_policy": (ref_mass * (q - p)).sum(-1)}
    got = fa.token_stats(own, case.labels, ref_logits=ref, support=case.indices, outputs=KLS, mask=case.mask)
    for name in want:
        assert_close(getattr(got, name), torch.where(rows, want[name], 0.0), scale=8.0, what=name)
        (a,) = torch.autograd.grad(getattr(got, name).sum(), own, retain_graph=True)
        (b,) = torch.autograd.grad(torch.where(rows, want[name], 0.0).sum(), plain, retain_graph=True)
        assert_close(a, b, scale=8.0, what=f"gradient of {name}")
    label = torch.log_softmax(ref_over, -1).gather(-1, case.labels.clamp(0)[:, None])[:, 0]
    assert_close(got.ref_logprob, torch.where(rows, label, 0.0), scale=8.0, what="ref_logprob")
