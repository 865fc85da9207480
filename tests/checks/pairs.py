"""Checks of the pair kernel: everything one call returns, against the reference in fp64, and the options that
reach every part of it."""

from __future__ import annotations

import dataclasses

import torch

import fastalign as fa
from checks.compare import assert_results_close, in_fp64, on_reference
from fastalign import losses
from fastalign.losses.pair import Preset
from fastalign.ops.columns import LINKS, SFT_NORMS, TRANSFORMS


def run_pairs(batch, truth=False, **options):
    """Loss, gradients in log-probs and KL, rewards and logits of one call; the truth in fp64 on the
    reference."""
    lp, rp, kl = (t.detach().clone() for t in (batch.logprobs, batch.ref_logprobs, batch.kl_ref_policy))
    if truth:
        lp, rp, kl, options = lp.double(), rp.double(), kl.double(), in_fp64(options)
    lp.requires_grad_(), kl.requires_grad_()
    packed = batch.packed
    with on_reference(truth):
        out = fa.preference_loss(lp, rp, packed.cu_seqlens, mask=packed.mask, kl_ref_policy=kl, **options)
        upstream = torch.linspace(-1.0, 2.0, out.loss.numel(), device=lp.device, dtype=lp.dtype).view(
            out.loss.shape
        )
        g = torch.autograd.grad(out.loss, (lp, kl), upstream if out.loss.dim() else None, allow_unused=True)
    g = tuple(torch.zeros_like(lp) if x is None else x for x in g)
    return {
        "loss": out.loss,
        "d logprobs": g[0],
        "d kl": g[1],
        "chosen": out.chosen_rewards,
        "rejected": out.rejected_rewards,
        "table": out.table,
    }


def compare_pairs(batch, **options):
    got = run_pairs(batch, **options)
    assert_results_close(got, run_pairs(batch, truth=True, **options), what=options)
    return got


def preset_of(**fields):
    return dataclasses.replace(Preset(), **fields)


# Presets that need no more than log-probs; the others' parts are in the variants below and in
# test_pair_tensors.
PLAIN_PRESETS = [
    p.name for p in losses.PRESETS.values() if not (p.needs_soft_labels or p.needs_kl or p.requires or p.rule)
]
# One preset of every kind, where each costs seconds: of those that differ in no more than a link or a number,
# the first.
KINDS_OF_PRESETS = {}
for _name in PLAIN_PRESETS:
    _p = losses.PRESETS[_name]
    _sft, _points = _p.sft_weight and _p.sft_norm, _p.point_link is not None
    _kind = (
        _p.transform,
        _p.length_norm != 0,
        _p.reference,
        _sft,
        _points,
        _p.ld_alpha != 1,
        _p.pair_weight != 0,
        _p.order,
    )
    KINDS_OF_PRESETS.setdefault(_kind, _name)


def presets_for(slow_backend):
    return list(KINDS_OF_PRESETS.values()) if slow_backend else PLAIN_PRESETS


LOGODDS = {"reference": False, "length_norm": 1.0}
PAIR_VARIANTS = {
    **{f"preset {name}": {"loss": name} for name in PLAIN_PRESETS},
    **{f"link {f}": {"loss": preset_of(link=f, label_smoothing=0.01 if f == "exo" else 0.0, beta=0.3)} for f in LINKS},
    **{f"transform {t}": {"loss": preset_of(transform=t, beta=0.5, **(LOGODDS if t == "logodds" else {}))} for t in TRANSFORMS},
    "smooth": {"loss": "dpo", "label_smoothing": 0.2},
    "robust": {"loss": preset_of(labels="robust", label_smoothing=0.2)},
    "label entropy": {"loss": preset_of(labels="smooth", label_smoothing=0.2, label_entropy=True)},
    "margins": {"loss": preset_of(gamma=0.3, gamma_beta_ratio=0.4, len_coef=0.05, pos_penalty=2.0, beta=0.2)},
    "half length norm": {"loss": preset_of(length_norm=0.5, beta=0.7)},
    "unequal betas": {"loss": preset_of(beta_rejected=0.05)},
    "token clamp": {"loss": preset_of(token_clamp=(-0.2, 0.25))},
    "ld": {"loss": preset_of(ld_alpha=0.4)},
    "kl": {"loss": preset_of(kl_chosen=0.5, kl_rejected=0.7)},
    "kl detached": {"loss": preset_of(kl_chosen=0.5, kl_rejected=0.5, detach_kl_chosen=True)},
    "points": {"loss": preset_of(pair_weight=0.0, point_link="logistic", point_chosen=(1.0, 0.5), point_rejected=(0.25, 0.5), anchor=0.1)},
    "points in beta": {"loss": preset_of(
        pair_weight=0.5, point_link="squared", point_chosen=(0.5, 0.0), point_rejected=(0.5, 0.0), point_beta_power=-2.0, beta=0.5,
        point_target=0.3,
    )},
    "point beta": {"loss": preset_of(point_link="sigmoid", point_rejected=(0.0, 2.0), point_beta=0.4, point_beta_power=-1.0)},
    **{f"sft {n}": {"loss": preset_of(sft_weight=0.7, sft_norm=n)} for n in SFT_NORMS},
    "sft prompt": {"loss": preset_of(sft_weight=0.7, sft_include_prompt=True)},
    "sum": {"loss": preset_of(sft_weight=0.7), "reduction": "sum"},
    "none": {"loss": preset_of(sft_weight=0.7, sft_norm="seq_mean"), "reduction": "none"},
    "num_items": {"loss": preset_of(sft_weight=0.7), "num_items": 11, "num_sft_tokens": 133.0},
}  # fmt: skip
