"""Every TRL loss name against TRL's own code: `DPOTrainer._compute_loss` runs on the same log-probs, value
and gradient are compared."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

import fastalign as fa
from fastalign import losses
from fastalign.testing import make_batch

# TRL's name -> our options. Differences and their reasons:
#   sigmoid ignores label_smoothing in TRL (ours honours it); bco_pair has no running delta in TRL (ours: delta=0, or the loss "bco");
#   WPO's weight is not clamped in TRL.
SAME = {
    "sigmoid": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "ipo": {"tau": 0.1},
    "exo_pair": {"beta": 0.1, "label_smoothing": 0.05},
    "nca_pair": {"beta": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.05},
    "bco_pair": {"beta": 0.1, "delta": 0.0},
    "sppo_hard": {"beta": 0.1},
    "aot": {"beta": 0.1, "label_smoothing": 0.05},
    "aot_unpaired": {"beta": 0.1, "label_smoothing": 0.05},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "discopop": {"beta": 0.1, "tau": 0.05},
    "sft": {},
    "sigmoid_norm": {"beta": 0.1},
}
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


class Accelerator:
    device = "cpu"

    @staticmethod
    def gather(x):
        return x

    gather_for_metrics = gather


def trl_loss(
    losses, weights, batch, logprobs, f_divergence="reverse_kl", alpha=0.5, ld_alpha=None, use_weighting=False
):
    """(loss, metrics) of TRL's own method on the packed batch laid out as TRL wants it: padded, chosen rows
    first, shift inside."""
    cu, mask = batch.packed.cu_seqlens.tolist(), batch.packed.mask
    rows = list(range(0, len(cu) - 1, 2)) + list(range(1, len(cu) - 1, 2))
    width = max(b - a for a, b in zip(cu, cu[1:]))

    def padded(x):
        return torch.stack(
            [torch.cat([x[cu[i] : cu[i + 1]], x.new_zeros(width - (cu[i + 1] - cu[i]))]) for i in rows]
        )

    shifted = padded(mask)[:, :-1]  # row t scores token t + 1; the last row of every sequence scores nothing
    completion = torch.cat([torch.zeros_like(shifted[:, :1]), shifted], 1).long()

    class Model(torch.nn.Module):
        is_gradient_checkpointing = False

        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, **_):
            zeros = torch.zeros(shifted.shape, dtype=logprobs.dtype)
            return SimpleNamespace(
                log_probs=torch.where(shifted, padded(self.values)[:, :-1], zeros), entropy=zeros,
                mean_logits=zeros, is_top1=zeros > 1, log_sum_sq_probs=zeros - 1.5,
            )  # fmt: skip

    trainer = SimpleNamespace(
        model=Model(logprobs), ref_model=Model(batch.ref_logprobs), accelerator=Accelerator(),
        ld_alpha=ld_alpha, precompute_ref_logps=False, f_divergence_type=f_divergence,
        f_alpha_divergence_coef=alpha, loss_types=losses, loss_weights=weights, beta=0.1,
        label_smoothing=0.05, use_weighting=use_weighting, aux_loss_enabled=False, _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros_like(completion)
    loss = DPOTrainer._compute_loss(
        trainer,
        trainer.model,
        {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion},
        False,
    )
    return loss, trainer._metrics["train"]


def both(batch, theirs, **ours):
    """(their loss, gradient, metrics), (our output, gradient)."""
    a, b = batch.logprobs.clone().requires_grad_(), batch.logprobs.clone().requires_grad_()
    loss, metrics = theirs(a)
    out = fa.preference_loss(b, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, **ours)
    return (loss, torch.autograd.grad(loss, a)[0], metrics), (out, torch.autograd.grad(out.loss, b)[0])


def same(theirs, ours, keys=(*REWARDS, "logps/chosen", "logps/rejected")):
    """Loss, gradient and metrics."""
    scale = max(1.0, float(theirs[0].detach().abs()))
    assert abs(float((theirs[0] - ours[0].loss).detach())) < 2e-6 * scale
    assert float((theirs[1] - ours[1]).abs().max()) < 2e-6 * scale
    mine = {k: float(v) for k, v in ours[0].metrics().items()}
    for key in keys:
        assert mine[key] == pytest.approx(theirs[2][key][0], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_equal_trl(name):
    for seed in range(2):
        batch = make_batch(5, seed=seed)
        theirs, ours = both(
            batch, lambda lp, batch=batch: trl_loss([name], [1.0], batch, lp), loss=name, **SAME[name]
        )
        if (
            name == "sft"
        ):  # TRL's rewards are against a reference, which the loss does not have: none under that name here
            assert not any(key.startswith("rewards/") for key in ours[0].metrics())
            same(theirs, ours, keys=("logps/chosen", "logps/rejected"))
        else:
            same(theirs, ours)


def test_every_trl_name_is_compared():
    import inspect
    import re

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(SAME)
    assert all(fa.losses.get(name) for name in SAME)


def test_where_the_loss_compares_other_rewards_these_have_names_of_their_own():
    batch = make_batch(5)

    def metrics(loss, **options):
        out = fa.preference_loss(
            batch.logprobs,
            batch.ref_logprobs,
            batch.packed.cu_seqlens,
            mask=batch.packed.mask,
            loss=loss,
            **options,
        )
        return out, {name: float(value) for name, value in out.metrics().items()}

    for loss in ("ipo", "sigmoid_norm", "alphapo", "orpo"):
        out, mine = metrics(loss)
        assert mine["loss_rewards/chosen"] == pytest.approx(float(out.chosen_rewards.mean())), loss
        assert mine["loss_rewards/margins"] == pytest.approx(float(out.margins.mean())), loss
        assert mine["loss_rewards/accuracies"] == float((out.margins > 0).double().mean()), loss
        assert mine["rewards/chosen"] != mine["loss_rewards/chosen"]
    for loss in ("dpo", "simpo", "cpo", "sppo", "bco_pair"):
        assert not any(name.startswith("loss_rewards/") for name in metrics(loss)[1]), loss
    assert metrics("ipo", target=torch.tensor(4.0))[1] == metrics("ipo", tau=0.125)[1]


@pytest.mark.parametrize(
    "divergence,ours",
    [("forward_kl", "f_dpo_fkl"), ("js_divergence", "f_dpo_js"), ("alpha_divergence", "f_dpo_alpha")],
)
def test_f_divergences_equal_trl(divergence, ours):
    """TRL's coefficient is 1 - alpha of the paper."""
    batch = make_batch(5)
    options = {"alpha": 0.3} if ours == "f_dpo_alpha" else {}
    same(
        *both(
            batch,
            lambda lp: trl_loss(["sigmoid"], [1.0], batch, lp, divergence, alpha=0.7),
            loss=ours,
            **options,
        )
    )


