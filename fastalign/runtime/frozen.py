"""What travels: presets that hash, copy and pickle, and outputs whose copies hold the values without the
graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from torch import Tensor

T = TypeVar("T", bound=type)


class FrozenDict(dict):
    """A dict that cannot be changed, with a hash."""

    def _refuse(self, *args: Any, **named: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be changed")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def freeze(preset: Any) -> None:
    """Give the containers in a frozen dataclass the types that hash: lists become tuples, dicts a
    FrozenDict."""
    for name, value in vars(preset).items():
        if isinstance(value, list):
            object.__setattr__(preset, name, tuple(value))
        elif isinstance(value, Mapping) and not isinstance(value, FrozenDict):
            object.__setattr__(preset, name, FrozenDict(value))


def copies_without_graph(output: T) -> T:
    """For the NamedTuples that losses return: deep copies, pickles and what goes to another process hold the
    values, detached. torch refuses such copies of a tensor that is part of a graph."""

    def reduce(self: Any) -> tuple[Any, ...]:
        return type(self), tuple(x.detach() if isinstance(x, Tensor) else x for x in self)

    output.__reduce__ = reduce
    output.__copy__ = lambda self: self  # a shallow copy keeps the graph
    return output
