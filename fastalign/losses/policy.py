"""The named policy-gradient losses: one `PolicyPreset` row per method, all evaluated by the one policy
kernel.

lr  = logprobs - old_logprobs per token;  log rho = clamp(agg(lr), -20, 20)        agg: ratio
l_t = w_t s(rho, A) + kl_coef k(lp_t - ref_t) - entropy_coef H_t                     s: surrogate;  k: kl_kind;  w: is_weight, detached
L   = sum over scored tokens of n_t l_t                                              n: aggregation

ratio: token rho = e^lr; seq_mean e^(mean of lr), the gradient through every token; seq_mean_token the same
value, each token's term differentiated through its own lr only (GSPO-token); seq_sum e^(sum of lr). A
sequence's ratio is every token's ratio. surrogate: clip max(-A rho, -A clip(rho, lo, hi)), with dual_clip c
at most -A c where A < 0; reinforce -A lp; cispo -stop[clip(rho, lo, hi)] A lp; sapo -A (4 / tau) sg(tau (rho
- 1)); gmpo -A e^(mean of lr clipped on the side that A's sign allows); vespo -stop[phi] A lp, log phi = lam +
k log W - lam W. aggregation (N tokens, S sequences with a scored token, L_i tokens of sequence i): token_mean
1/N, seq_mean_token_mean 1/(S L_i), seq_mean_token_sum 1/S, seq_mean_token_sum_norm 1/(S norm_length),
token_sum 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fastalign.losses import peers
from fastalign.losses.fields import Effect, LossPreset, number, other, word
from fastalign.losses.options import Table, resolver
from fastalign.ops.columns import AGGREGATIONS, IS_MODES, KL_KINDS, RATIOS, SURROGATES
from fastalign.ops.policy.params import PolicyParams
from fastalign.runtime import memo
from fastalign.runtime.checks import check_choice, check_number

# k3 as a loss grows as e^-d: unclamped, one token that the policy has lost 20 nats of has a slope of -4e8.
# The value is that of verl.
K3_CLAMP = 10.0


# When a field has an effect, and what it needs otherwise.
_CLIPPING = ("clip", "cispo", "gmpo")
_CLIP: Effect = (lambda p: p.surrogate in _CLIPPING, f"surrogate in {_CLIPPING}")
_DUAL: Effect = (lambda p: p.surrogate == "clip" or p.dual_clip is None, 'surrogate="clip"')
_SAPO: Effect = (lambda p: p.surrogate == "sapo", 'surrogate="sapo"')
_VESPO: Effect = (lambda p: p.surrogate == "vespo", 'surrogate="vespo"')
_RATIO: Effect = (
    lambda p: p.surrogate != "reinforce" or p.ratio == "token",
    "a surrogate that reads the ratio",
)
_MASK: Effect = (lambda p: p.is_mode == "mask", 'is_mode="mask"')
_MODE: Effect = (lambda p: p.is_mode is not None or p.is_max is None, "is_mode")
_NORM: Effect = (
    lambda p: p.aggregation == "seq_mean_token_sum_norm",
    'aggregation="seq_mean_token_sum_norm"',
)


@dataclass(frozen=True)
class PolicyPreset(LossPreset):
    """A policy-gradient loss as data. Every field can be passed to `policy_loss` by its name; see the
    module's docstring for the formula.

    The bound on a side is either an epsilon (clip_low: 1 - clip_low; clip_high: 1 + clip_high; of gmpo:
    -clip_low and clip_high of the log-ratio) or the ratio itself (ratio_min, ratio_max); setting one replaces
    the other. kl_coef and entropy_coef may be 0-dim tensors when passed to the loss."""

    name: str = "custom"
    formula: str = ""
    paper: str = ""
    trl: str = ""  # TRL's loss_type where the meaning is the same
    surrogate: str = word("clip", lambda: SURROGATES)
    ratio: str = word("token", lambda: RATIOS, effect=_RATIO)
    clip_low: float | None = number(None, low=0.0, effect=_CLIP)
    clip_high: float | None = number(None, low=0.0, effect=_CLIP)
    ratio_min: float | None = number(None, low=0.0, effect=_CLIP)
    ratio_max: float | None = number(None, low=0.0, effect=_CLIP)
    dual_clip: float | None = number(
        None, above=1.0, effect=_DUAL
    )  # largest ratio that a negative advantage pays for
    tau_pos: float = number(1.0, above=0.0, effect=_SAPO)  # of sapo, A > 0
    tau_neg: float = number(1.05, above=0.0, effect=_SAPO)
    k_pos: float = number(2.0, low=0.0, effect=_VESPO)  # of vespo, A >= 0
    lam_pos: float = number(3.0, low=0.0, effect=_VESPO)
    k_neg: float = number(3.0, low=0.0, effect=_VESPO)
    lam_neg: float = number(2.0, low=0.0, effect=_VESPO)
    kl_coef: float = number(0.0, tensor=True)
    kl_kind: str = word("k3", lambda: KL_KINDS)
    # The loss adds the estimate clamped to +- this; None: as it is; "auto": 10 for k3, as it is for others.
    kl_clamp: float | str | None = other("auto")
    kl_bias_correction: bool = other(
        False
    )  # KL term times the token's ratio: its gradient is then that of the exact KL off-policy too
    entropy_coef: float = number(0.0, tensor=True)
    # truncate: min(w, is_max); mask: 0 outside [is_min, is_max]; None: as given
    is_mode: str | None = word(None, lambda: IS_MODES)
    is_min: float = number(0.0, low=0.0, effect=_MASK)
    is_max: float | None = other(None, effect=_MODE)
    aggregation: str = word("token_mean", lambda: AGGREGATIONS)
    norm_length: float | None = number(
        None, above=0.0, effect=_NORM
    )  # the constant of seq_mean_token_sum_norm: the longest response that can be

    hint = staticmethod(peers.policy_hint)

    def implied(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A new bound of one kind replaces that of the other."""
        sides = (("clip_low", "ratio_min"), ("clip_high", "ratio_max"))
        pairs = [pair for eps, bound in sides for pair in ((eps, bound), (bound, eps))]
        return {other: None for one, other in pairs if changes.get(one) is not None and other not in changes}

    def check_combination(self) -> None:
        _check_combination(self)

    @property
    def reads_ratio(self) -> bool:
        return self.surrogate != "reinforce" or self.kl_bias_correction

    @property
    def needs_sequence_values(self) -> bool:
        """Whether a sequence has one advantage and one importance weight: where its one ratio carries the
        gradient."""
        return self.surrogate == "gmpo" or (
            self.surrogate in ("clip", "sapo") and self.ratio in ("seq_mean", "seq_sum")
        )

    @property
    def needs_lengths(self) -> bool:
        """Whether numbers of scored tokens per sequence enter the value."""
        by_ratio = self.surrogate != "reinforce" and self.ratio != "token"
        return by_ratio or self.aggregation == "seq_mean_token_mean"

    @property
    def needs_sequences(self) -> bool:
        """Whether the sequences' boundaries enter the value."""
        return self.needs_lengths or self.aggregation.startswith("seq_")

    @property
    def clips_sequences(self) -> bool:
        """Whether a sequence has one ratio, so that its clip counts once; gmpo clips tokens."""
        return self.ratio in ("seq_mean", "seq_sum") and self.surrogate not in ("gmpo", "reinforce")

    def _kl_bound(self) -> float:
        if self.kl_clamp == "auto":
            return K3_CLAMP if self.kl_kind == "k3" else math.inf
        return math.inf if self.kl_clamp is None else self.kl_clamp

    @memo.on_instance
    def params(self, advantages_per_sequence: bool = False, is_per_sequence: bool = False) -> PolicyParams:
        """The numbers that the kernels take."""
        low, high = _bounds(self)
        return PolicyParams(
            ratio_min=low, ratio_max=high, dual_clip=math.inf if self.dual_clip is None else self.dual_clip, tau_pos=self.tau_pos,
            tau_neg=self.tau_neg, k_pos=self.k_pos, lam_pos=self.lam_pos, k_neg=self.k_neg, lam_neg=self.lam_neg, kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef, is_min=self.is_min, is_max=math.inf if self.is_max is None else self.is_max,
            norm_length=1.0 if self.norm_length is None else self.norm_length, kl_clamp=self._kl_bound(), surrogate=SURROGATES.index(self.surrogate),
            ratio=RATIOS.index(self.ratio), aggregation=AGGREGATIONS.index(self.aggregation), kl_kind=KL_KINDS.index(self.kl_kind),
            kl_bias_correction=int(self.kl_bias_correction), is_mode=IS_MODES.index(self.is_mode),
            advantages_per_sequence=int(advantages_per_sequence), is_per_sequence=int(is_per_sequence),
        )  # fmt: skip


