"""Rules of preference losses that look at the whole batch and remember: dynamic beta, adaptive margins,
running anchors, pair weights.

A rule is an explicit object passed as `state=` to `preference_loss`. It sees the sums of all pairs
(detached), updates its memory while it is in training mode, and returns tensors for the pair kernel.
`state_dict` / `load_state_dict` make runs resumable; with `group` the statistics are those of all ranks, the
same on each. Everything a rule returns is a constant of the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.columns import CHOSEN, REJECTED, SUM_LENGTH, SUM_POLICY, SUM_RATIO
from fastalign.packing import sequence_sum
from fastalign.runtime.checks import (
    check_cu_seqlens,
    check_integer,
    check_number,
    check_pairs_values,
    per_token,
    row_mask,
    shown,
    values_are_here,
)


class BatchRule:
    """Base of the rules: memory as a dict of tensors and numbers, training and evaluation mode, reductions
    over `group`."""

    rule = ""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.training = True
        self.memory: dict[str, Any] = {}
        self.used: dict[str, Tensor] = {}  # what the last call returned, for logging

    def train(self, mode: bool = True) -> BatchRule:
        """Training mode updates the memory; evaluation mode only reads it."""
        self.training = mode
        return self

    def eval(self) -> BatchRule:
        return self.train(False)

    def state_dict(self) -> dict[str, Any]:
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.memory.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, Mapping) or set(state) != set(self.memory):
            found = sorted(map(str, state)) if isinstance(state, Mapping) else shown(state)
            raise ValueError(f"state has entries {found}; legal: {sorted(self.memory)}")
        if "steps" in state:
            check_integer("steps", state["steps"])
            check_number("steps", state["steps"], low=0)
        for name in state.keys() - {"steps"}:
            _check_memory(name, state[name], needed=state.get("steps", 0) > 0)
        self.memory = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                f"{type(self).__name__} holds a process group, which lives in this process: send its "
                "state_dict() instead"
            )
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchRule:
        """A rule with a memory of its own, over the same group."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(
            {k: v if k == "group" else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        )
        return twin

    def __call__(self, preset: Any, values: PairValues) -> dict[str, Tensor]:
        """The rule's tensors for these pairs, by the name of the loss's option."""
        self.used = self.evaluate(preset, values)
        return self.used

    def evaluate(self, preset: Any, values: PairValues) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} is not a rule by itself; use BetaDPO, AlphaDPO or BCODelta")

    def _sum(self, *values: Tensor) -> list[Tensor]:
        """The values, each a 0-dim tensor, added over the ranks of the group."""
        if self.group is None:
            return list(values)
        total = torch.stack(values)
        dist.all_reduce(total, group=self.group)
        return list(total.unbind())

    def _moments(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(count, mean, unbiased standard deviation) of the valid and finite entries over all ranks; 0 where
        undefined. fp64."""
        valid = valid & x.isfinite()
        x = torch.where(valid, x, 0.0).double()
        count, total = self._sum(valid.sum(dtype=torch.float64), x.sum())
        mean = total / count.clamp(min=1.0)
        (square,) = self._sum(torch.where(valid, (x - mean) ** 2, 0.0).sum())
        return count, mean, torch.sqrt(square / (count - 1.0).clamp(min=1.0))

    def _move_average(self, momentum: float, count: Tensor, mean: Tensor, std: Tensor) -> None:
        """Exponential averages of mean and std, updated before use. A batch in which nothing counts repeats
        what they were."""
        known = self._averages(momentum, mean, std)
        for name, value, was in zip(("mean", "std"), (mean, std), known):
            old = self.memory[name]
            old = torch.zeros_like(value) if old is None else old.to(value.device)
            self.memory[name] = momentum * old + (1.0 - momentum) * torch.where(count > 0, value, was)
        self.memory["steps"] += 1

    def _averages(self, momentum: float, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """The bias-corrected averages; before the first update the batch's own statistics."""
        if self.memory["steps"] == 0:
            return mean, std
        correction = 1.0 - momentum ** self.memory["steps"]
        return self.memory["mean"].to(mean.device) / correction, self.memory["std"].to(
            std.device
        ) / correction


def _uniform(seed: int, count: int, device: torch.device) -> Tensor:
    """[count] fp64 in (0, 1), the same on every rank and device: splitmix64 (Steele, Lea and Flood 2014).
    Made where it is used, without a copy from the host."""

    def signed(number: int) -> int:  # as int64 holds it; torch's products wrap
        return (number + (1 << 63)) % (1 << 64) - (1 << 63)

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = torch.arange(1, count + 1, device=device) * signed(0x9E3779B97F4A7C15) + signed(
        seed * 0xD1342543DE82EF95
    )
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ shifted(x, bits)) * signed(factor)
    return (shifted(x ^ shifted(x, 31), 11).double() + 0.5) * 2.0**-53


