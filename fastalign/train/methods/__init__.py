"""The methods that learn from a data file: one file each, which says what data the method reads and how a batch becomes a loss.

`METHODS` is read without importing torch or transformers, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from fastalign.train.config import TrainConfig
from fastalign.train.errors import UserError

_REFERENCE, _LOSS, _TOKENS = ("ref_model", "precompute_ref"), ("loss", "loss_options"), ("token_metrics",)


class Entry(NamedTuple):
    """A method on the command line: what --help says, "module:class", and the settings of `TrainConfig` that it has."""

    summary: str
    home: str
    settings: tuple[str, ...]


METHODS = {
    "dpo": Entry("preference pairs: DPO and its variants (--loss)", "dpo:PreferenceMethod", (*_LOSS, *_REFERENCE, *_TOKENS)),
    "tdpo": Entry("preference pairs: token-level DPO (tdpo1, tdpo2)", "tdpo:TDPO", (*_LOSS, *_REFERENCE, *_TOKENS)),
    "kto": Entry("responses with a label: KTO (kto, apo_zero_unpaired)", "kto:KTO", (*_LOSS, *_REFERENCE, *_TOKENS)),
    "bco": Entry("responses with a label: BCO", "kto:BCO", (*_LOSS, *_REFERENCE, *_TOKENS)),
    "dro": Entry("responses with a label or score: DRO with a value head", "dro:DRO", (*_LOSS, *_REFERENCE, *_TOKENS)),
    "listwise": Entry("ranked lists of responses (--loss)", "listwise:Listwise", (*_LOSS, *_REFERENCE, *_TOKENS)),
    "reward": Entry("reward model from pairs (bt_rm) or ranked lists (kwise_rm)", "reward:Reward", _LOSS),
}


def make_method(name: str, config: TrainConfig) -> Any:
    """The method of this name for this configuration. Raises `UserError` for an unknown name, loss or option."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; legal: {', '.join(METHODS)}")
    module, attribute = METHODS[name].home.split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)(config)
