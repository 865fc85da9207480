"""Other packages' functions for the same operations, imported where they are installed and never rewritten.
Those for whole steps are in cases/steps.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.bench.eager import CLIP


class Peer(NamedTuple):
    """`load` imports and returns the function, or raises ImportError. It takes and returns what the plain
    function of eager.py does: (logits, labels) -> values, say. `overwrites`: it may write over the logits.
    `on_gpu_only`: its kernels run nowhere else."""

    name: str
    load: Callable[[], Callable[..., Any]]
    overwrites: bool = False
    on_gpu_only: bool = False


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


def _liger_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels: (
        -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none")
    )


def _liger_linear_backward() -> Any:
    import liger_kernel.transformers.functional  # noqa: F401

    raise ImportError("its backward takes one upstream gradient for all tokens, not one for each")


def _cce_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: -linear_cross_entropy(hidden, weight, labels, reduction="none")


def _verl_logprobs() -> Callable[[Tensor, Tensor], Tensor]:
    from verl.utils.torch_functional import logprobs_from_logits

    return lambda logits, labels: logprobs_from_logits(logits, labels)


def _verl_logprobs_and_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    return lambda logits, labels: torch.stack(
        [logprobs_from_logits(logits, labels), entropy_from_logits(logits)]
    )


def _verl_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    return lambda hidden, weight, labels: fused(hidden, weight, labels)[0]


def _verl_gae() -> Callable[..., tuple[Tensor, Tensor]]:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        """Its advantages are whitened; those before follow from the returns."""
        _, returns = compute_gae_advantage_return(rewards, values, mask, gamma, lam)
        return returns - values, returns

    return gae


def _verl_policy_loss() -> Callable[..., Tensor]:
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    config = SimpleNamespace(
        clip_ratio=CLIP,
        clip_ratio_low=None,
        clip_ratio_high=None,
        global_batch_info={},
        get=lambda name, default: default,
    )
    return lambda logprobs, old, advantages, mask: compute_policy_loss_vanilla(
        old, logprobs, advantages, mask, config=config
    )[0]


_TRL, _LIGER, _CCE = "trl selective_log_softmax", "liger-kernel liger_cross_entropy", "cut-cross-entropy"
_VERL = "verl logprobs_from_logits"
_HEAD = (
    Peer("trl ChunkedLogProbFunction", _trl_chunked),
    Peer("F.linear_cross_entropy", _torch_linear_cross_entropy),
    Peer("verl FusedLinearForPPO", _verl_linear),
    Peer("cut-cross-entropy linear_cross_entropy", _cce_linear, on_gpu_only=True),
)
_LIGER_LINEAR = "liger-kernel liger_fused_linear_cross_entropy"
PEERS: dict[str, tuple[Peer, ...]] = {
    "token_logprobs": (
        Peer(_TRL, _trl_logprobs),
        Peer(_VERL, _verl_logprobs),
        Peer(_LIGER, _liger_cross_entropy, overwrites=True, on_gpu_only=True),
        Peer(_CCE, _cut_cross_entropy),
    ),
    "token_logprobs_entropy": (
        Peer(f"{_TRL} + entropy_from_logits", _trl_logprobs_and_entropy),
        Peer(f"{_VERL} + entropy_from_logits", _verl_logprobs_and_entropy),
    ),
    "token_logprobs_backward": (
        Peer(_TRL, _trl_logprobs),
        Peer(_VERL, _verl_logprobs),
        Peer(_LIGER, _liger_cross_entropy, overwrites=True, on_gpu_only=True),
        Peer(_CCE, _cut_cross_entropy),
    ),
    "linear_token_logprobs": (*_HEAD, Peer(_LIGER_LINEAR, _liger_linear, on_gpu_only=True)),
    **dict.fromkeys(
        ("linear_token_logprobs_backward", "linear_token_logprobs_frozen"),
        (*_HEAD, Peer(_LIGER_LINEAR, _liger_linear_backward)),
    ),
    "gae": (Peer("verl compute_gae_advantage_return (whitened)", _verl_gae),),
    "policy_loss": (Peer("verl compute_policy_loss_vanilla", _verl_policy_loss),),
}
