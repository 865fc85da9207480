"""`Preset`: a preference loss as data, with its validation. The named ones are in `fastalign.losses`.

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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastalign.losses.fields import Effect, LossPreset, OwnOption, Refused, number, other, word
from fastalign.ops.columns import LABELS, LINKS, NO_LINK, REDUCTIONS, SFT_NORMS, TAU_LINKS, TRANSFORMS
from fastalign.ops.preference.params import PairParams
from fastalign.runtime import memo
from fastalign.runtime.checks import check_choice, check_number
from fastalign.runtime.frozen import FrozenDict

NONFINITE = ("propagate", "drop")
ORDERS = (None, "paired", "unpaired")
RULES = (None, "beta_dpo", "alpha_dpo", "bco")  # the classes are in fastalign/preference/rules.py
TARGET_LINKS = ("hinge", "squared", "truncquad")
_POINT_LINKS = tuple(link for link in LINKS if link != "exo")  # exo compares two responses


# When a field has an effect, and what it needs otherwise.
_PAIR: Effect = (lambda p: p.pair_weight != 0, "pair_weight")  # only the comparison of a pair reads it
_POINT: Effect = (lambda p: p.point_link is not None, "point_link")
_RATIO: Effect = (lambda p: p.compares, "pair_weight or point_link")  # only terms on log-ratios read it
_TARGET: Effect = (lambda p: p.link in TARGET_LINKS and p.pair_weight != 0, f"link in {TARGET_LINKS}")
_POINT_TARGET: Effect = (lambda p: p.point_link in TARGET_LINKS, f"point_link in {TARGET_LINKS}")
_TAU: Effect = (
    lambda p: p.link in TAU_LINKS or p.point_link in TAU_LINKS,
    " or ".join(f'link="{name}"' for name in TAU_LINKS)
)  # fmt: skip
_ALPHA: Effect = (lambda p: p.transform == "alpha", 'transform="alpha"')
_SMOOTH: Effect = (
    lambda p: p.label_smoothing == 0 or p.labels in ("smooth", "robust") or p.link == "exo",
    'labels="smooth" or "robust", or link="exo"',
)
_ENTROPY: Effect = (
    lambda p: not p.label_entropy or p.labels in ("smooth", "soft"),
    'labels="smooth" or "soft"',
)
_DETACHED: Effect = (lambda p: not p.detach_kl_chosen or p.kl_chosen != 0, "kl_chosen")
_POINTS: Effect = (
    lambda p: p.point_link is None or any((*p.point_chosen, *p.point_rejected)),
    "point_chosen or point_rejected"
)  # fmt: skip
_SFT: Effect = (lambda p: p.sft_weight != 0, "sft_weight")
_SFT_PROMPT: Effect = (lambda p: not p.sft_include_prompt or p.sft_weight != 0, "sft_weight")


@dataclass(frozen=True)
class Preset(LossPreset):
    """A preference loss as data. Every field can be passed to `preference_loss` by its name; see the module's
    docstring for the formula.

    Fields that accept a tensor ([P], or 0-dim for schedules) when passed to a loss: beta, target, anchor.
    """

    name: str = "custom"
    formula: str = ""
    paper: str = ""
    trl: str = ""  # TRL's name where the meaning is the same
    # aggregate
    beta: float = number(0.1, low=0.0, tensor=True, effect=_RATIO)
    beta_rejected: float | None = number(None, low=0.0, effect=_PAIR)  # None: beta
    reference: bool = other(True)  # subtract the reference's log-probs
    length_norm: float = number(
        0.0, low=0.0, high=1.0, effect=_RATIO
    )  # kappa: 0 sums over tokens, 1 averages
    ld_alpha: float = number(
        1.0, low=0.0, high=1.0
    )  # weight of tokens beyond the shorter response of the pair (LD-DPO)
    token_clamp: tuple[float, float] | None = other(None)  # clamp each token's log-ratio; no gradient outside
    # transform
    transform: str = word("identity", lambda: TRANSFORMS, effect=_RATIO)
    transform_alpha: float = other(0.5, effect=_ALPHA)
    # margin
    gamma: float = number(0.0, effect=_PAIR)
    gamma_beta_ratio: float = number(0.0, effect=_PAIR)
    len_coef: float = number(0.0, effect=_PAIR)
    pos_penalty: float = number(0.0, low=0.0, effect=_PAIR)
    kl_chosen: float = number(0.0, effect=_PAIR)  # weights of the sequence KLs (kl_ref_policy) in the margin
    kl_rejected: float = number(0.0, effect=_PAIR)
    detach_kl_chosen: bool = other(False, effect=_DETACHED)
    # link and labels
    link: str = word("logistic", lambda: LINKS, effect=_PAIR)
    target: float = number(1.0, tensor=True, effect=_TARGET)  # of hinge, squared, truncquad
    link_tau: float = number(0.05, above=0.0, effect=_TAU)  # of the links in TAU_LINKS
    labels: str = word("hard", lambda: LABELS, effect=_PAIR)
    label_smoothing: float = other(0.0, effect=_SMOOTH)
    label_entropy: bool = other(
        False, effect=_ENTROPY
    )  # subtract the label's entropy: cross-entropy becomes KL
    pair_weight: float = number(1.0)  # 0: point terms only
    # point terms: k+ psi(u) + k- psi(-u) per side, u = point_beta * g - anchor, times point_beta ^
    # point_beta_power
    point_link: str | None = word(None, lambda: _POINT_LINKS, effect=_POINTS)
    point_chosen: tuple[float, float] = other((0.0, 0.0), effect=_POINT)
    point_rejected: tuple[float, float] = other((0.0, 0.0), effect=_POINT)
    point_beta: float | None = number(None, low=0.0, effect=_POINT)  # None: beta
    point_beta_power: float = number(0.0, effect=_POINT)
    point_target: float | str = other(
        1.0, effect=_POINT_TARGET
    )  # "soft": P - 1/2 for chosen, 1/2 - P for rejected, P = soft_labels
    anchor: float = number(0.0, tensor=True, effect=_POINT)
    # SFT term on the chosen response
    sft_weight: float = number(0.0, low=0.0)
    sft_norm: str = word("token_mean_global", lambda: SFT_NORMS, effect=_SFT)
    sft_include_prompt: bool = other(
        False, effect=_SFT_PROMPT
    )  # average over the prompt's tokens too (their log-probs must then be given)
    nonfinite: str = word(
        "propagate", lambda: NONFINITE
    )  # "drop": pairs whose loss is not finite do not count
    # what needs the whole batch
    order: str | None = word(None, lambda: ORDERS)  # "paired", "unpaired": sort before comparing (AOT)
    rule: str | None = word(
        None, lambda: RULES
    )  # the kind of `state=` object that the loss needs (fastalign.preference.rules)
    requires: tuple[str, ...] = other(())  # tensors per pair without which the method is not itself
    options: Mapping[str, str] = dataclasses.field(
        default_factory=FrozenDict
    )  # the method's own: see `LossPreset`
    weights: str = ""  # the function of fastalign that makes `omega` from the policy
    of_scores: bool = False  # of the scores of a reward model (`reward_loss`), not of log-probs

    TENSOR_ONLY = FrozenDict(omega=_RATIO, gamma_ext=_PAIR, soft_labels=None, valid=None)

    def check_combination(self) -> None:
        _check_combination(self)

    @property
    def compares(self) -> bool:
        """Whether responses are compared, with each other or with an anchor; an SFT term alone does not."""
        return self.pair_weight != 0.0 or self.point_link is not None

    @property
    def peer_factor(self) -> float:
        """TRL's rewards are its beta times log-probs; its beta of the odds ratio (ORPO) is the weight of that
        term."""
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
        """Whether soft_labels are read. They are required with labels="soft"; for point_target="soft" they
        default to 1."""
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
            reference=float(self.reference), length_norm=self.length_norm, ld_alpha=self.ld_alpha,
            token_clamp_low=low, token_clamp_high=high, transform_alpha=self.transform_alpha, beta=self.beta,
            beta_rejected=math.nan if self.beta_rejected is None else self.beta_rejected, gamma=self.gamma,
            gamma_beta_ratio=self.gamma_beta_ratio, len_coef=self.len_coef, pos_penalty=self.pos_penalty,
            kl_chosen=self.kl_chosen, kl_rejected=self.kl_rejected, target=self.target, tau=self.link_tau,
            label_smoothing=self.label_smoothing, pair_weight=self.pair_weight,
            point_beta=math.nan if self.point_beta is None else self.point_beta,
            point_beta_power=self.point_beta_power, point_target=0.0 if soft_points else self.point_target,
            anchor=self.anchor, chosen_pos=self.point_chosen[0], chosen_neg=self.point_chosen[1],
            rejected_pos=self.point_rejected[0], rejected_neg=self.point_rejected[1],
            sft_weight=self.sft_weight, transform=TRANSFORMS.index(self.transform),
            link=LINKS.index(self.link), labels=LABELS.index(self.labels),
            label_entropy=int(self.label_entropy), detach_kl_chosen=int(self.detach_kl_chosen),
            point_link=NO_LINK if self.point_link is None else LINKS.index(self.point_link),
            point_soft_target=int(soft_points), sft_norm=SFT_NORMS.index(self.sft_norm),
            sft_include_prompt=int(self.sft_include_prompt), drop_nonfinite=int(self.nonfinite == "drop"),
            reduction=REDUCTIONS.index(reduction),
        )  # fmt: skip


Preset.read_fields()
FIELDS = tuple(Preset.PARTS)
HOST_FIELDS = (
    "order",
    "rule",
    "requires",
)  # read by the op's Python side; every other field travels to the kernel
# Options that exist as tensors only: [P] (or 0-dim for omega and gamma_ext); `valid` is [P] bool, False drops
# the pair.
TENSOR_ONLY = tuple(Preset.TENSOR_ONLY)
TENSOR_FIELDS = Preset.TENSOR_FIELDS


def _check_combination(p: Preset) -> None:
    """Impossible combinations, with the reason. Also what no field of a hand-made Preset may be."""
    for name in ("point_chosen", "point_rejected"):
        if not _are_two_numbers(getattr(p, name)):
            raise ValueError(
                f"{name}={getattr(p, name)!r} must be two numbers, the weights of psi(u) and psi(-u)"
            )
    if p.point_target != "soft":
        check_number("point_target", p.point_target)
    inverse_beta = p.point_link is not None and p.point_beta_power < 0
    if inverse_beta and (p.beta if p.point_beta is None else p.point_beta) == 0:
        raise ValueError("beta must be positive: this loss divides by it")
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
        raise ValueError(
            'link="exo" takes the label as its target distribution: labels must be "hard" (with '
            'label_smoothing) or "soft"'
        )
    if p.link == "exo" and p.label_entropy:
        raise ValueError(
            'link="exo" is a KL divergence already: label_entropy=True would subtract the labels\' entropy '
            "twice"
        )
    if p.transform == "logodds" and (p.reference or p.length_norm != 1.0):
        raise ValueError('transform="logodds" needs log(p) < 0 per token: reference=False and length_norm=1')
    if p.token_clamp is not None and not (
        _are_two_numbers(p.token_clamp) and p.token_clamp[0] < p.token_clamp[1]
    ):
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
            "order sorts log-ratios across pairs: it excludes length_norm, transform, points, KLs, rules, "
            "soft labels, margins that are "
            "a pair's own, and losses without a reference"
        )
    if p.order == "unpaired" and p.ld_alpha != 1.0:
        raise ValueError('order="unpaired" has no pair partner whose length ld_alpha could use')
    if p.point_link is None and p.pair_weight == 0 and p.sft_weight == 0:
        raise ValueError("this loss has no term: pair_weight, point_link and sft_weight are all off")


def _are_two_numbers(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(v, (int, float)) for v in value)
    )


def _target_of(tau: Any) -> dict[str, Any]:
    if not isinstance(tau, Tensor):
        check_number("tau", tau, above=0.0)
    return {"target": 1.0 / (2.0 * tau)}


# Methods' own parameters that are no fields: what each sets, and its value in a preset.
Preset.OWN = {
    "inverse_tau": OwnOption(_target_of, lambda p: 1.0 / (2.0 * p.target)),
    # the margin itself, in place of its ratio to beta
    "gamma_itself": OwnOption(
        lambda v: {"gamma": v, "gamma_beta_ratio": 0.0}, lambda p: p.gamma + p.gamma_beta_ratio * p.beta
    ),
    # beside the hard label
    "smooth_labels": OwnOption(
        lambda v: {"label_smoothing": v, "labels": "smooth"}, lambda p: p.label_smoothing
    ),
    "both_kls": OwnOption(lambda v: {"kl_chosen": v, "kl_rejected": v}, lambda p: p.kl_chosen),
    "say_tau": Refused("tau"),
    "say_pair_weight": Refused("pair_weight"),
}