PolicyPreset.read_fields()
FIELDS = tuple(PolicyPreset.PARTS)
TENSOR_FIELDS = PolicyPreset.TENSOR_FIELDS


def _bounds(p: PolicyPreset) -> tuple[float, float]:
    """The clip's bounds on the ratio (gmpo: on the log-ratio); unbounded where none is set."""
    if p.surrogate == "gmpo":
        low = -p.clip_low if p.clip_low is not None else math.log(p.ratio_min) if p.ratio_min else -math.inf
        high = p.clip_high if p.clip_high is not None else math.log(p.ratio_max) if p.ratio_max else math.inf
        return low, high
    low = 1.0 - p.clip_low if p.clip_low is not None else p.ratio_min
    high = 1.0 + p.clip_high if p.clip_high is not None else p.ratio_max
    return 0.0 if low is None else low, math.inf if high is None else high


def _check_combination(p: PolicyPreset) -> None:
    """Impossible combinations, with the reason. Also what no field of a hand-made PolicyPreset may be."""
    for eps, bound in (("clip_low", "ratio_min"), ("clip_high", "ratio_max")):
        if getattr(p, eps) is not None and getattr(p, bound) is not None:
            raise ValueError(f"{eps} and {bound} bound the same side; give one")
    low, high = _bounds(p)
    if not low < high:
        raise ValueError(f"the ratio's bounds {low:g} and {high:g} leave nothing between them")
    if p.surrogate == "clip":
        check_number("clip_low", 1.0 - low, high=1.0)
    if p.kl_clamp == "auto" or p.kl_clamp is None:
        pass
    elif isinstance(p.kl_clamp, str):
        raise ValueError(f"kl_clamp={p.kl_clamp!r}: it must be a positive number, None or 'auto'")
    else:
        check_number("kl_clamp", p.kl_clamp, above=0.0)
    if p.is_max is not None:
        check_number("is_max", p.is_max, above=p.is_min)
    if p.is_mode is not None and p.is_max is None:
        raise ValueError(f"is_mode={p.is_mode!r} needs is_max, the largest importance weight")
    if p.surrogate == "gmpo" and p.ratio != "seq_mean":
        raise ValueError('surrogate="gmpo" is a geometric mean over the sequence: ratio must be "seq_mean"')
    if p.kl_bias_correction and p.ratio != "token":
        raise ValueError('kl_bias_correction weighs each token\'s KL by its own ratio: ratio must be "token"')


