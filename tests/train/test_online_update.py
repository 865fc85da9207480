"""The gradient of an update against the method's formula in plain PyTorch: padding-free path, losses,
denominators and all weights at once."""

import pytest
import torch
import torch.nn.functional as F
from online_cases import TEXTS, check, look


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_ppo(first_update, tokenizer, kl_in):
    options = {
        "kl_coef": 0.3,
        "kl_in": kl_in,
        "kl_kind": "k1" if kl_in == "reward" else "k3",
        "entropy_coef": 0.05,
        "temperature": 0.8,
    }
    options |= {"gamma": 0.9, "lam": 0.7, "vf_coef": 0.4, "ptx_coef": 0.6, "value_clip": 0.0}
    model, head, reference, rollouts, scores = first_update("ppo", **options)
    policy, ref = look(model, rollouts, 0.8, head), look(reference, rollouts, 0.8)
    advantages, returns = [], []
    for (logp, _, values), (ref_logp, _, _), score in zip(policy, ref, scores):
        rewards = -0.3 * (logp - ref_logp).detach() if kl_in == "reward" else torch.zeros_like(logp)
        rewards[-1] += score
        trace, following, out = 0.0, 0.0, []
        for t in reversed(range(len(logp))):
            trace = rewards[t] + 0.9 * following - values[t].detach() + 0.9 * 0.7 * trace
            following = values[t].detach()
            out.insert(0, trace)
        advantages.append(torch.stack(out))
        returns.append(torch.stack(out) + values.detach())
    logp, entropy, values = (torch.cat(parts) for parts in zip(*policy))
    ref_logp, advantages, returns = (
        torch.cat([each[0] for each in ref]).detach(),
        torch.cat(advantages),
        torch.cat(returns),
    )
    advantages = (advantages - advantages.mean()) / torch.sqrt(advantages.var() + 1e-8)
    loss = (
        -(advantages * (logp - logp.detach()).exp()).mean()
        + 0.4 * 0.5 * ((values - returns) ** 2).mean()
        - 0.05 * entropy.mean()
    )
    if kl_in == "loss":
        loss = loss + 0.3 * ((ref_logp - logp).exp() - 1 + logp - ref_logp).mean()
    nll = []
    for text in TEXTS:
        ids = torch.tensor([*tokenizer(text)["input_ids"], 1])
        nll.append(F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    check([*model.parameters(), *head.parameters()], loss + 0.6 * torch.cat(nll).mean())


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_grpo(first_update, name):
    """Where every ratio is 1 the losses differ in their denominators."""
    model, _, _, rollouts, scores = first_update("grpo", loss=name, samples_per_prompt=3)
    policy, total = look(model, rollouts, 1.0), 0.0
    tokens = sum(len(logp) for logp, _, _ in policy)
    for i, (logp, _, _) in enumerate(policy):
        group = torch.tensor(scores[i // 3 * 3 : i // 3 * 3 + 3])
        advantage = (scores[i] - group.mean()) / (1.0 if name == "dr_grpo" else group.std() + 1e-4)
        weight = {
            "grpo": 1 / (12 * len(logp)),
            "dapo": 1 / tokens,
            "dr_grpo": 1 / (12 * 6),
            "gspo": 1 / (12 * len(logp)),
        }[name]
        total = total - advantage * weight * logp.sum()
    check(model.parameters(), total)
