"""How a call of the fused head walks rows and vocabulary: chosen from what needs a gradient and from the
bytes that its logits may take."""

from __future__ import annotations

from typing import NamedTuple

# Of logits that exist at once, policy's and reference's together.
WORKSPACE_BYTES = 512 << 20
MAX_ROWS = 8192  # of hidden states that are multiplied together: more do not make a product faster
MIN_ROWS, MIN_VOCAB = 128, 1024  # fewer make it slower
# The one shape of a batch-invariant product, and the parts of the vocabulary whose states are merged as a
# tree: as many ranks can hold it, or a half or a quarter of them.
PINNED_ROWS, PINNED_VOCAB, SHARDS = 256, 4096, 4


class Plan(NamedTuple):
    """kind: 'forward' (no gradient), 'keep' (the logits stay for backward), 'frozen' (the gradient of hidden
    is made at once, backward scales it), 'recompute' (backward multiplies again) or 'known' (the loss is
    known between the logits and their gradient). rows, vocab: of a tile of logits. gemms: products of the
    size rows x H x V, both directions together. workspace, buffers: bytes of the tiles, and of what else
    lives until backward or in it beyond the gradients. why: in words."""

    kind: str
    rows: int
    vocab: int
    gemms: int
    workspace: int
    buffers: int
    why: str
    pinned: bool = False  # every product has the shape rows x vocab

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.gemms} GEMM{'s' * (self.gemms != 1)}, tiles of {self.rows} rows x "
            f"{self.vocab} of the vocabulary, "
            f"{_mib(self.workspace)} of logits and {_mib(self.buffers)} besides; {self.why}"
        )


class Work(NamedTuple):
    """What a plan depends on. rows: scored ones. size: bytes per logit, with what a tile of them needs beside
    it. towers: 2 with a reference head. slopes: outputs that gradients may come back through, one number per
    row each; 0 without any."""

    rows: int
    hidden: int
    vocab: int
    size: int
    towers: int
    slopes: int
    need_hidden: bool
    need_weight: bool  # or bias
    weight_size: int = 4  # bytes per number
    pinned: bool = False  # batch-invariant


def make_plan(work: Work, budget: int, known: bool = False) -> Plan:
    """The plan with the fewest products; of equal ones that which keeps least. known: the loss is known once
    some rows' logits are."""
    needs = work.need_hidden + work.need_weight
    if work.pinned:
        return _pinned(work, needs)
    if not needs:
        rows, vocab = _tile(work, budget)
        return Plan(
            "forward", rows, vocab, work.towers, _bytes(work, rows, vocab), 0, "nothing needs a gradient"
        )
    whole_rows = max(
        1, budget // (work.vocab * work.size * work.towers)
    )  # whose logits over all the vocabulary fit
    many = whole_rows >= min(work.rows, MIN_ROWS)
    rows = max(1, min(work.rows, whole_rows))
    if known and many:
        return Plan(
            "known",
            rows,
            work.vocab,
            work.towers + needs,
            _bytes(work, rows, work.vocab),
            _wide_weight(work, rows),
            "the loss is known between logits and gradient",
        )
    if many and not work.need_weight and work.slopes == 1:
        return Plan(
            "frozen",
            rows,
            work.vocab,
            work.towers + 1,
            _bytes(work, rows, work.vocab),
            work.rows * work.hidden * 4,
            "the weight needs no gradient, and that of hidden is one number per row times what forward can make",
        )
    if work.rows <= whole_rows:
        return Plan(
            "keep",
            rows,
            work.vocab,
            work.towers + needs,
            _bytes(work, rows, work.vocab),
            0,
            "all logits fit the workspace",
        )
    rows, vocab = _tile(work, budget)
    return Plan(
        "recompute",
        rows,
        vocab,
        2 * work.towers + needs,
        _bytes(work, rows, vocab),
        _wide_weight(work, rows),
        f"all logits would take {_mib(work.rows * work.vocab * work.size * work.towers)}",
    )


def _pinned(work: Work, needs: int) -> Plan:
    rows, vocab = PINNED_ROWS, PINNED_VOCAB
    gemms = work.towers * (2 if needs else 1) + needs
    kind = "recompute" if needs else "forward"
    return Plan(
        kind,
        rows,
        vocab,
        gemms,
        _bytes(work, rows, vocab),
        _wide_weight(work, rows) if needs else 0,
        "products of one shape (batch_invariant)",
        True,
    )


def _tile(work: Work, budget: int) -> tuple[int, int]:
    """Many rows and a part of the vocabulary: the rows' states are all that lives between parts."""
    numbers = budget // (work.size * work.towers)
    rows = max(1, min(work.rows, MAX_ROWS, max(MIN_ROWS, numbers // MIN_VOCAB)))
    vocab = max(1, numbers // rows)
    return rows, work.vocab if vocab >= work.vocab else max(64, vocab // 64 * 64)


def _bytes(work: Work, rows: int, vocab: int) -> int:
    return min(rows, max(work.rows, 1)) * min(vocab, work.vocab) * work.size * work.towers


def _wide_weight(work: Work, rows: int) -> int:
    """The gradient of a 16-bit weight is summed in fp32 where several tiles add to it."""
    return (
        work.vocab * work.hidden * 4 if work.need_weight and work.weight_size < 4 and rows < work.rows else 0
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
