"""The kernel against plain PyTorch, on the GPU where there is one: `pytest tests` in the kernel's directory."""

from pathlib import Path

import kernels
import pytest
import torch
import torch.nn.functional as F

fa = kernels.get_local_kernel(Path(__file__).resolve().parents[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels_ci
def test_logprobs_and_entropy():
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(9, 300, device=DEVICE, generator=generator, requires_grad=True)
    labels = torch.arange(9, device=DEVICE)
    log_p = F.log_softmax(logits, -1)
    wanted = log_p.gather(1, labels[:, None])[:, 0]
    found = fa.token_logprobs(logits, labels)
    close(found, wanted)
    close(fa.entropy_from_logits(logits), -(log_p.exp() * log_p).sum(-1))
    weights = torch.linspace(-1.0, 1.0, 9, device=DEVICE)
    close(*(torch.autograd.grad(x, logits, weights, retain_graph=True)[0] for x in (found, wanted)))


@pytest.mark.kernels_ci
def test_dpo():
    cu_seqlens = torch.tensor([0, 3, 5, 9, 11], device=DEVICE, dtype=torch.int32)
    logprobs, reference = (-torch.rand(11, device=DEVICE) for _ in range(2))
    sums = torch.stack([(logprobs - reference)[a:b].sum() for a, b in ((0, 3), (3, 5), (5, 9), (9, 11))])
    wanted = -F.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).mean()
    close(fa.preference_loss(logprobs, reference, cu_seqlens, loss="dpo", beta=0.1).loss, wanted)


@pytest.mark.kernels_ci
def test_gae():
    rewards, values = torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE)
    found = fa.gae(
        rewards, values, torch.tensor([0, 6], device=DEVICE, dtype=torch.int32), gamma=0.9, lam=0.8
    )
    advantage, after, wanted = 0.0, 0.0, []
    for reward, value in zip(rewards.tolist()[::-1], values.tolist()[::-1]):
        advantage = reward + 0.9 * after - value + 0.9 * 0.8 * advantage
        after = value
        wanted.insert(0, advantage)
    close(found.advantages, torch.tensor(wanted, device=DEVICE))
