"""Reference log-probs: from a live model, or computed once and cached in the output directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from fastalign.train.config import RunConfig
from fastalign.train.data.examples import Batch, fingerprint, pack_examples
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.files import replace_file, writing
from fastalign.train.models.causal import PackedCausalLM, Scores

# (batch, the same packed batch on the device) -> log-probs [T], row-aligned, 0 where nothing is scored
Reference = Callable[[Batch, Any], torch.Tensor]


class LiveReference:
    """A frozen model that scores every batch, on the same path as the policy: with equal weights the
    log-probs are bitwise equal."""

    def __init__(self, lm: PackedCausalLM, token_stats: Callable[[Scores, torch.Tensor], Any]):
        self.lm, self.token_stats = lm, token_stats

    @torch.no_grad()
    def __call__(self, batch: Batch, packed: Any) -> torch.Tensor:
        return self.token_stats(self.lm.scores(packed), packed.labels).logprob


@torch.no_grad()
def mix_weights(reference: PackedCausalLM, policy: PackedCausalLM, mix: float) -> None:
    """reference <- mix policy + (1 - mix) reference (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656)."""
    for old, new in zip(reference.model.parameters(), policy.model.parameters(), strict=True):
        old.copy_(new if mix == 1.0 else mix * new + (1.0 - mix) * old)


def check_mixable(reference: PackedCausalLM, policy: PackedCausalLM) -> None:
    """Refuse a reference that cannot take over the policy's weights."""
    shapes, own = ([p.shape for p in each.model.parameters()] for each in (reference, policy))
    if shapes != own:
        raise UserError("--ref-update-every: the reference model's weights do not have the policy's shapes")


class CachedReference:
    """Log-probs of every example, computed once. They came out of other packs than training uses, so they
    agree with a live reference to rounding (float32: about 1e-6 per token), not bitwise."""

    def __init__(self, examples: Sequence[TokenExample], logprobs: torch.Tensor):
        self.parts = logprobs.split([example.tokens() for example in examples])

    def __call__(self, batch: Batch, packed: Any) -> torch.Tensor:
        return torch.cat([self.parts[i] for i in batch.members]).to(packed.labels.device, non_blocking=True)


def precompute(
    reference: LiveReference,
    examples: Sequence[TokenExample],
    path: Path,
    *,
    weights: str,
    budget: int,
    progress: bool,
) -> CachedReference:
    """Read the cache at `path` if it was made with the same weights, data, tokenisation and precision;
    otherwise say so and make it."""
    lm = reference.lm
    fused = ("fused",) if lm.head_used == "fused" else ()
    key = "/".join((weights, fingerprint(examples), str(lm.dtype), str(lm.attention), *fused))
    logprobs = _read(path, key, sum(example.tokens() for example in examples))
    if logprobs is None:
        parts: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        batches = pack_examples(examples, range(len(examples)), budget)
        for batch in tqdm(
            batches,
            desc="reference log-probs",
            unit=" packs",
            leave=False,
            disable=None if progress else True,
        ):
            scored = reference(batch, lm.to_device(batch.packed)).float().cpu()
            for i, part in zip(batch.members, scored.split([examples[i].tokens() for i in batch.members])):
                parts[i] = part.clone()
        logprobs = torch.cat(parts)
        with writing(f"the reference cache {path}"):
            replace_file(
                path, lambda temporary: save_file({"logprobs": logprobs}, temporary, metadata={"key": key})
            )
        print(f"reference log-probs of {len(examples)} examples computed and cached in {path}")
    return CachedReference(examples, logprobs)


def _read(path: Path, key: str, tokens: int) -> torch.Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found, logprobs = (file.metadata() or {}).get("key"), file.get_tensor("logprobs")
    except (SafetensorError, OSError) as error:
        print(f"warning: the reference cache {path} is unreadable and is computed again ({error})")
        return None
    if found != key or logprobs.shape != (tokens,):
        print(
            f"warning: the reference cache {path} belongs to other weights, data, tokenisation, precision or "
            "head; it is computed again"
        )
        return None
    print(f"reference log-probs read from {path}")
    return logprobs


def weights_of(config: RunConfig, models: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """Setting -> hash of its model's weights, for a run that is resumed or may be: the same model under
    another path is the same."""
    return (
        {name: weights_fingerprint(model) for name, model in models.items()}
        if config.resume or config.save_every
        else {}
    )


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hash of every weight: names, shapes, types and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
