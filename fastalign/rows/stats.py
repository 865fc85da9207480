"""Statistics of vocabulary rows: log-probs of labels, entropy, log-sum-exp and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_stats.contract import NEED_REF
from fastalign.ops.token_stats.op import TokenStatsFunction
from fastalign.rows.kept import support_rows
from fastalign.rows.spec import RowSpec, check_logits, check_ref, row_spec
from fastalign.runtime import overwrite
from fastalign.runtime.checks import (
    check_integers,
    check_number,
    check_same_device,
    check_shape,
)
from fastalign.runtime.frozen import copies_without_graph


@copies_without_graph
class TokenStats(NamedTuple):
    """One attribute per output; None where not asked for. See `token_stats`."""

    logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    kl_policy_ref: Tensor | None = None
    kl_ref_policy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


def token_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    ref_logits: Tensor | None = None,
    outputs: Sequence[str] = ("logprob",),
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    support: Tensor | None = None,
) -> TokenStats:
    """Per-token statistics of `softmax(z)`, `z = cap(logits * logit_scale) / temperature`, `cap(x) = softcap * tanh(x / softcap)`.

    One pass over each row yields every output asked for; no [N, V] temporary is made. With p = softmax(z):

    - logprob = z[label] - logsumexp(z)
    - entropy = -sum p log p (nats)
    - logsumexp = log sum e^z
    - log_sum_sq_probs = log sum p^2 (the collision term of WPO, arXiv 2406.11827)
    - mean_logit = mean over the vocabulary of z
    - is_top1 = 1.0 where the label is the first index that attains the largest logit (argmax), else 0.0

    and with q = softmax of `ref_logits`, transformed alike, in the same pass over both rows:

    - ref_logprob = log q[label]
    - kl_policy_ref = KL(p || q) = sum p (log p - log q), exact over the vocabulary, never negative, 0 for
      identical rows
    - kl_ref_policy = KL(q || p) = sum q (log q - log p), likewise (the sequence KL of TDPO, arXiv 2404.11999)

    logprob, entropy, logsumexp and both KLs are differentiable in `logits`, the other outputs are not;
    nothing is in `ref_logits`.

    Args:
        logits: (..., V), fp32, bf16 or fp16 (fp64 on the reference and CPU backends); last dim contiguous,
            any leading dims and strides.
        labels: (...) or, for the log-probs of K >= 1 tokens per row, (..., K); integers. Row t is scored
            against labels[t]. Needed by logprob, ref_logprob and is_top1. A label equal to `ignore_index`
            masks its row (with K labels: that entry; the row when all are ignored).
        ref_logits: logits of the reference model, of the shape, dtype and device of `logits`, strides of its
            own. A constant: no gradient flows into it. Needed by ref_logprob, kl_policy_ref and
            kl_ref_policy; not read for the others.
        outputs: names from the lists above.
        mask: (...) bool, row-aligned; False masks the row. Masked rows give exactly 0 in every output and
            receive exactly 0 gradient, whatever they hold.
        temperature: > 0; a 0-dim tensor for schedules (no recompilation under torch.compile).
        logit_scale, softcap: > 0; the model head's own transform, applied in the order scale, cap,
            temperature.
        inplace_backward: write the gradient over `logits`, which saves one [N, V] allocation. Refused for
            leaves (and views of leaves) and for overlapping memory. `logits` must not be read after backward:
            they are then empty, (..., 0), and whatever still needs them raises. Where another tensor shares
            their memory (a slice, `detach()`, a layer that saved its output, such as tanh) or saved-tensor
            hooks hold it, the gradient gets memory of its own: the result is the same, nothing is saved, and
            a warning says so once. A slice of logits saves little: autograd's backward of logits[:, :-1]
            allocates all of it again, so shift the labels instead. Under torch.compile the compiler decides
            about buffers and this has no effect.
        support: (..., K), integers: the tokens that p and q are renormalised over, such as those that a
            sampler kept after top-k or top-p; -1 for none, so that rows may have fewer than K. Sums and
            maxima then run over the support: logsumexp is log sum e^z over it, is_top1 compares with the
            largest logit in it. A label outside its row's support has probability 0: logprob -inf, without
            gradient, is_top1 0. A token listed twice counts once. A row without a token is masked. mean_logit
            and inplace_backward are refused. The gradient of logits is 0 outside the support.

    Returns:
        TokenStats; each output (...) (logprob and ref_logprob: the shape of labels), fp32, or fp64 for fp64
        logits. NaN or +inf logits, and rows that are -inf throughout, give NaN in their own row only; single
        -inf logits have probability 0 and gradient 0. A softcap makes ordinary logits of infinite ones,
        softcap and -softcap in front of the temperature, with probabilities above 0; only NaN then gives NaN.
        A KL is +inf where its first distribution has mass on a token that the second one gives none; the
        gradient of an infinite kl_policy_ref is NaN in that row.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices, unknown outputs, non-positive temperature, scale or
            cap.
        IndexError: label outside [0, V) that is not ignore_index, or token of the support outside [0, V) that
            is not -1 (CPU; on CUDA that row is NaN, without a synchronisation).
    """
    logits = check_logits(logits)
    ref_logits = None if ref_logits is None else check_ref(ref_logits, logits)
    spec = row_spec(
        tuple(logits.shape[:-1]), logits.shape[-1], logits.dtype, logits, labels=labels, mask=mask,
        outputs=outputs, with_ref=ref_logits is not None, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, ignore_index=ignore_index,
    )  # fmt: skip
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    if inplace_backward:
        overwrite.check_overwritable(logits, "inplace_backward")
    if not any(name in NEED_REF for name in outputs):
        ref_logits = None
    if support is not None:
        if inplace_backward:
            raise ValueError(
                "inplace_backward cannot be used with support: only the support's logits get a gradient"
            )
        narrow = support_rows(support, logits, ref_logits, spec)
        return TokenStats(**narrow.completed(_named_results(narrow.logits, narrow.ref_logits, narrow.spec)))
    return TokenStats(**_named_results(logits, ref_logits, spec, inplace_backward))


def _named_results(
    logits: Tensor, ref_logits: Tensor | None, spec: RowSpec, inplace_backward: bool = False
) -> dict[str, Tensor]:
    return spec.named(
        TokenStatsFunction.apply(logits, spec.rows(logits, ref_logits), spec.bits, inplace_backward)
    )


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:
    """log softmax(z)[label] per row: `token_stats(...).logprob`. Same arguments, shapes, dtypes and
    errors."""
    return token_stats(
        logits, labels, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        ignore_index=ignore_index, inplace_backward=inplace_backward,
    ).logprob  # fmt: skip


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`log_softmax(logits / temperature, -1).gather(-1, index)` without the [N, V] temporary; the signature
    of TRL's helper.

    Args:
        logits: (..., V). index: (...) or (..., K), integers in [0, V); no index is ignored. temperature: > 0.
        row_mask: the shape of `index`, bool or integers: where it is False (0) the result is exactly 0,
            without gradient, whatever logits and index hold there.
        dtype: of the result; None: fp32 (fp64 for fp64 logits), as TRL's kernel gives. Its eager fallback
            rounds to the logits' own dtype: dtype=logits.dtype.

    Returns:
        The shape of `index`.
    """
    mask = None
    if row_mask is not None:
        check_integers("index", index)
        check_shape("row_mask", row_mask, tuple(index.shape))
        check_same_device("row_mask", row_mask, "logits", logits)
        kept = row_mask != 0
        index = index.masked_fill(~kept, 0)
        mask = kept if index.dim() == logits.dim() - 1 else kept.any(-1)
    # An ignore_index that no label can have: every index is scored, and an index outside [0, V) is an error.
    out = token_stats(logits, index, mask=mask, temperature=temperature, ignore_index=-(1 << 62)).logprob
    if row_mask is not None and mask is not kept:
        out = out.masked_fill(~kept, 0.0)
    return out if dtype is None else out.to(dtype)


def entropy_from_logits(
    logits: Tensor,
    chunk_size: int | None = None,
    *,
    temperature: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats, -sum p log p: (..., V) -> (...), differentiable.

    Args:
        logits: (..., V). temperature: > 0.
        chunk_size: accepted because TRL's helper has it, and without effect: there is no [N, V] temporary
            that chunks would make smaller.
        dtype: as in `selective_log_softmax`.
    """
    if chunk_size is not None:
        check_number("chunk_size", chunk_size, above=0)
    out = token_stats(logits, outputs=("entropy",), temperature=temperature).entropy
    return out if dtype is None else out.to(dtype)
