"""One closure per public op: forward and backward on inputs that stay where they are. What the tests on a
device and the sanitizer run, and what has to be among it: every op (tests/bench/test_gpu_report.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.token_stats.contract import RowGradients
from fastalign.rows.spec import row_spec
from fastalign.rows.states import finish, merge, pull, push
from fastalign.testing import make_batch, make_labels, make_logits

Call = Callable[[], tuple[Tensor, ...]]


def public_calls(
    device: str, *, rows: int = 33, vocab: int = 1031, dtype: torch.dtype = torch.bfloat16, pairs: int = 5
) -> dict[str, tuple[Tensor, Call]]:
    """name -> (a floating input that may be changed between calls, the call). A call returns the op's results
    and the gradient."""
    logits = make_logits(rows, vocab, dtype=dtype, device=device).requires_grad_()
    labels = make_labels(rows, vocab, ignored=0.2, device=device)
    ref_logits = make_logits(rows, vocab, dtype=dtype, device=device, seed=1)
    ones = torch.ones(rows, device=device)
    batch = make_batch(pairs, max_len=300, device=device)
    logprobs = batch.logprobs.clone().requires_grad_()
    per_sequence = torch.ones(2 * pairs, device=device)
    one = torch.ones((), device=device)
    lists = torch.tensor([0, 3, 2 * pairs], device=device), torch.arange(2 * pairs, device=device)

    def token_stats() -> tuple[Tensor, ...]:
        stats = fa.token_stats(
            logits,
            labels,
            outputs=("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "is_top1"),
        )
        values = [x for x in stats if x is not None]
        return (
            *(x.detach() for x in values),
            *torch.autograd.grad((stats.logprob, stats.entropy), logits, (ones, ones)),
        )

    def inplace() -> tuple[Tensor, ...]:
        scratch = logits * 1
        value = fa.token_logprobs(scratch, labels, inplace_backward=True)
        return value.detach(), *torch.autograd.grad(value, scratch, ones)

    def reference_stats() -> tuple[Tensor, ...]:
        stats = fa.token_stats(
            logits,
            labels,
            ref_logits=ref_logits,
            outputs=("logprob", "ref_logprob", "kl_policy_ref", "kl_ref_policy"),
        )
        values = [x for x in stats if x is not None]
        wanted = (stats.logprob, stats.kl_policy_ref, stats.kl_ref_policy)
        return (*(x.detach() for x in values), *torch.autograd.grad(wanted, logits, (ones, ones, ones)))

    def token_kl_loss() -> tuple[Tensor, ...]:
        out = fa.token_kl_loss(logits, ref_logits, ones)
        return out.loss.detach(), out.kl, *torch.autograd.grad(out.loss, logits, one)

    def sequence_sum() -> tuple[Tensor, ...]:
        value = fa.sequence_sum(logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask)
        return value.detach(), *torch.autograd.grad(value, logprobs, per_sequence)

    def kl_estimate() -> tuple[Tensor, ...]:
        value = fa.kl_estimate(logprobs, batch.ref_logprobs)
        return value.detach(), *torch.autograd.grad(value, logprobs, torch.ones_like(value))

    def preference_loss() -> tuple[Tensor, ...]:
        out = fa.preference_loss(
            logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, loss="dpo"
        )
        return out.loss.detach(), out.margins, *torch.autograd.grad(out.loss, logprobs, one)

    def listwise_loss() -> tuple[Tensor, ...]:
        out = fa.listwise_loss(
            logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, *lists, mask=batch.packed.mask, loss="rrhf"
        )
        return out.loss.detach(), out.rewards, *torch.autograd.grad(out.loss, logprobs, one)

    def gae() -> tuple[Tensor, ...]:
        return fa.gae(
            logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, gamma=0.99
        )

    def policy_loss() -> tuple[Tensor, ...]:
        out = fa.policy_loss(
            logprobs,
            batch.ref_logprobs,
            batch.logprobs,
            loss="gspo_token",
            cu_seqlens=batch.packed.cu_seqlens,
            mask=batch.packed.mask,
            ref_logprobs=batch.ref_logprobs,
            kl_coef=0.1,
        )
        return out.loss.detach(), out.stats, *torch.autograd.grad(out.loss, logprobs, one)

    def value_loss() -> tuple[Tensor, ...]:
        out = fa.value_loss(logprobs, batch.ref_logprobs, batch.kl_ref_policy, mask=batch.packed.mask)
        return out.loss.detach(), out.stats, *torch.autograd.grad(out.loss, logprobs, one)

    def scaled_kl_loss() -> tuple[Tensor, ...]:
        scratch = logits * 1
        out = fa.token_kl_loss(scratch, ref_logits, ones, inplace=True)
        return out.loss.detach(), *torch.autograd.grad(2 * out.loss, scratch, one)

    def row_states() -> tuple[Tensor, ...]:
        """In two parts of the vocabulary: pushed, merged, finished, pulled from."""
        outputs, cut = ("logprob", "ref_logprob", "kl_ref_policy"), vocab // 3
        x = logits.detach()
        spec = row_spec((rows,), vocab, dtype, x, labels=labels, outputs=outputs, with_ref=True)
        parts = [(x[:, part], ref_logits[:, part]) for part in (slice(0, cut), slice(cut, None))]
        states = merge([push(spec, *part, start=start) for part, start in zip(parts, (0, cut))])
        upstream = RowGradients(ones.unsqueeze(-1), g_kl_ref_policy=ones)
        grads = [pull(spec, states, upstream, *part, start=start) for part, start in zip(parts, (0, cut))]
        return *finish(spec, states).values(), *grads

    on_logits = (token_stats, inplace, reference_stats, token_kl_loss, scaled_kl_loss, row_states)
    calls = (
        *on_logits,
        sequence_sum,
        kl_estimate,
        preference_loss,
        listwise_loss,
        gae,
        policy_loss,
        value_loss,
    )
    return {call.__name__: (logits if call in on_logits else logprobs, call) for call in calls}


NAMES = (
    "token_stats", "inplace", "reference_stats", "token_kl_loss", "scaled_kl_loss", "row_states",
    "sequence_sum", "kl_estimate", "preference_loss", "listwise_loss", "gae", "policy_loss", "value_loss",
)  # fmt: skip


def calls_with_a_last_block(device: str) -> dict[str, Call]:
    """One forward and backward of every op that has a last block, on inputs that stay; each returns its
    results."""
    batch = make_batch(3, device=device)
    lp, ref = batch.logprobs.clone().requires_grad_(), batch.ref_logprobs
    cu, mask = batch.packed.cu_seqlens, batch.packed.mask
    one, scores = torch.ones((), device=device), torch.arange(6, device=device)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)

    def with_gradient(out):
        return out.loss.detach(), *torch.autograd.grad(out.loss, lp, one)

    return {
        "preference": lambda: with_gradient(fa.preference_loss(lp, ref, cu, mask=mask)),
        "listwise": lambda: with_gradient(fa.listwise_loss(lp, ref, cu, offsets, scores, mask=mask)),
        "policy": lambda: with_gradient(fa.policy_loss(lp, ref, ref, mask=mask)),
        "value": lambda: with_gradient(fa.value_loss(lp, ref, ref, mask=mask)),
        "gae": lambda: tuple(fa.gae(lp, ref, cu, mask=mask)),
    }


WITH_A_LAST_BLOCK = ("preference", "listwise", "policy", "value", "gae")
