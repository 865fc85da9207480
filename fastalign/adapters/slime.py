"""slime: policy losses for its `--custom-loss-function-path`.

slime is not on the package index: this is tested against the signature of
slime.backends.megatron_utils.loss, whose log-probs, entropy and means over samples it uses."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.adapters import padded
from fastalign.adapters.common import Adapter
from fastalign.losses.policy import PRESETS

ADAPTER = Adapter(
    "slime", "slime", "",
    registers=(
        "policy losses: --loss-type custom_loss --custom-loss-function-path fastalign.adapters.slime.NAME, "
        "such as dapo, gspo, cispo",
    ),
)  # fmt: skip

# What slime's own policy loss also reads, and is not read here.
_REFUSED = ("use_tis", "get_mismatch_metrics", "use_opsm", "use_score_centering", "use_unbiased_kl",
            "custom_pg_loss_reducer_function_path")  # fmt: skip
_KL = {"k1": ("k1", None), "k2": ("k2", None), "k3": ("k3", None), "low_var_kl": ("k3", 10.0)}


def policy_loss(
    name: str, args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics). args: eps_clip, eps_clip_high, eps_clip_c (of token ratios), entropy_coef, use_kl_loss with
    kl_loss_coef and kl_loss_type, use_rollout_logprobs. Tokens are weighed as `sum_of_sample_mean` does;
    pg_clipfrac is the share of the clipped tokens times what all of them count."""
    if on := [option for option in _REFUSED if getattr(args, option, None)]:
        raise ValueError(
            f"fastalign.adapters.slime does not know --{on[0].replace('_', '-')}; slime's own policy loss does"
        )
    preset = PRESETS[name]
    theirs = importlib.import_module("slime.backends.megatron_utils.loss")
    if preset.needs_lengths and preset.ratio != "token" and theirs.mpu.get_context_parallel_world_size() > 1:
        raise ValueError(
            f"{name} has one ratio per sequence, and context parallelism splits sequences; legal: 1 rank"
        )
    lengths = {key: batch[key] for key in ("unconcat_tokens", "total_lengths", "response_lengths")}
    extra = (
        theirs.get_rollout_top_p_logprob_kwargs(args, batch)
        if hasattr(theirs, "get_rollout_top_p_logprob_kwargs")
        else {}
    )
    _, rows = theirs.get_log_probs_and_entropy(logits, args=args, with_entropy=True, **lengths, **extra)
    logprobs, entropy = torch.cat(rows["log_probs"]), torch.cat(rows["entropy"])
    advantages = torch.cat(batch["advantages"])
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = torch.cat(old) if old else logprobs.detach()
    sizes = torch.tensor([0, *(len(x) for x in rows["log_probs"])], device=logprobs.device)
    if logprobs.numel() == 0:  # of this rank's part of the sequences none is a response
        nothing = 0 * logits.sum()
        return nothing, {"loss": nothing.detach()}
    # The mean over samples is linear: its slope says what every token counts, and that others do not.
    with torch.enable_grad():
        ones = torch.ones_like(logprobs, requires_grad=True)
        weight = torch.autograd.grad(sum_of_sample_mean(ones), ones)[0]
    dual = getattr(args, "eps_clip_c", None) if preset.ratio == "token" else None
    pg_loss, numbers = padded.policy_loss(
        preset, logprobs, old, advantages, weight != 0, sizes.cumsum(0).int(), is_weight=weight,
        aggregation="token_sum", **padded.clip_options(preset, args.eps_clip, args.eps_clip_high, dual),
    )  # fmt: skip
    entropy_loss = sum_of_sample_mean(entropy)
    loss = pg_loss - args.entropy_coef * entropy_loss
    reported = {
        "pg_loss": pg_loss, "entropy_loss": entropy_loss, "ppo_kl": sum_of_sample_mean((old - logprobs).detach()),
        "pg_clipfrac": numbers["clipfrac"] * weight.sum(),
    }  # fmt: skip
    if args.use_kl_loss:
        if args.kl_loss_type not in _KL:
            raise ValueError(f"kl_loss_type={args.kl_loss_type} is unknown here; legal: {', '.join(_KL)}")
        kind, clamp = _KL[args.kl_loss_type]
        kl = sum_of_sample_mean(
            fa.kl_estimate(logprobs, torch.cat(batch["ref_log_probs"]), kind, clamp=clamp)
        )
        loss = loss + args.kl_loss_coef * kl
        reported["kl_loss"] = kl
    return loss, {name: value.clone().detach() for name, value in {"loss": loss, **reported}.items()}


# vespo weighs by its own ratio, and here tokens have weights.
(ppo, reinforce, grpo, dr_grpo, dapo, gspo, gspo_token, cispo, rloo, luspo, sapo, gmpo) = (
    functools.partial(policy_loss, name) for name in PRESETS if name != "vespo"
)
