"""The definition of the pair kernel in plain PyTorch; the twin of csrc/math/pair.h, function by function."""

from __future__ import annotations

import math

import torch

from fastalign.ops.columns import (
    ALPHA,
    CHOSEN,
    DISCOPOP,
    EXO,
    EXP,
    HINGE,
    LINEAR,
    LOGODDS,
    LOGSIG,
    MEAN,
    NEGEXP,
    NO_LINK,
    REJECTED,
    ROBUST,
    SAVAGE,
    SEQ_MEAN,
    SIGMOID,
    SMOOTH,
    SOFT,
    SQUARED,
    SUM_LENGTH,
    SUM_POLICY,
    SUM_RATIO,
    SUM_SFT,
    SUM_SFT_LENGTH,
    SUM_WIDTH,
    TAB_CHOSEN,
    TAB_KL_CHOSEN,
    TAB_KL_REJECTED,
    TAB_NLL,
    TAB_PAIR,
    TAB_SFT,
    TOKEN_MEAN_GLOBAL,
    TRUNCQUAD,
)
from fastalign.ops.sequence_sum.reference import _segments, covered, segment_sums
from fastalign.ops.slopes import times_slope


def softplus(x):
    return torch.relu(x) + torch.log1p(torch.exp(-x.abs()))


def exp80(x):
    return torch.exp(torch.clamp(x, max=80.0))


