"""The named preference losses: one row of data per method, all evaluated by the one pair kernel of
`fastalign.losses.pair`, and the listwise ones, evaluated by the list kernel of `fastalign.losses.list`.

`get(name)` returns a `Preset` (`get_listwise(name)` a `ListPreset`); `preset.replace(link="hinge",
length_norm=1.0)` composes another loss from the same parts; any loss function takes a name or a preset.

Notation of the formulas: A = sum of the policy's log-probs over the response, D = sum of policy minus reference, L = number of response tokens,
K = sum of KL(ref || policy); _c chosen, _r rejected; a = D (or A), u = beta a, h = beta (D_c - D_r); sp = softplus, sg = sigmoid. Of lists:
r = score, s = beta a (a a mean over tokens where the table says so), K = number of responses, p = softmax(r / alpha), q = softmax(s), rank:
1 for the largest s.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fastalign.losses.list import ListPreset
from fastalign.losses.pair import Preset

# Options of methods: a field's name, or one of `Preset.OWN`.
_SMOOTHING = {
    "label_smoothing": "smooth_labels"
}  # of losses whose published trainers have it beside the hard label
_GAMMA = {"gamma": "gamma_itself"}
_POINTS = {"pair_weight": 0.0}


def _rows() -> list[Preset]:
    dpo = "Rafailov et al. 2023, arXiv 2305.18290"
    gpo = "Tang et al. 2024, arXiv 2402.05749"
    f_dpo = "Wang et al. 2023, arXiv 2309.16240"
    reward_aware = "Adler et al. 2024, arXiv 2406.11704"
    tdpo = "Zeng et al. 2024, arXiv 2404.11999"
    return [
        # --- the DPO logit under other links and labels
        Preset("dpo", "sp(-h)", dpo, "sigmoid", options=_SMOOTHING),
        Preset("cdpo", "(1 - e) sp(-h) + e sp(h)", "Mitchell 2023, ericmitchell.ai/cdpo.pdf", labels="smooth", label_smoothing=0.1),
        Preset("rdpo_robust", "((1 - e) sp(-h) - e sp(h)) / (1 - 2e)", "Chowdhury et al. 2024, arXiv 2403.00409", "robust", labels="robust",
               label_smoothing=0.1),
        Preset("ipo", "(D_c / L_c - D_r / L_r - 1 / (2 tau))^2", "Azar et al. 2023, arXiv 2310.12036", "ipo", beta=1.0, length_norm=1.0,
               link="squared", target=5.0, options={"tau": "inverse_tau", "beta": "say_tau"}),
        Preset("hinge_norm", "relu(1 - h)", "Liu et al. 2023 (RSO), arXiv 2309.06657", "hinge", beta=0.05, link="hinge"),
        Preset("slic_hf", "relu(delta - A_c + A_r) - sft_weight A_c", "Zhao et al. 2023, arXiv 2305.10425", beta=1.0, reference=False,
               link="hinge", sft_weight=0.1, sft_norm="seq_sum", options={"delta": "target"}),
        *(Preset(f"gpo_{link}", formula, gpo, link=link) for link, formula in (
            ("logistic", "sp(-h)"), ("hinge", "relu(1 - h)"), ("squared", "(h - 1)^2"), ("exp", "e^-h"), ("truncquad", "relu(1 - h)^2"),
            ("savage", "1 / (1 + e^h)^2"))),
        Preset("exo_pair", "KL(Bernoulli(sg(h)), Bernoulli(1 - e))", "Ji et al. 2024, arXiv 2402.00856", "exo_pair", link="exo",
               label_smoothing=1e-3),
        Preset("discopop", "(1 - s) sp(-h) + s e^-h, s = sg(h / tau)", "Lu et al. 2024, arXiv 2406.08414", "discopop", beta=0.05, link="discopop",
               options={"tau": "link_tau"}),
        # --- soft labels: P = soft_labels
        Preset("dno", "P sp(-h) + (1 - P) sp(h)", "Rosset et al. 2024, arXiv 2404.03715", labels="soft"),
        Preset("rlaif_soft", "P sp(-h) + (1 - P) sp(h)", "Lee et al. 2023, arXiv 2309.00267", labels="soft"),
        Preset("rpo_bwd_kl", "KL(Bernoulli(P), Bernoulli(sg(h)))", reward_aware, labels="soft", label_entropy=True),
        Preset("rpo_fwd_kl", "KL(Bernoulli(sg(h)), Bernoulli(P))", reward_aware, labels="soft", link="exo"),
        Preset("rpo_sq", "(h - target)^2, target = eta (r_c - r_r) per pair", reward_aware, link="squared", target=1.0, requires=("target",)),
        # --- rules that look at the whole batch (state= a rule of fastalign.preference.rules; omega= from wpo_weights)
        Preset("beta_dpo", "sp(-beta_batch (D_c - D_r)) over the kept pairs", "Wu et al. 2024, arXiv 2407.08639", rule="beta_dpo"),
        Preset("alpha_dpo", "sp(-beta (A_c / L_c - A_r / L_r - stop[alpha z + gamma_beta_ratio]))", "Wu et al. 2024, arXiv 2410.10148", beta=2.5,
               reference=False, length_norm=1.0, gamma_beta_ratio=0.3, rule="alpha_dpo", options=_GAMMA),
        Preset("wpo", "omega sp(-h), omega = min(1, exp(v_c + v_r))", "Zhou et al. 2024, arXiv 2406.11827", beta=0.01, requires=("omega",),
               weights="wpo_weights"),
        Preset("aot", "(1 - e) sp(-d) + e sp(d), d_i = beta (sort(A_c - A_r)_i - sort(R_c - R_r)_i)", "Melnyk et al. 2024, arXiv 2406.05882", "aot",
               beta=0.01, order="paired", options=_SMOOTHING),
        Preset("aot_unpaired", "(1 - e) sp(-d) + e sp(d), d_i = beta (sort(D_c)_i - sort(D_r)_i)", "Melnyk et al. 2024, arXiv 2406.05882",
               "aot_unpaired", beta=0.01, order="unpaired", options=_SMOOTHING),
        # --- other margins
        Preset("dpop", "sp(-(h - beta pos_penalty relu(-D_c)))", "Pal et al. 2024, arXiv 2402.13228", beta=0.3, pos_penalty=50.0),
        Preset("r_dpo", "sp(-(h + alpha (L_c - L_r)))", "Park et al. 2024, arXiv 2403.19159", len_coef=0.05, options={"alpha": "len_coef"}),
        Preset("odpo", "sp(-(h - gamma_ext)), gamma_ext = alpha log(score gap) per pair", "Amini et al. 2024, arXiv 2402.10571", requires=("gamma_ext",)),
        Preset("tdpo1", "sp(-(h - beta (K_r - K_c)))", tdpo, kl_chosen=1.0, kl_rejected=1.0),
        Preset("tdpo2", "sp(-(h - beta alpha (K_r - stop[K_c])))", tdpo, kl_chosen=0.5, kl_rejected=0.5, detach_kl_chosen=True,
               options={"alpha": "both_kls"}),
        # --- other aggregates
        Preset("ln_dpo", "sp(-beta (D_c / L_c - D_r / L_r))", "Lambert et al. 2024 (Tulu 3), arXiv 2411.15124", "sigmoid_norm", beta=5.0,
               length_norm=1.0),
        Preset("ld_dpo", "sp(-h), tokens beyond min(L_c, L_r) weighted by ld_alpha", "Liu et al. 2024, arXiv 2409.06411", ld_alpha=0.5),
        Preset("f_dpo_js", "sp(-beta (g_c - g_r)), g = log sg(D)", f_dpo, transform="logsig"),
        Preset("f_dpo_fkl", "sp(-beta (g_c - g_r)), g = -e^-D", f_dpo, transform="negexp"),
        Preset("f_dpo_alpha", "sp(-beta (g_c - g_r)), g = (1 - e^(-alpha D)) / alpha", f_dpo, transform="alpha", transform_alpha=0.5,
               options={"alpha": "transform_alpha"}),
        Preset("d2o", "sp(-(beta D_c - alpha D_r)), D_c averaged over self-samples", "Duan et al. 2024, arXiv 2403.03419", beta_rejected=0.1,
               options={"alpha": "beta_rejected"}),
        # --- without a reference
        Preset("simpo", "sp(-(beta (A_c / L_c - A_r / L_r) - gamma)), gamma = gamma_beta_ratio beta", "Meng et al. 2024, arXiv 2405.14734",
               beta=2.5, reference=False, length_norm=1.0, gamma_beta_ratio=0.55, options=_GAMMA | _SMOOTHING),
        Preset("cpo", "sp(-beta (A_c - A_r)) + NLL_c", "Xu et al. 2024, arXiv 2401.08417", reference=False, sft_weight=1.0,
               options=_SMOOTHING),
        Preset("cpo_simpo", "sp(-(beta (A_c / L_c - A_r / L_r) - gamma)) + NLL_c / L_c", "Xu et al. 2024, github.com/fe1ixxu/CPO_SIMPO", beta=2.0,
               reference=False, length_norm=1.0, gamma_beta_ratio=0.5, sft_weight=1.0, sft_norm="seq_mean", options=_GAMMA | _SMOOTHING),
        Preset("alphapo", "sp(-(beta (g_c - g_r) - gamma)), g = (1 - e^(-alpha A / L)) / alpha", "Gupta et al. 2025, arXiv 2501.03884", beta=2.5,
               reference=False, length_norm=1.0, transform="alpha", transform_alpha=0.25, gamma=0.1,
               options={"alpha": "transform_alpha"} | _SMOOTHING),
        Preset("orpo", "pair_weight sp(-(o(A_c / L_c) - o(A_r / L_r))) + NLL_c, o(a) = log(e^a / (1 - e^a))", "Hong et al. 2024, arXiv 2403.07691",
               beta=1.0, reference=False, length_norm=1.0, transform="logodds", pair_weight=0.1, sft_weight=1.0,
               options={"beta": "say_pair_weight"}),
        Preset("rrhf_pair", "relu(A_r / L_r - A_c / L_c)", "Yuan et al. 2023, arXiv 2304.05302", beta=1.0, reference=False, length_norm=1.0,
               link="hinge", target=0.0),
        Preset("bt_rm", "sp(-(r_c - r_r - gamma_ext)) on reward-model scores r in place of A", "Ouyang et al. 2022, arXiv 2203.02155", beta=1.0,
               reference=False, of_scores=True),
        Preset("sft", "NLL_c", "", "sft", reference=False, pair_weight=0.0, sft_weight=1.0),
        # --- DPO plus SFT: three methods called RPO
        Preset("rpo", "sp(-h) + alpha NLL_c", dpo, sft_weight=1.0, options={"alpha": "sft_weight"}),
        Preset("iterative_rpo", "sp(-h) + alpha NLL_c / L_c", "Pang et al. 2024, arXiv 2404.19733", sft_weight=1.0, sft_norm="seq_mean",
               options={"alpha": "sft_weight"}),
        Preset("regularized_po", "sp(-h) + sft_weight NLL_c", "Liu et al. 2024, arXiv 2405.16436", beta=0.01, sft_weight=0.005),
        # --- point terms: chosen and rejected each against an anchor
        Preset("nca_pair", "sp(-u_c) + (sp(u_c) + sp(u_r)) / 2", "Chen et al. 2024, arXiv 2402.05369", "nca_pair", beta=0.01,
               point_link="logistic", point_chosen=(1.0, 0.5), point_rejected=(0.0, 0.5), **_POINTS),
        Preset("bco_pair", "sp(-(u_c - delta)) + sp(u_r - delta)", "Jung et al. 2024, arXiv 2404.04656", "bco_pair", beta=0.01,
               point_link="logistic", point_chosen=(1.0, 0.0), point_rejected=(0.0, 1.0), options={"delta": "anchor"}, **_POINTS),
        Preset("bco", "bco_pair with delta = running mean of u over all responses seen", "Jung et al. 2024, arXiv 2404.04656", beta=0.01,
               point_link="logistic", point_chosen=(1.0, 0.0), point_rejected=(0.0, 1.0), rule="bco", **_POINTS),
        Preset("apo_zero", "sg(-u_c) + sg(u_r)", "D'Oosterlinck et al. 2024, arXiv 2408.06266", "apo_zero", point_link="sigmoid",
               point_chosen=(1.0, 0.0), point_rejected=(0.0, 1.0), **_POINTS),
        Preset("apo_down", "sg(u_c) + sg(u_r - u_c)", "D'Oosterlinck et al. 2024, arXiv 2408.06266", "apo_down", link="sigmoid",
               point_link="sigmoid", point_chosen=(0.0, 1.0)),
        Preset("sppo", "((D_c - (P - 1/2) / beta)^2 + (D_r - (1/2 - P) / beta)^2) / 2, P = soft_labels, else 1", "Wu et al. 2024, arXiv 2405.00675",
               beta=1e-3, point_link="squared", point_chosen=(0.5, 0.0), point_rejected=(0.5, 0.0), point_beta_power=-2.0, point_target="soft",
               **_POINTS),
        Preset("sppo_hard", "(D_c - 1 / (2 beta))^2 + (D_r + 1 / (2 beta))^2: sppo with P = 1, times 2", "Wu et al. 2024, arXiv 2405.00675", "sppo_hard",
               beta=1e-3, point_link="squared", point_chosen=(1.0, 0.0), point_rejected=(0.0, 1.0), point_beta_power=-2.0, point_target=0.5,
               **_POINTS),
        Preset("npo", "(2 / beta) sp(u_r)", "Zhang et al. 2024, arXiv 2404.05868", point_link="logistic", point_rejected=(0.0, 2.0),
               point_beta_power=-1.0, **_POINTS),
        # --- DPO on other data or with other references (the trainer's schedules)
        *(Preset(name, "sp(-h)", paper) for name, paper in (
            ("dno_prct", "Rosset et al. 2024, arXiv 2404.03715"), ("online_dpo", "Guo et al. 2024, arXiv 2402.04792"),
            ("iterative_dpo", "Xiong et al. 2023, arXiv 2312.11456"), ("sdpo", "Kim et al. 2024, arXiv 2403.19270"),
            ("self_rewarding", "Yuan et al. 2024, arXiv 2401.10020"))),
    ]  # fmt: skip


# Methods whose loss is dpo's and whose own part is the loop around it, which no loss can run: name -> that
# loop.
LOOPS: Mapping[str, str] = MappingProxyType(
    {
        "dno_prct": "sample from the last model, score, pair the best sample with worse ones, train, again",
        "online_dpo": "sample two responses from the model in training, let a judge choose, train on the pair ('fastalign train online_dpo')",
        "iterative_dpo": "sample from the last model, label pairs by a reward model, train, again",
        "sdpo": "train on the data part by part, easy to hard; each part's reference is the model that the part before it gave",
        "self_rewarding": "the last model answers and judges its own answers; train on the pairs, again",
    }
)

# How TRL 1.16 spells a loss that is no loss_type of its DPOTrainer under one name; each is held by
# tests/losses/test_trl*.py. (CPO): the CPOTrainer.
TRL_FORMS: Mapping[str, str] = MappingProxyType({
    "gpo_logistic": "sigmoid", "gpo_hinge": "hinge",
    "wpo": "sigmoid, use_weighting=True (clamp=None)",
    "ld_dpo": "sigmoid, ld_alpha",
    "f_dpo_js": "sigmoid, f_divergence_type=js_divergence",
    "f_dpo_fkl": "sigmoid, f_divergence_type=forward_kl",
    "f_dpo_alpha": "sigmoid, f_divergence_type=alpha_divergence with 1 - alpha",
    "rpo": "sigmoid + alpha sft", "regularized_po": "sigmoid + sft_weight sft",
    "simpo": "simpo (CPO), cpo_alpha=0, simpo_gamma=gamma", "cpo": "sigmoid (CPO)",
    "cpo_simpo": "simpo (CPO), where sft_norm is token_mean_global", "alphapo": "alphapo (CPO), simpo_gamma=gamma",
    "orpo": "ORPOTrainer, beta=pair_weight, where sft_include_prompt",
    "bt_rm": "RewardTrainer",
    **dict.fromkeys(LOOPS, "sigmoid"),
})  # fmt: skip

PRESETS: Mapping[str, Preset] = MappingProxyType({p.name: p for p in _rows()})
# TRL's names where the meaning is the same, and a method's second name.
ALIASES: Mapping[str, str] = MappingProxyType(
    {**{p.trl: p.name for p in PRESETS.values() if p.trl and p.trl not in PRESETS}, "rso": "hinge_norm"}
)


def _list_rows() -> list[ListPreset]:
    nca = "Chen et al. 2024, arXiv 2402.05369"
    alpha = {"alpha": "reward_temperature"}
    return [
        ListPreset("plackett_luce", "sum_k logsumexp(s_k, ..., s_K) - s_k, best to worst", "Rafailov et al. 2023, arXiv 2305.18290",
                   kind="plackett_luce"),
        ListPreset("rrhf", "sum over r_i < r_j of relu(s_i - s_j) + NLL_best / L_best", "Yuan et al. 2023, arXiv 2304.05302", beta=1.0,
                   reference=False, length_norm=1.0, link="hinge", target=0.0, sft_weight=1.0),
        ListPreset("pro", "sum_k logsumexp(s_k T_k, {s_i (r_k - r_i)}) - s_k T_k, T_k = r_k - min r, + sft_weight (K - 1)^2 NLL_best",
                   "Song et al. 2023, arXiv 2306.17492", beta=1.0, reference=False, length_norm=1.0, kind="pro", sft_weight=0.05,
                   sft_norm="seq_sum", sft_power=2.0),
        ListPreset("lipo", "sum over r_i > r_j of (2^r_i - 2^r_j) abs(1 / log(1 + rank_i) - 1 / log(1 + rank_j)) sp(-(s_i - s_j))",
                   "Liu et al. 2024, arXiv 2402.01878", beta=0.05, pair_gain="lambda"),
        ListPreset("infonca", "-sum p log q", nca, beta=0.01, kind="infonca", options=alpha),
        ListPreset("nca", "sum p sp(-s) + sp(s) / K", nca, beta=0.01, kind="nca", options=alpha),
        ListPreset("exo_list", "sum q (log q - log p)", "Ji et al. 2024, arXiv 2402.00856", kind="exo", options=alpha),
        ListPreset("kwise_rm", "mean over r_i > r_j of sp(-(s_i - s_j)), s: the reward model's scores", "Ouyang et al. 2022, arXiv 2203.02155",
                   beta=1.0, reference=False, pair_mean=True, of_scores=True),
    ]  # fmt: skip


LISTWISE: Mapping[str, ListPreset] = MappingProxyType({p.name: p for p in _list_rows()})


class UnpairedLoss(NamedTuple):
    """A loss of single responses with a label or score (`fastalign.unpaired_loss`). method: of `fastalign
    train`. mismatched: its baseline comes from prompts with other prompts' responses
    (`fastalign.kto_baseline`)."""

    method: str
    formula: str
    paper: str
    mismatched: bool = False


UNPAIRED: Mapping[str, UnpairedLoss] = MappingProxyType(
    {
        "kto": UnpairedLoss(
            "kto",
            "good: w_d (1 - sg(beta D - z)), bad: w_u (1 - sg(z - beta D))",
            "Ethayarajh et al. 2024, arXiv 2402.01306",
            mismatched=True,
        ),
        "apo_zero_unpaired": UnpairedLoss(
            "kto", "good: w_d sg(-beta D), bad: w_u sg(beta D)", "D'Oosterlinck et al. 2024, arXiv 2408.06266"
        ),
        "bco": UnpairedLoss(
            "bco",
            "good: sp(-(beta D - delta)), bad: sp(beta D - delta)",
            "Jung et al. 2024, arXiv 2404.04656",
        ),
        "dro": UnpairedLoss("dro", "(r - V(x) - tau D)^2 / 2", "Richemond et al. 2024, arXiv 2405.19107"),
    }
)
