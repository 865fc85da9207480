"""A recipe and its inputs made into a plan: every stage with its folder and its settings, checked before
anything runs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.pipeline import steps
from fastalign.pipeline.inputs import INPUTS
from fastalign.pipeline.recipe import Recipe, Stage
from fastalign.train.config import FREE_ON_RESUME, parse_option
from fastalign.train.data.formats import Format, parse_prompt, parse_text, read_jsonl
from fastalign.train.errors import UserError
from fastalign.train.models import packed as models
from fastalign.train.online_config import OnlineConfig
from fastalign.train.settings import MAX_SEED

# What the stages between the training stages write inside their folders.
DATA = "data.jsonl"


class Plan(NamedTuple):
    """`inputs`: name -> the value that the user or the recipe gives. `settings`: what the user sets over the
    recipe, by the stage's name or `defaults`. `skip`: stages that are left out; what one of them would have
    trained stays as it is."""

    recipe: Recipe
    output: Path
    inputs: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]
    seed: int
    skip: frozenset[str] = frozenset()

    def folder(self, index: int) -> Path:
        stages = self.recipe.stages
        width = len(str(len(stages)))
        return self.output / f"{index + 1:0{max(2, width)}}-{stages[index].label}"

    def made(self, index: int) -> str:
        """What a stage makes: the directory of a model, or a file."""
        folder = self.folder(index)
        return str(folder / DATA if steps.STEPS[self.recipe.stages[index].do].makes == "data" else folder)

    def defaults(self) -> dict[str, Any]:
        """Settings of every training stage that has them."""
        return _over(self.recipe.defaults, self.settings.get("defaults", {}))

    def resolve(self, index: int, done: Sequence[int], only: Sequence[str] | None = None) -> dict[str, Any]:
        """The settings of a stage (or some of them), where those of `done` have run before it."""
        stage = self.recipe.stages[index]
        step, own = steps.STEPS[stage.do], steps.settings_of(stage.do)
        given = {
            name: value for name, value in self.defaults().items() if name in own and steps.trains(stage.do)
        }
        given = copy.deepcopy(_over(given, stage.settings, self.settings.get(stage.name, {})))
        if "model" in own and steps.trains(stage.do):
            given.setdefault("model", "$policy")
        if "seed" in own and steps.draws(stage.do, given):
            given.setdefault("seed", (self.seed + 1_000_003 * index) % (MAX_SEED + 1))
        settings = {
            name: self._value(f"{stage.where}: {name}", value, done)
            for name, value in given.items()
            if only is None or name in only
        }
        settings["output"] = (
            str(self.folder(index) / DATA) if step.makes == "data" else str(self.folder(index))
        )
        return settings

    def _value(self, where: str, value: Any, done: Sequence[int]) -> Any:
        if isinstance(value, list):
            parts = [self._value(where, each, done) for each in value]
            return [each for part in parts for each in (part if isinstance(part, list) else [part])]
        if isinstance(value, dict):
            return {name: self._value(f"{where}.{name}", each, done) for name, each in value.items()}
        if not isinstance(value, str) or not value.startswith("$"):
            return value
        if value.startswith("$$"):
            return value[1:]
        name, every = value[1:].removesuffix("*"), value.endswith("*")
        if name in self.recipe.inputs:
            if self.inputs.get(name) is None:
                raise UserError(
                    f"{where}: the input {name} is not given: --set {name}=... ({self.recipe.inputs[name]})"
                )
            return self.inputs[name]
        stages = self.recipe.stages
        if name == "policy":
            made = [i for i in done if steps.STEPS[stages[i].do].makes == "policy"]
            if not made and "model" in self.recipe.inputs:
                return self._value(where, "$model", done)
        else:
            made = [i for i in done if stages[i].name == name]
        if not made:
            legal = ["policy", *self.recipe.inputs, *dict.fromkeys(stages[i].name for i in done)]
            raise UserError(
                f"{where}: ${name} is made by no stage before this one; legal: {', '.join(legal)}"
            )
        found = [self._made_with(i, done) for i in made]
        return found if every else found[-1]

    def _made_with(self, index: int, done: Sequence[int]) -> str:
        """What a stage made; of one that is left out, the model that it would have trained."""
        if self.recipe.stages[index].name not in self.skip:
            return self.made(index)
        return self.resolve(index, [i for i in done if i < index], ("model",))["model"]


def _over(first: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Later settings go before earlier ones; of two mappings (the options of a loss), entry by entry."""
    merged = dict(first)
    for other in others:
        for name, value in other.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
            merged[name] = {**merged[name], **value} if both else value
    return merged


