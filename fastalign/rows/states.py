"""Rows whose logits come in parts of the vocabulary, one after another or on several ranks: the four verbs of
the row state. Push each part by itself, merge the states, finish them; then pull each part's gradient out of
the finished ones.

    parts = [push(spec, logits[..., a:b], start=a) for a, b in pieces]
    states = merge(parts)
    stats = finish(spec, states)                      # what token_stats(logits, ...) gives
    grads = [pull(spec, states, upstream, logits[..., a:b], start=a) for a, b in pieces]

Nothing here is differentiable by itself: who calls it has an autograd function of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_stats.contract import RowGradients, RowStatesMerge, TokenStatsBwd, TokenStatsFwd
from fastalign.ops.token_stats.op import (
    row_states_finish,
    row_states_merge,
    token_stats_bwd,
    token_stats_bwd_,
    token_stats_fwd,
)
from fastalign.rows.spec import RowSpec


class RowStates(NamedTuple):
    """state: [rows, STATE_WIDTH], the monoid of docs/mathematics.md. target: the labels' logits, [rows, K],
    with reference logits [2 rows, K] (the policy's, then the reference's); -inf where the part does not hold
    the label; empty(0) without labels. Both fp32 (fp64 for fp64 logits). A row that is not scored has the
    empty state and targets of -inf."""

    state: Tensor
    target: Tensor


def push(spec: RowSpec, logits: Tensor, ref_logits: Tensor | None = None, *, start: int = 0) -> RowStates:
    """The states of columns [start, start + V') of the rows, by themselves. They hold what `spec.outputs`
    need.

    logits, ref_logits: [..., V'], rows in the order of the spec; strides free but for a contiguous last dim
    and leading dims that collapse to two."""
    *_, state, target = token_stats_fwd(
        TokenStatsFwd(spec.rows(logits, ref_logits, start), spec.bits, None, None)
    )
    return RowStates(state, target.flatten(0, 1) if target.dim() > 2 else target)


def merge(parts: Sequence[RowStates]) -> RowStates:
    """The states of all parts, merged in the order given. One part stays as it is."""
    if len(parts) == 1:
        return parts[0]
    with_labels = parts[0].target.dim() > 1
    targets = torch.stack([part.target for part in parts]) if with_labels else None
    state, target = row_states_merge(RowStatesMerge(torch.stack([part.state for part in parts]), targets))
    return RowStates(state, target)


def finish(spec: RowSpec, states: RowStates) -> dict[str, Tensor]:
    """`spec.outputs` of finished rows by name, in the shape of the call; rows that are not scored give 0."""
    return spec.named(row_states_finish(spec.finishing(*states)))


def pull(
    spec: RowSpec,
    states: RowStates,
    upstream: RowGradients,
    logits: Tensor,
    ref_logits: Tensor | None = None,
    *,
    start: int = 0,
    inplace: bool = False,
) -> Tensor:
    """d loss / d logits of columns [start, start + V'), of the logits' shape and dtype: contiguous, or with
    `inplace` written over the logits. states: of the whole vocabulary. upstream: [rows] (g_logprob [rows, K])
    each; the reference is read for the gradients of the KLs only."""
    if upstream.g_kl_policy_ref is None and upstream.g_kl_ref_policy is None:
        ref_logits = None
    a = TokenStatsBwd(spec.rows(logits, ref_logits, start), states.state, upstream)
    if not inplace:
        return token_stats_bwd(a)
    token_stats_bwd_(a)
    return logits
