"""`Preset`: a preference loss as data, its validation, and how options change it. The named ones are in `fastalign.losses`.

a_s = sum_n w_n (lp_n - reference * rp_n) / max(L_s, 1)^length_norm            s: chosen, rejected
g_s = phi(a_s)                                                                   phi: transform
M   = gamma + beta * gamma_beta_ratio + gamma_ext - len_coef * (L_c - L_r) + beta * pos_penalty * relu(-a_c)
      + beta * (kl_rejected * K_r - kl_chosen * K_c)
h   = beta * g_c - beta_rejected * g_r - M
l   = pair_weight * (c_pos f(h) + c_neg f(-h)) + points                          f: link;  c_pos, c_neg: labels
L   = sum over valid pairs of omega * l / N  +  sft_weight * NLL(chosen) / norm
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastalign.losses import peers
from fastalign.ops.columns import LABELS, LINKS, NO_LINK, REDUCTIONS, SFT_NORMS, TAU_LINKS, TRANSFORMS
from fastalign.ops.preference.params import PairParams
from fastalign.runtime import memo
from fastalign.runtime.checks import check_choice, check_number
from fastalign.runtime.frozen import FrozenDict, freeze

NONFINITE = ("propagate", "drop")
ORDERS = (None, "paired", "unpaired")
RULES = (None, "beta_dpo", "alpha_dpo", "bco")  # the classes are in fastalign/preference/rules.py
TARGET_LINKS = ("hinge", "squared", "truncquad")


@dataclass(frozen=True)
class Preset:
    """A preference loss as data. Every field can be passed to `preference_loss` by its name; see the module's docstring for the formula.

    Fields that accept a tensor ([P], or 0-dim for schedules) when passed to a loss: beta, target, anchor.
    """

    name: str = "custom"
    formula: str = ""
    paper: str = ""
    trl: str = ""  # TRL's name where the meaning is the same
    # aggregate
    beta: float = 0.1
    beta_rejected: float | None = None  # None: beta
    reference: bool = True  # subtract the reference's log-probs
    length_norm: float = 0.0  # kappa: 0 sums over tokens, 1 averages
    ld_alpha: float = 1.0  # weight of tokens beyond the shorter response of the pair (LD-DPO)
    token_clamp: tuple[float, float] | None = None  # clamp each token's log-ratio; no gradient outside
    # transform
    transform: str = "identity"
    transform_alpha: float = 0.5
    # margin
    gamma: float = 0.0
    gamma_beta_ratio: float = 0.0
    len_coef: float = 0.0
    pos_penalty: float = 0.0
    kl_chosen: float = 0.0  # weights of the sequence KLs (kl_ref_policy) in the margin
    kl_rejected: float = 0.0
    detach_kl_chosen: bool = False
    # link and labels
    link: str = "logistic"
    target: float = 1.0  # of hinge, squared, truncquad
    link_tau: float = 0.05  # of the links in TAU_LINKS
    labels: str = "hard"
    label_smoothing: float = 0.0
    label_entropy: bool = False  # subtract the label's entropy: cross-entropy becomes KL
    pair_weight: float = 1.0  # 0: point terms only
    # point terms: k+ psi(u) + k- psi(-u) per side, u = point_beta * g - anchor, times point_beta ^ point_beta_power
    point_link: str | None = None
    point_chosen: tuple[float, float] = (0.0, 0.0)
    point_rejected: tuple[float, float] = (0.0, 0.0)
    point_beta: float | None = None  # None: beta
    point_beta_power: float = 0.0
    point_target: float | str = 1.0  # "soft": P - 1/2 for chosen, 1/2 - P for rejected, P = soft_labels
    anchor: float = 0.0
    # SFT term on the chosen response
    sft_weight: float = 0.0
    sft_norm: str = "token_mean_global"
    sft_include_prompt: bool = False  # average over the prompt's tokens too (their log-probs must then be given)
    nonfinite: str = "propagate"  # "drop": pairs whose loss is not finite do not count
    # what needs the whole batch
    order: str | None = None  # "paired", "unpaired": sort before comparing (AOT)
    rule: str | None = None  # the kind of `state=` object that the loss needs (fastalign.preference.rules)
    requires: tuple[str, ...] = ()  # tensors per pair without which the method is not itself
    # The method's own option names: name -> the field that it sets, or a rule of _OPTION_RULES.
    options: Mapping[str, str] = dataclasses.field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        freeze(self)
        _validate(self)

    def replace(self, **changes: Any) -> Preset:
        """A copy with other fields or options of this preset; unknown names and impossible combinations raise."""
        preset, tensors = with_options(self, changes)
        if tensors:
            raise TypeError(f"{', '.join(tensors)}: a Preset holds numbers; pass tensors to the loss itself")
        return preset

    @property
    def compares(self) -> bool:
        """Whether responses are compared, with each other or with an anchor; an SFT term alone does not."""
        return self.pair_weight != 0.0 or self.point_link is not None

    @property
    def peer_factor(self) -> float:
        """TRL's rewards are its beta times log-probs; its beta of the odds ratio (ORPO) is the weight of that term."""
        return self.pair_weight if self.transform == "logodds" else 1.0

    @property
    def needs_reference(self) -> bool:
        return self.reference or self.rule == "alpha_dpo"

    @property
    def needs_kl(self) -> bool:
        return self.kl_chosen != 0.0 or self.kl_rejected != 0.0

    @property
    def needs_lengths(self) -> bool:
        """Whether numbers of scored tokens enter the value; then a mask (or the lengths) must be given."""
        counts_sft = self.sft_weight != 0.0 and self.sft_norm != "seq_sum"
        return self.length_norm != 0.0 or self.len_coef != 0.0 or self.ld_alpha != 1.0 or counts_sft

    @property
    def takes_soft_labels(self) -> bool:
        """Whether soft_labels are read. They are required with labels="soft"; for point_target="soft" they default to 1."""
        return self.labels == "soft" or self.point_target == "soft"

    @property
    def needs_soft_labels(self) -> bool:
        return self.labels == "soft"

    @memo.on_instance
    def params(self, reduction: str = "mean") -> PairParams:
        """The numbers that the kernels take."""
        low, high = self.token_clamp or (-math.inf, math.inf)
        soft_points = self.point_target == "soft"
        return PairParams(
            reference=float(self.reference), length_norm=self.length_norm, ld_alpha=self.ld_alpha, token_clamp_low=low, token_clamp_high=high,
            transform_alpha=self.transform_alpha, beta=self.beta, beta_rejected=math.nan if self.beta_rejected is None else self.beta_rejected,
            gamma=self.gamma, gamma_beta_ratio=self.gamma_beta_ratio, len_coef=self.len_coef, pos_penalty=self.pos_penalty,
            kl_chosen=self.kl_chosen, kl_rejected=self.kl_rejected, target=self.target, tau=self.link_tau, label_smoothing=self.label_smoothing,
            pair_weight=self.pair_weight, point_beta=math.nan if self.point_beta is None else self.point_beta,
            point_beta_power=self.point_beta_power, point_target=0.0 if soft_points else self.point_target, anchor=self.anchor,
            chosen_pos=self.point_chosen[0], chosen_neg=self.point_chosen[1], rejected_pos=self.point_rejected[0],
            rejected_neg=self.point_rejected[1], sft_weight=self.sft_weight, transform=TRANSFORMS.index(self.transform),
            link=LINKS.index(self.link), labels=LABELS.index(self.labels), label_entropy=int(self.label_entropy),
            detach_kl_chosen=int(self.detach_kl_chosen), point_link=NO_LINK if self.point_link is None else LINKS.index(self.point_link),
            point_soft_target=int(soft_points), sft_norm=SFT_NORMS.index(self.sft_norm), sft_include_prompt=int(self.sft_include_prompt),
            drop_nonfinite=int(self.nonfinite == "drop"), reduction=REDUCTIONS.index(reduction),
        )  # fmt: skip