def check(plan: Plan) -> None:
    """Raises `UserError` for whatever can be known to be wrong: names, settings, losses, missing inputs, and
    data lines that a stage cannot read."""
    stages, recipe = plan.recipe.stages, plan.recipe
    for name in (*plan.inputs, *plan.settings):
        if name not in recipe.inputs and name not in {"defaults", *(stage.name for stage in stages)}:
            raise UserError(
                f"--set {name}: legal: the inputs ({', '.join(recipe.inputs)}), "
                f"defaults.SETTING, and of the stages {', '.join(dict.fromkeys(s.name for s in stages))} "
                "STAGE.SETTING"
            )
    known = {name for stage in stages if steps.trains(stage.do) for name in steps.settings_of(stage.do)}
    if unknown := [name for name in plan.defaults() if name not in known]:
        raise UserError(f"{recipe.path}: defaults: no training stage has a setting {unknown[0]!r}")
    for name in plan.skip:
        own = [stage for stage in stages if stage.name == name]
        if not own or any(
            steps.STEPS[stage.do].makes != "policy" for stage in own if stage.do in steps.STEPS
        ):
            legal = dict.fromkeys(
                s.name for s in stages if s.do in steps.STEPS and steps.STEPS[s.do].makes == "policy"
            )
            raise UserError(f"--skip {name}: legal are stages that train the policy: {', '.join(legal)}")
    seen: set[str] = set()
    for index, stage in enumerate(stages):
        if stage.name in plan.skip:
            steps.check_known(stage.where, stage.do, stage.settings)
            continue
        steps.check_known(stage.where, stage.do, {**stage.settings, **plan.settings.get(stage.name, {})})
        settings = plan.resolve(index, range(index))
        config = steps.build(stage.where, stage.do, settings)
        _check_kinds(plan, index, settings)
        _check_places(plan, index, settings)
        for name in steps.STEPS[stage.do].models:
            for path in _files(settings.get(name)):
                _check_model(plan, f"{stage.where}: {name}", path, settings, seen)
        _check_data(plan, stage, settings, config, seen)


def _check_kinds(plan: Plan, index: int, settings: Mapping[str, Any]) -> None:
    """A model where a model belongs, data where data belong."""
    stage, step = plan.recipe.stages[index], steps.STEPS[plan.recipe.stages[index].do]
    kinds = {plan.made(i): steps.STEPS[plan.recipe.stages[i].do].makes for i in range(index)}
    for name, value in settings.items():
        for path in value if isinstance(value, list) else [value]:
            kind = kinds.get(path) if isinstance(path, str) else None
            legal = (
                ("scorer",) if name == "reward_model" else ("policy", "scorer") if name in step.models
                else ("data",) if name in step.data else (kind,)
            )  # fmt: skip
            if kind is not None and kind not in legal:
                raise UserError(
                    f"{stage.where}: {name} must be {'data' if 'data' in legal else 'a model'}"
                    f"{' that scores' if legal == ('scorer',) else ''}, and {Path(path).name} is {kind}"
                )


def _check_places(plan: Plan, index: int, settings: Mapping[str, Any]) -> None:
    """Refuse a model or a file of the user's that lies where the run writes, and --overwrite removes."""
    stage, step = plan.recipe.stages[index], steps.STEPS[plan.recipe.stages[index].do]
    made = {plan.made(i) for i in range(index)}
    for name in (*step.models, *step.data, *step.files):
        for path in _files(settings.get(name)):
            if path not in made and Path(path).expanduser().resolve().is_relative_to(plan.output):
                raise UserError(
                    f"{stage.where}: {name}: {path} lies in the output directory {plan.output}, where the run "
                    "writes: copy it to a place of its own"
                )