def log1mexp(x):
    return torch.where(x < -math.log(2.0), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def transform(kind, a, alpha):
    """phi(a), phi'(a)."""
    if kind == LOGSIG:
        return -softplus(-a), torch.sigmoid(-a)
    if kind == NEGEXP:
        e = exp80(-a)
        return -e, e
    if kind == ALPHA:
        x = torch.clamp(-alpha * a, max=80.0)
        return -torch.expm1(x) / alpha, torch.exp(x)
    if kind == LOGODDS:
        held = a >= -1e-6
        x = torch.where(held, torch.full_like(a, -1e-6), a)
        return x - log1mexp(x), torch.where(held, torch.zeros_like(a), -1.0 / torch.expm1(x))
    return a, torch.ones_like(a)


def link(kind, h, t, tau, prob):
    """f(h), f'(h)."""
    if kind == HINGE:
        return torch.relu(t - h), torch.where(
            h < t, -torch.ones_like(h), torch.where(h == h, torch.zeros_like(h), h)
        )
    if kind == SQUARED:
        return (h - t) ** 2, 2 * (h - t)
    if kind == EXP:
        e = exp80(-h)
        return e, -e
    if kind == TRUNCQUAD:
        r = torch.relu(t - h)
        return r * r, -2 * r
    if kind == SAVAGE:
        s = torch.sigmoid(-h)
        return s * s, -2 * torch.sigmoid(h) * s * s
    if kind == SIGMOID:
        s = torch.sigmoid(-h)
        return s, -torch.sigmoid(h) * s
    if kind == LINEAR:
        return -h, -torch.ones_like(h)
    if kind == EXO:
        s, n, log_p, log_n = torch.sigmoid(h), torch.sigmoid(-h), torch.log(prob), torch.log1p(-prob)
        return s * (-softplus(-h) - log_p) + n * (-softplus(h) - log_n), s * n * (h - (log_p - log_n))
    if kind == DISCOPOP:
        x = h / tau
        s, n, soft = torch.sigmoid(x), torch.sigmoid(-x), softplus(-h)
        se, sne = exp80(-h - softplus(-x)), exp80(-h - softplus(-x) - softplus(x))
        return n * soft + se, -n * torch.sigmoid(-h) - se + (sne - s * n * soft) / tau
    return softplus(-h), -torch.sigmoid(-h)


def _pairs(pairs, count, device):
    return torch.arange(2 * count, device=device).view(count, 2) if pairs is None else pairs.long()


def _ranks(mask, cu_seqlens, index):
    """0-based position of each token among the scored tokens of its sequence."""
    before = torch.cumsum(mask, 0) - mask.long()
    return (
        before - before[cu_seqlens[:-1].long().clamp(0, mask.numel() - 1)][index] if mask.numel() else before
    )


def _tail_weights(p, before):
    """1 where `before` (the partner's length), ld_alpha beyond, in fp64: a Python float in torch.where would
    be rounded to fp32."""
    return torch.where(before, 1.0, torch.full((), p.ld_alpha, dtype=torch.float64, device=before.device))


def _token_terms(p, logprobs, ref_logprobs):
    """Each token's log-ratio and whether its gradient passes the clamp."""
    if p.reference:
        d = torch.where(logprobs == ref_logprobs, torch.zeros_like(logprobs), logprobs - ref_logprobs)
    else:
        d = logprobs
    outside = (d < p.token_clamp_low) | (d > p.token_clamp_high)
    return torch.clamp(d, p.token_clamp_low, p.token_clamp_high), ~outside


def pair_sums(p, t, count):
    """[P, 2, SUM_WIDTH]: per side the sums of lp, of the log-ratio, the length, the KL, the SFT log-probs and
    their number."""
    tokens, device = t.logprobs.shape[0], t.logprobs.device
    pairs = _pairs(t.pairs, count, device)
    index = _segments(t.cu_seqlens, tokens)
    scored = torch.ones(tokens, dtype=torch.bool, device=device) if t.mask is None else t.mask
    sequences = t.cu_seqlens.shape[0] - 1
    # A pair that names no sequence (its values are not looked at on a GPU) becomes NaN.
    known = ((pairs >= 0) & (pairs < sequences)).all(-1)
    pairs = pairs.clamp(0, max(sequences - 1, 0))

    def total(values, where):
        return segment_sums(torch.where(where, values, torch.zeros_like(values)), index, sequences)

    ratio, _ = _token_terms(p, t.logprobs, t.ref_logprobs)
    w = torch.ones_like(t.logprobs) if t.weights is None else t.weights
    lengths = total(torch.ones_like(t.logprobs), scored)
    plain = [total(w * t.logprobs, scored), total(w * ratio, scored)]
    kl_sums = torch.zeros_like(lengths) if t.kl is None else total(t.kl, scored)
    # With include_prompt every row but a sequence's last predicts something.
    row_before_last = (
        torch.arange(tokens, device=device) != t.cu_seqlens[1:].long()[index] - 1 if tokens else scored
    )
    sft_rows = row_before_last if p.sft_include_prompt else scored
    sft, sft_lengths = total(t.logprobs, sft_rows), total(torch.ones_like(t.logprobs), sft_rows)
    columns = torch.stack([*plain, lengths, kl_sums, sft, sft_lengths], -1)
    sums = (
        torch.where(known.view(-1, 1, 1), columns[pairs], torch.nan)
        if count
        else columns.new_zeros(0, 2, SUM_WIDTH)
    )
    if p.ld_alpha != 1.0:
        ranks = _ranks(scored, t.cu_seqlens, index)
        for side in (CHOSEN, REJECTED):
            partner = lengths[pairs[:, 1 - side]]
            own = index.unsqueeze(0) == pairs[:, side].unsqueeze(1)
            tail = _tail_weights(p, ranks.unsqueeze(0) < partner.unsqueeze(1)) * own
            for column, values in ((SUM_POLICY, w * t.logprobs), (SUM_RATIO, w * ratio)):
                kept = torch.where(scored, values, torch.zeros_like(values))
                sums[:, side, column] = (
                    (tail * torch.where(own, kept, torch.zeros_like(kept))).sum(-1).to(kept.dtype)
                )
    return sums


def _norm(length, kappa):
    return torch.clamp(length, min=1.0) ** kappa if kappa else torch.ones_like(length)


def evaluate_pairs(p, sums, given):
    """Value and slopes of every pair before the normalisers."""
    (_, d_w, n_w, kl_w, sft_w, _), (_, d_l, n_l, kl_l, _, _) = (s.unbind(-1) for s in sums.unbind(1))
    one = torch.ones_like(d_w)
    beta = one * (p.beta if given.beta is None else given.beta)
    beta_l = beta if math.isnan(p.beta_rejected) else one * p.beta_rejected
    soft_label = one if given.soft_labels is None else given.soft_labels
    target = p.target if given.target is None else given.target
    anchor = p.anchor if given.anchor is None else given.anchor
    norm_w, norm_l = _norm(n_w, p.length_norm), _norm(n_l, p.length_norm)
    a_w, a_l = d_w / norm_w, d_l / norm_l
    (g_w, dg_w), (g_l, dg_l) = (
        transform(p.transform, a_w, p.transform_alpha),
        transform(p.transform, a_l, p.transform_alpha),
    )

    margin = p.gamma + beta * p.gamma_beta_ratio - p.len_coef * (n_w - n_l)
    if given.gamma_ext is not None:
        margin = margin + given.gamma_ext
    if p.pos_penalty:
        margin = margin + beta * p.pos_penalty * torch.relu(-a_w)
    with_kl = p.kl_chosen != 0 or p.kl_rejected != 0
    if with_kl:
        margin = margin + beta * (p.kl_rejected * kl_l - p.kl_chosen * kl_w)
    h = beta * g_w - beta_l * g_l - margin

    loss, dh = torch.zeros_like(h), torch.zeros_like(h)
    if p.pair_weight:
        soft = one * soft_label if p.labels == SOFT else one * (1.0 - p.label_smoothing)
        c_pos, c_neg = one, 0.0 * one
        if p.link != EXO:  # exo takes the label as its target distribution instead
            if p.labels in (SMOOTH, SOFT):
                c_pos, c_neg = soft, 1.0 - soft
            elif p.labels == ROBUST:
                c_pos, c_neg = (
                    soft / (1 - 2 * p.label_smoothing),
                    -p.label_smoothing / (1 - 2 * p.label_smoothing) * one,
                )
        value, slope = link(p.link, h, target, p.tau, soft)
        loss, dh = c_pos * value, c_pos * slope
        back, back_slope = link(p.link, -h, target, p.tau, soft)
        loss = torch.where(c_neg == 0, loss, loss + c_neg * back)
        dh = torch.where(c_neg == 0, dh, dh - c_neg * back_slope)
        if p.label_entropy:
            loss = loss + torch.special.xlogy(soft, soft) + torch.special.xlogy(1 - soft, 1 - soft)
        loss, dh = loss * p.pair_weight, dh * p.pair_weight
    slope_w, slope_l = dh * beta * dg_w, -dh * beta_l * dg_l
    if p.pos_penalty:
        slope_w = slope_w + torch.where(a_w < 0, dh * beta * p.pos_penalty, torch.zeros_like(dh))

    if p.point_link != NO_LINK:
        beta_pt = beta if math.isnan(p.point_beta) else one * p.point_beta
        scale = beta_pt**p.point_beta_power if p.point_beta_power else one
        t_w, t_l = (
            (soft_label - 0.5, 0.5 - soft_label) if p.point_soft_target else (p.point_target, p.point_target)
        )
        u_w, u_l = beta_pt * g_w - anchor, beta_pt * g_l - anchor
        prob = one * (1.0 - p.label_smoothing)
        for k, sign, u, t, chosen in ((p.chosen_pos, 1, u_w, t_w, True), (p.chosen_neg, -1, u_w, t_w, True),
                                      (p.rejected_pos, 1, u_l, t_l, False), (p.rejected_neg, -1, u_l, t_l, False)):  # fmt: skip
            if k == 0:
                continue
            value, slope = link(p.point_link, sign * u, t, p.tau, prob)
            loss = loss + k * scale * value
            s = k * scale * sign * slope * beta_pt
            slope_w, slope_l = (slope_w + s * dg_w, slope_l) if chosen else (slope_w, slope_l + s * dg_l)

    weight = one if given.omega is None else one * given.omega
    loss = loss * weight
    slopes = [weight * slope_w / norm_w, weight * slope_l / norm_l, torch.zeros_like(h), torch.zeros_like(h)]
    if with_kl:
        slopes[TAB_KL_CHOSEN] = (
            torch.zeros_like(h) if p.detach_kl_chosen else weight * dh * beta * p.kl_chosen
        )
        slopes[TAB_KL_REJECTED] = -weight * dh * beta * p.kl_rejected
    ok = (n_w > 0) | (n_l > 0)
    if given.valid is not None:
        ok = ok & given.valid
    if p.drop_nonfinite:
        ok = ok & torch.isfinite(loss) & torch.isfinite(h)
        if p.sft_weight:
            ok = ok & torch.isfinite(sft_w)
    rewards = beta * (a_w + kl_w if with_kl else a_w), beta_l * (a_l + kl_l if with_kl else a_l)
    return loss, slopes, rewards, h, ok


def _one_if_zero(x):
    return torch.where(x > 0, x, torch.ones_like(x))


def table_from_sums(p, sums, given):
    loss, slopes, rewards, h, ok = evaluate_pairs(p, sums, given)
    zero = torch.zeros_like(loss)
    own_tokens = sums[:, CHOSEN, SUM_SFT_LENGTH]
    local = ok.to(loss.dtype).sum()
    pairs = local if given.num_items is None else given.num_items
    sft_tokens = (
        torch.where(ok, own_tokens, zero).sum() if given.num_sft_tokens is None else given.num_sft_tokens
    )
    pair_norm = _one_if_zero(pairs) if p.reduction == MEAN else torch.ones_like(local)
    if p.sft_norm == TOKEN_MEAN_GLOBAL:
        sft_norm = _one_if_zero(sft_tokens) + zero
    else:
        sft_norm = _one_if_zero(pairs) * (
            _one_if_zero(own_tokens) if p.sft_norm == SEQ_MEAN else torch.ones_like(zero)
        )
    if p.reduction != MEAN:
        sft_norm = sft_norm / _one_if_zero(local)

    def keep(x):
        return torch.where(ok, x, zero)

    nll = keep(p.sft_weight * -sums[:, CHOSEN, SUM_SFT] / sft_norm) if p.sft_weight else zero
    sft_slope = keep(-p.sft_weight / sft_norm) if p.sft_weight else zero
    table = torch.stack(
        [
            *(keep(s / pair_norm) for s in slopes),
            sft_slope,
            *rewards,
            h,
            ok.to(loss.dtype),
            keep(loss / pair_norm),
            nll,
        ],
        -1,
    )
    pair_loss = table[:, TAB_PAIR] + table[:, TAB_NLL]
    return pair_loss.sum(), pair_loss, table


def preference_fwd(a):
    sums = pair_sums(a.params, a.tokens, a.count) if a.sums is None else a.sums.clone()
    if not a.table:
        none = sums.new_empty(0)
        return none, none.clone(), none.clone(), sums
    return (*table_from_sums(a.params, sums, a.given), sums)


def preference_bwd(a):
    t, p = a.tokens, a.params
    tokens, device, count = t.logprobs.shape[0], t.logprobs.device, a.table.shape[0]
    pairs = _pairs(t.pairs, count, device)
    index = _segments(t.cu_seqlens, tokens)
    scored = torch.ones(tokens, dtype=torch.bool, device=device) if t.mask is None else t.mask
    zero = torch.zeros_like(t.logprobs)
    w = torch.ones_like(t.logprobs) if t.weights is None else t.weights
    _, is_open = _token_terms(p, t.logprobs, t.ref_logprobs)
    ranks = _ranks(scored, t.cu_seqlens, index) if p.ld_alpha != 1.0 else None
    row_before_last = (
        torch.arange(tokens, device=device) != t.cu_seqlens[1:].long()[index] - 1 if tokens else scored
    )
    sft_rows = row_before_last if p.sft_include_prompt else scored
    g = a.grad.expand(count)
    d_logprobs, d_kl = zero.clone(), zero.clone()
    for i in range(count):
        for side in (CHOSEN, REJECTED):
            own = index == pairs[i, side]
            tail = (
                torch.ones_like(w)
                if ranks is None
                else _tail_weights(p, ranks < a.sums[i, 1 - side, SUM_LENGTH]).to(w.dtype)
            )
            d_logprobs = d_logprobs + torch.where(
                own & scored & is_open,
                times_slope(times_slope(times_slope(g[i], a.table[i, TAB_CHOSEN + side]), tail), w),
                zero,
            )
            d_kl = d_kl + torch.where(own & scored, times_slope(g[i], a.table[i, TAB_KL_CHOSEN + side]), zero)
            if side == CHOSEN and p.sft_weight:
                d_logprobs = d_logprobs + torch.where(
                    own & sft_rows, times_slope(g[i], a.table[i, TAB_SFT]), zero
                )
    mine = covered(t.cu_seqlens, index)
    d_logprobs, d_kl = (torch.where(mine, d, torch.nan) for d in (d_logprobs, d_kl))
    return d_logprobs, d_kl if a.with_kl else zero.new_empty(0)
