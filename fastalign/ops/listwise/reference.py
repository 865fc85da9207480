"""The definition of the list kernel in plain PyTorch; the twin of csrc/math/list.h. Lists are padded to [L,
MAX_LIST]."""

from __future__ import annotations

import torch

from fastalign.ops.columns import (
    GAIN_LAMBDA,
    INFONCA,
    MAX_LIST,
    MEAN,
    NCA,
    PAIRWISE,
    PLACKETT_LUCE,
    PRO,
    SEQ_MEAN,
    SUM_LENGTH,
    SUM_POLICY,
    SUM_RATIO,
    TOKEN_MEAN_GLOBAL,
)
from fastalign.ops.preference.reference import link, softplus


def _padded(list_offsets, sequences, width):
    """Sequence numbers [L, width] of every list, which of them exist, and which lists no kernel can serve."""
    begin, end = list_offsets[:-1].long(), list_offsets[1:].long()
    broken = (begin < 0) | (end < begin) | (end > sequences) | (end - begin > width)
    broken[:1] |= begin[:1] != 0
    broken[-1:] |= end[-1:] != sequences
    index = begin.unsqueeze(1) + torch.arange(width, device=list_offsets.device)
    live = (index < end.unsqueeze(1)) & (index >= 0) & (index < sequences)
    return torch.where(live, index, sequences), live, broken


def _logsumexp(x, where):
    """Over the last dim, of the entries in `where`; 0 where there is none."""
    m = torch.where(where, x, -torch.inf).amax(-1, keepdim=True)
    total = torch.where(where, torch.exp(x - m), torch.zeros_like(x)).sum(-1)
    return torch.where(where.any(-1), m.squeeze(-1) + torch.log(total), torch.zeros_like(total))


def evaluate_lists(p, s, r, live):
    """Term and slopes in s of every list, before list_weight; s, r, live: [L, K]."""
    zero = torch.zeros_like(s)

    def keep(x, where=live):
        return torch.where(where, x, torch.zeros_like(x))

    def total(x, where=live):
        return keep(x, where).sum(-1)

    both = live.unsqueeze(2) & live.unsqueeze(1)
    above = both & (r.unsqueeze(2) > r.unsqueeze(1))  # [L, i, j]: i has the higher score
    index = torch.arange(s.shape[1], device=s.device)
    in_order = above | (
        both & (r.unsqueeze(2) == r.unsqueeze(1)) & (index.unsqueeze(1) <= index)
    )  # i is ranked before j, or is j
    s_i, s_j = s.unsqueeze(2).expand(both.shape), s.unsqueeze(1).expand(both.shape)
    if p.kind == PLACKETT_LUCE:
        tail = _logsumexp(s_j, in_order)
        share = torch.where(in_order, torch.exp(s_j - tail.unsqueeze(2)), torch.zeros_like(s_j))
        return total(tail - s), keep(share.sum(1) - 1.0)
    if p.kind == PRO:
        lowest = torch.where(live, r, torch.inf).amin(-1, keepdim=True)
        own = r - lowest
        contrast = keep(r.unsqueeze(2) - r.unsqueeze(1), above)  # T of j in the term of i
        factor = contrast + torch.diag_embed(own)
        member = above | (torch.diag_embed(keep(own)) > 0)
        z = keep(s_j * factor, member)
        lse = _logsumexp(z, member)
        has_term = live & (own > 0)
        share = torch.where(
            member & has_term.unsqueeze(2), torch.exp(z - lse.unsqueeze(2)), torch.zeros_like(z)
        )
        return total(lse - s * own, has_term), keep((share * factor).sum(1) - keep(own, has_term))
    if p.kind == PAIRWISE:
        gain = torch.ones_like(s_i)
        if p.pair_gain == GAIN_LAMBDA:
            higher = both & ((s_j > s_i) | ((s_j == s_i) & (index < index.unsqueeze(1))))
            discount = 1.0 / torch.log1p(1.0 + higher.sum(-1).to(s.dtype))
            label = torch.exp2(r)
            gain = (label.unsqueeze(2) - label.unsqueeze(1)).abs() * (
                discount.unsqueeze(2) - discount.unsqueeze(1)
            ).abs()
        value, slope = link(p.link, s_i - s_j, p.target, 1.0, torch.full_like(s_i, 0.5))
        value, slope = keep(gain * value, above), keep(gain * slope, above)
        norm = (
            torch.clamp(above.sum((1, 2)), min=1).to(s.dtype) if p.pair_mean else torch.ones_like(zero[:, 0])
        )
        return value.sum((1, 2)) / norm, (slope.sum(2) - slope.sum(1)) / norm.unsqueeze(1)
    scaled = r / p.reward_temperature
    log_p = scaled - _logsumexp(scaled, live).unsqueeze(1)
    prob = keep(torch.exp(log_p))
    if p.kind == NCA:
        count = torch.clamp(live.sum(-1, keepdim=True), min=1).to(s.dtype)
        value = torch.where(prob > 0, prob * softplus(-s), zero) + softplus(s) / count
        return total(value), keep(torch.sigmoid(s) / count - prob * torch.sigmoid(-s))
    log_q = s - _logsumexp(s, live).unsqueeze(1)
    q = keep(torch.exp(log_q))
    if p.kind == INFONCA:
        return total(torch.where(prob == 0, zero, -prob * log_q)), keep(q - prob)
    gap = torch.where(q == 0, zero, log_q - log_p)
    value = total(q * gap)
    return value, keep(q * (gap - value.unsqueeze(1)))


