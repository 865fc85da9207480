"""Who enters the arena: a row for each method, made of stages that `fastalign.train` runs. Data only.

A new method is a new row of `ENTRIES`: its stages name a method of `fastalign train`, its loss and options,
the form of the labelled data (a name of `labels.FORMS`; online methods sample for themselves), the learning
rate. `knob` names what the entry's coefficient sets, an option of the loss or a setting of the method; `grid`
are its values for the frontier, of which `beta` is the one of the quick run. The page of the report takes
formulas and papers from the tables of losses and methods.

Learning rates and coefficients were chosen on seed 0 at the default sizes and label noise: `RATE` first, then
1e-4 or 2e-4 where the policy went more than some 15 nats from the SFT model, 1e-3 for PPO and
REINFORCE++, whose steps are one update. docs/arena.md says what was seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastalign.train.methods import METHODS
from fastalign.train.online_config import OnlineConfig

RATE = 3e-4
# Family -> its colour in the pictures.
FAMILIES: Mapping[str, str] = {
    "one logit, other links": "#0072B2",
    "labels with noise": "#1CA3C4",
    "likelihood kept up": "#009E73",
    "length and tokens": "#B8860B",
    "single responses": "#D55E00",
    "whole lists": "#CC79A7",
    "several stages": "#6A3D9A",
    "online": "#222222",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of `fastalign train`. `settings`: of its configuration, besides those the arena gives every
    method. `share`: of the budget. `fresh`: its data are sampled from the policy as it is, not from the SFT
    model. `judges_itself`: its data are labelled by the policy. `from_sft`: it trains the SFT model, not the
    policy of the stage before; `held_to_sft`: its reference is the SFT model, not the policy it starts from.
    `gives`: what it trains is no policy but the next stage's setting of this name. `scored`: of an online
    method, responses that are scored for each that is learnt from."""

    method: str
    loss: str | None = None
    data: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    knob: str = "beta"
    rate: float = RATE
    share: float = 1.0
    fresh: bool = False
    from_sft: bool = False
    held_to_sft: bool = False
    gives: str = ""
    judges_itself: bool = False
    scored: int = 1

    @property
    def online(self) -> bool:
        return METHODS[self.method].config is OnlineConfig

    def numbers(self, beta: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """(options of the loss, settings) with the entry's coefficient in its place."""
        options, settings = dict(self.options), dict(self.settings)
        if self.knob and beta is not None:
            (settings if self.knob in METHODS[self.method].settings else options)[self.knob] = beta
        return options, settings


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method in the arena. `shown`: in table and picture. `beta`: its coefficient, None: it has none.
    `expected`: why it need not raise the gold reward here, said where it does not. `recipe`: the shipped
    recipe that has its paper, where no row of a table has it. `merge`: how the policies of its stages are
    merged into one (options of `merge_weights`)."""

    name: str
    shown: str
    family: str
    stages: tuple[Stage, ...]
    beta: float | None = None
    grid: tuple[float, ...] = ()
    expected: str = ""
    recipe: str = ""
    note: str = ""
    merge: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def betas(self, frontier: bool) -> tuple[float | None, ...]:
        return self.grid if frontier and self.grid else (self.beta,)


class Cell(NamedTuple):
    """An entry at one coefficient from one seed."""

    entry: Entry
    seed: int
    beta: float | None

    @property
    def name(self) -> str:
        return f"{self.entry.name}-seed{self.seed}" + ("" if self.beta is None else f"-{self.beta:g}")

    def definition(self) -> Any:
        """What the numbers come from besides the arena's settings, as it stands in a file."""
        stages = [dataclasses.asdict(stage) for stage in self.entry.stages]
        return json.loads(json.dumps({"stages": stages, "merge": dict(self.entry.merge)}))


_GRID = (0.2, 0.5, 1.0)  # of losses that sum over tokens
# Of those that stop at a margin of their own: log-ratios come to a few nats at a
# smaller beta.
_STOPS = {"beta": 0.1, "grid": (0.03, 0.1, 0.3)}
_MEAN = {"beta": 5.0, "grid": (1.5, 5.0, 15.0)}  # of losses that average over tokens
_KL = {"beta": 0.03, "grid": (0.01, 0.03, 0.1), "knob": "kl_coef"}


def _pairs(name: str, shown: str, family: str, loss: str | None = None, *, method: str = "dpo", data: str = "pairs",
           beta: float | None = 0.5, grid: tuple[float, ...] = _GRID, expected: str = "", note: str = "", **stage: Any) -> Entry:  # fmt: skip
    """An entry of one stage on the labelled responses."""
    only = Stage(method, loss or name, data, **stage)
    return Entry(name, shown, family, (only,), beta, grid if beta is not None else (), expected, note=note)


def _online(
    name: str,
    shown: str,
    *,
    method: str = "",
    beta: float,
    grid: tuple[float, ...],
    note: str = "",
    **stage: Any,
) -> Entry:
    return Entry(name, shown, "online", (Stage(method or name, **stage),), beta, grid, note=note)


def _rows() -> list[Entry]:
    links, noise, kept, length, single, lists, stages, _ = FAMILIES
    half = {"share": 0.5}
    tau = {"knob": "tau", **_MEAN}
    ppo = {"knob": "kl_coef", "rate": 1e-3}
    return [
        _pairs("dpo", "DPO", links),
        _pairs("ipo", "IPO", links, **tau),
        _pairs("slic_hf", "SLiC-HF", links, knob="delta", **_MEAN),
        _pairs("rso", "RSO", links, data="rso_pairs", rate=2e-4,
               note="The pairs are made of the quarter of the responses to a prompt that statistical rejection sampling keeps."),
        _pairs("gpo_logistic", "GPO logistic", links),
        *(_pairs(f"gpo_{link}", f"GPO {link}", links, **_STOPS) for link in ("squared", "truncquad")),
        *(_pairs(f"gpo_{link}", f"GPO {link}", links) for link in ("hinge", "exp", "savage")),
        _pairs("exo_pair", "EXO", links, rate=2e-4),
        _pairs("discopop", "DiscoPOP", links,
               expected="at h = 0, where training starts, the slope of its loss has the other sign: margins fall first"),
        _pairs("aot", "AOT", links, rate=2e-4),
        _pairs("aot_unpaired", "AOT unpaired", links, rate=1e-4),
        _pairs("beta_dpo", "β-DPO", noise),
        _pairs("cdpo", "cDPO", noise),
        _pairs("rdpo_robust", "robust DPO", noise),
        _pairs("rlaif_soft", "soft labels", noise, data="soft_pairs"),
        _pairs("rpo_bwd_kl", "reward-aware PO", noise, data="soft_pairs"),
        _pairs("wpo", "WPO", noise),
        _pairs("dpop", "DPOP", kept, options={"pos_penalty": 1.0}),
        _pairs("rpo", "DPO + SFT", kept),
        _pairs("iterative_rpo", "iterative RPO's loss", kept),
        _pairs("cpo", "CPO", kept),
        _pairs("orpo", "ORPO", kept, knob="pair_weight", beta=1.0, grid=(0.3, 1.0, 3.0)),
        _pairs("nca_pair", "NCA on pairs", kept, **_STOPS),
        _pairs("sppo_hard", "SPPO's loss", kept, **_STOPS),
        _pairs("tdpo1", "TDPO1", length, method="tdpo"),
        _pairs("tdpo2", "TDPO2", length, method="tdpo"),
        _pairs("r_dpo", "R-DPO", length),
        _pairs("ln_dpo", "LN-DPO", length, rate=2e-4, beta=15.0, grid=(5.0, 15.0, 45.0)),
        _pairs("ld_dpo", "LD-DPO", length),
        _pairs("simpo", "SimPO", length, rate=2e-4, beta=2.5, grid=(1.0, 2.5, 5.0)),
        _pairs("kto", "KTO", single, method="kto", data="labels"),
        _pairs("bco", "BCO", single, method="bco", data="labels", **_STOPS),
        _pairs("dro", "DRO-V", single, method="dro", data="scores", knob="tau", **_STOPS),
        _pairs("apo_zero_unpaired", "APO-zero", single, method="kto", data="labels", rate=1e-4),
        _pairs("lipo", "LiPO", lists, method="listwise", data="lists"),
        *(_pairs(name, shown, lists, method="listwise", data="lists", **_STOPS) for name, shown in (
            ("plackett_luce", "Plackett-Luce DPO"), ("infonca", "InfoNCA"), ("nca", "NCA"), ("exo_list", "EXO on lists"))),
        _pairs("rrhf", "RRHF", lists, method="listwise", data="lists", beta=None, knob=""),
        _pairs("pro", "PRO", lists, method="listwise", data="lists", beta=None, knob=""),
        Entry("sdpo", "sDPO", stages, tuple(Stage("dpo", "sdpo", "pairs", **half) for _ in range(2)), 0.5, _GRID),
        Entry("staged", "labels, pairs, lists", stages,
              tuple(Stage(method, loss, data, rate=1e-4, share=1 / 3)
                    for method, loss, data in (("kto", "kto", "labels"), ("dpo", "dpo", "pairs"), ("listwise", "lipo", "lists"))), 0.5, _GRID,
              note="Feedback of rising cost: a third of the budget as labels, then as pairs, then as lists; each stage starts from the one before."),
        Entry("tr_dpo", "TR-DPO", stages, (Stage("dpo", "dpo", "pairs", settings={"ref_update_every": 10, "ref_mix": 0.6}),), 0.5, _GRID,
              recipe="tr_dpo",
              note="The reference takes over 0.6 of the policy's weights after every tenth step, so KL to the SFT model is not what holds it."),
        Entry("iterative_dpo", "iterative DPO", stages,
              (Stage("dpo", "iterative_dpo", "pairs", rate=2e-4, **half),
               Stage("dpo", "iterative_dpo", "pairs", rate=2e-4, fresh=True, held_to_sft=True, **half)),
              0.5, _GRID),
        Entry("sppo", "SPPO, iterated", stages,
              (Stage("dpo", "sppo", "soft_pairs", **half), Stage("dpo", "sppo", "soft_pairs", fresh=True, **half)), **_STOPS),
        Entry("gpo_global", "group-robust DPO", stages,
              (Stage("dpo", "dpo", "pairs", settings={"task_weights": "robust", "task_step": 0.1}),), 0.5, _GRID, recipe="gpo_global",
              note="The tasks are three kinds of product, unequal in number; the one of the largest loss gains weight."),
        Entry("dno_prct", "DNO-Prct", stages,
              (Stage("dpo", "dno_prct", "best_worst", **half), Stage("dpo", "dno_prct", "best_worst", fresh=True, **half)), **_STOPS),
        Entry("self_rewarding", "self-rewarding", stages,
              (Stage("dpo", "self_rewarding", "pairs", **half),
               Stage("dpo", "self_rewarding", "best_worst", fresh=True, judges_itself=True, **half)), 0.5, _GRID,
              recipe="self_rewarding",
              note="The annotator labels the first half only. A model of letters cannot be asked for a verdict, so the policy rates its own responses "
                   "by its implicit reward (Chen et al. 2024, arXiv 2406.09760)."),
        Entry("best_of_n", "SFT on the best", stages, (Stage("sft", "sft", "best", knob="", rate=1e-3),), recipe="sft",
              note="Best-of-n distillation: of four responses to a prompt the best is imitated."),
        Entry("paft", "PAFT", stages,
              (Stage("sft", "sft", "best", settings={"l1_coef": 0.1}, from_sft=True, knob="", rate=1e-3, **half),
               Stage("dpo", "dpo", "pairs", from_sft=True, **half)), 0.2, (0.1, 0.2, 0.5), recipe="paft",
              merge={"method": "ties", "density": 0.5},
              note="Both halves start from the SFT model, and what they learn is merged by TIES."),
        Entry("rm_ppo", "reward model, PPO", stages,
              (Stage("reward", "bt_rm", "pairs", from_sft=True, gives="reward_model", knob="", rate=1e-3), Stage("ppo", from_sft=True, **ppo)),
              0.05, (0.02, 0.05, 0.1), note="All labels train the reward model, which scores PPO's samples in the annotator's place."),
        Entry("rlaif_distilled", "RLAIF, distilled", stages,
              (Stage("reward", "bt_rm", "soft_pairs", from_sft=True, gives="reward_model", knob="", rate=1e-3), Stage("ppo", from_sft=True, **ppo)),
              0.05, (0.02, 0.05, 0.1), recipe="rlaif_distilled",
              note="The reward model learns from soft labels, as a judge gives them; so does Constitutional AI's."),
        Entry("instructgpt", "InstructGPT", stages,
              (Stage("reward", "kwise_rm", "lists", from_sft=True, gives="reward_model", knob="", rate=1e-3),
               Stage("ppo", settings={"ptx_coef": 0.1}, from_sft=True, **ppo)), 0.05, (0.02, 0.05, 0.1), recipe="instructgpt"),
        Entry("anthropic_hh", "Anthropic HH, iterated", stages,
              (Stage("reward", "bt_rm", "pairs", from_sft=True, gives="reward_model", knob="", rate=1e-3, **half), Stage("ppo", from_sft=True, **ppo, **half),
               Stage("reward", "bt_rm", "pairs", fresh=True, from_sft=True, gives="reward_model", knob="", rate=1e-3, **half),
               Stage("ppo", held_to_sft=True, **ppo, **half)), 0.05, (0.02, 0.05, 0.1), recipe="anthropic_hh",
              note="The second reward model is trained on comparisons of the first policy's samples."),
        Entry("rto", "RTO", stages,
              (Stage("dpo", "dpo", "pairs", options={"beta": 0.5}, knob="", gives="dpo_model", **half),
               Stage("ppo", settings={"preset": "rto"}, from_sft=True, **ppo, **half)), 0.03, (0.01, 0.03, 0.1),
              recipe="rto",
              note="Half of the labels train a DPO model, whose log-ratio to the reference is PPO's reward per token beside the score."),
        _online("ppo", "PPO", **_KL, rate=1e-3),
        _online("ppo_ptx", "PPO-ptx", method="ppo", settings={"ptx_coef": 0.1}, **_KL, rate=1e-3,
                note="The SFT model's corpus is mixed in (`ptx_coef` times its mean token loss)."),
        _online("grpo", "GRPO", **_KL),
        _online("dapo", "DAPO", method="grpo", loss="dapo", **_KL),
        _online("rloo", "RLOO", **_KL),
        _online("reinforce_pp", "REINFORCE++", **_KL, rate=1e-3),
        _online("online_dpo", "online DPO (OAIF)", loss="online_dpo", beta=0.1, grid=_STOPS["grid"]),
        _online("dno", "DNO", method="online_dpo", loss="dno", beta=0.1, grid=_STOPS["grid"],
                settings={"label_temperature": 0.2, "ref_update_every": 10, "ref_mix": 1.0}),
        _online("xpo", "XPO", beta=0.1, grid=_STOPS["grid"]),
        _online("nash_md", "Nash-MD", settings={"label_temperature": 0.2}, scored=2, **_KL),
        _online("online_ipo", "online IPO", method="online_dpo", loss="ipo", **tau),
    ]  # fmt: skip


ENTRIES: Mapping[str, Entry] = {entry.name: entry for entry in _rows()}