def test_ld_dpo_wpo_and_mixtures_equal_trl():
    batch = make_batch(5)
    same(
        *both(
            batch,
            lambda lp: trl_loss(["sigmoid"], [1.0], batch, lp, ld_alpha=0.4),
            loss="ld_dpo",
            ld_alpha=0.4,
        )
    )
    omega = fa.wpo_weights(
        batch.logprobs,
        torch.full_like(batch.logprobs, -1.5),
        batch.packed.cu_seqlens,
        mask=batch.packed.mask,
        clamp=None,
    )
    same(
        *both(
            batch,
            lambda lp: trl_loss(["sigmoid"], [1.0], batch, lp, use_weighting=True),
            loss="wpo",
            beta=0.1,
            omega=omega,
        )
    )
    dpo, bco = fa.losses.get("sigmoid"), fa.losses.get("bco_pair").replace(beta=0.1)
    mix = [(dpo, 0.8), (bco, 0.2), ("sft", 1.0)]
    same(
        *both(
            batch, lambda lp: trl_loss(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], batch, lp), loss=mix
        )
    )
    for lead, preset in (
        ("ipo", losses.get("ipo").replace(tau=0.1)),
        ("sigmoid_norm", losses.get("ln_dpo").replace(beta=0.1)),
        ("sft", "sft"),
    ):
        mix = [(preset, 0.7), (dpo, 0.4)]
        same(*both(batch, lambda lp, lead=lead: trl_loss([lead, "sigmoid"], [0.7, 0.4], batch, lp), loss=mix))
