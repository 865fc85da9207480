"""What every function of vocabulary rows takes, checked and brought into the form of the ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.ops.token_stats.contract import MAX_VOCAB, RowOptions
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


def check_rows(logits, labels, mask):
    """Validate and bring into the op's shapes: logits with a collapsible layout, labels [rows, K] int64, mask
    [rows] bool."""
    if not isinstance(logits, Tensor) or logits.dim() < 1:
        raise TypeError("logits must be a tensor of shape (..., V)")
    check_floating("logits", logits)
    vocab = logits.shape[-1]
    if not 1 <= vocab < MAX_VOCAB:
        gone = " (an in-place gradient was written over these logits)" if vocab == 0 else ""
        raise ValueError(f"logits has a vocabulary of {vocab}{gone}; legal: 1 to {MAX_VOCAB - 1}")
    check_device("logits", logits)
    rows_shape = tuple(logits.shape[:-1])
    rows = math.prod(rows_shape)
    if labels is not None:
        check_integers("labels", labels)
        check_same_device("labels", labels, "logits", logits)
        if tuple(labels.shape) == rows_shape:
            labels = labels.reshape(rows, 1)
        elif labels.dim() == len(rows_shape) + 1 and tuple(labels.shape[:-1]) == rows_shape and labels.shape[-1]:
            labels = labels.reshape(rows, labels.shape[-1])
        else:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; legal for these logits: {rows_shape} or {(*rows_shape, 'K')}, K >= 1"
            )
        labels = labels.to(torch.int64).contiguous()
    if mask is not None:
        check_shape("mask", mask, rows_shape)
        check_same_device("mask", mask, "logits", logits)
        mask = mask.reshape(rows).to(torch.bool).contiguous()
    if ffi.row_layout(logits) is None:
        logits = logits.contiguous()
    return rows_shape, logits, labels, mask


def check_ref(ref_logits, logits):
    """Validate; returns it detached and with a collapsible layout."""
    check_shape("ref_logits", ref_logits, tuple(logits.shape))
    if ref_logits.dtype != logits.dtype:
        raise TypeError(f"ref_logits is {ref_logits.dtype} but logits is {logits.dtype}; they must have the same dtype")
    check_same_device("ref_logits", ref_logits, "logits", logits)
    ref_logits = ref_logits.detach()
    return ref_logits.contiguous() if ffi.row_layout(ref_logits) is None else ref_logits


def row_options(logits, temperature, logit_scale, softcap, ignore_index):
    """(RowOptions, temperature as a 0-dim tensor or None)."""
    check_integer("ignore_index", ignore_index)
    check_number("logit_scale", logit_scale, above=0.0)
    if softcap is not None:
        check_number("softcap", softcap, above=0.0)
    tensor = None
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be a number or a tensor of one element, got shape {tuple(temperature.shape)}")
        check_same_device("temperature", temperature, "logits", logits)
        tensor = temperature.detach().reshape(()).to(ffi.acc_dtype(logits.dtype))
        temperature = 1.0
    else:
        check_number("temperature", temperature, above=0.0)
    if softcap is None:
        options = RowOptions(LOG2E * logit_scale, 0.0, float(temperature), ignore_index)
    else:
        options = RowOptions(LOG2E * softcap, logit_scale / softcap, float(temperature), ignore_index)
    factor, cap_scale, divisor, _ = options
    held = FP32_LOW <= factor < FP32_HIGH and FP32_LOW <= divisor < FP32_HIGH and FP32_LOW <= factor / divisor < FP32_HIGH
    if not (held and (softcap is None or FP32_LOW <= cap_scale < FP32_HIGH)) and logits.dtype != torch.float64:
        raise ValueError(
            f"temperature={temperature!r}, logit_scale={logit_scale!r}, softcap={softcap!r}: legal are numbers and ratios of them that fp32 "
            f"holds, {FP32_LOW:.3g} to {FP32_HIGH:.3g}"
        )
    return options, tensor
