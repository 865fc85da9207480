"""LLaMA-Factory's own functions, and those of the oldest TRL that it takes, against those in their place."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from checks.trainers import same

import fastalign.adapters as adapters
from fastalign.adapters import llamafactory as ours

utils = importlib.import_module("llamafactory.train.trainer_utils")
dpo = importlib.import_module("llamafactory.train.dpo.trainer").CustomDPOTrainer
kto = importlib.import_module("llamafactory.train.kto.trainer").CustomKTOTrainer
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, use_distributed=False
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ld_alpha", [None, 0.3, 0.0])
@pytest.mark.parametrize("pad", [-100, 0])
def test_batch_logps(draw, ragged, dtype, ld_alpha, pad):
    logits = (3 * draw(6, 9, 23)).to(dtype).requires_grad_()
    labels = draw(6, 9).abs().mul(7).long() + 1
    labels = torch.where(torch.cat([ragged, ragged[:1]]), labels, pad)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    args = (logits, labels, pad, ld_alpha)
    mine, theirs = ours.get_batch_logps(*args), utils.get_batch_logps(*args)
    assert torch.equal(mine[1], theirs[1])
    same(mine[0].float(), theirs[0].float(), logits, tolerance=tolerance)
    assert mine[0].dtype == theirs[0].dtype
    with pytest.raises(ValueError, match="same batch and length"):
        ours.get_batch_logps(logits, labels[:, :-1])


def trainer(loss_type, smoothing=0.0, bco=0.0):
    """As the constructor leaves it, without a model."""
    made = object.__new__(dpo)
    made.accelerator, made.reference_free, made.f_divergence_type = ACCELERATOR, False, "reverse_kl"
    made.f_divergence_params, made.use_weighting = None, False
    made.beta, made.loss_type, made.label_smoothing, made.simpo_gamma, made.bco_gemma = (
        0.3,
        loss_type,
        smoothing,
        0.5,
        bco,
    )
    made.finetuning_args = SimpleNamespace(use_ref_model=loss_type not in ("orpo", "simpo"))
    if bco:
        made.running = importlib.import_module("trl.trainer.utils").RunningMoments(ACCELERATOR)
    return made


@pytest.mark.parametrize("bco", [0.0, 0.7])
@pytest.mark.parametrize(
    "loss_type, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_losses_against_a_reference(draw, loss_type, smoothing, bco):
    chosen, rejected = (4 * draw(6)).requires_grad_(), (4 * draw(6)).requires_grad_()
    mine, theirs = trainer(loss_type, smoothing, bco), trainer(loss_type, smoothing, bco)
    for _ in range(2):  # the running mean goes on
        args = (chosen, rejected, 4 * draw(6), 4 * draw(6))
        expected = theirs.compute_preference_loss(*args)
        with adapters.patch("llamafactory"):
            same(mine.compute_preference_loss(*args), expected, chosen, rejected)


@pytest.mark.parametrize("loss_type", ["orpo", "simpo"])
def test_losses_without_a_reference(draw, loss_type):
    chosen, rejected = (-draw(6).abs() - 0.1).requires_grad_(), (-draw(6).abs() - 0.1).requires_grad_()
    made = trainer(loss_type)
    same(
        ours.compute_preference_loss(made, chosen, rejected, None, None),
        made.compute_preference_loss(chosen, rejected, None, None),
        chosen,
        rejected,
    )
    method = {"orpo": "odds_ratio_loss", "simpo": "simpo_loss"}[loss_type]
    same(
        getattr(ours, method)(made, chosen, rejected),
        getattr(made, method)(chosen, rejected),
        chosen,
        rejected,
    )


def test_what_no_trl_has_is_refused(draw):
    with pytest.raises(ValueError, match="pref_loss=kto_pair .* legal: sigmoid, hinge, ipo, orpo, simpo"):
        ours.compute_preference_loss(trainer("kto_pair"), draw(2), draw(2), draw(2), draw(2))
    made = trainer("orpo")
    made.loss_type = "hinge"
    with pytest.raises(NotImplementedError, match="without a reference: orpo, simpo"):
        ours.compute_preference_loss(made, draw(2), draw(2), None, None)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("chosen, rejected", [(3, 2), (0, 4), (4, 0)])
@pytest.mark.parametrize("kl", [-1.0, 1.0])
def test_kto_loss(draw, loss_type, chosen, rejected, kl):
    made = object.__new__(kto)
    made.accelerator, made.beta, made.desirable_weight, made.undesirable_weight = ACCELERATOR, 0.3, 1.3, 0.7
    made.calculate_KL, made.loss_type = loss_type == "kto", loss_type
    policy = [(3 * draw(n)).requires_grad_() for n in (chosen, rejected)]
    count = chosen + rejected
    args = (*policy, draw(count) + kl, 3 * draw(chosen), 3 * draw(rejected), draw(count))
    same(ours.kto_loss(made, *args), made.kto_loss(*args), *(p for p in policy if len(p)))


def test_the_patch_reaches_the_importing_modules_and_the_inherited_method():
    modules = [importlib.import_module(f"llamafactory.train.{name}.trainer") for name in ("dpo", "kto")]
    before, inherited = utils.get_batch_logps, kto.kto_loss
    with adapters.patch("llamafactory"):
        assert all(module.get_batch_logps is ours.get_batch_logps for module in (utils, *modules))
        assert kto.kto_loss is ours.kto_loss and dpo.compute_preference_loss is ours.compute_preference_loss
    assert all(module.get_batch_logps is before for module in (utils, *modules))
    assert kto.kto_loss is inherited and "kto_loss" not in vars(kto)
