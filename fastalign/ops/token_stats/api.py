"""Vocabulary rows: log-prob of the label, entropy, log-sum-exp and friends in one pass over the logits, one pass back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign import ffi, overwrite
from fastalign.checks import check_device, check_floating, check_integer, check_integers, check_number, check_same_device, check_shape
from fastalign.frozen import copies_without_graph
from fastalign.function import Function
from fastalign.ops.token_stats.contract import (
    DIFFERENTIABLE,
    GRADIENTS,
    LAYOUT,
    MAX_VOCAB,
    NEED_LABELS,
    NEED_REF,
    OUTPUT_BITS,
    PER_LABEL,
    STATE_WIDTH,
    forward_shapes,
    row_rules,
)  # fmt: skip
from fastalign.registry import Op, row_dtypes, standard_kernels

LOG2E = 1.4426950408889634
FP32_LOW, FP32_HIGH = 2.0**-126, 2.0**128


@copies_without_graph
class TokenStats(NamedTuple):
    """One attribute per output; None where not asked for. See `token_stats`."""

    logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    kl_policy_ref: Tensor | None = None
    kl_ref_policy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


class RowOptions(NamedTuple):
    """How raw logits become probabilities, as the ops take it (see csrc/math/row_state.h).

    factor: log2(e) * logit_scale (with a softcap: log2(e) * softcap); cap_scale: logit_scale / softcap, 0 without a softcap;
    temperature: a float, used where temperature_tensor is None."""

    factor: float
    cap_scale: float
    temperature: float
    ignore_index: int


_RESULTS = ", ".join(["Tensor"] * (len(OUTPUT_BITS) + 2))
_ROWS = (
    "Tensor{alias} logits, Tensor? labels, Tensor? mask, Tensor? temperature_tensor, float factor, float cap_scale, float temperature,"
    " int ignore_index"
)
_FWD_SCHEMA = (
    f"({_ROWS.format(alias='')}, int outputs, int vocab_start, int vocab_total, Tensor? state_in, Tensor? target_in, Tensor? ref_logits=None)"
    f" -> ({_RESULTS})"
)
# logits [..., V]; labels [rows, K] int64; mask [rows] bool; temperature_tensor 0-dim in the accumulation dtype; ref_logits of logits' shape and
# dtype, strides of its own; state_in and target_in: the last two results of the vocabulary shards before this one. Results: the outputs in the
# order of OUTPUT_BITS (PER_LABEL [rows, K], the others [rows]; empty(0) if not asked for), state [rows, STATE_WIDTH], target [rows, K], with
# ref_logits [2, rows, K] for policy and reference (raw logit of each label, after tanh if capped; -inf while its shard has not come; empty(0)
# without labels).


def _fwd_fake(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, vocab_start, vocab_total,
              state_in, target_in, ref_logits=None):  # fmt: skip
    acc = ffi.acc_dtype(logits.dtype)
    return tuple(logits.new_empty(shape, dtype=acc) for shape in forward_shapes(logits, labels, outputs, ref_logits))


_BWD_SCHEMA = (
    f"({_ROWS}, int vocab_start, int vocab_total, Tensor state, Tensor? g_logprob, Tensor? g_entropy, Tensor? g_logsumexp,"
    " Tensor? ref_logits=None, Tensor? g_kl_policy_ref=None, Tensor? g_kl_ref_policy=None) -> {result}"
)
# g_logprob [rows, K], the other upstream gradients [rows], in the accumulation dtype; ref_logits belongs to the gradients of the KLs. The plain op
# returns d loss / d logits (logits' shape and dtype, contiguous); the one with an underscore writes it over the logits.


def _check_values(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, *rest):
    """Values that cannot be checked without reading tensors: temperature > 0, labels of unmasked rows inside the vocabulary."""
    check_values(logits, labels, mask, temperature_tensor, ignore_index, vocab_total=rest[2])


def check_values(logits, labels, mask, temperature_tensor, ignore_index, vocab_total):
    if temperature_tensor is not None and not float(temperature_tensor) > 0:
        raise ValueError(f"temperature must be positive, got {float(temperature_tensor)}")
    if labels is None or labels.numel() == 0:
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_total))
    if mask is not None:
        wrong &= mask.unsqueeze(-1)
    if bool(wrong.any()):
        row, k = wrong.nonzero()[0].tolist()
        raise IndexError(f"labels[{row}] = {int(labels[row, k])} is outside [0, {vocab_total}) and is not ignore_index ({ignore_index})")


def _fwd_rules(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, vocab_start, vocab_total, state_in,
               target_in, ref_logits=None):  # fmt: skip
    row_rules(logits, labels, outputs, ref_logits, target_in=target_in)


def _bwd_rules(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, vocab_start, vocab_total, state, g_logprob,
               g_entropy, g_logsumexp, ref_logits=None, g_kl_policy_ref=None, g_kl_ref_policy=None):  # fmt: skip
    row_rules(logits, labels, 0, ref_logits, g_logprob, (g_kl_policy_ref, g_kl_ref_policy))


token_stats_fwd = Op(
    "token_stats_fwd", _FWD_SCHEMA, _fwd_fake, standard_kernels("token_stats", "token_stats_fwd"), row_dtypes(),
    f"{LAYOUT} state_in[rows,{STATE_WIDTH}]:acc", _fwd_rules, _check_values,
)  # fmt: skip
token_stats_bwd = Op(
    "token_stats_bwd", _BWD_SCHEMA.format(alias="", result="Tensor"),
    lambda logits, *rest: torch.empty_like(logits, memory_format=torch.contiguous_format),
    standard_kernels("token_stats", "token_stats_bwd"), row_dtypes(), f"{LAYOUT} state[rows,{STATE_WIDTH}]:acc {GRADIENTS}", _bwd_rules,
)  # fmt: skip
token_stats_bwd_ = Op(
    "token_stats_bwd_", _BWD_SCHEMA.format(alias="(a!)", result="()"), lambda *args: None,
    standard_kernels("token_stats", "token_stats_bwd_"), row_dtypes(), f"{LAYOUT} state[rows,{STATE_WIDTH}]:acc {GRADIENTS}", _bwd_rules,
)  # fmt: skip


class TokenStatsFunction(Function):
    """Forward streams the rows once and keeps the row states; backward streams them once more."""

    names = "token_stats (token_logprobs, token_kl, entropy_from_logits, selective_log_softmax)"

    @staticmethod
    def forward(ctx, logits, ref_logits, labels, mask, temperature_tensor, options: RowOptions, outputs: int, inplace: bool):
        vocab = logits.shape[-1]
        *results, state, _ = token_stats_fwd(logits, labels, mask, temperature_tensor, *options, outputs, 0, vocab, None, None, ref_logits)
        ctx.save_for_backward(logits, ref_logits, labels, mask, temperature_tensor, state)
        ctx.options, ctx.inplace = options, inplace
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(r for name, r in zip(OUTPUT_BITS, results) if name not in DIFFERENTIABLE))
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        none = (None,) * 7
        if not ctx.needs_input_grad[0]:
            return None, *none
        logits, ref_logits, labels, mask, temperature_tensor, state = ctx.saved_tensors
        upstream = {n: None if g is None or g.numel() == 0 else g.contiguous() for n, g in zip(OUTPUT_BITS, grads)}
        g = [upstream[name] for name in DIFFERENTIABLE]
        args = (logits, labels, mask, temperature_tensor, *ctx.options, 0, logits.shape[-1], state, *g[:3])
        if any(x is not None for x in g[3:]):
            args = (*args, ref_logits, *g[3:])
        if not (ctx.inplace and overwrite.may_overwrite(logits, "inplace_backward")):
            return token_stats_bwd(*args), *none
        grad = logits.detach()
        token_stats_bwd_(grad, *args[1:])
        overwrite.retire(logits)
        return grad, *none


def token_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    ref_logits: Tensor | None = None,
    outputs: Sequence[str] = ("logprob",),
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> TokenStats:
    """Per-token statistics of `softmax(z)`, `z = cap(logits * logit_scale) / temperature`, `cap(x) = softcap * tanh(x / softcap)`.

    One pass over each row yields every output asked for; no [N, V] temporary is made. With p = softmax(z):

    - logprob = z[label] - logsumexp(z)
    - entropy = -sum p log p (nats)
    - logsumexp = log sum e^z
    - log_sum_sq_probs = log sum p^2 (the collision term of WPO, arXiv 2406.11827)
    - mean_logit = mean over the vocabulary of z
    - is_top1 = 1.0 where the label is the first index that attains the largest logit (argmax), else 0.0

    and with q = softmax of `ref_logits`, transformed alike, in the same pass over both rows:

    - ref_logprob = log q[label]
    - kl_policy_ref = KL(p || q) = sum p (log p - log q), exact over the vocabulary, never negative, 0 for identical rows
    - kl_ref_policy = KL(q || p) = sum q (log q - log p), likewise (the sequence KL of TDPO, arXiv 2404.11999)

    logprob, entropy, logsumexp and both KLs are differentiable in `logits`, the other outputs are not; nothing is in `ref_logits`.

    Args:
        logits: (..., V), fp32, bf16 or fp16 (fp64 on the reference and CPU backends); last dim contiguous, any leading dims and strides.
        labels: (...) or, for the log-probs of K >= 1 tokens per row, (..., K); integers. Row t is scored against labels[t]. Needed by logprob,
            ref_logprob and is_top1. A label equal to `ignore_index` masks its row (with K labels: that entry; the row when all are ignored).
        ref_logits: logits of the reference model, of the shape, dtype and device of `logits`, strides of its own. A constant: no gradient
            flows into it. Needed by ref_logprob, kl_policy_ref and kl_ref_policy; not read for the others.
        outputs: names from the lists above.
        mask: (...) bool, row-aligned; False masks the row. Masked rows give exactly 0 in every output and receive exactly 0 gradient,
            whatever they hold.
        temperature: > 0; a 0-dim tensor for schedules (no recompilation under torch.compile).
        logit_scale, softcap: > 0; the model head's own transform, applied in the order scale, cap, temperature.
        inplace_backward: write the gradient over `logits`, which saves one [N, V] allocation. Refused for leaves (and views of leaves) and for
            overlapping memory. `logits` must not be read after backward: they are then empty, (..., 0), and whatever still needs them raises.
            Where another tensor shares their memory (a slice, `detach()`, a layer that saved its output, such as tanh) or saved-tensor
            hooks hold it, the gradient gets memory of its own: the result is the same, nothing is saved, and a warning says so once.
            A slice of logits saves little: autograd's backward of logits[:, :-1] allocates all of it again, so shift the labels instead.
            Under torch.compile the compiler decides about buffers and this has no effect.

    Returns:
        TokenStats; each output (...) (logprob and ref_logprob: the shape of labels), fp32, or fp64 for fp64 logits. NaN or +inf logits, and rows
        that are -inf throughout, give NaN in their own row only; single -inf logits have probability 0 and gradient 0. A softcap makes ordinary
        logits of infinite ones, softcap and -softcap in front of the temperature, with probabilities above 0; only NaN then gives NaN. A KL is
        +inf where its first distribution has mass on a token that the second one gives none; the gradient of an infinite kl_policy_ref is NaN
        in that row.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices, unknown outputs, non-positive temperature, scale or cap.
        IndexError: label outside [0, V) that is not ignore_index (CPU; on CUDA that row is NaN, without a synchronisation).
    """
    if isinstance(outputs, str):
        raise TypeError(f'outputs must be a sequence of names, not a string; write outputs=("{outputs}",)')
    unknown = [name for name in outputs if name not in OUTPUT_BITS]
    if unknown or not outputs:
        raise ValueError(f"outputs={tuple(outputs)!r}: unknown or empty; legal names: {', '.join(OUTPUT_BITS)}")
    if labels is None and (need := [name for name in outputs if name in NEED_LABELS]):
        raise ValueError(f"labels is required for outputs {', '.join(need)}")
    if ref_logits is None and (need := [name for name in outputs if name in NEED_REF]):
        raise ValueError(f"ref_logits is required for outputs {', '.join(need)}")
    ref_logits = None if ref_logits is None else check_ref(ref_logits, logits)
    rows_shape, logits, flat_labels, mask = check_rows(logits, labels, mask)
    if "is_top1" in outputs and flat_labels.shape[1] != 1:
        raise ValueError("is_top1 needs one label per row; labels has a trailing dim of several")
    options, temperature_tensor = row_options(logits, temperature, logit_scale, softcap, ignore_index)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    if inplace_backward:
        overwrite.check_overwritable(logits, "inplace_backward")
    bits = 0
    for name in outputs:
        bits |= OUTPUT_BITS[name]
    if not any(name in NEED_REF for name in outputs):
        ref_logits = None
    results = TokenStatsFunction.apply(logits, ref_logits, flat_labels, mask, temperature_tensor, options, bits, inplace_backward)
    named: dict[str, Any] = {}
    for name, value in zip(OUTPUT_BITS, results):
        if name in outputs:
            named[name] = value.view(labels.shape if name in PER_LABEL else rows_shape)
    return TokenStats(**named)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:
    """log softmax(z)[label] per row: `token_stats(...).logprob`. Same arguments, shapes, dtypes and errors."""
    return token_stats(
        logits, labels, temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
        inplace_backward=inplace_backward,
    ).logprob  # fmt: skip


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`log_softmax(logits / temperature, -1).gather(-1, index)` without the [N, V] temporary; the signature of TRL's helper.

    Args:
        logits: (..., V). index: (...) or (..., K), integers in [0, V); no index is ignored. temperature: > 0.
        row_mask: the shape of `index`, bool or integers: where it is False (0) the result is exactly 0, without gradient, whatever logits and
            index hold there.
        dtype: of the result; None: fp32 (fp64 for fp64 logits), as TRL's kernel gives. Its eager fallback rounds to the logits' own dtype:
            dtype=logits.dtype.

    Returns:
        The shape of `index`.
    """
    mask = None
    if row_mask is not None:
        check_integers("index", index)
        check_shape("row_mask", row_mask, tuple(index.shape))
        check_same_device("row_mask", row_mask, "logits", logits)
        kept = row_mask != 0
        index = index.masked_fill(~kept, 0)
        mask = kept if index.dim() == logits.dim() - 1 else kept.any(-1)
    # An ignore_index that no label can have: every index is scored, and an index outside [0, V) is an error.
    out = token_stats(logits, index, mask=mask, temperature=temperature, ignore_index=-(1 << 62)).logprob
    if row_mask is not None and mask is not kept:
        out = out.masked_fill(~kept, 0.0)
    return out if dtype is None else out.to(dtype)


def entropy_from_logits(
    logits: Tensor, chunk_size: int | None = None, *, temperature: float | Tensor = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats, -sum p log p: (..., V) -> (...), differentiable.

    Args:
        logits: (..., V). temperature: > 0.
        chunk_size: accepted because TRL's helper has it, and without effect: there is no [N, V] temporary that chunks would make smaller.
        dtype: as in `selective_log_softmax`.
    """
    if chunk_size is not None:
        check_number("chunk_size", chunk_size, above=0)
    out = token_stats(logits, outputs=("entropy",), temperature=temperature).entropy
    return out if dtype is None else out.to(dtype)


def check_rows(logits, labels, mask):
    """Validate and bring into the op's shapes: logits with a collapsible layout, labels [rows, K] int64, mask [rows] bool."""
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
