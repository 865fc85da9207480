"""Lists of responses to one prompt, ranked by scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastalign
from fastalign.train.config import TrainConfig, check_booleans
from fastalign.train.data.formats import LISTWISE
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Method, Scored, Split
from fastalign.train.metrics import Metrics
from fastalign.train.vain import note_examples


class Listwise(Method):
    """Every loss of `fastalign.losses.available_listwise()` on log-probs."""

    name, format, default_loss = "listwise", LISTWISE, "plackett_luce"

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        try:
            preset = fastalign.losses.get_listwise(self.config.loss)
            check_booleans(config.loss_options, preset)
            self.preset = preset.replace(**config.loss_options)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        if self.preset.of_scores:
            name = self.config.loss
            raise UserError(
                f"--loss {name} needs the scores of a reward model; 'fastalign train reward --loss {name}' "
                "trains one"
            )
        self.needs_reference = self.preset.reference
        self.check_reference()

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        if not self.preset.sft_weight:
            note_lists(train)

    def constants(self, lm: Any, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        examples = [split.examples[i] for i in indices]
        return {"num_items": len(examples), "num_sft_tokens": sum(len(best(example)) for example in examples)}

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        packed = scored.packed
        output = fastalign.listwise_loss(
            scored.policy["logprob"],
            scored.fixed.get("ref_logprobs"),
            packed.cu_seqlens,
            *list_inputs(scored),
            loss=self.preset,
            mask=packed.mask,
            **known,
        )
        where = packed.mask
        metrics = (
            {"entropy": (scored.policy["entropy"].detach().where(where, 0).sum(), where.sum())}
            if "entropy" in scored.policy
            else {}
        )
        return output.loss, {**output.metrics(), **metrics}


def note_lists(examples: Sequence[TokenExample]) -> None:
    """Say how many lists compare nothing."""
    note_examples(
        (len(set(e.values["scores"])) < 2 for e in examples), "list", "no two responses of different score"
    )


def list_inputs(scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
    """(list_offsets [L + 1], scores [S]) of the batch's lists."""
    device = scored.packed.labels.device
    sizes = torch.tensor([0, *(len(example.completions) for example in scored.examples)], device=device)
    scores = torch.tensor(
        [score for example in scored.examples for score in example.values["scores"]],
        dtype=torch.float32,
        device=device,
    )
    return sizes.cumsum(0).to(torch.int32), scores


def best(example: TokenExample) -> torch.Tensor:
    """The completion with the highest score, the first of several."""
    scores = example.values["scores"]
    return example.completions[max(range(len(scores)), key=lambda i: (scores[i], -i))]
