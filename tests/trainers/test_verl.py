"""verl's own functions against those that take their place, and what is registered with it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import run_all
import torch
from checks.trainers import same

import fastalign.adapters as adapters
from fastalign.adapters.verl import advantages, losses, rows
from fastalign.losses.policy import PRESETS

PLUGIN = "fastalign.adapters.verl.plugin"
assert PLUGIN not in sys.modules  # verl is to load it
core = importlib.import_module("verl.trainer.ppo.core_algos")
functional = importlib.import_module("verl.utils.torch_functional")
fused = importlib.import_module("verl.utils.experimental.torch_functional")
AGGREGATIONS = tuple(losses._AGGREGATIONS)
COUNTS = ({}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7, "loss_scale_factor": 16})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_rows(draw, dtype, shape):
    logits = (3 * draw(*shape, 37)).to(dtype).requires_grad_()
    labels = draw(*shape).abs().mul(9).long()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for inplace in (True, False):  # without flash-attn verl overwrites nothing
        ours = rows.logprobs_from_logits(logits, labels, inplace_backward=inplace)
        same(ours, functional.logprobs_from_logits(logits, labels, inplace), logits, tolerance=tolerance)
    same(
        rows.entropy_from_logits(logits), functional.entropy_from_logits(logits), logits, tolerance=tolerance
    )
    if len(shape) == 1:
        theirs = functional.entropy_from_logits_with_chunking(logits, 4)
        same(rows.entropy_from_logits_with_chunking(logits, 4), theirs, logits, tolerance=tolerance)
    with pytest.raises((IndexError, RuntimeError)):
        rows.logprobs_from_logits(logits, torch.full_like(labels, -100))


def test_with_flash_attention_rows_are_fp32_and_overwritten(draw, monkeypatch):
    monkeypatch.setattr(functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    logits = draw(4, 11).bfloat16().requires_grad_() * 1.0
    out = rows.logprobs_from_logits(logits, torch.tensor([1, 2, -100, 3]))
    assert out.dtype == torch.float32 and out[2] == 0
    out.sum().backward()
    assert logits.shape[-1] == 0  # the gradient's memory
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert rows.logprobs_from_logits(draw(4, 11).bfloat16(), torch.zeros(4).long()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_linear(draw, shape, temperature):
    hidden, weight = draw(*shape, 8).requires_grad_(), draw(37, 8).requires_grad_()
    labels = draw(*shape).abs().mul(9).long()
    module = fused.FusedLinearForPPO(chunk_size=2)
    theirs = module.forward(hidden, weight, labels, temperature)
    same(rows.fused_linear_forward(module, hidden, weight, labels, temperature), theirs, hidden, weight)
    flat = tuple(x.flatten() for x in theirs)
    same(rows.linear_cross_entropy(hidden, weight, labels, temperature), flat, hidden, weight)
    for reduction, reduced in (("sum", flat[0].sum()), ("Mean", flat[0].mean())):
        ours = rows.linear_cross_entropy(hidden, weight, labels, temperature, reduction)
        same(ours, (reduced, flat[1]), hidden, weight)
    with pytest.raises(ValueError, match="legal: none, sum, mean"):
        rows.linear_cross_entropy(hidden, weight, labels, temperature, "max")
    half = rows.fused_linear_forward(module, hidden.bfloat16(), weight.bfloat16(), labels)
    assert [x.dtype for x in half] == [torch.float32, torch.bfloat16]


def test_fused_linear_as_with_liger(draw, monkeypatch):
    monkeypatch.setattr(fused, "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY", object())
    module = fused.FusedLinearForPPO(impl_backend="liger")
    labels = torch.tensor([1, -100, 2])
    out = rows.fused_linear_forward(module, draw(3, 8).bfloat16(), draw(37, 8).bfloat16(), labels)
    assert [x.dtype for x in out] == [torch.float32, torch.float32] and out[0][1] == out[1][1] == 0


@pytest.mark.parametrize("suffix", ["", "+"])
@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_kl_penalty(draw, kind, suffix):
    new = torch.cat([draw(40) * 2, torch.tensor([-25.0, -4.0, 0.0, 25.0])]).view(4, 11).requires_grad_()
    ref = torch.cat([draw(40) * 2, torch.zeros(4)]).view(4, 11).requires_grad_()
    same(losses.kl_penalty(new, ref, kind + suffix), core.kl_penalty(new, ref, kind + suffix), new, ref)
    same(losses.kl_penalty(new, ref[0], kind + suffix), core.kl_penalty(new, ref[0], kind + suffix), new, ref)
    half = losses.kl_penalty(new.bfloat16(), ref.bfloat16(), kind + suffix)
    assert half.dtype == core.kl_penalty(new.bfloat16(), ref.bfloat16(), kind + suffix).dtype


@pytest.mark.parametrize("kind", ["full", "k4", "k3++"])
def test_unknown_kl_penalties_are_refused(draw, kind):
    with pytest.raises(NotImplementedError, match="legal: kl, k1"):
        losses.kl_penalty(draw(3), draw(3), kind)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("counts", COUNTS)
def test_value_loss(draw, ragged, mode, counts):
    new, returns, old = draw(5, 9).requires_grad_(), draw(5, 9), draw(5, 9)
    for clip in (0.2, 1.5):
        args = (new, returns, old, ragged, clip, mode)
        same(losses.compute_value_loss(*args, **counts), core.compute_value_loss(*args, **counts), new)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean; legal: token-mean"):
        losses.compute_value_loss(new, returns, old, ragged, 0.2, "mean")
    if mode != "token-sum":
        with pytest.raises(ValueError, match="required when dp_size > 1"):
            losses.compute_value_loss(new, returns, old, ragged, 0.2, mode, dp_size=2)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0), (0.0, 1.0)])
def test_gae_everywhere(draw, ragged, gamma, lam):
    """Also where the mask is 0."""
    args = (draw(5, 9), draw(5, 9), ragged.float(), gamma, lam)
    same(advantages.compute_gae_advantage_return(*args), core.compute_gae_advantage_return(*args))
    assert not any(
        x.requires_grad for x in advantages.compute_gae_advantage_return(args[0].requires_grad_(), *args[1:])
    )


def test_gae_by_its_name(draw, ragged):
    config = core.AlgoConfig(gamma=0.9, lam=0.8)
    args = {"token_level_rewards": draw(5, 9), "values": draw(5, 9), "response_mask": ragged.float()}
    theirs = core.get_adv_estimator_fn("gae")(**args, gamma=0.9, lam=0.8)
    ours = core.get_adv_estimator_fn("fastalign_gae")
    same(ours(**args, config=config), theirs)
    same(ours(**args, gamma=0.9, lam=0.8), theirs)
    for missing in ({"values": None, "config": config}, {"gamma": 0.9}):
        with pytest.raises(ValueError, match="everywhere with adv_estimator=gae runs ours"):
            ours(**{**args, **missing})


GROUPS = [name.removeprefix("fastalign_") for name in advantages.ESTIMATORS if name != "fastalign_gae"]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("by_std", [True, False])
def test_estimators(draw, ragged, name, by_std):
    """Groups of two, of three and of one, in any order."""
    mask = torch.cat([ragged, ragged[[0, 4, 2]]]).float()
    rewards = torch.zeros(8, 9)
    rewards[:, -1] = draw(8)
    if name == "reinforce_plus_plus":
        rewards = draw(8, 9)
    config = core.AlgoConfig(norm_adv_by_std_in_grpo=by_std, gamma=0.9)
    args = {
        "token_level_rewards": rewards, "response_mask": mask, "config": config,
        "index": np.array(["a", "b", "a", "c", "b", "a", "d", "d"], dtype=object),
    }  # fmt: skip
    theirs = dict(args, norm_adv_by_std_in_grpo=by_std) if name == "grpo" else dict(args)
    before = rewards.clone()
    ours = core.get_adv_estimator_fn(f"fastalign_{name}")(**args)
    same(ours, core.get_adv_estimator_fn(name)(**theirs))
    assert torch.equal(rewards, before)


# Ours -> verl's name for it, where verl has it. It aggregates the last two in one way, whatever the config says.
PEERS = {
    "ppo": "vanilla", "grpo": "vanilla", "dr_grpo": "vanilla", "dapo": "vanilla", "gspo_token": "gspo",
    "cispo": "cispo", "reinforce": "gpg",
    "sapo": "sapo", "gmpo": "geo_mean",
}  # fmt: skip


def actor_config(counts):
    config = core.ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio=0.3, clip_ratio_low=0.1,
        clip_ratio_high=0.25,
        clip_ratio_c=1.5, tau_pos=1.3, tau_neg=0.8,
    )  # fmt: skip
    config.global_batch_info.update(counts)
    return config


def rollout(draw, mask):
    """The same advantage for every token of a response, log-probs some of which are far off."""
    new = (draw(*mask.shape) - 2).requires_grad_()
    return {
        "old_log_prob": new.detach() + draw(*mask.shape) * 0.5, "log_prob": new, "response_mask": mask,
        "advantages": draw(mask.shape[0], 1).expand_as(mask) * 1.0, "rollout_is_weights": draw(*mask.shape).exp(),
    }  # fmt: skip


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", PEERS)
def test_policy_losses(draw, ragged, name, mode):
    mask = ragged
    if name in ("sapo", "gmpo"):
        mode = "seq-mean-token-mean"
    if name == "gmpo":
        mask = ragged[[0, 2, 3, 4]]  # verl counts rows without tokens
    for counts in COUNTS if name != "gmpo" else ({},):
        for weighted in (True, False):
            args = dict(rollout(draw, mask), loss_agg_mode=mode, config=actor_config(counts))
            args["rollout_is_weights"] = args["rollout_is_weights"] if weighted else None
            if name not in ("gspo_token", "gmpo"):  # a token's own
                args["advantages"] = draw(*mask.shape)
            ours, numbers = core.get_policy_loss_fn(f"fastalign_{name}")(**args)
            theirs, peers = core.get_policy_loss_fn(PEERS[name])(**args)
            same(ours, theirs, args["log_prob"])
            if name != "gmpo":
                assert numbers == {**numbers, **{k: pytest.approx(v, abs=1e-5) for k, v in peers.items()}}


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gspo_has_the_gradient_of_the_whole_sequence(draw, ragged, mode):
    """Advantages that vary within a sequence included: token by token, differentiated through the mean. Clipped
    tokens are counted as verl's gspo counts them."""
    args = rollout(draw, ragged)
    args["old_log_prob"] = args["old_log_prob"] + 0.4 * draw(5, 1)
    new, old, weight = args["log_prob"], args["old_log_prob"], args["rollout_is_weights"]
    ratio = (((new - old) * ragged).sum(-1, keepdim=True) / ragged.sum(-1, keepdim=True).clamp(min=1)).exp()
    for each, weighted in ((draw(5, 9), False), (args["advantages"], True)):
        call = dict(args, advantages=each, rollout_is_weights=weight if weighted else None)
        call |= {"loss_agg_mode": mode, "config": actor_config({})}
        ours, numbers = core.get_policy_loss_fn("fastalign_gspo")(**call)
        per_token = torch.maximum(-each * ratio, -each * ratio.clamp(0.9, 1.25))
        same(ours, core.agg_loss(per_token * (weight if weighted else 1.0), ragged, mode), new)
        _, theirs = core.get_policy_loss_fn("gspo")(**call)
        assert 0 < numbers["actor/pg_clipfrac"] == pytest.approx(theirs["actor/pg_clipfrac"], abs=1e-5)


