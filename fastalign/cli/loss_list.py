"""`fastalign losses`: every named loss with its formula and paper; with a name, all about that one."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastalign import losses
from fastalign.cli.console import Parser
from fastalign.losses import policy as policy_losses

NOTATION = (
    "sp = softplus, sg = sigmoid, D = log pi - log ref of a response, c / r = chosen / rejected, A = log pi "
    "alone, L = length, h = beta (D_c - D_r); "
    "docs/losses.md and docs/policy_losses.md have every column"
)


def main(argv: list[str]) -> int:
    """0: printed; 2: an unknown name."""
    parser = Parser(prog="fastalign losses", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False)
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="show this one: formula, options with their defaults, paper, how to train with it",
    )
    name = parser.parse_args(argv).name
    if name is None:
        print("\n\n".join([*map(_section, _KINDS), NOTATION]))
        return 0
    found = [kind for kind in _KINDS if losses.ALIASES.get(name, name) in kind.rows()]
    if not found:
        parser.error(
            f"{name!r} is unknown; legal: "
            f"{', '.join(sorted({n for kind in _KINDS for n in kind.rows()} | set(losses.ALIASES)))}"
        )
    print("\n\n".join(_one(kind, losses.ALIASES.get(name, name)) for kind in found) + f"\n\n{NOTATION}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Kind:
    title: str
    function: str
    command: str
    rows: Any  # () -> name -> (formula, paper, preset or None)


def _of_presets(presets: Any) -> Any:
    return lambda: {name: (p.formula, p.paper, p) for name, p in presets.items()}


_KINDS = (
    _Kind("of pairs", "fastalign.preference_loss", "fastalign train dpo --loss", _of_presets(losses.PRESETS)),
    _Kind(
        "of single responses", "fastalign.unpaired_loss", "fastalign train kto|bco|dro --loss",
        lambda: {name: (row.formula, row.paper, None) for name, row in losses.UNPAIRED.items()},
    ),
    _Kind("of ranked lists", "fastalign.listwise_loss", "fastalign train listwise --loss", _of_presets(losses.LISTWISE)),
    _Kind("of policy gradients", "fastalign.policy_loss", "fastalign train ppo|grpo|rloo|reinforce_pp --loss", _of_presets(policy_losses.PRESETS)),
)  # fmt: skip


def _section(kind: _Kind) -> str:
    rows = kind.rows()
    width = max(map(len, rows))
    lines = [
        f"  {name:<{width}}  {formula}{f'  [{paper}]' if paper else ''}"
        for name, (formula, paper, _) in rows.items()
    ]
    return "\n".join([f"losses {kind.title} ({kind.function}; {kind.command} NAME):", *lines])


def _one(kind: _Kind, name: str) -> str:
    formula, paper, preset = kind.rows()[name]
    lines = [f"{name}, a loss {kind.title}", f"  formula  {formula}"]
    lines += [f"  paper    {paper}"] if paper else []
    lines += [f"  loop     {losses.LOOPS[name]}"] if name in losses.LOOPS else []
    lines += [f"  options  {_options(preset)}"] if preset is not None else []
    method = losses.UNPAIRED[name].method if name in losses.UNPAIRED else ""
    command = kind.command.replace("kto|bco|dro", method).replace("ppo|grpo|rloo|reinforce_pp", "grpo")
    return "\n".join(
        [*lines, f"  python   {kind.function}(..., loss={name!r})", f"  command  {command} {name} ..."]
    )


def _options(preset: Any) -> str:
    """The preset's own options and the fields in which it differs from the class's defaults, each with its
    value."""
    default = type(preset)()
    own, renamed = preset.own_options(), preset.options.values()
    chosen = [
        f
        for f in preset.PARTS
        if f not in renamed and (f == "beta" or getattr(preset, f) != getattr(default, f))
    ]
    values = own | {f: getattr(preset, f) for f in chosen if f not in own}
    return ", ".join(option if value is None else f"{option}={value}" for option, value in values.items())