_DESCRIPTION = ("name", "formula", "paper", "trl", "options")
FIELDS = tuple(f.name for f in dataclasses.fields(Preset) if f.name not in _DESCRIPTION)
HOST_FIELDS = ("order", "rule", "requires")  # read by the op's Python side; every other field travels to the kernel
# Options that exist as tensors only: [P] (or 0-dim for omega and gamma_ext); `valid` is [P] bool, False drops the pair.
TENSOR_ONLY = ("omega", "gamma_ext", "soft_labels", "valid")
TENSOR_FIELDS = ("beta", "target", "anchor")

# A field that has no effect in a combination raises when it is passed: field -> (has an effect, what it needs).
_EFFECT: dict[str, tuple[Callable[[Preset], bool], str]] = {
    "target": (lambda p: p.link in TARGET_LINKS and p.pair_weight != 0, f"link in {TARGET_LINKS}"),
    "link_tau": (lambda p: bool(TAU_LINKS.keys() & {p.link, p.point_link}), " or ".join(f'link="{name}"' for name in TAU_LINKS)),
    "transform_alpha": (lambda p: p.transform == "alpha", 'transform="alpha"'),
    "label_smoothing": (
        lambda p: p.label_smoothing == 0 or p.labels in ("smooth", "robust") or p.link == "exo", 'labels="smooth" or "robust", or link="exo"'
    ),
    "label_entropy": (lambda p: not p.label_entropy or p.labels in ("smooth", "soft"), 'labels="smooth" or "soft"'),
    "detach_kl_chosen": (lambda p: not p.detach_kl_chosen or p.kl_chosen != 0, "kl_chosen"),
    "point_chosen": (lambda p: p.point_link is not None, "point_link"),
    "point_rejected": (lambda p: p.point_link is not None, "point_link"),
    "point_beta": (lambda p: p.point_link is not None, "point_link"),
    "point_beta_power": (lambda p: p.point_link is not None, "point_link"),
    "point_target": (lambda p: p.point_link in TARGET_LINKS, f"point_link in {TARGET_LINKS}"),
    "anchor": (lambda p: p.point_link is not None, "point_link"),
    "point_link": (lambda p: p.point_link is None or any((*p.point_chosen, *p.point_rejected)), "point_chosen or point_rejected"),
    "sft_norm": (lambda p: p.sft_weight != 0, "sft_weight"),
    "sft_include_prompt": (lambda p: not p.sft_include_prompt or p.sft_weight != 0, "sft_weight"),
}  # fmt: skip


