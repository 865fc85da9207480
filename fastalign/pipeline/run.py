"""A plan carried out: stage after stage, each in a folder of its own, with one log and one picture for all.

OUTPUT/run.json         the stages' settings, and which are done
OUTPUT/metrics.jsonl    every record of every training stage, with the stage's label
OUTPUT/run.png          the same as a picture
OUTPUT/01-sft/ ...      what the stages made"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastalign
from fastalign.pipeline import plan as plans
from fastalign.pipeline import report, steps
from fastalign.pipeline.plan import Plan
from fastalign.pipeline.recipe import Stage
from fastalign.train import checkpoint
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.files import locked, remove, replace_file, writing

RECORD = "run.json"
LOG = "metrics.jsonl"


def run(
    plan: Plan, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> list[dict[str, Any]]:
    """Carry out a plan; what is known of every stage that was done: label, seconds, the last metrics.

    A stage that was done is not done again with `resume`; one that was broken off goes on from its newest
    checkpoint, or begins again where it has none.

    Raises:
        UserError: anything wrong with the recipe, its inputs or the output directory; before any work.
        TrainingError: a stage broke off."""
    plans.check(plan)
    wanted = plans.fingerprint(plan)
    done = _opened(plan, wanted, resume, overwrite)
    plan.output.mkdir(parents=True, exist_ok=True)
    with locked(plan.output):
        if overwrite:
            _remove(plan)
        _save(plan, wanted, done)
        try:
            for index in range(len(plan.recipe.stages)):
                _stage(plan, index, done, progress)
                _save(plan, wanted, done)
        finally:
            _log(plan, done)
    return [{"label": label, **facts} for label, facts in done.items()]


def _stage(plan: Plan, index: int, done: dict[str, Any], progress: bool) -> None:
    """Do one stage, unless it was done, and note in `done` what came of it."""
    stage = plan.recipe.stages[index]
    if stage.label in done:
        print(f"== {stage.label}: done before", flush=True)
    elif why := "left out by --skip" if stage.name in plan.skip else _ended(plan, index, done):
        print(f"== {stage.label}: {why}", flush=True)
        done[stage.label] = {"skipped": why}
    else:
        print(f"== stage {index + 1}/{len(plan.recipe.stages)}, {stage.label}: {stage.do}", flush=True)
        earlier = enumerate(plan.recipe.stages[:index])
        executed = [i for i, other in earlier if _made(done, other) or other.name in plan.skip]
        start = time.perf_counter()
        metrics = _carry_out(stage, plan.resolve(index, executed), progress)
        done[stage.label] = {"seconds": round(time.perf_counter() - start, 1), "metrics": metrics}


def _carry_out(stage: Stage, settings: Mapping[str, Any], progress: bool) -> dict[str, Any]:
    """Run one stage, going on where it was broken off; its last metrics, or what it says of itself."""
    output = Path(settings["output"])
    config = steps.build(stage.where, stage.do, settings)
    known = {field.name for field in dataclasses.fields(config)}
    again: dict[str, Any] = {"progress": progress} if "progress" in known else {}
    if steps.trains(stage.do):
        goes_on = checkpoint.is_run(output) and checkpoint.newest(output) is not None
        again |= {"resume": goes_on, "overwrite": not goes_on and output.exists()}
    else:
        output.parent.mkdir(exist_ok=True)
        if "overwrite" in known and not steps.STEPS[stage.do].goes_on:
            again["overwrite"] = output.exists()
    try:
        result = steps.call(stage.do, dataclasses.replace(config, **again))
    except UserError as error:
        raise TrainingError(f"{stage.where}: {error}") from error
    except TrainingError as error:
        raise TrainingError(f"{stage.where}: {error}") from error
    if steps.trains(stage.do):
        return {k: v for k, v in result.metrics.items() if isinstance(v, (int, float))}
    if getattr(result, "exit_code", 0):
        raise TrainingError(f"{stage.where}: {result}; --resume tries again what failed")
    print(f"{stage.label}: {result}", flush=True)
    return {"made": str(result)}


def _made(done: Mapping[str, Any], stage: Stage) -> bool:
    return stage.label in done and "skipped" not in done[stage.label]


def _ended(plan: Plan, index: int, done: Mapping[str, Any]) -> str | None:
    """Why a stage is left out: an earlier round has ended the repetition."""
    stage = plan.recipe.stages[index]
    for other in plan.recipe.stages[:index]:
        for outer, stop in other.stops if _made(done, other) else ():
            depth = len(outer)
            later = (
                len(stage.rounds) > depth
                and stage.rounds[:depth] == outer == other.rounds[:depth]
                and stage.rounds[depth] > other.rounds[depth]
            )
            value = done[other.label]["metrics"].get(stop.metric)
            if later and value is None:
                legal = ", ".join(sorted(done[other.label]["metrics"]))
                raise TrainingError(
                    f"{other.where}: stop_when: it has no metric {stop.metric!r}; legal: {legal}"
                )
            if later and stop.holds(value):
                return f"left out, since {other.label} came to {stop.metric} {value:.4g}"
    return None


def _opened(plan: Plan, wanted: list[dict[str, Any]], resume: bool, overwrite: bool) -> dict[str, Any]:
    """What was done before, by label. Refuses a directory that is not this run's."""
    path = plan.output / RECORD
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if not path.exists():
        if resume:
            raise UserError(f"--resume: {plan.output} holds no run of a recipe ({RECORD})")
        if plan.output.exists() and (not plan.output.is_dir() or any(plan.output.iterdir())):
            raise UserError(f"the output {plan.output} is not an empty directory, and no run of a recipe")
        return {}
    record = _record(path)
    if overwrite:
        return {}
    if not resume:
        raise UserError(
            f"the output directory {plan.output} holds an earlier run; choose --resume or --overwrite"
        )
    before = record["stages"]
    for old, new in zip(before, wanted):
        for key in ("label", "do"):
            if old[key] != new[key]:
                raise UserError(f"--resume: stage {old['label']} was {old[key]!r}, and is {new[key]!r} now")
        for name in sorted({*old["settings"], *new["settings"]}):
            if old["settings"].get(name) != new["settings"].get(name):
                raise UserError(
                    f"--resume: stage {new['label']} had {name} {old['settings'].get(name)!r}, and has "
                    f"{new['settings'].get(name)!r} now"
                )
        if old["data"] != new["data"]:
            raise UserError(f"--resume: the data of stage {new['label']} are not what they were")
    if len(before) != len(wanted):
        raise UserError(f"--resume: the run had {len(before)} stages, the recipe has {len(wanted)}")
    return record["done"]


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if {"stages", "done", "fastalign"} <= record.keys():
            return record
        raise ValueError("it is none")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no record of a run: {error}") from None


