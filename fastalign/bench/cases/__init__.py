"""What is measured: the case of every op, with the backends and the other packages that take part on this
machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign.bench.cases import head as head_cases
from fastalign.bench.cases import packed as packed_cases
from fastalign.bench.cases import rows as row_cases
from fastalign.bench.cases import steps as step_cases
from fastalign.bench.cases.case import Case, Contestant
from fastalign.bench.peers import PEERS
from fastalign.bench.shapes import OPS, STEP_OPS, Shape


def make_case(
    op: str,
    shape: Shape,
    device: torch.device,
    *,
    backends: tuple[str, ...] | None = None,
    compile: bool = True,
    cache_bytes: int = 0,
) -> Case:
    """The case of `op` at `shape`. backends: ours (default: see `own_backends`); compile: with
    torch.compile's contestants; cache_bytes: the inputs together are at least three times as large."""
    case = _MAKERS[op](shape, device, cache_bytes)
    (ours,) = [c for c in case.contestants if c.kind == "ours"]
    names = own_backends(_PUBLIC.get(op, op), case.inputs[0][0]) if backends is None else backends
    mine = [replace(ours, name=f"fastalign {name}", run=_on_backend(name, ours.run)) for name in names]
    others = [
        c
        for c in case.contestants
        if c.kind in ("read", "floor", "eager", "peer") or (c.kind == "compiled" and compile)
    ]
    for peer in PEERS.get(op, ()):
        try:
            run = case.of_peer(peer.load())
            if peer.on_gpu_only and device.type == "cpu":
                raise RuntimeError("installed; its kernels are Triton's, which need a GPU")
            others.append(Contestant(peer.name, run, "peer", peer.overwrites))
        except (
            ImportError,
            RuntimeError,
            AttributeError,
        ) as error:  # not installed, not for this device, or another version's names
            case.missing[peer.name] = str(error).splitlines()[0]
    case.contestants = mine + others
    torch._dynamo.reset()  # every case compiles for its own shapes
    return case


def own_backends(public: str, tensor: Tensor) -> tuple[str, ...]:
    """The backends that can serve a call on `tensor`, fastest first; the reference only where it is alone,
    Triton's interpreter never."""
    lines = [line.split(maxsplit=1) for line in fastalign.explain(public, tensor).splitlines()[1:]]
    able = [name for name, why in lines if why == "chosen" or why.startswith("able")]
    kernels = [
        name
        for name in able
        if name != "reference" and not (name == "triton" and tensor.device.type == "cpu")
    ]
    return tuple(kernels or able)


def _on_backend(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forced(*inputs: Any) -> Tensor:
        with fastalign.use_backend(name):
            return run(*inputs)

    return forced


# The public function behind an op, where it has another name.
_PUBLIC = {
    "token_logprobs_entropy": "token_stats",
    "token_logprobs_backward": "token_logprobs",
    "linear_token_logprobs": "token_logprobs",
    "linear_token_logprobs_backward": "token_logprobs",
    "linear_token_logprobs_frozen": "token_logprobs",
    "dpo_step": "token_logprobs",
    "grpo_step": "token_logprobs",
}
_MAKERS = {
    "token_logprobs": row_cases.logprobs,
    "token_logprobs_entropy": row_cases.logprobs_entropy,
    "token_logprobs_backward": row_cases.logprobs_backward,
    "token_kl": row_cases.token_kl,
    "token_kl_loss": row_cases.token_kl_loss,
    "linear_token_logprobs": head_cases.logprobs,
    "linear_token_logprobs_backward": head_cases.backward,
    "linear_token_logprobs_frozen": head_cases.frozen,
    "sequence_sum": packed_cases.sequence_sum,
    "preference_loss": packed_cases.preference_loss,
    "listwise_loss": packed_cases.listwise_loss,
    "kl_estimate": packed_cases.kl_estimate,
    "gae": packed_cases.gae,
    "policy_loss": packed_cases.policy_loss,
    "dpo_step": step_cases.dpo,
    "grpo_step": step_cases.grpo,
}
assert set(_MAKERS) == {*OPS, *STEP_OPS}
