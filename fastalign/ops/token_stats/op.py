"""Vocabulary rows: log-prob of the label, entropy, log-sum-exp and friends in one pass over the logits, one pass back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastalign.ops.token_stats.contract import (
    DIFFERENTIABLE,
    GRADIENTS,
    LAYOUT,
    OUTPUT_BITS,
    STATE_WIDTH,
    forward_shapes,
    row_rules,
)  # fmt: skip
from fastalign.runtime import ffi, overwrite
from fastalign.runtime.dispatch import Op, row_dtypes, standard_kernels
from fastalign.runtime.function import Function


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
