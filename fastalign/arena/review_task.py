"""A controlled text task: short product reviews whose gold reward is computed from their words, and a model
small enough for a laptop.

The task stands in for human feedback where a method is to be shown working: the true reward of any text is
known exactly, so a trained policy can be judged by what it was meant to maximise, beside the implicit rewards
and log-probs that training itself sees. Everything is generated here from a seed; nothing is downloaded. SFT
data, prompts, preference pairs, sampling and scoring are separate functions, each usable with any causal LM
from transformers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastalign
from fastalign.train.data.formats import Texts
from fastalign.train.data.tokenise import ExampleTokenizer, TokenExample, token_pair
from fastalign.train.models.causal import PackedCausalLM

PRODUCTS = ("kettle", "lamp", "chair", "phone", "radio", "clock", "mug", "bag", "desk", "fan", "pen", "watch")
# The kinds of product, unequal in number: the tasks of methods that weigh tasks.
KINDS = {
    "carried": ("bag", "watch", "pen"),
    "kitchen": ("kettle", "mug"),
    "room": ("lamp", "chair", "phone", "radio", "clock", "desk", "fan"),
}
PARTS = ("handle", "base", "cover", "finish", "button", "edge")
POSITIVE = ("great", "lovely", "sturdy", "quiet", "pretty", "smooth", "clever", "solid")
NEGATIVE = ("awful", "ugly", "flimsy", "noisy", "dirty", "clumsy", "broken", "dull")
LIKE = ("love", "enjoy", "adore")
DISLIKE = ("hate", "regret", "resent")
TEMPLATES = (
    " it is {a} and {b}. i {verb} it.",
    " the {part} is {a}, the {other} is {b}. i {verb} it.",
    " the {part} looks {a} and it is {b}. i {verb} it.",
)
_GOOD, _BAD = frozenset(POSITIVE + LIKE), frozenset(NEGATIVE + DISLIKE)
_KNOWN = _GOOD | _BAD | set(PRODUCTS) | set(PARTS) | {"it", "is", "and", "the", "i", "looks"}
# Sentiment words that a review needs for full marks, and words after which it counts as too long.
FULL_MARKS, WORD_LIMIT = 3, 16
MAX_NEW_TOKENS = 72  # the longest review has 61 bytes and an end-of-sequence token


class Example(NamedTuple):
    """A prompt and a completion, as texts."""

    prompt: str
    completion: str


class Sample(NamedTuple):
    """A sampled completion: token ids of the prompt and of the completion (with its end-of-sequence token if
    it came to one), its text."""

    prompt: list[int]
    completion: list[int]
    text: str


def gold_reward(text: str) -> float:
    """The true reward of a review, in [0, 1]: fluency * (1 + sentiment) / 2.

    sentiment = (distinct positive words - distinct negative words) / 3, clipped to [-1, 1]; fluency = share of words that the task's
    vocabulary knows, times 16 / words for texts of more than 16 words. Repeating a word gains nothing, and neither does length."""
    words = re.findall(r"[^\s.,:]+", text)
    if not words:
        return 0.0
    distinct = set(words)
    sentiment = max(-1.0, min(1.0, (len(distinct & _GOOD) - len(distinct & _BAD)) / FULL_MARKS))
    fluency = sum(word in _KNOWN for word in words) / len(words) * min(1.0, WORD_LIMIT / len(words))
    return fluency * (1.0 + sentiment) / 2.0


def make_prompts(count: int, seed: int) -> list[str]:
    """Prompts, drawn independently."""
    draw = random.Random(seed)
    return [f"review of the {draw.choice(PRODUCTS)}:" for _ in range(count)]


def kind(prompt: str) -> str:
    """The kind of product that a prompt asks for."""
    return next(
        name for name, products in KINDS.items() if any(f" {product}:" in prompt for product in products)
    )


def make_reviews(count: int, seed: int) -> list[Example]:
    """The SFT corpus: reviews whose sentiment words are positive or negative independently of one another,
    half and half."""
    draw = random.Random(seed)
    reviews = []
    for prompt in make_prompts(count, seed + 1):
        adjectives = [draw.choice(draw.choice((POSITIVE, NEGATIVE))) for _ in range(2)]
        part, other = draw.sample(PARTS, 2)
        verb = draw.choice(draw.choice((LIKE, DISLIKE)))
        text = draw.choice(TEMPLATES).format(
            a=adjectives[0], b=adjectives[1], part=part, other=other, verb=verb
        )
        reviews.append(Example(prompt, text))
    return reviews


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (256), and <pad> and </s>. Any text round-trips; `save_pretrained` and
    `from_pretrained` work as usual."""
    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, hidden: int = 128, layers: int = 3, heads: int = 4
) -> LlamaForCausalLM:
    """A Llama with random weights that fits the tokenizer (0.6 million parameters as it stands)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_sft(
    model: torch.nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> list[float]:
    """Supervised fine-tuning on packed examples, the loss over the completions' tokens only. AdamW, linear
    warm-up over a tenth of the steps, then linear decay. Returns the loss (nats per token) of every step."""
    draw = random.Random(seed)
    lm = PackedCausalLM(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    try:
        for step in tqdm(range(steps), desc="SFT", unit=" steps", disable=None):
            batch = _pack(tokenizer, draw.sample(examples, min(batch_size, len(examples)))).to(lm.device)
            logprobs = fastalign.token_logprobs(lm.logits(batch), batch.labels, inplace_backward=True)
            loss = -logprobs.sum() / batch.mask.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            if (step + 1) % max(1, steps // 4) == 0:
                with tqdm.external_write_mode():
                    print(f"SFT step {step + 1}/{steps}: loss {losses[-1]:.3f} nats per token", flush=True)
    finally:
        lm.restore()
    return losses


def _pack(tokenizer: Any, examples: Sequence[Example]) -> fastalign.PackedBatch:
    """Prompts and completions (each with its end-of-sequence token) end to end, completions scored."""
    to_tokens = ExampleTokenizer(tokenizer)
    texts = (Texts("SFT example", e.prompt, (e.completion,), ("completion",)) for e in examples)
    rows = [(tokens.prompt, tokens.completions[0]) for tokens, _ in map(to_tokens, texts)]
    return fastalign.pack(
        [torch.cat(row) for row in rows], [[False] * len(p) + [True] * len(c) for p, c in rows]
    )


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    batch_size: int = 256,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **options: Any,
) -> list[Sample]:
    """One completion per prompt, sampled from the model's own distribution (temperature 1, whole vocabulary)
    unless `options` of transformers' `generate` say otherwise. The same seed, prompts and batch size give the
    same samples."""
    device = next(model.parameters()).device
    to_tokens, samples = ExampleTokenizer(tokenizer), []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in tqdm(
            range(0, len(prompts), batch_size), desc="sampling", unit=" batches", leave=False, disable=None
        ):
            ids = [
                to_tokens.prompt(Texts("prompt", prompt, (), ()))
                for prompt in prompts[start : start + batch_size]
            ]
            inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left").to(device)
            options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **options}
            rows = model.generate(
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options
            )
            width = inputs["input_ids"].shape[1]
            for row, mask in zip(rows.tolist(), inputs["attention_mask"]):
                completion = row[width:]
                if tokenizer.eos_token_id in completion:
                    completion = completion[: completion.index(tokenizer.eos_token_id) + 1]
                prompt = row[width - int(mask.sum()) : width]
                samples.append(
                    Sample(prompt, completion, tokenizer.decode(completion, skip_special_tokens=True))
                )
    return samples


def sample_pairs(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    per_prompt: int = 4,
    **options: Any,
) -> list[TokenExample]:
    """Preference pairs as they are collected in practice: several samples per prompt, ranked by the gold
    reward, best against worst. Prompts whose samples all score the same give none."""
    samples = generate(
        model, tokenizer, [prompt for prompt in prompts for _ in range(per_prompt)], seed=seed, **options
    )
    pairs = []
    for start in range(0, len(samples), per_prompt):
        ranked = sorted(samples[start : start + per_prompt], key=lambda sample: gold_reward(sample.text))
        worst, best = ranked[0], ranked[-1]
        if gold_reward(best.text) > gold_reward(worst.text):
            pairs.append(
                token_pair(
                    *(
                        torch.tensor(ids, dtype=torch.int32)
                        for ids in (best.prompt, best.completion, worst.completion)
                    )
                )
            )
    return pairs


def mean_gold_reward(samples: Sequence[Sample]) -> float:
    return sum(gold_reward(sample.text) for sample in samples) / len(samples)


@torch.no_grad()
def score_samples(
    model: torch.nn.Module, samples: Sequence[Sample], *, batch_size: int = 64
) -> list[torch.Tensor]:
    """log p(token | everything before it) under `model` for every token of each completion: one fp32 tensor
    per sample."""
    lm = PackedCausalLM(model, head=None)
    scores: list[torch.Tensor] = []
    try:
        for start in range(0, len(samples), batch_size):
            rows = samples[start : start + batch_size]
            masks = [[False] * len(s.prompt) + [True] * len(s.completion) for s in rows]
            batch = fastalign.pack([s.prompt + s.completion for s in rows], masks).to(lm.device)
            logprobs = lm.scores(batch).stats(batch.labels).logprob[batch.mask]
            scores += logprobs.cpu().split([len(s.completion) for s in rows])
    finally:
        lm.restore()
    return scores


def sequence_kl(
    policy: torch.nn.Module, reference: torch.nn.Module, samples: Sequence[Sample]
) -> dict[str, list[float]]:
    """Estimates of KL(policy || reference) in nats, one per sample of the policy (drawn at temperature 1):
    the sums over its completion of "k1" and of "k3" (`fastalign.kl_estimate`). k1 is unbiased and noisy (a
    mean may be negative); k3 per token is unbiased too and never negative."""
    scores = [score_samples(model, samples) for model in (policy, reference)]
    lengths = [len(sample.completion) for sample in samples]
    return {
        kind: [
            float(each.double().sum())
            for each in fastalign.kl_estimate(*map(torch.cat, scores), kind).split(lengths)
        ]
        for kind in ("k1", "k3")
    }


def sampled_kl(
    policy: torch.nn.Module, reference: torch.nn.Module, samples: Sequence[Sample]
) -> dict[str, float]:
    """Means of `sequence_kl` over the samples ("k1_per_sequence"), and over all their completion tokens
    ("k1_per_token")."""
    tokens, out = sum(len(sample.completion) for sample in samples), {}
    for kind, sums in sequence_kl(policy, reference, samples).items():
        out[f"{kind}_per_token"] = sum(sums) / tokens
        out[f"{kind}_per_sequence"] = sum(sums) / len(samples)
    return out
