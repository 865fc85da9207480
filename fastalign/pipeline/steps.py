"""What a stage may do: train by a method, or make data or a model between the training stages. One table."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastalign.feedback.critique import CritiqueConfig
from fastalign.feedback.label import LabelConfig
from fastalign.feedback.pairs import PairsConfig
from fastalign.feedback.sample import SampleConfig
from fastalign.pipeline.select import SelectConfig
from fastalign.train.config import MODEL_DIRECTORIES, TrainConfig
from fastalign.train.errors import UserError
from fastalign.train.merge_files import MergeConfig
from fastalign.train.methods import METHODS, make_method
from fastalign.train.online_config import OnlineConfig


class Step(NamedTuple):
    """`config`: a dataclass, whose `output` the run fills in. `home`: "module:function", called with it.
    `makes`: policy, scorer (a reward model) or data. `models`, `data`, `files`: settings that name such, or
    another file or folder. `goes_on`: a command that goes on by itself where it was stopped."""

    config: type
    home: str
    makes: str
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    goes_on: bool = False


_TRAIN = {TrainConfig: "fastalign.train.offline:train", OnlineConfig: "fastalign.train.online:train_online"}
_ASKS = ("constitution", "templates")
_OWN = {
    "sample": Step(SampleConfig, "fastalign.feedback.sample:run", "data", ("model",), ("data",), (), True),
    "label": Step(
        LabelConfig, "fastalign.feedback.label:run", "data", ("model", "reward_model"), ("data",), _ASKS, True
    ),
    "pairs": Step(PairsConfig, "fastalign.feedback.pairs:run", "data", ("tokenizer",), ("data",), (), True),
    "critique": Step(
        CritiqueConfig, "fastalign.feedback.critique:run", "data", ("model",), ("data",), _ASKS, True
    ),
    "select": Step(SelectConfig, "fastalign.pipeline.select:run", "data", (), ("data",)),
    "merge": Step(MergeConfig, "fastalign.train.merge_files:run", "policy", ("base", "models")),
}
STEPS: dict[str, Step] = {
    **{
        name: Step(
            row.config,
            _TRAIN[row.config],
            "scorer" if name == "reward" else "policy",
            MODEL_DIRECTORIES,
            ("data", "eval_data", "ptx_data"),
        )
        for name, row in METHODS.items()
    },
    **_OWN,
}
# Settings that belong to the run, not to a stage.
_RUN = ("output", "resume", "overwrite", "progress")


def trains(do: str) -> bool:
    return do in METHODS


def draws(do: str, settings: Mapping[str, Any]) -> bool:
    """Whether chance has a part in a stage; a judge that writes nothing refuses a seed."""
    return do != "label" or settings.get("ask") == "rubric" or bool(settings.get("reasons"))


def settings_of(do: str) -> set[str]:
    """The settings that a stage of this kind may have."""
    return {field.name for field in dataclasses.fields(STEPS[do].config)} - set(_RUN)


def check_known(where: str, do: str, settings: Mapping[str, Any]) -> None:
    """Refuse a kind of stage that there is not, and settings that it does not have."""
    if do not in STEPS:
        raise UserError(f"{where}: do: {do!r} is unknown{_near(do, STEPS)}; legal: {', '.join(STEPS)}")
    for name in settings:
        if name in _RUN:
            raise UserError(f"{where}: {name} is given by the run, not by a stage")
        if name not in settings_of(do):
            raise UserError(f"{where}: {do} has no setting {name!r}{_near(name, settings_of(do))}")


def _near(word: str, legal: Any) -> str:
    near = difflib.get_close_matches(word, legal, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def build(where: str, do: str, settings: Mapping[str, Any]) -> Any:
    """The configuration, checked as far as it can be before anything runs: a method of training is made from
    it and thrown away."""
    try:
        config = STEPS[do].config(**settings)
        if trains(do):
            make_method(do, config)
        return config
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def format_of(do: str, config: Any) -> Any:
    """The data format of a method that learns from a file."""
    return make_method(do, config).format


def call(do: str, config: Any, **options: Any) -> Any:
    module, function = STEPS[do].home.split(":")
    run = getattr(importlib.import_module(module), function)
    return run(do, config, **options) if trains(do) else run(config)
