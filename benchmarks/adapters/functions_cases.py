"""Calls of functions of verl, OpenRLHF and LLaMA-Factory, and of those that take their place: a random ragged
batch, random options. See functions_sweep.py."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of a function of theirs and of ours, and what gradients are of."""

    options: dict[str, Any]
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    wrt: tuple[Tensor, ...] = ()


class Batch:
    """A batch [B, T] of one random number: a mask with holes and rows that may be empty, log-probs near and
    far."""

    def __init__(self, seed: int):
        self.pick, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.rows, self.columns = self.pick.randint(2, 6), self.pick.randint(2, 12)
        self.dtype = self.one_of(torch.float32, torch.float32, torch.float64)
        scale = self.one_of(0.1, 0.5, 2.0)
        self.mask = self.normal() > self.one_of(-9.0, -0.5, 0.3)
        self.mask[0, :2] = True  # two tokens, of which a variance can be taken
        self.new = (self.normal() - 2).to(self.dtype).requires_grad_()
        self.old = self.new.detach() + (scale * self.normal()).to(self.dtype)
        self.rollout = self.old + (0.3 * self.normal()).to(self.dtype)
        self.token_advantages = self.normal().to(self.dtype)
        self.advantages = self.normal(self.rows, 1).expand_as(self.mask).to(self.dtype) * 1.0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape or (self.rows, self.columns), generator=self.generator)

    def one_of(self, *values: Any) -> Any:
        return self.pick.choice(values)

    def float_or_bool_mask(self) -> Tensor:
        return self.one_of(self.mask, self.mask.float(), self.mask.long())


def verl_cases(batch: Batch) -> dict[str, Call]:
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    functional = importlib.import_module("verl.utils.torch_functional")
    fused = importlib.import_module("verl.utils.experimental.torch_functional")
    from fastalign.adapters.verl import advantages, losses, rows

    cases: dict[str, Call] = {}
    logits, labels, options = _rows(batch)
    cases["logprobs_from_logits"] = Call(
        options,
        lambda: rows.logprobs_from_logits(logits, labels),
        lambda: functional.logprobs_from_logits(logits, labels),
        (logits,),
    )
    cases["entropy_from_logits"] = Call(
        options,
        lambda: rows.entropy_from_logits(logits),
        lambda: functional.entropy_from_logits(logits),
        (logits,),
    )
    hidden, weight = batch.normal(7, 8).requires_grad_(), batch.normal(37, 8).requires_grad_()
    temperature, chunk, ids = batch.one_of(1.0, 0.7, 2.0), batch.one_of(1, 3, 512), torch.arange(7)
    module = fused.FusedLinearForPPO(chunk_size=chunk)
    cases["FusedLinearForPPO"] = Call(
        {"temperature": temperature, "chunk_size": chunk},
        lambda: rows.fused_linear_forward(module, hidden, weight, ids, temperature),
        lambda: module.forward(hidden, weight, ids, temperature), (hidden, weight),
    )  # fmt: skip
    kind = batch.one_of("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3") + batch.one_of("", "+")
    pair = (batch.new, batch.old)
    cases["kl_penalty"] = Call(
        {"kl_penalty": kind},
        lambda: losses.kl_penalty(*pair, kind),
        lambda: core.kl_penalty(*pair, kind),
        (batch.new,),
    )

    mode, counts = batch.one_of(*losses._AGGREGATIONS), _global_counts(batch)
    mask, clip = batch.float_or_bool_mask(), batch.one_of(0.1, 0.5)
    values = (batch.new, batch.token_advantages, batch.old, mask, clip, mode)
    cases["compute_value_loss"] = Call(
        {"loss_agg_mode": mode, **counts}, lambda: losses.compute_value_loss(*values, **counts),
        lambda: core.compute_value_loss(*values, **counts), (batch.new,),
    )  # fmt: skip
    gamma, lam = batch.one_of((1.0, 1.0), (0.99, 0.95), (0.9, 0.0))
    steps = (batch.token_advantages, batch.old, batch.mask.float(), gamma, lam)
    cases["compute_gae_advantage_return"] = Call(
        {"gamma": gamma, "lam": lam}, lambda: advantages.compute_gae_advantage_return(*steps),
        lambda: core.compute_gae_advantage_return(*steps),
    )  # fmt: skip

    config = core.AlgoConfig(norm_adv_by_std_in_grpo=batch.one_of(True, False), gamma=gamma)
    rewards = torch.zeros(batch.rows, batch.columns)
    rewards[:, 0] = batch.normal(batch.rows)
    index = np.array([batch.one_of("a", "b") for _ in range(batch.rows)], dtype=object)
    for name in ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        args = {"response_mask": batch.mask.float(), "config": config, "index": index}
        own = {"norm_adv_by_std_in_grpo": config.norm_adv_by_std_in_grpo} if name == "grpo" else {}
        cases[f"fastalign_{name}"] = Call(
            {"norm_adv_by_std_in_grpo": config.norm_adv_by_std_in_grpo, "gamma": gamma},
            lambda name=name, args=args: core.get_adv_estimator_fn(f"fastalign_{name}")(rewards.clone(), **args),
            lambda name=name, args=args, own=own: core.get_adv_estimator_fn(name)(rewards.clone(), **args, **own),
        )  # fmt: skip

    low, high = batch.one_of(0.2, 0.0, 0.9, None), batch.one_of(0.2, 0.28, 4.0, None)
    actor = core.ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio=0.3, clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=batch.one_of(3.0, 1.2), tau_pos=batch.one_of(1.0, 0.5), tau_neg=batch.one_of(1.05, 2.0),
    )  # fmt: skip
    actor.global_batch_info.update(counts)
    weights = batch.one_of(None, batch.normal().exp())
    for ours, theirs in (
        ("ppo", "vanilla"),
        ("gspo_token", "gspo"),
        ("cispo", "cispo"),
        ("reinforce", "gpg"),
        ("sapo", "sapo"),
    ):
        args = {
            "old_log_prob": batch.old, "log_prob": batch.new, "response_mask": mask, "config": actor,
            "rollout_is_weights": weights,
            "advantages": batch.advantages if ours == "gspo_token" else batch.token_advantages,
            "loss_agg_mode": "seq-mean-token-mean" if ours == "sapo" else mode,
        }  # fmt: skip
        cases[f"fastalign_{ours}"] = Call(
            {"loss_agg_mode": mode, "clip_ratio_low": low, "clip_ratio_high": high,
                "weighted": weights is not None, **counts},
            lambda ours=ours, args=args: core.get_policy_loss_fn(f"fastalign_{ours}")(**args)[0],
            lambda theirs=theirs, args=args: core.get_policy_loss_fn(theirs)(**args)[0], (batch.new,),
        )  # fmt: skip
    return {f"verl {name}": call for name, call in cases.items()}


