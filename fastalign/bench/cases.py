"""What is measured: for every op the inputs, the contestants, the least traffic that the op can cause, and the truth in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign import testing
from fastalign.bench import eager, floors, measure
from fastalign.bench.peers import PEERS
from fastalign.bench.shapes import SHAPES, Pairs, Rows, Sequences, Shape

SAMPLED_ROWS = 16  # rows whose results are compared with fp64


@dataclass
class Contestant:
    """`run(*inputs)` is what is timed. kind: "ours" (held to the house rule of accuracy), "eager", "compiled" (by torch.compile), "peer" (another
    package), "read" (reads the same bytes and does nothing with them), or "floor" (bench/floors.py: also writes as many bytes as the op).
    `overwrites`: the run destroys its first input, which must be restored before the next one."""

    name: str
    run: Callable[..., Tensor]
    kind: str
    overwrites: bool = False

    @property
    def computes(self) -> bool:
        """Whether its result means anything."""
        return self.kind not in ("read", "floor")


@dataclass
class Case:
    """One op at one shape. `inputs`: several sets, taken in turns so that no cache serves the next run. `traffic`: the bytes that the op must
    move at least. `truth`, `baseline`: sampled results in fp64 and by plain PyTorch in fp32; `sample` picks the same from a contestant's output;
    `scale`: the magnitude that rounding errors refer to (None: of the truth). `read`: how many of the inputs the plain read goes over."""

    op: str
    shape: Shape
    inputs: list[tuple[Any, ...]]
    traffic: int
    contestants: list[Contestant]
    truth: Tensor
    baseline: Tensor
    sample: Callable[[Tensor], Tensor] = lambda output: output
    scale: Tensor | None = None
    read: int = 1
    missing: dict[str, str] = field(default_factory=dict)

    def error(self, output: Tensor) -> float:
        return float((self.sample(output).detach().double().cpu() - self.truth.cpu()).abs().max())

    def check(self, contestant: Contestant, output: Tensor) -> str | None:
        """None if the output may be timed, else what is wrong with it. Ours is held to `testing.assert_close`: plain PyTorch's own error in
        fp32, twice, and 4 ulp of the output type. Others compute in types of their own: they must be right to 16 ulp of the coarser one."""
        sampled = self.sample(output)
        if contestant.kind == "ours":
            try:
                testing.assert_close(sampled, self.truth, self.baseline, what=contestant.name, scale=self.scale)
            except AssertionError as error:
                return str(error)
            return None
        coarse = torch.bfloat16 if isinstance(self.shape, Rows) and self.shape.dtype == "bfloat16" else torch.float32
        granted = 16 * torch.finfo(coarse).eps * max(1.0, float(self.truth.abs().max()))
        error = self.error(output)
        return None if error <= granted else f"error {error:.2e} exceeds {granted:.2e}"


def make_case(op: str, shape: Shape, device: torch.device, *, backends: tuple[str, ...] | None = None, compile: bool = True,
              cache_bytes: int = 0) -> Case:  # fmt: skip
    """The case of `op` at `shape`. backends: ours (default: see `own_backends`); compile: with torch.compile's contestants;
    cache_bytes: the inputs together are at least three times as large."""
    case = _MAKERS[op](shape, device, cache_bytes)
    (ours,) = [c for c in case.contestants if c.kind == "ours"]
    names = own_backends(_PUBLIC.get(op, op), case.inputs[0][0]) if backends is None else backends
    mine = [replace(ours, name=f"fastalign {name}", run=_on_backend(name, ours.run)) for name in names]
    others = [c for c in case.contestants if c.kind in ("read", "floor", "eager") or (c.kind == "compiled" and compile)]
    wrap = _backward_of if op == "token_logprobs_backward" else _no_grad
    for peer in PEERS.get(op, ()):
        try:
            others.append(Contestant(peer.name, wrap(peer.load()), "peer", peer.overwrites))
        except (ImportError, RuntimeError, AttributeError) as error:  # not installed, not for this device, or another version's names
            case.missing[peer.name] = str(error).splitlines()[0]
    case.contestants = mine + others
    torch._dynamo.reset()  # every case compiles for its own shapes
    return case


def own_backends(public: str, tensor: Tensor) -> tuple[str, ...]:
    """The backends that can serve a call on `tensor`, fastest first; the reference only where it is alone, Triton's interpreter never."""
    lines = [line.split(maxsplit=1) for line in fastalign.explain(public, tensor).splitlines()[1:]]
    able = [name for name, why in lines if why == "chosen" or why.startswith("able")]
    kernels = [name for name in able if name != "reference" and not (name == "triton" and tensor.device.type == "cpu")]
    return tuple(kernels or able)


