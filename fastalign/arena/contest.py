"""`fastalign arena`: every method of `entries.py` from the same SFT model on the same budget, judged by the gold
reward of the review task.

A cell is one method at one coefficient from one seed. It is one file, written when it is done, so that a
second call goes on where the first one ended. Everything comes from the seed: SFT model, prompts, samples,
labels, training, judgement."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fastalign.arena import review_task
from fastalign.arena.demo import prepare
from fastalign.arena.entries import Entry, Stage
from fastalign.arena.labels import FORMS, Annotator
from fastalign.arena.review_task import Sample
from fastalign.arena.settings import ArenaConfig, check_entries, stage_config
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.files import locked, replace_file, writing
from fastalign.train.models.packed import load_model, load_tokenizer
from fastalign.train.offline import train
from fastalign.train.online import train_online

SHOWN = 4  # samples of each policy that a cell keeps
REVIEWS = 4000  # of the SFT corpus


class Start(NamedTuple):
    """Where every method of a seed begins. `groups`: the SFT model's responses, several to a prompt, which
    are the data of offline methods; `judged`: what the judgement says of the SFT model, with the reward of
    every sample."""

    folder: Path  # of the SFT model
    sft: torch.nn.Module
    tokenizer: Any
    groups: list[list[Sample]]
    judged: dict[str, Any]

    def copy(self) -> torch.nn.Module:
        """The SFT model, to be trained."""
        return copy.deepcopy(self.sft).requires_grad_(True)


class Cell(NamedTuple):
    entry: Entry
    seed: int
    beta: float | None

    @property
    def name(self) -> str:
        return f"{self.entry.name}-seed{self.seed}" + ("" if self.beta is None else f"-{self.beta:g}")


def run(config: ArenaConfig) -> dict[str, Any]:
    """The contest and its report, in `config.output`: table.md, arena.png, frontier.png where there is one,
    index.html, results.json; a file per cell in cells/, the SFT models in start/. Returns what results.json
    holds.

    Raises:
        UserError: an unknown method, a directory of a run with other settings; before any work.
        TrainingError: the disk is full."""
    from fastalign.arena import report

    entries = check_entries(config)
    output = config.output_dir()
    prepare(output)
    cells = [
        Cell(entry, config.seed + i, beta)
        for i in range(config.number_of_seeds())
        for entry in entries
        for beta in entry.betas(config.full)
    ]
    with locked(output):
        _keep_settings(output, config)
        (output / "cells").mkdir(exist_ok=True)
        results, broken = [], {}
        bar = tqdm(cells, desc="arena", unit=" cells", disable=None if config.progress else True)
        starts: dict[int, Start] = {}
        for cell in bar:
            bar.set_postfix_str(cell.name)
            found = _finished(output, cell)
            if found is None:
                if cell.seed not in starts:
                    starts = {cell.seed: open_start(config, output, cell.seed)}
                try:
                    found = _keep(output, cell, run_cell(config, starts[cell.seed], cell, output))
                except TrainingError as error:
                    broken[cell.name] = str(error)
                    _say(f"{cell.name}: broke off: {error}")
                    continue
            results.append(found)
            _say(report.line(found))
        sft = {
            seed: open_start(config, output, seed).judged for seed in sorted({cell.seed for cell in cells})
        }
        return report.write(config, output, entries, results, sft, broken)


def _say(text: str) -> None:
    with tqdm.external_write_mode():
        print(text, flush=True)


# --- files --------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    with writing(str(path)):
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _keep_settings(output: Path, config: ArenaConfig) -> None:
    """Record the settings that make the numbers, or refuse a directory that was made with others."""
    path, own = output / "arena.json", config.numbers()
    if path.exists():
        try:
            kept = _read(path)["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no record of an arena; choose another --output") from None
        differing = [name for name in own if kept.get(name) != own[name]]
        if differing:
            what = ", ".join(f"{config.flag(n)} was {kept.get(n)}, is {own[n]}" for n in differing)
            raise UserError(f"{output} holds an arena with other settings: {what}; choose another --output")
    else:
        _write(path, {"settings": own})


def _definition(cell: Cell) -> Any:
    """What the numbers of a cell come from, as it stands in its file."""
    return json.loads(json.dumps([dataclasses.asdict(stage) for stage in cell.entry.stages]))


def _finished(output: Path, cell: Cell) -> dict[str, Any] | None:
    """The cell's result from an earlier call; none where the method has been defined in another way since."""
    path = output / "cells" / f"{cell.name}.json"
    try:
        found = _read(path) if path.exists() else None
    except ValueError:
        raise UserError(f"{path} is damaged; remove it, and the cell is run again") from None
    return found if found and found.get("definition") == _definition(cell) else None


