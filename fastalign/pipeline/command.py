"""`fastalign run RECIPE`: a recipe's stages, one after the other, on the user's model and data."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastalign.cli.console import Parser, integer
from fastalign.pipeline import plan as plans
from fastalign.pipeline import recipe as recipes
from fastalign.train.program import answer
from fastalign.train.settings import MAX_SEED


def main(argv: list[str]) -> int:
    """0: done; 1: a stage broke off; 2: the user's mistake, before any work; 130: interrupted."""
    parser = Parser(prog="fastalign run", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False)
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a YAML file (docs/recipes.md), or the name of one that ships: fastalign methods",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="directory that receives every stage")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[],
        help="an input of the recipe (model=DIR), or a stage's setting (dpo.learning_rate=1e-6, "
        "defaults.batch_size=8); repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=integer(0, MAX_SEED), help="seed of everything (default: the recipe's, or 0)"
    )
    parser.add_argument(
        "--skip", metavar="STAGE", action="append", default=[],
        help="leave out a stage that trains the policy, for example sft where the model has had it (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="go on where the run in --output was broken off"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the earlier run in --output, and begin again"
    )
    parser.add_argument("--check", action="store_true", help="check recipe, inputs and data, and run nothing")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    return answer("fastalign run", lambda: _run(arguments), "--resume goes on")


def _run(arguments: argparse.Namespace) -> int:
    recipe = recipes.read(recipes.find(arguments.recipe))
    inputs, settings = plans.read_settings(arguments.set, recipe)
    seed = recipe.seed if arguments.seed is None else arguments.seed
    output = Path(arguments.output).expanduser().resolve()
    plan = plans.Plan(recipe, output, inputs, settings, seed, frozenset(arguments.skip))
    if arguments.check:
        plans.check(plan)
        print(f"{recipe.title or recipe.path.stem}: {len(recipe.stages)} stages, nothing wrong")
        return 0
    from fastalign.pipeline.run import run

    options = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    done = run(plan, progress=not arguments.no_progress, **options)
    print("\n".join(_line(stage) for stage in done))
    print(f"log: {output / 'metrics.jsonl'}  picture: {output / 'run.png'}")
    return 0


def _line(stage: dict) -> str:
    if "skipped" in stage:
        return f"{stage['label']}: {stage['skipped']}"
    metrics = stage["metrics"]
    shown = metrics.get("made") or ", ".join(
        f"{name} {metrics[name]:.4g}"
        for name in ("loss", "rewards/accuracies", "objective/scores", "objective/kl", "mean_token_accuracy")
        if name in metrics
    )
    return f"{stage['label']}: {stage['seconds']:.0f} s, {shown}"
