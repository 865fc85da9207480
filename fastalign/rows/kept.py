"""Supports of vocabulary rows: the tokens that a sampler kept (top-k, top-p), over which a distribution is
renormalised. A support is a set: a token that its row lists twice is one token, and the order does not
matter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_stats.contract import PER_LABEL
from fastalign.ops.token_stats.op import check_row_values
from fastalign.ops.token_stats.reference import nats
from fastalign.rows.spec import LOG2E, RowSpec, scored_rows
from fastalign.runtime.checks import check_integers, check_same_device, values_are_here

NO_TOKEN = -1


def check_support(name: str, indices: Any, shape: tuple[int, ...], like: Tensor, of: str) -> None:
    """[..., K] for rows of `shape`, beside `like`, the argument called `of`."""
    check_integers(name, indices)
    check_same_device(name, indices, of, like)
    if indices.dim() != len(shape) + 1 or tuple(indices.shape[:-1]) != shape:
        raise ValueError(f"{name} has shape {tuple(indices.shape)}; legal for these {of}: {(*shape, 'K')}")


def outside(name: str, indices: Tensor, real: Tensor, row: Tensor, vocab: int) -> Tensor:
    """Which of the real entries are outside [0, V). row: the row of each, of a shape that broadcasts.

    Raises:
        IndexError: if there is one, on the CPU."""
    wrong = real & ((indices < 0) | (indices >= vocab))
    if values_are_here(indices) and bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        number = int(row.expand_as(indices)[where])
        raise IndexError(
            f"{name} of row {number} holds {int(indices[where])}; legal: [0, {vocab}), and -1 for no token"
        )
    return wrong


class SupportRows(NamedTuple):
    """Logits of the supports alone, [..., K] in the order of their tokens, -inf behind the last, and what is
    asked of them: rows of a vocabulary of K. missing: which labels do not lie in their support; None without
    labels."""

    logits: Tensor
    ref_logits: Tensor | None
    spec: RowSpec
    missing: Tensor | None

    def completed(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """The row op's results, with the truth about labels outside their support: probability 0."""
        if self.missing is None:
            return named
        fill = {**dict.fromkeys(PER_LABEL, float("-inf")), "is_top1": 0.0}
        return {
            name: x.masked_fill(self.missing, fill[name]) if name in fill else x for name, x in named.items()
        }


def support_rows(support: Any, logits: Tensor, ref_logits: Tensor | None, spec: RowSpec) -> SupportRows:
    """Of a call of `token_stats`; spec: its rows over all the vocabulary."""
    check_support("support", support, spec.shape, logits, "logits")
    if not support.shape[-1]:
        raise ValueError(f"support has shape {tuple(support.shape)}; legal: K >= 1, -1 for no token")
    if "mean_logit" in spec.outputs:
        raise ValueError(
            "outputs has mean_logit, the mean over the vocabulary; with a support legal are all others"
        )
    if values_are_here(logits):
        check_row_values(spec.rows(logits))
    width, vocab, options = support.shape[-1], spec.vocab, spec.options
    indices = support.reshape(-1, width).to(torch.int64)
    scored = scored_rows(spec)
    real = indices != NO_TOKEN
    real = real if scored is None else real & scored.unsqueeze(-1)
    row = torch.arange(indices.shape[0], device=indices.device).unsqueeze(-1)
    wrong = outside("support", indices, real, row, vocab).any(
        -1, keepdim=True
    )  # NaN where that cannot be an error
    tokens = indices.masked_fill(~real, vocab).sort(-1).values
    blank = tokens == vocab
    blank[:, 1:] |= tokens[:, 1:] == tokens[:, :-1]
    labels = missing = None
    if spec.labels is not None:
        labels, missing = _positions(tokens, spec, wrong | ~real.any(-1, keepdim=True))
    capped = options.cap_scale != 0.0  # here, as a cap makes ordinary logits of infinite ones

    def gathered(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.reshape(-1, vocab).gather(-1, tokens.clamp(0, vocab - 1))
        if capped:  # of garbage the cap's slope would be NaN
            x = nats(x.masked_fill(blank, 0.0), options, spec.temperature)
        return x.masked_fill(blank, float("-inf")).masked_fill(wrong, float("nan")).view(*spec.shape, width)

    done = {"factor": LOG2E, "cap_scale": 0.0, "temperature": 1.0} if capped else {}
    narrow = spec._replace(
        vocab=width, labels=labels, mask=real.any(-1), temperature=None if capped else spec.temperature,
        options=options._replace(ignore_index=-1, **done),
    )  # fmt: skip
    return SupportRows(gathered(logits), gathered(ref_logits), narrow, missing)


def _positions(tokens: Tensor, spec: RowSpec, settled: Tensor) -> tuple[Tensor, Tensor]:
    """(labels as positions among the row's sorted tokens, those that are missing there). settled: rows whose
    results do not depend on their labels."""
    labels, width = spec.labels, tokens.shape[-1]
    place = torch.searchsorted(tokens, labels).clamp(max=width - 1)
    ignored, wrong = labels == spec.options.ignore_index, (labels < 0) | (labels >= spec.vocab)
    missing = (tokens.gather(-1, place) != labels) & ~(ignored | wrong | settled)
    place = (
        place.masked_fill(missing, 0).masked_fill(wrong, width).masked_fill(ignored, -1)
    )  # width: NaN on a device
    return place, missing.view(spec.label_shape)
