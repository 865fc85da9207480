"""Policy losses from hidden states and the LM head's weight: a chunk of tokens or sequences has logits at a
time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.losses.policy import PolicyPreset, resolve
from fastalign.ops.columns import POLICY_ITEMS
from fastalign.policy.loss import per_token_or_sequence, policy_loss
from fastalign.policy.output import PolicyOutput
from fastalign.rows.known import Chunk, KnownLoss, KnownLossFunction, chunks_of
from fastalign.rows.linear import linear_head, split_options
from fastalign.rows.stats import TokenStats
from fastalign.runtime.checks import check_cu_seqlens, row_mask


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    loss: str | PolicyPreset = "ppo",
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    num_items: float | Tensor | None = None,
    is_weight: Tensor | None = None,
    with_entropy: bool = False,
    **options: Any,
) -> PolicyOutput:
    """`policy_loss` of `linear_token_stats(hidden, weight, labels, ...)`, value and gradients.

    What the loss is divided by is known beforehand, so a token's slope follows from that token (or, where a
    loss looks at sequences, from its sequence): the gradient of a chunk is made while its logits are there,
    with 3 products instead of 4. A sequence longer than the workspace has rows is multiplied again for its
    gradient.

    Args:
        hidden: [T, H]; weight: [V, H]; bias: [V]; labels: [T], as in `linear_token_stats`.
        old_logprobs, advantages, loss, cu_seqlens, ref_logprobs, num_items, is_weight: as in `policy_loss`.
        mask: [T] bool, the response tokens; None: the rows whose label is not ignored.
        with_entropy: compute the policy's entropy for the metrics; an entropy_coef asks for it by itself.
        options: those of `linear_token_stats` (temperature, logit_scale, softcap, ignore_index,
            head_precision, workspace_bytes, batch_invariant, host_counts, tp_group) by name; all others go to
            `policy_loss`.

    Returns:
        PolicyOutput.

    Raises:
        ValueError, TypeError, IndexError: as both.
    """
    head_options, options = split_options(options)
    if "entropy" in options:
        raise TypeError("entropy is made from hidden here: with_entropy=True or an entropy_coef asks for it")
    preset, coefficients = resolve(
        loss, {name: value for name, value in options.items() if value is not None}
    )
    with_bonus = "entropy_coef" in coefficients or preset.entropy_coef != 0
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        raise ValueError("labels must be a tensor of integers, [T]")
    scored = labels != head_options.ignore_index
    mask = scored if mask is None else row_mask(mask, labels) & scored
    outputs = ("logprob", "entropy") if with_bonus or with_entropy else ("logprob",)
    head = linear_head(hidden, weight, bias, (None, None, None), labels, mask, outputs, head_options)
    differentiable = ("logprob", "entropy") if with_bonus else ("logprob",)
    arguments = {
        "loss": loss,
        "mask": mask,
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "ref_logprobs": ref_logprobs,
        "is_weight": is_weight,
        "cu_seqlens": cu_seqlens,
        "num_items": num_items,
        **options,
    }

    def of(stats: TokenStats, **changes: Any) -> PolicyOutput:
        return policy_loss(stats.logprob, entropy=stats.entropy, **arguments | changes)

    zeros = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    at_zero = of(
        TokenStats(logprob=zeros, entropy=zeros if len(outputs) > 1 else None)
    )  # raises what is to be raised
    by_sequence = preset.needs_sequences or preset.needs_sequence_values
    spec, call = head.call(differentiable, known=head.counts() or not by_sequence)
    if call.plan.kind != "known":
        return of(head.run(spec, call))

    known = (
        {}
        if num_items is not None or preset.aggregation == "token_sum"
        else {"num_items": at_zero.stats[POLICY_ITEMS]}
    )
    borders = check_cu_seqlens(cu_seqlens, labels).tolist() if by_sequence else None
    per_unit = {
        name: _per_unit(name, arguments[name], labels, cu_seqlens, preset)
        for name in ("advantages", "is_weight")
    }
    outcome = []

    def part(chunk: Chunk, stats: TokenStats) -> Tensor:
        own = {
            name: arguments[name][chunk.tokens]
            for name in ("mask", "old_logprobs", "ref_logprobs")
            if arguments[name] is not None
        }
        for name, (value, is_per_sequence) in per_unit.items():
            own[name] = None if value is None else value[chunk.units if is_per_sequence else chunk.tokens]
        if by_sequence:
            first, end = chunk.units.start, chunk.units.stop
            own["cu_seqlens"] = cu_seqlens[first : end + 1] - cu_seqlens[first]
        else:
            own["cu_seqlens"] = None
        return of(stats, **known | own).loss

    def whole(stats: TokenStats) -> Tensor:
        outcome.append(of(stats))
        return outcome[0].loss

    value = KnownLossFunction.apply(
        call.hidden, head.weight, head.bias, call, KnownLoss(chunks_of(call, borders), part, whole)
    )
    return outcome[0]._replace(loss=value)


def _per_unit(
    name: str, value: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, preset: PolicyPreset
) -> tuple[Tensor | None, bool]:
    """Advantages or importance weights, and whether they are one per sequence: where the loss does not ask
    for that they are spread over the tokens, since a chunk may hold as many sequences as tokens."""
    if value is None:
        return None, False
    like = torch.empty(
        labels.shape,
        dtype=torch.float64 if value.dtype == torch.float64 else torch.float32,
        device=labels.device,
    )
    value, is_per_sequence = per_token_or_sequence(name, value, like, cu_seqlens, preset)
    if is_per_sequence and not preset.needs_sequence_values:
        lengths = cu_seqlens.diff().long()
        return value.repeat_interleave(lengths, output_size=labels.shape[0]), False
    return value, is_per_sequence
