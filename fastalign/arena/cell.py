"""A cell of the arena: one method at one coefficient from one seed, trained from the seed's SFT model and judged.
Everything comes from the seed: SFT model, prompts, samples, labels, training, judgement."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastalign.arena import records, review_task
from fastalign.arena.entries import Cell, Stage
from fastalign.arena.labels import FORMS, Annotator, Judge, OwnJudge
from fastalign.arena.review_task import Sample
from fastalign.arena.settings import ArenaConfig, stage_config
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.files import writing
from fastalign.train.merge import merge_weights
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


# --- the start ----------------------------------------------------------------------------------------------


def seeds(seed: int) -> list[int]:
    """One for each use of chance: weights, reviews, order; prompts and responses to learn from; prompts and
    responses of the judgement; prompts of online methods."""
    return [1000 * seed + i for i in range(8)]


def _places(output: Path, seed: int) -> tuple[Path, Path]:
    """Where the SFT model of a seed lies, and the record of its responses and judgement, written last."""
    return output / "start" / f"seed-{seed}", output / "start" / f"seed-{seed}.json"


def open_start(output: Path, seed: int) -> Start:
    """The SFT model of a seed with its responses and judgement, which `make_start` has made."""
    folder, record = _places(output, seed)
    tokenizer, sft = load_tokenizer(str(folder)), load_model(str(folder)).requires_grad_(False)
    kept = records.read(record)
    groups = [[Sample(*sample) for sample in group] for group in kept["groups"]]
    return Start(folder, sft, tokenizer, groups, kept["judged"])


def make_start(config: ArenaConfig, output: Path, seed: int) -> None:
    """Train the SFT model of a seed, sample from it and judge it, if that is not done."""
    folder, record = _places(output, seed)
    if record.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights, reviews, order, prompts, samples, *_ = seeds(seed)
    tokenizer = review_task.make_tokenizer()
    model = review_task.make_model(
        tokenizer, weights, hidden=config.hidden, layers=config.layers, heads=config.heads
    )
    corpus = review_task.make_reviews(REVIEWS, reviews)
    with quiet():
        losses = review_task.train_sft(model, tokenizer, corpus, steps=config.sft_steps, seed=order)
    with writing(str(folder)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    asked = review_task.make_prompts(config.responses() // config.per_prompt, prompts)
    groups = sample_groups(model, tokenizer, asked, config.per_prompt, samples)
    judged = judge(model, model, tokenizer, config.judged, seed)
    records.write(record, {"sft_loss": losses[-1], "judged": judged, "groups": groups})


def sample_groups(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[str], per_prompt: int, seed: int
) -> list[list[Sample]]:
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    samples = review_task.generate(model, tokenizer, repeated, seed=seed)
    return [samples[i : i + per_prompt] for i in range(0, len(samples), per_prompt)]


# --- a cell -------------------------------------------------------------------------------------------------


def run_cell(config: ArenaConfig, start: Start, cell: Cell, work: Path) -> dict[str, Any]:
    """Train the method from the SFT model, and judge what came out. `work`: a directory of its own, which goes
    afterwards."""
    annotator = Annotator(config.label_noise, f"{cell.seed}/labels", start.judged["rewards"])
    policy, given, learnt, began = start.copy(), {}, 0, 0.0
    parts: list[torch.nn.Module] = []
    wall, core = -time.perf_counter(), -time.thread_time()
    for index, stage in enumerate(cell.entry.stages):
        if stage.from_sft and not stage.gives:
            policy = start.copy()
        folder = work / f"stage-{index}"
        groups = _groups(config, start, stage, policy, began, cell.seed)
        who = OwnJudge(policy, start.sft) if stage.judges_itself else annotator
        learnt += run_stage(config, start, cell, stage, policy, groups, who, folder, given)
        began += 0.0 if "reward_model" in given else stage.share  # that model's labels are counted with it
        given = {stage.gives: str(folder)} if stage.gives else {}
        parts += [policy] if cell.entry.merge else []
    if parts:
        states = [part.state_dict() for part in parts]
        policy.load_state_dict(merge_weights(start.sft.state_dict(), states, **cell.entry.merge))
    wall, core = wall + time.perf_counter(), core + time.thread_time()
    shutil.rmtree(work, ignore_errors=True)
    judged = judge(policy, start.sft, start.tokenizer, config.judged, cell.seed)
    versus = against(judged.pop("rewards"), start.judged["rewards"])
    labels = {"labels": annotator.answers, "examples": learnt}
    return {**judged, **versus, **labels, "seconds": wall, "core_seconds": core}


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
    groups: list[list[Sample]], judge: Judge, work: Path, given: dict[str, str],
) -> int:  # fmt: skip
    """Train the policy in place, or into `work` what the stage gives instead; how many examples the data
    have (of online methods: prompts)."""
    settings = stage_config(config, stage, cell.beta, cell.seed, str(work), str(start.folder), given)
    with quiet():
        if stage.online:
            prompts = [
                {"prompt": p} for p in review_task.make_prompts(config.responses(), seeds(cell.seed)[7])
            ]
            reward = None if "reward_model" in given else judge.reward
            texts = None
            if settings.ptx_coef:
                corpus = review_task.make_reviews(config.responses(), seeds(cell.seed)[1])
                texts = [prompt + completion for prompt, completion in corpus]
            train_online(stage.method, settings, model=policy, tokenizer=start.tokenizer, reward=reward,
                         prompts=prompts, texts=texts)  # fmt: skip
            return len(prompts)
        examples = make_examples(stage, settings, groups, judge, start.tokenizer)
        if not examples:
            raise UserError(
                f"{cell.entry.name}: the samples give no {FORMS[stage.data][1]} (--steps or --responses too few)"
            )
        model = policy
        if stage.gives:  # a reward model is read from the SFT model's files
            model = None if settings.model else start.copy()
        train(stage.method, settings, model=model, tokenizer=start.tokenizer, examples=examples)
        return len(examples)


def make_examples(
    stage: Stage, settings: Any, groups: Sequence[Sequence[Sample]], judge: Judge, tokenizer: Any
) -> list[TokenExample]:
    """The data of an offline stage, labelled; with the task of each example where tasks are weighted."""
    examples = FORMS[stage.data][0](groups, judge)
    if getattr(settings, "task_weights", None) is None:
        return examples
    tasks = [review_task.kind(tokenizer.decode(example.prompt)) for example in examples]
    return [
        dataclasses.replace(example, values={**example.values, "task": task})
        for example, task in zip(examples, tasks)
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
