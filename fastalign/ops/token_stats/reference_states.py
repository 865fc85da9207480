"""Row states of vocabulary parts in plain PyTorch: the monoid that merges them, and its neutral element. The
twin in C++: `merge_stored` in csrc/math/row_state.h."""

from __future__ import annotations

import math

import torch

from fastalign.ops.columns import COL_LARGEST, COL_M, COL_REF_M, COL_TOP, COL_UMAX, COL_VALID, STATE_WIDTH


def _apart(ma, ua, mb, ub):
    """Two stored reference points as `merge_states` may compare them. Those of two far rows differ by less
    than their rounding took off: in their place stands how far each lies below the larger."""
    limit = 2.0**59 if ma.dtype == torch.float64 else 2.0**30
    far = [torch.isfinite(u) & (u != 0) & ~(m.abs() < limit) for m, u in ((ma, ua), (mb, ub))]
    peak = torch.maximum(ua, ub)
    below = [
        torch.where(u == peak, torch.zeros_like(m), (0.5 * u - 0.5 * peak) * (m / u) * 2.0)
        for m, u in ((ma, ua), (mb, ub))
    ]
    return (torch.where(far[0] & far[1], by, m) for m, by in zip((ma, mb), below))


def merge_states(a, b):
    """The monoid on states [rows, STATE_WIDTH]: the twin of `merge_stored` in csrc/math/row_state.h."""
    (ma, a0, a1, a2, az, ua, ta, la), (mb, b0, b1, b2, bz, ub, tb, lb) = (
        x.unbind(-1)[:COL_VALID] for x in (a, b)
    )
    true_m = torch.maximum(ma, mb)
    ma, mb = _apart(ma, ua, mb, ub)
    m = torch.maximum(ma, mb)
    fa, fb = (torch.where(x == m, 1.0, torch.exp2(x - m)) for x in (ma, mb))

    def moved(x, s0, s1, f):
        return torch.where(f == 0, 0.0 * s0, s1 + torch.where((x == m) | (s0 == 0), 0.0, (x - m) * s0)) * f

    take_b = (lb > la) | lb.isnan() | ((lb == la) & (tb >= 0) & ((ta < 0) | (tb < ta)))
    columns = [
        true_m, a0 * fa + b0 * fb, moved(ma, a0, a1, fa) + moved(mb, b0, b1, fb), a2 * fa * fa + b2 * fb * fb, az + bz,
        torch.maximum(ua, ub), torch.where(take_b, tb, ta), torch.where(take_b, lb, la), torch.maximum(a[:, COL_VALID], b[:, COL_VALID]),
    ]  # fmt: skip
    (rma, ra0, at, atr, ra), (rmb, rb0, bt, btr, rb) = a.unbind(-1)[COL_REF_M:], b.unbind(-1)[COL_REF_M:]
    without = (rma == 0) & (ra0 == 0)  # reference logits: a row that has one has mass where m is 0
    true_rm = torch.maximum(rma, rmb)
    rma, rmb = _apart(rma, ra, rmb, rb)
    rm = torch.maximum(rma, rmb)

    def shift(old, new):
        return torch.where(old == new, 0.0, old - new)

    def factor(old, new):
        return torch.where(old == new, 1.0, torch.exp2(old - new))

    def cross(x, mass, by, f):
        return torch.where(f == 0, 0.0, torch.where(mass == 0, x, x + by * mass) * f)

    da, db = shift(ma, m) - shift(rma, rm), shift(mb, m) - shift(rmb, rm)
    ga, gb = factor(rma, rm), factor(rmb, rm)
    of_both = [
        true_rm,
        ra0 * ga + rb0 * gb,
        cross(at, a0, da, fa) + cross(bt, b0, db, fb),
        cross(atr, ra0, da, ga) + cross(btr, rb0, db, gb),
        torch.where(
            (rma == rm) & ((rmb != rm) | (ra != 0)), ra, rb
        ),  # of a far row, if one is: -inf is an empty one's m as well
    ]
    return torch.stack([*columns, *(torch.where(without, 0.0, x) for x in of_both)], -1)


def found_targets(before, here):
    """The labels' logits from those of two parts of the vocabulary: -inf where neither holds the label."""
    return torch.where(torch.isneginf(here), before, here)


def empty_states(state, with_ref):
    """The monoid's neutral element, which is what the state of an unscored row is."""
    empty = {
        COL_M: -math.inf,
        COL_UMAX: -math.inf,
        COL_TOP: -1.0,
        COL_LARGEST: -math.inf,
        COL_REF_M: -math.inf if with_ref else 0.0,
    }
    return torch.stack([torch.full_like(state[:, COL_M], empty.get(i, 0.0)) for i in range(STATE_WIDTH)], -1)
