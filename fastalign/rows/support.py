"""Log-probs renormalised over a support (the tokens that a sampler kept), from hidden states and the LM
head's weight: only the support's rows of the weight are multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_stats.op import check_row_values
from fastalign.ops.token_stats.reference import nats
from fastalign.rows import vocab_parallel
from fastalign.rows.head import PRECISIONS, Precision, precision_of, rounded
from fastalign.rows.kept import NO_TOKEN, check_support, outside
from fastalign.rows.linear import (
    HeadOptions,
    check_hidden,
    linear_token_stats,
    numbers_of,
    split_options,
    workspace_budget,
)
from fastalign.rows.spec import RowSpec, row_spec, scored_rows
from fastalign.runtime.checks import (
    check_choice,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_integers,
    check_same_device,
    check_shape,
    values_are_here,
)
from fastalign.runtime.frozen import copies_without_graph
from fastalign.runtime.function import Function

GATHERED_BYTES = 64 << 20  # more rows at once are not gathered faster
_OPTIONS = tuple(name for name in HeadOptions._fields if name != "batch_invariant")


@copies_without_graph
class SupportLogprobs(NamedTuple):
    """What `logprobs_at` returns; None where not asked for."""

    logprobs: Tensor
    label_logprob: Tensor | None = None
    log_mass: Tensor | None = None


def logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    indices: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    with_mass: bool = False,
    mask: Tensor | None = None,
    **options: Any,
) -> SupportLogprobs:
    """log softmax over each row's support S alone, such as the tokens that a sampler kept after top-k, top-p.

    With z = cap(logit_scale * (hidden weight^T + bias)) / temperature, at the tokens of the support only:

    - logprobs[k] = z[k] - log sum over S of e^z
    - label_logprob = that of the label; -inf (probability 0), without gradient, where it lies outside S
    - log_mass = log of S's share of softmax(z) over all the vocabulary = logsumexp(z over S) - logsumexp(z),
      never above 0

    The rows of the weight that the support names are gathered, some at a time, and multiplied in the
    accumulation type: 2 n H operations for n tokens in all supports, whatever V is. What follows the products
    is computed in fp64. All results are differentiable in hidden, weight and bias, once. The gradient of the
    weight is dense, summed in the accumulation type in a fixed order and rounded once.

    Args:
        hidden: (..., H); weight: [V, H]; bias: [V]: as in `linear_token_stats`. DTensors as there.
        indices: (..., K), integers: the support of each row, -1 for no token, so that rows may have fewer
            than K. Or, with offsets, [n]: the supports of all rows, one after another. A support is a set: a
            token that its row lists twice counts once, and both entries get its log-prob.
        offsets: [rows + 1], int32 or int64: row t has indices[offsets[t] : offsets[t + 1]].
        labels: (...), integers. A label equal to ignore_index masks its row.
        with_mass: also log_mass, by one product with the whole weight (`linear_token_stats`).
        mask: (...) bool; False masks the row.
        options: temperature, logit_scale, softcap, ignore_index, head_precision, as in `linear_token_stats`.
            workspace_bytes: of gathered rows that may exist at once (and of log_mass's logits); None:
            planner.WORKSPACE_BYTES; of gathered rows at most GATHERED_BYTES are used, and one pair at least.
            tp_group: the ranks that share the vocabulary, as there: weight and bias are this rank's part, all
            else is the same on every rank, and so are the bits of the results.
            host_counts: whether the number of entries that count may be read from the device; then those of
            masked rows, and -1, are not multiplied. None: on the CPU.

    Returns:
        SupportLogprobs, fp32 (fp64 for fp64 hidden or weight): logprobs, of the shape of indices;
        label_logprob and log_mass, (...). Exactly 0, with exactly 0 gradient, at -1 and throughout masked
        rows and rows without a token, whatever they hold. A token whose logit is -inf has log-prob -inf; a
        row that holds NaN, +inf or nothing but -inf is NaN.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices, offsets and options.
        IndexError: an index outside [0, V) that is not -1, a label outside [0, V) that is not ignore_index
            (CPU; on CUDA that row, or its label_logprob, is NaN, without a synchronisation).
    """
    own, unknown = split_options(options)
    if unknown or not set(options) <= set(_OPTIONS):
        wrong = ", ".join(name for name in options if name not in _OPTIONS)
        raise TypeError(f"logprobs_at has no option {wrong}; legal: {', '.join(_OPTIONS)}")
    hidden = vocab_parallel.own_rows("hidden", hidden)
    weight, bias = (
        vocab_parallel.whole_weight(n, x, own.tp_group) for n, x in (("weight", weight), ("bias", bias))
    )
    check_hidden(hidden, weight, bias)
    check_choice("head_precision", own.head_precision, PRECISIONS)
    shape, precision = tuple(hidden.shape[:-1]), precision_of(hidden, weight, own.head_precision)
    if labels is not None:
        check_integers("labels", labels)
        check_shape("labels", labels, shape)
    start, total = vocab_parallel.place(weight.shape[0], own.tp_group)
    spec = row_spec(
        shape, total, precision.logits, hidden, of="hidden", labels=labels, mask=mask,
        temperature=own.temperature, logit_scale=own.logit_scale, softcap=own.softcap,
        ignore_index=own.ignore_index,
    )  # fmt: skip
    if values_are_here(hidden):
        check_row_values(spec.rows(hidden))
    entries = _entries(indices, offsets, spec, hidden, own.host_counts)
    at_once = _at_once(hidden, weight, precision, workspace_budget(own.workspace_bytes))
    share = _share(entries, start, weight.shape[0], own.tp_group)
    logits = _SupportLogits.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, share, precision, at_once, own.tp_group
    )
    results = _Softmax(logits, entries, spec)
    found = {"logprobs": entries.placed(results.logprobs).to(precision.acc).view(indices.shape)}
    if labels is not None:
        found["label_logprob"] = results.label().to(precision.acc).view(shape)
    if with_mass:
        whole = linear_token_stats(
            hidden, weight, bias=bias, outputs=("logsumexp",), mask=results.scored.view(shape), **options
        ).logsumexp
        excess = results.logsumexp.view(shape) - whole
        found["log_mass"] = (excess - excess.detach().clamp(min=0)).to(precision.acc)
    return SupportLogprobs(**found)


# --- the support --------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """The tokens of all rows' supports. row, token: [n]; real: which of them count, None: all; wrong: tokens
    outside [0, V), on devices whose values are not looked at, None: none; twice: which stand earlier in their
    row, too. places: theirs among the indices as given, None: these are all of those; total: how many those
    are."""

    row: Tensor
    token: Tensor
    real: Tensor | None
    wrong: Tensor | None
    twice: Tensor
    places: Tensor | None
    total: int

    def placed(self, values: Tensor) -> Tensor:
        """Of all indices: 0 where there is no entry."""
        if self.places is None:
            return values
        return values.new_zeros(self.total).index_copy(0, self.places, values)

    def blanked(self, values: Tensor, fill: float) -> Tensor:
        return values if self.real is None else values.masked_fill(~self.real, fill)


def _entries(indices: Any, offsets: Any, spec: RowSpec, hidden: Tensor, host_counts: bool | None) -> Entries:
    rows, vocab = hidden.shape[:-1].numel(), spec.vocab
    if offsets is None:
        check_support("indices", indices, spec.shape, hidden, "hidden")
        row = (
            torch.arange(rows, device=indices.device)
            .unsqueeze(-1)
            .expand(rows, indices.shape[-1])
            .reshape(-1)
        )
    else:
        row = _rows_of(indices, offsets, rows, hidden)
    indices = indices.reshape(-1).to(torch.int64)
    scored = scored_rows(spec)
    real = indices != NO_TOKEN
    real = real if scored is None else real & scored[row]
    wrong = outside("indices", indices, real, row, vocab)
    here, total, places = values_are_here(hidden), real.shape[0], None
    if not torch.compiler.is_compiling() and (here if host_counts is None else host_counts):
        places, real = numbers_of(real), None
        if places is not None:
            row, indices, wrong = row[places], indices[places], wrong[places]
    token = indices.clamp(0, vocab - 1)
    return Entries(
        row, token, real, None if here else wrong, _twice(row * vocab + token, real), places, total
    )


def _share(entries: Entries, start: int, vocab: int, group: Any) -> Entries:
    """Those that this rank multiplies, whose part of the vocabulary is [start, start + vocab): tokens count
    from its start, places are among `entries`."""
    if group is None:
        return entries._replace(places=None)
    token = entries.token - start
    own = entries.blanked((token >= 0) & (token < vocab), False)
    share = entries._replace(token=token.clamp(0, vocab - 1), real=own, places=None, total=own.shape[0])
    places = numbers_of(own) if entries.real is None else None  # None: they have been counted before
    if places is None:
        return share
    return share._replace(row=share.row[places], token=share.token[places], real=None, places=places)


def _rows_of(indices: Any, offsets: Any, rows: int, hidden: Tensor) -> Tensor:
    """The row of each entry of a ragged support."""
    check_integers("indices", indices)
    check_same_device("indices", indices, "hidden", hidden)
    if indices.dim() != 1:
        raise ValueError(f"indices has shape {tuple(indices.shape)}; legal with offsets: [n]")
    offsets = check_cu_seqlens(offsets, indices, name="offsets", total="indices")
    check_shape("offsets", offsets, (rows + 1,))
    if not rows and indices.numel():
        raise ValueError(f"indices has {indices.numel()} entries but hidden has no row")
    if values_are_here(offsets):
        check_cu_seqlens_values(offsets, indices.shape[0], name="offsets", total="indices")
    number = torch.arange(indices.shape[0], device=indices.device, dtype=torch.int32)
    return (torch.searchsorted(offsets, number, right=True) - 1).clamp(0, max(rows - 1, 0))


def _twice(key: Tensor, real: Tensor | None) -> Tensor:
    """Which entries that count have the key of an earlier one."""
    if real is not None:
        key = key.masked_fill(~real, -1)
    ordered, order = torch.sort(key, stable=True)
    again = torch.zeros_like(key, dtype=torch.bool)
    again[1:] = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    return torch.zeros_like(again).scatter(0, order, again)


# --- log softmax over it ------------------------------------------------------------------------------------


class _Softmax:
    """Over each row's support, from the raw logits of its entries [n]; in fp64, which costs nothing beside
    the products."""

    def __init__(self, logits: Tensor, entries: Entries, spec: RowSpec):
        self.entries, self.spec, self.row = entries, spec, entries.row
        self.rows = math.prod(spec.shape)
        logits = entries.blanked(logits, 0.0)  # of garbage the cap's slope would be NaN
        z = nats(logits.to(torch.float64), spec.options, spec.temperature)
        if entries.wrong is not None:
            z = z.masked_fill(entries.wrong, float("nan"))
        z = entries.blanked(z, float("-inf"))
        peak = z.new_full((self.rows,), float("-inf")).scatter_reduce(0, self.row, z.detach(), "amax")
        once = torch.ones_like(entries.twice) if entries.real is None else entries.real
        self.scored = self._sums(once.to(z.dtype)) > 0
        peak = peak.masked_fill(~self.scored, 0.0)
        terms = (z - taken_at(peak, self.row)).exp().masked_fill(entries.twice, 0.0)
        total = self._sums(entries.blanked(terms, 0.0)).masked_fill(~self.scored, 1.0)
        self.logsumexp = peak + total.log()  # 0 in rows without a token
        self.logprobs = entries.blanked(z - taken_at(self.logsumexp, self.row), 0.0)

    def label(self) -> Tensor:
        """[rows]: the label's log-prob."""
        labels = self.spec.labels.squeeze(-1)
        match = self.entries.blanked(self.entries.token == labels[self.row], False) & ~self.entries.twice
        found = self._sums(match.to(self.logprobs.dtype)) > 0
        value = self._sums(self.logprobs.masked_fill(~match, 0.0))
        value = value.masked_fill(self.scored & ~found, float("-inf"))
        return value.masked_fill(self.scored & ((labels < 0) | (labels >= self.spec.vocab)), float("nan"))

    def _sums(self, values: Tensor) -> Tensor:
        """Of each row's entries."""
        return add_at(values.new_zeros(self.rows), self.row, values)


def add_at(into: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """into[index] += values, in the order of the entries: the same bits every time. (On the CPU index_add_ is
    one loop; on CUDA it adds by atomics, but index_put_ sorts.)"""
    if into.device.type == "cpu":
        return into.index_add_(0, index, values)
    return into.index_put_((index,), values, accumulate=True)


def taken_at(x: Tensor, index: Tensor) -> Tensor:
    """x[index], whose gradient is summed as by `add_at`."""
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]


# --- the products -------------------------------------------------------------------------------------------


def _at_once(hidden: Tensor, weight: Tensor, precision: Precision, budget: int) -> int:
    """How many entries' rows are gathered together: of hidden and weight, as they are and in the accumulation
    type."""
    size = precision.acc.itemsize
    numbers = [x.dtype.itemsize + size if x.dtype != precision.acc else size for x in (hidden, weight)]
    return max(1, min(budget, GATHERED_BYTES) // max(1, sum(numbers) * weight.shape[1]))


class _SupportLogits(Function):
    """hidden[row] . weight[token] + bias[token] of each entry, [n], in the accumulation type, rounded to the
    logits'."""

    names = "logprobs_at"

    @staticmethod
    def forward(ctx, hidden, weight, bias, share: Entries, precision: Precision, at_once: int, group: Any):
        out = hidden.new_empty(share.row.shape, dtype=precision.acc)
        for part in _parts(share.row.shape[0], at_once):
            x = rounded(precision, hidden.index_select(0, share.row[part]))
            out[part] = x.mul_(rounded(precision, weight.index_select(0, share.token[part]))).sum(-1)
        out = out.to(precision.logits)
        if bias is not None:
            out += bias.index_select(0, share.token)
        ctx.save_for_backward(hidden, weight, bias, share.row, share.token, share.real, share.places)
        ctx.rest = (precision, at_once, group)
        out = out.to(precision.acc)
        return out if group is None else vocab_parallel.add(share.placed(share.blanked(out, 0.0)), group)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, row, token, real, places = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        precision, at_once, group = ctx.rest
        grad = grad if places is None else grad[places]
        grad = grad if real is None else grad.masked_fill(~real, 0.0)

        def sums(of: Tensor, index: Tensor, values: Callable[[slice], Tensor], over: Any = None) -> Tensor:
            """Of the entries' values at their places in `of`, in its type; over the ranks of a group, too."""
            into = torch.zeros(of.shape, dtype=precision.acc, device=of.device)
            for part in _parts(row.shape[0], at_once):
                add_at(into, index[part], values(part))
            into = into if over is None else vocab_parallel.add(into, over)
            return into.to(of.dtype)

        def times(x: Tensor, index: Tensor) -> Callable[[slice], Tensor]:
            """The gradient of each entry's product with a row of x."""

            def values(part: slice) -> Tensor:
                rows = rounded(precision, x.index_select(0, index[part])).mul_(grad[part].unsqueeze(-1))
                # What is no entry has gradient 0, but 0 times NaN would reach the sums.
                return rows if real is None else rows.masked_fill_(~real[part].unsqueeze(-1), 0.0)

            return values

        return (
            sums(hidden, row, times(weight, token), group) if need_hidden else None,
            sums(weight, token, times(hidden, row)) if need_weight else None,
            sums(bias, token, lambda part: grad[part]) if need_bias else None,
        )


def _parts(count: int, at_once: int) -> Iterator[slice]:
    for first in range(0, count, at_once):
        yield slice(first, min(first + at_once, count))
