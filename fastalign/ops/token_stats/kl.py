"""Exact KL over the vocabulary, and its loss with the gradient made in the forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign import overwrite
from fastalign.checks import check_choice, check_same_device, check_shape
from fastalign.frozen import copies_without_graph
from fastalign.function import Function
from fastalign.ops.token_stats.api import check_ref, check_rows, check_values, row_options, token_stats, token_stats_fwd
from fastalign.ops.token_stats.contract import GRADIENTS, LAYOUT, NEED_REF, OUTPUT_BITS, forward_shapes, row_rules
from fastalign.registry import Op, row_dtypes, standard_kernels

DIRECTIONS = {"policy_ref": "kl_policy_ref", "ref_policy": "kl_ref_policy"}

_FUSED_SCHEMA = (
    "(Tensor{alias} logits, Tensor? labels, Tensor? mask, Tensor? temperature_tensor, float factor, float cap_scale, float temperature,"
    " int ignore_index, int outputs, Tensor? ref_logits, Tensor? g_logprob, Tensor? g_entropy, Tensor? g_logsumexp, Tensor? g_kl_policy_ref,"
    " Tensor? g_kl_ref_policy) -> ({results})"
)
# token_stats_fwd and token_stats_bwd in one, for upstream gradients that are known beforehand; arguments as theirs. Results: the outputs in the
# order of OUTPUT_BITS, and d loss / d logits; the op with an underscore writes that over the logits.


def _fused_outputs(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, ref_logits, *rest):
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return [logits.new_empty(shape, dtype=acc) for shape in forward_shapes(logits, labels, outputs, ref_logits)[:-2]]


def _fused_check(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, *rest):
    check_values(logits, labels, mask, temperature_tensor, ignore_index, vocab_total=logits.shape[-1])


def _fused_rules(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, ref_logits, g_logprob, g_entropy,
                 g_logsumexp, g_kl_policy_ref, g_kl_ref_policy):  # fmt: skip
    row_rules(logits, labels, outputs, ref_logits, g_logprob, (g_kl_policy_ref, g_kl_ref_policy))


token_stats_fused = Op(
    "token_stats_fused", _FUSED_SCHEMA.format(alias="", results=", ".join(["Tensor"] * (len(OUTPUT_BITS) + 1))),
    lambda logits, *rest: (*_fused_outputs(logits, *rest), torch.empty_like(logits, memory_format=torch.contiguous_format)),
    standard_kernels("token_stats", "token_stats_fused"), row_dtypes(), LAYOUT + GRADIENTS, _fused_rules, _fused_check,
)  # fmt: skip
token_stats_fused_ = Op(
    "token_stats_fused_", _FUSED_SCHEMA.format(alias="(a!)", results=", ".join(["Tensor"] * len(OUTPUT_BITS))),
    lambda *args: tuple(_fused_outputs(*args)), standard_kernels("token_stats", "token_stats_fused_"), row_dtypes(),
    LAYOUT + GRADIENTS, _fused_rules, _fused_check,
)  # fmt: skip
scale_rows_ = Op(
    "scale_rows_", "(Tensor(a!) x, Tensor scale) -> ()", lambda *args: None, standard_kernels("token_stats", "scale_rows_"), row_dtypes(),
    "x[*rows,V] scale[]:acc",
)  # fmt: skip
# x [..., V] *= scale (0-dim, accumulation dtype), which costs nothing where scale is 1.


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
        logits, ref_logits: (..., V), the same shape, floating dtype and device; strides free but for a contiguous last dim.
        direction: policy_ref or ref_policy.
        mask: (...) bool; masked rows give 0 with gradient 0, whatever they hold.
        temperature: > 0, of both; a number or a 0-dim tensor.

    Returns:
        (...), fp32 (fp64 for fp64 logits). +inf where the first distribution has mass on a token that the second one gives none.
    """
    check_choice("direction", direction, tuple(DIRECTIONS))
    name = DIRECTIONS[direction]
    return getattr(token_stats(logits, ref_logits=ref_logits, outputs=(name,), mask=mask, temperature=temperature), name)


@copies_without_graph
class TokenKLLoss(NamedTuple):
    """loss: scalar, differentiable; kl: (...), detached. See `token_kl_loss`."""

    loss: Tensor
    kl: Tensor


