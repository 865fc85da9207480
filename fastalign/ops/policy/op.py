"""Policy-gradient and value losses on packed per-token log-probs: value, slopes and all metrics in one
evaluation, one launch each way."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastalign.ops.columns import STATS, VALUE_STATS
from fastalign.ops.policy.params import PolicyParams
from fastalign.runtime.arguments import In, Maybe
from fastalign.runtime.checks import check_cu_seqlens_values
from fastalign.runtime.function import Function
from fastalign.runtime.layout import refuse
from fastalign.runtime.op import SCALAR_DTYPES, Op


class PolicyFwd(NamedTuple):
    """Without cu_seqlens nothing of the loss is per sequence."""

    logprobs: In("T")
    old_logprobs: Maybe("T")
    advantages: In("A")
    cu_seqlens: Maybe("S+1", "int32")
    mask: Maybe("T", "bool")
    ref_logprobs: Maybe("T")
    entropy: Maybe("T")
    is_weight: Maybe("I")
    kl_coef: Maybe("")
    entropy_coef: Maybe("")
    num_items: Maybe("")
    params: PolicyParams
    with_entropy_grad: bool


class ValueFwd(NamedTuple):
    """old_values None: unclipped."""

    values: In("T")
    old_values: Maybe("T")
    returns: In("T")
    cu_seqlens: Maybe("S+1", "int32")
    mask: Maybe("T", "bool")
    num_items: Maybe("")
    clip: float
    aggregation: int
    norm_length: float


class PolicyBwd(NamedTuple):
    grad: In("")
    slopes: In("T")
    entropy_slopes: In("E")
    stats: In("N")


def _check_values(a: PolicyFwd | ValueFwd) -> None:
    """cu_seqlens is monotone."""
    if a.cu_seqlens is not None:
        check_cu_seqlens_values(a.cu_seqlens, a[0].shape[0])


def _policy_rules(a: PolicyFwd) -> None:
    """Whether the values per token or per sequence are as many as the parameters say."""
    sequences = -1 if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    given = (
        ("advantages", a.advantages, a.params.advantages_per_sequence),
        ("is_weight", a.is_weight, a.params.is_per_sequence),
    )
    for name, tensor, per_sequence in given:
        count = sequences if per_sequence else a.logprobs.shape[0]
        refuse(
            tensor is not None and tensor.shape[0] != count,
            f"{name} does not hold the values that the parameters ask for",
        )


def _bwd_rules(a: PolicyBwd) -> None:
    wrong = a.entropy_slopes.shape[0] not in (0, a.slopes.shape[0]) or a.stats.shape[0] == 0
    refuse(wrong, "entropy_slopes and stats do not belong to slopes")


policy_fwd = Op(
    "policy_fwd",
    PolicyFwd,
    "(Tensor, Tensor, Tensor, Tensor)",
    lambda a: (
        a.logprobs.new_empty(()),
        torch.empty_like(a.logprobs),
        a.logprobs.new_empty(a.logprobs.shape[0] if a.with_entropy_grad else 0),
        a.logprobs.new_empty(len(STATS)),
    ),
    "policy",
    SCALAR_DTYPES,
    _policy_rules,
    _check_values,
    public=("policy_loss",),
)
# Results: loss [], slopes [T] in the log-probs and in the entropy ([T] or empty(0)), both still to be divided
# by the number of items, stats [STATS] with that number first.
value_fwd = Op(
    "value_fwd",
    ValueFwd,
    "(Tensor, Tensor, Tensor)",
    lambda a: (a.values.new_empty(()), torch.empty_like(a.values), a.values.new_empty(len(VALUE_STATS))),
    "policy",
    SCALAR_DTYPES,
    check=_check_values,
    public=("value_loss",),
)
# Results: loss [], slopes [T] before the division by items, stats [VALUE_STATS].
policy_bwd = Op(
    "policy_bwd",
    PolicyBwd,
    "(Tensor, Tensor)",
    lambda a: (torch.empty_like(a.slopes), torch.empty_like(a.entropy_slopes)),
    "policy",
    SCALAR_DTYPES,
    _bwd_rules,
)
# grad []: each slope times grad, divided by the number of items. Serves both losses.


class PolicyFunction(Function):
    names = "policy_loss"

    @staticmethod
    def forward(ctx, logprobs, entropy, a: PolicyFwd):
        loss, slopes, entropy_slopes, stats = policy_fwd(
            a._replace(logprobs=logprobs, entropy=entropy, with_entropy_grad=ctx.needs_input_grad[1])
        )
        ctx.save_for_backward(slopes, entropy_slopes, stats)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad, _):
        d_logprobs, d_entropy = policy_bwd(PolicyBwd(grad, *ctx.saved_tensors))
        return d_logprobs, d_entropy if ctx.needs_input_grad[1] else None


class ValueFunction(Function):
    names = "value_loss"

    @staticmethod
    def forward(ctx, values, a: ValueFwd):
        loss, slopes, stats = value_fwd(a._replace(values=values))
        ctx.save_for_backward(slopes, stats)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad, _):
        slopes, stats = ctx.saved_tensors
        return policy_bwd(PolicyBwd(grad, slopes, slopes.new_empty(0), stats))[0]
