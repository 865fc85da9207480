"""The LM head of a Hugging Face causal LM: the linear layer that `linear_token_stats` multiplies with, and
what the model does to its logits afterwards. Read from the model and its configuration, and tried before it
is believed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.rows.linear import linear_token_stats
from fastalign.rows.stats import TokenStats

# Names in configurations -> powers of their values that models scale their logits by: Granite divides by the
# number that HyperCLOVA X multiplies with. Which it is, is tried.
_SCALES = {
    "logit_scale": (1,),
    "logits_scaling": (-1, 1),
    "lm_head_multiplier": (1,),
    "output_multiplier": (1,),
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_LEGAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = ("Parameter", "Tensor", "DTensor")  # types of weights that are what they hold
_TUNER = ("base_layer", "lora_A", "token_adapter")  # attributes of layers that add something to another
CANNOT_RUN = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)  # how a model fails
_NARROW = 8  # logits per row, where the model is tried with made-up ones on long inputs


class HeadRefused(ValueError):
    """A model's logits cannot be had from its hidden states; one line says why."""


class ModelHead(NamedTuple):
    """logits = cap(logit_scale (hidden weight^T + bias)), cap(x) = softcap tanh(x / softcap), as in
    `token_stats`. module: the linear layer, a torch.nn.Linear; its weight and bias are read when they are
    used."""

    module: Any
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        """[V, H]"""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """[V]"""
        return self.module.bias

    def transforms_as(self, other: ModelHead) -> bool:
        """Whether logits of both are scaled and capped alike."""
        return self[1:] == other[1:]

    def transform(self, logits: Tensor) -> Tensor:
        """What the model makes of the layer's results."""
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def stats(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        ref: tuple[ModelHead, Tensor] | None = None,
        **options: Any,
    ) -> TokenStats:
        """`token_stats` of the model's logits, which are not made. ref: the reference's head and hidden
        states. options: those of `linear_token_stats`.

        Raises:
            ValueError: the reference transforms its logits in another way; and as `linear_token_stats`."""
        if ref is not None:
            head, ref_hidden = ref
            if not self.transforms_as(head):
                raise ValueError(
                    f"ref has scale and softcap {head[1:]}; legal here: those of the policy, {self[1:]}"
                )
            options |= {"ref_hidden": ref_hidden, "ref_weight": head.weight, "ref_bias": head.bias}
        scale = {"logit_scale": self.logit_scale, "softcap": self.softcap}
        return linear_token_stats(hidden, self.weight, labels, bias=self.bias, **scale, **options)

    def hidden_of(self, run: Callable[[], Any]) -> tuple[Tensor, Any]:
        """(hidden states as the head gets them, what `run` returns), where `run` runs the model once. Its
        logits are one number per row instead, without gradient and without meaning."""
        return _single(self.module, lambda hidden: hidden.detach()[..., :1].clone(), run)


def model_head(
    model: Any, run: Callable[[], Tensor] | None = None, long: Callable[[], Tensor] | None = None
) -> ModelHead:
    """The head of a causal LM.

    Tied embeddings, a bias, a scale or softcap of the logits, frozen weights, and the module that an adapter
    keeps for the head (`modules_to_save`) are used. What would be passed over is refused.

    Args:
        model: a causal LM with `get_output_embeddings()` and `config`.
        run: runs the model once on a few tokens and returns its logits (..., V), as accurate as it computes.
            None: model(input_ids=...) of 4 tokens.
        long: the same on an input as long as there will be: some models do something else to long ones.

    Raises:
        HeadRefused: no linear layer; one that an adapter changes, that is quantised, offloaded or hooked; or
            logits that are not this layer's, scaled and capped by a number that the configuration names.
    """
    return tried_head(model, plain_layer(model), run or (lambda: _few_tokens(model)), long)


def _few_tokens(model: Any) -> Tensor:
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    return model(input_ids=ids).logits


