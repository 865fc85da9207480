"""The named preference losses as data: `available()` prints the table, `get(name)` gives a `Preset`,
`get_listwise(name)` a `ListPreset`."""

from fastalign.losses.options import (
    LossTable,
    available,
    available_listwise,
    get,
    get_listwise,
    resolve,
    resolve_listwise,
)
from fastalign.losses.tables import ALIASES, LISTWISE, LOOPS, PRESETS, TRL_FORMS, UNPAIRED, UnpairedLoss

__all__ = [
    "ALIASES", "LISTWISE", "LOOPS", "LossTable", "PRESETS", "TRL_FORMS", "UNPAIRED", "UnpairedLoss", "available", "available_listwise", "get",
    "get_listwise", "resolve", "resolve_listwise",
]  # fmt: skip
