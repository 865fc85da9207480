"""Reference trainer: preference training of Hugging Face causal LMs with fastalign's public operations.

    from fastalign.train import TrainConfig, train_dpo
    result = train_dpo(TrainConfig(model="my-model", data="pairs.jsonl", output="out", loss="dpo", loss_options={"beta": 0.1}))

Needs transformers (`pip install fastalign[train]`), which is imported when one of the names below is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "TrainConfig": "config",
    "UserError": "errors",
    "DataError": "errors",
    "TrainingError": "errors",
    "train_dpo": "dpo",
    "PreferenceMethod": "dpo",
    "TrainResult": "loop",
    "PackedCausalLM": "model",
    "load_model": "model",
    "load_tokenizer": "model",
    "TokenPair": "tokenise",
    "plain_template": "tokenise",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