# The same of whatever only the comparison of a pair reads, and of what only terms on log-ratios read.
_PAIR_FIELDS = (
    "link",
    "labels",
    "beta_rejected",
    "gamma",
    "gamma_beta_ratio",
    "gamma_ext",
    "len_coef",
    "pos_penalty",
    "kl_chosen",
    "kl_rejected",
)
_EFFECT |= {name: (lambda p: p.pair_weight != 0, "pair_weight") for name in _PAIR_FIELDS}
_EFFECT |= {
    name: (lambda p: p.pair_weight != 0 or p.point_link is not None, "pair_weight or point_link")
    for name in ("beta", "transform", "length_norm", "omega")
}


def _validate(p: Preset) -> None:
    """Impossible combinations, with the reason. Also what no field of a hand-made Preset may be."""
    for name, legal in (
        ("transform", TRANSFORMS),
        ("link", LINKS),
        ("labels", LABELS),
        ("sft_norm", SFT_NORMS),
        ("nonfinite", NONFINITE),
        ("order", ORDERS),
        ("rule", RULES),
    ):
        check_choice(name, getattr(p, name), legal)
    if p.point_link is not None:
        check_choice("point_link", p.point_link, [link for link in LINKS if link != "exo"])  # exo compares two responses
    for name in ("point_chosen", "point_rejected"):
        if not _are_two_numbers(getattr(p, name)):
            raise ValueError(f"{name}={getattr(p, name)!r} must be two numbers, the weights of psi(u) and psi(-u)")
    if p.point_target != "soft":
        check_number("point_target", p.point_target)
    inverse_beta = p.point_link is not None and p.point_beta_power < 0
    check_number("beta", p.beta, low=0.0)
    if inverse_beta and (p.beta if p.point_beta is None else p.point_beta) == 0:
        raise ValueError("beta must be positive: this loss divides by it")
    for name in ("beta_rejected", "point_beta"):
        if getattr(p, name) is not None:
            check_number(name, getattr(p, name), low=0.0)
    for name in (
        "gamma",
        "gamma_beta_ratio",
        "len_coef",
        "kl_chosen",
        "kl_rejected",
        "target",
        "pair_weight",
        "point_beta_power",
        "anchor",
    ):
        check_number(name, getattr(p, name))
    for name in ("pos_penalty", "sft_weight"):
        check_number(name, getattr(p, name), low=0.0)
    for name in ("length_norm", "ld_alpha"):
        check_number(name, getattr(p, name), low=0.0, high=1.0)
    check_number("link_tau", p.link_tau, above=0.0)
    for name in (p.link, p.point_link):
        if name in TAU_LINKS:
            check_number("link_tau", p.link_tau, above=0.0, high=TAU_LINKS[name])
    if p.transform == "alpha":
        check_number("transform_alpha", p.transform_alpha, above=0.0)
    if p.labels in ("smooth", "robust"):
        check_number("label_smoothing", p.label_smoothing, low=0.0, below=0.5)
    if p.link == "exo" and p.labels != "soft":
        check_number("label_smoothing", p.label_smoothing, above=0.0, below=1.0)
    if p.link == "exo" and p.labels in ("smooth", "robust"):
        raise ValueError('link="exo" takes the label as its target distribution: labels must be "hard" (with label_smoothing) or "soft"')
    if p.link == "exo" and p.label_entropy:
        raise ValueError('link="exo" is a KL divergence already: label_entropy=True would subtract the labels\' entropy twice')
    if p.transform == "logodds" and (p.reference or p.length_norm != 1.0):
        raise ValueError('transform="logodds" needs log(p) < 0 per token: reference=False and length_norm=1')
    if p.token_clamp is not None and not (_are_two_numbers(p.token_clamp) and p.token_clamp[0] < p.token_clamp[1]):
        raise ValueError(f"token_clamp={p.token_clamp!r} must be (low, high) with low < high")
    for name in p.requires:
        check_choice("requires", name, TENSOR_ONLY + TENSOR_FIELDS)
    if p.order is not None and (
        p.length_norm
        or p.transform != "identity"
        or p.point_link is not None
        or p.needs_kl
        or p.rule
        or p.requires
        or not p.reference
        or p.pos_penalty
        or p.len_coef
        or p.labels == "soft"
    ):
        raise ValueError(
            "order sorts log-ratios across pairs: it excludes length_norm, transform, points, KLs, rules, soft labels, margins that are "
            "a pair's own, and losses without a reference"
        )
    if p.order == "unpaired" and p.ld_alpha != 1.0:
        raise ValueError('order="unpaired" has no pair partner whose length ld_alpha could use')
    if p.point_link is None and p.pair_weight == 0 and p.sft_weight == 0:
        raise ValueError("this loss has no term: pair_weight, point_link and sft_weight are all off")


