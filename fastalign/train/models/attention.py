"""Attention over a pack of sequences, one sequence at a time, for models from transformers.

transformers keeps packed sequences apart with a mask over the whole pack: correct, but it costs T^2 for T
packed tokens, and drops the fast causal kernels. This implementation, registered as "fastalign_packed", gets
the sequence lengths as a keyword argument (`packed_lengths`) and runs one causal
`scaled_dot_product_attention` per sequence: the sum of the squares instead of the square of the sum, with no
mask in memory, on any device.

Like FlashAttention it sees no mask, so it serves the architectures that FlashAttention serves (those that
pass a sliding window and the like by keyword); what it cannot do it refuses.

Rotary embeddings that choose their frequencies by the largest position of the whole batch (LongRoPE, dynamic
NTK) are called once per sequence (`rotary_per_sequence`), so that a sequence gets those that it has alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "fastalign_packed"
# Keywords that would change the result and that scaled_dot_product_attention cannot honour.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask", "cache")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed_lengths: tuple[int, ...] | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of the packed sequences. query [1, heads, T, D], key and value [1, kv
    heads, T, D]; returns [1, T, heads, D]. Row t sees rows s of its own sequence with t - sliding_window < s
    <= t."""
    refused = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    refused += ["attention_mask"] if attention_mask is not None else []
    refused += (
        []
        if (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        else ["is_causal=False"]
    )
    if refused:
        raise ValueError(f"packed attention does not support {', '.join(refused)} ({type(module).__name__})")
    if packed_lengths is None:
        raise ValueError(
            f"the model does not hand packed_lengths on to its attention layers ({type(module).__name__})"
        )

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    outputs = []
    for q, k, v in zip(*(x.split(packed_lengths, dim=2) for x in (query, key, value))):
        length = q.shape[2]
        window = None
        if sliding_window is not None and sliding_window < length:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            window = (distance >= 0) & (distance < sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, dropout_p=dropout, scale=scaling, is_causal=window is None
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, packed_attention)


def length_scaled(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The rotary embeddings of a model that look at the largest position of what they are given."""
    return [module for module in model.modules() if _scaled_types(module)]


def _scaled_types(module: torch.nn.Module) -> list[str | None]:
    """The kinds of layers (None: all of them) for which a rotary embedding does so."""
    kind = getattr(module, "rope_type", None)
    named = kind if isinstance(kind, dict) else {None: kind}
    return [
        name
        for name, each in named.items()
        if isinstance(each, str) and (each == "longrope" or "dynamic" in each)
    ]


def scaled_beyond(module: torch.nn.Module) -> int:
    """Up to how many tokens a sequence has the frequencies that every shorter one has."""
    parameters = (
        getattr(module.config, "rope_parameters", None) or getattr(module.config, "rope_scaling", None) or {}
    )
    limits = [module.original_max_seq_len]
    for name in _scaled_types(module):
        own = parameters if name is None else parameters.get(name, {})
        limits.append(own.get("original_max_position_embeddings") or limits[0])
    return min(limits)


@contextlib.contextmanager
def rotary_per_sequence(modules: Sequence[torch.nn.Module], lengths: Sequence[int]) -> Iterator[None]:
    """Within: these rotary embeddings take the positions of a pack sequence by sequence."""

    def apart(whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            parts = []
            for positions in position_ids.split(lengths, dim=-1):
                whole(
                    x, torch.zeros_like(positions[..., :1]), *args, **kwargs
                )  # dynamic NTK remembers the longest sequence: forget it
                parts.append(whole(x, positions, *args, **kwargs))
            if isinstance(parts[0], torch.Tensor):
                return torch.cat(parts, dim=-2)
            return tuple(torch.cat(part, dim=-2) for part in zip(*parts))

        return forward

    for module in modules:
        module.forward = apart(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
