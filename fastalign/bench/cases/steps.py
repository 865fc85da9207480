"""Whole training steps of a small random Llama, without the optimizer, which is the same for all: the forward
pass of the reference, forward and backward of the policy, the loss between them. Others run the padded batch,
as their trainers do; ours is that of `fastalign train`, packed. What a step costs at least are the packed
backbones and the four products of the head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign.bench import eager
from fastalign.bench.cases.case import Case, Contestant
from fastalign.bench.shapes import Step

SAMPLED = 64  # entries of a gradient that are compared with fp64
TILE = 1024  # rows that the floor multiplies at a time

# (log-probs of the policy, of the reference, the batch) -> the loss's sum; padded [S, L - 1]
PaddedLoss = Callable[[Tensor, Tensor, "Padded"], Tensor]


def dpo(shape: Step, device: torch.device, cache_bytes: int) -> Case:
    """DPO on pairs; half of the sequences are chosen, half rejected."""
    pairs = shape.sequences // 2

    def loss(logprobs: Tensor, ref: Tensor, batch: Padded) -> Tensor:
        return eager.dpo_loss_of_sums((logprobs * batch.mask).sum(-1), (ref * batch.mask).sum(-1)) / pairs

    def packed_loss(logprobs: Tensor, ref: Tensor, batch: Any, of: Batch) -> Tensor:
        order = torch.arange(2 * pairs, device=device).view(2, pairs).t()
        return fastalign.preference_loss(
            logprobs, ref, batch.cu_seqlens, mask=batch.mask, pairs=order, loss="dpo", beta=eager.BETA
        ).loss

    parts = [[i, pairs + i] for i in range(pairs)]
    return _case("dpo_step", shape, device, loss, packed_loss, parts)


def grpo(shape: Step, device: torch.device, cache_bytes: int) -> Case:
    """GRPO with a KL to the reference, on responses whose log-probs at sampling time are known."""

    def loss(logprobs: Tensor, ref: Tensor, batch: Padded) -> Tensor:
        old, advantages = batch.old.to(logprobs.dtype), batch.advantages.to(logprobs.dtype)
        return eager.grpo_loss(logprobs, ref, old, advantages, batch.mask) / shape.sequences

    def packed_loss(logprobs: Tensor, ref: Tensor, batch: Any, of: Batch) -> Tensor:
        return fastalign.policy_loss(
            logprobs, of.packed_old, of.padded.advantages, cu_seqlens=batch.cu_seqlens, mask=batch.mask,
            ref_logprobs=ref,
            loss="grpo", clip_low=eager.CLIP, clip_high=eager.CLIP, kl_coef=eager.KL_COEF, kl_kind="k3",
        ).loss  # fmt: skip

    return _case("grpo_step", shape, device, loss, packed_loss, [[i] for i in range(shape.sequences)])


@dataclass
class Padded:
    """[S, L] token ids and attention mask; labels [S, L - 1], of the row before each token; which of them are
    of a response; the log-probs at sampling time; an advantage per sequence."""

    ids: Tensor
    attention: Tensor
    labels: Tensor
    mask: Tensor
    old: Tensor
    advantages: Tensor

    def of(self, rows: list[int]) -> Padded:
        return Padded(*(x[rows] for x in vars(self).values()))


@dataclass
class Batch:
    """The same batch in both layouts."""

    padded: Padded
    packed: Any
    packed_old: Tensor  # [T]


def _batch(shape: Step, device: torch.device) -> Batch:
    """A quarter of a sequence is its prompt; lengths vary from a third to all of shape.length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(
        max(4, shape.length // 3), shape.length + 1, (shape.sequences,), generator=generator
    )
    lengths[0] = shape.length
    ids = [torch.randint(shape.vocab, (n,), generator=generator) for n in lengths.tolist()]
    masks = [torch.arange(len(x)) >= max(1, len(x) // 4) for x in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    padded_ids = pad(ids, batch_first=True)
    mask = pad(masks, batch_first=True)[:, 1:]
    # Some tokens beyond either bound of the clip and none next to it, where two precisions may disagree.
    moved = 0.1 * torch.rand(mask.shape, generator=generator)
    moved += 0.4 * torch.randint(-1, 2, mask.shape, generator=generator)
    padded = Padded(padded_ids, pad([torch.ones_like(x) for x in ids], batch_first=True), padded_ids[:, 1:],
        mask, moved,
                    torch.randn(shape.sequences, generator=generator))  # fmt: skip
    return Batch(
        Padded(*(x.to(device) for x in vars(padded).values())),
        fastalign.pack(ids, masks=masks).to(device),
        torch.empty(0),
    )


def _models(shape: Step, device: torch.device) -> tuple[Any, Any]:
    """(policy, reference), the latter a little way off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(2, shape.hidden // 64)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=shape.length,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = LlamaForCausalLM(config).eval().to(device)
        reference = copy.deepcopy(policy).requires_grad_(False)
        for p in reference.parameters():
            p.add_(0.002 * torch.randn(p.shape).to(device))
    return policy, reference


def _case(
    op: str,
    shape: Step,
    device: torch.device,
    loss: PaddedLoss,
    packed_loss: Callable[..., Tensor],
    parts: list[list[int]],
) -> Case:
    """`parts`: the sequences that belong together, for fp64, which takes them in turn."""
    from fastalign.train.models.causal import PackedCausalLM
    from fastalign.train.models.probe import Lengths

    policy, reference = _models(shape, device)
    batch = _batch(shape, device)
    padded, packed = batch.padded, batch.packed

    def autocast() -> Any:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=shape.dtype == "bfloat16")

    def logprobs_of(model: Any, part: Padded) -> Tensor:
        logits = model(input_ids=part.ids, attention_mask=part.attention, use_cache=False).logits
        return eager.log_softmax_gather(logits[:, :-1], part.labels)

    def with_logits(part: Padded, policy: Any = policy, reference: Any = reference) -> Tensor:
        with torch.no_grad():
            ref = logprobs_of(reference, part)
        value = loss(logprobs_of(policy, part), ref, part)
        value.backward()
        return value.detach()

    with torch.no_grad(), autocast():
        padded.old += torch.cat([logprobs_of(policy, padded.of([i])).float() for i in range(shape.sequences)])
    ends = packed.cu_seqlens[1:].long() - 1
    batch.packed_old = torch.zeros(len(packed.labels), device=device)
    rows = torch.ones_like(batch.packed_old, dtype=torch.bool).index_fill_(0, ends, False)
    batch.packed_old[rows] = padded.old[padded.attention[:, 1:].bool()]

    def in_parts(*models: Any) -> Tensor:
        """A part of the batch at a time: there need be no room for all logits, nor for them in fp64."""
        values = [with_logits(padded.of(rows), *models) for rows in parts]
        return _taken(models[0], torch.stack(values).sum())

    truth = in_parts(*(copy.deepcopy(m).double() for m in (policy, reference)))
    with autocast():
        baseline = in_parts(policy, reference)

    twin = copy.deepcopy(policy)
    attention = "auto" if device.type == "cuda" else "packed"
    lm = PackedCausalLM(
        twin, head="fused", device=device.type, dtype=shape.dtype, attention=attention,
        lengths=Lengths(shape.length, len(packed.labels))
    )  # fmt: skip
    ref_lm = lm.frozen_copy()
    ref_lm.model.load_state_dict(reference.state_dict())

    def ours(*inputs: Any) -> Tensor:
        with torch.no_grad():
            ref = ref_lm.scores(packed).stats(packed.labels).logprob
        value = packed_loss(lm.scores(packed).stats(packed.labels).logprob, ref, packed, batch)
        value.backward()
        return _taken(twin, value)

    def plain(*inputs: Any) -> Tensor:
        with autocast():
            value = with_logits(padded)
        return _taken(policy, value)

    scored = packed.mask.nonzero().squeeze(-1)

    def floor(*inputs: Any) -> Tensor:
        with torch.no_grad():
            hidden = ref_lm.scores(packed).hidden[scored]
            _multiply(hidden, ref_lm.head().weight, backward=False)
        hidden = lm.scores(packed).hidden
        _multiply(hidden.detach()[scored], lm.head().weight.detach(), backward=True)
        hidden.backward(torch.ones_like(hidden))
        twin.zero_grad(set_to_none=True)
        return hidden.detach()

    contestants = [
        Contestant("fastalign", ours, "ours"),
        Contestant("padded, all logits, log_softmax.gather", plain, "eager"),
        Contestant("backbones and the head's products alone", floor, "floor"),
    ]
    missing = {}
    try:
        contestants.append(
            Contestant("trl's fused head, padded", _trl(policy, reference, padded, loss, autocast), "peer")
        )
    except (ImportError, AttributeError) as error:
        missing["trl's fused head, padded"] = str(error).splitlines()[0]
    # Under autocast it is the backbone that rounds, to its type.
    rounding = torch.finfo(getattr(torch, shape.dtype)).eps / torch.finfo(torch.float32).eps
    scale = torch.full_like(truth, rounding * float(truth.abs().max()))
    inputs = [(policy.get_output_embeddings().weight,)]
    return Case(op, shape, inputs, 0, contestants, truth, baseline, scale=scale, missing=missing)


def _trl(
    policy: Any, reference: Any, padded: Padded, loss: PaddedLoss, autocast: Any
) -> Callable[..., Tensor]:
    """TRL's trainers on TRL's head: log-probs of the responses, without the logits."""
    from trl.trainer.utils import add_fused_lm_head

    twins = [copy.deepcopy(m) for m in (policy, reference)]
    for model in twins:
        add_fused_lm_head(model)
    labels = padded.ids.masked_fill(~torch.nn.functional.pad(padded.mask, (1, 0)), -100)

    def logprobs(model: Any) -> Tensor:
        found = model(
            input_ids=padded.ids, attention_mask=padded.attention, labels=labels, fused_lm_head=True
        )
        return found.log_probs

    def run(*inputs: Any) -> Tensor:
        with autocast():
            with torch.no_grad():
                ref = logprobs(twins[1])
            value = loss(logprobs(twins[0]), ref, padded)
        value.backward()
        return _taken(twins[0], value)

    return run


def _multiply(hidden: Tensor, weight: Tensor, *, backward: bool) -> None:
    """The products of a head on all rows, a tile at a time."""
    weight = weight.to(hidden.dtype)
    logits = hidden.new_empty(min(TILE, len(hidden)), len(weight))
    out = torch.empty_like(hidden), torch.empty_like(weight)
    for first in range(0, len(hidden), TILE):
        h = hidden[first : first + TILE]
        tile = torch.mm(h, weight.t(), out=logits[: len(h)])
        if backward:
            torch.mm(tile, weight, out=out[0][first : first + TILE])
            torch.mm(tile.t(), h, out=out[1])


def _taken(model: Any, loss: Tensor) -> Tensor:
    """The loss and some entries of gradients from the head down to the embedding; the gradients are freed."""
    layers = model.model.layers
    weights = (
        model.lm_head.weight,
        layers[-1].mlp.down_proj.weight,
        layers[0].self_attn.q_proj.weight,
        model.model.embed_tokens.weight,
    )
    parts = [loss.detach().reshape(1)]
    for weight in weights:
        places = torch.linspace(0, weight.numel() - 1, SAMPLED, device=weight.device).long()
        parts.append(weight.grad.flatten()[places].to(loss.dtype))
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)