def _check_memory(name: str, value: Any, needed: bool) -> None:
    """What a rule may remember: nothing yet, or a finite number (a tensor of no dimensions); only a mean may
    be negative."""
    if value is None and not needed:
        return
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        raise TypeError(
            f"{name} in the state must be a floating-point tensor of no dimensions, got {shown(value)}"
        )
    check_number(name, float(value), **({} if name == "mean" else {"low": 0.0}))


class PairValues:
    """What a rule sees of the batch, all [P] and detached: log-ratio sums D, policy sums A, lengths L of both
    sides, validity, beta. `usable`: valid and finite; what is not does not enter a memory, which it would
    spoil for good."""

    def __init__(self, sums: Tensor, valid: Tensor, beta: Tensor | float):
        sums = sums.detach()
        self.policy, self.ratio, self.length = (
            sums[:, :, SUM_POLICY],
            sums[:, :, SUM_RATIO],
            sums[:, :, SUM_LENGTH].clamp(min=1.0),
        )
        self.valid, self.beta = valid, beta
        self.usable = valid & torch.isfinite(self.ratio).all(-1) & torch.isfinite(self.policy).all(-1)


class BetaDPO(BatchRule):
    """beta-DPO (Wu et al. 2024, arXiv 2407.08639): with M = D_c - D_r per pair and M0, s its moving mean and standard deviation,

    keep floor((1 - filter) B) pairs drawn without replacement by weights exp(-(M - M0)^2 / (2 s^2)), and
    beta = max(beta_0 (1 + alpha (mean over kept M - M0)), 1e-3).

    The averages are bias-corrected and updated before use, in training only; the draw is Gumbel-top-k,
    seeded, the same on every rank. With s below 1e-6 all pairs weigh the same; a batch of one keeps its pair
    and uses alpha = 0. Evaluation keeps every pair. With `group` every rank must hold the same number of
    pairs."""

    rule = "beta_dpo"

    def __init__(
        self,
        *,
        alpha: float = 0.6,
        filter: float = 0.2,
        momentum: float = 0.9,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__(group)
        check_number("alpha", alpha)
        check_number("filter", filter, low=0.0, below=1.0)
        check_number("momentum", momentum, low=0.0, below=1.0)
        check_integer("seed", seed)
        self.alpha, self.filter, self.momentum, self.seed = alpha, filter, momentum, seed
        self.memory = {"mean": None, "std": None, "steps": 0}

    def evaluate(self, preset: Any, values: PairValues) -> dict[str, Tensor]:
        margin = values.ratio[:, CHOSEN] - values.ratio[:, REJECTED]
        valid = values.usable & margin.isfinite()
        count, mean, std = self._moments(margin, valid)
        if self.training:
            self._move_average(self.momentum, count, mean, std)
        mean, std = self._averages(self.momentum, mean, std)
        keep = self._draw(margin.double(), valid, mean, std) if self.training and self.filter else valid
        kept, total = self._sum(keep.sum(dtype=torch.float64), torch.where(keep, margin.double(), 0.0).sum())
        shift = torch.where(count > 1, self.alpha * (total / kept.clamp(min=1.0) - mean), 0.0)
        # What is not finite stays in the loss, where `nonfinite` says what becomes of it.
        return {
            "beta": (values.beta * (1.0 + shift)).clamp(1e-3, torch.finfo(margin.dtype).max).to(margin.dtype),
            "valid": keep | (values.valid & ~valid),
        }

    def _draw(self, margin: Tensor, valid: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        everywhere = [(margin, valid)]
        rank = 0
        if self.group is not None:
            rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
            lists = [[torch.empty_like(x) for _ in range(world)] for x in (margin, valid.to(torch.uint8))]
            dist.all_gather(lists[0], margin.contiguous(), group=self.group)
            dist.all_gather(lists[1], valid.to(torch.uint8), group=self.group)
            everywhere = [(m, v.bool()) for m, v in zip(*lists)]
        m, ok = (torch.cat(x) for x in zip(*everywhere))
        log_weight = torch.where(
            std < 1e-6, torch.zeros_like(m), -((m - mean) ** 2) / (2.0 * std * std).clamp(min=1e-30)
        )
        uniform = _uniform(self.seed + self.memory["steps"], m.shape[0], m.device)
        key = torch.where(ok, log_weight - torch.log(-torch.log(uniform)), -torch.inf)
        # floor((1 - filter) n) of the n valid pairs, at least one, without learning n on the host.
        n_keep = torch.floor((1.0 - self.filter) * ok.sum()).clamp(min=1.0)
        place = torch.empty_like(key).scatter_(
            0,
            key.argsort(descending=True, stable=True),
            torch.arange(len(key), device=m.device, dtype=key.dtype),
        )
        keep = ok & (place < n_keep)
        return keep[rank * len(margin) : (rank + 1) * len(margin)]


class AlphaDPO(BatchRule):
    """alpha-DPO (Wu et al. 2024, arXiv 2410.10148): h = beta (A_c / L_c - A_r / L_r - stop[alpha z +
    gamma_beta_ratio]), z the reference-adjusted gap of token means, standardised by its moving mean and
    standard deviation (z = 0 where the latter is below 1e-6)."""

    rule = "alpha_dpo"

    def __init__(self, *, alpha: float = 0.1, momentum: float = 0.9, group: dist.ProcessGroup | None = None):
        super().__init__(group)
        check_number("alpha", alpha)
        check_number("momentum", momentum, low=0.0, below=1.0)
        self.alpha, self.momentum = alpha, momentum
        self.memory = {"mean": None, "std": None, "steps": 0}

    def evaluate(self, preset: Any, values: PairValues) -> dict[str, Tensor]:
        means = values.ratio / values.length
        gap = means[:, CHOSEN] - means[:, REJECTED]
        count, mean, std = self._moments(gap, values.usable)
        if self.training:
            self._move_average(self.momentum, count, mean, std)
        mean, std = self._averages(self.momentum, mean, std)
        z = torch.where(std < 1e-6, 0.0, (gap.double() - mean) / std.clamp(min=1e-6))
        return {"gamma_ext": (values.beta * self.alpha * z).to(gap.dtype)}


class BCODelta(BatchRule):
    """BCO's reward shift (Jung et al. 2024, arXiv 2404.04656): delta = mean of beta a over all responses
    seen, chosen and rejected alike, updated before use in training and frozen in evaluation; 0 before any was
    seen. momentum: an exponential average of batch means instead of the cumulative one."""

    rule = "bco"

    def __init__(self, *, momentum: float | None = None, group: dist.ProcessGroup | None = None):
        super().__init__(group)
        if momentum is not None:
            check_number("momentum", momentum, low=0.0, below=1.0)
        self.momentum = momentum
        self.memory = {"mean": None, "count": None}

    def evaluate(self, preset: Any, values: PairValues) -> dict[str, Tensor]:
        rewards = (
            values.beta
            if not isinstance(values.beta, Tensor) or values.beta.dim() == 0
            else values.beta.unsqueeze(-1)
        ) * values.ratio
        valid = values.usable.unsqueeze(-1) & rewards.isfinite()
        total, count = self._sum(
            torch.where(valid, rewards, 0.0).double().sum(), valid.sum(dtype=torch.float64)
        )
        zero = torch.zeros_like(total)
        mean, seen = (
            zero if self.memory[k] is None else self.memory[k].to(total.device) for k in ("mean", "count")
        )
        if self.training:
            batch_mean = total / count.clamp(min=1.0)
            if self.momentum is None:
                mean = torch.where(
                    count > 0, mean + (batch_mean - mean) * count / (seen + count).clamp(min=1.0), mean
                )
            else:
                mean = torch.where(
                    count > 0,
                    torch.where(
                        seen > 0, self.momentum * mean + (1.0 - self.momentum) * batch_mean, batch_mean
                    ),
                    mean,
                )
            self.memory = {"mean": mean, "count": seen + count}
        return {"anchor": mean.to(values.ratio.dtype)}


RULES = {r.rule: r for r in (BetaDPO, AlphaDPO, BCODelta)}


def wpo_weights(
    logprobs: Tensor,
    log_sum_sq_probs: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor,
    pairs: Tensor | None = None,
    clamp: float | None = 1.0,
) -> Tensor:
    """Pair weights of WPO (Zhou et al. 2024, arXiv 2406.11827), for `preference_loss(..., loss="wpo",
    omega=...)`.

    omega = min(clamp, exp(v_c + v_r)), v = mean over the response's tokens of (log p(y_t) - log sum_v p_v^2).

    Args:
        logprobs, log_sum_sq_probs: [T], row-aligned, the outputs of `token_stats` of those names. mask: [T]
            bool, the response tokens.
        pairs: [P, 2]; default (0, 1), (2, 3), ... clamp: upper bound; None: unbounded.

    Returns:
        [P], detached. An empty response contributes v = 0.
    """
    logprobs = per_token("logprobs", logprobs).detach()
    cu_seqlens = check_cu_seqlens(cu_seqlens, logprobs)
    v = logprobs - per_token("log_sum_sq_probs", log_sum_sq_probs, logprobs).detach()
    v = sequence_sum(v, cu_seqlens, mask=row_mask(mask, logprobs), mean=True)
    sequences = v.shape[0]
    if pairs is None and sequences % 2:
        raise ValueError(
            f"pairs is required: the default pairs sequences (0, 1), (2, 3), ... but there are {sequences} "
            "sequences"
        )
    if pairs is None:
        both = v.view(-1, 2).sum(-1)
    else:
        if values_are_here(pairs):
            check_pairs_values(pairs, sequences)
        known = (pairs >= 0) & (
            pairs < sequences
        )  # looked at on the CPU alone; on a device a wrong number gives NaN
        both = torch.where(known, v[pairs.long().clamp(0, max(sequences - 1, 0))], torch.nan).sum(-1)
    omega = both.exp()
    return omega if clamp is None else omega.clamp(max=clamp)
