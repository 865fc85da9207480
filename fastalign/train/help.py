"""What `fastalign train METHOD --help` says before its options: what the method is, its formula and paper, a line of its data, and a command that runs.

Read without importing torch's or transformers' heavy parts, as the tables of methods are."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from typing import NamedTuple

from fastalign.train.config import RunConfig, flag_of


class Page(NamedTuple):
    """A method in five lines. `data`: one line of the data file. `command`: it runs as it stands, given such a file and a model in ./model."""

    what: str
    formula: str
    paper: str
    data: str
    command: str


_PAIR = '{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}'
_LABEL = '{"prompt": "The sky is", "completion": " green.", "label": false}'
_SCORE = '{"prompt": "The sky is", "completion": " green.", "score": 0.25}'
_LIST = '{"prompt": "The sky is", "completions": [" blue.", " grey.", " green."], "scores": [1.0, 0.6, 0.0]}'
_PROMPT = '{"prompt": "2 + 2 =", "answer": "4"}'
_D = "D = log pi(y|x) - log ref(y|x), summed over the response's tokens"


def _offline(method: str, data: str) -> str:
    return f"fastalign train {method} --model model --data {data}.jsonl --output out-{method}"


def _online(method: str) -> str:
    return f"fastalign train {method} --model model --data prompts.jsonl --reward-model reward --output out-{method}"


PAGES: dict[str, Page] = {
    "dpo": Page(
        "Direct preference optimisation on pairs, and every other loss of pairs (--loss NAME, or a mixture: --loss sigmoid=0.8,sft=1.0).",
        f"-log sigmoid(beta (D_chosen - D_rejected)), {_D}; other losses: fastalign losses",
        "Rafailov et al. 2023, arXiv 2305.18290",
        _PAIR,
        _offline("dpo", "pairs") + " --set beta=0.1",
    ),
    "tdpo": Page(
        "Token-level DPO on pairs: a margin from the exact KL between whole next-token distributions, to a live reference (--loss tdpo2, tdpo1).",
        "-log sigmoid(beta (D_chosen - D_rejected) - beta alpha (K_rejected - stop[K_chosen])), K = sum over tokens of KL(ref || pi)",
        "Zeng et al. 2024, arXiv 2404.11999",
        _PAIR,
        _offline("tdpo", "pairs") + " --set alpha=0.5",
    ),
    "kto": Page(
        "Kahneman-Tversky optimisation on single responses with a label, good or bad (--loss kto, apo_zero_unpaired).",
        f"good: w_d (1 - sigmoid(beta D - z)); bad: w_u (1 - sigmoid(z - beta D)); {_D}; z: mean beta D of mismatched pairs, at least 0",
        "Ethayarajh et al. 2024, arXiv 2402.01306",
        _LABEL,
        _offline("kto", "responses") + " --set undesirable_weight=1.5",
    ),
    "bco": Page(
        "Binary classifier optimisation on single responses with a label, good or bad.",
        f"good: -log sigmoid(beta D - delta); bad: -log sigmoid(delta - beta D); {_D}; delta: mean beta D of all responses seen",
        "Jung et al. 2024, arXiv 2404.04656",
        _LABEL,
        _offline("bco", "responses") + " --set beta=0.01",
    ),
    "dro": Page(
        "Direct reward optimisation on single responses with a score (or a label, taken as 1 or 0), with a value head V.",
        f"(r - V(x) - tau D)^2 / 2, {_D}",
        "Richemond et al. 2024, arXiv 2405.19107",
        _SCORE,
        _offline("dro", "responses") + " --set tau=1.0",
    ),
    "listwise": Page(
        "Ranked lists of responses with a score each (--loss plackett_luce, rrhf, pro, lipo, infonca, nca, exo_list).",
        f"plackett_luce: sum over ranks k of logsumexp(s_k, ..., s_K) - s_k, s = beta D, best first; {_D}",
        "Rafailov et al. 2023, arXiv 2305.18290; of the others: fastalign losses",
        _LIST,
        _offline("listwise", "lists") + " --loss plackett_luce",
    ),
    "reward": Page(
        "A reward model r, a sequence classifier with one label, from pairs (--loss bt_rm) or ranked lists (--loss kwise_rm).",
        "bt_rm: -log sigmoid(r(chosen) - r(rejected) - margin) + centering (r(chosen) + r(rejected))^2",
        "Ouyang et al. 2022, arXiv 2203.02155",
        _PAIR,
        _offline("reward", "pairs") + " --set centering=0.01",
    ),
    "ppo": Page(
        "RLHF by PPO: responses sampled from the model, scored, advantages by GAE on a value head (--preset instructgpt, anthropic_hh, rto).",
        "-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + vf_coef value loss, rho = pi(token) / pi_old(token); reward: score - kl_coef KL",
        "Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155",
        _PROMPT,
        _online("ppo") + " --kl-coef 0.05",
    ),
    "grpo": Page(
        "RLHF without a value head: a response's reward against those of other samples for the same prompt (--loss dapo, gspo, dr_grpo, ...).",
        "PPO's clipped objective with A = (r - mean of the group) / (std of the group + 1e-4)",
        "Shao et al. 2024, arXiv 2402.03300",
        _PROMPT,
        _online("grpo") + " --samples-per-prompt 8",
    ),
    "rloo": Page(
        "RLHF without a value head: a response's reward against the mean of the other samples for the same prompt.",
        "-A log pi(y|x) by one ratio per response, A = r - mean of the others",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        _PROMPT,
        _online("rloo") + " --samples-per-prompt 4",
    ),
    "reinforce_pp": Page(
        "REINFORCE++: PPO's clipped objective with whitened returns as advantages, without a value head.",
        "A_t = (G_t - mean) / std over the batch, G_t = sum from t on of the token rewards (score at the end, -kl_coef KL everywhere)",
        "Hu et al. 2025, arXiv 2501.03262",
        _PROMPT,
        _online("reinforce_pp") + " --kl-coef 0.01",
    ),
    "online_dpo": Page(
        "DPO, or another loss of pairs, on the best and the worst of several samples of the model in training.",
        f"-log sigmoid(beta (D_best - D_worst)), {_D}",
        "Guo et al. 2024, arXiv 2402.04792",
        _PROMPT,
        _online("online_dpo") + " --samples-per-prompt 4",
    ),
}

# How --help groups the settings; a test holds that each stands in one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "model, data, output": ("model", "data", "output", "overwrite", "resume", "ref_model", "precompute_ref", "trust_remote_code"),
    "loss": ("loss", "loss_options", "preset", "entropy_coef", "vf_coef", "value_clip", "ptx_data", "ptx_coef", "ptx_batch"),
    "reward": (
        "reward_model", "reward", "reward_clip", "missing_eos_penalty", "whiten_rewards", "overlong_buffer", "scale_rewards",
        "drop_equal_groups", "mask_truncated", "gamma", "lam", "bootstrap_truncated", "dpo_model", "dpo_coef", "dpo_clip",
    ),
    "KL to the reference": ("kl_coef", "kl_in", "kl_kind", "kl_target", "kl_horizon", "ref_update_every", "ref_mix", "target_kl"),
    "sampling": ("samples_per_prompt", "max_new_tokens", "temperature", "top_p", "top_k", "sample_batch"),
    "which examples": ("eval_data", "eval_fraction", "max_length", "overlong", "template_options", "seed"),
    "steps": (
        "batch_size", "tokens_per_batch", "epochs", "max_steps", "minibatches", "rollout_epochs", "learning_rate", "warmup_ratio",
        "weight_decay", "max_grad_norm",
    ),
    "machine": ("device", "dtype", "attention"),
    "log and checkpoints": (
        "log_every", "eval_every", "save_every", "keep_checkpoints", "token_metrics", "tensorboard", "progress",
    ),
}  # fmt: skip

REQUIRED = ("model", "data", "output")


def group_of(name: str) -> str:
    return next(title for title, names in GROUPS.items() if name in names)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, up to what reads well; text that stands for itself is left alone."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=max(80, min(shutil.get_terminal_size((120, 24)).columns, 120)))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0][2:]}"
        return super()._format_action_invocation(action)


def loss_options() -> frozenset[str]:
    """Every name that --set takes for some loss."""
    from fastalign import losses
    from fastalign.losses import list as list_preset
    from fastalign.losses import pair as preset
    from fastalign.losses import policy as policy_losses

    own = {name for p in (*losses.PRESETS.values(), *losses.LISTWISE.values()) for name in p.options}
    fields = {f.name for kind in (preset.Preset, list_preset.ListPreset, policy_losses.PolicyPreset) for f in dataclasses.fields(kind)}
    unpaired = {"desirable_weight", "undesirable_weight", "momentum", "tau", "rescale", "standardise", "centering", "clamp"}
    return frozenset(own | fields | unpaired) - {"name", "formula", "paper", "trl", "options"}


def usage(method: str, kind: type[RunConfig]) -> str:
    """Every flag stands in its group below; the usage line names those without which nothing runs."""
    given = " ".join(f"{flag_of(name, kind)} {kind.__dataclass_fields__[name].metadata['metavar']}" for name in REQUIRED)
    return f"fastalign train {method} {given} [--loss NAME] [--set OPTION=VALUE ...] [OPTION ...]"


def description(method: str) -> str:
    page = PAGES[method]
    return (
        f"{page.what}\n\n  loss     {page.formula}\n  paper    {page.paper}\n  data     {page.data}\n  command  {page.command}\n\n"
        f"The data formats and recipes are in docs/training{'_online' if page.data == _PROMPT else ''}.md."
    )