def openrlhf_cases(batch: Batch) -> dict[str, Call]:
    utils, losses = (importlib.import_module(f"openrlhf.models.{name}") for name in ("utils", "loss"))
    maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    from fastalign.adapters import openrlhf as ours

    cases: dict[str, Call] = {}
    logits, labels, options = _rows(batch)
    cases["log_probs_from_logits"] = Call(
        options,
        lambda: ours.log_probs_from_logits(logits, labels),
        lambda: utils.log_probs_from_logits(logits, labels),
        (logits,),
    )
    cases["compute_entropy"] = Call(
        options, lambda: ours.compute_entropy(logits), lambda: utils.compute_entropy(logits), (logits,)
    )
    kl = (
        batch.new,
        batch.old,
        batch.one_of(None, batch.rollout),
        batch.one_of("k1", "k2", "k3"),
        batch.one_of(True, False),
    )
    cases["compute_approx_kl"] = Call(
        {"kl_estimator": kl[3], "unbiased_gradient": kl[4]}, lambda: ours.compute_approx_kl(*kl),
        lambda: utils.compute_approx_kl(*kl), (batch.new,),
    )  # fmt: skip

    level, gating = batch.one_of("off", "token", "seq"), batch.one_of("ratio", "binary_kl", "tv")
    mode = batch.one_of("mask", "clip") if (level, gating) == ("token", "ratio") else "mask"
    counts = batch.one_of(
        {}, {"dp_size": 3}, {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 7.0}
    )
    options = {
        "clip_eps_low": batch.one_of(0.2, 0.9), "clip_eps_high": batch.one_of(0.2, 3.0),
        "dual_clip": batch.one_of(None, 1.5),
        "token_level_loss": batch.one_of(True, False), "policy_loss_type": batch.one_of("ppo", "gspo"),
        "is_correction_level": level,
        "is_correction_mode": mode, "is_correction_gating": gating,
        "is_correction_threshold": (0.5, 2.0) if gating == "ratio" else (0.0, 0.1),
    }  # fmt: skip
    policy = losses.PolicyLoss(**options)
    mask = batch.mask.clone()
    mask[:, 0] = True  # of an empty row theirs has no statistic
    args = (batch.new, batch.old, batch.token_advantages, mask.float(), batch.rollout)
    cases["PolicyLoss"] = Call(
        {**options, **counts},
        lambda: ours.policy_loss(policy, *args, **counts),
        lambda: policy(*args, **counts),
        (batch.new,),
    )
    options = {"clip_eps": batch.one_of(None, 0.2), "token_level_loss": batch.one_of(True, False)}
    value = losses.ValueLoss(**options)
    values = (batch.new, batch.old, batch.token_advantages, batch.mask.float())
    cases["ValueLoss"] = Call(
        {**options, **counts},
        lambda: ours.value_loss(value, *values, **counts),
        lambda: value(*values, **counts),
        (batch.new,),
    )
    smoothing, ipo = batch.one_of((0.0, False), (0.1, False), (0.0, True))
    dpo = losses.DPOLoss(batch.one_of(0.1, 1.0), smoothing, ipo)
    chosen, rejected = (batch.normal(batch.rows).to(batch.dtype).requires_grad_() for _ in range(2))
    sums = (
        chosen,
        rejected,
        batch.normal(batch.rows).to(batch.dtype),
        batch.normal(batch.rows).to(batch.dtype),
    )
    cases["DPOLoss"] = Call(
        {"label_smoothing": smoothing, "ipo": ipo},
        lambda: ours.dpo_loss(dpo, *sums),
        lambda: dpo(*sums),
        (chosen, rejected),
    )
    steps = (
        batch.old,
        batch.token_advantages,
        batch.one_of(None, batch.mask.float()),
        batch.one_of(1.0, 0.9),
        batch.one_of(1.0, 0.95),
    )
    cases["get_advantages_and_returns"] = Call(
        {"gamma": steps[3], "lambd": steps[4]}, lambda: ours.get_advantages_and_returns(None, *steps),
        lambda: maker.get_advantages_and_returns(None, *steps),
    )  # fmt: skip
    return {f"OpenRLHF {name}": call for name, call in cases.items()}


