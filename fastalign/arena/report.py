"""The arena's report: what the cells say of each method, as a table, a page and JSON. No number is made here
but means over seeds, their errors and the verdict."""

from __future__ import annotations

import base64
import html
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalign import losses
from fastalign.arena import picture
from fastalign.arena.cell import mean_and_error
from fastalign.arena.demos.common import GOLD_REWARD, machine
from fastalign.arena.entries import ENTRIES, FAMILIES, Entry, Stage
from fastalign.arena.labels import FORMS
from fastalign.arena.settings import ArenaConfig
from fastalign.cli.console import table
from fastalign.cli.loss_list import NOTATION
from fastalign.losses import policy as policy_losses
from fastalign.pipeline.recipe import read, shipped
from fastalign.train.files import replace_file, writing
from fastalign.train.methods import METHODS

ERRORS = 2.0  # a gain counts if it exceeds so many of its standard errors
# Method of `fastalign train` -> the table of its losses; of the others: policy gradients.
_TABLES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("dpo", "tdpo", "online_dpo"), losses.PRESETS),
    **dict.fromkeys(("kto", "bco", "dro"), losses.UNPAIRED),
    "listwise": losses.LISTWISE,
    "reward": {},
}
_MEANS = (
    "gold_reward",
    "kl_k1",
    "kl_k3",
    "length",
    "win_rate",
    "seconds",
    "core_seconds",
    "finished",
    "labels",
    "examples",
)
YES, SMALL, FAR, BROKEN = "raises it", "does not", "KL beyond the bound", "broke off"


def line(cell: Mapping[str, Any]) -> str:
    """A finished cell in one line."""
    beta = "" if cell["beta"] is None else f", {cell['beta']:g}"
    return (
        f"{cell['entry']} (seed {cell['seed']}{beta}): gold reward {cell['gold_reward']:.3f} "
        f"({cell['gain']:+.3f} ± {cell['gain_se']:.3f}), KL {cell['kl_k3']:.2f} ± {cell['kl_k3_se']:.2f}, "
        f"length {cell['length']:.0f}, wins {cell['win_rate']:.2f}, {cell['core_seconds']:.0f} s"
    )


# --- numbers ------------------------------------------------------------------------------------------------


