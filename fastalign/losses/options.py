"""From a name and options to a preset, and the tables of the named ones: one way for pairs, lists and policy
gradients (`fastalign.losses.policy`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastalign.losses.fields import Kind, LossPreset
from fastalign.losses.list import ListPreset
from fastalign.losses.pair import Preset
from fastalign.losses.tables import ALIASES, LISTWISE, LOOPS, PRESETS, TRL_FORMS, UNPAIRED
from fastalign.runtime import memo


def get(name: str) -> Preset:
    """The preset of this name (ours, or TRL's where the meaning is the same); an unknown name raises and
    lists the legal ones."""
    found = PRESETS.get(ALIASES.get(name, name))
    if found is None:
        if name in LISTWISE:
            raise ValueError(
                f"loss={name!r} ranks lists: fastalign.listwise_loss takes it, 'fastalign train listwise' "
                "trains with it"
            )
        if name in UNPAIRED:
            raise ValueError(
                f"loss={name!r} is of single responses: fastalign.unpaired_loss takes it, 'fastalign train "
                f"{UNPAIRED[name].method}' trains with it"
            )
        raise ValueError(f"loss={name!r} is unknown; legal: {', '.join(available().names())}")
    return found


def get_listwise(name: str) -> ListPreset:
    """The listwise preset of this name; an unknown name raises and lists the legal ones."""
    if name not in LISTWISE:
        raise ValueError(f"loss={name!r} is unknown here; legal for lists: {', '.join(LISTWISE)}")
    return LISTWISE[name]


def resolver(get: Callable[[str], Kind], kind: type[Kind], rows: Mapping[str, Kind]) -> Callable[..., Any]:
    """(name or preset, options) -> (the preset that they give, the options that are tensors)."""

    @memo.by_options
    def resolve(loss: str | Kind, options: Mapping[str, Any]) -> tuple[Kind, dict[str, Tensor]]:
        preset = get(loss) if isinstance(loss, str) else loss
        if not isinstance(preset, kind):
            raise TypeError(
                f"loss must be a name or a {kind.__name__}, got {type(loss).__name__}; names: "
                f"{', '.join(rows)}"
            )
        return preset.with_options(options)

    return resolve


resolve = resolver(get, Preset, PRESETS)
resolve_listwise = resolver(get_listwise, ListPreset, LISTWISE)


class Table(tuple):
    """Presets as rows; printing it shows the table. `columns`: title -> text of a preset's cell."""

    columns: Mapping[str, Callable[[Any], str]]

    def names(self) -> list[str]:
        return [p.name for p in self]

    def __contains__(self, name: object) -> bool:
        return name in self.names() or tuple.__contains__(self, name)

    def __str__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """One row per loss, the columns' titles above."""
        rows = [list(self.columns), *([cell(p) for cell in self.columns.values()] for p in self)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(self.columns), *lines[1:]])


def _name(p: LossPreset) -> str:
    return p.name


def _formula(p: LossPreset) -> str:
    return f"`{p.formula}`" + (
        f", that of dpo; the method is the loop: {LOOPS[p.name]}" if p.name in LOOPS else ""
    )


def _over_tokens(p: Preset | ListPreset) -> str:
    return {0.0: "sum", 1.0: "mean"}.get(p.length_norm, f"sum / L^{p.length_norm:g}")


def _beta(p: Preset | ListPreset) -> str:
    return f"{p.beta:g}"


def _paper(p: LossPreset) -> str:
    return p.paper


def _own(field: str) -> Callable[[LossPreset], str]:
    """The method's own options, and this field where the loss uses it."""
    return lambda p: ", ".join(
        [*p.own_options(), *(f for f in (field,) if getattr(p, f) and f not in p.options)]
    )


class LossTable(Table):
    """The losses of pairs: name, formula, reduction over tokens, what beta is, reference needed, options,
    TRL's name, paper."""

    columns = {
        "loss": _name, "formula per pair": _formula, "over tokens": _over_tokens, "beta": _beta,
        "reference": lambda p: "yes" if p.needs_reference else "no", "own options": _own("label_smoothing"),
        "TRL": lambda p: p.trl or TRL_FORMS.get(p.name, "none"), "paper": _paper,
    }  # fmt: skip

    def names(self) -> list[str]:
        return super().names() + list(ALIASES)


class ListLossTable(Table):
    """The listwise losses: name, formula, reduction over tokens, what beta is, reference needed, options,
    paper."""

    columns = {
        "loss": _name, "formula per list": _formula, "over tokens": _over_tokens, "beta": _beta,
        "reference": lambda p: "yes" if p.reference else "no", "own options": _own("sft_weight"), "paper": _paper,
    }  # fmt: skip


def available() -> LossTable:
    """Every named loss of pairs, one Preset per row."""
    return LossTable(PRESETS.values())


def available_listwise() -> ListLossTable:
    """Every named loss of lists, one ListPreset per row."""
    return ListLossTable(LISTWISE.values())
