"""What a case of the benchmark is: inputs, contestants, the least traffic and the truth in fp64; and what
makes contestants of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalign import testing
from fastalign.bench.shapes import Shape


@dataclass
class Contestant:
    """`run(*inputs)` is what is timed. kind: "ours" (held to the house rule of accuracy), "eager", "compiled"
    (by torch.compile), "peer" (another package), "read" (reads the same bytes and does nothing with them), or
    "floor" (bench/floors.py: also writes as many bytes as the op). `overwrites`: the run destroys its first
    input, which must be restored before the next one."""

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
    """One op at one shape. `inputs`: several sets, taken in turns so that no cache serves the next run.
    `traffic`: the bytes that the op must move at least. `truth`, `baseline`: sampled results in fp64 and by
    plain PyTorch in fp32; `sample` picks the same from a contestant's output; `scale`: the magnitude that
    rounding errors refer to (None: of the truth). `read`: how many of the inputs the plain read goes over.
    `of_peer`: what makes a run of another package's function (peers.py)."""

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
    of_peer: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.no_grad()

    def error(self, output: Tensor) -> float:
        return float((self.sample(output).detach().double().cpu() - self.truth.cpu()).abs().max())

    def check(self, contestant: Contestant, output: Tensor) -> str | None:
        """None if the output may be timed, else what is wrong with it. Ours is held to
        `testing.assert_close`: plain PyTorch's own error in fp32, twice, and 4 ulp of the output type. Others
        compute in types of their own: they must be right to 16 ulp of the coarser one."""
        sampled = self.sample(output)
        if contestant.kind == "ours":
            try:
                testing.assert_close(
                    sampled, self.truth, self.baseline, what=contestant.name, scale=self.scale
                )
            except AssertionError as error:
                return str(error)
            return None
        coarse = getattr(torch, getattr(self.shape, "dtype", "float32"))
        size = max(
            1.0, float(self.truth.abs().max()), 0.0 if self.scale is None else float(self.scale.abs().max())
        )
        granted = 16 * torch.finfo(coarse).eps * size
        error = self.error(output)
        return None if error <= granted else f"error {error:.2e} exceeds {granted:.2e}"


def no_grad(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.no_grad()(run)


def backward_of(logprobs: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Forward and backward with an upstream gradient per token, as every loss of this package has it."""

    def run(logits: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
        value = logprobs(logits, labels)
        return torch.autograd.grad(value, logits, upstream.to(value.dtype))[0]

    return run


def eager_and_compiled(
    name: str,
    wrap: Callable[..., Callable[..., Tensor]],
    function: Callable[..., Tensor],
    *,
    compiled: bool = True,
) -> list[Contestant]:
    """A plain PyTorch function, eager and (compiled when first called) through torch.compile."""
    contestants = [Contestant(name, wrap(function), "eager")]
    if compiled:
        contestants.append(
            Contestant(f"torch.compile {name}", wrap(torch.compile(function, dynamic=False)), "compiled")
        )
    return contestants


def input_sets(size: int, cache_bytes: int) -> int:
    """How many sets of inputs of `size` bytes."""
    return min(256, max(1, -(-3 * cache_bytes // size)))


def floor_line(run: Callable[..., Any], *, overwrites: bool = False) -> Contestant:
    return Contestant("same memory, nothing computed", run, "floor", overwrites)
