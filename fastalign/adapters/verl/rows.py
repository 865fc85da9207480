"""verl's functions of vocabulary rows."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.adapters.padded import NO_LABEL


def _flash_attention() -> bool:
    """Whether verl's log-probs are flash-attn's, which are fp32 and overwrite the logits in backward; by the
    flag and the variable that verl looks at."""
    functions = sys.modules["verl.utils.torch_functional"]
    return functions.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE and (
        os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
    )


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """(..., V), (...) -> (...), in the dtype that verl's has: fp32 where flash-attn is installed, else that of
    the logits. There, too, inplace_backward holds, and a label of -100 gives 0."""
    flash = _flash_attention()
    out = fa.token_logprobs(
        logits,
        labels,
        inplace_backward=bool(inplace_backward) and flash and logits.requires_grad,
        ignore_index=-100 if flash else NO_LABEL,
    )
    return out.to(torch.float32 if flash else logits.dtype)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """(..., V) -> (...), in the logits' dtype."""
    return fa.entropy_from_logits(logits, dtype=logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """[N, V] -> [N], fp32."""
    return fa.entropy_from_logits(logits, chunk_size, dtype=torch.float32)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """hidden (..., H), weight [V, H], labels (...) -> (log-probs [N], or their sum or mean; entropy [N]), fp32."""
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        # Its backward leaves the sum over the ranks of the hidden states' gradient to Megatron; ours takes it.
        from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

        return LinearCrossEntropy.apply(hidden, weight, labels, temperature, reduction, dist_process_group)
    reduced = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}.get(str(reduction).lower())
    if reduced is None:
        raise ValueError(f"reduction={reduction!r} is unknown; legal: none, sum, mean")
    stats = _linear_stats(hidden.flatten(0, -2), weight, labels.flatten(), temperature)
    return reduced(stats.logprob.float()), stats.entropy.float()


def fused_linear_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`FusedLinearForPPO.forward`: (log-probs fp32, entropy in the hidden states' dtype), both (...).
    chunk_size: so many rows have logits at once. Where impl_backend is Liger's entropies are fp32, and a label of
    -100 gives 0, as its function does."""
    functions = sys.modules["verl.utils.experimental.torch_functional"]
    liger = self.impl_backend == "liger" and functions._LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY is not None
    stats = _linear_stats(
        hidden_states, vocab_weights, input_ids, temperature, ignore_index=-100 if liger else NO_LABEL,
        workspace_bytes=self.chunk_size * vocab_weights.shape[0] * 4,
    )  # fmt: skip
    return stats.logprob.float(), stats.entropy.to(torch.float32 if liger else hidden_states.dtype)


def _linear_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Any,
    ignore_index: int = NO_LABEL,
    **options: Any,
) -> Any:
    return fa.linear_token_stats(
        hidden, weight, labels, outputs=("logprob", "entropy"), temperature=temperature, ignore_index=ignore_index,
        **options,
    )  # fmt: skip