def llamafactory_cases(batch: Batch) -> dict[str, Call]:
    utils = importlib.import_module("llamafactory.train.trainer_utils")
    dpo = importlib.import_module("llamafactory.train.dpo.trainer").CustomDPOTrainer
    kto = importlib.import_module("llamafactory.train.kto.trainer").CustomKTOTrainer
    from fastalign.adapters import llamafactory as ours

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, use_distributed=False
    )
    logits = (3 * batch.normal(4, batch.columns, 23)).to(batch.dtype).requires_grad_()
    labels = torch.where(
        batch.normal(4, batch.columns) > -0.5, batch.normal(4, batch.columns).abs().mul(6).long(), -100
    )
    row = (logits, labels, -100, batch.one_of(None, 0.0, 0.3, 1.0))
    cases = {
        "get_batch_logps": Call(
            {"ld_alpha": row[3]},
            lambda: ours.get_batch_logps(*row)[0],
            lambda: utils.get_batch_logps(*row)[0],
            (logits,),
        )
    }

    def trainer(**settings: Any) -> Any:
        made = object.__new__(dpo)
        vars(made).update(
            accelerator=accelerator, reference_free=False, f_divergence_type="reverse_kl",
            f_divergence_params=None, use_weighting=False,
            finetuning_args=SimpleNamespace(use_ref_model=settings["loss_type"] not in ("orpo", "simpo")),
            running=importlib.import_module("trl.trainer.utils").RunningMoments(accelerator), **settings,
        )  # fmt: skip
        return made

    loss_type = batch.one_of("sigmoid", "hinge", "ipo", "orpo", "simpo")
    settings = {
        "loss_type": loss_type, "beta": batch.one_of(0.1, 0.7), "simpo_gamma": batch.one_of(0.5, 1.0),
        "bco_gemma": batch.one_of(0.0, 0.5),
        "label_smoothing": batch.one_of(0.0, 0.2) if loss_type == "sigmoid" else 0.0,
    }  # fmt: skip
    sums = [(-batch.normal(5).abs() - 0.1).to(batch.dtype) for _ in range(4)]
    args = [x.requires_grad_() for x in sums[:2]] + (
        sums[2:] if loss_type not in ("orpo", "simpo") else [None, None]
    )
    made = [trainer(**settings) for _ in range(2)]
    cases["compute_preference_loss"] = Call(
        settings,
        lambda: ours.compute_preference_loss(made[0], *args),
        lambda: made[1].compute_preference_loss(*args),
        tuple(args[:2]),
    )
    judge = object.__new__(kto)
    settings = {
        "loss_type": batch.one_of("kto", "apo_zero_unpaired"),
        "beta": batch.one_of(0.1, 0.7),
        "desirable_weight": batch.one_of(1.0, 1.3),
    }
    vars(judge).update(
        accelerator=accelerator,
        undesirable_weight=0.7,
        calculate_KL=settings["loss_type"] == "kto",
        **settings,
    )
    chosen, rejected = (batch.normal(n).requires_grad_() for n in (3, 2))
    responses = (
        chosen,
        rejected,
        batch.normal(5) + batch.one_of(-1.0, 1.0),
        batch.normal(3),
        batch.normal(2),
        batch.normal(5),
    )
    cases["kto_loss"] = Call(
        settings,
        lambda: ours.kto_loss(judge, *responses),
        lambda: judge.kto_loss(*responses),
        (chosen, rejected),
    )
    return {f"LLaMA-Factory {name}": call for name, call in cases.items()}


def _rows(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    vocab, scale = batch.one_of(3, 50, 1000), batch.one_of(0.1, 1.0, 5.0)
    dtype = torch.float64 if scale > 1 else batch.dtype  # where the peers' fp32 entropy rounds by 1e-5
    logits = (scale * batch.normal(2, 3, vocab)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (2, 3), generator=batch.generator)
    return logits, labels, {"vocabulary": vocab, "scale": scale}


def _global_counts(batch: Batch) -> dict[str, Any]:
    given = {
        "dp_size": 2,
        "batch_num_tokens": batch.one_of(31, torch.tensor(31)),
        "global_batch_size": 7,
        "loss_scale_factor": batch.one_of(None, 16),
    }
    return batch.one_of({}, given)
