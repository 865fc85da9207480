"""The definition of the row ops in plain PyTorch: any device, any float dtype. Makes [N, V] temporaries; the
kernels do not."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastalign.ops.columns import (
    COL_M,
    COL_REF_M,
    COL_REF_S0,
    COL_S0,
    COL_S1,
    COL_S2,
    COL_UMAX,
    STATE_WIDTH,
)
from fastalign.ops.slopes import times_slope
from fastalign.ops.token_stats.contract import OUTPUT_BITS, PER_LABEL, TokenStatsFwd
from fastalign.ops.token_stats.reference_states import empty_states, found_targets, merge_states
from fastalign.runtime import ffi

LN2 = math.log(2.0)
SUM_SHARE = 2.0**-24  # of the sum of the logits: what the state holds


def _capped(logits, cap_scale):
    """u of csrc/math/row_state.h in the accumulation dtype, as [rows, V]."""
    x = logits.reshape(-1, logits.shape[-1]).to(ffi.acc_dtype(logits.dtype))
    return torch.tanh(x * cap_scale) if cap_scale else x


def _scale(u, factor, temperature, temperature_tensor):
    """c: bits per unit of u, a 0-dim tensor in the accumulation dtype, formed by one division as in the
    kernels."""
    t = (
        torch.full((), temperature, dtype=u.dtype, device=u.device)
        if temperature_tensor is None
        else temperature_tensor
    )
    return torch.full((), factor, dtype=u.dtype, device=u.device) / t


def nats(logits, options, temperature_tensor):
    """z, of the logits' shape, in the accumulation dtype. options: RowOptions."""
    u = _capped(logits.reshape(-1, 1), options.cap_scale)
    c = _scale(u, options.factor, options.temperature, temperature_tensor)
    return (u * (c * LN2)).view(logits.shape)


