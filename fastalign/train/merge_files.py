"""`fastalign merge`: one model directory out of several, tensor by tensor, so that no model is ever in memory."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import fastalign
from fastalign.cli.console import Parser
from fastalign.train.config import add_arguments, from_arguments
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.files import LOCK, locked, remove, sync_tree, writing
from fastalign.train.merge import KINDS, METHODS, Rule, make_rule
from fastalign.train.models.stored import Stored, check_same_weights, tied_names
from fastalign.train.program import answer
from fastalign.train.settings import SEED, Settings, setting

RECORD = "merge.json"
# What a model is besides its weights; taken from the base as it stands.
_COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*", "preprocessor_config.json",
    "processor_config.json", "*.py",
)  # fmt: skip
_OUTPUT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class MergeConfig(Settings):
    """Settings of `fastalign merge`."""

    base: str | None = setting(
        None, "required: directory of the model that the others started from", metavar="DIR"
    )
    models: tuple[str, ...] = setting(
        (),
        "required, repeatable: directory of a model trained from the base, and its weight; default weight: 1 "
        "/ their number for linear and "
        "dare, 1 for the others",
        flag="--model",
        metavar="DIR[=WEIGHT]",
    )
    output: str | None = setting(
        None, "required: directory for the merged model; it must not hold anything", metavar="DIR"
    )
    method: str = setting("linear", "how the differences from the base are merged", choices=METHODS)
    density: float | None = setting(
        None, "share of the entries that ties, dare and dare_ties keep, in (0, 1]; default: 0.2", metavar="X"
    )
    t: float | None = setting(
        None, "how near slerp comes to the second model, in [0, 1]; default: 0.5", metavar="X"
    )
    seed: int = setting(0, "seed of what dare and dare_ties drop", SEED)
    dtype: str | None = setting(
        None, "dtype of the merged weights; default: of each what it has in the base", choices=tuple(_OUTPUT)
    )
    max_shard_size: str = setting(
        "5GB", "largest file of weights, such as 500MB; one file is in memory at a time", metavar="SIZE"
    )
    overwrite: bool = setting(False, "replace what an earlier merge has written in the output directory")
    trust_remote_code: bool = setting(False, "run Python code that the base's directory brings along")
    progress: bool = setting(True, "show a progress bar on a terminal")


class Merged(NamedTuple):
    """What `run` has made."""

    output: Path
    tensors: int
    parameters: int


def run(config: MergeConfig) -> Merged:
    """Merge the models. Nothing is written before everything has been compared, and the output directory is there
    when it is whole. Raises `UserError` before any work, `TrainingError` where it breaks off."""
    for name in ("base", "models", "output"):
        if not getattr(config, name):
            raise UserError(f"{config.flag(name)} is missing: see fastalign merge --help")
    directories, weights = zip(*(_parse(text) for text in config.models))
    rule = make_rule(
        len(directories),
        method=config.method,
        weights=weights,
        density=config.density,
        t=config.t,
        seed=config.seed,
    )
    output = _check_output(config, directories)
    with contextlib.ExitStack() as stack:
        base = Stored("--base", config.base, stack, config.trust_remote_code)
        others = [Stored("--model", each, stack, config.trust_remote_code) for each in directories]
        twins = tied_names(base)
        for other in others:
            check_same_weights(base, other, twins)
        names = [name for name in base.tensors if base.first_of(name, twins) == name]
        plan = _plan(base, names, config)
        print(_described(config, rule, directories))
        with _aside(output) as folder, writing(f"the merged model in {output}"):
            files = _write(config, rule, base, others, twins, plan, folder)
            record = {"method": config.method, "config": dataclasses.asdict(config), "files": sorted(files)}
            record |= {"versions": {m.__name__: m.__version__ for m in (fastalign, torch)}}
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            sync_tree(folder)
            _put_in_place(folder, output)
    parameters = sum(base.tensors[name].numel() for name in names)
    print(f"merged: {len(names)} tensors, {parameters / 1e6:.3g} M parameters, saved in {output}")
    return Merged(output, len(names), parameters)


def _parse(text: str) -> tuple[str, float | None]:
    """`DIR` or `DIR=WEIGHT`."""
    directory, equals, weight = text.rpartition("=")
    if not equals or Path(text).expanduser().is_dir():
        return text, None
    try:
        return directory, float(weight)
    except ValueError:
        raise UserError(f"--model {text}: expected DIR or DIR=WEIGHT, and {weight!r} is no number") from None


def _plan(base: Stored, names: Sequence[str], config: MergeConfig) -> Any:
    """Which tensor goes into which file."""
    from huggingface_hub import split_torch_state_dict_into_shards

    wanted = {
        name: torch.empty(
            base.tensors[name].shape, dtype=_dtype_of(base.tensors[name], config), device="meta"
        )
        for name in names
    }
    try:
        return split_torch_state_dict_into_shards(wanted, max_shard_size=config.max_shard_size)
    except ValueError:
        raise UserError(
            f"--max-shard-size is {config.max_shard_size!r}: expected a number and a unit, such as 5GB or 500MB"
        ) from None


def _dtype_of(tensor: torch.Tensor, config: MergeConfig) -> torch.dtype:
    return _OUTPUT[config.dtype] if config.dtype and tensor.is_floating_point() else tensor.dtype


def _write(
    config: MergeConfig,
    rule: Rule,
    base: Stored,
    others: Sequence[Stored],
    twins: Mapping[str, Sequence[str]],
    plan: Any,
    folder: Path,
) -> list[str]:
    """Write every file of the merged model; their names."""
    total = sum(map(len, plan.filename_to_tensors.values()))
    with tqdm(
        total=total, desc="merging", unit=" tensors", leave=False, disable=None if config.progress else True
    ) as bar:
        for file, names in plan.filename_to_tensors.items():
            tensors = {}
            for name in names:
                start = base.read(name)
                wide = (
                    start.float()
                    if config.dtype and start.dtype in (torch.float16, torch.bfloat16)
                    else start
                )
                merged = rule(name, wide, [other.read(other.first_of(name, twins)) for other in others])
                merged = merged.to(_dtype_of(merged, config)).contiguous()
                if merged.is_floating_point() and not merged.isfinite().all():
                    raise TrainingError(
                        f"the merged weight {name} is not finite in {merged.dtype}; nothing was written"
                    )
                tensors[name] = merged
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    for path in sorted({path for pattern in _COMPANIONS for path in base.path.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    if config.dtype:
        _name_dtype(folder / "config.json", config.dtype)
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != LOCK
    ]


def _name_dtype(path: Path, dtype: str) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = dtype
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# --- the output directory -----------------------------------------------------------------------------------


def _check_output(config: MergeConfig, directories: Sequence[str]) -> Path:
    """The output directory, if it holds nothing, or with --overwrite an earlier merge and nothing else."""
    output = Path(config.output).expanduser().resolve()
    for flag, directory in (("--base", config.base), *(("--model", each) for each in directories)):
        path = Path(directory).expanduser().resolve()
        if path == output or path.is_relative_to(output):
            raise UserError(f"--output {output} holds {flag} {directory}: choose another directory")
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing if existing != output else output.parent, os.W_OK):
        raise UserError(f"--output {output} cannot be written: {existing} is in the way")
    if not output.exists() or not any(output.iterdir()):
        return output
    foreign = _foreign(output)
    if foreign or not config.overwrite:
        hint = "" if foreign else "; --overwrite replaces what an earlier merge has written there"
        name = foreign or next(path.name for path in output.iterdir())
        raise UserError(f"--output {output} holds {name}: choose another directory{hint}")
    return output


def _foreign(output: Path) -> str | None:
    """Something in a directory that no merge has written; None: there is no such thing."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        ours = {RECORD, *record["files"]} if "fastalign" in record["versions"] else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = set()
    return next((str(path.relative_to(output)) for path in sorted(output.rglob("*"))
                 if not path.is_dir() and str(path.relative_to(output)) not in ours), None)  # fmt: skip


