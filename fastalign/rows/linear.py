"""Statistics of vocabulary rows from hidden states and the LM head's weight: what `token_stats` gives from
logits, without the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.token_stats.contract import DIFFERENTIABLE, NEED_REF, PER_LABEL
from fastalign.ops.token_stats.op import check_row_values
from fastalign.rows import vocab_parallel
from fastalign.rows.head import PRECISIONS, bytes_per_logit, precision_of
from fastalign.rows.linear_op import LinearTokenStatsFunction
from fastalign.rows.planner import WORKSPACE_BYTES, Work, make_plan
from fastalign.rows.spec import RowSpec, row_spec, scored_rows
from fastalign.rows.stats import TokenStats
from fastalign.rows.walk import Call
from fastalign.runtime.checks import (
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_same_device,
    check_shape,
    values_are_here,
)
from fastalign.runtime.op import PLANS, PUBLIC


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    outputs: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    head_precision: str = "fp32",
    workspace_bytes: int | None = None,
    batch_invariant: bool = False,
    host_counts: bool | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> TokenStats:
    """`token_stats` of logits = hidden weight^T + bias, without the logits: they exist a tile at a time.

    Args:
        hidden: (..., H) fp32, bf16, fp16 or fp64. Row t scores labels[t].
        weight: [V, H]; bias: [V]. Of any of these types; where they differ, both are multiplied in the wider
            one (under autocast in its type), and each gradient comes back in its own.
        labels, outputs, mask, temperature, logit_scale, softcap, ignore_index: as in `token_stats`.
        ref_hidden: (..., H'), the reference's (or the teacher's) hidden states for the same rows, and its
            head, ref_weight [V, H'] and ref_bias [V]; H' may be another width than H. Without ref_weight the
            policy's weight and bias stand for it. Constants.
        differentiable: which outputs a gradient may come back through; None: all that have one. With a frozen
            head and a single one the whole backward is one number per row.
        head_precision: what a logit is. "fp32": the products of hidden and weight as they are, summed and
            kept in fp32 (fp64 for fp64). "bf16": both rounded to bf16, and the logit too, as an engine does
            that computes its head in bf16. "tf32": fp32 operands lose all but 10 bits of their fraction;
            others as "fp32".
        workspace_bytes: of logits that may exist at once; None: planner.WORKSPACE_BYTES. Tiles have at least
            one row or 64 tokens of the vocabulary, whatever it says.
        batch_invariant: a row's results have the same bits whatever other rows there are: every product has
            one shape, 256 rows by 4,096 tokens of the vocabulary, whatever workspace_bytes says. Backward is
            not pinned.
        host_counts: whether numbers may be read from the device: how many rows are scored and how many get a
            gradient, where sequences begin. Then rows that are masked, whose labels are all ignored or whose
            upstream gradients are 0 are not multiplied, and losses over sequences are chunked by them. None:
            on the CPU, where reading costs nothing; True: on CUDA too, one synchronisation for each.
        tp_group: the ranks that share the vocabulary, in equal parts and their order: weight, bias,
            ref_weight and ref_bias are this rank's part, all else is the same on every rank. Row states
            travel, 14 numbers per row, and the gradient of hidden is summed over the ranks. Results have the
            same bits on every rank; with batch_invariant also on 1, 2 and 4 ranks (others are refused, and
            so is a vocabulary that 4 does not divide).

    Returns:
        TokenStats, as `token_stats` of the logits: differentiable in hidden, weight and bias. Gradients of
        weight and bias are summed in fp32, in a fixed order, however many tiles there are. Unscored rows give
        exactly 0 and get exactly 0, whatever they hold.

    Raises:
        ValueError, TypeError, IndexError: as `token_stats`.
    """
    options = HeadOptions(
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        head_precision,
        workspace_bytes,
        batch_invariant,
        host_counts,
        tp_group,
    )
    head = linear_head(
        hidden, weight, bias, (ref_hidden, ref_weight, ref_bias), labels, mask, outputs, options
    )
    return head.run(*head.call(differentiable))


def explain_plan(hidden: Tensor, weight: Tensor, labels: Tensor | None = None, **arguments: Any) -> str:
    """What `explain` says about a call of `linear_token_stats`: how it is walked, its products and its
    bytes."""
    options, tensors = split_options(arguments)
    names = tuple(tensors.pop("outputs", ("logprob",)))
    wanted = tensors.pop("differentiable", None)
    parts = {
        name: tensors.pop(name, None) for name in ("bias", "ref_hidden", "ref_weight", "ref_bias", "mask")
    }
    if tensors:
        raise TypeError(f"linear_token_stats has no argument {', '.join(tensors)}")
    ref = (parts["ref_hidden"], parts["ref_weight"], parts["ref_bias"])
    head = linear_head(hidden, weight, parts["bias"], ref, labels, parts["mask"], names, options)
    _, call = head.call(wanted)
    return f"linear_token_stats, {call.rows} rows x {weight.shape[1]} x {weight.shape[0]}: {call.plan}"


PLANS.update(dict.fromkeys(("linear_token_stats", "linear_token_logprobs"), explain_plan))
PUBLIC.update(dict.fromkeys(PLANS, "token_stats_fwd"))


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """log softmax(z)[label] per row, z = hidden weight^T + bias: `linear_token_stats(...).logprob`. Same
    arguments, shapes, dtypes and errors."""
    if "outputs" in options:
        raise TypeError("linear_token_logprobs has no outputs; linear_token_stats has")
    return linear_token_stats(hidden, weight, labels, bias=bias, **options).logprob


class HeadOptions(NamedTuple):
    """What `linear_token_stats` says about these."""

    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    head_precision: str = "fp32"
    workspace_bytes: int | None = None
    batch_invariant: bool = False
    host_counts: bool | None = None
    tp_group: Any = None


def split_options(options: dict[str, Any]) -> tuple[HeadOptions, dict[str, Any]]:
    """(those of the head, all others)."""
    own = {name: value for name, value in options.items() if name in HeadOptions._fields}
    return HeadOptions(**own), {name: value for name, value in options.items() if name not in own}


class LinearHead(NamedTuple):
    """The rows of a call, as `linear_token_stats` takes them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    outputs: tuple[str, ...]
    options: HeadOptions

    def call(self, differentiable: Sequence[str] | None = None, known: bool = False) -> tuple[RowSpec, Call]:
        """Checked: what its rows are, and how they are walked. known: the loss is known between logits and
        gradient, so that the plan may be (it is not where nothing needs a gradient, or others are
        better)."""
        known = known and not torch.compiler.is_compiling()
        hidden, weight, bias, options = self.hidden, self.weight, self.bias, self.options
        check_hidden(hidden, weight, bias)
        ref_hidden, ref_weight, ref_bias = self._ref()
        check_choice("head_precision", options.head_precision, PRECISIONS)
        precision, ref_precision = precision_of(hidden, weight, options.head_precision), None
        start, total = vocab_parallel.place(weight.shape[0], options.tp_group, options.batch_invariant)
        spec = row_spec(
            tuple(hidden.shape[:-1]), total, precision.logits, hidden, of="hidden", labels=self.labels,
            mask=self.mask, outputs=self.outputs, with_ref=ref_hidden is not None,
            temperature=options.temperature, logit_scale=options.logit_scale, softcap=options.softcap,
            ignore_index=options.ignore_index,
        )  # fmt: skip
        differentiable = _differentiable(differentiable, self.outputs)
        if values_are_here(hidden):
            check_row_values(spec.rows(hidden))
        if not any(name in NEED_REF for name in self.outputs):
            ref_hidden = ref_weight = ref_bias = None
        if ref_hidden is not None:
            ref_hidden = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
            ref_weight, ref_bias = ref_weight.detach(), None if ref_bias is None else ref_bias.detach()
            ref_precision = precision_of(ref_hidden, ref_weight, options.head_precision)._replace(
                logits=precision.logits
            )
        hidden = hidden.reshape(-1, hidden.shape[-1])
        scored = scored_rows(spec)
        index = numbers_of(scored) if self.counts() else None
        work = _work(
            self,
            hidden.shape[0] if index is None else index.shape[0],
            differentiable,
            1 if ref_hidden is None else 2,
        )
        call = Call(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias, spec.labels,
            None if self.counts() else scored, index, spec.temperature, precision, ref_precision,
            spec.options, spec.outputs, differentiable,
            make_plan(work, workspace_budget(options.workspace_bytes), known), start, total, options.tp_group,
            self.counts(),
        )  # fmt: skip
        return spec, call

    def counts(self) -> bool:
        """Whether numbers may be read from the device."""
        asked = self.options.host_counts
        return not torch.compiler.is_compiling() and (
            values_are_here(self.hidden) if asked is None else asked
        )

    def run(self, spec: RowSpec, call: Call) -> TokenStats:
        """The statistics of a call whose plan is not "known"."""
        return TokenStats(
            **spec.named(LinearTokenStatsFunction.apply(call.hidden, self.weight, self.bias, call))
        )

    def _ref(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, weight, bias = self.ref_hidden, self.ref_weight, self.ref_bias
        if hidden is None:
            if weight is not None or bias is not None:
                raise ValueError(
                    "ref_weight and ref_bias need ref_hidden, the hidden states that they are multiplied with"
                )
            return None, None, None
        if weight is None:
            if bias is not None:
                raise ValueError("ref_bias needs ref_weight")
            weight, bias = self.weight, self.bias
        check_hidden(hidden, weight, bias, ("ref_hidden", "ref_weight", "ref_bias"))
        check_same_device("ref_hidden", hidden, "hidden", self.hidden)
        if hidden.shape[:-1] != self.hidden.shape[:-1]:
            raise ValueError(
                f"ref_hidden has shape {tuple(hidden.shape)}; legal here: "
                f"{(*self.hidden.shape[:-1], 'any width')}"
            )
        if weight.shape[0] != self.weight.shape[0]:
            raise ValueError(
                f"ref_weight has a vocabulary of {weight.shape[0]}; legal here: that of weight, "
                f"{self.weight.shape[0]}"
            )
        return hidden, weight, bias


def linear_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref: tuple[Tensor | None, Tensor | None, Tensor | None],
    labels: Tensor | None,
    mask: Tensor | None,
    outputs: Sequence[str],
    options: HeadOptions,
) -> LinearHead:
    """The rows of a call; weights whose shards lie on several ranks are gathered here. ref: its hidden,
    weight, bias."""
    if isinstance(outputs, str):
        raise TypeError(f'outputs must be a sequence of names, not a string; write outputs=("{outputs}",)')
    group = options.tp_group
    hidden, ref_hidden = (
        vocab_parallel.own_rows("hidden", hidden),
        vocab_parallel.own_rows("ref_hidden", ref[0]),
    )
    given = (("weight", weight), ("bias", bias), ("ref_weight", ref[1]), ("ref_bias", ref[2]))
    weight, bias, ref_weight, ref_bias = (vocab_parallel.whole_weight(name, x, group) for name, x in given)
    return LinearHead(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, mask, tuple(outputs), options
    )


def _work(head: LinearHead, rows: int, differentiable: tuple[str, ...], towers: int) -> Work:
    """What the plan depends on."""
    grad, labels = torch.is_grad_enabled(), head.labels
    per_row = 1 if labels is None or labels.dim() < head.hidden.dim() else labels.shape[-1]
    precision = precision_of(head.hidden, head.weight, head.options.head_precision)
    return Work(
        rows, head.hidden.shape[-1], head.weight.shape[0], bytes_per_logit(precision, head.hidden.device),
        towers, slopes=sum(per_row if name in PER_LABEL else 1 for name in differentiable),
        need_hidden=grad and head.hidden.requires_grad,
        need_weight=grad and (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)),
        weight_size=head.weight.dtype.itemsize, pinned=head.options.batch_invariant,
    )  # fmt: skip


def workspace_budget(workspace_bytes: int | None) -> int:
    if workspace_bytes is None:
        return WORKSPACE_BYTES
    check_integer("workspace_bytes", workspace_bytes)
    check_number("workspace_bytes", workspace_bytes, above=0)
    return workspace_bytes


def numbers_of(scored: Tensor | None) -> Tensor | None:
    """Of the rows that count; None if all do."""
    if scored is None:
        return None
    index = scored.nonzero().squeeze(-1)
    return None if index.shape[0] == scored.shape[0] else index


def check_hidden(
    hidden: Any, weight: Any, bias: Any, names: tuple[str, str, str] = ("hidden", "weight", "bias")
) -> None:
    """Shapes, types and devices of one head."""
    h, w, b = names
    check_floating(h, hidden)
    check_floating(w, weight)
    check_device(h, hidden)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        swapped = (
            " (are these logits? token_stats takes them)"
            if weight.dim() == 2 and hidden.dim() and hidden.shape[-1] == weight.shape[0]
            else ""
        )
        raise ValueError(
            f"{h} has shape {tuple(hidden.shape)} and {w} {tuple(weight.shape)}; legal: (..., H) and [V, H] "
            f"with the same H{swapped}"
        )
    check_same_device(w, weight, h, hidden)
    if bias is not None:
        check_shape(b, bias, (weight.shape[0],))
        check_floating(b, bias)
        check_same_device(b, bias, h, hidden)


def _differentiable(names: Sequence[str] | None, outputs: Sequence[str]) -> tuple[str, ...]:
    """Of the outputs those that a gradient comes back through."""
    legal = [name for name in DIFFERENTIABLE if name in outputs]
    if names is None:
        return tuple(legal)
    if isinstance(names, str) or any(name not in legal for name in names):
        raise ValueError(
            f"differentiable={names!r}: legal are sequences of these names: {', '.join(legal) or 'none here'}"
        )
    return tuple(name for name in legal if name in names)
