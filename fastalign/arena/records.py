"""The files of an arena: its settings, and one for each finished cell, from which a second call goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastalign.arena.entries import Cell
from fastalign.arena.settings import ArenaConfig
from fastalign.train.errors import UserError
from fastalign.train.files import replace_file, writing

CELLS = "cells"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    with writing(str(path)):
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def keep_settings(output: Path, config: ArenaConfig) -> None:
    """Record the settings that make the numbers, or refuse a directory that was made with others."""
    path, own = output / "arena.json", config.numbers()
    if path.exists():
        try:
            kept = read(path)["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no record of an arena; choose another --output") from None
        differing = [name for name in own if kept.get(name) != own[name]]
        if differing:
            what = ", ".join(f"{config.flag(n)} was {kept.get(n)}, is {own[n]}" for n in differing)
            raise UserError(f"{output} holds an arena with other settings: {what}; choose another --output")
    else:
        write(path, {"settings": own})


def _path(output: Path, cell: Cell) -> Path:
    return output / CELLS / f"{cell.name}.json"


def finished(output: Path, cell: Cell) -> dict[str, Any] | None:
    """The cell's result from an earlier call; none where the method has been defined in another way since."""
    path = _path(output, cell)
    try:
        found = read(path) if path.exists() else None
    except ValueError:
        raise UserError(f"{path} is damaged; remove it, and the cell is run again") from None
    return found if found and found.get("definition") == cell.definition() else None


def keep(output: Path, cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """Write down what a cell came to."""
    who = {"entry": cell.entry.name, "seed": cell.seed, "beta": cell.beta}
    result = {**who, **result, "definition": cell.definition()}
    write(_path(output, cell), result)
    return result
