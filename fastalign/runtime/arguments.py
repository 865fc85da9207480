"""An op's arguments, declared once: a NamedTuple whose annotations say what each argument is. The schema that
torch.library takes, the layout that raw calls are held against, and the way there and back come out of it;
fake, checks and every backend take the one object.

    class GaeForward(NamedTuple):
        rewards: In("T")                      # a tensor [T]
        cu_seqlens: In("S+1", "int32")        # of a type of its own
        mask: Maybe("T", "bool")              # a tensor or None
        gamma: float

Dims are written as in layout.py. A field that is itself a NamedTuple of numbers (the parameters of a loss)
travels as float[] and int[]; one with other fields (what a row is) stands for its fields."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from fastalign.runtime import ffi


@dataclass(frozen=True)
class Place:
    """Of a tensor: its dims and type as layout.py writes them, and whether it may be None."""

    dims: str
    kind: str
    optional: bool


class _Form:
    """`In("T")`, `Maybe("S+1", "int32")`: an annotation that holds a Place."""

    def __init__(self, optional: bool):
        self._optional = optional

    def __call__(self, dims: str, kind: str = "") -> Any:
        return Annotated[Tensor, Place(dims, kind, self._optional)]


In, Maybe = _Form(False), _Form(True)
Unchecked = Annotated[Tensor, "Tensor?"]  # a tensor or None, which the op's own rules look at
SymInt = Annotated[int, "SymInt"]  # an integer that may be a symbol while torch traces

_NUMBERS = {float: "float", int: "int", bool: "bool"}


@dataclass(frozen=True)
class _Leaf:
    """One argument of the schema: `name` in it, and how it is written there."""

    name: str
    type: str
    place: Place | None = None


@dataclass(frozen=True)
class _Parameters:
    """A NamedTuple of numbers, floats first."""

    cls: type
    floats: int


class Declaration:
    """What a NamedTuple class of arguments says. writes: the tensor that the op writes in place."""

    def __init__(self, cls: type, writes: str = ""):
        self.cls = cls
        self.writes = writes
        self._fields: list[tuple[str, _Leaf | _Parameters | Declaration]] = [*_fields_of(cls)]
        self.leaves: list[_Leaf] = [*self._leaves()]
        self._flat = all(isinstance(f, _Leaf) for _, f in self._fields)

    def _leaves(self) -> Iterator[_Leaf]:
        for _, field in self._fields:
            if isinstance(field, Declaration):
                yield from field.leaves
            elif isinstance(field, _Parameters):
                yield from (_Leaf("scalars", "float[]"), _Leaf("switches", "int[]"))
            else:
                yield field

    @property
    def schema(self) -> str:
        """The argument list of the op's schema."""
        return ", ".join(
            f"Tensor(a!) {x.name}" if x.name == self.writes else f"{x.type} {x.name}" for x in self.leaves
        )

    @property
    def layout(self) -> str:
        """Its tensors as layout.parse reads them."""
        tensors = [(leaf.name, leaf.place) for leaf in self.leaves if leaf.place is not None]
        return " ".join(
            f"{name}[{place.dims}]" + (f":{place.kind}" if place.kind else "") for name, place in tensors
        )

    def flatten(self, a: Any) -> tuple[Any, ...]:
        """The arguments one by one, as the schema has them."""
        if self._flat:
            return tuple(a)
        out: list[Any] = []
        for value, (_, field) in zip(a, self._fields):
            if isinstance(field, Declaration):
                out += field.flatten(value)
            elif isinstance(field, _Parameters):
                out += (list(value[: field.floats]), list(value[field.floats :]))
            else:
                out.append(value)
        return tuple(out)

    def build(self, args: Sequence[Any]) -> Any:
        """The object for arguments that come one by one."""
        return self._take(iter(args))

    def _take(self, args: Iterator[Any]) -> Any:
        values = []
        for _, field in self._fields:
            if isinstance(field, Declaration):
                values.append(field._take(args))
            elif isinstance(field, _Parameters):
                values.append(field.cls(*next(args), *next(args)))
            else:
                values.append(next(args))
        return self.cls(*values)


def _fields_of(cls: Any) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in cls._fields:
        hint = hints[name]
        extras = getattr(hint, "__metadata__", ())
        if extras and isinstance(extras[0], Place):
            place = extras[0]
            yield name, _Leaf(name, "Tensor?" if place.optional else "Tensor", place)
        elif extras:
            yield name, _Leaf(name, extras[0])
        elif hint in _NUMBERS:
            yield name, _Leaf(name, _NUMBERS[hint])
        elif all(t in _NUMBERS for t in typing.get_type_hints(hint).values()):
            types = [*typing.get_type_hints(hint).values()]
            ffi.holds_no_tensor(hint)
            yield name, _Parameters(hint, types.count(float))
        else:
            yield name, Declaration(hint)
