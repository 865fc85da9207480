"""Checkpoints that survive an interruption, and the rules for what may be written where.

    OUTPUT/checkpoints/step-00000100/    a model directory (loadable by itself) plus trainer.pt: optimizer, random state, settings, and
                                         what the method remembers

A checkpoint is written into "step-...tmp" and renamed when all of it is on the disk, so a directory named
step-00000100 is always whole; one that is removed loses that name first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import fastalign
from fastalign.train.config import BEFORE, FREE_ON_RESUME, MODEL_DIRECTORIES, RunConfig, flag_of
from fastalign.train.errors import UserError
from fastalign.train.files import (
    WRITE_ERRORS,
    check_unlocked,
    inside,
    locked,
    move_into,
    reason,
    remove,
    replace_file,
    sync_tree,
    writing,
)

# What a run leaves in its output directory besides the model; --overwrite removes these, and in the
# directories only what a run puts there.
RECORD = "train_config.json"
RUN_FILES = (
    "metrics.jsonl", "ref_logprobs.safetensors", "ref_logprobs_eval.safetensors", "value_head.safetensors",
    RECORD,
)  # fmt: skip
RUN_DIRECTORIES = {"checkpoints": r"step-\d{8}(\.tmp|\.old)?", "tensorboard": r"events\.out\.tfevents\..*"}
# A directory with one of these holds a model.
_MODEL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "adapter_model.*", "*model*.safetensors",
    "pytorch_model*.bin", "*.gguf", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
# The form of trainer.pt, and what it holds. The number goes up when an older state no longer says what a run
# needs.
FORMAT = 2
_STATE: dict[str, type] = {
    "format": int, "step": int, "steps": int, "tokens": int, "method": str, "data": str, "models": dict, "settings": dict, "optimizer": dict,
    "task": dict, "random": dict,
}  # fmt: skip


def check_output(config: RunConfig) -> Path:
    """The output directory, if it is a place to write without destroying anything that --resume or
    --overwrite does not name."""
    output = config.output_dir()
    for name in MODEL_DIRECTORIES:
        if (directory := getattr(config, name, None)) is None:
            continue
        path, flag = Path(directory).expanduser().resolve(), flag_of(name, type(config))
        if path == output:
            raise UserError(
                f"--output is the directory of {flag}: the model there would be replaced by the trained one"
            )
        for part in (*RUN_DIRECTORIES, "model.tmp"):
            if path.is_relative_to(output / part):
                raise UserError(
                    f"{flag} lies in '{part}' of --output, where a run removes files: copy the model to a "
                    "place of its own"
                )
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"cannot write into the output directory {output}"
            + ("" if existing == output else f": {existing} is in the way")
        )
    check_unlocked(output)
    found = [name for name in (*RUN_FILES, *RUN_DIRECTORIES) if os.path.lexists(inside(output, name))]
    if config.resume:
        if newest(output) is None:
            raise UserError(f"--resume: no checkpoint in {output / 'checkpoints'}")
    elif is_run(output):
        if not config.overwrite:
            raise UserError(
                f"the output directory {output} holds an earlier run ({found[0]}); choose --resume or "
                "--overwrite"
            )
    else:
        _check_foreign(output, found, config.overwrite)
    return output


def _check_foreign(output: Path, found: list[str], overwrite: bool) -> None:
    """Refuse a directory in which something would be replaced that no run has written."""
    if found:
        raise UserError(
            f"the output directory {output} holds {found[0]}, which an earlier run may have left or something "
            f"else; without a {RECORD} of a run "
            "nothing there is removed: choose another directory, or move it away"
        )
    models = sorted(path.name for pattern in _MODEL_FILES for path in output.glob(pattern))
    if models and not overwrite:
        raise UserError(
            f"the output directory {output} holds a model ({models[0]}) that no run of fastalign has written; "
            "choose another directory, or "
            "--overwrite to replace that model"
        )
    if "adapter_config.json" in models:
        raise UserError(
            f"{output / 'adapter_config.json'}: the adapter would be loaded on top of the trained model; "
            "choose another directory"
        )
    blocked = [name for name in models if (output / name).is_dir()]
    if blocked:
        raise UserError(
            f"{output / blocked[0]} is a directory, and a file of the trained model would have that name; "
            "choose another"
        )


def is_run(output: Path) -> bool:
    """Whether the record in a directory says that a run of ours has written there."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        return {"method", "config"} <= record.keys() and "fastalign" in record["versions"]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def opened(output: Path, config: RunConfig, method: str) -> Iterator[None]:
    """The directory, made and kept for this run. With --overwrite, what an earlier run left in it is removed;
    nothing else ever is."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the output directory {output}: {error.strerror}") from None
    with locked(output):
        with writing(f"into the output directory {output}"):
            if config.overwrite and is_run(output):
                _remove_run(output)
            for path in output.glob(".*.tmp"):  # of a run that was killed while it wrote one of its files
                if any(
                    re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp", path.name)
                    for name in RUN_FILES
                ):
                    path.unlink()
            if not config.resume:  # whatever comes next, this directory is a run's
                write_record(output, config, method)
        yield


def _remove_run(output: Path) -> None:
    for name, pattern in RUN_DIRECTORIES.items():
        folder = inside(output, name)
        for path in folder.iterdir() if folder.is_dir() else ():
            if re.fullmatch(pattern, path.name):
                remove(path)
        with contextlib.suppress(OSError):  # not there, or it holds something else
            folder.rmdir()
    for name in RUN_FILES:
        inside(output, name).unlink(missing_ok=True)


def write_record(output: Path, config: RunConfig, method: str) -> None:
    """Keep the settings and versions beside the result."""
    versions = {module.__name__: module.__version__ for module in (fastalign, torch, transformers)}
    record = {"method": method, "config": dataclasses.asdict(config), "versions": versions}
    text = json.dumps(record, indent=2) + "\n"
    replace_file(inside(output, RECORD), lambda path: path.write_text(text, encoding="utf-8"))


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    folder = inside(output, "checkpoints")
    found = (
        [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name)]
        if folder.is_dir()
        else []
    )
    return sorted(found)


def newest(output: Path) -> Path | None:
    return next(reversed(checkpoints(output)), None)


def save_checkpoint(
    output: Path, step: int, state: dict[str, Any], save_model: Callable[[Path], None], keep: int
) -> Path:
    """Write the checkpoint of `step` and remove all but the `keep` newest. `state` must hold tensors and
    plain values only. Where it cannot be written, what was there stays, and `TrainingError` says so."""
    final = inside(output, "checkpoints", f"step-{step:08d}")
    temporary = _aside(final)
    before = newest(output)
    with writing(f"the checkpoint {final}" + (f" (--resume goes on from {before.name})" if before else "")):
        try:
            temporary.mkdir(parents=True)
            save_model(temporary)
            with (temporary / "trainer.pt").open(
                "wb"
            ) as file:  # a file of Python's: its errors say what the system said
                torch.save(state, file)
            sync_tree(temporary)
        except WRITE_ERRORS:  # a full disk: give back what was taken
            remove(temporary)
            raise
        old = final.with_name(final.name + ".old")
        remove(old)
        if os.path.lexists(final):  # a checkpoint that a resumed run reaches again
            os.rename(final, old)
        os.rename(temporary, final)
        remove(old)
        for old in checkpoints(output)[:-keep]:
            aside = _aside(old)
            os.rename(old, aside)
            remove(aside)
    return final


def _aside(path: Path) -> Path:
    """The name of a checkpoint while it is being written or removed; what an interrupted attempt left there
    goes."""
    aside = path.with_name(path.name + ".tmp")
    remove(aside)
    return aside


def save_final(output: Path, save_model: Callable[[Path], None]) -> None:
    """Save the model in the output directory itself: first aside, then file by file into place, so that no
    half-written file shows."""
    temporary = output / "model.tmp"
    with writing(f"the trained model in {output}"):
        remove(temporary)
        try:
            temporary.mkdir()
            save_model(temporary)
            sync_tree(temporary)
        except WRITE_ERRORS:
            remove(temporary)
            raise
        written = {path.name for path in temporary.iterdir()}
        for path in (
            output.iterdir()
        ):  # weights of an earlier model under names that this one does not use: they might be loaded instead
            if re.fullmatch(_WEIGHTS, path.name) and path.name not in written:
                path.unlink()
        move_into(temporary, output)


def load_state(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU; mapped: its tensors are read from the file when they are used.
    Raises `UserError` for one that is not whole, or of another form."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused anyway
            state = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load has many ways to say that a file is not what it should be
        raise UserError(
            f"--resume: the checkpoint {path} cannot be read ({_HINT}): {reason(error)[:200]}"
        ) from error
    what = f"--resume: the checkpoint {path} is not one of this trainer ({_HINT}): trainer.pt "
    if not isinstance(state, dict):
        raise UserError(f"{what}holds {type(state).__name__}")
    if state.get("format") != FORMAT and {"step", "optimizer"} <= state.keys():
        raise UserError(
            f"--resume: the checkpoint {path} was written by another version of fastalign: its format is "
            f"{state.get('format', 1)!s:.20}, this "
            f"version reads {FORMAT}"
        )
    for name, kind in _STATE.items():
        if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
            raise UserError(
                what
                + (
                    f"lacks '{name}'"
                    if name not in state
                    else f"has '{name}' of type {type(state[name]).__name__}"
                )
            )
    if (
        path.name != f"step-{state['step']:08d}"
        or not 0 < state["step"] <= state["steps"]
        or state["tokens"] < 0
    ):
        raise UserError(f"{what}says step {state['step']} of {state['steps']}, {state['tokens']} tokens")
    return state


_HINT = "remove it to go on from an earlier one"


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings that determine the numbers of a run. What a path leads to is compared by its contents
    instead."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_ON_RESUME}


def saved_setting(output: Path, name: str) -> Any:
    """What the run in a directory, whose newest checkpoint is to be gone on from, was started with."""
    return load_state(newest(output), mapped=True)["settings"].get(name, BEFORE.get(name))


def check_same_run(
    state: Mapping[str, Any], config: RunConfig, method: str, data: str, models: Mapping[str, str], steps: int
) -> None:
    """Refuse to resume a run with other settings, models or data: its result would belong to neither. More
    steps are legal."""
    if state["method"] != method:
        raise UserError(f"--resume: the run was started as 'fastalign train {state['method']}', not {method}")
    now = settings(config)
    # A setting that the checkpoint lacks came later: the run did what its default does, or what BEFORE says.
    saved = settings(type(config)()) | {
        name: value for name, value in BEFORE.items() if now.get(name) is not None
    }
    saved |= state["settings"]
    differing = [
        name
        for name in now
        if saved.get(name) != now[name] and not (name in ("max_steps", "epochs") and steps >= state["steps"])
    ]
    if differing:
        changes = "; ".join(
            f"{flag_of(name, type(config))} was {saved.get(name)}, is {now[name]}" for name in differing
        )
        raise UserError(f"--resume: the run was started with other settings: {changes}")
    for name in {**state["models"], **models}:
        if state["models"].get(name) != models.get(name):
            raise UserError(
                f"--resume: the weights of {flag_of(name, type(config))} are not those that the run was "
                "started with"
            )
    if state["data"] != data:
        raise UserError("--resume: the data or its tokenisation has changed since the run was started")


def random_state() -> dict[str, Any]:
    """State of torch's generators. The trainer itself draws nothing from them; a model with code of its own
    might."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