def _select(mask_rows, value):
    """value where the row is scored, exactly 0 elsewhere (a selection: garbage in masked rows must not
    survive as NaN)."""
    return torch.where(mask_rows, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _scored_rows(rows, labels, mask, ignore_index, device):
    scored = torch.ones(rows, dtype=torch.bool, device=device) if mask is None else mask
    return scored if labels is None else scored & (labels != ignore_index).any(-1)


def _bits(u, umax, c):
    """w - max w in bits; the subtraction comes first (of halves, which no finite u overflows), so a common
    offset cancels exactly. -inf stays -inf, and so does a row of it."""
    peak = torch.where(torch.isneginf(umax), torch.zeros_like(umax), umax)
    return (0.5 * u - 0.5 * peak.unsqueeze(-1)) * c * 2.0


def _is_far(umax, c):
    """Rows whose sums count from max u * c itself, as rounding it would take off too much; see
    csrc/math/row_state.h."""
    limit = 2.0**59 if umax.dtype == torch.float64 else 2.0**30
    return torch.isfinite(umax) & ~((umax * c).abs() < limit)


def _cross_bits(u, m, umax, c):
    """fma(u, c, -m) as the kernels form it (in fp64 rounded twice), of far rows (u - umax) c; where the row
    has no mass (m = -inf) counted from 0."""
    peak = torch.where(torch.isneginf(m), torch.zeros_like(m), m)
    near = (u.double() * c.double() - peak.double().unsqueeze(-1)).to(u.dtype)
    return torch.where(_is_far(umax, c).unsqueeze(-1), _bits(u, umax, c), near)


def _row_states(u, c, scored, vocab_start, raw):
    raw = raw.reshape(u.shape)  # whose maximum `top` is: large logits are equal after tanh
    umax, top, largest = u.amax(-1), raw.argmax(-1), raw.amax(-1).to(u.dtype)
    # amax reports NaN as the maximum; the kernels' running max skips it and lets the sums carry the NaN. The
    # state's sums are NaN either way.
    d = _bits(u, umax, c)
    e = torch.exp2(d)
    s0 = e.sum(-1)
    s1 = torch.where(e == 0, torch.zeros_like(e), e * d).sum(-1)
    s2 = (e * e).sum(-1)
    # Move the sums from max(u) * c to its rounded value, which is what the kernels' fma(u, c, -m) counts
    # from.
    m = umax * c
    shift = _shift(umax, c, m)
    f = torch.exp2(shift)
    columns = [
        m,
        s0 * f,
        (s1 + shift * s0) * f,
        s2 * f * f,
        (u * SUM_SHARE).sum(-1),
        umax,
        (top + vocab_start).to(u.dtype),
        largest,
        scored.to(u.dtype),
    ]
    # A row of -inf has no mass (and no NaN yet: another shard may bring some).
    dead = torch.isneginf(umax)
    for i in (COL_S0, COL_S1, COL_S2):
        columns[i] = torch.where(dead, torch.zeros_like(columns[i]), columns[i])
    return torch.stack([*columns, *[torch.zeros_like(m)] * (STATE_WIDTH - COL_REF_M)], -1)


def _add_reference(state, u, ref_u, c, scored):
    """Fills the columns from COL_REF_M on: the reference row's m and s0, the sums over both rows, and its
    largest u if it is far."""
    row = _row_states(ref_u, c, scored, 0, ref_u)
    m, r0, ref_max = row[:, COL_M], row[:, COL_S0], row[:, COL_UMAX]
    d, dr = _cross_bits(u, state[:, COL_M], state[:, COL_UMAX], c), _cross_bits(ref_u, m, ref_max, c)
    sums = [
        torch.where(e == 0, torch.zeros_like(e), e * (d - dr)).sum(-1)
        for e in (torch.exp2(d), torch.exp2(dr))
    ]
    far_max = torch.where(_is_far(ref_max, c), ref_max, torch.zeros_like(ref_max))
    return torch.cat([state[:, :COL_REF_M], torch.stack([m, r0, *sums, far_max], -1)], -1)


def _local_targets(u, labels, counts, vocab_start):
    """Raw logit of each label that counts and lies in this part of the vocabulary, -inf for the others."""
    local = labels - vocab_start
    return torch.where(
        counts & (local >= 0) & (local < u.shape[1]), u.gather(-1, local.clamp(0, u.shape[1] - 1)), -math.inf
    )


def _is_mass(state):
    """The columns of the state that hold a row's mass, as a mask over columns."""
    column = torch.arange(state.shape[1], device=state.device)
    return (column == COL_S0) | (column == COL_REF_S0)


def _rounding(umax, c, m):
    """umax c - m: what rounding the reference point took."""
    return torch.where(
        torch.isfinite(m), umax.double() * c.double() - m.double(), torch.zeros_like(m, dtype=torch.double)
    ).to(umax.dtype)


def _shift(umax, c, m):
    """The largest element's distance from what the row's sums count from."""
    return torch.where(_is_far(umax, c), torch.zeros_like(m), _rounding(umax, c, m))


def _entropy(s0, s1, shift):
    """Exactly 0 where the largest element (`shift` from what the sums count from) has all the mass and every
    other one none at all."""
    one_hot = (s0 == torch.exp2(shift)) & (s1 == s0 * shift)
    return torch.where(one_hot, 0.0, torch.clamp(torch.log(s0) - LN2 * (s1 / s0), min=0.0))


def _bad_rows(labels, ignore_index, vocab_total):
    return ((labels != ignore_index) & ((labels < 0) | (labels >= vocab_total))).any(-1)


def _finish(a, state, target, c, scored):
    """The outputs asked for, in the order of OUTPUT_BITS. a: who says which, and knows the labels; target:
    [rows, K], with reference logits [2, rows, K]."""
    m, s0, s1, s2, sz, umax, top, _, _, rm, r0, t, tr, ref_max = state.unbind(-1)
    log_s0, log_ratio = torch.log(s0), torch.log(s0 / r0)
    far, shift = _is_far(umax, c), _shift(umax, c, m)
    peaked = s0 == torch.exp2(shift)  # the largest element has all the mass, to rounding

    def logprob(u, d, mass, far, largest):
        """Exactly 0 where the label has all the mass. Of far rows the difference of the logits goes into nats
        at once: bits may overflow first."""
        nats = torch.where(
            far.unsqueeze(-1), (0.5 * u - 0.5 * largest.unsqueeze(-1)) * (c * LN2) * 2.0, LN2 * d
        )
        lp = torch.where(
            torch.exp2(d) == mass.unsqueeze(-1), LN2 * (d - d), nats - torch.log(mass).unsqueeze(-1)
        )
        return torch.where(a.labels == a.ignore_index, 0.0, torch.clamp(lp, max=0.0))

    def kl(value):
        eps = torch.finfo(state.dtype).eps
        return torch.where(
            peaked & (value < 2.0 * eps * (1.0 + log_ratio.abs())), 0.0, torch.clamp(value, min=0.0)
        )

    policy_target, ref_target = target if target.dim() == 3 else (target, target)
    finished = {
        "logprob": lambda: logprob(
            policy_target, _bits(policy_target, umax, c) + shift.unsqueeze(-1), s0, far, umax
        ),
        "entropy": lambda: _entropy(s0, s1, shift),
        "logsumexp": lambda: torch.where(far, umax * (c * LN2), LN2 * m) + log_s0,
        "log_sum_sq_probs": lambda: torch.clamp(torch.log(s2) - 2 * log_s0, max=0.0),
        "mean_logit": lambda: sz / a.vocab_total / SUM_SHARE * (c * LN2),
        "is_top1": lambda: torch.where(torch.isnan(s0), s0, (top == a.labels[:, 0]).to(state.dtype)),
        "ref_logprob": lambda: logprob(
            ref_target, _cross_bits(ref_target, rm, ref_max, c), r0, _is_far(ref_max, c), ref_max
        ),
        "kl_policy_ref": lambda: kl(LN2 * (t / s0) - log_ratio),
        "kl_ref_policy": lambda: kl(log_ratio - LN2 * (tr / r0)),
    }
    results = [state.new_empty(0)] * len(OUTPUT_BITS)
    for i, (name, bit) in enumerate(OUTPUT_BITS.items()):
        if a.outputs & bit:
            results[i] = _select(scored.unsqueeze(-1) if name in PER_LABEL else scored, finished[name]())
    return results


class _Finishing(NamedTuple):
    """What `_finish` reads of the arguments of token_stats_fwd."""

    labels: torch.Tensor | None
    ignore_index: int
    vocab_total: int
    outputs: int


def token_stats_fwd(a):
    r = a.rows
    u = _capped(r.logits, r.cap_scale)
    ref_u = None if r.ref_logits is None else _capped(r.ref_logits, r.cap_scale)
    c = _scale(u, r.factor, r.temperature, r.temperature_tensor)
    scored = _scored_rows(u.shape[0], r.labels, r.mask, r.ignore_index, u.device)
    state = _row_states(u, c, scored, r.vocab_start, r.logits)
    if ref_u is not None:
        state = _add_reference(state, u, ref_u, c, scored)
    if a.state_in is not None:
        state = merge_states(a.state_in, state)
    target = u.new_empty(0)
    if r.labels is not None:
        counts = scored.unsqueeze(-1) & (r.labels != r.ignore_index)
        target = _local_targets(u, r.labels, counts, r.vocab_start)
        if ref_u is not None:
            target = torch.stack([target, _local_targets(ref_u, r.labels, counts, r.vocab_start)])
        if a.target_in is not None:
            target = found_targets(a.target_in, target)
        bad = _bad_rows(r.labels, r.ignore_index, r.vocab_total)
        state = torch.where(bad.unsqueeze(-1) & _is_mass(state), math.nan, state)
    state = torch.where(scored.unsqueeze(-1), state, empty_states(state, ref_u is not None))
    given = _Finishing(r.labels, r.ignore_index, r.vocab_total, a.outputs)
    results = _finish(given, state, target, c, scored)
    return (*results, state, target)


def row_states_merge(a):
    state = a.states[0]
    for part in a.states[1:]:
        state = merge_states(state, part)
    target = state.new_empty(0)
    if a.targets is not None:
        target = a.targets[0]
        for part in a.targets[1:]:
            target = found_targets(target, part)
    return state.clone(), target.clone()


def row_states_finish(a):
    state = a.state
    scored = _scored_rows(state.shape[0], a.labels, a.mask, a.ignore_index, state.device)
    if a.labels is not None:
        bad = _bad_rows(a.labels, a.ignore_index, a.vocab_total)
        state = torch.where(bad.unsqueeze(-1) & _is_mass(state), math.nan, state)
    target = state.new_empty(0) if a.target is None else a.target
    if len(target) > len(state):
        target = target.view(2, *a.labels.shape)
    return tuple(
        _finish(a, state, target, _scale(state, a.factor, a.temperature, a.temperature_tensor), scored)
    )


def _gradient(r, state, g):
    u = _capped(r.logits, r.cap_scale)
    c = _scale(u, r.factor, r.temperature, r.temperature_tensor)
    m, s0, s1, _, _, umax, _, _, _, rm, r0, t, _, ref_max = state.unbind(-1)
    zero = torch.zeros_like(s0)
    each = (
        None
        if g.g_logprob is None
        else torch.where(r.labels == r.ignore_index, torch.zeros_like(g.g_logprob), g.g_logprob)
    )
    g_lp = zero if each is None else each.sum(-1)
    g_h = zero if g.g_entropy is None else g.g_entropy
    g_lse = zero if g.g_logsumexp is None else g.g_logsumexp
    # Same exponent as the forward: relative to max(u), moved to the rounded reference point.
    shift = _shift(umax, c, m)
    log2p = _bits(u, umax, c) + (shift - torch.log2(s0)).unsqueeze(-1)
    peaked = s0 == torch.exp2(shift)
    # A single element with all the mass: its probability is 1 to the bit.
    log2p = torch.where(peaked.unsqueeze(-1) & (u == umax.unsqueeze(-1)), 0.0, log2p)
    p = torch.exp2(log2p)
    a = g_lse - g_lp - torch.where(g_h == 0, zero, g_h * _entropy(s0, s1, shift))
    p_log_p = torch.where((p == 0) | (g_h == 0).unsqueeze(-1), torch.zeros_like(p), p * log2p * LN2)
    dz = p * a.unsqueeze(-1) - p_log_p * g_h.unsqueeze(-1)
    defined = s0 > 0
    if r.ref_logits is not None:
        g_p, g_r = (zero if g is None else g for g in (g.g_kl_policy_ref, g.g_kl_ref_policy))
        with_kl = (g_p != 0) | (g_r != 0)
        defined &= (~with_kl | (r0 > 0)) & ((g_p == 0) | torch.isfinite(t))
        d, dr = _cross_bits(u, m, umax, c), _cross_bits(_capped(r.ref_logits, r.cap_scale), rm, ref_max, c)
        e, er = torch.exp2(d), torch.exp2(dr)
        reverse = torch.where(
            (e == 0) | (g_p == 0).unsqueeze(-1), torch.zeros_like(e), e * (d - dr - (t / s0).unsqueeze(-1))
        )
        forward = torch.where((g_r == 0).unsqueeze(-1), torch.zeros_like(e), e - er * (s0 / r0).unsqueeze(-1))
        kl = reverse * (g_p * LN2 / s0).unsqueeze(-1) + forward * (g_r / s0).unsqueeze(-1)
        dz = dz + torch.where(with_kl.unsqueeze(-1), kl, torch.zeros_like(kl))
    if each is not None:
        local = r.labels - r.vocab_start
        here = (local >= 0) & (local < u.shape[1])
        dz = dz.scatter_add(
            -1, local.clamp(0, u.shape[1] - 1), torch.where(here, each, torch.zeros_like(each))
        )
    slope = c * LN2
    if r.cap_scale:
        slope = slope * r.cap_scale * (1 - u * u)
    dx = dz * slope
    # -inf logits: probability 0, gradient 0 (also where the target sits on one); a row without any mass, or
    # with NaN: NaN.
    dx = torch.where(torch.isneginf(u), torch.zeros_like(dx), dx)
    dx = torch.where(defined.unsqueeze(-1), dx, torch.full_like(dx, math.nan))
    scored = _scored_rows(u.shape[0], r.labels, r.mask, r.ignore_index, u.device)
    return _select(scored.unsqueeze(-1), dx).to(r.logits.dtype).view(r.logits.shape)


def token_stats_bwd(a):
    return _gradient(a.rows, a.state, a.upstream)


def token_stats_bwd_(a):
    a.rows.logits.copy_(_gradient(a.rows, a.state, a.upstream))


def token_stats_fused(a):
    *results, state, _ = token_stats_fwd(TokenStatsFwd(a.rows, a.outputs, None, None))
    return *results, _gradient(a.rows, state, a.upstream)


def token_stats_fused_(a):
    *results, grad = token_stats_fused(a)
    a.rows.logits.copy_(grad)
    return tuple(results)


def scale_rows_(a):
    a.x.copy_(times_slope(a.scale, a.x.to(a.scale.dtype)))