@contextlib.contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """An empty directory beside the output, of this process alone, which is gone afterwards; what a merge that
    was killed has left there goes, too."""
    folder = output.with_name(f".{output.name}.merge.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    with locked(folder):
        for path in folder.iterdir():
            if path.name != LOCK:
                remove(path)
        try:
            yield folder
        finally:
            remove(folder)


def _put_in_place(folder: Path, output: Path) -> None:
    """Give the finished directory its name."""
    (folder / LOCK).unlink(missing_ok=True)
    old = output.with_name(f".{output.name}.merge.old")
    remove(old)
    if output.exists():
        os.rename(output, old)
    os.rename(folder, output)
    remove(old)


# --- the command --------------------------------------------------------------------------------------------


def _described(config: MergeConfig, rule: Rule, directories: Sequence[str]) -> str:
    own = [f"{name} {getattr(rule, name)}" for name in KINDS[rule.method].options]
    weights = (
        [] if rule.method == "slerp" else ["weights " + ", ".join(f"{share:g}" for share in rule.shares)]
    )
    return f"merging: {rule.method} of {len(directories)} models ({'; '.join([*weights, *own])}), base {config.base}"


_GROUPS = {
    "models": ("base", "models", "output", "trust_remote_code", "overwrite"),
    "merge": ("method", "density", "t", "seed"),
    "files": ("dtype", "max_shard_size", "progress"),
}
_EXAMPLE = (
    "fastalign merge --base base --model sft=0.5 --model dpo=0.5 --output merged --method ties --density 0.2"
)


def main(argv: list[str]) -> int:
    """0: done; 1: it broke off; 2: the user's mistake, before any work; 130: interrupted."""
    parser = Parser(
        prog="fastalign merge",
        usage="fastalign merge --base DIR --model DIR[=WEIGHT] ... --output DIR [OPTION ...]",
        description="Merge models that started from the same base: base + a combination of the differences d_i = model_i - base, tensor by "
        "tensor.\n\n"
        + "\n".join(f"  {name:<16} {kind.what}" for name, kind in KINDS.items())
        + f"\n\n  command          {_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser, MergeConfig, tuple(MergeConfig.__dataclass_fields__), _GROUPS)
    arguments = parser.parse_args(argv)

    def work() -> int:
        run(from_arguments(arguments, MergeConfig))
        return 0

    return answer("fastalign merge", work, "nothing was written")