class TokenKLLossFunction(Function):
    """Forward makes the gradient as well; backward hands it out, scaled where the upstream gradient is not 1."""

    names = "token_kl_loss"

    @staticmethod
    def forward(ctx, logits, ref_logits, mask, temperature_tensor, options, direction, coef, with_grad, inplace):
        name = DIRECTIONS[direction]
        index, g = NEED_REF.index(name) - len(NEED_REF), [coef if n == name else None for n in DIRECTIONS.values()]
        rows = (logits, None, mask, temperature_tensor, *options, OUTPUT_BITS[name])
        if not with_grad:
            kl = token_stats_fwd(*rows, 0, logits.shape[-1], None, None, ref_logits)[index - 2]
        elif inplace:
            grad = logits.detach()
            kl = token_stats_fused_(grad, *rows[1:], ref_logits, None, None, None, *g)[index]
            overwrite.retire(logits)
        else:
            *results, grad = token_stats_fused(*rows, ref_logits, None, None, None, *g)
            kl = results[index]
        if with_grad:
            ctx.save_for_backward(grad)
        ctx.spent = False
        ctx.mark_non_differentiable(kl)
        return (kl * coef if mask is None else torch.where(mask, kl * coef, 0.0)).sum(), kl

    @staticmethod
    def backward(ctx, g_loss, _):
        if torch.compiler.is_compiling():
            (grad,) = ctx.saved_tensors
            scale_rows_(grad, g_loss)
            return grad, *(None,) * 8
        if ctx.spent:
            raise RuntimeError(
                "token_kl_loss can be differentiated once: its stored gradient was modified by an inplace operation, the scaling of the first time"
            )
        ctx.spent = True
        (grad,) = ctx.saved_tensors
        if not overwrite.is_ours_alone(grad):  # saved-tensor hooks may keep what they gave
            grad = grad.clone()
        scale_rows_(grad, g_loss)
        return grad, *(None,) * 8


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
    """sum over rows of coef * KL, with the gradient made in the forward pass: each pair of rows is read while it is in the cache or in shared
    memory instead of twice from memory. For a KL penalty whose weight is known beforehand, as in `beta * mean(KL)`: coef = beta / tokens.

    The gradient is rounded to the logits' dtype with `coef` in it. Backward multiplies it by the upstream gradient of `loss` and touches nothing
    where that is 1: put constant factors (a loss scale too) into `coef`. It can be taken once.

    Args:
        logits, ref_logits, direction, mask, temperature: see `token_kl`.
        coef: (...), the weight of each row, or 0-dim for all. A constant: no gradient flows into it. Not read in masked rows.
        inplace: write the gradient over `logits`, at once: the logits are gone (empty, (..., 0)) after this call, and whatever needs them raises.
            What is refused, and when the gradient gets memory of its own after all: see inplace_backward of `token_stats`. Under
            torch.compile it has no effect.

    Returns:
        TokenKLLoss: loss, a scalar; kl, (...) without gradient. fp32 (fp64 for fp64 logits).
    """
    check_choice("direction", direction, tuple(DIRECTIONS))
    ref_logits = check_ref(ref_logits, logits)
    rows_shape, logits, _, mask = check_rows(logits, None, mask)
    options, temperature_tensor = row_options(logits, temperature, 1.0, None, -100)
    if not isinstance(coef, Tensor):
        raise TypeError(f"coef must be a tensor, one weight per row or 0-dim, got {type(coef).__name__}")
    if coef.dim():
        check_shape("coef", coef, rows_shape)
    check_same_device("coef", coef, "logits", logits)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    coef = coef.detach().to(acc).expand(rows_shape).reshape(-1).contiguous()
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    inplace = inplace and with_grad and not torch.compiler.is_compiling()
    if inplace:
        overwrite.check_overwritable(logits, "inplace")
        inplace = overwrite.may_overwrite(logits, "inplace")
    loss, kl = TokenKLLossFunction.apply(logits, ref_logits, mask, temperature_tensor, options, direction, coef, with_grad, inplace)
    return TokenKLLoss(loss, kl.view(rows_shape))
