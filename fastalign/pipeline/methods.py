"""`fastalign methods`: every method by its name; with a name, its formula, its defaults, what it needs and the
recipe that `fastalign run` carries out."""

from __future__ import annotations

from fastalign import losses
from fastalign.cli.console import Parser
from fastalign.losses import policy as policy_losses
from fastalign.pipeline.inputs import INPUTS
from fastalign.pipeline.recipe import Recipe, read, shipped
from fastalign.train.methods import METHODS


def main(argv: list[str]) -> int:
    """0: printed; 2: an unknown name."""
    parser = Parser(
        prog="fastalign methods", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="show this one, with a recipe that runs as printed"
    )
    name = parser.parse_args(argv).name
    if name is None:
        print(listing())
    elif name not in shipped():
        parser.error(f"{name!r} is unknown; legal: {', '.join(shipped())}")
    else:
        print(page(name))
    return 0


def everything() -> dict[str, Recipe]:
    """The recipes that ship, by name, family by family."""
    recipes = {name: read(path) for name, path in shipped().items()}
    families = list(dict.fromkeys(_FAMILIES + tuple(recipe.family for recipe in recipes.values())))
    return dict(sorted(recipes.items(), key=lambda item: families.index(item[1].family)))


# The order in which a reader meets them.
_FAMILIES = (
    "RLHF", "RLAIF", "pairs", "online pairs", "token level", "length control", "without a reference",
    "binary feedback", "lists and stages", "merged with SFT",
)  # fmt: skip


def command(name: str, recipe: Recipe) -> str:
    """A command line that runs as it stands, given the inputs under these names."""
    inputs = " ".join(f"--set {each}={_given(each)}" for each in recipe.inputs if each not in recipe.values)
    return f"fastalign run {name} {inputs} --output out-{name}"


def _given(name: str) -> str:
    known = INPUTS.get(name)
    if known is None or known.kind == "word":
        return "module:function" if name == "reward" else "VALUE"
    return name if known.kind == "model" else f"{name}.jsonl"


def listing() -> str:
    lines, recipes = [], everything()
    width = max(map(len, recipes))
    for family in dict.fromkeys(recipe.family for recipe in recipes.values()):
        own = {name: recipe for name, recipe in recipes.items() if recipe.family == family}
        lines += [f"{family}:", *(f"  {n:<{width}}  {r.title}: {r.about}" for n, r in own.items()), ""]
    return "\n".join([*lines, "fastalign methods NAME: formula, defaults, data and the recipe"])


def markdown() -> str:
    """The table of docs/methods.md."""
    lines = ["| method | is | paper | needs |", "|---|---|---|---|"]
    for name, recipe in everything().items():
        needs = ", ".join(f"`{each}`" for each in recipe.inputs)
        lines.append(f"| `{name}` | {recipe.title}: {recipe.about} | {recipe.paper} | {needs} |")
    return "\n".join(lines)


def page(name: str) -> str:
    recipe = read(shipped()[name])
    lines = [f"{name}: {recipe.title}", f"  {recipe.about}", ""]
    formula, defaults = formula_of(recipe.formula)
    lines += [
        f"formula   {formula}",
        *([f"defaults  {defaults}"] if defaults else []),
        f"paper     {recipe.paper}",
        "",
    ]
    lines.append("inputs:")
    for each, about in recipe.inputs.items():
        value = f" (default: {recipe.values[each]})" if each in recipe.values else ""
        known = INPUTS.get(each)
        example = f"; a line: {known.example}" if known and known.example else ""
        lines.append(f"  {each}: {about}{value}{example}")
    lines += ["", "run:", f"  {command(name, recipe)}", "", f"recipe ({recipe.path.name}):", ""]
    return "\n".join(lines) + "\n" + recipe.path.read_text(encoding="utf-8").rstrip()


def formula_of(name: str) -> tuple[str, str]:
    """(formula, options with their defaults) of a loss, or of a method of training."""
    own = losses.ALIASES.get(name, name)
    for rows in (losses.PRESETS, losses.LISTWISE, policy_losses.PRESETS):
        if own in rows:
            preset = rows[own]
            values = preset.own_options()
            if "beta" in preset.PARTS and "beta" not in values:
                values = {"beta": preset.beta, **values}
            return preset.formula, ", ".join(f"{key}={value}" for key, value in values.items())
    if own in losses.UNPAIRED:
        return losses.UNPAIRED[own].formula, ""
    row = METHODS[name]
    return row.page.formula, ", ".join(f"{key}={value}" for key, value in row.defaults.items())
