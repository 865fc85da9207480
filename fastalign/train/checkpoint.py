"""Checkpoints that survive an interruption, and the rules for what may be written where.

    OUTPUT/checkpoints/step-00000100/    a model directory (loadable by itself) plus trainer.pt: optimizer, random state, settings, and
                                         what the method remembers

A checkpoint is written into "step-...tmp" and renamed when complete, so a directory named step-00000100 is always whole.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastalign.train.config import FREE_ON_RESUME, MODEL_DIRECTORIES, RunConfig, flag_of
from fastalign.train.errors import UserError

# What a run leaves in its output directory besides the model; --overwrite removes these.
RUN_FILES = (
    "metrics.jsonl", "train_config.json", "ref_logprobs.safetensors", "ref_logprobs_eval.safetensors", "value_head.safetensors",
)  # fmt: skip
RUN_DIRECTORIES = ("checkpoints", "tensorboard")


def inside(output: Path, *parts: str) -> Path:
    """The path of something in the output directory. Refuses one that leads out of it, through a symbolic link for example."""
    path = output.joinpath(*parts)
    if not path.resolve().is_relative_to(output):
        raise UserError(f"{path} leads out of the output directory {output}")
    return path


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file completely or not at all: `write` gets a temporary path beside it, which then takes the place of `path`."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def check_output(config: RunConfig) -> Path:
    """The output directory, if it is a place to write without destroying anything that --resume or --overwrite does not name."""
    output = config.output_dir()
    for name in MODEL_DIRECTORIES:
        if (directory := getattr(config, name, None)) is None:
            continue
        path, flag = Path(directory).expanduser().resolve(), flag_of(name, type(config))
        if path == output:
            raise UserError(f"--output is the directory of {flag}: the model there would be replaced by the trained one")
        for part in (*RUN_DIRECTORIES, "model.tmp"):
            if path.is_relative_to(output / part):
                raise UserError(f"{flag} lies in '{part}' of --output, where a run removes files: copy the model to a place of its own")
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write into the output directory {output}" + ("" if existing == output else f": {existing} is in the way"))
    found = [name for name in RUN_FILES + RUN_DIRECTORIES if inside(output, name).exists()]
    if found and not (config.resume or config.overwrite):
        raise UserError(f"the output directory {output} holds an earlier run ({found[0]}); choose --resume or --overwrite")
    if config.resume and newest(output) is None:
        raise UserError(f"--resume: no checkpoint in {output / 'checkpoints'}")
    return output


def create_output(output: Path, *, overwrite: bool) -> None:
    """Make the directory; with `overwrite`, remove what an earlier run left in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the output directory {output}: {error.strerror}") from None
    for name in RUN_FILES if overwrite else ():
        inside(output, name).unlink(missing_ok=True)
    for name in RUN_DIRECTORIES if overwrite else ():
        if inside(output, name).exists():
            shutil.rmtree(inside(output, name))


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    folder = inside(output, "checkpoints")
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name)] if folder.is_dir() else []
    return sorted(found)


def newest(output: Path) -> Path | None:
    return next(reversed(checkpoints(output)), None)


def save_checkpoint(output: Path, step: int, state: dict[str, Any], save_model: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint of `step` and remove all but the `keep` newest. `state` must hold tensors and plain values only."""
    final = inside(output, "checkpoints", f"step-{step:08d}")
    temporary = final.with_name(final.name + ".tmp")
    for path in (temporary, final):  # the rest of an interrupted attempt; a checkpoint that a resumed run reaches again
        if path.exists():
            shutil.rmtree(path)
    temporary.mkdir(parents=True)
    save_model(temporary)
    torch.save(state, temporary / "trainer.pt")
    os.rename(temporary, final)
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return final


def save_final(output: Path, save_model: Callable[[Path], None]) -> None:
    """Save the model in the output directory itself: first aside, then file by file into place, so that no half-written file shows."""
    temporary = inside(output, "model.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    save_model(temporary)
    for stale in output.glob("model*.safetensors*"):  # weights of an earlier run under names that this one may not use
        stale.unlink()
    for file in temporary.iterdir():
        os.replace(file, inside(output, file.name))
    temporary.rmdir()


def load_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU."""
    try:
        return torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has many ways to say that a file is not what it should be
        raise UserError(f"--resume: the checkpoint {path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings that determine the numbers of a run."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_ON_RESUME}


def check_same_run(state: dict[str, Any], config: RunConfig, method: str, data: str) -> None:
    """Refuse to resume a run with other settings or other data: its result would belong to neither."""
    if state["method"] != method:
        raise UserError(f"--resume: the run was started as 'fastalign train {state['method']}', not {method}")
    saved, now = state["settings"], settings(config)
    differing = [name for name in now if saved.get(name) != now[name]]
    if differing:
        changes = "; ".join(f"{flag_of(name, type(config))} was {saved.get(name)}, is {now[name]}" for name in differing)
        raise UserError(f"--resume: the run was started with other settings: {changes}")
    if state["data"] != data:
        raise UserError("--resume: the data or its tokenisation has changed since the run was started")


def random_state() -> dict[str, Any]:
    """State of torch's generators. The trainer itself draws nothing from them; a model with code of its own might."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
