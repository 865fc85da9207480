"""Exact KL over the vocabulary, and its loss with the gradient made in the forward pass."""

from __future__ import annotations

import torch

from fastalign.ops.token_stats.contract import GRADIENTS, LAYOUT, NEED_REF, OUTPUT_BITS, forward_shapes, row_rules
from fastalign.ops.token_stats.op import check_values, token_stats_fwd
from fastalign.runtime import overwrite
from fastalign.runtime.dispatch import Op, row_dtypes, standard_kernels
from fastalign.runtime.function import Function

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
