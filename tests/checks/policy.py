"""Checks of the policy losses: everything one call returns, against the reference in fp64."""

from __future__ import annotations

import itertools
import math

import torch

import fastalign as fa
from checks.compare import assert_results_close, in_fp64, on_reference
from fastalign.losses.policy import PRESETS
from fastalign.ops.columns import STATS

LENGTHS = (7, 1, 0, 18, 4, 3)


def make_policy_batch(device, lengths=LENGTHS, spread=0.3, seed=0, dtype=torch.float32):
    """A packed batch: everything `policy_loss` may read, NaN where the mask is False."""
    g = torch.Generator().manual_seed(seed)
    tokens, prompt = sum(lengths) + 2 * len(lengths), 2
    mask = torch.cat([torch.arange(n + prompt) >= prompt for n in lengths])
    noise = torch.randn(8, tokens, generator=g, dtype=torch.float64)
    batch = {
        "logprobs": -noise[0].abs() - 0.01, "old_logprobs": -noise[0].abs() - 0.01 + spread * noise[1], "advantages": noise[2],
        "ref_logprobs": -noise[0].abs() - 0.01 + 0.2 * noise[3], "entropy": noise[4].abs(), "is_weight": (0.5 * noise[5]).exp(),
    }  # fmt: skip
    batch = {k: torch.where(mask, v, math.nan).to(dtype).to(device) for k, v in batch.items()}
    per_sequence = torch.randn(2, len(lengths), generator=g, dtype=torch.float64).to(dtype).to(device)
    cu = torch.tensor(
        [0, *itertools.accumulate(n + prompt for n in lengths)], dtype=torch.int32, device=device
    )
    return {
        **batch,
        "cu_seqlens": cu,
        "mask": mask.to(device),
        "per_sequence": per_sequence[0],
        "is_per_sequence": per_sequence[1].exp(),
    }


def run_policy(batch, truth=False, needs=(), advantages="auto", **options):
    """Loss, gradients in log-probs and entropy, statistics; the truth in fp64 on the reference."""
    b, options = (in_fp64(batch), in_fp64(options)) if truth else (batch, options)
    lp, h = b["logprobs"].detach().clone().requires_grad_(), b["entropy"].detach().clone().requires_grad_()
    loss = options.get("loss", "ppo")
    preset = PRESETS[loss] if isinstance(loss, str) else loss
    if advantages == "auto":
        advantages = "per_sequence" if preset.needs_sequence_values else "advantages"
    given = {n: b[n] for n in needs if n != "entropy"} | ({"entropy": h} if "entropy" in needs else {})
    if "is_weight" in given and preset.needs_sequence_values:
        given["is_weight"] = b["is_per_sequence"]
    where = {"cu_seqlens": b["cu_seqlens"], "mask": b["mask"]}
    with on_reference(truth):
        out = fa.policy_loss(lp, b["old_logprobs"], b[advantages], **where, **given, **options)
        g = torch.autograd.grad(out.loss, (lp, h), torch.full_like(out.loss, -1.7), allow_unused=True)
    return {
        "loss": out.loss,
        "d logprobs": g[0],
        "d entropy": torch.zeros_like(lp) if g[1] is None else g[1],
        "stats": out.stats,
    }


def compare_policy(batch, **options):
    got, want = run_policy(batch, **options), run_policy(batch, truth=True, **options)
    assert {x.dtype for x in got.values()} == {torch.float32}
    # The statistics are sums over tokens of terms of order 1, behind an exponential, and each has its own
    # size.
    stats, tokens = want["stats"], float(want["stats"][STATS.index("tokens")])
    assert_results_close(
        got, want, what=options, scales={"stats": 10.0 * stats.abs().clamp(min=max(1.0, tokens**0.5))}
    )
    return got


NORM = {"dr_grpo": {"norm_length": 20.0}}
FULL = {
    "needs": ("ref_logprobs", "entropy", "is_weight"),
    "kl_coef": 0.2,
    "entropy_coef": 0.05,
    "is_mode": "truncate",
    "is_max": 1.2,
}