def _rows() -> list[PolicyPreset]:
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    gspo = "Zheng et al. 2025, arXiv 2507.18071"
    tight = {"clip_low": 3e-4, "clip_high": 4e-4}
    per_sequence = "seq_mean_token_mean"
    return [
        PolicyPreset("ppo", "max(-A rho, -A clip(rho))", "Schulman et al. 2017, arXiv 1707.06347", "bnpo", **clip),
        PolicyPreset("reinforce", "-A lp", "Williams 1992, doi 10.1007/BF00992696", surrogate="reinforce", aggregation="seq_mean_token_sum"),
        PolicyPreset("grpo", "max(-A rho, -A clip(rho))", "Shao et al. 2024, arXiv 2402.03300", "grpo", aggregation=per_sequence, **clip),
        PolicyPreset("dr_grpo", "max(-A rho, -A clip(rho))", "Liu et al. 2025, arXiv 2503.20783", "dr_grpo",
                     aggregation="seq_mean_token_sum_norm", **clip),
        PolicyPreset("dapo", "max(-A rho, -A clip(rho))", "Yu et al. 2025, arXiv 2503.14476", "dapo", clip_low=0.2, clip_high=0.28),
        PolicyPreset("gspo", "max(-A s, -A clip(s)), s = e^(mean of lr)", gspo, ratio="seq_mean", aggregation=per_sequence, **tight),
        PolicyPreset("gspo_token", "max(-A s, -A clip(s)), s = stop[e^(mean of lr)] e^(lr - stop[lr])", gspo, ratio="seq_mean_token",
                     aggregation=per_sequence, **tight),
        PolicyPreset("cispo", "-stop[clip(rho)] A lp", "MiniMax 2025, arXiv 2506.13585", "cispo", surrogate="cispo", ratio_min=0.0, ratio_max=5.0),
        PolicyPreset("rloo", "max(-A s, -A clip(s)), s = e^(sum of lr)", "Ahmadian et al. 2024, arXiv 2402.14740", ratio="seq_sum",
                     aggregation=per_sequence, **clip),
        PolicyPreset("luspo", "L max(-A s, -A clip(s)), s = e^(mean of lr)", "2026, arXiv 2602.05261", ratio="seq_mean",
                     aggregation="seq_mean_token_sum", **tight),
        PolicyPreset("sapo", "-A (4 / tau) sg(tau (rho - 1))", "Gao et al. 2025, arXiv 2511.20347", "sapo", surrogate="sapo",
                     aggregation=per_sequence),
        PolicyPreset("gmpo", "-A e^(mean of clip(lr)), clipped on the side that A's sign allows", "Zhao et al. 2025, arXiv 2507.20673", "gmpo",
                     surrogate="gmpo", ratio="seq_mean", clip_low=0.4, clip_high=0.4, aggregation=per_sequence),
        PolicyPreset("vespo", "-stop[phi] A lp, log phi = lam + k log W - lam W, W = e^(sum of lr)", "2026, arXiv 2602.10693", "vespo",
                     surrogate="vespo", ratio="seq_sum"),
    ]  # fmt: skip


