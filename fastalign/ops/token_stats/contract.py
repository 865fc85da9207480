"""What every row op agrees on: the names of its outputs, the tensors that it takes, what must hold among
them."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastalign.ops.columns import ROW_OUTPUTS, STATE_WIDTH
from fastalign.runtime import ffi
from fastalign.runtime.arguments import In, Maybe, Unchecked
from fastalign.runtime.layout import refuse

# Bits of the op's `outputs` argument, in the order of its results.
OUTPUT_BITS = {name: 1 << i for i, name in enumerate(ROW_OUTPUTS)}
NEED_LABELS = ("logprob", "is_top1", "ref_logprob")
NEED_REF = ("ref_logprob", "kl_policy_ref", "kl_ref_policy")
OF_THE_POLICY = len(OUTPUT_BITS) - len(NEED_REF)  # the results that come first
PER_LABEL = ("logprob", "ref_logprob")
DIFFERENTIABLE = ("logprob", "entropy", "logsumexp", "kl_policy_ref", "kl_ref_policy")
MAX_VOCAB = 1 << 24  # the state keeps the top-1 index in fp32


class RowOptions(NamedTuple):
    """How raw logits become probabilities, as the ops take it (see csrc/math/row_state.h).

    factor: log2(e) * logit_scale (with a softcap: log2(e) * softcap); cap_scale: logit_scale / softcap, 0
    without a softcap; temperature: a float, used where temperature_tensor is None."""

    factor: float
    cap_scale: float
    temperature: float
    ignore_index: int


class Rows(NamedTuple):
    """The rows, and how they are read. logits is [..., V]; ref_logits has strides of its own; vocab_start and
    vocab_total say which part of the vocabulary this is."""

    logits: In("*rows,V")
    ref_logits: Maybe("*rows,V")
    labels: Maybe("rows,K", "int64")
    mask: Maybe("rows", "bool")
    temperature_tensor: Maybe("", "acc")
    factor: float
    cap_scale: float
    temperature: float
    ignore_index: int
    vocab_start: int
    vocab_total: int


class RowGradients(NamedTuple):
    """Upstream gradients, in the accumulation dtype."""

    g_logprob: Maybe("rows,K", "acc") = None
    g_entropy: Maybe("rows", "acc") = None
    g_logsumexp: Maybe("rows", "acc") = None
    g_kl_policy_ref: Maybe("rows", "acc") = None
    g_kl_ref_policy: Maybe("rows", "acc") = None


class TokenStatsFwd(NamedTuple):
    """outputs: OUTPUT_BITS. state_in, target_in: the last two results of the vocabulary shards before this
    one."""

    rows: Rows
    outputs: int
    state_in: Maybe(f"rows,{STATE_WIDTH}", "acc")
    target_in: Unchecked


class TokenStatsBwd(NamedTuple):
    """rows.ref_logits belongs to the gradients of the KLs."""

    rows: Rows
    state: In(f"rows,{STATE_WIDTH}", "acc")
    upstream: RowGradients


class TokenStatsFused(NamedTuple):
    """Forward and backward in one, for upstream gradients that are known beforehand."""

    rows: Rows
    outputs: int
    upstream: RowGradients


class ScaleRows(NamedTuple):
    x: In("*rows,V")
    scale: In("", "acc")


class RowStatesMerge(NamedTuple):
    """states: what R parts of the vocabulary gave for the same rows, each without a state_in. targets: their
    last results, of which N is rows, with reference logits 2 rows (the policy's, then the reference's); None
    without labels."""

    states: In(f"R,rows,{STATE_WIDTH}")
    targets: Maybe("R,N,K", "acc")


class RowStatesFinish(NamedTuple):
    """state, target: over all the vocabulary, as row_states_merge gives them; the rest is what Rows and
    TokenStatsFwd say. The states hold what the outputs need if the parts were asked for the same outputs."""

    state: In(f"rows,{STATE_WIDTH}")
    target: Maybe("N,K", "acc")
    labels: Maybe("rows,K", "int64")
    mask: Maybe("rows", "bool")
    temperature_tensor: Maybe("", "acc")
    factor: float
    temperature: float
    ignore_index: int
    vocab_total: int
    outputs: int


def output_shapes(rows, labels, outputs):
    """Shapes of the outputs, (0,) of those that are not asked for."""
    targets = (0,) if labels is None else (rows, labels.shape[1])
    return [
        (targets if name in PER_LABEL else (rows,)) if outputs & bit else (0,)
        for name, bit in OUTPUT_BITS.items()
    ]


def forward_shapes(rows, outputs):
    """Shapes of the results of token_stats_fwd, all in the accumulation dtype."""
    labels, ref_logits, rows = rows.labels, rows.ref_logits, math.prod(rows.logits.shape[:-1])
    targets = (0,) if labels is None else (rows, labels.shape[1])
    asked = output_shapes(rows, labels, outputs)
    return [*asked, (rows, STATE_WIDTH), targets if labels is None or ref_logits is None else (2, *targets)]


def merge_shapes(a):
    """Shapes of the results of row_states_merge."""
    return [tuple(a.states.shape[1:]), (0,) if a.targets is None else tuple(a.targets.shape[1:])]


def output_rules(outputs, labels, with_ref):
    """Whether the labels and the reference are there that the outputs need."""
    asked = [name for name, bit in OUTPUT_BITS.items() if outputs & bit]
    refuse(labels is not None and labels.shape[1] == 0, "labels has no label per row")
    refuse(labels is None and any(n in NEED_LABELS for n in asked), "labels is required for these outputs")
    refuse("is_top1" in asked and labels.shape[1] != 1, "is_top1 needs one label per row")
    refuse(not with_ref and any(n in NEED_REF for n in asked), "ref_logits is required for these outputs")


def row_rules(rows, outputs=0, upstream=None, target_in=None):
    """Whether the labels and the reference are there that the outputs and gradients asked for need."""
    upstream = upstream or RowGradients()
    logits, labels, ref_logits = rows.logits, rows.labels, rows.ref_logits
    refuse(
        not 1 <= logits.shape[-1] < MAX_VOCAB,
        f"logits has a vocabulary of {logits.shape[-1]}; legal: 1 to {MAX_VOCAB - 1}",
    )
    output_rules(outputs, labels, ref_logits is not None)
    refuse(labels is None and upstream.g_logprob is not None, "labels is required for these outputs")
    g_kls = (upstream.g_kl_policy_ref, upstream.g_kl_ref_policy)
    refuse(
        ref_logits is None and any(g is not None for g in g_kls), "ref_logits is required for these outputs"
    )
    if target_in is not None:
        refuse(labels is None, "target_in belongs to labels")
        shape = tuple(labels.shape) if ref_logits is None else (2, *labels.shape)
        refuse(
            tuple(target_in.shape) != shape,
            f"target_in has shape {tuple(target_in.shape)}; legal here: {shape}",
        )
        refuse(
            target_in.dtype != ffi.acc_dtype(logits.dtype) or target_in.device != logits.device,
            "target_in is not of logits' device and arithmetic",
        )
        refuse(not target_in.is_contiguous(), "target_in must be contiguous")
