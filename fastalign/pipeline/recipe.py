"""A recipe: a file that says which stages a run has, what each learns from, and what its user must bring.

    title: ...            about: ...            paper: ...            family: ...
    formula: dpo          a loss or a method whose formula stands for it
    inputs: [model, pairs, {threshold: a word of the recipe's own}]
    values: {threshold: 0.5}                       what inputs are where the user gives nothing
    defaults: {batch_size: 64}                     settings of every training stage that has them
    stages:
      - {name: sft, do: sft, data: $demos}
      - repeat: 3
        stop_when: {stage: dpo, metric: rewards/accuracies, above: 0.9}
        stages:
          - {name: dpo, do: dpo, data: $pairs, ref_model: $sft}

A value `$NAME` is an input or what the stage of this name made last (a model's directory, a data file);
`$NAME*` is the list of all that the stage has made so far; `$policy` is the causal LM that was trained last,
before any it is the input `model`. `$$` begins a text that begins with a dollar."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastalign.pipeline.inputs import INPUTS
from fastalign.train.errors import UserError

SHIPPED = Path(__file__).parent / "recipes"
_KEYS = ("title", "about", "paper", "family", "formula", "inputs", "values", "defaults", "seed", "stages")
_REPEAT_KEYS = ("repeat", "stop_when", "stages")
_STOP_KEYS = ("stage", "metric", "above", "below")
MAX_STAGES = 1000


class Stop(NamedTuple):
    """Ends a repetition: when the last record of `stage` has `metric` above or below a number."""

    stage: str
    metric: str
    above: float | None
    below: float | None

    def holds(self, value: float) -> bool:
        return self.above is not None and value > self.above or self.below is not None and value < self.below


class Stage(NamedTuple):
    """One entry of the plan. `rounds`: which round of each repetition around it, from 1; `where`: its place
    in the file; `stops`: the repetitions that may end when it is done, as (rounds of the repetition, Stop)."""

    name: str
    do: str
    settings: Mapping[str, Any]
    rounds: tuple[int, ...]
    where: str
    stops: tuple[tuple[tuple[int, ...], Stop], ...] = ()

    @property
    def label(self) -> str:
        return "-".join([*(f"round{i}" for i in self.rounds), self.name])


class Recipe(NamedTuple):
    """A recipe that has been read: `inputs`: name -> what it is for; `values`: what the file gives them."""

    path: Path
    title: str
    about: str
    paper: str
    family: str
    formula: str
    inputs: Mapping[str, str]
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    seed: int
    stages: tuple[Stage, ...]


class _Loader(yaml.SafeLoader):
    """YAML's numbers as everybody writes them (1e-6 is one), and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} is no text", key.start_mark
                )
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def shipped() -> dict[str, Path]:
    """The recipes that come with fastalign, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a recipe: one that ships, by its name, or a path."""
    path = shipped().get(name, Path(name).expanduser())
    if not path.is_file():
        raise UserError(
            f"no recipe {name!r}: neither a file nor one of those that ship: {', '.join(shipped())}"
        )
    return path