PRESETS: Mapping[str, PolicyPreset] = MappingProxyType({p.name: p for p in _rows()})


# How TRL 1.16 spells a loss that is no loss_type of its GRPOTrainer alone.
TRL_FORMS: Mapping[str, str] = MappingProxyType({
    "gspo": "grpo, importance_sampling_level=sequence", "luspo": "luspo, importance_sampling_level=sequence", "rloo": "RLOOTrainer",
})  # fmt: skip
# TRL's loss_type where the meaning is the same.
ALIASES: Mapping[str, str] = MappingProxyType({"bnpo": "ppo"})


def get(name: str) -> PolicyPreset:
    """The preset of this name (ours, or TRL's where the meaning is the same); an unknown name raises and
    lists the legal ones."""
    if name in ALIASES:
        return PRESETS[ALIASES[name]]
    check_choice("loss", name, PRESETS)
    return PRESETS[name]


resolve = resolver(get, PolicyPreset, PRESETS)


def _shown_bounds(p: PolicyPreset) -> str:
    low, high = _bounds(p)
    shown = f"lr in [{low:g}, {high:g}]" if p.surrogate == "gmpo" else f"[{low:g}, {high:g}]"
    return shown if p.surrogate in _CLIPPING else "none"


class PolicyLossTable(Table):
    """The policy-gradient losses: formula, ratio, aggregation, bounds, TRL's name, paper."""

    columns = {
        "loss": lambda p: p.name, "formula per token": lambda p: f"`{p.formula}`",
        "ratio": lambda p: "none" if p.surrogate == "reinforce" else p.ratio, "aggregation": lambda p: p.aggregation,
        "bounds": _shown_bounds, "TRL": lambda p: p.trl or TRL_FORMS.get(p.name, "none"), "paper": lambda p: p.paper,
    }  # fmt: skip


def available() -> str:
    """Every named loss as a table: formula, ratio, aggregation, bounds, paper."""
    return PolicyLossTable(PRESETS.values()).markdown()
