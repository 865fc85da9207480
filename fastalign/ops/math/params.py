"""The parameters of a loss as a kernel takes them: one object, in which what is decided at compile time is
constexpr."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton.language as tl


@lru_cache
def _constants(switches: tuple[int, ...]) -> tuple[tl.constexpr, ...]:
    return tuple(tl.constexpr(s) for s in switches)


def kernel_params(params: Any, floats: int) -> Any:
    """A preset's NamedTuple, floats first: the integers behind them compile a kernel of their own."""
    return params._make((*params[:floats], *_constants(params[floats:])))