def _check_model(plan: Plan, where: str, path: Any, settings: Mapping[str, Any], seen: set[str]) -> None:
    if path in seen or Path(path).is_relative_to(plan.output):
        return
    seen.add(path)
    try:
        models.load_config(path, trust_remote_code=bool(settings.get("trust_remote_code", False)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_data(plan: Plan, stage: Stage, settings: Mapping[str, Any], config: Any, seen: set[str]) -> None:
    """Read every line that is there already, as the stage will."""
    for name in steps.STEPS[stage.do].data:
        for path in _files(settings.get(name)):
            parse, form = _reader(stage.do, name, config)
            key = f"{path}\0{getattr(form, 'name', '')}{getattr(form, 'required', '')}{parse}"
            if key in seen or Path(path).is_relative_to(plan.output):
                continue
            seen.add(key)
            try:
                first = None
                for source, row in read_jsonl(path):
                    texts = parse(source, row) if parse is not None else None
                    values = getattr(texts, "values", None)  # a conversation or a text has none
                    if form is not None and values is not None:
                        first = values if first is None else first
                        form.check_values(source, values, first)
            except UserError as error:
                raise UserError(f"{stage.where}: {name}: {error}") from None


def _files(value: Any) -> Iterable[str]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _reader(do: str, name: str, config: Any) -> tuple[Any, Format | None]:
    """(what reads a line, the format whose columns are checked) of a setting that names data."""
    if not steps.trains(do):
        return None, None
    if name == "ptx_data":
        return parse_text, None
    if isinstance(config, OnlineConfig):
        return parse_prompt, None
    form = steps.format_of(do, config)
    return form.parse, form


def read_settings(pairs: Iterable[str], recipe: Recipe) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(inputs, settings by stage) of `--set NAME=VALUE` and `--set STAGE.SETTING=VALUE`."""
    inputs, settings = dict(recipe.values), {}
    for text in pairs:
        name, value = parse_option("--set", text)
        stage, dot, setting = name.partition(".")
        if not dot:
            if name not in recipe.inputs:
                raise UserError(
                    f"--set {name}: {recipe.path.name} has no such input; it has "
                    f"{', '.join(recipe.inputs) or 'none'} (and STAGE.SETTING)"
                )
            known = INPUTS.get(name)
            inputs[name] = text.partition("=")[2].strip() if known else value
        elif "." in setting:
            outer, _, inner = setting.partition(".")
            settings.setdefault(stage, {}).setdefault(outer, {})[inner] = value
        else:
            settings.setdefault(stage, {})[setting] = value
    return inputs, settings


def fingerprint(plan: Plan) -> list[dict[str, Any]]:
    """What must be the same when a run goes on: every stage's settings, and the contents of the data files
    that are there before the run."""
    digests: dict[str, str] = {}

    def digest(path: str) -> str:
        if path not in digests:
            found = hashlib.blake2b(digest_size=16)
            with open(path, "rb") as file:
                while part := file.read(1 << 20):
                    found.update(part)
            digests[path] = found.hexdigest()
        return digests[path]

    found: list[dict[str, Any]] = []
    for i, stage in enumerate(plan.recipe.stages):
        if stage.name in plan.skip:
            found.append({"label": stage.label, "do": stage.do, "settings": {"left": "out"}, "data": []})
            continue
        settings = plan.resolve(i, range(i))
        files = [path for name in steps.STEPS[stage.do].data for path in _files(settings.get(name))]
        outside = [path for path in files if not Path(path).is_relative_to(plan.output)]
        kept = {name: value for name, value in settings.items() if name not in FREE_ON_RESUME}
        inside = json.loads(json.dumps(kept, default=str).replace(str(plan.output), "OUTPUT"))
        found.append(
            {"label": stage.label, "do": stage.do, "settings": inside, "data": [digest(p) for p in outside]}
        )
    return found
