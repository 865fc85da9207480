"""Options and names of other trainers: accepted with their meaning, or refused with a hint that names ours;
the columns TRL of the tables."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from test_trl import REWARDS, Accelerator, both, same, trl_loss
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_config import RLOOConfig

import fastalign as fa
from fastalign import losses
from fastalign.losses import peers
from fastalign.losses import policy as policy_losses
from fastalign.losses.pair import FIELDS
from fastalign.testing import make_batch

# Settings of TRL's configurations that change what is learnt from given log-probs: the others are of models,
# data, generation, logging.
OF_THE_LOSS = {
    DPOConfig: ("loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "beta",
                "use_weighting", "discopop_tau", "precompute_ref_log_probs", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    CPOConfig: ("beta", "label_smoothing", "loss_type", "cpo_alpha", "simpo_gamma", "alpha"),
    ORPOConfig: ("beta",),
    KTOConfig: ("loss_type", "beta", "desirable_weight", "undesirable_weight"),
    GRPOConfig: ("beta", "num_iterations", "epsilon", "delta", "epsilon_high", "importance_sampling_level", "reward_weights", "scale_rewards",
                 "loss_type", "mask_truncated_completions", "top_entropy_quantile", "use_bias_correction_kl", "sapo_temperature_pos",
                 "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "off_policy_mask_threshold",
                 "num_generations", "max_completion_length", "steps_per_generation"),
    RLOOConfig: ("beta", "num_iterations", "epsilon", "epsilon_high", "normalize_advantages", "reward_clip_range"),
}  # fmt: skip
POLICY = (GRPOConfig, RLOOConfig)


@pytest.mark.parametrize(
    "config,name", [(config, name) for config, names in OF_THE_LOSS.items() for name in names]
)
def test_every_option_is_honoured_or_refused_with_a_hint(config, name):
    assert name in config.__dataclass_fields__, "TRL has no such option any more"
    if config in POLICY:
        with pytest.raises(ValueError, match=f"has no option '{name}'; {name}: .*; legal: "):
            policy_losses.get("grpo").replace(**{name: 0.3})
    elif name in FIELDS:
        pass  # of the same meaning, which test_trl.py holds, or refused where it has another: below
    elif config is KTOConfig and name in ("desirable_weight", "undesirable_weight"):
        one = torch.zeros(1)
        fa.unpaired_loss(
            one,
            one,
            torch.tensor([0, 1], dtype=torch.int32),
            one == 0,
            loss="kto",
            baseline=0.0,
            **{name: 2.0},
        )
    elif name == "alpha":
        assert losses.get("alphapo").replace(alpha=0.3).transform_alpha == 0.3
    else:
        with pytest.raises(ValueError, match=f"has no option '{name}'; {name}: .*; legal: "):
            losses.get("dpo").replace(**{name: 0.3})


@pytest.mark.parametrize(
    "loss,option,value,words",
    [
        ("ipo", "beta", 0.1, "write tau=0.1"),
        ("orpo", "beta", 0.1, "write pair_weight=0.1"),
        ("sft", "beta", 0.1, "no effect on loss 'sft'"),
        ("f_dpo_alpha", "f_alpha_divergence_coef", 0.7, "alpha=0.3"),
        ("simpo", "simpo_gamma", 1.5, "write gamma=1.5"),
        ("cpo", "cpo_alpha", 0.5, "write sft_weight=0.5"),
        ("dpo", "rpo_alpha", 0.5, "loss rpo with alpha=0.5"),
        ("discopop", "discopop_tau", 0.1, "write tau=0.1"),
        ("dpo", "label_smoothing", -1.0, "label_smoothing"),
    ],
)  # fmt: skip
def test_a_number_of_another_meaning_is_refused(loss, option, value, words):
    batch = make_batch(2)
    with pytest.raises(ValueError, match=words):
        losses.get(loss).replace(**{option: value})
    with pytest.raises(ValueError, match=words):
        fa.preference_loss(
            batch.logprobs,
            batch.ref_logprobs,
            batch.packed.cu_seqlens,
            mask=batch.packed.mask,
            loss=loss,
            **{option: value},
        )


def test_hints_of_policy_losses():
    for option, value, words in (("beta", 0.04, "kl_coef=0.04"), ("epsilon", 0.2, "clip_low=0.2, clip_high=0.2"),
                                 ("delta", 1.5, "dual_clip=1.5"), ("kl_loss_type", "low_var_kl", "low_var_kl k3")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            policy_losses.resolve("grpo", {option: value})
    assert policy_losses.get("bnpo") is policy_losses.get("ppo")


def test_hints_name_what_exists():
    """Every `write x=` of a hint is an option of ours."""
    import re

    ours = {*FIELDS, *policy_losses.FIELDS, "alpha", "tau", "gamma", "centering", "clip", "kl_kind"}
    for table in (peers._PREFERENCE, peers._POLICY):
        for text in table.values():
            assert set(re.findall(r"(?:write|with|,) (\w+)=", text)) <= ours, text
    assert set(losses.TRL_FORMS) <= set(losses.PRESETS) and set(policy_losses.TRL_FORMS) <= set(
        policy_losses.PRESETS
    )


# --- the column TRL of the table of losses, where it is no loss_type of the DPOTrainer alone
DPO_FORMS = {
    "gpo_logistic": (["sigmoid"], [1.0], {}, {}),
    "gpo_hinge": (["hinge"], [1.0], {}, {}),
    "rpo": (["sigmoid", "sft"], [1.0, 0.3], {}, {"alpha": 0.3}),
    "regularized_po": (["sigmoid", "sft"], [1.0, 0.3], {}, {"sft_weight": 0.3}),
    "ld_dpo": (["sigmoid"], [1.0], {"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    "f_dpo_js": (["sigmoid"], [1.0], {"f_divergence": "js_divergence"}, {}),
    "f_dpo_fkl": (["sigmoid"], [1.0], {"f_divergence": "forward_kl"}, {}),
    "f_dpo_alpha": (["sigmoid"], [1.0], {"f_divergence": "alpha_divergence", "alpha": 0.7}, {"alpha": 0.3}),
    **{
        name: (["sigmoid"], [1.0], {}, {})
        for name in ("dno_prct", "online_dpo", "iterative_dpo", "sdpo", "self_rewarding")
    },
}


@pytest.mark.parametrize("name", DPO_FORMS)
def test_equal_to_a_form_of_the_dpo_trainer(name):
    batch = make_batch(5)
    types, weights, theirs, ours = DPO_FORMS[name]
    same(*both(batch, lambda lp: trl_loss(types, weights, batch, lp, **theirs), loss=name, beta=0.1, **ours))


def cpo_loss(batch, logprobs, *, loss_type, beta=0.5, gamma=0.3, alpha=0.0, cpo_alpha=0.0, smoothing=0.0):
    """Loss and metrics of CPOTrainer on the packed batch: its `cpo_loss` on the log-probs that its
    `concatenated_forward` would form."""
    cu, mask = batch.packed.cu_seqlens.tolist(), batch.packed.mask
    sums = torch.stack([torch.where(mask[a:b], logprobs[a:b], 0.0).sum() for a, b in zip(cu, cu[1:])])
    lengths = torch.stack([mask[a:b].sum() for a, b in zip(cu, cu[1:])])
    logps = sums / lengths if loss_type in ("ipo", "simpo") else sums
    trainer = SimpleNamespace(beta=beta, simpo_gamma=gamma, alpha=alpha, loss_type=loss_type, label_smoothing=smoothing,
                              accelerator=SimpleNamespace(device="cpu"))  # fmt: skip
    each, chosen, rejected = CPOTrainer.cpo_loss(trainer, logps[::2], logps[1::2])
    nll = -sums[::2].sum() / lengths[::2].sum()
    metrics = dict(
        zip(
            REWARDS,
            (chosen.mean(), rejected.mean(), (chosen > rejected).float().mean(), (chosen - rejected).mean()),
        )
    )
    metrics |= {"logps/chosen": logps[::2].mean(), "logps/rejected": logps[1::2].mean()}
    return each.mean() + cpo_alpha * nll, {name: [float(value)] for name, value in metrics.items()}


CPO_FORMS = {
    "simpo": ("simpo", {"loss_type": "simpo"}, {"beta": 0.5, "gamma": 0.3}),
    "cpo": ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0}, {"beta": 0.5}),
    "cpo_simpo": ("cpo_simpo", {"loss_type": "simpo", "cpo_alpha": 0.7},
                  {"beta": 0.5, "gamma": 0.3, "sft_weight": 0.7, "sft_norm": "token_mean_global"}),
    "alphapo": ("alphapo", {"loss_type": "simpo", "alpha": 0.2}, {"beta": 0.5, "gamma": 0.3, "alpha": 0.2}),
    "simpo, smoothed": ("simpo", {"loss_type": "simpo", "smoothing": 0.1}, {"beta": 0.5, "gamma": 0.3, "label_smoothing": 0.1}),
    "cpo, smoothed": ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0, "smoothing": 0.1}, {"beta": 0.5, "label_smoothing": 0.1}),
    "ipo without a reference": ("ipo", {"loss_type": "ipo"}, {"tau": 0.5, "reference": False}),
    "hinge without a reference": ("hinge_norm", {"loss_type": "hinge"}, {"beta": 0.5, "reference": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", CPO_FORMS)
def test_equal_to_a_form_of_the_cpo_trainer(case):
    batch = make_batch(5)
    name, theirs, ours = CPO_FORMS[case]
    same(*both(batch, lambda lp: cpo_loss(batch, lp, **theirs), loss=name, **ours))


def test_orpo_is_that_of_the_orpo_trainer():
    batch = make_batch(5)

    def theirs(logprobs):
        cu, mask = batch.packed.cu_seqlens.tolist(), batch.packed.mask
        parts = [logprobs[a:b][mask[a:b]] for a, b in zip(cu, cu[1:])]
        means = torch.stack([part.mean() for part in parts])
        trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
        each, chosen, rejected, _, _ = ORPOTrainer.odds_ratio_loss(trainer, means[::2], means[1::2])
        metrics = dict(
            zip(
                REWARDS,
                (
                    chosen.mean(),
                    rejected.mean(),
                    (chosen > rejected).float().mean(),
                    (chosen - rejected).mean(),
                ),
            )
        )
        metrics |= {"logps/chosen": means[::2].mean(), "logps/rejected": means[1::2].mean()}
        nll = -torch.cat(
            parts[::2]
        ).mean()  # over the response; TRL's counts the prompt too, as sft_include_prompt does
        return nll - each.mean(), {key: [float(value)] for key, value in metrics.items()}

    same(*both(batch, theirs, loss="orpo", pair_weight=0.1))


def test_bt_rm_is_the_loss_of_the_reward_trainer():
    """With a margin and with centering; and what `fastalign train reward` logs."""
    draw = torch.Generator().manual_seed(0)
    scores, margin = 3.0 * torch.randn(10, generator=draw), torch.rand(5, generator=draw)
    for given, centering in (({}, None), ({"margin": margin}, None), ({}, 0.01)):
        theirs, ours = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        trainer = SimpleNamespace(model=SimpleNamespace(training=False), accelerator=Accelerator(), _total_train_tokens=0,
                                  args=SimpleNamespace(center_rewards_coefficient=centering), _metrics={"eval": defaultdict(list)})  # fmt: skip
        want = RewardTrainer.compute_loss(
            trainer, lambda theirs=theirs, **_: SimpleNamespace(logits=theirs.unsqueeze(-1)), dict(given)
        )
        out = fa.reward_loss(ours[:5], ours[5:], centering=centering or 0.0, **given)
        assert torch.allclose(out.loss, want) and torch.allclose(
            *(torch.autograd.grad(a, b)[0] for a, b in ((out.loss, ours), (want, theirs)))
        )
        mine, logged = out.metrics(), trainer._metrics["eval"]
        assert float(mine["rewards/accuracies"]) == pytest.approx(logged["accuracy"][0])
        assert float(mine["rewards/margins"]) == pytest.approx(logged["margin"][0])


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_unpaired_losses_are_those_of_the_kto_trainer(loss):
    """Loss, gradient and metrics, on responses of which the last is paired with another prompt for the
    baseline."""
    draw = torch.Generator().manual_seed(1)
    lp, ref, kl_lp, kl_ref = -torch.rand(4, 6, 8, generator=draw)
    labels = torch.tensor([True, False, False, True, True, False])
    x, y = lp.clone().requires_grad_(), lp.clone().requires_grad_()

    class Model(torch.nn.Module):
        def __init__(self, values, other):
            super().__init__()
            self.values, self.other = values, other

        def forward(self, **_):
            zeros = torch.zeros(6, 8)
            return SimpleNamespace(log_probs=self.values, entropy=zeros, mean_logits=zeros, is_top1=zeros > 1)

    policy, reference = Model(x, kl_lp).eval(), Model(ref, kl_ref).eval()
    trainer = SimpleNamespace(
        model=policy, ref_model=reference, accelerator=Accelerator(), aux_loss_enabled=False,
        precompute_ref_logps=False, beta=0.3, calculate_KL=loss == "kto", loss_type=loss,
        desirable_weight=1.2, undesirable_weight=0.7, _metrics={"eval": defaultdict(list)},
        _compute_kl_logps=lambda model, batch: model.other.sum(-1), _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    policy.is_gradient_checkpointing = False
    ids = torch.zeros(6, 9, dtype=torch.long)
    mask = torch.cat([torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 8, dtype=torch.long)], 1)
    want = KTOTrainer._compute_loss(
        trainer,
        policy,
        {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": mask, "label": labels},
        False,
    )
    cu = torch.arange(0, 49, 8, dtype=torch.int32)
    baseline = {"baseline": fa.kto_baseline(kl_lp.flatten(), kl_ref.flatten(), cu)} if loss == "kto" else {}
    out = fa.unpaired_loss(
        y.flatten(),
        ref.flatten(),
        cu,
        labels,
        loss=loss,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        **baseline,
    )
    assert torch.allclose(out.loss, want) and torch.allclose(
        torch.autograd.grad(out.loss, y)[0], torch.autograd.grad(want, x)[0], atol=1e-7
    )
    mine = {name: float(value) for name, value in out.metrics().items()}
    for key in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert mine[key] == pytest.approx(trainer._metrics["eval"][key][0], rel=1e-5), key


def test_every_form_of_the_table_is_compared():
    compared = {
        *DPO_FORMS,
        *(name for name, _, _ in CPO_FORMS.values()),
        "orpo",
        "wpo",
        "bt_rm",
    }  # wpo: test_trl.py
    assert set(losses.TRL_FORMS) <= compared
