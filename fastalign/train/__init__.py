"""Reference trainer: alignment of Hugging Face causal LMs with fastalign's public operations.

    from fastalign.train import TrainConfig, train
    result = train("dpo", TrainConfig(model="my-model", data="pairs.jsonl", output="out", loss="simpo", loss_options={"beta": 2.0}))

Needs transformers (`pip install fastalign[train]`), which is imported when one of the names below is first
used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "RunConfig": "config",
    "TrainConfig": "config",
    "OnlineConfig": "online_config",
    "UserError": "errors",
    "DataError": "errors",
    "TrainingError": "errors",
    "train": "offline",
    "train_dpo": "offline",
    "train_online": "online",
    "PreferenceMethod": "methods.dpo",
    "TrainResult": "loop",
    "PackedCausalLM": "models.causal",
    "load_model": "models.packed",
    "load_tokenizer": "models.packed",
    "TokenExample": "data.tokenise",
    "token_pair": "data.tokenise",
    "plain_template": "data.tokenise",
    "merge_weights": "merge",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
