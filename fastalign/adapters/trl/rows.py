"""What takes the place of TRL's functions on logits: its signatures, its result types, our rows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils import is_triton_available
from trl.trainer.utils import _supports_trl_loss_kernel

import fastalign
from fastalign.runtime.checks import check_integers, check_same_device, check_shape


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`fastalign.selective_log_softmax` in TRL's result type."""
    dtype = _result_type(logits, index, row_mask)
    return fastalign.selective_log_softmax(logits, index, temperature, row_mask, dtype=dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """`fastalign.entropy_from_logits` in TRL's result type. chunk_size is checked, and has no effect."""
    return fastalign.entropy_from_logits(logits, chunk_size, dtype=_result_type(logits))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `index` and entropies in one pass, in TRL's result type.

    Args:
        logits: (..., V). index: (...), integers in [0, V); not read where the mask is False.
        entropy_requires_grad: whether a gradient comes back through the entropy.
        temperature: > 0. row_mask: (...), bool or numbers: both results are exactly 0, without gradient,
            where it is False (0).
    """
    check_integers("index", index)
    kept = None
    if row_mask is not None:
        check_shape("row_mask", row_mask, tuple(logits.shape[:-1]))
        check_shape("index", index, tuple(logits.shape[:-1]))
        check_same_device("row_mask", row_mask, "logits", logits)
        kept = row_mask != 0
    stats = fastalign.token_stats(
        logits, index, outputs=("logprob", "entropy"), mask=kept, temperature=temperature,
        ignore_index=NO_LABEL,
    )  # fmt: skip
    dtype = _result_type(logits, index, row_mask)
    logprob, entropy = stats.logprob.to(dtype), stats.entropy.to(dtype)
    return logprob, entropy if entropy_requires_grad else entropy.detach()


# An ignore_index that no label can have: TRL's functions score every index.
NO_LABEL = -(1 << 62)


def _result_type(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> torch.dtype:
    """fp32 where TRL has a kernel for the call, else that of the logits."""
    kernel = is_triton_available() and _supports_trl_loss_kernel(logits, index, row_mask)
    return torch.float32 if kernel else logits.dtype
