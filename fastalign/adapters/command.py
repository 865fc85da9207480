"""`fastalign adapters`: which trainers are installed, in which version, and what ours would take the place of."""

from __future__ import annotations

from fastalign import adapters
from fastalign.adapters.common import Adapter
from fastalign.cli.console import Parser


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="fastalign adapters", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False
    )
    legal = ", ".join(adapters.NAMES)
    parser.add_argument(
        "trainer", nargs="*", metavar="TRAINER", help=f"only these; default: all; legal: {legal}"
    )
    chosen = parser.parse_args(argv).trainer
    for name in chosen:
        if name not in adapters.NAMES:
            parser.error(f"there is no adapter for {name!r}; legal: {legal}")
    for name in chosen or adapters.NAMES:
        print("\n".join(describe(adapters.adapter(name))))
    return 0


def describe(adapter: Adapter) -> list[str]:
    """A trainer in a few lines."""
    version = adapter.installed()
    if version is None:
        state = "not installed"
    else:
        state = f"{version} installed" + ("" if adapter.tested(version) else ", not tested")
    tested = f"{adapter.distribution} {adapter.versions}" if adapter.versions else "its signatures"
    lines = [f"{adapter.trainer}: {state}; tested: {tested}"]
    lines += [
        f"  {seam.where.replace(':', '.')} <- {seam.by.replace(':', '.')}: {seam.changes}"
        for seam in adapter.seams
    ]
    return [*lines, *(f"  {text}" for text in adapter.registers)]
