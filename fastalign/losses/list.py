"""`ListPreset`: a loss over ranked lists of responses as data, with its validation. The named ones are in
`fastalign.losses`.

a_i = sum_n m_n (lp_n - reference * rp_n) / max(L_i, 1)^length_norm,   s_i = beta a_i,   r_i: the score of response i, higher is better
l   = list_weight * term(s, r)                    one of KINDS, for each list
L   = sum over valid lists of l / N  +  sft_weight * (K - 1)^sft_power * NLL(best) / norm            K: responses of the list
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from fastalign.losses.fields import Effect, LossPreset, number, other, word
from fastalign.losses.pair import NONFINITE, TARGET_LINKS
from fastalign.ops.columns import KINDS, LINKS, PAIR_GAINS, REDUCTIONS, SFT_NORMS, TAU_LINKS
from fastalign.ops.listwise.params import ListParams
from fastalign.runtime import memo
from fastalign.runtime.frozen import FrozenDict

# exo takes a target probability, and others a number of their own, which lists have not.
LIST_LINKS = tuple(link for link in LINKS if link != "exo" and link not in TAU_LINKS)
_REWARD_KINDS = ("infonca", "nca", "exo")

# When a field has an effect, and what it needs otherwise.
_PAIRWISE: Effect = (lambda p: p.kind == "pairwise", 'kind="pairwise"')
_TARGET: Effect = (
    lambda p: p.kind == "pairwise" and p.link in TARGET_LINKS, f'kind="pairwise" and link in {TARGET_LINKS}'
)  # fmt: skip
_REWARDS: Effect = (lambda p: p.kind in _REWARD_KINDS, f"kind in {_REWARD_KINDS}")
_SFT: Effect = (lambda p: p.sft_weight != 0, "sft_weight")


@dataclass(frozen=True)
class ListPreset(LossPreset):
    """A listwise loss as data. Every field can be passed to `listwise_loss` by its name; see the module's
    docstring for the formula.

    Kinds, with q = softmax(s) and p = softmax(r / reward_temperature) over the list:
        pairwise: sum over pairs r_i > r_j of gain_ij f(s_i - s_j)           f: link. Equal scores make no pair.
        plackett_luce: sum_k logsumexp(s_k, ..., s_K) - s_k in the order of the scores. Equal scores keep the order of the list.
        pro: sum_k logsumexp(s_k T_k, {s_i (r_k - r_i)}) - s_k T_k over the i below k, T_k = r_k - min r. Equal scores are no contrast.
        infonca: -sum p log q.    nca: sum p softplus(-s) + softplus(s) / K.    exo: sum q (log q - log p).
    """

    name: str = "custom"
    formula: str = ""
    paper: str = ""
    beta: float = number(
        0.1, low=0.0, tensor=True
    )  # a number or a tensor, [L] or 0-dim, when passed to a loss
    reference: bool = other(True)  # subtract the reference's log-probs
    length_norm: float = number(0.0, low=0.0, high=1.0)  # kappa: 0 sums over tokens, 1 averages
    kind: str = word("pairwise", lambda: KINDS)
    link: str = word("logistic", lambda: LIST_LINKS, effect=_PAIRWISE)
    target: float = number(1.0, effect=_TARGET)  # of hinge, squared, truncquad
    # "lambda": LiPO's |2^r_i - 2^r_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|, rank among s, no gradient
    pair_gain: str = word("one", lambda: PAIR_GAINS, effect=_PAIRWISE)
    pair_mean: bool = other(False, effect=_PAIRWISE)  # divide a list's term by its number of pairs
    reward_temperature: float = number(1.0, above=0.0, effect=_REWARDS)
    list_weight: float = number(1.0, low=0.0)
    # SFT term on the response with the highest score (the first of several)
    sft_weight: float = number(0.0, low=0.0)
    sft_norm: str = word("seq_mean", lambda: SFT_NORMS, effect=_SFT)
    sft_power: float = number(0.0, low=0.0, effect=_SFT)
    nonfinite: str = word(
        "propagate", lambda: NONFINITE
    )  # "drop": lists whose loss is not finite do not count
    options: Mapping[str, str] = dataclasses.field(
        default_factory=FrozenDict
    )  # the method's own: see `LossPreset`
    of_scores: bool = False  # of the scores of a reward model (`kwise_reward_loss`), not of log-probs

    TWICE = "option {name!r} sets {field} a second time; give one"

    def check_combination(self) -> None:
        if self.list_weight == 0 and self.sft_weight == 0:
            raise ValueError("this loss has no term: list_weight and sft_weight are both 0")

    @property
    def needs_lengths(self) -> bool:
        """Whether numbers of scored tokens enter the value; then a mask (or the lengths) must be given."""
        return self.length_norm != 0.0 or (self.sft_weight != 0.0 and self.sft_norm != "seq_sum")

    @memo.on_instance
    def params(self, reduction: str = "mean") -> ListParams:
        """The numbers that the kernels take."""
        return ListParams(
            self.length_norm, self.beta, self.target, self.reward_temperature, self.list_weight,
            self.sft_weight, self.sft_power, KINDS.index(self.kind), LINKS.index(self.link),
            PAIR_GAINS.index(self.pair_gain), int(self.pair_mean), SFT_NORMS.index(self.sft_norm),
            int(self.nonfinite == "drop"), REDUCTIONS.index(reduction),
        )  # fmt: skip


ListPreset.read_fields()
LIST_FIELDS = tuple(ListPreset.PARTS)
