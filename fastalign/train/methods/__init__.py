"""The table of methods: a row for each and, in `home`, a class that says how it learns.

Read without importing torch or transformers, so that `--help` answers at once."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastalign.train.config import RunConfig, TrainConfig
from fastalign.train.errors import UserError
from fastalign.train.online_config import OnlineConfig


class Page(NamedTuple):
    """What `fastalign train METHOD --help` says before its options. `data`: one line of the data file.
    `command`: it runs as it stands, given such a file and a model in ./model."""

    what: str
    formula: str
    paper: str
    data: str
    command: str


class Row(NamedTuple):
    """A method. `home`: "module:class", a `Method` or an `OnlineMethod`. `config`: the class of its
    configuration, which says what it learns from: a data file, or the policy's own samples. `settings`: those
    of `config` that it has beside the common ones; `defaults`: its own values for those that are None."""

    summary: str
    home: str
    config: type[RunConfig]
    settings: tuple[str, ...]
    page: Page
    defaults: Mapping[str, Any] = {}


_DEMONSTRATION = '{"prompt": "The sky is", "completion": " blue."}'
_PAIR = '{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}'
_LABEL = '{"prompt": "The sky is", "completion": " green.", "label": false}'
_SCORE = '{"prompt": "The sky is", "completion": " green.", "score": 0.25}'
_LIST = '{"prompt": "The sky is", "completions": [" blue.", " grey.", " green."], "scores": [1.0, 0.6, 0.0]}'
_PROMPT = '{"prompt": "2 + 2 =", "answer": "4"}'
_D = "D = log pi(y|x) - log ref(y|x), summed over the response's tokens"

_LOSS = ("loss", "loss_options")
_REFERENCED = (*_LOSS, "ref_model", "precompute_ref", "ref_update_every", "ref_mix", "token_metrics", "head")
_TASKS = ("task_weights", "task_weight", "task_temperature", "task_step")
_REWARD = (
    "reward_model", "reward", "judge", "reward_clip", "missing_eos_penalty", "ref_model",
    "ref_update_every", "ref_mix", "head",
)  # fmt: skip
_SAMPLING = ("samples_per_prompt", "max_new_tokens", "temperature", "top_p", "top_k", "sample_batch")
_COMPARED = ("preference", "label_temperature")  # of methods that learn from which response is better
_PAIRS = (*_COMPARED, "pair_margin", "length_penalty")
_UPDATES = (
    *_LOSS, "minibatches", "rollout_epochs", "target_kl", "entropy_coef", "ptx_data", "ptx_coef", "ptx_batch",
)  # fmt: skip
_KL = ("kl_coef", "kl_in", "kl_kind", "kl_target", "kl_horizon")
_GRADIENT = (*_REWARD, *_SAMPLING, *_UPDATES, *_KL)
_STEPS = ("gamma", "whiten_rewards")  # of methods whose advantages differ from token to token
_VALUES = (
    "lam",
    "vf_coef",
    "value_clip",
    "bootstrap_truncated",
    "dpo_model",
    "dpo_coef",
    "dpo_clip",
    "preset",
)
_GROUPS = ("overlong_buffer", "drop_equal_groups", "mask_truncated")
_ONCE = {"minibatches": 1, "rollout_epochs": 1, "entropy_coef": 0.0, "ptx_coef": 0.0, "samples_per_prompt": 1}


def _offline(method: str, data: str) -> str:
    return f"fastalign train {method} --model model --data {data}.jsonl --output out-{method}"


def _online(method: str) -> str:
    return f"fastalign train {method} --model model --data prompts.jsonl --reward-model reward --output out-{method}"


METHODS: dict[str, Row] = {
    "sft": Row(
        "texts to imitate: supervised fine-tuning on completions, conversations or documents",
        "sft:SFT",
        TrainConfig,
        (*_LOSS, "loss_on", "l1_coef", "token_metrics", "head"),
        Page(
            'Supervised fine-tuning on prompts with completions, on conversations ({"messages": [...]}) and '
            'on texts ({"text": ...}); --loss-on says which tokens are learnt.',
            "-(1/N) sum of log pi(token | those before it) over the N learnt tokens of a step",
            "Ouyang et al. 2022, arXiv 2203.02155; --l1-coef: Pentyala et al. 2024, arXiv 2406.17923",
            _DEMONSTRATION,
            _offline("sft", "demonstrations") + " --learning-rate 1e-5",
        ),
    ),
    "dpo": Row(
        "preference pairs: DPO and its variants (--loss)",
        "dpo:PreferenceMethod",
        TrainConfig,
        (*_REFERENCED, *_TASKS),
        Page(
            "Direct preference optimisation on pairs, and every other loss of pairs (--loss NAME, or a "
            "mixture: --loss sigmoid=0.8,sft=1.0).",
            f"-log sigmoid(beta (D_chosen - D_rejected)), {_D}; other losses: fastalign losses",
            "Rafailov et al. 2023, arXiv 2305.18290",
            _PAIR,
            _offline("dpo", "pairs") + " --set beta=0.1",
        ),
    ),
    "tdpo": Row(
        "preference pairs: token-level DPO (tdpo1, tdpo2)",
        "tdpo:TDPO",
        TrainConfig,
        (*_REFERENCED, *_TASKS),
        Page(
            "Token-level DPO on pairs: a margin from the exact KL between whole next-token distributions, to "
            "a live reference (--loss tdpo2, tdpo1).",
            "-log sigmoid(beta (D_chosen - D_rejected) - beta alpha (K_rejected - stop[K_chosen])), K = sum "
            "over tokens of KL(ref || pi)",
            "Zeng et al. 2024, arXiv 2404.11999",
            _PAIR,
            _offline("tdpo", "pairs") + " --set alpha=0.5",
        ),
    ),
    "kto": Row(
        "responses with a label: KTO (kto, apo_zero_unpaired)",
        "kto:KTO",
        TrainConfig,
        _REFERENCED,
        Page(
            "Kahneman-Tversky optimisation on single responses with a label, good or bad (--loss kto, "
            "apo_zero_unpaired).",
            f"good: w_d (1 - sigmoid(beta D - z)); bad: w_u (1 - sigmoid(z - beta D)); {_D}; z: mean beta D "
            "of mismatched pairs, at least 0",
            "Ethayarajh et al. 2024, arXiv 2402.01306",
            _LABEL,
            _offline("kto", "responses") + " --set undesirable_weight=1.5",
        ),
    ),
    "bco": Row(
        "responses with a label: BCO",
        "kto:BCO",
        TrainConfig,
        _REFERENCED,
        Page(
            "Binary classifier optimisation on single responses with a label, good or bad.",
            f"good: -log sigmoid(beta D - delta); bad: -log sigmoid(delta - beta D); {_D}; delta: mean beta D "
            "of all responses seen",
            "Jung et al. 2024, arXiv 2404.04656",
            _LABEL,
            _offline("bco", "responses") + " --set beta=0.01",
        ),
    ),
    "dro": Row(
        "responses with a label or score: DRO with a value head",
        "dro:DRO",
        TrainConfig,
        _REFERENCED,
        Page(
            "Direct reward optimisation on single responses with a score (or a label, taken as 1 or 0), with "
            "a value head V.",
            f"(r - V(x) - tau D)^2 / 2, {_D}",
            "Richemond et al. 2024, arXiv 2405.19107",
            _SCORE,
            _offline("dro", "responses") + " --set tau=1.0",
        ),
    ),
    "listwise": Row(
        "ranked lists of responses (--loss)",
        "listwise:Listwise",
        TrainConfig,
        _REFERENCED,
        Page(
            "Ranked lists of responses with a score each (--loss plackett_luce, rrhf, pro, lipo, infonca, "
            "nca, exo_list).",
            f"plackett_luce: sum over ranks k of logsumexp(s_k, ..., s_K) - s_k, s = beta D, best first; {_D}",
            "Rafailov et al. 2023, arXiv 2305.18290; of the others: fastalign losses",
            _LIST,
            _offline("listwise", "lists") + " --loss plackett_luce",
        ),
    ),
    "reward": Row(
        "reward model from pairs (bt_rm) or ranked lists (kwise_rm)",
        "reward:Reward",
        TrainConfig,
        (*_LOSS, "normalize_reward"),
        Page(
            "A reward model r, a sequence classifier with one label, from pairs (--loss bt_rm) or ranked "
            "lists (--loss kwise_rm).",
            "bt_rm: -log sigmoid(r(chosen) - r(rejected) - margin) + centering (r(chosen) + r(rejected))^2",
            "Ouyang et al. 2022, arXiv 2203.02155",
            _PAIR,
            _offline("reward", "pairs") + " --set centering=0.01",
        ),
    ),
    "ppo": Row(
        "RLHF by PPO with a value head",
        "ppo:PPO",
        OnlineConfig,
        (*_GRADIENT, *_STEPS, *_VALUES),
        Page(
            "RLHF by PPO: responses sampled from the model, scored, advantages by GAE on a value head "
            "(--preset instructgpt, anthropic_hh, rto).",
            "-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + vf_coef value loss, rho = pi(token) / "
            "pi_old(token); reward: score - kl_coef KL",
            "Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155",
            _PROMPT,
            _online("ppo") + " --kl-coef 0.05",
        ),
        _ONCE
        | {
            "minibatches": 4,
            "rollout_epochs": 4,
            "loss": "ppo",
            "kl_coef": 0.05,
            "kl_in": "reward",
            "kl_kind": "k1",
            "gamma": 1.0,
            "lam": 0.95,
            "vf_coef": 0.1,
            "value_clip": 0.2,
        },
    ),
    "grpo": Row(
        "RLHF by GRPO: rewards relative to other samples for the same prompt (--loss: dapo, gspo, dr_grpo, "
        "...)",
        "grpo:GRPO",
        OnlineConfig,
        (*_GRADIENT, *_GROUPS, "scale_rewards"),
        Page(
            "RLHF without a value head: a response's reward against those of other samples for the same "
            "prompt (--loss dapo, gspo, dr_grpo, ...).",
            "PPO's clipped objective with A = (r - mean of the group) / (std of the group + 1e-4)",
            "Shao et al. 2024, arXiv 2402.03300",
            _PROMPT,
            _online("grpo") + " --samples-per-prompt 8",
        ),
        _ONCE | {"samples_per_prompt": 8, "loss": "grpo", "kl_coef": 0.0, "kl_in": "loss", "kl_kind": "k3"},
    ),
    "rloo": Row(
        "RLHF by RLOO: rewards against the mean of the other samples for the same prompt",
        "grpo:RLOO",
        OnlineConfig,
        (*_GRADIENT, *_GROUPS),
        Page(
            "RLHF without a value head: a response's reward against the mean of the other samples for the "
            "same prompt.",
            "-A log pi(y|x) by one ratio per response, A = r - mean of the others",
            "Ahmadian et al. 2024, arXiv 2402.14740",
            _PROMPT,
            _online("rloo") + " --samples-per-prompt 4",
        ),
        _ONCE
        | {"samples_per_prompt": 4, "loss": "rloo", "kl_coef": 0.05, "kl_in": "reward", "kl_kind": "k1"},
    ),
    "reinforce_pp": Row(
        "RLHF by REINFORCE++: returns whitened over the batch, no value head",
        "ppo:ReinforcePP",
        OnlineConfig,
        (*_GRADIENT, *_STEPS),
        Page(
            "REINFORCE++: PPO's clipped objective with whitened returns as advantages, without a value head.",
            "A_t = (G_t - mean) / std over the batch, G_t = sum from t on of the token rewards (score at the "
            "end, -kl_coef KL everywhere)",
            "Hu et al. 2025, arXiv 2501.03262",
            _PROMPT,
            _online("reinforce_pp") + " --kl-coef 0.01",
        ),
        _ONCE | {"loss": "ppo", "kl_coef": 0.01, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0},
    ),
    "online_dpo": Row(
        "RLHF by DPO on pairs of samples (--pair-rule, --loss): OAIF, iterative DPO, SPPO, DNO, ...",
        "online_dpo:OnlineDPO",
        OnlineConfig,
        (*_REWARD, *_SAMPLING, *_LOSS, "pair_rule", *_PAIRS),
        Page(
            "DPO, or another loss of pairs, on pairs of samples of the model in training, by default the best "
            "and the worst; by a "
            "reward, or by a pairwise judge.",
            f"-log sigmoid(beta (D_better - D_worse)), {_D}",
            "Guo et al. 2024, arXiv 2402.04792",
            _PROMPT,
            _online("online_dpo") + " --samples-per-prompt 4",
        ),
        {"loss": "dpo", "samples_per_prompt": 2},
    ),
    "xpo": Row(
        "RLHF by XPO: a sample of the policy against one of the reference, with a bonus for exploring",
        "online_dpo:XPO",
        OnlineConfig,
        (*_REWARD, *_SAMPLING[1:], *_LOSS, *_PAIRS, "optimism_coef"),
        Page(
            "Exploratory preference optimisation: DPO, or another loss of pairs, on a sample of the policy "
            "and one of the reference, "
            "plus a term that leads away from the reference's.",
            f"-log sigmoid(beta (D_better - D_worse)) + alpha log pi(y_ref|x), {_D}",
            "Xie et al. 2024, arXiv 2405.21046",
            _PROMPT,
            _online("xpo") + " --optimism-coef 1e-5",
        ),
        {"loss": "dpo", "samples_per_prompt": 2},
    ),
    "nash_md": Row(
        "RLHF by Nash-MD: policy gradient on being preferred to a mixture of policy and reference",
        "nash_md:NashMD",
        OnlineConfig,
        (*(name for name in _GRADIENT if name != "reward_clip"), *_COMPARED, "mixture_coef"),
        Page(
            "Nash-MD: a sample y of the policy meets one, y', of the geometric mixture of policy and "
            "reference; policy gradient on "
            "the probability that y is better.",
            "-A_t log pi(y_t), A_t = P(y better than y') - 1/2 - kl_coef sum over s >= t of log pi(y_s) - log "
            "ref(y_s); y' ~ "
            "pi^(1 - mixture_coef) ref^mixture_coef",
            "Munos et al. 2023, arXiv 2312.00886",
            _PROMPT,
            _online("nash_md") + " --mixture-coef 0.5",
        ),
        _ONCE | {"loss": "reinforce", "kl_coef": 0.1, "kl_in": "reward", "kl_kind": "k1", "gamma": 1.0},
    ),
}


def of_kind(config: type[RunConfig]) -> tuple[str, ...]:
    """The names of the methods with this class of configuration."""
    return tuple(name for name, row in METHODS.items() if row.config is config)


_FUNCTIONS = {TrainConfig: "train", OnlineConfig: "train_online"}


def check_kind(name: str, config: Any, kind: type[RunConfig]) -> None:
    """Refuse a method or a configuration that belongs to the other function for training than that of
    `kind`."""
    function, row = _FUNCTIONS[kind], METHODS.get(name)
    if row is not None and row.config is not kind:
        raise UserError(
            f"{function} has no method {name!r}: call {_FUNCTIONS[row.config]}({name!r}, "
            f"{row.config.__name__}(...))"
        )
    if not isinstance(config, kind):
        other = _FUNCTIONS.get(type(config))
        hint = f", which belongs to {other}" if other else ""
        found = type(config).__name__
        raise UserError(
            f"{function}({name!r}, config): config must be an instance of {kind.__name__}, got {found}{hint}"
        )


def make_method(name: str, config: RunConfig, **options: Any) -> Any:
    """The method of this name for this configuration. Raises `UserError` for an unknown name, loss or
    option."""
    if name not in METHODS:
        legal = [other for other, row in METHODS.items() if isinstance(config, row.config)]
        raise UserError(f"unknown method {name!r}; legal: {', '.join(legal)}")
    module, attribute = METHODS[name].home.split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)(config, **options)