def _on_backend(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forced(*inputs: Any) -> Tensor:
        with fastalign.use_backend(name):
            return run(*inputs)

    return forced


def _no_grad(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.no_grad()(run)


def _backward_of(logprobs: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Forward and backward with an upstream gradient per token, as every loss of this package has it."""

    def run(logits: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
        value = logprobs(logits, labels)
        return torch.autograd.grad(value, logits, upstream.to(value.dtype))[0]

    return run


def _plain(
    name: str, wrap: Callable[..., Callable[..., Tensor]], function: Callable[..., Tensor], *, compiled: bool = True
) -> list[Contestant]:
    """A plain PyTorch function, eager and (compiled when first called) through torch.compile."""
    contestants = [Contestant(name, wrap(function), "eager")]
    if compiled:
        contestants.append(Contestant(f"torch.compile {name}", wrap(torch.compile(function, dynamic=False)), "compiled"))
    return contestants


def _copies(size: int, cache_bytes: int) -> int:
    """How many sets of inputs of `size` bytes."""
    return min(256, max(1, -(-3 * cache_bytes // size)))


def _row_inputs(shape: Rows, device: torch.device, cache_bytes: int) -> tuple[list[tuple[Tensor, Tensor]], int, Tensor]:
    """([(logits, labels)], bytes of the logits, sampled rows)"""
    dtype = getattr(torch, shape.dtype)
    size = shape.rows * shape.vocab * dtype.itemsize
    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for _ in range(_copies(size, cache_bytes)):
        logits = torch.empty(shape.rows, shape.vocab, dtype=dtype, device=device).normal_(std=2.0, generator=generator)
        inputs.append((logits, torch.randint(shape.vocab, (shape.rows,), device=device, generator=generator)))
    sampled = torch.linspace(0, shape.rows - 1, min(SAMPLED_ROWS, shape.rows), device=device).long()
    return inputs, size, sampled


def _read_only() -> Contestant:
    """Read the logits and nothing else, by the fastest reduction that this machine has for raw bytes."""
    return Contestant("read only", lambda logits, *rest: measure.read(logits.detach()), "read")


def _floor(run: Callable[..., Any], *, overwrites: bool = False) -> Contestant:
    return Contestant("same memory, nothing computed", run, "floor", overwrites)


def _logprobs(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    inputs, size, sampled = _row_inputs(shape, device, cache_bytes)
    truth, baseline = (testing.token_stats_truth(inputs[0][0][sampled], inputs[0][1][sampled], dtype=t)["logprob"]
                       for t in (torch.float64, torch.float32))  # fmt: skip
    contestants = [
        Contestant("fastalign", _no_grad(fastalign.token_logprobs), "ours"),
        *_plain("log_softmax.gather", _no_grad, eager.log_softmax_gather),
        *_plain("gather - logsumexp", _no_grad, eager.gather_minus_logsumexp, compiled=False),
        *_plain("F.cross_entropy", _no_grad, eager.cross_entropy),
        _read_only(),
    ]
    return Case("token_logprobs", shape, inputs, size, contestants, truth, baseline, sample=lambda x: x[sampled])


def _logprobs_entropy(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    inputs, size, sampled = _row_inputs(shape, device, cache_bytes)

    def both(logits: Tensor, labels: Tensor) -> Tensor:
        stats = fastalign.token_stats(logits, labels, outputs=("logprob", "entropy"))
        return torch.stack([stats.logprob, stats.entropy])

    stats = [testing.token_stats_truth(inputs[0][0][sampled], inputs[0][1][sampled], dtype=t) for t in (torch.float64, torch.float32)]
    truth, baseline = (torch.stack([s["logprob"], s["entropy"]]) for s in stats)
    contestants = [
        Contestant("fastalign", _no_grad(both), "ours"),
        *_plain("log_softmax, gather and -(p log p).sum", _no_grad, eager.logprob_and_entropy),
        _read_only(),
    ]
    return Case("token_logprobs_entropy", shape, inputs, size, contestants, truth, baseline, sample=lambda x: x[:, sampled])


def _logprobs_backward(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    inputs, size, sampled = _row_inputs(shape, device, cache_bytes)
    upstream = torch.linspace(-1.0, 1.0, shape.rows, device=device)
    inputs = [(logits.requires_grad_(), labels, upstream) for logits, labels in inputs]
    logits, labels = inputs[0][0].detach()[sampled], inputs[0][1][sampled]
    grads = []
    for dtype in (torch.float64, torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        value = testing.token_stats_truth(leaf, labels, dtype=dtype)["logprob"]
        grads.append(torch.autograd.grad(value, leaf, upstream[sampled].to(dtype))[0])
    contestants = [
        Contestant("fastalign", _backward_of(lambda x, y: fastalign.token_logprobs(x, y, inplace_backward=True)), "ours", overwrites=True),
        *_plain("log_softmax.gather", _backward_of, eager.log_softmax_gather, compiled=False),
        *_plain("F.cross_entropy", _backward_of, eager.cross_entropy),
        _read_only(),
        _floor(floors.read_and_rewrite, overwrites=True),
    ]
    scale = testing.gradient_scale(logits, labels) * upstream[sampled].abs().double().unsqueeze(-1)
    # Read forward, read and write backward.
    return Case("token_logprobs_backward", shape, inputs, 3 * size, contestants, *grads, sample=lambda x: x[sampled], scale=scale)


def _kl_inputs(shape: Rows, device: torch.device, cache_bytes: int) -> tuple[list[tuple[Tensor, Tensor]], int, Tensor]:
    """([(logits, reference logits)], bytes of both, sampled rows). The reference is near the policy, as in training."""
    rows, size, sampled = _row_inputs(shape, device, cache_bytes // 2)
    generator = torch.Generator(device).manual_seed(1)
    inputs = [(x, torch.empty_like(x).normal_(std=0.3, generator=generator).add_(x)) for x, _ in rows]
    return inputs, 2 * size, sampled


def _read_both() -> Contestant:
    return Contestant("read only", lambda logits, ref, *rest: (measure.read(logits.detach()), measure.read(ref))[0], "read")


def _token_kl(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    inputs, size, sampled = _kl_inputs(shape, device, cache_bytes)
    truth, baseline = (eager.exact_kl(*(x[sampled].to(t) for x in inputs[0])) for t in (torch.float64, torch.float32))
    contestants = [
        Contestant("fastalign", _no_grad(fastalign.token_kl), "ours"),
        *_plain("log_softmax in fp32, exp, difference, sum", _no_grad, eager.exact_kl),
        *_plain("log_softmax, exp, difference, sum", _no_grad, eager.exact_kl_rounded, compiled=False),
        _read_both(),
    ]
    return Case("token_kl", shape, inputs, size, contestants, truth, baseline, sample=lambda x: x[sampled], read=2)


def _token_kl_loss(shape: Rows, device: torch.device, cache_bytes: int) -> Case:
    """Value and gradient of sum(coef * KL), the coefficients known beforehand."""
    inputs, size, sampled = _kl_inputs(shape, device, cache_bytes)
    coef = torch.linspace(0.5, 1.5, shape.rows, device=device)
    inputs = [(logits.requires_grad_(), ref) for logits, ref in inputs]

    def fused(logits: Tensor, ref: Tensor) -> Tensor:
        return torch.autograd.grad(fastalign.token_kl_loss(logits, ref, coef, inplace=True).loss, logits)[0]

    def wrap(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logits, ref: torch.autograd.grad((kl(logits, ref) * coef).sum(), logits)[0]

    grads = []
    for dtype in (torch.float64, torch.float32):
        leaf = inputs[0][0].detach()[sampled].to(dtype).requires_grad_()
        grads.append(torch.autograd.grad((eager.exact_kl(leaf, inputs[0][1][sampled].to(dtype)) * coef[sampled]).sum(), leaf)[0])
    contestants = [
        Contestant("fastalign", fused, "ours", overwrites=True),
        *_plain("log_softmax in fp32, exp, difference, sum", wrap, eager.exact_kl),
        _read_both(),
        _floor(floors.read_both_and_rewrite, overwrites=True),
    ]
    # Read both, write one gradient.
    scale = torch.full_like(grads[0], float(grads[0].abs().max()))
    return Case("token_kl_loss", shape, inputs, size // 2 * 3, contestants, *grads, sample=lambda x: x[sampled], scale=scale, read=2)


def _packed_inputs(shape: Pairs, device: torch.device, cache_bytes: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """([(logprobs, ref_logprobs)], cu_seqlens, the sequence of every token)"""
    tokens = 2 * shape.pairs * shape.length
    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for _ in range(_copies(8 * tokens, cache_bytes)):
        logprobs = -4.0 * torch.rand(tokens, device=device, generator=generator)
        inputs.append((logprobs, logprobs + 0.1 * torch.randn(tokens, device=device, generator=generator)))
    sequence = torch.arange(2 * shape.pairs, device=device).repeat_interleave(shape.length)
    return inputs, torch.arange(0, tokens + 1, shape.length, dtype=torch.int32, device=device), sequence


def _sequence_sum(shape: Pairs, device: torch.device, cache_bytes: int) -> Case:
    inputs, cu_seqlens, sequence = _packed_inputs(shape, device, cache_bytes)
    inputs = [(x,) for pair in inputs for x in pair]
    sequences = 2 * shape.pairs
    truth, baseline = (eager.segment_sum(inputs[0][0].to(t), sequence, sequences) for t in (torch.float64, torch.float32))
    lengths = cu_seqlens.diff().long()
    contestants = [
        Contestant("fastalign", _no_grad(lambda x: fastalign.sequence_sum(x, cu_seqlens)), "ours"),
        *_plain("index_add", _no_grad, lambda x: eager.segment_sum(x, sequence, sequences)),
        *_plain("torch.segment_reduce", _no_grad, lambda x: torch.segment_reduce(x, "sum", lengths=lengths), compiled=False),
    ]
    return Case("sequence_sum", shape, inputs, 4 * inputs[0][0].numel(), contestants, truth, baseline)


def _preference_loss(shape: Pairs, device: torch.device, cache_bytes: int) -> Case:
    def fused(logprobs: Tensor, ref: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fastalign.preference_loss(logprobs, ref, cu_seqlens, loss="dpo", beta=eager.BETA).loss

    return _loss_gradient("preference_loss", shape, device, cache_bytes, fused, "index_add, logsigmoid", eager.dpo_loss)


def _listwise_loss(shape: Pairs, device: torch.device, cache_bytes: int) -> Case:
    """The sequences of the pairs as lists of four."""
    scores = torch.rand(2 * shape.pairs, generator=torch.Generator().manual_seed(1)).to(device)
    offsets = torch.arange(0, 2 * shape.pairs + 1, 4, dtype=torch.int32, device=device)

    def fused(logprobs: Tensor, ref: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fastalign.listwise_loss(logprobs, ref, cu_seqlens, offsets, scores, loss="plackett_luce", beta=eager.BETA).loss

    def plain(logprobs: Tensor, ref: Tensor, sequence: Tensor, sequences: int) -> Tensor:
        return eager.plackett_luce_loss(logprobs, ref, sequence, scores.view(-1, 4))

    return _loss_gradient("listwise_loss", shape, device, cache_bytes, fused, "index_add, logcumsumexp", plain)


def _loss_gradient(op: str, shape: Pairs, device: torch.device, cache_bytes: int, fused: Callable[..., Tensor], name: str,
                   plain: Callable[..., Tensor]) -> Case:  # fmt: skip
    """A loss on packed log-probs, forward and backward. fused(logprobs, ref, cu_seqlens), plain(logprobs, ref, sequence, sequences)."""
    inputs, cu_seqlens, sequence = _packed_inputs(shape, device, cache_bytes)
    inputs = [(logprobs.requires_grad_(), ref) for logprobs, ref in inputs]

    def gradient_of(loss: Callable[..., Tensor], *rest: Any) -> Callable[..., Tensor]:
        return lambda logprobs, ref: torch.autograd.grad(loss(logprobs, ref, *rest), logprobs)[0]

    def eagerly(logprobs: Tensor, ref: Tensor) -> Tensor:
        return plain(logprobs, ref, sequence, 2 * shape.pairs)

    truth, baseline = (
        gradient_of(eagerly)(*(x.detach().to(t).requires_grad_() for x in inputs[0])) for t in (torch.float64, torch.float32)
    )
    contestants = [
        Contestant("fastalign", gradient_of(fused, cu_seqlens), "ours"),
        *_plain(name, gradient_of, eagerly),
        _floor(floors.loss_and_gradient),
    ]
    # Read both log-probs, write one gradient.
    traffic, scale = 12 * inputs[0][0].numel(), torch.full_like(truth, float(truth.abs().max()))
    return Case(op, shape, inputs, traffic, contestants, truth, baseline, scale=scale)


def _kl_estimate(shape: Pairs, device: torch.device, cache_bytes: int) -> Case:
    inputs, _, _ = _packed_inputs(shape, device, cache_bytes)
    truth, baseline = (eager.k3(*(x.to(t) for x in inputs[0])) for t in (torch.float64, torch.float32))
    contestants = [
        Contestant("fastalign", _no_grad(lambda x, ref: fastalign.kl_estimate(x, ref, "k3")), "ours"),
        *_plain("expm1(-d) + d", _no_grad, eager.k3),
    ]
    return Case("kl_estimate", shape, inputs, 12 * inputs[0][0].numel(), contestants, truth, baseline)


def _gae(shape: Sequences, device: torch.device, cache_bytes: int) -> Case:
    tokens, gamma, lam = shape.sequences * shape.length, 1.0, 0.95
    generator = torch.Generator(device).manual_seed(0)
    copies = _copies(8 * tokens, cache_bytes)
    inputs = [tuple(torch.randn(tokens, device=device, generator=generator) for _ in range(2)) for _ in range(copies)]
    cu_seqlens = torch.arange(0, tokens + 1, shape.length, dtype=torch.int32, device=device)

    def fused(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return fastalign.gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam)[:2]

    def loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        padded = (x.view(shape.sequences, shape.length) for x in (rewards, values))
        return tuple(x.flatten() for x in eager.gae_loop(*padded, gamma, lam))

    mask = torch.ones(shape.sequences, shape.length, device=device)

    def masked_loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        padded = (x.view(shape.sequences, shape.length) for x in (rewards, values))
        return tuple(x.flatten() for x in eager.gae_masked_loop(*padded, mask, gamma, lam))

    truth, baseline = (torch.stack(loop(*(x.to(t) for x in inputs[0]))) for t in (torch.float64, torch.float32))
    contestants = [
        Contestant("fastalign", _no_grad(fused), "ours"),
        *_plain("loop over time steps", _no_grad, loop, compiled=False),
        *_plain("loop over time steps, masked", _no_grad, masked_loop, compiled=False),
        _floor(floors.copy_each),
    ]
    # Read rewards and values, write advantages and returns. What rounds is of the size of the largest sums.
    scale = torch.full_like(truth, float(truth.abs().max()))
    return Case("gae", shape, inputs, 16 * tokens, contestants, truth, baseline, sample=torch.stack, scale=scale)


def _policy_loss(shape: Sequences, device: torch.device, cache_bytes: int) -> Case:
    """PPO's clipped loss and its gradient in the log-probs."""
    tokens = shape.sequences * shape.length
    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for _ in range(_copies(17 * tokens, cache_bytes)):
        noise = torch.randn(3, tokens, device=device, generator=generator)
        logprobs = -4.0 * torch.rand(tokens, device=device, generator=generator)
        mask = torch.rand(tokens, device=device, generator=generator) < 0.9
        inputs.append((logprobs.requires_grad_(), logprobs.detach() + 0.1 * noise[0], noise[1], mask))

    def gradient_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logprobs, *rest: torch.autograd.grad(loss(logprobs, *rest), logprobs)[0]

    def fused(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return fastalign.policy_loss(logprobs, old, advantages, mask=mask).loss

    logprobs, old, advantages, mask = inputs[0]
    truth, baseline = (
        gradient_of(eager.ppo_loss)(logprobs.detach().to(t).requires_grad_(), old.to(t), advantages.to(t), mask)
        for t in (torch.float64, torch.float32)
    )
    # Next to a bound the two precisions may disagree about whether it holds: such tokens say nothing.
    ratio = torch.exp((logprobs - old).detach().double())
    clear = ((ratio - 0.8).abs() > 1e-6) & ((ratio - 1.2).abs() > 1e-6)
    contestants = [
        Contestant("fastalign", gradient_of(fused), "ours"),
        *_plain("exp, clamp, maximum", gradient_of, eager.ppo_loss),
        _floor(floors.loss_and_gradient),
    ]
    # Read four tensors, write one gradient.
    scale = torch.full_like(truth[clear], float(truth.abs().max()))
    return Case(
        "policy_loss", shape, inputs, 17 * tokens, contestants, truth[clear], baseline[clear], sample=lambda g: g[clear], scale=scale
    )


# The public function behind an op, where it has another name.
_PUBLIC = {"token_logprobs_entropy": "token_stats", "token_logprobs_backward": "token_logprobs"}
_MAKERS = {
    "token_logprobs": _logprobs, "token_logprobs_entropy": _logprobs_entropy, "token_logprobs_backward": _logprobs_backward,
    "sequence_sum": _sequence_sum, "preference_loss": _preference_loss, "listwise_loss": _listwise_loss, "kl_estimate": _kl_estimate, "gae": _gae,
    "policy_loss": _policy_loss,
    "token_kl": _token_kl, "token_kl_loss": _token_kl_loss,
}  # fmt: skip
assert set(_MAKERS) == set(SHAPES["cpu"])