def _one_if_zero(x):
    return torch.where(x > 0, x, torch.ones_like(x))


def listwise_fwd(a):
    p, given = a.params, a.given
    sequences, lists = a.sums.shape[0], a.list_offsets.shape[0] - 1
    index, live, broken = _padded(a.list_offsets, sequences, MAX_LIST)

    def pick(column):
        """[S] -> [L, K], 0 beyond the end of a list."""
        return torch.cat([column, column.new_zeros(1)])[index]

    def each(values):
        """[L, K] -> [S], NaN where no list has a place for the sequence."""
        out = values.new_full((sequences + 1,), torch.nan)
        return out.index_put((index.flatten(),), values.flatten())[:sequences]

    policy, ratio, length = (pick(a.sums[:, c]) for c in (SUM_POLICY, SUM_RATIO, SUM_LENGTH))
    r = pick(a.scores)
    beta = (
        torch.full_like(ratio[:, :1], p.beta)
        if given.beta is None
        else given.beta.reshape(-1, 1).expand(lists, 1)
    )
    norm = torch.clamp(length, min=1.0) ** p.length_norm if p.length_norm else torch.ones_like(length)
    s = beta * (ratio / norm)
    value, slope = evaluate_lists(p, s, r, live)
    value, slope = p.list_weight * value, p.list_weight * slope * beta / norm
    if p.list_weight == 0:
        value, slope = torch.zeros_like(value), torch.zeros_like(slope)
    unusable = broken | (live & ~torch.isfinite(r)).any(-1)
    value = torch.where(unusable, torch.nan, value)

    # First and last in the order of the scores; equal scores in the order of the list.
    order = torch.where(live, r, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    count = live.sum(-1)
    best = order[:, 0]
    worst = order.gather(1, torch.clamp(count - 1, min=0).unsqueeze(1)).squeeze(1)
    at_best = torch.arange(MAX_LIST, device=best.device) == best.unsqueeze(1)
    tokens, best_sum = (x.gather(1, best.unsqueeze(1)).squeeze(1) for x in (length, policy))

    ok = ((length > 0) & live).any(-1)
    if p.drop_nonfinite:
        ok = ok & torch.isfinite(value) & (torch.isfinite(s) | ~live).all(-1)
        if p.sft_weight:
            ok = ok & torch.isfinite(best_sum)
    ok = ok | broken
    local = ok.to(value.dtype).sum()
    items = local if given.num_items is None else given.num_items
    sft_tokens = (
        torch.where(ok, tokens, torch.zeros_like(tokens)).sum()
        if given.num_sft_tokens is None
        else given.num_sft_tokens
    )
    norm = _one_if_zero(items) if p.reduction == MEAN else torch.ones_like(local)
    if p.sft_norm == TOKEN_MEAN_GLOBAL:
        sft_norm = _one_if_zero(sft_tokens) + torch.zeros_like(tokens)
    else:
        sft_norm = _one_if_zero(items) * (
            _one_if_zero(tokens) if p.sft_norm == SEQ_MEAN else torch.ones_like(tokens)
        )
    if p.reduction != MEAN:
        sft_norm = sft_norm / _one_if_zero(local)
    zero = torch.zeros_like(value)
    factor = (
        p.sft_weight * torch.clamp(count - 1, min=0).to(value.dtype) ** p.sft_power / sft_norm
        if p.sft_weight
        else zero
    )
    nll = torch.where(ok, -factor * best_sum, zero) if p.sft_weight else zero
    term = torch.where(ok, value / norm, zero)
    slope = slope / norm - torch.where(at_best, factor.unsqueeze(1), torch.zeros_like(slope))
    slope = torch.where(ok.unsqueeze(1), slope, torch.zeros_like(slope))
    slope = torch.where((unusable & ok).unsqueeze(1), torch.nan, slope)

    above = live.unsqueeze(2) & live.unsqueeze(1) & (r.unsqueeze(2) > r.unsqueeze(1))
    difference = s.unsqueeze(2) - s.unsqueeze(1)
    right = above & (difference > 0)
    pairs, correct = above.sum((1, 2)).to(value.dtype), right.sum((1, 2)).to(value.dtype)
    margin = torch.where(above, difference, torch.zeros_like(difference)).sum((1, 2))
    top = (above == right)[torch.arange(lists, device=best.device), best].all(-1) & (pairs > 0)
    table = torch.stack([term, nll, ok.to(value.dtype), pairs, correct, margin, top.to(value.dtype), best.to(value.dtype),
                         worst.to(value.dtype)], -1)  # fmt: skip
    list_loss = term + nll
    return list_loss.sum(), list_loss, each(slope), each(s), table
