"""The stage `select`: lines of data files, put together, ordered, cut."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from fastalign.train.data.formats import read_jsonl
from fastalign.train.errors import DataError, UserError
from fastalign.train.files import replace_file, writing
from fastalign.train.settings import POSITIVE, SEED, SHARE, SHARE_BELOW_1, Settings, setting


@dataclasses.dataclass(frozen=True)
class SelectConfig(Settings):
    """What `select` does, in this order: files end to end, missing columns filled, sorted or shuffled, cut."""

    data: tuple[str, ...] = setting((), "required: a file of JSON lines, or several, one after the other")
    output: str | None = setting(None, "the file that is written")
    columns: dict[str, Any] = setting({}, "name -> value, for the lines that lack this column")
    sort_by: str | None = setting(
        None, "a column of numbers; the lines come in its order, the smallest first"
    )
    shuffle: bool = setting(False, "in an order that the seed draws")
    start: float = setting(0.0, "the share of the lines that is left out at the beginning", SHARE_BELOW_1)
    stop: float = setting(1.0, "the share of the lines at which the selection ends", POSITIVE, SHARE)
    limit: int | None = setting(None, "at most so many lines", POSITIVE)
    seed: int = setting(0, "of the order", SEED)

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", (self.data,))
        super().__post_init__()
        if not self.data:
            raise UserError("data is missing: a file, or a list of files")
        if self.start >= self.stop:
            raise UserError(f"start {self.start} must lie below stop {self.stop}")
        if self.sort_by is not None and self.shuffle:
            raise UserError("sort_by and shuffle exclude each other")


def run(config: SelectConfig) -> str:
    """Writes `config.output`; what was done, in one line."""
    rows = [(source, row) for path in config.data for source, row in read_jsonl(path)]
    for source, row in rows:
        if not isinstance(row, dict):
            raise DataError(source, None, "expected a JSON object")
    if config.sort_by is not None:
        rows.sort(key=lambda each: _key(config.sort_by, *each))
    if config.shuffle:
        random.Random(config.seed).shuffle(rows)
    first, last = (round(share * len(rows)) for share in (config.start, config.stop))
    chosen = [{**config.columns, **row} for _, row in rows[first:last][: config.limit]]
    if not chosen:
        raise UserError(f"select: nothing is left of the {len(rows)} lines of {', '.join(config.data)}")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    path = Path(config.output)
    with writing(str(path)):
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return f"{len(chosen)} of {len(rows)} lines"


def _key(column: str, source: str, row: dict[str, Any]) -> float:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(source, column, f"sort_by needs a number here, got {value!r}")
    return value
