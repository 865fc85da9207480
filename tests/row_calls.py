"""The row ops and kernels called by themselves: their rows from few words."""

from __future__ import annotations

from fastalign.ops.token_stats.contract import RowOptions, Rows
from fastalign.rows.spec import LOG2E

PLAIN = RowOptions(LOG2E, 0.0, 1.0, -100)


def rows_of(
    logits, labels=None, *, ref=None, mask=None, temperature=None, options=PLAIN, start=0, total=None
):
    """labels: [rows, K]; temperature: a 0-dim tensor; start, total: of a part of the vocabulary."""
    return Rows(logits, ref, labels, mask, temperature, *options, start, total or logits.shape[-1])
