"""Other packages' functions for the same operations, imported where they are installed and never
rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Peer(NamedTuple):
    """`load` imports and returns the function (logits, labels) -> values, in the layout of the op's own
    result, or raises ImportError. `overwrites`: it may write over the logits."""

    name: str
    load: Callable[[], Callable[[Tensor, Tensor], Tensor]]
    overwrites: bool = False


def _trl_logprobs() -> Callable[[Tensor, Tensor], Tensor]:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, labels: selective_log_softmax(logits, labels)


def _trl_logprobs_and_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda logits, labels: torch.stack(
        [selective_log_softmax(logits, labels), entropy_from_logits(logits)]
    )


def _liger_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def logprobs(logits: Tensor, labels: Tensor) -> Tensor:
        result = liger_cross_entropy(logits, labels, reduction="none")
        return -(result[0] if isinstance(result, tuple) else result)

    return logprobs


def _cut_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    import cut_cross_entropy  # noqa: F401

    raise ImportError("fused with the LM head: it takes hidden states and weights, not logits")


def _trl_chunked() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from trl.trainer.utils import _ChunkedLogProbFunction as function

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, labels, 1.0, 4096, None, 1.0, ())[0]

    return logprobs


def _torch_linear_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    linear_cross_entropy, options = (
        torch.nn.functional.linear_cross_entropy,
        torch.nn.LinearCrossEntropyOptions(),
    )

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)

    return logprobs


_TRL, _LIGER, _CCE = "trl selective_log_softmax", "liger-kernel liger_cross_entropy", "cut-cross-entropy"
PEERS: dict[str, tuple[Peer, ...]] = {
    "token_logprobs": (
        Peer(_TRL, _trl_logprobs),
        Peer(_LIGER, _liger_cross_entropy, overwrites=True),
        Peer(_CCE, _cut_cross_entropy),
    ),
    "token_logprobs_entropy": (Peer(f"{_TRL} + entropy_from_logits", _trl_logprobs_and_entropy),),
    "token_logprobs_backward": (
        Peer(_TRL, _trl_logprobs),
        Peer(_LIGER, _liger_cross_entropy, overwrites=True),
        Peer(_CCE, _cut_cross_entropy),
    ),
    **dict.fromkeys(
        ("linear_token_logprobs", "linear_token_logprobs_backward", "linear_token_logprobs_frozen"),
        (
            Peer("trl ChunkedLogProbFunction", _trl_chunked),
            Peer("F.linear_cross_entropy", _torch_linear_cross_entropy),
        ),
    ),
}
