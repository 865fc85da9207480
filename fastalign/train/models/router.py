"""The load-balancing loss of a mixture of experts, where the model's own configuration asks for it.

transformers adds `router_aux_loss_coef` times this loss to the one that a model reports, if
`output_router_logits` is set (Fedus et al. 2021, arXiv 2101.03961): experts x sum over them of (share of the
tokens that they get) x (mean probability that the router gives them). Training by another loss has to do the
same, or the experts may collapse.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastalign.train.errors import UserError


class RouterLoss:
    """The loss of a step: coefficient x the mean over its packs, weighted by their tokens. In a pack every
    token counts, prompts included; there is no padding. What a method looks at without learning from it adds
    nothing."""

    def __init__(self, coefficient: float):
        self.coefficient = coefficient
        self._last: torch.Tensor | None = None

    def see(self, output: Any) -> None:
        """Note the loss of a forward pass."""
        found = getattr(output, "aux_loss", None)
        self._last = found if isinstance(found, torch.Tensor) else None

    def seen(self) -> bool:
        return self._last is not None

    def part(self, tokens: int, of: int, sums: Any = None) -> torch.Tensor:
        """The share of the last forward pass, of `tokens` of a step's tokens, in the step's loss; `sums`
        (MetricSums) gets "aux_loss", as it is before the coefficient."""
        loss, self._last = self._last, None
        if sums is not None:
            sums.add({"aux_loss": (loss.detach() * tokens, tokens)})
        return self.coefficient * (tokens / of) * loss


def find_router(model: torch.nn.Module) -> tuple[RouterLoss | None, str | None]:
    """(the loss that the model's configuration asks for, or None; what to say about it)."""
    config = model.config
    text = getattr(config, "text_config", None) or config
    places = [
        (part, name) for part in (model, text, config) for name in ("router_aux_loss_coef", "aux_loss_coef")
    ]
    coefficient = next(
        (value for part, name in places if (value := getattr(part, name, None)) is not None), None
    )
    if not coefficient:  # no router, or one that is to be left alone
        return None, None
    if not isinstance(coefficient, (int, float)) or not 0 <= coefficient < math.inf:
        raise UserError(
            f"the model's configuration has router_aux_loss_coef {coefficient!r}: it must be a finite number, "
            "not negative"
        )
    if getattr(text, "output_router_logits", False) or getattr(config, "output_router_logits", False):
        return (
            RouterLoss(coefficient),
            f"its load-balancing loss is added, times {coefficient:g} (router_aux_loss_coef), over all tokens "
            "of a pack",
        )
    return (
        None,
        "its load-balancing loss is left out, as the model's configuration says (output_router_logits: false)",
    )