def test_a_lower_bound_below_zero_never_holds(draw, ragged):
    config = actor_config({})
    object.__setattr__(config, "clip_ratio_low", 2.0)
    args = dict(rollout(draw, ragged), config=config)
    ours, theirs = (core.get_policy_loss_fn(name)(**args)[0] for name in ("fastalign_ppo", "vanilla"))
    same(ours, theirs, args["log_prob"])


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("floating", [True, False])
def test_result_types_are_verls(draw, ragged, mode, floating):
    """Of log-probs in bf16, with masks of either type."""
    args = rollout(draw, ragged.float() if floating else ragged)
    args = {
        k: v.detach().bfloat16() if v.dtype == torch.float32 and k != "response_mask" else v
        for k, v in args.items()
    }
    args |= {"rollout_is_weights": None, "loss_agg_mode": mode, "config": actor_config({})}
    ours, theirs = (core.get_policy_loss_fn(name)(**args)[0] for name in ("fastalign_ppo", "vanilla"))
    assert ours.dtype == theirs.dtype
    new, old, advantages, mask = (
        args[k] for k in ("log_prob", "old_log_prob", "advantages", "response_mask")
    )
    mine, peers = (
        f(new, advantages, old, mask, 0.2, mode) for f in (losses.compute_value_loss, core.compute_value_loss)
    )
    assert [x.dtype for x in mine] == [x.dtype for x in peers]


