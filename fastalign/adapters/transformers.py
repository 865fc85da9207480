"""fastalign in the Trainer of transformers, as `Trainer(compute_loss_func=...)`: preference losses, and the
token loss of supervised training. See docs/adapters.md.

Trainer runs the model on a batch without its labels and calls compute_loss_func(outputs, labels,
num_items_in_batch). The third is how many labels are not -100 in all micro-batches of a step, over all
ranks where `average_tokens_across_devices` is on: what a loss that is a sum has to be divided by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign.adapters.common import Adapter, AdapterError
from fastalign.adapters.padded import boundaries
from fastalign.adapters.preset import PresetLoss, placed

__all__ = ["ADAPTER", "PairCollator", "PairLabels", "pair_labels", "preference", "sft", "with_reference"]

ADAPTER = Adapter(
    trainer="transformers",
    distribution="transformers",
    versions=">=5.23,<5.24",
    registers=(
        "fastalign.adapters.transformers.preference: a preference loss, "
        "Trainer(compute_loss_func=preference(...))",
        "fastalign.adapters.transformers.sft: the token loss, Trainer(compute_loss_func=sft())",
    ),
)
IGNORED = -100
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names of these columns


@dataclasses.dataclass
class PairLabels:
    """The labels of a batch [chosen; rejected] of P pairs, as `preference` takes them. For Trainer, which
    counts the labels of a step, it is as many labels as there are pairs with a scored token.

    rows: [N] integers, one per row of logits: the token that follows, -100 where none is scored.
    cu_seqlens: [2 P + 1] int32, where sequences begin among the rows. reference: [2 P], sums of the
    reference's log-probs over the scored tokens; None: not known. per_pair: options that every pair has a
    number of its own for, [P] each."""

    rows: Tensor
    cu_seqlens: Tensor
    reference: Tensor | None = None
    per_pair: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def scored(self) -> Tensor:
        """[N] bool"""
        return self.rows != IGNORED

    def pairs(self) -> Tensor:
        """[P] bool: those with a scored token."""
        tokens = fastalign.sequence_sum(self.scored.float(), self.cu_seqlens)
        return tokens.view(2, -1).sum(0) > 0

    # What Trainer and its data loaders do with labels.
    def _each(self, function: Callable[[Tensor], Tensor]) -> PairLabels:
        reference = None if self.reference is None else function(self.reference)
        per_pair = {name: function(x) for name, x in self.per_pair.items()}
        return PairLabels(function(self.rows), function(self.cu_seqlens), reference, per_pair)

    def to(self, *args: Any, **kwargs: Any) -> PairLabels:
        return self._each(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> PairLabels:
        return self._each(Tensor.pin_memory)

    def __getitem__(self, index: Any) -> PairLabels:
        """Without the first token, which has no prediction: the pairs are the same."""
        if index != (Ellipsis, slice(1, None)):
            raise TypeError(
                f"PairLabels are for Trainer to count and for preference() to read; got [{index!r}]"
            )
        return self

    def ne(self, value: int) -> Tensor:
        return self.pairs()


def pair_labels(
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    **per_pair: Tensor,
) -> PairLabels:
    """`PairLabels` of a batch, for a collator to return as "labels".

    Args:
        labels: token ids as transformers takes them, not shifted, -100 where a token is not scored: [2 P, T],
            chosen rows first; or packed, [1, N] or [N], in the same order.
        cu_seqlens: [2 P + 1] int32, where sequences begin; of packed labels.
        ref_chosen_logps, ref_rejected_logps: [P], sums over the scored tokens.
        per_pair: [P] each: `omega`, `gamma_ext`, `soft_labels`, `target`, for losses that need them.

    Raises:
        ValueError: shapes; an odd number of sequences.
    """
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; legal: [2 P, T], or [1, N] with cu_seqlens"
            )
        count, ends = labels.shape[0], boundaries(labels)
    else:
        ends, count = cu_seqlens.to(torch.int32), len(cu_seqlens) - 1
    if count % 2:
        raise ValueError(f"there are {count} sequences; legal: an even number, chosen ones first")
    flat = labels.flatten()
    rows = fastalign.shift_labels(flat, ends, flat != IGNORED)
    given = [x for x in (ref_chosen_logps, ref_rejected_logps) if x is not None]
    if len(given) == 1:
        raise ValueError("ref_chosen_logps and ref_rejected_logps belong together")
    for name, x in {
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        **per_pair,
    }.items():
        if x is not None and tuple(x.shape) != (count // 2,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; legal here: ({count // 2},), one per pair")
    return PairLabels(rows, ends, torch.cat(given) if given else None, dict(per_pair))


@dataclasses.dataclass
class PairCollator:
    """Batches [chosen; rejected] from pairs of token ids.

    An example has prompt_ids, chosen_ids and rejected_ids (TRL's names), and where it is known
    ref_chosen_logps and ref_rejected_logps (`with_reference` makes them).

    pad_token_id: pads to the longest sequence, [2 P, T]. None: packed, [1, N], sequences apart by
        position_ids; transformers keeps them apart in models that follow these.
    per_pair: columns that are options of the loss: omega, gamma_ext, soft_labels, target."""

    pad_token_id: int | None = None
    per_pair: Sequence[str] = ()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sides = [(e, e[side]) for side in ("chosen_ids", "rejected_ids") for e in examples]
        sequences = [torch.tensor([*e["prompt_ids"], *response]) for e, response in sides]
        labels = [torch.tensor([IGNORED] * len(e["prompt_ids"]) + [*response]) for e, response in sides]
        names = [
            name for name in (*REFERENCE, *self.per_pair) if name in examples[0] or name in self.per_pair
        ]
        columns = {name: torch.tensor([float(e[name]) for e in examples]) for name in names}
        if self.pad_token_id is None:
            packed = fastalign.pack(sequences)
            batch = {"input_ids": packed.input_ids[None], "position_ids": packed.position_ids[None]}
            return {**batch, "labels": pair_labels(torch.cat(labels), packed.cu_seqlens, **columns)}

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        return {
            "input_ids": padded(sequences, self.pad_token_id),
            "attention_mask": padded([torch.ones_like(s) for s in sequences], 0),
            "labels": pair_labels(padded(labels, IGNORED), **columns),
        }


class preference:
    """A preference loss for `Trainer(compute_loss_func=preference("dpo", beta=0.1))`.

    The loss is the mean over all pairs of an optimizer step, whatever the micro-batches and ranks: the sum
    over this batch's pairs / num_items_in_batch. For that Trainer must count pairs: labels are `PairLabels`
    (`PairCollator` makes them; `pair_labels` for a collator of one's own). A plain tensor [2 P, T], chosen
    rows first, serves a loss without a reference where a step is one batch on one rank.

    Args:
        loss: a name of `fastalign.losses.available()`, a Preset, or a mixture, as in `preference_loss`.
        options: its options; among them `state`, the rule object that beta_dpo, alpha_dpo and bco need, and
            `clamp` of wpo.

    `last` is the `PreferenceOutput` of the last batch, without graph: `{k: float(v) for k, v in
    loss.last.metrics().items()}`.

    Raises:
        AdapterError, a RuntimeError: at once, for a loss that needs whole distributions of the reference
            (TDPO) and what `preference_loss` refuses. In a call: labels without what the loss needs; an SFT
            term per token where a step has several batches or ranks (`sft_norm="seq_mean"` has none of that).
    """

    def __init__(self, loss: Any = "dpo", **options: Any):
        self.preset = PresetLoss(loss, options)
        if self.preset.needs_kl:
            raise AdapterError(
                f"loss={self.preset.name!r} needs the reference's logits, which Trainer does not hand on"
            )
        self.last: fastalign.PreferenceOutput | None = None

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        if labels is None:
            raise AdapterError('the batch has no "labels"; PairCollator makes them')
        logits = _logits(outputs)
        plain = isinstance(labels, Tensor)
        if plain and (labels.dim() != 2 or labels.shape[0] % 2):
            raise AdapterError(
                f"labels has shape {tuple(labels.shape)}; legal: [2 P, T], chosen rows first, and pair_labels(...)"
            )
        labels = pair_labels(labels) if plain else labels
        self._check(labels, logits)
        if num_items_in_batch is not None:
            items = labels.scored if plain else labels.pairs()
            num_items_in_batch = self._denominator(num_items_in_batch, items, plain)
        names = ("logprob", "log_sum_sq_probs") if self.preset.weighs else ("logprob",)
        mask = labels.scored
        stats = fastalign.token_stats(logits, labels.rows, outputs=names)
        reference = labels.reference
        if reference is not None:
            reference = placed(reference.to(stats.logprob.dtype), labels.cu_seqlens, mask)
        output = self.preset(
            stats, reference, labels.cu_seqlens, mask, labels.per_pair, training=torch.is_grad_enabled(),
            num_items=num_items_in_batch,
        )  # fmt: skip
        self.last = output._replace(loss=output.loss.detach().clone())
        return output.loss

    def _check(self, labels: PairLabels, logits: Tensor) -> None:
        if logits.shape[0] != labels.rows.shape[0]:
            raise AdapterError(
                f"there are {logits.shape[0]} rows of logits and {labels.rows.shape[0]} labels"
            )
        preset = self.preset
        if preset.needs_reference and labels.reference is None:
            raise AdapterError(
                f"loss={preset.name!r} needs {' and '.join(REFERENCE)} beside the labels; with_reference "
                "makes them"
            )
        if preset.needs_reference and preset.needs_tokens:
            raise AdapterError(
                f"loss={preset.name!r} needs the reference's log-probs token by token; labels have one number "
                "per response"
            )
        missing = [name for name in preset.columns if name not in labels.per_pair]
        if missing:
            raise AdapterError(
                f"loss={preset.name!r} needs {missing[0]} of every pair: PairCollator(per_pair=...)"
            )

    def _denominator(self, counted: Any, items: Tensor, plain: bool) -> Any:
        """What Trainer counted, if it is of pairs. Reading it costs a synchronisation, which only some calls
        need."""
        if not plain and not self.preset.counts_sft:
            return counted
        if int(counted) == int(items.sum()):
            return None  # a step is this batch: it counts for itself
        if plain:
            raise AdapterError(
                "num_items_in_batch is of the labels of several batches, which says nothing of pairs: labels "
                "must be "
                "PairLabels (PairCollator, pair_labels)"
            )
        raise AdapterError(
            f"loss={self.preset.name!r} has an SFT term per token, and num_items_in_batch is of pairs; legal: "
            "sft_norm='seq_mean' or 'seq_sum', or a step of one batch on one rank"
        )


class sft:
    """The token loss for `Trainer(compute_loss_func=sft())`: -log p(label) summed over the scored tokens /
    num_items_in_batch, the mean over all tokens of an optimizer step; a copy of the logits is not made.

    Labels are transformers' own: [B, T], not shifted, -100 where a token is not scored; of packed batches
    also at the first token of every sequence, as DataCollatorWithFlattening makes them.

    Args:
        shift: the logits of a token score the next one. False: its own, as in models with a decoder of their
            own (T5).
        temperature: of the logits."""

    def __init__(self, *, shift: bool = True, temperature: float = 1.0):
        self.shift, self.temperature = shift, temperature

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise AdapterError(f'the batch\'s "labels" are {found}; legal: integers [B, T]')
        logits, ignored = _logits(outputs), labels.new_full((len(labels), 1), IGNORED)
        rows = (torch.cat([labels[:, 1:], ignored], 1) if self.shift else labels).flatten()
        if logits.shape[0] != rows.shape[0]:
            raise AdapterError(f"there are {logits.shape[0]} rows of logits and {rows.shape[0]} labels")
        logprobs = fastalign.token_logprobs(logits, rows, temperature=self.temperature)
        count = (rows != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return -logprobs.sum() / count


def with_reference(data: Any, model: Any, collator: PairCollator, *, batch_size: int = 8) -> Any:
    """The data with the columns ref_chosen_logps and ref_rejected_logps: sums of `model`'s log-probs over the
    scored tokens, from which losses with a reference are made.

    data: a `datasets.Dataset` or a list of examples, as `collator` takes them; a new one comes back."""
    sums: list[Tensor] = []
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(data), batch_size):
                batch = collator([data[i] for i in range(start, min(start + batch_size, len(data)))])
                labels = batch.pop("labels").to(device)
                inputs = {name: x.to(device) for name, x in batch.items()}
                logits = _logits(model(**inputs, use_cache=False))
                logprobs = fastalign.token_logprobs(logits, labels.rows)
                own = fastalign.sequence_sum(logprobs, labels.cu_seqlens, mask=labels.scored)
                sums.append(own.view(2, -1).double().cpu())
    finally:
        model.train(training)
    columns = dict(zip(REFERENCE, torch.cat(sums, 1).tolist()))
    if hasattr(data, "add_column"):
        for name, column in columns.items():
            data = data.add_column(name, column)
        return data
    return [{**example, **{name: c[i] for name, c in columns.items()}} for i, example in enumerate(data)]


def _logits(outputs: Any) -> Tensor:
    """[N, V], a view."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits.flatten(0, -2)
