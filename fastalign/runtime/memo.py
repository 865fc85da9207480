"""Keeps what a call works out from its options alone: a training step asks for the same loss with the same
options every time, and validating forty fields costs more than the kernels. Under torch.compile nothing is
kept: tracing happens once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

_PLAIN = (float, int, bool, str, type(None))
_MOST = 1024  # results per function; options that change with every step must not fill the memory


def by_options(
    resolve: Callable[[Any, Mapping[str, Any]], tuple[Any, dict]],
) -> Callable[[Any, Mapping[str, Any]], tuple[Any, dict]]:
    """For functions (name, options) -> (preset, options that are tensors): kept where the name is a string
    and every option a plain value, so that there are no tensors. What raises is not kept."""
    kept: dict[tuple, Any] = {}

    @functools.wraps(resolve)
    def resolved(name: Any, options: Mapping[str, Any]) -> tuple[Any, dict]:
        if (
            torch.compiler.is_compiling()
            or type(name) is not str
            or any(type(v) not in _PLAIN for v in options.values())
        ):
            return resolve(name, options)
        key = (
            name,
            *((option, type(v), v) for option, v in options.items()),
        )  # the type: 1, 1.0 and True are equal
        preset = kept.get(key)
        if preset is None:
            preset, _ = resolve(name, options)
            if len(kept) >= _MOST:
                kept.clear()
            kept[key] = preset
        return preset, {}

    return resolved


def on_instance(method: Callable[..., Any]) -> Callable[..., Any]:
    """For methods of frozen dataclasses: results are kept on the instance, by arguments."""

    @functools.wraps(method)
    def remembered(self: Any, *args: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return in_this_graph(method(self, *args, **named))
        kept = self.__dict__.setdefault("_kept", {})  # beside the fields: neither compared nor shown
        key = (method.__name__, *args, *named.items())
        if key not in kept:
            kept[key] = method(self, *args, **named)
        return kept[key]

    return remembered


def in_this_graph(numbers: Any) -> Any:
    """A NamedTuple of numbers with every float read here. Under torch.compile(dynamic=True) the floats of a
    preset are inputs of the graph, read where they are first used; that must not be inside a `Function`,
    whose part of the graph the next function that uses them cannot see."""
    return type(numbers)(*(float(x) if isinstance(x, float) else x for x in numbers))
