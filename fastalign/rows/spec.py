"""What every function of vocabulary rows takes, checked once and brought into the form of the ops. The checks
need no logits in hand: rows that come from hidden states and a weight are told by their shape."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_stats.contract import (
    MAX_VOCAB,
    NEED_LABELS,
    NEED_REF,
    OUTPUT_BITS,
    PER_LABEL,
    RowOptions,
    Rows,
    RowStatesFinish,
)
from fastalign.runtime import ffi
from fastalign.runtime.checks import (
    check_device,
    check_floating,
    check_integer,
    check_integers,
    check_number,
    check_same_device,
    check_shape,
)

LOG2E = 1.4426950408889634
FP32_LOW, FP32_HIGH = 2.0**-126, 2.0**128


class RowSpec(NamedTuple):
    """The rows of one call: everything but their logits, which may come in parts of the vocabulary. See
    `row_spec`."""

    shape: tuple[int, ...]  # the leading dims
    vocab: int
    label_shape: tuple[int, ...]  # what a result per label has; () without labels
    labels: Tensor | None  # [rows, K] int64
    mask: Tensor | None  # [rows] bool
    temperature: Tensor | None  # 0-dim; None: the number in `options`
    options: RowOptions
    outputs: tuple[str, ...]

    @property
    def bits(self) -> int:
        """The ops' `outputs`."""
        bits = 0
        for name in self.outputs:
            bits |= OUTPUT_BITS[name]
        return bits

    def rows(self, logits: Tensor, ref_logits: Tensor | None = None, start: int = 0) -> Rows:
        """These rows' columns from `start` on, as the ops take them."""
        return Rows(
            logits, ref_logits, self.labels, self.mask, self.temperature, *self.options, start, self.vocab
        )

    def finishing(self, state: Tensor, target: Tensor) -> RowStatesFinish:
        """The arguments that finish these rows' states. target: empty without labels."""
        options = self.options
        return RowStatesFinish(
            state, None if self.labels is None else target, self.labels, self.mask, self.temperature,
            options.factor, options.temperature, options.ignore_index, self.vocab, self.bits,
        )  # fmt: skip

    def named(self, results: Any) -> dict[str, Tensor]:
        """An op's outputs by name, in the shape of the call; those asked for."""
        found = {}
        for name, value in zip(OUTPUT_BITS, results):
            if name in self.outputs:
                found[name] = value.view(self.label_shape if name in PER_LABEL else self.shape)
        return found


def row_spec(
    shape: tuple[int, ...],
    vocab: int,
    dtype: torch.dtype,
    like: Tensor,
    *,
    of: str = "logits",
    labels: Any = None,
    mask: Any = None,
    outputs: Any = None,
    with_ref: bool = False,
    temperature: Any = 1.0,
    logit_scale: Any = 1.0,
    softcap: Any = None,
    ignore_index: Any = -100,
) -> RowSpec:
    """Check what a call says about rows of `shape` (the leading dims) over `vocab` tokens, whose logits have
    `dtype` and lie where `like` does, the argument called `of`. outputs: names, or None where the function
    has none to choose; with_ref: whether the reference's rows come too.

    Raises:
        ValueError, TypeError: as `token_stats` says, without a look at a tensor's values.
    """
    if outputs is not None:
        _check_outputs(outputs, labels is not None, with_ref, of)
    if not 1 <= vocab < MAX_VOCAB:
        gone = (
            " (an in-place gradient was written over these logits)" if vocab == 0 and of == "logits" else ""
        )
        raise ValueError(f"{of} has a vocabulary of {vocab}{gone}; legal: 1 to {MAX_VOCAB - 1}")
    rows = math.prod(shape)
    label_shape: tuple[int, ...] = ()
    if labels is not None:
        check_integers("labels", labels)
        check_same_device("labels", labels, of, like)
        label_shape = tuple(labels.shape)
        if label_shape == shape:
            labels = labels.reshape(rows, 1)
        elif labels.dim() == len(shape) + 1 and label_shape[: len(shape)] == shape and labels.shape[-1]:
            labels = labels.reshape(rows, labels.shape[-1])
        else:
            raise ValueError(
                f"labels has shape {label_shape}; legal for these {of}: {shape} or {(*shape, 'K')}, K >= 1"
            )
        labels = labels.to(torch.int64).contiguous()
    if mask is not None:
        check_shape("mask", mask, shape)
        check_same_device("mask", mask, of, like)
        mask = mask.reshape(rows).to(torch.bool).contiguous()
    if outputs is not None and "is_top1" in outputs and labels.shape[1] != 1:
        raise ValueError("is_top1 needs one label per row; labels has a trailing dim of several")
    options, tensor = _row_options(dtype, like, of, temperature, logit_scale, softcap, ignore_index)
    return RowSpec(shape, vocab, label_shape, labels, mask, tensor, options, tuple(outputs or ()))


