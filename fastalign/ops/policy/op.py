"""Policy-gradient and value losses on packed per-token log-probs: value, slopes and all metrics in one evaluation, one launch each way."""

from __future__ import annotations

import torch

from fastalign.ops.policy.params import SCALAR_COUNT, PolicyParams
from fastalign.ops.policy.reference import STATS, VALUE_STATS
from fastalign.runtime.checks import (
    check_cu_seqlens_values,
)
from fastalign.runtime.dispatch import Op, scalar_dtypes, standard_kernels
from fastalign.runtime.function import Function
from fastalign.runtime.layout import refuse


def _check_values(first, old, target, cu_seqlens, *rest):
    """cu_seqlens is monotone."""
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, first.shape[0])


def _policy_rules(logprobs, old_logprobs, advantages, cu_seqlens, mask, ref_logprobs, entropy, is_weight, kl_coef, entropy_coef, num_items,
                  scalars, switches, with_entropy_grad):  # fmt: skip
    """Whether the values per token or per sequence are as many as the parameters say."""
    p = PolicyParams(*scalars, *switches)
    sequences = -1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, tensor, per_sequence in (("advantages", advantages, p.advantages_per_sequence), ("is_weight", is_weight, p.is_per_sequence)):
        count = sequences if per_sequence else logprobs.shape[0]
        refuse(tensor is not None and tensor.shape[0] != count, f"{name} does not hold the values that the parameters ask for")


policy_fwd = Op(
    "policy_fwd",
    "(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor? cu_seqlens, Tensor? mask, Tensor? ref_logprobs, Tensor? entropy,"
    " Tensor? is_weight, Tensor? kl_coef, Tensor? entropy_coef, Tensor? num_items, float[] scalars, int[] switches, bool with_entropy_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logprobs, *rest: (
        logprobs.new_empty(()), torch.empty_like(logprobs), logprobs.new_empty(logprobs.shape[0] if rest[-1] else 0), logprobs.new_empty(len(STATS))
    ),
    standard_kernels("policy", "policy_fwd"), scalar_dtypes(),
    "logprobs[T] old_logprobs[T] advantages[A] cu_seqlens[S+1]:int32 mask[T]:bool ref_logprobs[T] entropy[T] is_weight[I] kl_coef[]"
    " entropy_coef[] num_items[]", _policy_rules, _check_values,
)  # fmt: skip
# Without cu_seqlens nothing of the loss is per sequence. scalars and switches: PolicyParams. Results: loss [], slopes [T] in the log-probs and
# in the entropy ([T] or empty(0)), both still to be divided by the number of items, stats [STATS] with that number first.
value_fwd = Op(
    "value_fwd",
    "(Tensor values, Tensor? old_values, Tensor returns, Tensor? cu_seqlens, Tensor? mask, Tensor? num_items, float clip, int aggregation,"
    " float norm_length) -> (Tensor, Tensor, Tensor)",
    lambda values, *rest: (values.new_empty(()), torch.empty_like(values), values.new_empty(len(VALUE_STATS))),
    standard_kernels("policy", "value_fwd"), scalar_dtypes(),
    "values[T] old_values[T] returns[T] cu_seqlens[S+1]:int32 mask[T]:bool num_items[]", check=_check_values,
)  # fmt: skip
# old_values None: unclipped. Results: loss [], slopes [T] before the division by items, stats [VALUE_STATS].
policy_bwd = Op(
    "policy_bwd", "(Tensor grad, Tensor slopes, Tensor entropy_slopes, Tensor stats) -> (Tensor, Tensor)",
    lambda grad, slopes, entropy_slopes, stats: (torch.empty_like(slopes), torch.empty_like(entropy_slopes)),
    standard_kernels("policy", "policy_bwd"), scalar_dtypes(), "grad[] slopes[T] entropy_slopes[E] stats[N]",
    lambda grad, slopes, entropy_slopes, stats: refuse(
        entropy_slopes.shape[0] not in (0, slopes.shape[0]) or stats.shape[0] == 0, "entropy_slopes and stats do not belong to slopes"
    ),
)  # fmt: skip
# grad []: each slope times grad, divided by stats[0], the number of items. Serves both losses.


class PolicyFunction(Function):
    names = "policy_loss"

    @staticmethod
    def forward(ctx, logprobs, entropy, tensors, params):
        old, advantages, cu_seqlens, mask, ref, is_weight, kl_coef, entropy_coef, num_items = tensors
        with_entropy_grad = ctx.needs_input_grad[1]
        loss, slopes, entropy_slopes, stats = policy_fwd(
            logprobs, old, advantages, cu_seqlens, mask, ref, entropy, is_weight, kl_coef, entropy_coef, num_items,
            list(params[:SCALAR_COUNT]), list(params[SCALAR_COUNT:]), with_entropy_grad,
        )  # fmt: skip
        ctx.save_for_backward(slopes, entropy_slopes, stats)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad, _):
        d_logprobs, d_entropy = policy_bwd(grad, *ctx.saved_tensors)
        return d_logprobs, d_entropy if ctx.needs_input_grad[1] else None, None, None


class ValueFunction(Function):
    names = "value_loss"

    @staticmethod
    def forward(ctx, values, old_values, returns, cu_seqlens, mask, num_items, clip, aggregation, norm_length):
        loss, slopes, stats = value_fwd(values, old_values, returns, cu_seqlens, mask, num_items, clip, aggregation, norm_length)
        ctx.save_for_backward(slopes, stats)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad, _):
        slopes, stats = ctx.saved_tensors
        return policy_bwd(grad, slopes, slopes.new_empty(0), stats)[0], *(None,) * 8
