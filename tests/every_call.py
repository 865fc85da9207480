"""Every public function on small inputs, forward and backward, for tests that give it tensors of all
kinds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

import fastalign as fa
from fastalign.testing import make_batch, make_labels, make_logits

DIFFERENTIABLE = ("logits", "logprobs", "totals", "hidden", "weight")
# Public functions that take no tensors (or build tensors from lists), and those whose result's size depends
# on data.
WITHOUT_TENSORS = {
    "backends",
    "explain",
    "rejection_sample",
    "pack",
    "global_denominator",
    "merge_metrics",
    "unpad",
    "use_backend",
}


def inputs() -> dict[str, Tensor]:
    """Tensors on the CPU: 6 sequences, 3 pairs, 2 lists."""
    batch = make_batch(3)
    tokens = batch.logprobs.shape[0]
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(3)) + 0.5
    return {
        "logits": make_logits(tokens, 23), "ref_logits": make_logits(tokens, 23, seed=1), "labels": make_labels(tokens, 23, ignored=0.2),
        "logprobs": batch.logprobs, "ref": batch.ref_logprobs, "kl": batch.kl_ref_policy, "weights": weights, "ids": batch.packed.input_ids,
        "cu": batch.packed.cu_seqlens, "mask": batch.packed.mask, "pairs": torch.tensor([[0, 1], [5, 2], [0, 3]]),
        "offsets": torch.tensor([0, 2, 6]), "scores": torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1, 1.0]), "groups": torch.tensor([0, 0, 1, 1, 1, 0]),
        "desirable": torch.tensor([True, False, True, True, False, False]), "totals": torch.tensor([-3.0, -5.0, -4.0, -2.0, -6.0, -1.0]),
        "lengths": torch.tensor([3.0, 4.0, 2.0, 5.0, 3.0, 1.0]), "one": torch.tensor(0.7), "per_pair": torch.tensor([0.1, 0.2, 0.3]),
        "kept": torch.tensor([0, 2, 3]), "hidden": make_logits(tokens, 8, seed=4), "weight": make_logits(23, 8, seed=5),
        "bias": make_logits(1, 23, seed=6)[0], "ref_hidden": make_logits(tokens, 5, seed=7), "ref_weight": make_logits(23, 5, seed=8),
        "support": torch.tensor([3, 0, 22, -1, 3]).repeat(tokens, 1), "support_offsets": torch.arange(tokens + 1) * 5,
    }  # fmt: skip


def calls(given: dict[str, Tensor]) -> dict[str, Callable[[], list[Tensor]]]:
    """name -> a call that returns results and gradients. Names begin with the public function's."""
    x = SimpleNamespace(**given)

    def through(function: Callable[..., object], of: str | None = None) -> Callable[[], list[Tensor]]:
        """Calls `function`; with `of`, differentiates what it returns in that input, which takes the place of
        the given one."""

        def call() -> list[Tensor]:
            if of is None:
                return tensors(function())
            leaf = getattr(x, of).detach().requires_grad_()
            out = tensors(function(leaf))
            wanted = [t for t in out if t.requires_grad]
            grads = torch.autograd.grad(wanted, leaf, [torch.ones_like(t) for t in wanted])
            return [*(t.detach() for t in out), *grads]

        return call

    token = {"cu_seqlens": x.cu, "mask": x.mask}
    every = (
        "logprob",
        "entropy",
        "logsumexp",
        "log_sum_sq_probs",
        "mean_logit",
        "is_top1",
        "ref_logprob",
        "kl_policy_ref",
        "kl_ref_policy",
    )
    mixture = [("dpo", 1.0), ("sft", 0.5)]
    found = {
        "token_stats": (lambda z: fa.token_stats(z, x.labels, ref_logits=x.ref_logits, outputs=every, mask=x.mask, temperature=x.one), "logits"),
        "token_logprobs": (lambda z: fa.token_logprobs(z * 1, x.labels, inplace_backward=True), "logits"),
        "selective_log_softmax": (lambda z: fa.selective_log_softmax(z, x.labels.clamp(min=0)), "logits"),
        "entropy_from_logits": (fa.entropy_from_logits, "logits"),
        "token_kl": (lambda z: fa.token_kl(z, x.ref_logits, mask=x.mask), "logits"),
        "token_kl_loss": (lambda z: fa.token_kl_loss(z, x.ref_logits, x.one, mask=x.mask), "logits"),
        "token_kl_loss inplace": (lambda z: 2 * fa.token_kl_loss(z * 1, x.ref_logits, x.one, inplace=True).loss, "logits"),
        "linear_token_stats": (
            lambda h: fa.linear_token_stats(
                h, x.weight, x.labels, bias=x.bias, ref_hidden=x.ref_hidden, ref_weight=x.ref_weight, outputs=every, temperature=x.one
            ),
            "hidden",
        ),
        "linear_token_stats tiles": (
            lambda w: fa.linear_token_stats(x.hidden, w, x.labels, outputs=("logprob", "entropy"), mask=x.mask, workspace_bytes=999), "weight"
        ),
        "linear_token_logprobs": (lambda h: fa.linear_token_logprobs(h, x.weight, x.labels, batch_invariant=True), "hidden"),
        "linear_token_logprobs frozen": (lambda h: fa.linear_token_logprobs(h, x.weight, x.labels), "hidden"),
        "logprobs_at": (
            lambda h: fa.logprobs_at(h, x.weight, x.support, x.labels, bias=x.bias, with_mass=True, mask=x.mask, temperature=x.one), "hidden"
        ),
        "logprobs_at offsets": (
            lambda w: fa.logprobs_at(x.hidden, w, x.support.reshape(-1), offsets=x.support_offsets, softcap=5.0, workspace_bytes=999),
            "weight",
        ),
        "token_stats support": (
            lambda z: fa.token_stats(z, x.labels, support=x.support, outputs=("logprob", "entropy", "is_top1"), mask=x.mask), "logits"
        ),
        "linear_token_kl_loss": (
            lambda h: 2 * fa.linear_token_kl_loss(h, x.weight, x.ref_hidden, x.ref_weight, x.one, mask=x.mask).loss, "hidden"
        ),
        "linear_preference_loss": (lambda w: fa.linear_preference_loss(x.hidden, w, x.labels, x.cu, ref_logprobs=x.ref), "weight"),
        "linear_policy_loss": (lambda h: fa.linear_policy_loss(h, x.weight, x.labels, x.ref, x.kl, cu_seqlens=x.cu, entropy_coef=0.1), "hidden"),
        "linear_policy_loss sequences": (
            lambda h: fa.linear_policy_loss(h, x.weight, x.labels, x.ref, x.scores, cu_seqlens=x.cu), "hidden"
        ),
        "linear_policy_loss gspo": (
            lambda w: fa.linear_policy_loss(x.hidden, w, x.labels, x.ref, x.scores, loss="gspo", cu_seqlens=x.cu), "weight"
        ),
        "kl_estimate": (lambda lp: fa.kl_estimate(lp, x.ref), "logprobs"),
        "sequence_sum": (lambda lp: fa.sequence_sum(lp, x.cu, mask=x.mask, weights=x.weights, mean=True), "logprobs"),
        "preference_loss": (lambda lp: fa.preference_loss(lp, x.ref, x.cu, mask=x.mask, weights=x.weights), "logprobs"),
        "preference_loss pairs": (lambda lp: fa.preference_loss(lp, x.ref, x.cu, pairs=x.pairs, beta=x.per_pair, reduction="none"), "logprobs"),
        "preference_loss counts": (lambda lp: fa.preference_loss(lp, x.ref, x.cu, num_items=x.one, beta=x.one), "logprobs"),
        "preference_loss tdpo": (lambda lp: fa.preference_loss(lp, x.ref, x.cu, loss="tdpo2", kl_ref_policy=x.kl), "logprobs"),
        "preference_loss mixture": (lambda lp: fa.preference_loss(lp, x.ref, x.cu, mask=x.mask, loss=mixture), "logprobs"),
        "preference_loss aot": (lambda lp: fa.preference_loss(lp, x.ref, x.cu, loss="aot"), "logprobs"),
        "preference_loss aot beta": (lambda lp: fa.preference_loss(lp, x.ref, x.cu, loss="aot", beta=x.one), "logprobs"),
        "preference_loss rule": (lambda lp: fa.preference_loss(lp, x.ref, x.cu, loss="beta_dpo", state=fa.BetaDPO()), "logprobs"),
        "preference_loss alpha": (
            lambda lp: fa.preference_loss(lp, x.ref, x.cu, mask=x.mask, loss="alpha_dpo", state=fa.AlphaDPO()), "logprobs"
        ),
        "preference_loss_from_sums": (
            lambda s: fa.preference_loss_from_sums(s, x.lengths, x.totals * 0.5, x.totals * 0.3, chosen_lengths=x.lengths), "totals"
        ),
        "listwise_loss": (lambda lp: fa.listwise_loss(lp, x.ref, x.cu, x.offsets, x.scores, mask=x.mask), "logprobs"),
        "listwise_loss none": (lambda lp: fa.listwise_loss(lp, x.ref, x.cu, x.offsets, x.scores, reduction="none", beta=x.one), "logprobs"),
        "listwise_loss_from_sums": (lambda s: fa.listwise_loss_from_sums(s, x.totals * 0.5, x.offsets, x.scores), "totals"),
        "unpaired_loss kto": (lambda lp: fa.unpaired_loss(lp, x.ref, x.cu, x.desirable, mask=x.mask, baseline=x.one), "logprobs"),
        "unpaired_loss bco": (lambda lp: fa.unpaired_loss(lp, x.ref, x.cu, x.desirable, loss="bco", state=fa.BCODelta()), "logprobs"),
        "unpaired_loss dro": (
            lambda lp: fa.unpaired_loss(lp, x.ref, x.cu, x.desirable, loss="dro", rewards=x.scores, values=x.totals), "logprobs"
        ),
        "kto_baseline": (lambda: fa.kto_baseline(x.logprobs, x.ref, x.cu, mask=x.mask), None),
        "policy_loss": (
            lambda lp: fa.policy_loss(lp, x.ref, x.kl, mask=x.mask, cu_seqlens=x.cu, ref_logprobs=x.ref, kl_coef=x.one, is_weight=x.weights),
            "logprobs",
        ),
        "policy_loss gspo": (lambda lp: fa.policy_loss(lp, x.ref, x.scores, loss="gspo", **token), "logprobs"),
        "policy_loss entropy": (lambda lp: fa.policy_loss(x.ref, None, x.kl, entropy=lp, entropy_coef=0.1, mask=x.mask), "logprobs"),
        "value_loss": (lambda v: fa.value_loss(v, x.ref, x.kl, mask=x.mask), "logprobs"),
        "gae": (lambda: fa.gae(x.logprobs, x.ref, x.cu, mask=x.mask, gamma=x.one, bootstrap=x.scores), None),
        "returns_to_go": (lambda: fa.returns_to_go(x.logprobs, x.cu, mask=x.mask), None),
        "shape_rewards": (
            lambda: fa.shape_rewards(
                x.scores, x.cu, mask=x.mask, logprobs=x.logprobs, ref_logprobs=x.ref, kl_coef=x.one, finished=x.desirable, missing_eos_penalty=1.0
            ),
            None,
        ),
        "whiten": (lambda: fa.whiten(x.logprobs, x.mask), None),
        "mean_sequence_kl": (lambda: fa.mean_sequence_kl(x.logprobs, x.ref, x.cu, mask=x.mask), None),
        "group_advantages": (lambda: fa.group_advantages(x.scores, x.groups), None),
        "dynamic_sampling_mask": (lambda: fa.dynamic_sampling_mask(x.scores, x.groups), None),
        "overlong_penalty": (lambda: fa.overlong_penalty(x.lengths, max_length=4, cache_length=2), None),
        "token_rewards": (lambda: fa.token_rewards(x.logprobs, x.ref, x.cu, mask=x.mask), None),
        "rto_rewards": (lambda: fa.rto_rewards(x.logprobs, x.ref, x.kl, x.cu, x.scores, mask=x.mask), None),
        "reward_loss": (lambda s: fa.reward_loss(s, x.lengths), "totals"),
        "kwise_reward_loss": (lambda s: fa.kwise_reward_loss(s, x.offsets, x.scores), "totals"),
        "wpo_weights": (lambda: fa.wpo_weights(x.logprobs, x.kl, x.cu, mask=x.mask), None),
        "wpo_weights pairs": (lambda: fa.wpo_weights(x.logprobs, x.kl, x.cu, mask=x.mask, pairs=x.pairs), None),
        "shift_labels": (lambda: fa.shift_labels(x.ids, x.cu, x.mask), None),
        "repad": (lambda: fa.repad(x.per_pair, x.kept, (2, 2)), None),
    }  # fmt: skip
    return {name: through(function, of) for name, (function, of) in found.items()}


NAMES = tuple(calls(inputs()))


def tensors(value: object) -> list[Tensor]:
    """Tensors in a result: a tensor, or the fields of a tuple or output object, None left out."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors(v)]
    if value is None or isinstance(value, (int, float, str, bool)):
        return []
    out = [value.loss] if hasattr(value, "loss") else []
    return (
        out
        + (tensors(value.metrics()) if hasattr(value, "metrics") else [])
        + tensors(getattr(value, "sum", None))
    )