def scored_rows(spec: RowSpec) -> Tensor | None:
    """[rows] bool: the rows that count; None if all do."""
    if spec.labels is None:
        return spec.mask
    labelled = (spec.labels != spec.options.ignore_index).any(-1)
    return labelled if spec.mask is None else spec.mask & labelled


def _check_outputs(outputs: Any, with_labels: bool, with_ref: bool, of: str) -> None:
    """Names of outputs, and whether what they need is given."""
    if isinstance(outputs, str):
        raise TypeError(f'outputs must be a sequence of names, not a string; write outputs=("{outputs}",)')
    unknown = [name for name in outputs if name not in OUTPUT_BITS]
    if unknown or not outputs:
        raise ValueError(
            f"outputs={tuple(outputs)!r}: unknown or empty; legal names: {', '.join(OUTPUT_BITS)}"
        )
    if not with_labels and (need := [name for name in outputs if name in NEED_LABELS]):
        raise ValueError(f"labels is required for outputs {', '.join(need)}")
    if not with_ref and (need := [name for name in outputs if name in NEED_REF]):
        raise ValueError(f"ref_{of} is required for outputs {', '.join(need)}")


def check_logits(logits: Any) -> Tensor:
    """Validate; returns them with a collapsible layout."""
    if not isinstance(logits, Tensor) or logits.dim() < 1:
        raise TypeError("logits must be a tensor of shape (..., V)")
    check_floating("logits", logits)
    check_device("logits", logits)
    return logits.contiguous() if ffi.row_layout(logits) is None else logits


def check_ref(ref_logits: Any, logits: Tensor) -> Tensor:
    """Validate; returns it detached and with a collapsible layout."""
    check_shape("ref_logits", ref_logits, tuple(logits.shape))
    if ref_logits.dtype != logits.dtype:
        raise TypeError(
            f"ref_logits is {ref_logits.dtype} but logits is {logits.dtype}; they must have the same dtype"
        )
    check_same_device("ref_logits", ref_logits, "logits", logits)
    ref_logits = ref_logits.detach()
    return ref_logits.contiguous() if ffi.row_layout(ref_logits) is None else ref_logits


def _row_options(dtype, like, of, temperature, logit_scale, softcap, ignore_index):
    """(RowOptions, temperature as a 0-dim tensor or None)."""
    check_integer("ignore_index", ignore_index)
    check_number("logit_scale", logit_scale, above=0.0)
    if softcap is not None:
        check_number("softcap", softcap, above=0.0)
    tensor = None
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                "temperature must be a number or a tensor of one element, got shape "
                f"{tuple(temperature.shape)}"
            )
        check_same_device("temperature", temperature, of, like)
        tensor = temperature.detach().reshape(()).to(ffi.acc_dtype(dtype))
        temperature = 1.0
    else:
        check_number("temperature", temperature, above=0.0)
    if softcap is None:
        options = RowOptions(LOG2E * logit_scale, 0.0, float(temperature), ignore_index)
    else:
        options = RowOptions(LOG2E * softcap, logit_scale / softcap, float(temperature), ignore_index)
    factor, cap_scale, divisor, _ = options
    held = (
        FP32_LOW <= factor < FP32_HIGH
        and FP32_LOW <= divisor < FP32_HIGH
        and FP32_LOW <= factor / divisor < FP32_HIGH
    )
    if not (held and (softcap is None or FP32_LOW <= cap_scale < FP32_HIGH)) and dtype != torch.float64:
        raise ValueError(
            f"temperature={temperature!r}, logit_scale={logit_scale!r}, softcap={softcap!r}: legal are "
            "numbers and ratios of them that fp32 "
            f"holds, {FP32_LOW:.3g} to {FP32_HIGH:.3g}"
        )
    return options, tensor
