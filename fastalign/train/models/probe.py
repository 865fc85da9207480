"""Trying a model before it is trained: are the sequences of a pack what they are alone?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import fastalign

SHORT = 8  # tokens of a sequence on which every model is tried


class Lengths(NamedTuple):
    """What a run will have at most: tokens of a sequence, tokens of a pack."""

    longest: int
    pack: int


def softcapped(model: torch.nn.Module) -> bool:
    """Whether its attention logits are softcapped."""
    return bool(getattr(model.config, "attn_logit_softcapping", None))


@torch.no_grad()
def leak(lm: Any) -> str | None:
    """Why the packed sequences of a `PackedModel` are not what they are alone; None if they are. First three
    short ones, whose neighbours change; then a pack as full and with sequences as long as training will have:
    some models look further than a few tokens (scaled positions, chunks)."""
    generator = torch.Generator().manual_seed(0)
    a, middle, b, other_a, other_b = torch.randint(lm.vocabulary(), (5, SHORT), generator=generator)
    lm.exact = lm.can_be_exact()
    try:
        first, second = (_rows_of(lm, pack, 1) for pack in ([a, middle, b], [other_a, middle, other_b]))
        if not torch.isfinite(first).all():
            return "its outputs are not finite"
        if (first - second).abs().max() > (1e-5 if lm.exact else 1e-2) * first.abs().max():
            return "a packed sequence sees its neighbours"
        alone = _alone(lm, middle)
        if _differ(lm, first, alone):
            return "a packed sequence differs from the same sequence alone"
        longest, total = lm.lengths
        if longest <= SHORT:
            return None
        long = torch.randint(lm.vocabulary(), (longest,), generator=generator)
        pack = [long] * max(1, (total - SHORT) // longest) + [middle]
        last, beside = _rows_of(lm, pack, len(pack) - 2), _rows_of(lm, pack, len(pack) - 1)
        if _differ(lm, last, _alone(lm, long)) or _differ(lm, beside, alone):
            return f"in a pack of {sum(map(len, pack))} tokens a sequence (the longest has {longest}) differs from the same sequence alone"
    finally:
        lm.exact = False
    return None


def _differ(lm: Any, packed_rows: torch.Tensor, alone: torch.Tensor) -> bool:
    return bool((packed_rows - alone).abs().max() > (1e-3 if lm.exact else 5e-2) * alone.abs().max())


def _rows_of(lm: Any, sequences: Sequence[torch.Tensor], which: int) -> torch.Tensor:
    """A few rows of one sequence of a pack, its first and its last among them."""
    start, length = sum(map(len, sequences[:which])), len(sequences[which])
    few = torch.linspace(start, start + length - 1, min(length, 4 * SHORT), device=lm.device).round().long()
    return lm.rows(lm.to_device(fastalign.pack(list(sequences))))[few].float()


def _alone(lm: Any, sequence: torch.Tensor) -> torch.Tensor:
    """The same rows of a sequence that is in no pack."""
    with lm.unpacked(
        ("sdpa", "eager") if len(sequence) > 1024 and not softcapped(lm.model) else ("eager", "sdpa")
    ):
        return _rows_of(lm, [sequence], 0)
