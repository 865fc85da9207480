"""Token rewards of a DPO model and RTO's rewards against loops over tokens, typed from the papers."""

from __future__ import annotations

import math

import pytest
import torch

import fastalign as fa
from fastalign.testing import assert_close, make_batch


def batch_of(seed):
    """make_batch's with an empty sequence in the middle."""
    batch = make_batch(3, seed=seed)
    cu = batch.packed.cu_seqlens
    return batch, torch.cat([cu[:3], cu[2:]])


@pytest.mark.parametrize("seed", [0, 1])
def test_token_rewards_and_their_prefix_sums(seed):
    batch, cu = batch_of(seed)
    got = fa.token_rewards(
        batch.logprobs.requires_grad_(), batch.ref_logprobs, cu, mask=batch.packed.mask, beta=0.3
    )
    assert not got.rewards.requires_grad
    rewards, sums = torch.zeros(cu[-1], dtype=torch.float64), torch.zeros(cu[-1], dtype=torch.float64)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        total = 0.0
        for t in range(begin, end):
            if batch.packed.mask[t]:
                rewards[t] = 0.3 * (float(batch.logprobs[t]) - float(batch.ref_logprobs[t]))
            total += float(rewards[t])
            sums[t] = total
    assert_close(got.rewards, rewards, scale=1.0)
    assert_close(got.prefix_sums, sums, scale=1.0)


def test_token_rewards_ignore_what_is_masked():
    lp, rp = torch.tensor([math.nan, -1.0, -math.inf, -2.0]), torch.tensor([0.0, -1.5, -math.inf, math.inf])
    got = fa.token_rewards(
        lp,
        rp,
        torch.tensor([0, 4], dtype=torch.int32),
        mask=torch.tensor([False, True, True, False]),
        beta=2.0,
    )
    assert got.rewards.tolist() == [0.0, 1.0, 0.0, 0.0] and got.prefix_sums.tolist() == [0.0, 1.0, 1.0, 1.0]
    empty = fa.token_rewards(lp[:0], rp[:0], torch.zeros(3, dtype=torch.int32))
    assert empty.rewards.shape == empty.prefix_sums.shape == (0,)


@pytest.mark.parametrize("clip,score_clip", [(0.05, 10.0), (None, None)])
def test_rto_rewards(clip, score_clip):
    batch, cu = batch_of(2)
    mask, generator = batch.packed.mask, torch.Generator().manual_seed(3)
    dpo = batch.logprobs + 2.0 * torch.randn(batch.logprobs.shape, generator=generator)
    scores = torch.tensor([1.0, -30.0, 5.0, 0.5, 12.0, -0.25, 3.0])
    got = fa.rto_rewards(
        dpo, batch.logprobs, batch.ref_logprobs, cu, scores, mask=mask, clip=clip, score_clip=score_clip
    )
    want = torch.zeros(cu[-1], dtype=torch.float64)
    for i, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist())):
        rows = [t for t in range(begin, end) if mask[t]]
        for t in rows:
            dense = 0.05 * (float(dpo[t]) - float(batch.ref_logprobs[t]))
            dense = dense if clip is None else max(-clip, min(clip, dense))
            want[t] = dense - 0.01 * (float(batch.logprobs[t]) - float(batch.ref_logprobs[t]))
        if rows:
            score = float(scores[i])
            want[rows[-1]] += score if score_clip is None else max(-score_clip, min(score_clip, score))
    assert_close(got, want, scale=want.abs().clamp(min=1.0))


def test_errors_name_the_argument():
    x, cu = torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32)
    for error, words, call in (
        (ValueError, "beta=0.0", lambda: fa.token_rewards(x, x, cu, beta=0.0)),
        (ValueError, "ref_logprobs has shape", lambda: fa.token_rewards(x, x[:2], cu)),
        (ValueError, "cu_seqlens must start at 0", lambda: fa.token_rewards(x, x, cu + 1)),
        (ValueError, "clip=-1", lambda: fa.rto_rewards(x, x, x, cu, x[:1], mask=x == 0, clip=-1.0)),
    ):
        with pytest.raises(error, match=words):
            call()


def test_kl_estimate_takes_floating_tensors():
    x = torch.zeros(2)
    for words, call in (
        ("logprobs must be a tensor, got list", lambda: fa.kl_estimate([0.0, 1.0], x)),
        ("ref_logprobs must be a tensor, got list", lambda: fa.kl_estimate(x, [0.0, 1.0])),
        ("logprobs must be floating point, got torch.int64", lambda: fa.kl_estimate(x.long(), x)),
        ("ref_logprobs must be floating point, got torch.int64", lambda: fa.kl_estimate(x, x.long())),
    ):
        with pytest.raises(TypeError, match=words):
            call()
