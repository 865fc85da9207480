"""A loss as data: how a field is declared, and how options change a preset. One for the three kinds: pairs,
lists, policy gradients.

    beta: float = number(0.1, low=0.0, tensor=True)              its default and its bounds
    target: float = number(1.0, effect=(lambda p: ..., "link"))  and when it has an effect"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from fastalign.losses import peers
from fastalign.runtime.checks import check_choice, check_number
from fastalign.runtime.frozen import FrozenDict, freeze

# (preset -> whether a field has an effect in this combination, what it would need). An option for a field
# without one raises.
Effect = tuple[Callable[[Any], bool], str]
Kind = TypeVar("Kind", bound="LossPreset")


class Part(NamedTuple):
    """What is known of a field. `check`: (name, value) raises where the value is not legal by itself."""

    check: Callable[[str, Any], None] | None
    effect: Effect | None
    tensor: bool  # a loss takes a tensor for it, too


def number(
    default: float | None, *, effect: Effect | None = None, tensor: bool = False, **bounds: float
) -> Any:
    """A field that is a finite number within `bounds` (of `check_number`), or None where that is its
    default."""

    def check(name: str, value: Any) -> None:
        if value is not None or default is not None:
            check_number(name, value, **bounds)

    return _field(default, Part(check, effect, tensor))


def word(default: str | None, legal: Callable[[], Any], *, effect: Effect | None = None) -> Any:
    """A field that is one of the `legal` words, or None where that is its default."""

    def check(name: str, value: Any) -> None:
        if value is not None or default is not None:
            check_choice(name, value, legal())

    return _field(default, Part(check, effect, False))


def other(default: Any, *, effect: Effect | None = None) -> Any:
    """A field that is checked with others, if at all."""
    return _field(default, Part(None, effect, False))


def _field(default: Any, part: Part) -> Any:
    return dataclasses.field(default=default, metadata={"part": part})


class OwnOption(NamedTuple):
    """A parameter of a method that is no field of its own. `fields`: its value -> fields and their values,
    which may be tensors where the fields may; `value`: preset -> its value there."""

    fields: Callable[[Any], dict[str, Any]]
    value: Callable[[Any], Any]


class Refused(NamedTuple):
    """The name of a field that would be misunderstood: TRL's option of this name is `own` here."""

    own: str


class LossPreset:
    """Base of the presets, which are frozen dataclasses. Fields made by `number`, `word` and `other` can be
    passed to a loss by name; the rest describes.

    `options` of a preset: the method's own names -> the field that each sets, or a name in `OWN`."""

    PARTS: ClassVar[Mapping[str, Part]]
    TENSOR_FIELDS: ClassVar[tuple[str, ...]]  # fields for which a loss takes tensors
    TENSOR_ONLY: ClassVar[Mapping[str, Effect | None]] = FrozenDict()  # options that exist as tensors only
    TWICE: ClassVar[str] = "options {first!r} and {name!r} both set {field}; give one"
    name: str
    OWN: ClassVar[Mapping[str, OwnOption | Refused]] = (
        FrozenDict()
    )  # what a method's own option may be besides a field
    options: Mapping[str, str] = FrozenDict()
    hint = staticmethod(peers.preference_hint)  # how other trainers spell an option

    @classmethod
    def read_fields(cls) -> None:
        """Called once for every class of presets, when its fields are known."""
        cls.PARTS = {f.name: f.metadata["part"] for f in dataclasses.fields(cls) if "part" in f.metadata}
        cls.TENSOR_FIELDS = tuple(name for name, part in cls.PARTS.items() if part.tensor)

    def __post_init__(self) -> None:
        freeze(self)
        for name, part in self.PARTS.items():
            if part.check is not None:
                part.check(name, getattr(self, name))
        self.check_combination()

    def check_combination(self) -> None:
        """Refuse impossible combinations, with the reason."""

    def replace(self: Kind, **changes: Any) -> Kind:
        """A copy with other fields or options of this preset; unknown names, fields without effect and
        impossible combinations raise."""
        preset, tensors = self.with_options(changes)
        if tensors:
            raise TypeError(
                f"{', '.join(tensors)}: a {type(self).__name__} holds numbers; pass tensors to the loss "
                "itself"
            )
        return preset

    def with_options(self: Kind, options: Mapping[str, Any]) -> tuple[Kind, dict[str, Tensor]]:
        """The preset with these options applied, and the options that are tensors."""
        changes: dict[str, Any] = {}
        setters: dict[str, str] = {}
        for option, value in options.items():
            for field, new in self._fields_of(option, value).items():
                # The same word twice is no contradiction: an own option may set it beside its number.
                if field in changes and not (isinstance(new, str) and changes[field] == new):
                    raise ValueError(self.TWICE.format(first=setters[field], name=option, field=field))
                changes[field], setters[field] = new, option
        tensors = {field: value for field, value in changes.items() if isinstance(value, Tensor)}
        legal = (*self.TENSOR_FIELDS, *self.TENSOR_ONLY)
        for field in tensors:
            if field not in legal:
                raise TypeError(
                    f"option {setters[field]!r} must be a number; tensors are legal for {', '.join(legal)}"
                )
        for field in self.TENSOR_ONLY:
            if field in changes and field not in tensors:
                raise TypeError(
                    f"option {field!r} must be a tensor with one value per pair, got {changes[field]!r}"
                )
        if not changes:
            return self, tensors
        numbers = {field: value for field, value in changes.items() if field not in tensors}
        resolved = dataclasses.replace(self, **self.implied(numbers), **numbers) if numbers else self
        for field, option in setters.items():
            effect = self.TENSOR_ONLY[field] if field in self.TENSOR_ONLY else self.PARTS[field].effect
            if effect is not None and not effect[0](resolved):
                raise ValueError(f"option {option!r} has no effect on loss {self.name!r} without {effect[1]}")
        return resolved, tensors

    def _fields_of(self, option: str, value: Any) -> dict[str, Any]:
        """The fields that an option sets."""
        name = self.options.get(option, option)
        own = self.OWN.get(name) if option in self.options else None
        if isinstance(own, Refused):
            shown = value if isinstance(value, (int, float, str)) else "..."
            raise ValueError(
                f"loss {self.name!r} does not take {option!r}: TRL's {option} of it is {own.own} here: write "
                f"{own.own}={shown}"
            )
        if own is not None:
            return own.fields(value)
        if name not in self.PARTS and name not in self.TENSOR_ONLY:
            legal = [
                *self.options,
                *(name for name in self.PARTS if name not in self.options),
                *self.TENSOR_ONLY,
            ]
            hint = self.hint(option, value)
            raise ValueError(f"loss {self.name!r} has no option {option!r}{hint}; legal: {', '.join(legal)}")
        return {name: value}

    def implied(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that change because these do."""
        return {}

    def own_options(self) -> dict[str, Any]:
        """The method's own parameters and their values here; None for one that is given as a tensor."""
        values: dict[str, Any] = {}
        for option, name in self.options.items():
            own = self.OWN.get(name)
            if not isinstance(own, Refused):
                values[option] = getattr(self, name, None) if own is None else own.value(self)
        return values