def _remove(plan: Plan) -> None:
    """What an earlier run left: its stages' folders and its files, nothing else."""
    path = plan.output / RECORD
    if path.exists():
        for folder in _record(path)["folders"]:
            if "/" not in folder and folder not in ("", ".", ".."):
                remove(plan.output / folder)
        for name in (LOG, "run.png"):
            remove(plan.output / name)


def _save(plan: Plan, stages: list[dict[str, Any]], done: Mapping[str, Any]) -> None:
    folders = [plan.folder(i).name for i in range(len(stages))]
    record = {
        "recipe": plan.recipe.path.name, "fastalign": fastalign.__version__, "seed": plan.seed,
        "inputs": dict(plan.inputs), "folders": folders, "stages": stages, "done": dict(done),
    }  # fmt: skip
    _write(plan.output / RECORD, json.dumps(record, indent=1, default=str) + "\n")


def _log(plan: Plan, done: Mapping[str, Any]) -> None:
    """The whole run's records, from those that every training stage has written itself, and their picture."""
    records: list[dict[str, Any]] = []
    for index, stage in enumerate(plan.recipe.stages):
        path = plan.folder(index) / LOG
        if stage.label in done and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            records += [{"stage": stage.label, "do": stage.do, **json.loads(line)} for line in lines]
    _write(plan.output / LOG, "".join(json.dumps(record) + "\n" for record in records))
    if records:
        with writing(str(plan.output / "run.png")):
            replace_file(plan.output / "run.png", lambda path: report.draw(plan.recipe.title, records, path))


def _write(path: Path, text: str) -> None:
    with writing(str(path)):
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
