"""`fastalign arena`: every method of `entries.py` from the same SFT model on the same budget, judged by the gold
reward of the review task.

A cell is one method at one coefficient from one seed. It is one file, written when it is done, so that a
second call goes on where the first one ended. Several run side by side, each on one thread, which changes no
number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastalign.arena import records, report
from fastalign.arena.cell import make_start, open_start, run_cell
from fastalign.arena.demo import prepare
from fastalign.arena.entries import Cell
from fastalign.arena.settings import ArenaConfig, check_entries
from fastalign.arena.workers import cores, each
from fastalign.train.files import locked, remove

WORK = ".work"  # of cells that run; what an interruption leaves there goes at the next call


def run(config: ArenaConfig) -> dict[str, Any]:
    """The contest and its report, in `config.output`: table.md, arena.png, frontier.png where there is one,
    index.html, results.json; a file per cell in cells/, the SFT models in start/. Returns what results.json
    holds.

    Raises:
        UserError: an unknown method, a directory of a run with other settings; before any work.
        TrainingError: the disk is full, or a worker was killed."""
    entries = check_entries(config)
    output = config.output_dir()
    prepare(output)
    seeds = [config.seed + i for i in range(config.number_of_seeds())]
    cells = [
        Cell(entry, seed, beta) for seed in seeds for entry in entries for beta in entry.betas(config.full)
    ]
    with locked(output):
        records.keep_settings(output, config)
        remove(output / WORK)
        (output / records.CELLS).mkdir(exist_ok=True)
        found = {cell.name: records.finished(output, cell) for cell in cells}
        results = {name: result for name, result in found.items() if result is not None}
        for name in results:
            _say(report.line(results[name]))
        waiting = sorted((cell for cell in cells if cell.name not in results), key=_turn)
        workers = config.workers or cores()
        for _, _, error in each(make_start, seeds, workers, config, output):
            if error is not None:
                raise error
        broken = {}
        bar = tqdm(total=len(waiting), desc="arena", unit=" cells", disable=None if config.progress else True)
        with bar:
            for cell, result, error in each(work, waiting, workers, config, output):
                if error is not None:
                    broken[cell.name] = str(error)
                    _say(f"{cell.name}: broke off: {error}")
                else:
                    results[cell.name] = result
                    _say(report.line(result))
                bar.update()
        remove(output / WORK)
        own = [results[cell.name] for cell in cells if cell.name in results]
        sft = {seed: open_start(output, seed).judged for seed in seeds}
        return report.write(config, output, entries, own, sft, broken)


def _turn(cell: Cell) -> tuple[bool, int, bool]:
    """Every method at its own coefficient before the frontiers; of a seed the longest first."""
    return cell.beta != cell.entry.beta, cell.seed, not any(stage.online for stage in cell.entry.stages)


def work(config: ArenaConfig, output: Path, cell: Cell) -> dict[str, Any]:
    """Run a cell and write down what it came to."""
    return records.keep(
        output, cell, run_cell(config, open_start(output, cell.seed), cell, output / WORK / cell.name)
    )


def _say(text: str) -> None:
    with tqdm.external_write_mode():
        print(text, flush=True)