def _are_two_numbers(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)


# Options that are not fields: how a method's own parameter becomes fields. Values may be tensors where the field may.
_OPTION_RULES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "target = 1 / (2 tau)": lambda v: {"target": 1.0 / (2.0 * _positive("tau", v))},
    "gamma_beta_ratio = 0": lambda v: {"gamma": v, "gamma_beta_ratio": 0.0},
    "labels = smooth": lambda v: {"label_smoothing": v, "labels": "smooth"},
    "kl_chosen = kl_rejected": lambda v: {"kl_chosen": v, "kl_rejected": v},
    **{name: lambda v, name=name: {name: v} for name in FIELDS},
}


def _positive(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        check_number(name, value, above=0.0)
    return value


def with_options(preset: Preset, options: Mapping[str, Any]) -> tuple[Preset, dict[str, Tensor]]:
    """The preset with these options applied, and the options that are tensors (beta, target, anchor, omega, gamma_ext, soft_labels, valid)."""
    changes: dict[str, Any] = {}
    setters: dict[str, str] = {}
    for name, value in options.items():
        rule = preset.options.get(name, "")
        if rule.startswith("refused: "):
            shown = value if isinstance(value, (int, float, str)) else "..."
            own = rule.removeprefix("refused: ")
            raise ValueError(f"loss {preset.name!r} does not take {name!r}: TRL's {name} of it is {own} here: write {own}={shown}")
        if rule:
            new = _OPTION_RULES[rule](value)
        elif name in FIELDS or name in TENSOR_ONLY:
            new = {name: value}
        else:
            legal = [*preset.options, *(f for f in FIELDS if f not in preset.options), *TENSOR_ONLY]
            hint = peers.preference_hint(name, value)
            raise ValueError(f"loss {preset.name!r} has no option {name!r}{hint}; legal: {', '.join(legal)}")
        for field, v in new.items():
            if field in changes and setters[field] != name and changes[field] is not v:
                raise ValueError(f"options {setters[field]!r} and {name!r} both set {field}; give one")
            changes[field], setters[field] = v, name
    tensors = {field: v for field, v in changes.items() if isinstance(v, Tensor)}
    for field in tensors:
        if field not in TENSOR_FIELDS + TENSOR_ONLY:
            raise TypeError(f"option {setters[field]!r} must be a number; tensors are legal for {', '.join(TENSOR_FIELDS + TENSOR_ONLY)}")
    for field in TENSOR_ONLY:
        if field in changes and field not in tensors:
            raise TypeError(f"option {field!r} must be a tensor with one value per pair, got {changes[field]!r}")
    if not changes:
        return preset, tensors
    resolved = dataclasses.replace(preset, **{f: v for f, v in changes.items() if f not in tensors})
    for field in changes:
        if field in _EFFECT and not _EFFECT[field][0](resolved):
            raise ValueError(f"option {setters[field]!r} has no effect on loss {preset.name!r} without {_EFFECT[field][1]}")
    return resolved, tensors