def summarise(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method at one coefficient over its seeds: means; errors over the seeds, of a single seed those over
    its samples."""
    found: dict[str, Any] = {"seeds": sorted(cell["seed"] for cell in cells)}
    for name in _MEANS:
        found[name] = statistics.fmean(cell[name] for cell in cells)
    for name in ("gold_reward", "kl_k1", "kl_k3", "gain", "length", "win_rate"):
        mean, error = mean_and_error([cell[name] for cell in cells])
        found[name], found[f"{name}_se"] = mean, error if len(cells) > 1 else cells[0][f"{name}_se"]
    return found


def verdict(row: Mapping[str, Any], kl_bound: float) -> str:
    """Whether the gold reward rose by more than `ERRORS` standard errors, within the bound on KL."""
    if not row["gain"] > ERRORS * row["gain_se"] or row["gain"] <= 0:
        return SMALL
    return YES if row["kl_k3"] <= kl_bound else FAR


def rows(
    entries: Sequence[Entry], cells: Sequence[Mapping[str, Any]], broken: Mapping[str, str], kl_bound: float
) -> list[dict[str, Any]]:
    """A row per entry at its own coefficient, the largest gain first, each with its frontier: the summaries
    of all its coefficients."""
    found = []
    for entry in entries:
        own = [cell for cell in cells if cell["entry"] == entry.name]
        betas = sorted({cell["beta"] for cell in own}, key=lambda b: (b is not None, b))
        frontier = [
            {"beta": beta, **summarise([c for c in own if c["beta"] == beta])} for beta in betas
        ]  # fmt: skip
        main = next((point for point in frontier if point["beta"] == entry.beta), None)
        failed = {name: why for name, why in broken.items() if name.startswith(f"{entry.name}-seed")}
        row = {"name": entry.name, "shown": entry.shown, "family": entry.family, "broken": failed}
        row |= {**(main or {"beta": entry.beta}), "frontier": frontier}
        row["verdict"] = verdict(row, kl_bound) if main and not failed else BROKEN
        row["expected"] = "" if row["verdict"] == YES else entry.expected
        found.append(row)
    return sorted(found, key=lambda row: -row.get("gain", float("-inf")))


def as_table(found: Sequence[Mapping[str, Any]], sft: Mapping[str, float]) -> str:
    """The table, SFT first."""
    headers = ["method", "family", "coefficient", "gold reward", "gain", "KL to SFT", "length", "wins",
        "core s", "gain > 2 s.e.?"]  # fmt: skip
    lines = [["SFT", "", "", f"{sft['gold_reward']:.3f}", "", "", f"{sft['length']:.1f}", "", "", ""]]
    for row in found:
        if "gain" not in row:
            lines.append([row["shown"], row["family"], _beta(row), *[""] * 6, _said(row)])
            continue
        lines.append(
            [
                row["shown"],
                row["family"],
                _beta(row),
                f"{row['gold_reward']:.3f}",
                f"{row['gain']:+.3f} ± {row['gain_se']:.3f}",
                f"{row['kl_k3']:.2f} ± {row['kl_k3_se']:.2f}",
                f"{row['length']:.1f}",
                f"{row['win_rate']:.2f}",
                f"{row['core_seconds']:.1f}",
                _said(row),
            ]  # fmt: skip
        )
    return table(headers, lines)


def _beta(row: Mapping[str, Any]) -> str:
    if row["beta"] is None:
        return ""
    return f"{next(stage.knob for stage in ENTRIES[row['name']].stages if stage.knob)} {row['beta']:g}"


def _said(row: Mapping[str, Any]) -> str:
    why = row["expected"] or "; ".join(row["broken"].values())
    return row["verdict"] + (f": {why}" if why else "")


def budget(config: ArenaConfig) -> str:
    """What every method had, in words."""
    return (
        f"Budget: every method has {config.responses():,} responses sampled and labelled, and its policy "
        f"takes {config.steps} optimizer "
        f"steps on {config.responses_per_step} responses each ({config.responses_per_step // 2} pairs, "
        f"{config.responses_per_step // config.per_prompt} lists of {config.per_prompt}). Offline methods "
        "have the SFT model's responses, "
        f"{config.per_prompt} to a prompt; a pair of equal rewards is a tie and is left out, so pairs come "
        "round again. Online methods sample "
        "their own, each of which is scored and learnt from once. A reward model is trained in addition. "
        f"Labels come from the gold reward and are wrong with probability {config.label_noise:g}: the worse "
        "response of a pair is called the "
        "better one, a label is turned, and a score (of lists, DRO, RSO, online methods) is that of another "
        "response of the SFT model. Soft "
        "labels are the true probability that the label is right."
    )


def how_to_read(config: ArenaConfig, cells: Sequence[Mapping[str, Any]]) -> str:
    seeds = len({cell["seed"] for cell in cells})
    spread = (
        f"over {seeds} seeds, each with an SFT model of its own"
        if seeds > 1
        else "over the samples of the one seed"
    )
    return (
        f"{GOLD_REWARD.replace(chr(10), ' ')} Gain: over the SFT model on the same prompts. KL: from the "
        "policy to the SFT model in nats per "
        "sequence, k3 on the policy's own samples. Wins: share of prompts on which the policy's sample has "
        "the higher gold reward, ties half. "
        f"Errors are standard errors {spread}. A method raises the gold reward if its gain exceeds {ERRORS:g} "
        "standard errors at a KL of at most "
        f"{config.kl_bound:g} nats."
    )


# --- what a method is ---------------------------------------------------------------------------------------


def source(stage: Stage) -> tuple[str, str, str]:
    """(formula, paper, loop around the loss) of a stage: of its loss, or, where it names none, of its
    method."""
    page, name = METHODS[stage.method].page, losses.ALIASES.get(stage.loss or "", stage.loss or "")
    row = _TABLES.get(stage.method, policy_losses.PRESETS).get(name, page)
    return row.formula, row.paper, losses.LOOPS.get(name, "")


def command(stage: Stage, beta: float | None) -> str:
    """The command line of a stage, without its paths."""
    options, settings = stage.numbers(beta)
    words = [f"fastalign train {stage.method}", *([f"--loss {stage.loss}"] if stage.loss else [])]
    words += [f"--set {name}={value:g}" for name, value in options.items()]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    return " ".join([*words, f"--learning-rate {stage.rate:g}"])


def paragraph(entry: Entry) -> str:
    """A method in one paragraph of HTML: formulas, papers, data, commands, what is particular."""
    stages, papers = [], []
    for stage in entry.stages:
        formula, paper, loop = source(stage)
        papers += [paper] if paper and paper not in papers else []
        data = "its own samples" if stage.online else FORMS[stage.data][1]
        data += " of the policy so far" if stage.fresh else ""
        part = f" {stage.share:.2g} of the budget;" if stage.share != 1 else ""
        around = f" Loop: {html.escape(loop)}." if loop else ""
        stages.append(
            f"<code>{html.escape(formula)}</code> on {html.escape(data)};{part} "
            f"<code>{html.escape(command(stage, entry.beta))}</code>.{around}"
        )
    papers = [read(shipped()[entry.recipe]).paper] if entry.recipe else papers
    numbered = stages if len(stages) == 1 else [f"({i}) {text}" for i, text in enumerate(stages, 1)]
    note = f" {html.escape(entry.note)}" if entry.note else ""
    return f"<p><b>{html.escape(entry.shown)}</b> ({html.escape('; '.join(papers))}). {' '.join(numbered)}{note}</p>"


# --- files --------------------------------------------------------------------------------------------------


def write(
    config: ArenaConfig, output: Path, entries: Sequence[Entry], cells: Sequence[Mapping[str, Any]],
    sft: Mapping[int, Mapping[str, Any]], broken: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Write table.md, the pictures, index.html and results.json; print the table. Returns what results.json
    holds."""
    found = rows(entries, cells, broken, config.kl_bound)
    base = {
        name: statistics.fmean(judged[name] for judged in sft.values()) for name in ("gold_reward", "length")
    }
    results = {
        "settings": config.numbers() | {"kl_bound": config.kl_bound},
        "machine": machine(),
        "sft": {
            str(seed): {k: v for k, v in judged.items() if k != "rewards"} for seed, judged in sft.items()
        },
        "methods": found,
        "cells": [{k: v for k, v in cell.items() if k != "definition"} for cell in cells],
        "broken": dict(broken),
    }
    words, numbers = as_table(found, base), json.dumps(results, indent=1) + "\n"
    texts = [budget(config), how_to_read(config, cells)]
    drawn = [row for row in found if "gain" in row]
    pictures = {}
    if drawn:
        pictures["arena.png"] = lambda path: picture.main(drawn, base["gold_reward"], path)
    if any(len(row["frontier"]) > 1 for row in drawn):
        pictures["frontier.png"] = lambda path: picture.frontiers(drawn, base["gold_reward"], path)
    with writing(f"the report in {output}"):
        for name, draw in pictures.items():
            replace_file(output / name, draw)
        page = as_page(found, words, texts, entries, [output / name for name in pictures])
        for name, text in {
            "table.md": "\n\n".join([words, *texts]) + "\n",
            "index.html": page,
            "results.json": numbers,
        }.items():
            replace_file(output / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    print(
        "\n"
        + "\n\n".join([words, *texts])
        + f"\n\npage: {output / 'index.html'}  numbers: {output / 'results.json'}"
    )
    return results


_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 14px } th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100%; margin: 1rem 0 }
code { background: #f4f4f4; padding: 0 .2rem } tr.no td { background: #fdf1ec }"""


def as_page(
    found: Sequence[Mapping[str, Any]], words: str, texts: Sequence[str], entries: Sequence[Entry],
    pictures: Sequence[Path]
) -> str:  # fmt: skip
    """One HTML page that needs no other file. `words`: the table, as Markdown."""
    head, _, *body = ([cell.strip() for cell in row.strip("|").split("|")] for row in words.splitlines())
    failed = {row["shown"] for row in found if row["verdict"] != YES}
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in body:
        cells = "".join(
            f'<td class="n">{html.escape(c)}</td>' if 3 <= i <= 8 else f"<td>{html.escape(c)}</td>"
            for i, c in enumerate(row)
        )
        lines.append(f"<tr{' class=no' if row[0] in failed else ''}>{cells}</tr>")
    images = [
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    ]
    sections = []
    for family, colour in FAMILIES.items():
        own = [paragraph(entry) for entry in entries if entry.family == family]
        if own:
            sections += [f'<h3 style="color: {colour}">{html.escape(family)}</h3>', *own]
    paragraphs = [f"<p>{html.escape(text)}</p>" for text in texts]
    points = _frontier_table(found)
    return "\n".join([
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8"><title>fastalign arena</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Every method on one task, from one SFT model, on one budget</h1>", *images[:1], *paragraphs,
        "<table>", *lines, "</table>",
        *(["<h2>Frontiers</h2>", *images[1:], points] if points else []),
        "<h2>The methods</h2>", f"<p>{html.escape(NOTATION)}.</p>", *sections, "</body></html>", "",
    ])  # fmt: skip


def _frontier_table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in found:
        for point in row["frontier"] if len(row["frontier"]) > 1 else ():
            numbers = (
                f"{point['beta']:g}", f"{point['gold_reward']:.3f}",
                f"{point['gain']:+.3f} ± {point['gain_se']:.3f}",
                f"{point['kl_k3']:.2f} ± {point['kl_k3_se']:.2f}",
            )  # fmt: skip
            cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
            lines.append(f"<tr><td>{html.escape(row['shown'])}</td>{cells}</tr>")
    if not lines:
        return ""
    head = "<tr><th>method</th><th>coefficient</th><th>gold reward</th><th>gain</th><th>KL to SFT</th></tr>"
    return "\n".join(["<table>", head, *lines, "</table>"])
