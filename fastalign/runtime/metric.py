"""The forms in which losses and trainers report numbers: each knows how it merges with the same number of
another part of the batch.

Every form is a tuple of 0-dim tensors on the loss's device; `a.merge(b)` is exact (what one call on all the
data would give, up to rounding), `float(a)` is the number that is shown (NaN where nothing was seen).
`merge_metrics` merges what whole calls report, over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.runtime.distributed import merged_moments

if TYPE_CHECKING:
    from typing_extensions import Self


class _Sum(NamedTuple):
    """A sum over `count` things; sums and counts add up."""

    sum: Tensor
    count: Tensor

    def merge(self, other: Self) -> Self:
        return type(self)(self.sum + other.sum, self.count + other.count)


class Metric(_Sum):
    """A mean, or a ratio of two sums: sum / count. Add sums and counts, divide at the end."""

    __slots__ = ()

    def __float__(self) -> float:
        count = float(self.count)
        return float(self.sum) / count if count else math.nan


class Total(_Sum):
    """A sum or a number of things (`sum`), out of `count`: what is shown is the sum."""

    __slots__ = ()

    def __float__(self) -> float:
        return float(self.sum)


class _Extreme(NamedTuple):
    """Of `count` values the one that `choose` prefers; a NaN among them is not overlooked."""

    value: Tensor
    count: Tensor

    def merge(self, other: Self) -> Self:
        both = self.choose(self.value, other.value)
        value = torch.where(self.count == 0, other.value, torch.where(other.count == 0, self.value, both))
        return type(self)(value, self.count + other.count)

    def __float__(self) -> float:
        return float(self.value) if float(self.count) else math.nan


class Largest(_Extreme):
    """The largest of `count` values."""

    __slots__ = ()
    choose = staticmethod(torch.maximum)


class Smallest(_Extreme):
    """The smallest of `count` values."""

    __slots__ = ()
    choose = staticmethod(torch.minimum)


class _Moments(NamedTuple):
    """Of `count` values: their mean, and m2, the sum of the squared deviations from it."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def sum(self) -> Tensor:
        return self.m2

    def merge(self, other: Self) -> Self:
        return type(self)(*_merged(self, other))


class Variance(_Moments):
    """The variance of `count` values, m2 / count."""

    __slots__ = ()

    def __float__(self) -> float:
        count = float(self.count)
        return float(self.m2) / count if count else math.nan


class Deviation(_Moments):
    """The unbiased standard deviation of `count` values, sqrt(m2 / (count - 1)); of a single value 0."""

    __slots__ = ()

    def __float__(self) -> float:
        count = float(self.count)
        return math.sqrt(float(self.m2) / max(count - 1.0, 1.0)) if count else math.nan


class ExplainedVariance(NamedTuple):
    """1 - Var(errors) / Var(targets) of `count` targets and their errors, each by mean and sum of squared
    deviations. NaN where the targets do not vary by more than rounding."""

    count: Tensor
    mean: Tensor
    m2: Tensor
    error_mean: Tensor
    error_m2: Tensor

    @classmethod
    def of(cls, targets: Variance, errors: Variance) -> ExplainedVariance:
        return cls(targets.count, targets.mean, targets.m2, errors.mean, errors.m2)

    def merge(self, other: ExplainedVariance) -> ExplainedVariance:
        targets, errors = (Variance(*_merged(a, b)) for a, b in zip(self._parts(), other._parts()))
        return ExplainedVariance.of(targets, errors)

    def __float__(self) -> float:
        m2, rounding = float(self.m2), float(self.count) * (1e-15 * float(self.mean)) ** 2
        return 1.0 - float(self.error_m2) / m2 if m2 > rounding else math.nan

    def _parts(self) -> tuple[Variance, Variance]:
        return Variance(self.count, self.mean, self.m2), Variance(self.count, self.error_mean, self.error_m2)


AnyMetric: TypeAlias = "Metric | Total | Largest | Smallest | Variance | Deviation | ExplainedVariance"
KINDS = (Metric, Total, Largest, Smallest, Variance, Deviation, ExplainedVariance)


def variance_of(x: Tensor, where: Tensor | None = None) -> Variance:
    """Count, mean and squared deviations of the entries of x (where `where` is True), in two passes and
    fp64."""
    x = x.detach().double()
    where = torch.ones_like(x, dtype=torch.bool) if where is None else where
    count = where.sum(dtype=torch.float64)
    mean = torch.where(where, x, 0.0).sum() / count.clamp(min=1.0)
    return Variance(count, mean, torch.where(where, (x - mean) ** 2, 0.0).sum())


def extremes_of(x: Tensor) -> tuple[Smallest, Largest]:
    """The smallest and the largest entry of x, which may be empty."""
    x = x.detach().reshape(-1)
    count = torch.full((), float(x.numel()), dtype=x.dtype, device=x.device)
    low, high = (x.amin(), x.amax()) if x.numel() else (x.new_full((), torch.inf), x.new_full((), -torch.inf))
    return Smallest(low, count), Largest(high, count)


def as_metric(value: Any) -> AnyMetric:
    """`value` with fp64 tensors for fields. A pair that is none of the forms is a mean's (sum, count)."""
    kind = type(value) if isinstance(value, KINDS) else Metric
    first, *rest = value
    first = torch.as_tensor(first, dtype=torch.float64).detach()
    return kind(first, *(torch.as_tensor(x, dtype=torch.float64, device=first.device).detach() for x in rest))


def merge_metrics(
    *parts: Mapping[str, AnyMetric], group: dist.ProcessGroup | None = None
) -> dict[str, AnyMetric]:
    """What the calls of several micro-batches report (`output.metrics()` of each), as one call on all of them
    would.

    Args:
        parts: name -> metric. A name may be absent from some of them.
        group: a process group; the result is over all its ranks, the same on each. Every rank must come with
            the same names.

    Returns:
        name -> metric, with fp64 tensors; `float(metric)` is its value.

    Raises:
        TypeError: one name for metrics of two forms. ValueError: nothing to merge over a group.
    """
    merged: dict[str, AnyMetric] = {}
    for part in parts:
        for name, metric in part.items():
            metric, old = as_metric(metric), merged.get(name)
            if old is not None and type(old) is not type(metric):
                raise TypeError(
                    f"metric {name!r} is a {type(old).__name__} in one part and a {type(metric).__name__} in "
                    "another"
                )
            merged[name] = metric if old is None else old.merge(metric)
    return merged if group is None else _over_ranks(merged, group)


def _over_ranks(metrics: dict[str, AnyMetric], group: dist.ProcessGroup) -> dict[str, AnyMetric]:
    """One exchange: the fields of all metrics, in the order of their names."""
    if not metrics:
        raise ValueError("merge_metrics over a group needs the metrics of this rank, got none")
    names = sorted(metrics)
    own = torch.stack([field for name in names for field in metrics[name]])
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, own, group=group)
    out, at = {}, 0
    for name in names:
        kind, size = type(metrics[name]), len(metrics[name])
        first, *rest = (kind(*rank[at : at + size].unbind()) for rank in ranks)
        for other in rest:
            first = first.merge(other)
        out[name], at = first, at + size
    return {name: out[name] for name in metrics}


def _merged(a: Any, b: Any) -> tuple[Tensor, Tensor, Tensor]:
    return merged_moments(*(torch.stack([x, y]) for x, y in zip(a[:3], b[:3])))
