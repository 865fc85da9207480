"""fastalign in other trainers: a table for each says which of their functions ours take the place of, and one
patcher reads it. `patch("trl")`, `unpatch("trl")`; `fastalign adapters` shows the tables."""

from __future__ import annotations

import importlib

from fastalign.adapters.common import Adapter, AdapterError, Report, Seam

__all__ = ["NAMES", "Adapter", "AdapterError", "Report", "Seam", "adapter", "patch", "unpatch"]

# Trainer -> the module whose ADAPTER is its table.
NAMES: dict[str, str] = {
    name: f"fastalign.adapters.{name}"
    for name in ("trl", "verl", "openrlhf", "llamafactory", "skyrl", "prime_rl", "slime", "transformers")
}


def adapter(trainer: str) -> Adapter:
    """The table of a trainer. Raises AdapterError for a name that is none of NAMES."""
    if trainer not in NAMES:
        raise AdapterError(f"there is no adapter for {trainer!r}; legal: {', '.join(NAMES)}")
    table = importlib.import_module(NAMES[trainer]).ADAPTER
    assert isinstance(table, Adapter)
    return table


def patch(trainer: str, *, untested: bool = False) -> Report:
    """Put fastalign's functions in the place of a trainer's: see `Adapter.patch`."""
    return adapter(trainer).patch(untested=untested)


def unpatch(trainer: str) -> None:
    """Take back what `patch` has done; without effect where nothing is patched."""
    adapter(trainer).unpatch()
