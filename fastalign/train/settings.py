"""How settings are declared: name, type, default, documentation and bounds of each in one line (`setting`). A
class of them checks its values when it is made (`Settings`); flags are made from it in config.py."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import sys
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from fastalign.runtime.checks import shown
from fastalign.train.errors import UserError

LARGEST = 1e30  # of any number: training computes in float32, which ends at 3.4e38
# What every generator takes, NumPy's among them; the order of an epoch multiplies it by 10^6.
MAX_SEED = 2**32 - 1


class Bound(NamedTuple):
    """Which numbers a setting may have, other than None. `words` complete "it must"."""

    words: str
    fits: Callable[[float], bool]


POSITIVE = Bound("be positive", lambda x: x > 0 and math.isfinite(x))
NOT_NEGATIVE = Bound("not be negative", lambda x: x >= 0 and math.isfinite(x))
NOT_BELOW_0 = Bound("be not negative", NOT_NEGATIVE.fits)
SHARE = Bound("lie in [0, 1]", lambda x: 0 <= x <= 1)
SHARE_BELOW_1 = Bound("lie in [0, 1)", lambda x: 0 <= x < 1)
SEED = Bound(f"lie in [0, {MAX_SEED}]", lambda x: 0 <= x <= MAX_SEED)


def setting(default: Any, doc: str, *bounds: Bound, **how: Any) -> Any:
    """A dataclass field with its one line of documentation (`--help` shows it) and the numbers that it may have. `how`:
    `choices`, the words that it may be; `flag` and `metavar`, how its flag is spelled."""
    metadata = {"doc": doc, "bounds": bounds, "choices": None, "flag": None, "metavar": None, **how}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings made by `setting`: types, bounds and choices are checked when they are given."""

    def __post_init__(self) -> None:
        self._check_types()
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), self.flag(field.name)
            # No float need hold such an integer: nothing below could look at it.
            if isinstance(value, int) and abs(value) >= 1 << 63 and field.name != "seed":
                raise UserError(f"{flag} is {shown(value)}: its magnitude must be below 2^63")
            if isinstance(value, float) and LARGEST < abs(value) < math.inf:
                raise UserError(f"{flag} is {value}: its magnitude must be at most {LARGEST:g}")
            for bound in field.metadata["bounds"] if value is not None else ():
                if not bound.fits(value):
                    raise UserError(f"{flag} is {shown(value)}: it must {bound.words}")
            choices = field.metadata["choices"]
            if choices and value not in (*choices, field.default):
                raise UserError(f"{flag} is '{value}'; legal: {', '.join(choices)}")

    def _check_types(self) -> None:
        """Refuse a value of another type than its setting's; a path object becomes its text, NumPy's numbers
        become Python's. The command line has converted its texts before."""
        for name, hint in typing.get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), typing.get_args(hint) or (hint,)
            if isinstance(value, os.PathLike) and str in kinds:
                value = os.fspath(value)
            elif isinstance(value, dict):
                value = {key: _plain(f"{name}[{key!r}]", option) for key, option in value.items()}
            object.__setattr__(self, name, value := _number(value))
            if value is None and type(None) in kinds:
                continue
            kind = typing.get_origin(hint)
            if kind not in (dict, tuple):
                kind = next(k for k in kinds if k is not type(None))
            legal, noun = _TYPES[kind]
            if not isinstance(value, legal) or isinstance(value, bool) and kind is not bool:
                raise UserError(
                    f"{name} must be {noun}{' or None' * (type(None) in kinds)}, got {shown(value)}"
                )
            if kind is tuple:
                object.__setattr__(self, name, tuple(value))
                if wrong := [each for each in value if not isinstance(each, str) or not each]:
                    raise UserError(f"{name} must be {noun}, got {shown(wrong[0])}")
            if isinstance(value, str) and (not value or "\0" in value):
                raise UserError(
                    f"{self.flag(name)} is empty" if not value else f"{self.flag(name)} holds a zero byte"
                )

    @classmethod
    def flag(cls, name: str) -> str:
        """`tokens_per_batch` -> `--tokens-per-batch`."""
        return cls.__dataclass_fields__[name].metadata["flag"] or "--" + name.replace("_", "-")


def _number(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else as it is."""
    if isinstance(value, (bool, int, str)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _plain(name: str, value: Any) -> Any:
    """An option of a loss, or a variable of a template, as it can be kept in the record of a run: a number, a
    text, true, false, None, or a sequence of such."""
    value = _number(value)
    if isinstance(value, dict) and not name.startswith("loss_options"):  # a template may take structures
        return {key: _plain(f"{name}[{key!r}]", each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(name, each) for each in value)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(f"{name} must be a number, a text, True, False or None, got {shown(value)}")
    if (
        isinstance(value, (int, float)) and LARGEST < abs(value) <= sys.float_info.max
    ):  # what no float holds, the loss refuses itself
        raise UserError(f"{name} is {shown(value)}: its magnitude must be at most {LARGEST:g}")
    return value


# The type of a setting -> what its value may be, and what that is called.
_TYPES: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"), int: (int, "an integer"), float: ((int, float), "a number"), str: (str, "a text"), dict: (dict, "a dict"),
    tuple: ((list, tuple), "a list of texts"),
}  # fmt: skip
