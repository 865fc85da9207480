"""The weights of model directories as they are stored: their names and shapes from the headers of safetensors
files, each tensor when it is asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from fastalign.train.errors import TrainingError, UserError
from fastalign.train.models.companions import check_tokenizer, has_tokenizer
from fastalign.train.models.packed import load_config, load_tokenizer

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored:
    """The weights of a model directory, read one at a time. `tensors`: name -> an empty tensor of its shape and
    dtype."""

    def __init__(self, flag: str, directory: str, stack: contextlib.ExitStack, trust_remote_code: bool):
        self.what, self.directory = f"{flag} {directory}", directory
        self.path = Path(directory).expanduser()
        self.trust = {"trust_remote_code": trust_remote_code}
        if (self.path / "adapter_config.json").is_file():
            raise UserError(
                f"{self.what}: it is an adapter; merge it into its model first (peft's merge_and_unload)"
            )
        self.config = load_config(directory, **self.trust)
        if getattr(self.config, "quantization_config", None):
            raise UserError(f"{self.what}: its weights are quantised; merge the weights before quantisation")
        self.files, self.tensors = self._open(stack)

    def _open(self, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        index = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        try:
            if index.is_file():
                where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            elif single.is_file():
                with safe_open(single, "pt") as file:
                    where = dict.fromkeys(file.keys(), single.name)
            else:
                raise UserError(
                    f"{self.what}: it holds neither {single.name} nor {index.name}; save_pretrained of "
                    "transformers writes them"
                )
            opened = {}
            for name in dict.fromkeys(where.values()):
                if Path(name).name != name:
                    raise UserError(
                        f"{self.what}: {index.name} names {name!r}, which leads out of the directory"
                    )
                opened[name] = stack.enter_context(safe_open(self.path / name, "pt"))
            tensors = {}
            for name, file in where.items():
                part = opened[file].get_slice(name)
                tensors[name] = torch.empty(
                    part.get_shape(), dtype=self._dtype(name, part.get_dtype()), device="meta"
                )
        except (
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise UserError(
                f"{self.what}: its weights cannot be read: {' '.join(str(error).split())[:200]}"
            ) from None
        return {name: opened[file] for name, file in where.items()}, tensors

    def _dtype(self, name: str, code: str) -> torch.dtype:
        """Of what is no floating point, only that it is none matters here: it is taken from the base."""
        if code.startswith(("F8", "F4", "F6", "E8")):
            raise UserError(
                f"{self.what}: {name} is quantised ({code}); merge the weights before quantisation"
            )
        return _FLOATS.get(code, torch.int64)

    def first_of(self, name: str, twins: Mapping[str, Sequence[str]]) -> str | None:
        """The name under which a weight with several names stands here."""
        return next((twin for twin in twins.get(name, (name,)) if twin in self.tensors), None)

    def read(self, name: str) -> torch.Tensor:
        try:
            return self.files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise TrainingError(
                f"{self.what}: {name} cannot be read: {' '.join(str(error).split())}"
            ) from error


def tied_names(base: Stored) -> dict[str, tuple[str, ...]]:
    """Name -> all names of the same weight, where the configuration ties weights: models are saved with one of
    them, or with all."""
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    kind = getattr(transformers, (getattr(base.config, "architectures", None) or [""])[0], None)
    maker = transformers.AutoModelForCausalLM.from_config if kind is None else kind._from_config
    options = base.trust if kind is None else {}
    with torch.device("meta"):
        try:
            model = maker(base.config, **options)
        except Exception as error:  # of the model's own code
            raise UserError(
                f"{base.what}: its model cannot be made: {' '.join(str(error).split())[:200]}"
            ) from None
    groups: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(weight), []).append(name)
    return {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}


def check_same_weights(base: Stored, other: Stored, twins: Mapping[str, Sequence[str]]) -> None:
    """Refuse a model that has other weights than the base, or another tokenizer."""
    for name in ("model_type", "tie_word_embeddings"):
        here, there = (
            getattr(each.config, name, None)
            if name == "model_type"
            else getattr(each.config.get_text_config(), name, None)
            for each in (base, other)
        )
        if here != there:
            raise UserError(f"{other.what}: its {name} is {there}, the base's {here}")
    for name in {**base.tensors, **other.tensors}:
        mine, theirs = base.first_of(name, twins), other.first_of(name, twins)
        if mine is None or theirs is None:
            who, lacks = ("it", "the base") if mine is None else ("the base", "it")
            raise UserError(f"{other.what}: {who} has the weight {name}, and {lacks} has not")
        a, b = base.tensors[mine], other.tensors[theirs]
        if a.shape != b.shape:
            sizes = (" x ".join(map(str, each.shape)) or "a number" for each in (b, a))
            raise UserError(f"{other.what}: {name} is {{}}, in the base {{}}".format(*sizes))
        if a.is_floating_point() != b.is_floating_point():
            raise UserError(f"{other.what}: {name} is floating point in one of it and the base only")
    if has_tokenizer(base.directory) and has_tokenizer(other.directory):
        theirs, ours = (load_tokenizer(each.directory, **base.trust) for each in (other, base))
        check_tokenizer(other.what, theirs, ours, "the base's")
