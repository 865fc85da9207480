"""Merging what several runs learnt from the same start: the last step of PAFT (Pentyala et al. 2024, arXiv
2406.17923)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastalign.train.errors import UserError

METHODS = ("linear", "ties")
Weights = Mapping[str, torch.Tensor]


def merge_weights(
    base: Weights,
    tuned: Sequence[Weights],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float = 0.2,
) -> dict[str, torch.Tensor]:
    """base + merged differences of the tuned models from it, tensor by tensor.

    - linear: sum of w_i d_i, with d_i = tuned_i - base.
    - ties (Yadav et al. 2023, arXiv 2306.01708): of each w_i d_i only the `density` share of largest
      magnitude; per entry the sign of
      their sum; the mean of those that have this sign.

    Args:
        base, tuned: state dicts with the same names and shapes; entries that are not floating point are taken
            from `base`.
        weights: one per tuned model; default: 1 / their number for linear, 1 for ties. density: in (0, 1],
            for ties.

    Returns:
        A state dict in base's dtypes, computed in float32 or wider.

    Raises:
        UserError: an unknown method, no tuned model, names or shapes that differ, a wrong number of weights,
            density outside (0, 1].
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; legal: {', '.join(METHODS)}")
    if not tuned or weights is not None and len(weights) != len(tuned):
        raise UserError(
            f"{len(tuned)} tuned models and {0 if weights is None else len(weights)} weights: one weight for "
            "each is legal"
        )
    if not 0 < density <= 1:
        raise UserError(f"density is {density}: it must lie in (0, 1]")
    for other in tuned:
        wrong = [
            name
            for name in {**base, **other}
            if name not in base or name not in other or base[name].shape != other[name].shape
        ]
        if wrong:
            raise UserError(
                f"the models to merge differ in {wrong[0]}: they must have the start's names and shapes"
            )
    shares = weights if weights is not None else [1 / len(tuned) if method == "linear" else 1.0] * len(tuned)
    merged = {}
    for name, start in base.items():
        if not start.is_floating_point():
            merged[name] = start.clone()
            continue
        wide = torch.promote_types(start.dtype, torch.float32)
        deltas = torch.stack(
            [share * (other[name].to(wide) - start.to(wide)) for share, other in zip(shares, tuned)]
        )
        change = deltas.sum(0) if method == "linear" else _ties(deltas, density)
        merged[name] = (start.to(wide) + change).to(start.dtype)
    return merged


def _ties(deltas: torch.Tensor, density: float) -> torch.Tensor:
    """deltas [models, ...] -> [...]."""
    flat = deltas.flatten(1)
    drop = flat.shape[1] - max(1, round(density * flat.shape[1]))
    order = flat.abs().argsort(dim=1, stable=True)[:, :drop]
    kept = flat.scatter(1, order, 0.0)
    agreeing = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    mean = torch.where(agreeing, kept, 0.0).sum(0) / agreeing.sum(0).clamp(min=1)
    return mean.view(deltas.shape[1:])