def read(path: Path) -> Recipe:
    """Raises `UserError` with the file and the place in it."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    where = str(path)
    _check_keys(where, found, _KEYS, required=("stages",))
    inputs = _inputs(where, found.get("inputs") or [])
    values = _mapping(f"{where}: values", found.get("values"))
    if unknown := [name for name in values if name not in inputs]:
        raise UserError(
            f"{where}: values: {unknown[0]} is none of the inputs ({', '.join(inputs) or 'none'})"
        )
    seed = found.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"{where}: seed must be an integer from 0, got {seed!r}")
    stages = tuple(itertools.islice(_unroll(f"{where}: stages", found["stages"], (), ()), MAX_STAGES + 1))
    _check_names(where, stages, inputs)
    texts = {
        key: _text(where, key, found.get(key, "")) for key in ("title", "about", "paper", "family", "formula")
    }
    defaults = _mapping(f"{where}: defaults", found.get("defaults"))
    return Recipe(path, inputs=inputs, values=values, defaults=defaults, seed=seed, stages=stages, **texts)


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be a text, got {value!r}")
    return value


def _check_keys(where: str, found: Any, legal: tuple[str, ...], required: tuple[str, ...] = ()) -> None:
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a mapping with {', '.join(legal)}")
    if unknown := [key for key in found if key not in legal]:
        raise UserError(f"{where}: unknown key {unknown[0]}; legal: {', '.join(legal)}")
    if missing := [key for key in required if key not in found]:
        raise UserError(f"{where}: {missing[0]} is missing")


def _mapping(where: str, found: Any) -> dict[str, Any]:
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{where} must be a mapping, got {found!r}")
    return dict(found or {})


def _inputs(where: str, found: Any) -> dict[str, str]:
    if not isinstance(found, list):
        raise UserError(f"{where}: inputs must be a list, got {found!r}")
    inputs: dict[str, str] = {}
    for each in found:
        if isinstance(each, dict) and len(each) == 1 and isinstance(about := next(iter(each.values())), str):
            inputs[next(iter(each))] = about
        elif isinstance(each, str) and each in INPUTS:
            inputs[each] = INPUTS[each].about
        else:
            raise UserError(
                f"{where}: inputs: {each!r} is neither one of {', '.join(INPUTS)} nor NAME: what it is for"
            )
    return inputs


def _unroll(
    where: str, found: Any, rounds: tuple[int, ...], stops: tuple[tuple[tuple[int, ...], Stop], ...]
) -> Iterator[Stage]:
    """The stages in the order in which they run, every round of a repetition by itself."""
    if not isinstance(found, list) or not found:
        raise UserError(f"{where} must be a list of stages")
    try:
        json.dumps(found, default=str)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: a part of it contains itself") from None
    for i, each in enumerate(found):
        place = f"{where}[{i}]"
        if isinstance(each, dict) and "repeat" in each:
            yield from _repeat(place, each, rounds, stops)
            continue
        if not isinstance(each, dict) or not {"name", "do"} <= each.keys():
            raise UserError(f"{place}: a stage needs name and do, or repeat and stages")
        name, do = (_text(place, key, each[key]) for key in ("name", "do"))
        if not name.replace("_", "").isalnum():
            raise UserError(f"{place}: name must consist of letters, digits and _, got {name!r}")
        settings = {key: value for key, value in each.items() if key not in ("name", "do")}
        own = tuple(stop for stop in stops if stop[1].stage == name)
        yield Stage(name, do, settings, rounds, f"{place} ({name})", own)


def _repeat(
    place: str,
    found: dict[str, Any],
    rounds: tuple[int, ...],
    stops: tuple[tuple[tuple[int, ...], Stop], ...],
) -> Iterator[Stage]:
    _check_keys(place, found, _REPEAT_KEYS, required=("stages",))
    times = found["repeat"]
    if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times <= MAX_STAGES:
        raise UserError(f"{place}: repeat must be an integer from 1 to {MAX_STAGES}, got {times!r}")
    stop = _stop(f"{place}: stop_when", found["stop_when"]) if "stop_when" in found else None
    for i in range(1, times + 1):
        inner = (*stops, (rounds, stop)) if stop else stops
        every = _unroll(f"{place}.stages", found["stages"], (*rounds, i), inner)
        stages = tuple(itertools.islice(every, MAX_STAGES + 1))
        if stop and stop.stage not in [stage.name for stage in stages]:
            raise UserError(f"{place}: stop_when: no stage {stop.stage!r} is repeated here")
        yield from stages


def _stop(where: str, found: Any) -> Stop:
    _check_keys(where, found, _STOP_KEYS, required=("stage", "metric"))
    bounds = {key: found.get(key) for key in ("above", "below")}
    for key, value in bounds.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{where}: {key} must be a number, got {value!r}")
    if all(value is None for value in bounds.values()):
        raise UserError(f"{where}: above or below is missing")
    return Stop(_text(where, "stage", found["stage"]), _text(where, "metric", found["metric"]), **bounds)


def _check_names(where: str, stages: tuple[Stage, ...], inputs: Mapping[str, str]) -> None:
    if len(stages) > MAX_STAGES:
        raise UserError(f"{where}: more than {MAX_STAGES} stages, every round counted")
    seen: dict[tuple[str, tuple[int, ...]], str] = {}
    places: dict[str, int] = {}
    for stage in stages:
        if stage.name in inputs or stage.name == "policy":
            raise UserError(f"{stage.where}: {stage.name} is the name of an input; a stage needs its own")
        if (stage.name, stage.rounds) in seen or places.setdefault(stage.name, len(stage.rounds)) != len(
            stage.rounds
        ):
            raise UserError(f"{stage.where}: another stage has the name {stage.name}")
        seen[stage.name, stage.rounds] = stage.where
