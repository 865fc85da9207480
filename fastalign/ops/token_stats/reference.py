"""The definition of the row ops in plain PyTorch: any device, any float dtype. Makes [N, V] temporaries; the kernels do not."""

from __future__ import annotations

import math

import torch

from fastalign import ffi

LN2 = math.log(2.0)


def _capped(logits, cap_scale):
    """u of csrc/math/row_state.h in the accumulation dtype, as [rows, V]."""
    x = logits.reshape(-1, logits.shape[-1]).to(ffi.acc_dtype(logits.dtype))
    return torch.tanh(x * cap_scale) if cap_scale else x


def _scale(u, factor, temperature, temperature_tensor):
    """c: bits per unit of u, a 0-dim tensor in the accumulation dtype, formed by one division as in the kernels."""
    t = torch.tensor(temperature, dtype=u.dtype, device=u.device) if temperature_tensor is None else temperature_tensor
    return torch.tensor(factor, dtype=u.dtype, device=u.device) / t


def _select(mask_rows, value):
    """value where the row is scored, exactly 0 elsewhere (a selection: garbage in masked rows must not survive as NaN)."""
    return torch.where(mask_rows, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _scored_rows(rows, labels, mask, ignore_index, device):
    scored = torch.ones(rows, dtype=torch.bool, device=device) if mask is None else mask
    return scored if labels is None else scored & (labels != ignore_index).any(-1)


def _bits(u, umax, c):
    """w - max w in bits; the subtraction comes first, so a common offset cancels exactly. -inf stays -inf, and so does a row of it."""
    peak = torch.where(torch.isneginf(umax), torch.zeros_like(umax), umax)
    return (u - peak.unsqueeze(-1)) * c


def merge_states(a, b):
    """The monoid on states [rows, STATE_WIDTH]: the twin of `merge` in csrc/math/row_state.h."""
    (ma, a0, a1, a2, az, ua, ta), (mb, b0, b1, b2, bz, ub, tb) = a.unbind(-1)[:7], b.unbind(-1)[:7]
    m = torch.maximum(ma, mb)
    fa, fb = (torch.where(x == m, 1.0, torch.exp2(x - m)) for x in (ma, mb))

    def moved(x, s0, s1):
        return s1 + torch.where((x == m) | (s0 == 0), 0.0, (x - m) * s0)

    take_b = (ub > ua) | ((ub == ua) & (tb >= 0) & ((ta < 0) | (tb < ta)))
    columns = [
        m, a0 * fa + b0 * fb, moved(ma, a0, a1) * fa + moved(mb, b0, b1) * fb, a2 * fa * fa + b2 * fb * fb, az + bz,
        torch.where(take_b, ub, ua), torch.where(take_b, tb, ta), torch.maximum(a[:, 7], b[:, 7]),
    ]  # fmt: skip
    return torch.cat([torch.stack(columns, -1), torch.zeros_like(a[:, len(columns) :])], -1)


def _row_states(u, c, scored, vocab_start):
    umax, top = u.max(-1) if u.shape[0] else (u.new_empty(0), torch.empty(0, dtype=torch.int64, device=u.device))
    # max() reports NaN as the maximum; the kernels' running max skips it and lets the sums carry the NaN. The state's sums are NaN either way.
    d = _bits(u, umax, c)
    e = torch.exp2(d)
    s0 = e.sum(-1)
    s1 = torch.where(e == 0, torch.zeros_like(e), e * d).sum(-1)
    s2 = (e * e).sum(-1)
    # Move the sums from max(u) * c to its rounded value, which is what the kernels' fma(u, c, -m) counts from.
    m = umax * c
    shift = torch.where(torch.isfinite(m), umax.double() * c.double() - m.double(), torch.zeros_like(m, dtype=torch.double)).to(u.dtype)
    f = torch.exp2(shift)
    columns = [m, s0 * f, (s1 + shift * s0) * f, s2 * f * f, u.sum(-1), umax, (top + vocab_start).to(u.dtype), scored.to(u.dtype)]
    # A row of -inf has no mass (and no NaN yet: another shard may bring some).
    dead = torch.isneginf(umax)
    for i in (1, 2, 3):
        columns[i] = torch.where(dead, torch.zeros_like(columns[i]), columns[i])
    return torch.stack([*columns, *[torch.zeros_like(m)] * 4], -1)


def token_stats_fwd(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, vocab_start, vocab_total,
                    state_in, target_in):  # fmt: skip
    u = _capped(logits, cap_scale)
    c = _scale(u, factor, temperature, temperature_tensor)
    rows, vocab = u.shape
    scored = _scored_rows(rows, labels, mask, ignore_index, u.device)
    state = _row_states(u, c, scored, vocab_start)
    if state_in is not None:
        state = merge_states(state_in, state)
    target = u.new_empty(0)
    if labels is not None:
        local = labels - vocab_start
        here = (local >= 0) & (local < vocab)
        target = torch.where(here, u.gather(-1, local.clamp(0, vocab - 1)), -math.inf)
        if target_in is not None:
            target = torch.maximum(target, target_in)
        bad = ((labels != ignore_index) & ((labels < 0) | (labels >= vocab_total))).any(-1)
        state = torch.where((bad.unsqueeze(-1)) & (torch.arange(state.shape[1], device=u.device) == 1), math.nan, state)
    m, s0, s1, s2, sz, umax, top = state.unbind(-1)[:7]
    log_s0 = torch.log(s0)
    results = []
    if outputs & 1:
        d = (target - umax.unsqueeze(-1)) * c + (umax.double() * c.double() - m.double()).to(u.dtype).unsqueeze(-1)
        logprob = torch.clamp(LN2 * d - log_s0.unsqueeze(-1), max=0.0)
        results.append(_select(scored.unsqueeze(-1) & (labels != ignore_index), logprob))
    else:
        results.append(u.new_empty(0))
    finished = {
        2: lambda: torch.clamp(log_s0 - LN2 * (s1 / s0), min=0.0),
        4: lambda: LN2 * m + log_s0,
        8: lambda: torch.clamp(torch.log(s2) - 2 * log_s0, max=0.0),
        16: lambda: sz / vocab_total * (c * LN2),
        32: lambda: torch.where(torch.isnan(s0), s0, (top == labels[:, 0]).to(u.dtype)),
    }
    for bit, value in finished.items():
        results.append(_select(scored, value()) if outputs & bit else u.new_empty(0))
    return (*results, state, target)


def _gradient(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, vocab_start, vocab_total, state,
              g_logprob, g_entropy, g_logsumexp):  # fmt: skip
    u = _capped(logits, cap_scale)
    c = _scale(u, factor, temperature, temperature_tensor)
    m, s0, s1, _, _, umax = state.unbind(-1)[:6]
    zero = torch.zeros_like(s0)
    each = None if g_logprob is None else torch.where(labels == ignore_index, torch.zeros_like(g_logprob), g_logprob)
    g_lp = zero if each is None else each.sum(-1)
    g_h = zero if g_entropy is None else g_entropy
    g_lse = zero if g_logsumexp is None else g_logsumexp
    # Same exponent as the forward: relative to max(u), moved to the rounded reference point.
    shift = torch.where(torch.isfinite(m), umax.double() * c.double() - m.double(), torch.zeros_like(m, dtype=torch.double)).to(u.dtype)
    log2p = _bits(u, umax, c) + (shift - torch.log2(s0)).unsqueeze(-1)
    p = torch.exp2(log2p)
    entropy = torch.clamp(torch.log(s0) - LN2 * (s1 / s0), min=0.0)
    a = g_lse - g_lp - torch.where(g_h == 0, zero, g_h * entropy)
    p_log_p = torch.where((p == 0) | (g_h == 0).unsqueeze(-1), torch.zeros_like(p), p * log2p * LN2)
    dz = p * a.unsqueeze(-1) - p_log_p * g_h.unsqueeze(-1)
    if each is not None:
        local = labels - vocab_start
        here = (local >= 0) & (local < u.shape[1])
        dz = dz.scatter_add(-1, local.clamp(0, u.shape[1] - 1), torch.where(here, each, torch.zeros_like(each)))
    slope = c * LN2
    if cap_scale:
        slope = slope * cap_scale * (1 - u * u)
    dx = dz * slope
    # -inf logits: probability 0, gradient 0 (also where the target sits on one); a row without any mass, or with NaN: NaN.
    dx = torch.where(torch.isneginf(u), torch.zeros_like(dx), dx)
    dx = torch.where((s0 > 0).unsqueeze(-1), dx, torch.full_like(dx, math.nan))
    scored = _scored_rows(u.shape[0], labels, mask, ignore_index, u.device)
    return _select(scored.unsqueeze(-1), dx).to(logits.dtype).view(logits.shape)


def token_stats_bwd(*args):
    return _gradient(*args)


def token_stats_bwd_(logits, *rest):
    logits.copy_(_gradient(logits, *rest))