def _keep(output: Path, cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    result = {"entry": cell.entry.name, "seed": cell.seed, "beta": cell.beta, **result}
    result["definition"] = _definition(cell)
    _write(output / "cells" / f"{cell.name}.json", result)
    return result


# --- the start ----------------------------------------------------------------------------------------------


def seeds(seed: int) -> list[int]:
    """One for each use of chance: weights, reviews, order; prompts and responses to learn from; prompts and
    responses of the judgement; prompts of online methods."""
    return [1000 * seed + i for i in range(8)]


def open_start(config: ArenaConfig, output: Path, seed: int) -> Start:
    """The SFT model of this seed with its responses and judgement: from its files, or made and kept."""
    folder, record = output / "start" / f"seed-{seed}", output / "start" / f"seed-{seed}.json"
    if not record.exists():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _make_start(config, seed, folder, record)
    tokenizer, sft = load_tokenizer(str(folder)), load_model(str(folder)).requires_grad_(False)
    kept = _read(record)
    groups = [[Sample(*sample) for sample in group] for group in kept["groups"]]
    return Start(folder, sft, tokenizer, groups, kept["judged"])


def _make_start(config: ArenaConfig, seed: int, folder: Path, record: Path) -> None:
    weights, reviews, order, prompts, samples, *_ = seeds(seed)
    tokenizer = review_task.make_tokenizer()
    model = review_task.make_model(
        tokenizer, weights, hidden=config.hidden, layers=config.layers, heads=config.heads
    )
    losses = review_task.train_sft(
        model, tokenizer, review_task.make_reviews(REVIEWS, reviews), steps=config.sft_steps, seed=order
    )
    with writing(str(folder)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    asked = review_task.make_prompts(config.responses() // config.per_prompt, prompts)
    groups = sample_groups(model, tokenizer, asked, config.per_prompt, samples)
    judged = judge(model, model, tokenizer, config.judged, seed)
    _write(record, {"sft_loss": losses[-1], "judged": judged, "groups": groups})


def sample_groups(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[str], per_prompt: int, seed: int
) -> list[list[Sample]]:
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    samples = review_task.generate(model, tokenizer, repeated, seed=seed)
    return [samples[i : i + per_prompt] for i in range(0, len(samples), per_prompt)]


# --- a cell -------------------------------------------------------------------------------------------------


def run_cell(config: ArenaConfig, start: Start, cell: Cell, output: Path) -> dict[str, Any]:
    """Train the method from the SFT model, and judge what came out."""
    annotator = Annotator(config.label_noise, f"{cell.seed}/labels", start.judged["rewards"])
    policy, given, learnt, began = start.copy(), {}, 0, 0.0
    seconds = -time.perf_counter()
    with tempfile.TemporaryDirectory(dir=output, prefix=".cell-") as folder:
        for index, stage in enumerate(cell.entry.stages):
            if stage.from_sft and not stage.gives:
                policy = start.copy()
            work = Path(folder) / f"stage-{index}"
            groups = _groups(config, start, stage, policy, began, cell.seed)
            learnt += run_stage(config, start, cell, stage, policy, groups, annotator, work, given)
            given = {stage.gives: str(work)} if stage.gives else {}
            began += stage.share
    seconds += time.perf_counter()
    judged = judge(policy, start.sft, start.tokenizer, config.judged, cell.seed)
    versus = against(judged.pop("rewards"), start.judged["rewards"])
    return {**judged, **versus, "labels": annotator.answers, "examples": learnt, "seconds": seconds}


def _groups(
    config: ArenaConfig, start: Start, stage: Stage, policy: torch.nn.Module, began: float, seed: int
) -> list[list[Sample]]:
    """The responses of an offline stage: its share of the SFT model's, or, to the same prompts, the
    policy's."""
    if stage.online:
        return []
    count = len(start.groups)
    part = start.groups[round(count * began) : round(count * (began + stage.share))] or start.groups
    if not stage.fresh:
        return part
    prompts = [start.tokenizer.decode(group[0].prompt) for group in part]
    return sample_groups(policy, start.tokenizer, prompts, config.per_prompt, seeds(seed)[4] + 500)


def run_stage(
    config: ArenaConfig, start: Start, cell: Cell, stage: Stage, policy: torch.nn.Module,
    groups: list[list[Sample]], annotator: Annotator, work: Path, given: dict[str, str],
) -> int:  # fmt: skip
    """Train the policy in place, or into `work` what the stage gives instead; how many examples the data
    have (of online methods: prompts)."""
    settings = stage_config(config, stage, cell.beta, cell.seed, str(work), str(start.folder), given)
    with _quiet():
        if stage.online:
            prompts = [
                {"prompt": p} for p in review_task.make_prompts(config.responses(), seeds(cell.seed)[7])
            ]
            reward = None if "reward_model" in given else annotator.reward
            texts = None
            if settings.ptx_coef:
                corpus = review_task.make_reviews(config.responses(), seeds(cell.seed)[1])
                texts = [prompt + completion for prompt, completion in corpus]
            train_online(stage.method, settings, model=policy, tokenizer=start.tokenizer, reward=reward,
                         prompts=prompts, texts=texts)  # fmt: skip
            return len(prompts)
        examples = FORMS[stage.data][0](groups, annotator)
        if not examples:
            raise UserError(
                f"{cell.entry.name}: the samples give no {FORMS[stage.data][1]} (--steps or --responses too few)"
            )
        model = policy
        if stage.gives:  # a reward model is read from the SFT model's files
            model = None if settings.model else start.copy()
        train(stage.method, settings, model=model, tokenizer=start.tokenizer, examples=examples)
        return len(examples)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The trainer's own lines would drown the arena's."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# --- judgement ----------------------------------------------------------------------------------------------


def judge(
    policy: torch.nn.Module, sft: torch.nn.Module, tokenizer: Any, count: int, seed: int
) -> dict[str, Any]:
    """Fresh samples of the policy for the prompts of the judgement, the same for every method: means with
    their standard errors over the samples. KL(policy || SFT) in nats per sequence, estimated by k1 and k3 on
    these samples; length in tokens; `finished`: the share that end by themselves."""
    prompts, samples_seed = review_task.make_prompts(count, seeds(seed)[5]), seeds(seed)[6]
    samples = review_task.generate(policy, tokenizer, prompts, seed=samples_seed)
    rewards = [review_task.gold_reward(sample.text) for sample in samples]
    found: dict[str, Any] = {}
    kl = review_task.sequence_kl(policy, sft, samples)
    lengths = [float(len(sample.completion)) for sample in samples]
    columns = {"gold_reward": rewards, "kl_k1": kl["k1"], "kl_k3": kl["k3"], "length": lengths}
    for name, values in columns.items():
        found[name], found[f"{name}_se"] = mean_and_error(values)
    found["finished"] = statistics.fmean(s.completion[-1] == tokenizer.eos_token_id for s in samples)
    found["samples"] = [
        {"prompt": prompt, "text": sample.text, "gold_reward": reward}
        for prompt, sample, reward in list(zip(prompts, samples, rewards))[:SHOWN]
    ]
    return {**found, "rewards": rewards}


def against(rewards: Sequence[float], sft: Sequence[float]) -> dict[str, float]:
    """A policy's rewards against the SFT model's for the same prompts: mean gain, and win rate, in which a
    tie is half a win."""
    gain, gain_se = mean_and_error([a - b for a, b in zip(rewards, sft)])
    won, won_se = mean_and_error([(a > b) + 0.5 * (a == b) for a, b in zip(rewards, sft)])
    return {"gain": gain, "gain_se": gain_se, "win_rate": won, "win_rate_se": won_se}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is 0."""
    values = [float(x) for x in values]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error
