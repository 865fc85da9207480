"""Merging what several runs learnt from the same start: the last step of PAFT (Pentyala et al. 2024, arXiv
2406.17923). A merge is a function of one tensor of each model; `merge_files.py` carries it through model
directories."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fastalign.train.errors import UserError

Weights = Mapping[str, torch.Tensor]
DENSITY, T = 0.2, 0.5  # where a rule that has them is given none
_PARALLEL = 1e-6  # sine of an angle at which two directions count as one


class Kind(NamedTuple):
    """What a method is. `share`: the weight of a model that is given none, "mean": 1 / their number. `options`:
    what it has beside the weights."""

    what: str
    share: float | str
    options: tuple[str, ...] = ()


KINDS = {
    "linear": Kind("sum of w_i d_i; without weights the mean of the models", "mean"),
    "task_arithmetic": Kind("sum of w_i d_i; without weights the sum of the differences", 1.0),
    "ties": Kind("of each w_i d_i the largest, per entry the mean of those that have the sign of their sum", 1.0, ("density",)),
    "dare": Kind("sum of w_i drop(d_i); drop: entries at random, the rest divided by the density", "mean", ("density", "seed")),
    "dare_ties": Kind("per entry the mean of those w_i drop(d_i) that have the sign of their sum", 1.0, ("density", "seed")),
    "slerp": Kind("the great circle from d_1 (t = 0) to d_2 (t = 1), lengths included", 1.0, ("t",)),
}  # fmt: skip
METHODS = tuple(KINDS)


def merge_weights(
    base: Weights,
    tuned: Sequence[Weights],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    t: float | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """base + merged differences of the tuned models from it, tensor by tensor.

    With d_i = tuned_i - base:

    - linear: sum of w_i d_i; w_i = 1 / n by default: the mean of the models.
    - task_arithmetic (Ilharco et al. 2023, arXiv 2212.04089): the same; w_i = 1 by default.
    - ties (Yadav et al. 2023, arXiv 2306.01708): of each w_i d_i only the `density` share of largest
      magnitude; per entry the sign of their sum; the mean of those that have this sign.
    - dare (Yu et al. 2024, arXiv 2311.03099): each entry of d_i is kept with probability `density` and then
      divided by it, else 0; sum of w_i times that; w_i = 1 / n by default.
    - dare_ties: entries dropped as by dare, then signs elected and means taken as by ties.
    - slerp, of two models: (sin((1 - t) Omega) d_1 + sin(t Omega) d_2) / sin(Omega), Omega the angle between d_1
      and d_2, each taken as one vector; (1 - t) d_1 + t d_2 where they are parallel (sin(Omega) < 1e-6) or
      one is 0.

    Args:
        base, tuned: state dicts with the same names and shapes; entries that are not floating point are taken
            from `base`.
        weights: one per tuned model; default: 1 / their number for linear and dare, 1 for the others. slerp has
            none.
        density: in (0, 1], default 0.2; of ties, dare, dare_ties. t: in [0, 1], default 0.5; of slerp.
        seed: of dare and dare_ties. What is dropped is drawn for each model and name apart, so that neither the
            order of the tensors nor the files that they lie in matter.

    Returns:
        A state dict in base's dtypes, computed in float32 or wider.

    Raises:
        UserError: an unknown method, no tuned model, names or shapes that differ, a wrong number of weights,
            density outside (0, 1], t outside [0, 1], an option that the method has not.
    """
    rule = make_rule(len(tuned), method=method, weights=weights, density=density, t=t, seed=seed)
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
    return {name: rule(name, start, [other[name] for other in tuned]) for name, start in base.items()}


def make_rule(
    count: int,
    *,
    method: str,
    weights: Sequence[float | None] | None = None,
    density: float | None = None,
    t: float | None = None,
    seed: int = 0,
) -> Rule:
    """How `count` models are merged, with every option checked: see `merge_weights`. A weight that is None is the
    method's default."""
    if method not in KINDS:
        raise UserError(f"method {method!r} is unknown; legal: {', '.join(METHODS)}")
    if not count or weights is not None and len(weights) != count:
        raise UserError(
            f"{count} tuned models and {0 if weights is None else len(weights)} weights: one weight for "
            "each is legal"
        )
    kind = KINDS[method]
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density is {density}: it must lie in (0, 1]")
    if t is not None and not 0 <= t <= 1:
        raise UserError(f"t is {t}: it must lie in [0, 1]")
    for name, value in (("density", density), ("t", t)):
        if value is not None and name not in kind.options:
            having = ", ".join(other for other, each in KINDS.items() if name in each.options)
            raise UserError(f"{name} is given, and {method} has none; it belongs to {having}")
    given = [None] * count if weights is None else list(weights)
    if method == "slerp" and (count != 2 or any(weight is not None for weight in given)):
        raise UserError(
            f"slerp takes two models without weights (t says how near to the second), got {count}"
            + ("" if count != 2 else " with weights")
        )
    for weight in given:
        if weight is not None and not math.isfinite(weight):
            raise UserError(f"a weight is {weight}: it must be finite")
    default = 1 / count if kind.share == "mean" else kind.share
    shares = tuple(default if weight is None else float(weight) for weight in given)
    density = DENSITY if density is None else density
    return Rule(method, shares, density, T if t is None else t, seed)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the tensors of one name become one; made by `make_rule`."""

    method: str
    shares: tuple[float, ...]
    density: float
    t: float
    seed: int

    def __call__(self, name: str, start: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
        """The merged tensor, in the dtype of `start`, computed in float32 or wider."""
        if not start.is_floating_point():
            return start.clone()
        wide = torch.promote_types(start.dtype, torch.float32)
        deltas = [other.to(wide) - start.to(wide) for other in others]
        if self.method.startswith("dare"):
            deltas = [self._dropped(name, i, delta) for i, delta in enumerate(deltas)]
        return (start.to(wide) + self._combined(deltas)).to(start.dtype)

    def _combined(self, deltas: list[torch.Tensor]) -> torch.Tensor:
        if self.method == "slerp":
            return _slerp(*deltas, self.t)
        weighed = torch.stack([share * delta for share, delta in zip(self.shares, deltas)])
        if self.method == "ties":
            return _elect(torch.stack([_largest(each, self.density) for each in weighed]))
        return _elect(weighed) if self.method == "dare_ties" else weighed.sum(0)

    def _dropped(self, name: str, model: int, delta: torch.Tensor) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{model}/{name}".encode(), digest_size=8).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        kept = torch.rand(delta.shape, generator=draw).to(delta.device) < self.density
        return torch.where(kept, delta / self.density, 0.0)


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The entries of largest magnitude, at least one, the others 0; of equal ones the last are kept."""
    flat = delta.flatten()
    drop = flat.numel() - max(1, round(density * flat.numel()))
    if drop <= 0:
        return delta
    magnitude = flat.abs()
    edge = magnitude.kthvalue(drop).values
    out = magnitude < edge
    equal = (magnitude == edge).nonzero().flatten()
    out[equal[: drop - int(out.sum())]] = True
    return flat.masked_fill(out, 0.0).view_as(delta)


def _elect(deltas: torch.Tensor) -> torch.Tensor:
    """deltas [models, ...] -> [...]: per entry the sign of the sum, and the mean of those that have it."""
    agreeing = (deltas.sign() == deltas.sum(0).sign()) & (deltas != 0)
    return torch.where(agreeing, deltas, 0.0).sum(0) / agreeing.sum(0).clamp(min=1)


def _slerp(one: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    lengths = [float(each.double().norm()) for each in (one, other)]
    if min(lengths) == 0:
        return (1 - t) * one + t * other
    a, b = (each.double() / length for each, length in zip((one, other), lengths))
    # Kahan's: exact for small angles, too, where the arc cosine is not
    angle = 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))
    if math.sin(angle) < _PARALLEL:
        return (1 - t) * one + t * other
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)
