"""What the tests, the benchmarks and users need to check a backend: input makers, fp64 truth, comparison
bounded by the reference's own error."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.packing import PackedBatch, pack

# A kernel may err at most FACTOR times as much as the plain PyTorch computation in the same dtype, plus ULPS
# units in the last place of the output type at the magnitude of the truth. One pair of numbers for every op
# and test.
FACTOR = 2.0
ULPS = 4.0


def assert_close(
    actual: Tensor,
    truth: Tensor,
    baseline: Tensor | None = None,
    *,
    what: str = "",
    scale: float | Tensor | None = None,
) -> None:
    """Assert that `actual` is as good as plain PyTorch in its dtype.

    Args:
        actual: the result under test. truth: the same in fp64. baseline: plain PyTorch's result in the dtype
            of the input; without it only the ulp floor is granted. Non-finite entries of the truth must be
            matched exactly (NaN by NaN).
        scale: magnitude to which the ulp floor refers, a number or a tensor of the truth's shape; default: of
            each entry of the truth, at least 1.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    a, t = actual.detach().double().cpu(), truth.detach().double().cpu()
    finite = torch.isfinite(t)
    wrong = torch.where(finite, torch.zeros_like(finite), ~((a == t) | (torch.isnan(a) & torch.isnan(t))))
    assert not bool(wrong.any()), (
        f"{what}: {int(wrong.sum())} non-finite entries differ, e.g. {a[wrong][:3].tolist()} for "
        f"{t[wrong][:3].tolist()}"
    )
    if not bool(finite.any()):
        return
    error = torch.where(finite, (a - t).abs(), torch.zeros_like(t))
    if scale is None:
        scale = torch.clamp(t.abs(), min=1.0)
    granted = ULPS * torch.finfo(actual.dtype).eps * torch.as_tensor(scale, dtype=t.dtype).cpu().expand_as(t)
    if baseline is not None:
        b = torch.where(finite, (baseline.detach().double().cpu() - t).abs(), torch.zeros_like(t))
        granted = granted + FACTOR * torch.nan_to_num(b, nan=0.0, posinf=0.0).max()
    over = ~(error <= granted) & finite
    assert not bool(over.any()), (
        f"{what}: error {float(error[over].max()):.3e} exceeds the bound {float(granted[over].min()):.3e} in "
        f"{int(over.sum())} of {t.numel()} entries"
    )


def make_logits(
    rows: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    kind: str = "normal",
    seed: int = 0,
) -> Tensor:
    """[rows, vocab] logits. kind: "normal" (standard deviation 2), "peaked" (one logit 50 above), "flat" (all
    equal), "offset" (common 1e4)."""
    generator = torch.Generator().manual_seed(seed)
    x = 2.0 * torch.randn(rows, vocab, generator=generator)
    if kind == "peaked":
        x[torch.arange(rows), torch.randint(vocab, (rows,), generator=generator)] += 50.0
    elif kind == "flat":
        x = torch.full((rows, vocab), 1.5)
    elif kind == "offset":
        x += 1e4
    elif kind != "normal":
        raise ValueError(f"kind={kind!r} is unknown; legal: normal, peaked, flat, offset")
    return x.to(device=device, dtype=dtype)


def make_labels(rows: int, vocab: int, *, ignored: float = 0.0, device: str = "cpu", seed: int = 1) -> Tensor:
    """[rows] labels; a share `ignored` of them is -100."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (rows,), generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < ignored, -100, labels).to(device)


class Batch(NamedTuple):
    """A packed batch of pairs with per-token log-probs of a policy and a reference; see `make_batch`."""

    packed: PackedBatch
    logprobs: Tensor
    ref_logprobs: Tensor
    kl_ref_policy: Tensor


def make_batch(
    pairs: int = 4, *, min_len: int = 2, max_len: int = 12, prompt: int = 2, vocab: int = 50,
    noise: float = 0.3, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Batch:  # fmt: skip
    """Random pairs (chosen, rejected, chosen, ...) of unequal lengths with a common prompt length; log-probs
    are 0 at unscored rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(min_len, max_len + 1, (2 * pairs,), generator=generator).tolist()
    sequences = [torch.randint(vocab, (prompt + n,), generator=generator) for n in lengths]
    packed = pack(sequences, [[0] * prompt + [1] * n for n in lengths], device=device)
    tokens = packed.input_ids.numel()
    logprobs = -torch.rand(tokens, generator=generator, dtype=torch.float64) * 4.0 - 0.01
    ref = logprobs + noise * torch.randn(tokens, generator=generator, dtype=torch.float64)
    kl = torch.rand(tokens, generator=generator, dtype=torch.float64) * 0.2
    mask = packed.mask.cpu()
    return Batch(
        packed, *((torch.where(mask, x, 0.0)).to(device=device, dtype=dtype) for x in (logprobs, ref, kl))
    )


def token_stats_truth(
    logits: Tensor, labels: Tensor | None, *, dtype: torch.dtype = torch.float64, temperature: Any = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = -100,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Every output of `token_stats` written with log_softmax in `dtype` (fp64: the truth; fp32: the plain
    computation to compare errors with). Differentiable by autograd. labels (...) only."""
    x = logits.to(dtype) * logit_scale
    z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    finite_log_p = log_p.masked_fill(p == 0, 0.0)
    scored = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
    out = {}
    if labels is not None:
        scored = scored & (labels != ignore_index)
        index = labels.clamp(min=0).unsqueeze(-1)
        out["logprob"] = log_p.gather(-1, index).squeeze(-1)
        out["is_top1"] = (logits.argmax(-1) == labels).to(dtype)
    out["entropy"] = -(p * finite_log_p).sum(-1)
    out["logsumexp"] = torch.logsumexp(z, -1)
    out["log_sum_sq_probs"] = torch.logsumexp(2 * log_p, -1)
    out["mean_logit"] = z.mean(-1)
    return {name: torch.where(scored, value, torch.zeros_like(value)) for name, value in out.items()}


def gradient_scale(logits: Tensor, labels: Tensor | None, output: str = "logprob", **options: Any) -> Tensor:
    """Magnitude of the terms whose rounding shows in d output / d logits, entry by entry, for an upstream
    gradient of 1, times the largest slope of the transform: p (1 + |log p|) + 1[label] for logprob and
    logsumexp (|log p| is what the exponential amplifies), times |log p| + H for the entropy. What
    `assert_close` should take as the scale of a gradient."""
    truth = token_stats_truth(logits, labels, **options)
    t, cap = options.get("temperature", 1.0), options.get("softcap")
    x = logits.double() * options.get("logit_scale", 1.0)
    log_p = torch.log_softmax((x if cap is None else cap * torch.tanh(x / cap)) / t, -1)
    p = torch.nan_to_num(log_p.exp())
    size = 1.0 - torch.nan_to_num(log_p, neginf=0.0)
    out = p * size * (size + truth["entropy"].unsqueeze(-1) if output == "entropy" else 1.0)
    if output == "logprob":
        out = out.scatter_add(-1, labels.clamp(min=0).unsqueeze(-1), torch.ones_like(out[..., :1]))
    return out * (options.get("logit_scale", 1.0) / float(t))


def gradient(output: Tensor, of: Tensor, upstream: Tensor | None = None) -> Tensor:
    """d (output . upstream) / d of."""
    return torch.autograd.grad(output, of, torch.ones_like(output) if upstream is None else upstream)[0]