def test_every_preset_is_registered_and_runs(draw, ragged):
    assert {f"fastalign_{name}" for name in PRESETS} <= set(core.POLICY_LOSS_REGISTRY)
    for name in PRESETS:
        args = dict(rollout(draw, ragged), rollout_is_weights=None, config=actor_config({}))
        loss, numbers = core.get_policy_loss_fn(f"fastalign_{name}")(**args)
        assert torch.isfinite(loss) and set(numbers) == {
            "actor/pg_clipfrac",
            "actor/ppo_kl",
            "actor/pg_clipfrac_lower",
        }
    with pytest.raises(ValueError, match="needs verl's actor config"):
        core.get_policy_loss_fn("fastalign_ppo")(**{**args, "config": None})
    with pytest.raises(ValueError, match="vespo weighs by its own ratio"):
        core.get_policy_loss_fn("fastalign_vespo")(**dict(args, rollout_is_weights=draw(5, 9).exp()))


def test_distillation_losses(draw, ragged, monkeypatch):
    module = importlib.import_module("verl.trainer.distillation.losses")
    monkeypatch.setattr("verl.workers.utils.padding.no_padding_2_padding", lambda x, data: x)
    monkeypatch.setattr(module, "no_padding_2_padding", lambda x, data: x)
    student, teacher = draw(5, 9).requires_grad_(), draw(5, 9)
    call = {
        "config": None,
        "model_output": {"log_probs": student},
        "data": {"teacher_logprobs": teacher.unsqueeze(-1), "response_mask": ragged},
    }

    def losses_of(mode, policy_gradient=True):
        settings = SimpleNamespace(loss_mode=mode, use_policy_gradient=policy_gradient)
        return module.get_distillation_loss_fn(mode)(
            distillation_config=SimpleNamespace(distillation_loss=settings), **call
        )

    for kind in ("k1", "k2", "k3", "abs"):
        ours, metrics = losses_of(f"fastalign_{kind}")
        theirs, expected = losses_of(kind)
        same(ours, theirs, student)
        same(metrics["distillation/abs_loss"].aggregate(), expected["distillation/abs_loss"].aggregate())
        assert module.get_distillation_loss_settings(f"fastalign_{kind}").use_estimator
    for kind in ("k1+", "k3+", "abs+"):
        same(losses_of(f"fastalign_{kind}", False)[0], core.kl_penalty(student, teacher, kind), student)
    with pytest.raises(ValueError, match=r"fastalign_k1\+ has the KL's"):
        losses_of("fastalign_k1", False)


