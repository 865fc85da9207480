"""What a method is. The loop asks it for packed batches, for the numbers of a batch that the loss is made of,
and for the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

import fastalign
from fastalign.train.config import RunConfig, TrainConfig, check_settings
from fastalign.train.data.examples import Batch, pack_examples
from fastalign.train.data.formats import Format
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.methods import METHODS, check_kind
from fastalign.train.metrics import Metrics
from fastalign.train.models import packed as models
from fastalign.train.models.causal import PackedCausalLM, Scores

LogprobFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TOKEN_METRICS = ("entropy", "mean_logit", "is_top1")


@dataclass
class Split:
    """Examples to train or evaluate on, and where their reference log-probs come from (None: the loss needs
    none)."""

    examples: Sequence[TokenExample]
    reference: Callable[[Any, Any], torch.Tensor] | None = None


@dataclass
class Scored:
    """A packed batch (on the device) and the numbers that its loss is made of: `policy` depends on the
    weights that are trained, `fixed` does not. Per token [T] throughout if the method is joint."""

    examples: Sequence[TokenExample]
    packed: fastalign.PackedBatch
    policy: dict[str, torch.Tensor]
    fixed: dict[str, torch.Tensor]

    def column(self, name: str, default: float = 0.0) -> torch.Tensor:
        """A number of every example, [examples], on the device."""
        values = [float(example.values.get(name, default)) for example in self.examples]
        return torch.tensor(values, dtype=torch.float32, device=self.packed.labels.device)


def join(parts: Sequence[Scored]) -> Scored:
    """Several batches end to end, as if they had been one pack."""
    lengths = torch.cat([part.packed.cu_seqlens.diff() for part in parts])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    tensors = {
        name: torch.cat([getattr(part.packed, name) for part in parts])
        for name in ("input_ids", "position_ids", "labels", "mask")
    }
    packed = fastalign.PackedBatch(
        **tensors, cu_seqlens=cu_seqlens, max_seqlen=max(part.packed.max_seqlen for part in parts)
    )
    examples = [example for part in parts for example in part.examples]
    policy, fixed = (
        {key: torch.cat([getattr(part, which)[key] for part in parts]) for key in getattr(parts[0], which)}
        for which in ("policy", "fixed")
    )
    return Scored(examples, packed, policy, fixed)


class Learner:
    """What every method is, whatever it learns from.

    `config` is the configuration with the method's own defaults filled in."""

    name: ClassVar[str]
    config: RunConfig

    def load_model(self, directory: str, *, trust_remote_code: bool) -> torch.nn.Module:
        return models.load_model(directory, trust_remote_code=trust_remote_code)

    def make_lm(
        self, model: torch.nn.Module, tokenizer: Any, **options: Any
    ) -> tuple[models.PackedModel, Any]:
        """(the model on packed sequences, the tokenizer that is saved with it). `options`: of
        `PackedCausalLM`."""
        return PackedCausalLM(model, **options), tokenizer

    def modules(self) -> Mapping[str, torch.nn.Module]:
        """What is trained besides the model, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Method(Learner):
    """Base of the methods that learn from a data file.

    `joint`: the loss must see all examples of a step at once, because it sorts them or takes statistics over
    them; otherwise it is a sum over batches with `constants` as the denominators.
    """

    format: ClassVar[Format]
    default_loss: ClassVar[str]
    needs_reference = True
    exact_kl = (
        False  # the loss compares whole distributions: the reference model must have the policy's vocabulary
    )
    joint = False
    max_length: int | None = None  # longest sequence, in tokens; set when the model is known

    def __init__(self, config: TrainConfig, *, logprob_fn: LogprobFn | None = None):
        check_kind(self.name, config, TrainConfig)
        check_settings(config, METHODS[self.name].settings, f"fastalign train {self.name}")
        self.config = dataclasses.replace(config, loss=config.loss or self.default_loss)
        if config.precompute_ref and config.ref_update_every:
            raise UserError(
                "--ref-update-every changes the reference, which --precompute-ref scores once: they exclude "
                "each other"
            )
        self.outputs = ("logprob", *(TOKEN_METRICS if config.token_metrics else ()))
        if logprob_fn is not None and config.token_metrics:
            raise UserError("logprob_fn yields no token metrics: set token_metrics=False")
        if logprob_fn is not None and config.head == "fused":
            raise UserError("logprob_fn takes logits, which --head fused does not make")
        self.logprob_fn = logprob_fn
        if logprob_fn is not None:
            self.config = dataclasses.replace(self.config, head="logits")

    def check_reference(self) -> None:
        """Refuse settings of a reference where the loss uses none. `needs_reference` is known."""
        config = self.config
        if not self.needs_reference and (
            config.precompute_ref or config.ref_model or config.ref_update_every
        ):
            raise UserError(
                f"--loss {config.loss} uses no reference: --ref-model, --ref-update-every and "
                "--precompute-ref have no "
                "meaning for it"
            )

    def token_stats(self, scores: Scores, labels: torch.Tensor) -> Any:
        """(a forward pass, labels [T]) -> an object with .logprob [T] and the other `outputs`. Policy and
        reference go through the same function, so that equal weights give equal bits."""
        if self.logprob_fn is not None:
            return SimpleNamespace(logprob=self.logprob_fn(scores.logits, labels))
        return scores.stats(labels, outputs=self.outputs)

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        """Look at the data before anything is loaded: refuse it, or take its statistics."""

    def longest(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> int:
        """The most tokens of a sequence that the reference is given."""
        return max(example.longest() for example in (*train, *evaluation))

    def start(self, lm: models.PackedModel) -> None:
        """Make what is trained besides the model."""

    def labels(self, packed: fastalign.PackedBatch) -> torch.Tensor:
        """Which tokens the policy's log-probs are taken of."""
        return packed.labels

    def batches(self, split: Split, indices: Iterable[int]) -> list[Batch]:
        """The packed batches of one optimizer step (or of an evaluation), one forward pass each."""
        return pack_examples(split.examples, indices, self.config.tokens_per_batch)

    def constants(self, lm: Any, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        """What the loss is given besides a batch: numbers of the whole step, so that the split into batches
        changes nothing."""
        return {}

    def score(self, lm: Any, split: Split, batch: Batch, *, policy_only: bool = False) -> Scored:
        """Run the model on a batch. `policy_only`: leave out what does not depend on the weights. Here: the
        statistics of the labels' tokens, and the reference's log-probs."""
        packed = lm.to_device(batch.packed)
        fixed = (
            {} if policy_only or split.reference is None else {"ref_logprobs": split.reference(batch, packed)}
        )
        stats = self.token_stats(lm.scores(packed), self.labels(packed))
        policy = {name: value for name, value in _fields(stats).items() if value is not None}
        return Scored([split.examples[i] for i in batch.members], packed, policy, fixed)

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        """(this batch's part of the step's loss, metrics as name -> (sum, count)). `training`: update what
        the method remembers."""
        raise TypeError(f"{type(self).__name__} does not say what its loss is")

    def updated(self, rate: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """Called after every update of the weights, made at this learning rate: more of the step's `metrics`."""
        return {}

    def finish(self, lm: Any, split: Split) -> None:
        """Called after the last step, with the training data."""

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """The record's metrics from the means of all batches."""
        return dict(means)


def _fields(stats: Any) -> dict[str, Any]:
    """The fields of a NamedTuple or namespace."""
    return stats._asdict() if hasattr(stats, "_asdict") else vars(stats)


def token_metrics(scored: Scored, chosen: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """TRL's per-token metrics over the scored tokens: entropy (all), logits/chosen, logits/rejected (mean
    over tokens and vocabulary), mean_token_accuracy (chosen). chosen: [sequences] bool."""
    packed = scored.packed
    rows = torch.arange(packed.mask.numel(), device=packed.mask.device, dtype=packed.cu_seqlens.dtype)
    side = chosen[torch.searchsorted(packed.cu_seqlens, rows, right=True) - 1]
    wanted = {
        "entropy": ("entropy", packed.mask),
        "logits/chosen": ("mean_logit", packed.mask & side),
        "logits/rejected": ("mean_logit", packed.mask & ~side),
        "mean_token_accuracy": ("is_top1", packed.mask & side),
    }
    return {
        name: (scored.policy[key].detach().where(where, 0).sum(), where.sum())
        for name, (key, where) in wanted.items()
        if key in scored.policy
    }
