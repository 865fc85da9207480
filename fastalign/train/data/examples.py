"""The examples of a run: read, tokenised, split into training and evaluation, ordered, and grouped into
packs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch

import fastalign
from fastalign.train.config import RunConfig
from fastalign.train.data.formats import Format, read_jsonl
from fastalign.train.data.tokenise import TokenExample, tokenise
from fastalign.train.errors import UserError


class Batch(NamedTuple):
    """One forward pass: which examples of the split, and their sequences packed example by example (a pair:
    chosen, rejected)."""

    members: list[int]
    packed: Any


def load_examples(
    config: RunConfig,
    form: Format,
    tokenizer: Any,
    positions: int | None,
    examples: Iterable[Any] | None = None,
    eval_examples: Iterable[Any] | None = None,
    *,
    stops: Collection[int] = (),
) -> tuple[list[TokenExample], list[TokenExample]]:
    """(training examples, evaluation examples). `examples` and `eval_examples` stand in for the files; what
    was cut or dropped is printed. `stops`: see `ExampleTokenizer`."""
    if positions is not None and (config.max_length or 0) > positions:
        raise UserError(f"--max-length {config.max_length} exceeds the model's {positions} positions")

    def load(name: str, path: str | None, rows: Iterable[Any] | None) -> list[TokenExample]:
        if rows is not None and path is not None:
            raise UserError(f"the {name} examples are given both in memory and as the file {path}")
        source = "in memory" if rows is not None else path
        if source is None:
            raise UserError("--data is missing: it names the file with the training data")
        numbered = (
            read_jsonl(path) if rows is None else ((f"{name} example {i}", row) for i, row in enumerate(rows))
        )
        kept, report = tokenise(
            numbered,
            tokenizer,
            form,
            budget=config.tokens_per_batch,
            max_length=config.max_length or positions,
            overlong=config.overlong,
            progress=config.progress,
            stops=stops,
            template_options=config.template_options,
        )
        if not kept:
            raise UserError(
                f"no {form.noun} to train on: {source} is empty"
                if not report.dropped
                else f"no {form.noun} to train on: all {report.dropped} in {source} are over-long"
            )
        print(f"{name} data: {report} ({source})")
        for remark in report.remarks if name == "training" else ():
            print(remark)
        return kept

    train = load("training", config.data, examples)
    if eval_examples is not None or config.eval_data is not None:
        return train, load("evaluation", config.eval_data, eval_examples)
    return hold_out(config, train, form.noun)


def hold_out(
    config: RunConfig, examples: list[TokenExample], noun: str
) -> tuple[list[TokenExample], list[TokenExample]]:
    """(training, evaluation) examples by --eval-fraction, drawn from the seed."""
    if config.eval_every and not config.eval_fraction:
        raise UserError("--eval-every needs --eval-data or --eval-fraction")
    held_out = round(len(examples) * config.eval_fraction)
    if config.eval_fraction and not 0 < held_out < len(examples):
        raise UserError(
            f"--eval-fraction {config.eval_fraction} of {len(examples)} {noun}s leaves {held_out} for "
            "evaluation "
            f"and {len(examples) - held_out} for training"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return [examples[i] for i in sorted(order[held_out:])], [examples[i] for i in sorted(order[:held_out])]


class Schedule:
    """Which examples each optimizer step sees. A function of the step alone, so that a resumed run needs no
    other state."""

    def __init__(self, examples: int, config: RunConfig):
        self.examples, self.batch_size, self.seed = examples, config.batch_size, config.seed
        self.steps_per_epoch = math.ceil(examples / config.batch_size)
        self.steps = config.max_steps or config.epochs * self.steps_per_epoch
        self._epoch, self._order = -1, []

    def indices(self, step: int) -> list[int]:
        """The examples of step 0, 1, ...: a fresh permutation in every epoch, the last step of an epoch takes
        what is left."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.examples, generator=generator).tolist()
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]


def pack_examples(examples: Sequence[TokenExample], indices: Iterable[int], budget: int) -> list[Batch]:
    """Group the examples into as few packs of at most `budget` tokens as first-fit decreasing finds. An
    example is never split."""
    groups: list[tuple[int, list[int]]] = []  # (tokens used, examples)
    for i in sorted(indices, key=lambda i: (-examples[i].tokens(), i)):
        tokens = examples[i].tokens()
        place = next((g for g, (used, _) in enumerate(groups) if used + tokens <= budget), None)
        if place is None:
            groups.append((tokens, [i]))
        else:
            groups[place] = (groups[place][0] + tokens, groups[place][1] + [i])
    return [Batch(members, _pack([examples[i] for i in members])) for _, members in groups]


def _pack(examples: list[TokenExample]) -> fastalign.PackedBatch:
    """Every completion after its prompt, end to end; the completions' tokens are scored, or those of them that
    the example names."""
    sequences = [(example.prompt, completion) for example in examples for completion in example.completions]
    scored = [mask for example in examples for mask in example.masks()]
    masks = [[False] * len(prompt) + mask for (prompt, _), mask in zip(sequences, scored)]
    return fastalign.pack([torch.cat(parts) for parts in sequences], masks=masks)


def fingerprint(*splits: Iterable[TokenExample]) -> str:
    """Hash of token ids, boundaries and numbers: any change of data, tokenizer, template, truncation or of
    the split changes it."""
    digest = hashlib.blake2b(digest_size=16)
    for i, examples in enumerate(splits):
        digest.update(b"split" * (i > 0))
        for example in examples:
            for part in (example.prompt, *example.completions):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part.numpy().tobytes())
            for mask in example.scored or ():
                digest.update(b"scored")
                digest.update(mask.numpy().tobytes())
            digest.update(repr(sorted(example.values.items())).encode())
    return digest.hexdigest()