def test_the_patch_reaches_the_importing_modules(draw, ragged):
    importlib.import_module("verl.workers.utils.losses")
    importlib.import_module("verl.trainer.distillation.losses")
    before = core.kl_penalty
    with adapters.patch("verl") as report:
        assert core.compute_gae_advantage_return is advantages.compute_gae_advantage_return
        places = {(r.place, r.name) for r in report.replaced}
        assert ("verl.workers.utils.losses", "compute_value_loss") in places
        assert ("verl.trainer.distillation.losses", "kl_penalty") in places
        # verl's callers, through ours
        module = fused.FusedLinearForPPO()
        hidden, weight = draw(6, 8), draw(37, 8)
        patched = module(hidden, weight, torch.arange(6))
        ids = torch.arange(6).view(2, 3)
        whole = functional.log_probs_from_logits_response(ids, draw(2, 3, 37), 2)
    same(patched, module(hidden, weight, torch.arange(6)))
    assert whole.shape == (2, 2)
    assert core.kl_penalty is before and functional.logprobs_from_logits is not rows.logprobs_from_logits


def test_the_vocabulary_of_several_ranks_is_left_to_verl(monkeypatch):
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    monkeypatch.setattr(module.LinearCrossEntropy, "apply", lambda *args: args)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: {"of two": 2, "of one": 1}[group])
    hidden, weight, labels = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2).long()
    assert rows.linear_cross_entropy(hidden, weight, labels, 0.5, "sum", "of two")[3:] == (
        0.5,
        "sum",
        "of two",
    )
    assert rows.linear_cross_entropy(hidden, weight, labels, 0.5, "none", "of one")[0].shape == (2,)


EVERYWHERE = """
import sys
sys.path.insert(0, "tests")
from checks import trainers
trainers.make_up()
trainers.add_entry_points(sys.argv[1])
import verl, verl.workers.utils.losses as losses, verl.trainer.ppo.core_algos as core
from fastalign.adapters.verl import ADAPTER
assert ADAPTER.report is not None
assert losses.kl_penalty.__module__ == "fastalign.adapters.verl.losses", losses.kl_penalty
assert "fastalign_dapo" in core.POLICY_LOSS_REGISTRY
"""


def test_verl_patches_itself_in_every_process(tmp_path):
    """While it is imported: the modules that are patched are then there before the plugin is."""
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "fastalign.adapters.verl.everywhere"}
    subprocess.run([sys.executable, "-c", EVERYWHERE, str(tmp_path)], cwd=run_all.ROOT, env=env, check=True)


def test_a_registration_that_fails_does_not_break_verl(tmp_path, monkeypatch):
    plugin = importlib.import_module(PLUGIN)
    (tmp_path / "verl_like.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def fails(module):
        raise ImportError("no such loss")

    monkeypatch.setitem(plugin.WAITING, "verl_like", fails)
    if not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path):
        sys.meta_path.insert(0, plugin._Finder())
    with pytest.warns(UserWarning, match="not registered with verl_like: no such loss"):
        module = importlib.import_module("verl_like")
    assert module.x == 1 and "_Loader" not in type(module.__spec__.loader).__name__
    assert "verl_like" not in plugin.WAITING
