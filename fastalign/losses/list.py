"""`ListPreset`: a loss over ranked lists of responses as data, its validation, and how options change it. The named ones are in
`fastalign.losses`.

a_i = sum_n m_n (lp_n - reference * rp_n) / max(L_i, 1)^length_norm,   s_i = beta a_i,   r_i: the score of response i, higher is better
l   = list_weight * term(s, r)                    one of KINDS, for each list
L   = sum over valid lists of l / N  +  sft_weight * (K - 1)^sft_power * NLL(best) / norm            K: responses of the list
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastalign.losses import peers
from fastalign.losses.pair import NONFINITE, TARGET_LINKS
from fastalign.ops.columns import KINDS, LINKS, PAIR_GAINS, REDUCTIONS, SFT_NORMS, TAU_LINKS
from fastalign.ops.listwise.params import ListParams
from fastalign.runtime import memo
from fastalign.runtime.checks import check_choice, check_number
from fastalign.runtime.frozen import FrozenDict, freeze

# exo takes a target probability, and others a number of their own, which lists have not.
LIST_LINKS = tuple(link for link in LINKS if link != "exo" and link not in TAU_LINKS)
_REWARD_KINDS = ("infonca", "nca", "exo")


@dataclass(frozen=True)
class ListPreset:
    """A listwise loss as data. Every field can be passed to `listwise_loss` by its name; see the module's docstring for the formula.

    Kinds, with q = softmax(s) and p = softmax(r / reward_temperature) over the list:
        pairwise: sum over pairs r_i > r_j of gain_ij f(s_i - s_j)           f: link. Equal scores make no pair.
        plackett_luce: sum_k logsumexp(s_k, ..., s_K) - s_k in the order of the scores. Equal scores keep the order of the list.
        pro: sum_k logsumexp(s_k T_k, {s_i (r_k - r_i)}) - s_k T_k over the i below k, T_k = r_k - min r. Equal scores are no contrast.
        infonca: -sum p log q.    nca: sum p softplus(-s) + softplus(s) / K.    exo: sum q (log q - log p).
    """

    name: str = "custom"
    formula: str = ""
    paper: str = ""
    beta: float = 0.1  # a number or a tensor, [L] or 0-dim, when passed to a loss
    reference: bool = True  # subtract the reference's log-probs
    length_norm: float = 0.0  # kappa: 0 sums over tokens, 1 averages
    kind: str = "pairwise"
    link: str = "logistic"
    target: float = 1.0  # of hinge, squared, truncquad
    pair_gain: str = "one"  # "lambda": LiPO's |2^r_i - 2^r_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|, rank among s, no gradient
    pair_mean: bool = False  # divide a list's term by its number of pairs
    reward_temperature: float = 1.0
    list_weight: float = 1.0
    # SFT term on the response with the highest score (the first of several)
    sft_weight: float = 0.0
    sft_norm: str = "seq_mean"
    sft_power: float = 0.0
    nonfinite: str = "propagate"  # "drop": lists whose loss is not finite do not count
    # The method's own option names: name -> the field that it sets.
    options: Mapping[str, str] = dataclasses.field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        freeze(self)
        for name, legal in (("kind", KINDS), ("link", LIST_LINKS), ("pair_gain", PAIR_GAINS), ("sft_norm", SFT_NORMS),
                            ("nonfinite", NONFINITE)):  # fmt: skip
            check_choice(name, getattr(self, name), legal)
        for name in ("beta", "list_weight", "sft_weight", "sft_power"):
            check_number(name, getattr(self, name), low=0.0)
        check_number("length_norm", self.length_norm, low=0.0, high=1.0)
        check_number("target", self.target)
        check_number("reward_temperature", self.reward_temperature, above=0.0)
        if self.list_weight == 0 and self.sft_weight == 0:
            raise ValueError("this loss has no term: list_weight and sft_weight are both 0")

    def replace(self, **changes: Any) -> ListPreset:
        """A copy with other fields or options of this preset; unknown names and impossible values raise."""
        preset, tensors = with_list_options(self, changes)
        if tensors:
            raise TypeError(f"{', '.join(tensors)}: a ListPreset holds numbers; pass tensors to the loss itself")
        return preset

    @property
    def needs_lengths(self) -> bool:
        """Whether numbers of scored tokens enter the value; then a mask (or the lengths) must be given."""
        return self.length_norm != 0.0 or (self.sft_weight != 0.0 and self.sft_norm != "seq_sum")

    @memo.on_instance
    def params(self, reduction: str = "mean") -> ListParams:
        """The numbers that the kernels take."""
        return ListParams(
            self.length_norm, self.beta, self.target, self.reward_temperature, self.list_weight, self.sft_weight, self.sft_power,
            KINDS.index(self.kind), LINKS.index(self.link), PAIR_GAINS.index(self.pair_gain), int(self.pair_mean),
            SFT_NORMS.index(self.sft_norm), int(self.nonfinite == "drop"), REDUCTIONS.index(reduction),
        )  # fmt: skip


LIST_FIELDS = tuple(f.name for f in dataclasses.fields(ListPreset) if f.name not in ("name", "formula", "paper", "options"))

# A field that has no effect in a combination raises when it is passed: field -> (has an effect, what it needs).
_EFFECT = {
    "link": (lambda p: p.kind == "pairwise", 'kind="pairwise"'),
    "target": (lambda p: p.kind == "pairwise" and p.link in TARGET_LINKS, f'kind="pairwise" and link in {TARGET_LINKS}'),
    "pair_gain": (lambda p: p.kind == "pairwise", 'kind="pairwise"'),
    "pair_mean": (lambda p: p.kind == "pairwise", 'kind="pairwise"'),
    "reward_temperature": (lambda p: p.kind in _REWARD_KINDS, f"kind in {_REWARD_KINDS}"),
    "sft_norm": (lambda p: p.sft_weight != 0, "sft_weight"),
    "sft_power": (lambda p: p.sft_weight != 0, "sft_weight"),
}


def with_list_options(preset: ListPreset, options: Mapping[str, Any]) -> tuple[ListPreset, dict[str, Tensor]]:
    """The preset with these options applied, and the options that are tensors (beta)."""
    changes: dict[str, Any] = {}
    for name, value in options.items():
        field = preset.options.get(name, name)
        if field not in LIST_FIELDS:
            legal = [*preset.options, *(f for f in LIST_FIELDS if f not in preset.options.values())]
            hint = peers.preference_hint(name, value)
            raise ValueError(f"loss {preset.name!r} has no option {name!r}{hint}; legal: {', '.join(legal)}")
        if field in changes:
            raise ValueError(f"option {name!r} sets {field} a second time; give one")
        if isinstance(value, Tensor) and field != "beta":
            raise TypeError(f"option {name!r} must be a number; tensors are legal for beta")
        changes[field] = value
    tensors = {field: value for field, value in changes.items() if isinstance(value, Tensor)}
    resolved = dataclasses.replace(preset, **{f: v for f, v in changes.items() if f not in tensors}) if changes else preset
    for field in changes:
        if field in _EFFECT and not _EFFECT[field][0](resolved):
            raise ValueError(f"option {field!r} has no effect on loss {preset.name!r} without {_EFFECT[field][1]}")
    return resolved, tensors
