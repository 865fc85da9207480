"""From a name and options to a preset, and the tables that `fastalign.losses.available()` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastalign.losses.list import ListPreset, with_list_options
from fastalign.losses.pair import Preset, with_options
from fastalign.losses.tables import ALIASES, LISTWISE, LOOPS, PRESETS, TRL_FORMS, UNPAIRED
from fastalign.runtime import memo


def get(name: str) -> Preset:
    """The preset of this name (ours, or TRL's where the meaning is the same); an unknown name raises and lists the legal ones."""
    found = PRESETS.get(ALIASES.get(name, name))
    if found is None:
        if name in LISTWISE:
            raise ValueError(f"loss={name!r} ranks lists: fastalign.listwise_loss takes it, 'fastalign train listwise' trains with it")
        if name in UNPAIRED:
            raise ValueError(
                f"loss={name!r} is of single responses: fastalign.unpaired_loss takes it, 'fastalign train {UNPAIRED[name].method}' trains with it"
            )
        raise ValueError(f"loss={name!r} is unknown; legal: {', '.join(available().names())}")
    return found


@memo.by_options
def resolve(loss: str | Preset, options: Mapping[str, Any]) -> tuple[Preset, dict[str, Tensor]]:
    """The preset that `loss` (a name or a Preset) and `options` give, and the options that are tensors."""
    preset = get(loss) if isinstance(loss, str) else loss
    if not isinstance(preset, Preset):
        raise TypeError(f"loss must be a name or a Preset, got {type(loss).__name__}; names: {', '.join(PRESETS)}")
    return with_options(preset, options)


def get_listwise(name: str) -> ListPreset:
    """The listwise preset of this name; an unknown name raises and lists the legal ones."""
    if name not in LISTWISE:
        raise ValueError(f"loss={name!r} is unknown here; legal for lists: {', '.join(LISTWISE)}")
    return LISTWISE[name]


@memo.by_options
def resolve_listwise(loss: str | ListPreset, options: Mapping[str, Any]) -> tuple[ListPreset, dict[str, Tensor]]:
    """The preset that `loss` (a name or a ListPreset) and `options` give, and the options that are tensors."""
    preset = get_listwise(loss) if isinstance(loss, str) else loss
    if not isinstance(preset, ListPreset):
        raise TypeError(f"loss must be a name or a ListPreset, got {type(loss).__name__}; names: {', '.join(LISTWISE)}")
    return with_list_options(preset, options)


class LossTable(tuple):
    """The presets as rows; printing it shows the table."""

    def names(self) -> list[str]:
        return [p.name for p in self] + list(ALIASES)

    def __contains__(self, name: object) -> bool:
        return name in self.names() or tuple.__contains__(self, name)

    def __str__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """name, formula, reduction over tokens, what beta is, reference needed, options, TRL's name, paper."""
        lines = [
            "| loss | formula per pair | over tokens | beta | reference | own options | TRL | paper |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for p in self:
            options = [name for name, rule in p.options.items() if not rule.startswith("refused")]
            own = ", ".join([*options, *(f for f in ("label_smoothing",) if getattr(p, f) and f not in p.options)])
            cells = [
                p.name,
                f"`{p.formula}`" + (f", that of dpo; the method is the loop: {LOOPS[p.name]}" if p.name in LOOPS else ""),
                _over_tokens(p),
                f"{p.beta:g}",
                "yes" if p.needs_reference else "no",
                own,
                p.trl or TRL_FORMS.get(p.name, "none"),
                p.paper,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def available() -> LossTable:
    """Every named loss of pairs, one Preset per row."""
    return LossTable(PRESETS.values())


class ListLossTable(tuple):
    """The listwise presets as rows; printing it shows the table."""

    def names(self) -> list[str]:
        return [p.name for p in self]

    def __str__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """name, formula, reduction over tokens, what beta is, reference needed, options, paper."""
        lines = ["| loss | formula per list | over tokens | beta | reference | own options | paper |", "|---|---|---|---|---|---|---|"]
        for p in self:
            options = [name for name, rule in p.options.items() if not rule.startswith("refused")]
            own = ", ".join([*options, *(f for f in ("sft_weight",) if getattr(p, f))])
            cells = [p.name, f"`{p.formula}`", _over_tokens(p), f"{p.beta:g}", "yes" if p.reference else "no", own, p.paper]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def available_listwise() -> ListLossTable:
    """Every named loss of lists, one ListPreset per row."""
    return ListLossTable(LISTWISE.values())


def _over_tokens(p: Preset | ListPreset) -> str:
    return {0.0: "sum", 1.0: "mean"}.get(p.length_norm, f"sum / L^{p.length_norm:g}")
