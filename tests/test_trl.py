"""Every TRL loss name against TRL's own code: `DPOTrainer._compute_loss` runs on the same log-probs, value and gradient are compared."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

import fastalign as fa
from fastalign.testing import make_batch

# TRL's name -> (our options, what TRL's loss is of ours). Differences and their reasons:
#   sigmoid ignores label_smoothing in TRL (ours honours it); bco_pair has no running delta in TRL (ours: delta=0, or the loss "bco");
#   sppo_hard omits the paper's factor 1/2; WPO's weight is not clamped in TRL; rewards are logged unnormalised by TRL.
SAME = {
    "sigmoid": ({"beta": 0.1}, 1.0),
    "hinge": ({"beta": 0.1}, 1.0),
    "ipo": ({"tau": 0.1}, 1.0),
    "exo_pair": ({"beta": 0.1, "label_smoothing": 0.05}, 1.0),
    "nca_pair": ({"beta": 0.1}, 1.0),
    "robust": ({"beta": 0.1, "label_smoothing": 0.05}, 1.0),
    "bco_pair": ({"beta": 0.1, "delta": 0.0}, 1.0),
    "sppo_hard": ({"beta": 0.1}, 2.0),
    "aot": ({"beta": 0.1, "label_smoothing": 0.05}, 1.0),
    "aot_unpaired": ({"beta": 0.1, "label_smoothing": 0.05}, 1.0),
    "apo_zero": ({"beta": 0.1}, 1.0),
    "apo_down": ({"beta": 0.1}, 1.0),
    "discopop": ({"beta": 0.1, "tau": 0.05}, 1.0),
    "sft": ({}, 1.0),
    "sigmoid_norm": ({"beta": 0.1}, 1.0),
}


class Accelerator:
    device = "cpu"

    @staticmethod
    def gather(x):
        return x

    gather_for_metrics = gather


def trl_loss(losses, weights, batch, logprobs, f_divergence="reverse_kl", alpha=0.5, ld_alpha=None, use_weighting=False):
    """(loss, metrics) of TRL's own method on the packed batch laid out as TRL wants it: padded, chosen rows first, shift inside."""
    cu, mask = batch.packed.cu_seqlens.tolist(), batch.packed.mask
    rows = list(range(0, len(cu) - 1, 2)) + list(range(1, len(cu) - 1, 2))
    width = max(b - a for a, b in zip(cu, cu[1:]))

    def padded(x):
        return torch.stack([torch.cat([x[cu[i] : cu[i + 1]], x.new_zeros(width - (cu[i + 1] - cu[i]))]) for i in rows])

    shifted = padded(mask)[:, :-1]  # row t scores token t + 1; the last row of every sequence scores nothing
    completion = torch.cat([torch.zeros_like(shifted[:, :1]), shifted], 1).long()

    class Model:
        training, is_gradient_checkpointing = True, False

        def __init__(self, values):
            self.values = values

        def __call__(self, **_):
            zeros = torch.zeros(shifted.shape, dtype=logprobs.dtype)
            return SimpleNamespace(
                log_probs=torch.where(shifted, padded(self.values)[:, :-1], zeros), entropy=zeros, mean_logits=zeros, is_top1=zeros > 1,
                log_sum_sq_probs=zeros - 1.5,
            )  # fmt: skip

    trainer = SimpleNamespace(
        model=Model(logprobs), ref_model=Model(batch.ref_logprobs), accelerator=Accelerator(), ld_alpha=ld_alpha, precompute_ref_logps=False,
        f_divergence_type=f_divergence, f_alpha_divergence_coef=alpha, loss_types=losses, loss_weights=weights, beta=0.1, label_smoothing=0.05,
        use_weighting=use_weighting, aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros_like(completion)
    loss = DPOTrainer._compute_loss(
        trainer, trainer.model, {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion}, False
    )
    return loss, trainer._metrics["train"]


def both(batch, theirs, **ours):
    """(their loss, gradient, metrics), (our output, gradient)."""
    a, b = batch.logprobs.clone().requires_grad_(), batch.logprobs.clone().requires_grad_()
    loss, metrics = theirs(a)
    out = fa.preference_loss(b, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, **ours)
    return (loss, torch.autograd.grad(loss, a)[0], metrics), (out, torch.autograd.grad(out.loss, b)[0])


def same(theirs, ours, factor=1.0):
    scale = max(1.0, float(theirs[0].detach().abs()))
    assert abs(float(theirs[0] - factor * ours[0].loss)) < 2e-6 * scale
    assert float((theirs[1] - factor * ours[1]).abs().max()) < 2e-6 * scale


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_equal_trl(name):
    options, factor = SAME[name]
    for seed in range(2):
        batch = make_batch(5, seed=seed)
        theirs, ours = both(batch, lambda lp, batch=batch: trl_loss([name], [1.0], batch, lp), loss=name, **options)
        same(theirs, ours, factor)


def test_every_trl_name_is_compared():
    import inspect
    import re

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(SAME)
    assert all(fa.losses.get(name) for name in SAME)


def test_metrics_equal_trl():
    batch = make_batch(5)
    (_, _, metrics), (out, _) = both(batch, lambda lp: trl_loss(["sigmoid"], [1.0], batch, lp), loss="sigmoid", beta=0.1)
    mine = {k: float(v) for k, v in out.metrics().items()}
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert mine[key] == pytest.approx(metrics[key][0], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize(
    "divergence,ours", [("forward_kl", "f_dpo_fkl"), ("js_divergence", "f_dpo_js"), ("alpha_divergence", "f_dpo_alpha")]
)
def test_f_divergences_equal_trl(divergence, ours):
    """TRL's coefficient is 1 - alpha of the paper."""
    batch = make_batch(5)
    options = {"alpha": 0.3} if ours == "f_dpo_alpha" else {}
    same(*both(batch, lambda lp: trl_loss(["sigmoid"], [1.0], batch, lp, divergence, alpha=0.7), loss=ours, **options))


def test_ld_dpo_wpo_and_mixtures_equal_trl():
    batch = make_batch(5)
    same(*both(batch, lambda lp: trl_loss(["sigmoid"], [1.0], batch, lp, ld_alpha=0.4), loss="ld_dpo", ld_alpha=0.4))
    omega = fa.wpo_weights(
        batch.logprobs, torch.full_like(batch.logprobs, -1.5), batch.packed.cu_seqlens, mask=batch.packed.mask, clamp=None
    )
    same(*both(batch, lambda lp: trl_loss(["sigmoid"], [1.0], batch, lp, use_weighting=True), loss="wpo", beta=0.1, omega=omega))
    dpo, bco = fa.losses.get("sigmoid"), fa.losses.get("bco_pair").replace(beta=0.1)
    mix = [(dpo, 0.8), (bco, 0.2), ("sft", 1.0)]
    same(*both(batch, lambda lp: trl_loss(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], batch, lp), loss=mix))
