"""The exact KL between two models' rows from their hidden states, as a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.token_stats.fused import DIRECTIONS
from fastalign.rows.kl import TokenKLLoss, row_coefficients
from fastalign.rows.known import Chunk, KnownLoss, KnownLossFunction, chunks_of
from fastalign.rows.linear import linear_head, split_options
from fastalign.rows.stats import TokenStats
from fastalign.runtime.checks import check_choice


def linear_token_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    coef: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: str = "policy_ref",
    mask: Tensor | None = None,
    **options: Any,
) -> TokenKLLoss:
    """sum over rows of coef * KL between p = softmax(hidden weight^T + bias) and q, the same of the reference
    (or the teacher, whose width may be another): `token_kl_loss` without any logits.

    Both rows' logits exist a chunk at a time, and the gradient of hidden, weight and bias is made with them:
    4 products (two towers forward, two back) where recomputing takes 6.

    Args:
        hidden (..., H), weight [V, H], bias [V]; ref_hidden (..., H'), ref_weight [V, H'] (None: the policy's
            weight and bias), ref_bias [V]: as in `linear_token_stats`. The reference is a constant.
        coef: (...), the weight of each row, or 0-dim for all. A constant. Not read in masked rows.
        direction: "policy_ref", KL(p || q), or "ref_policy", KL(q || p). mask: (...) bool.
        options: temperature, logit_scale, softcap (both models'), head_precision, workspace_bytes,
            batch_invariant, host_counts, tp_group, as in `linear_token_stats`.

    Returns:
        TokenKLLoss: loss, a scalar; kl, (...) without gradient. fp32 (fp64 for fp64 hidden).

    Raises:
        ValueError, TypeError: as `linear_token_stats` and `token_kl_loss`.
    """
    check_choice("direction", direction, tuple(DIRECTIONS))
    name = DIRECTIONS[direction]
    head_options, unknown = split_options(options)
    if unknown:
        raise TypeError(
            f"linear_token_kl_loss has no option {', '.join(unknown)}; legal: "
            f"{', '.join(head_options._fields)}"
        )
    head = linear_head(
        hidden, weight, bias, (ref_hidden, ref_weight, ref_bias), None, mask, (name,), head_options
    )
    spec, call = head.call(known=True)
    weights = row_coefficients(coef, spec.shape, hidden, call.precision.acc)

    def part(chunk: Chunk, stats: TokenStats) -> Tensor:
        kl = getattr(stats, name) * weights[chunk.tokens]
        return (kl if spec.mask is None else torch.where(spec.mask[chunk.tokens], kl, 0.0)).sum()

    everything = Chunk(*(slice(0, call.hidden.shape[0]) for _ in Chunk._fields))
    if call.plan.kind != "known":
        kl = getattr(head.run(spec, call), name)
        return TokenKLLoss(part(everything, TokenStats(**{name: kl.reshape(-1)})), kl.detach())
    seen = []

    def whole(stats: TokenStats) -> Tensor:
        seen.append(getattr(stats, name))
        return part(everything, stats)

    loss = KnownLossFunction.apply(
        call.hidden, head.weight, head.bias, call, KnownLoss(chunks_of(call, None), part, whole)
    )
    return TokenKLLoss(loss, seen[0].view(spec.shape))
