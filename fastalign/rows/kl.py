"""The exact KL between a policy's and a reference's rows: per token, and as a loss that leaves no [N, V]
temporary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_stats.fused import DIRECTIONS, TokenKLLossFunction
from fastalign.rows.spec import check_logits, check_ref, row_spec
from fastalign.rows.stats import token_stats
from fastalign.runtime import overwrite
from fastalign.runtime.checks import check_choice, check_same_device, check_shape
from fastalign.runtime.frozen import copies_without_graph


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "policy_ref",
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Exact KL divergence per row between p = softmax(logits / temperature) and q = softmax(ref_logits / temperature), in nats.

    KL(p || q) = sum p (log p - log q) with direction="policy_ref", KL(q || p) with "ref_policy"; `token_stats(..., ref_logits=...)` yields both,
    and the log-probs, in the same pass. One pass over both rows, no [N, V] temporary; never negative, exactly 0 for identical rows;
    differentiable in `logits` only.

    Args:
        logits, ref_logits: (..., V), the same shape, floating dtype and device; strides free but for a
            contiguous last dim.
        direction: policy_ref or ref_policy.
        mask: (...) bool; masked rows give 0 with gradient 0, whatever they hold.
        temperature: > 0, of both; a number or a 0-dim tensor.

    Returns:
        (...), fp32 (fp64 for fp64 logits). +inf where the first distribution has mass on a token that the
        second one gives none.
    """
    check_choice("direction", direction, tuple(DIRECTIONS))
    name = DIRECTIONS[direction]
    return getattr(
        token_stats(logits, ref_logits=ref_logits, outputs=(name,), mask=mask, temperature=temperature), name
    )


@copies_without_graph
class TokenKLLoss(NamedTuple):
    """loss: scalar, differentiable; kl: (...), detached. See `token_kl_loss`."""

    loss: Tensor
    kl: Tensor


def token_kl_loss(
    logits: Tensor,
    ref_logits: Tensor,
    coef: Tensor,
    *,
    direction: str = "policy_ref",
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
) -> TokenKLLoss:
    """sum over rows of coef * KL, with the gradient made in the forward pass: each pair of rows is read while
    it is in the cache or in shared memory instead of twice from memory. For a KL penalty whose weight is
    known beforehand, as in `beta * mean(KL)`: coef = beta / tokens.

    The gradient is rounded to the logits' dtype with `coef` in it. Backward multiplies it by the upstream
    gradient of `loss` and touches nothing where that is 1: put constant factors (a loss scale too) into
    `coef`. It can be taken once.

    Args:
        logits, ref_logits, direction, mask, temperature: see `token_kl`.
        coef: (...), the weight of each row, or 0-dim for all. A constant: no gradient flows into it. Not read
            in masked rows.
        inplace: write the gradient over `logits`, at once: the logits are gone (empty, (..., 0)) after this
            call, and whatever needs them raises. What is refused, and when the gradient gets memory of its
            own after all: see inplace_backward of `token_stats`. Under torch.compile it has no effect.

    Returns:
        TokenKLLoss: loss, a scalar; kl, (...) without gradient. fp32 (fp64 for fp64 logits).
    """
    check_choice("direction", direction, tuple(DIRECTIONS))
    logits = check_logits(logits)
    ref_logits = check_ref(ref_logits, logits)
    shape = tuple(logits.shape[:-1])
    spec = row_spec(shape, logits.shape[-1], logits.dtype, logits, mask=mask, temperature=temperature)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    coef = row_coefficients(coef, shape, logits, acc)
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    inplace = inplace and with_grad and not torch.compiler.is_compiling()
    if inplace:
        overwrite.check_overwritable(logits, "inplace")
        inplace = overwrite.may_overwrite(logits, "inplace")
    rows = spec.rows(logits, ref_logits)
    loss, kl = TokenKLLossFunction.apply(logits, rows, direction, coef, with_grad, inplace)
    return TokenKLLoss(loss, kl.view(shape))


def row_coefficients(coef: Tensor, shape: tuple[int, ...], like: Tensor, acc: torch.dtype) -> Tensor:
    """[rows]: the weight of each row, a constant; `shape`: the rows'."""
    if not isinstance(coef, Tensor):
        raise TypeError(f"coef must be a tensor, one weight per row or 0-dim, got {type(coef).__name__}")
    if coef.dim():
        check_shape("coef", coef, shape)
    check_same_device("coef", coef, "the rows", like)
    return coef.detach().to(acc).expand(shape).reshape(-1).contiguous()
