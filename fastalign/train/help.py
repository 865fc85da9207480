"""What `fastalign train METHOD --help` says before its options: what the method is, its formula and paper, a
line of its data, and a command that runs.

Read without importing torch's or transformers' heavy parts, as the tables of methods are."""

from __future__ import annotations

import argparse
import shutil

from fastalign.train.config import RunConfig, flag_of
from fastalign.train.methods import Row
from fastalign.train.online_config import OnlineConfig

# How --help groups and orders the settings; a test holds that each stands in one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "model, data, output": (
        "model", "data", "output", "trust_remote_code", "resume", "overwrite", "ref_model", "precompute_ref",
    ),
    "loss": (
        "preset", "loss", "loss_options", "loss_on", "l1_coef", "entropy_coef", "ptx_data", "ptx_coef", "ptx_batch", "vf_coef", "value_clip",
        "optimism_coef", "normalize_reward", "task_weights", "task_weight", "task_temperature", "task_step",
    ),
    "reward": (
        "reward_model", "reward", "judge", "preference", "reward_clip", "missing_eos_penalty", "gamma", "lam", "bootstrap_truncated",
        "whiten_rewards", "dpo_model", "dpo_coef", "dpo_clip", "scale_rewards", "overlong_buffer", "drop_equal_groups",
        "mask_truncated", "mixture_coef",
    ),
    "pairs of samples": ("pair_rule", "pair_margin", "length_penalty", "label_temperature"),
    "KL to the reference": (
        "ref_update_every", "ref_mix", "target_kl", "kl_coef", "kl_in", "kl_kind", "kl_target", "kl_horizon",
    ),
    "sampling": ("samples_per_prompt", "max_new_tokens", "temperature", "top_p", "top_k", "sample_batch"),
    "which examples": ("eval_data", "eval_fraction", "max_length", "overlong", "template_options", "seed"),
    "steps": (
        "batch_size", "tokens_per_batch", "epochs", "max_steps", "learning_rate", "warmup_ratio", "weight_decay",
        "max_grad_norm", "minibatches", "rollout_epochs",
    ),
    "machine": ("dtype", "attention", "head", "device"),
    "log and checkpoints": (
        "log_every", "eval_every", "save_every", "keep_checkpoints", "tensorboard", "progress", "token_metrics",
    ),
}  # fmt: skip

REQUIRED = ("model", "data", "output")


def group_of(name: str) -> str:
    return next(title for title, names in GROUPS.items() if name in names)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, up to what reads well; text that stands for itself is left alone."""

    def __init__(self, prog: str):
        super().__init__(
            prog, max_help_position=32, width=max(80, min(shutil.get_terminal_size((120, 24)).columns, 120))
        )

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
    fields = {
        name
        for kind in (preset.Preset, list_preset.ListPreset, policy_losses.PolicyPreset)
        for name in kind.PARTS
    }
    unpaired = {
        "desirable_weight",
        "undesirable_weight",
        "momentum",
        "tau",
        "rescale",
        "standardise",
        "centering",
        "clamp",
    }
    return frozenset(own | fields | unpaired)


def usage(method: str, kind: type[RunConfig]) -> str:
    """Every flag stands in its group below; the usage line names those without which nothing runs."""
    given = " ".join(
        f"{flag_of(name, kind)} {kind.__dataclass_fields__[name].metadata['metavar']}" for name in REQUIRED
    )
    return f"fastalign train {method} {given} [--loss NAME] [--set OPTION=VALUE ...] [OPTION ...]"


def description(row: Row) -> str:
    page = row.page
    return (
        f"{page.what}\n\n  loss     {page.formula}\n  paper    {page.paper}\n  data     {page.data}\n  "
        f"command  {page.command}\n\n"
        "The data formats and recipes are in "
        f"docs/training{'_online' if row.config is OnlineConfig else ''}.md."
    )