def plain_layer(model: Any) -> Any:
    """The linear layer from hidden states to logits, by a look at the model alone."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise HeadRefused(f"{type(model).__name__} does not say which module is its LM head")
    layer = _active(layer)
    what, weight = type(layer).__name__, getattr(layer, "weight", None)
    if any(hasattr(layer, name) for name in _TUNER):
        raise HeadRefused(
            f"an adapter changes its LM head ({what}): merge it, or train the head itself (modules_to_save)"
        )
    if not isinstance(weight, Tensor):
        raise HeadRefused(f"its LM head is no linear layer ({what})")
    if type(weight).__name__ not in _PLAIN or weight.dtype not in _LEGAL or weight.dim() != 2:
        stored = f"{type(weight).__name__} of {weight.dtype}, {' x '.join(map(str, weight.shape))}"
        raise HeadRefused(
            f"its LM head is quantised ({what}: {stored}); legal: fp32, bf16, fp16, fp64 of [V, H]"
        )
    if getattr(type(layer), "forward", None) is not torch.nn.Linear.forward:
        raise HeadRefused(f"its LM head is no plain linear layer ({what})")
    if weight.is_meta:
        raise HeadRefused("its LM head is not in memory (offloaded)")
    if "forward" in vars(layer) or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise HeadRefused(
            "hooks hang on its LM head, or its forward has been replaced, which would be passed over"
        )
    return layer


def _active(layer: Any) -> Any:
    """Of a wrapper that keeps copies of a module for adapters, the one that runs."""
    if not (hasattr(layer, "modules_to_save") and hasattr(layer, "original_module")):
        return layer
    names = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", None) or []
    names = [names] if isinstance(names, str) else list(names)
    if (
        getattr(layer, "disable_adapters", False)
        or not all(name in layer.modules_to_save for name in names)
        or not names
    ):
        return layer.original_module
    if len(names) > 1:
        raise HeadRefused(f"several adapters keep an LM head ({', '.join(names)}); make one of them active")
    return layer.modules_to_save[names[0]]


@torch.no_grad()
def tried_head(
    model: Any, layer: Any, run: Callable[[], Tensor], long: Callable[[], Tensor] | None = None
) -> ModelHead:
    """The head whose linear layer is known. First the layer is made to return numbers of all sizes: what the
    model makes of them says how it transforms its logits. Then its own logits must be the transformed
    product."""
    try:
        made, out = _made_up(layer, run, layer.weight.shape[0])
        head = next((head for head in _candidates(model, layer) if _equal(out, made, head)), None)
        if head is None:
            raise HeadRefused(
                "it does something to its logits that its configuration does not name as a scale or a softcap"
            )
        hidden, logits = _single(layer, lambda hidden: torch.nn.Linear.forward(layer, hidden), run)
        product = torch.nn.functional.linear(hidden.to(layer.weight.dtype), layer.weight, layer.bias)
        if not _close(logits, head.transform(product.float())):
            raise HeadRefused("its logits are not the product of the head's input and weight")
        if long is not None:
            made, out = _made_up(layer, long, _NARROW)
            if not _equal(out, made, head):
                raise HeadRefused("it does something else to the logits of long inputs")
        return head
    except HeadRefused:
        raise
    except CANNOT_RUN as error:
        raise HeadRefused(shortly(error)) from error


def shortly(error: Exception) -> str:
    """Why a model fails when its head returns something else, in one line."""
    if isinstance(error, HeadRefused):
        return str(error)
    return f"it cannot run without its own logits: {' '.join(str(error).split())[:200]}"


def _candidates(model: Any, layer: Any) -> Iterator[ModelHead]:
    """What the configuration may mean; the plain product last."""
    config = getattr(model, "config", None)
    places = [p for p in (getattr(config, "get_text_config", lambda: None)(), config, model) if p is not None]

    def numbers(name: str) -> list[float]:
        found = [getattr(place, name, None) for place in places]
        return [float(x) for x in found if isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0]

    scales = [x**power for name, powers in _SCALES.items() for x in numbers(name) for power in powers]
    softcaps = [x for name in _SOFTCAPS for x in numbers(name)]
    for softcap, scale in itertools.product([*softcaps, None], [*scales, 1.0]):
        yield ModelHead(layer, scale, softcap)


def _made_up(layer: Any, run: Callable[[], Tensor], width: int) -> tuple[Tensor, Tensor]:
    """(numbers from 1e-2 to 1e3 of either sign that the layer is made to return, [T, width]; what the model
    makes of them)."""
    made = []

    def numbers(hidden: Tensor) -> Tensor:
        shape, generator = (*hidden.shape[:-1], width), torch.Generator().manual_seed(0)
        size = 10.0 ** (torch.rand(shape, generator=generator) * 5 - 2)
        sign = torch.randint(2, shape, generator=generator) * 2 - 1
        # In the type that the layer itself would return: under autocast that of its products.
        dtype = torch.nn.functional.linear(hidden[..., :1, :], layer.weight[:1]).dtype
        made.append((size * sign).to(hidden.device, dtype))
        return made[0].clone()

    _, out = _single(layer, numbers, run)
    return made[0].reshape(-1, width), out


def _single(layer: Any, output: Callable[[Tensor], Tensor], run: Callable[[], Any]) -> tuple[Tensor, Any]:
    """(what the layer is given, what `run` returns) where the layer returns output(input) in its place."""
    seen: list[Tensor] = []

    def forward(input: Tensor) -> Tensor:
        seen.append(input)
        return output(input)

    layer.forward = forward
    try:
        result = run()
    finally:
        del layer.forward
    if len(seen) != 1:
        raise HeadRefused(f"it runs its LM head {len(seen)} times in a forward pass, not once")
    return seen[0], result


def _equal(found: Tensor, made: Tensor, head: ModelHead) -> bool:
    """Whether these are the numbers, transformed, one by one, to the rounding of a few operations in their
    type."""
    wanted = head.transform(made.float())
    if found.numel() != wanted.numel() or found.shape[-1] != wanted.shape[-1]:
        return False
    few = max(8 * torch.finfo(made.dtype).eps, 1e-5)
    return bool(((found.float().reshape(wanted.shape) - wanted).abs() <= few * wanted.abs()).all())


def _close(found: Tensor, wanted: Tensor) -> bool:
    """To the rounding of a product in 16 bits at most."""
    if found.numel() != wanted.numel() or found.shape[-1] != wanted.shape[-1]:
        return False
    return bool((found.float().reshape(wanted.shape) - wanted).abs().max() <= 2e-2 * wanted.abs().max())
