"""Reward models: Bradley-Terry on pairs, K-wise ranking on lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastalign
from fastalign.losses.peers import preference_hint
from fastalign.runtime.metric import extremes_of
from fastalign.train.config import TrainConfig
from fastalign.train.data.examples import Batch, pack_examples
from fastalign.train.data.formats import LISTWISE, PREFERENCE
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Method, Scored, Split
from fastalign.train.methods.listwise import list_inputs, note_lists
from fastalign.train.metrics import Metrics
from fastalign.train.models import packed as models
from fastalign.train.models.scorer import PackedScorer, load_scorer, with_padding
from fastalign.train.vain import note_examples

# Where the losses of scores stand, and what their functions take besides: `reward_loss`, `kwise_reward_loss`.
_KINDS = ((fastalign.losses.PRESETS, ("centering",)), (fastalign.losses.LISTWISE, ()))
_COLUMNS = {"margin": "margin", "soft_label": "soft_labels"}
_PAIR_METRICS = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class Reward(Method):
    """A reward model from pairs (bt_rm; columns `margin` and `soft_label` are used where present) or from
    lists (kwise_rm). --model is a causal LM, which gets a new score head, or a sequence classifier with one
    label. The score is read at the last token, and the result loads with transformers'
    AutoModelForSequenceClassification."""

    name, default_loss = "reward", "bt_rm"
    needs_reference = False

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        legal = {name: own for kind, own in _KINDS for name, preset in kind.items() if preset.of_scores}
        if self.config.loss not in legal:
            raise UserError(
                f"--loss {self.config.loss} is unknown to fastalign train reward; legal: {', '.join(legal)}"
            )
        self.options, own = dict(config.loss_options), legal[self.config.loss]
        unknown = [name for name in self.options if name not in own]
        if unknown:
            hint = preference_hint(unknown[0], self.options[unknown[0]])
            raise UserError(
                f"loss {self.config.loss!r} has no option {unknown[0]!r}{hint}; legal: "
                f"{', '.join(own) or 'none'}"
            )
        if config.overlong == "truncate_completion":
            raise UserError(
                "--overlong truncate_completion cuts off the end of the turn, where the score is read: drop "
                "or truncate_prompt"
            )
        self.pairs = self.config.loss in fastalign.losses.PRESETS
        self.format = PREFERENCE if self.pairs else LISTWISE
        if self.pairs:
            try:
                fastalign.reward_loss(torch.zeros(1), torch.zeros(1), **self.options)
            except (ValueError, TypeError) as error:
                raise UserError(str(error)) from None
        self.columns: tuple[str, ...] = ()

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        if not self.pairs:
            note_lists(train)
        else:
            note_examples(
                (torch.equal(e.chosen, e.rejected) for e in train),
                "pair",
                "chosen and rejected are the same tokens",
            )
            self.columns = tuple(column for column in _COLUMNS if column in train[0].values)
            for column in self.columns:
                print(f"column {column}: used")
            lacking = [column for column in self.columns if evaluation and column not in evaluation[0].values]
            if lacking:
                raise UserError(
                    f"the evaluation data lacks the column {lacking[0]!r} that the training data has"
                )

    def load_model(self, directory: str, *, trust_remote_code: bool) -> torch.nn.Module:
        return load_scorer(directory, seed=self.config.seed, trust_remote_code=trust_remote_code)

    def make_lm(
        self, model: torch.nn.Module, tokenizer: Any, *, head: Any = None, **options: Any
    ) -> tuple[models.PackedModel, Any]:
        tokenizer = with_padding(model, tokenizer)
        return PackedScorer(model, **options), tokenizer

    def constants(self, lm: Any, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        return {"num_items": len(indices)}

    def score(self, lm: Any, split: Split, batch: Batch, *, policy_only: bool = False) -> Scored:
        packed = lm.to_device(batch.packed)
        return Scored([split.examples[i] for i in batch.members], packed, {"scores": lm.scores(packed)}, {})

    @torch.no_grad()
    def finish(self, lm: Any, split: Split) -> None:
        """As in InstructGPT (Ouyang et al. 2022, arXiv 2203.02155): what is as good as a demonstration scores 0 on
        average."""
        if not self.config.normalize_reward:
            return
        best = [
            TokenExample(example.prompt, (example.completions[self._best(example)],))
            for example in split.examples
        ]
        total = 0.0
        for batch in pack_examples(best, range(len(best)), self.config.tokens_per_batch):
            total += float(lm.scores(lm.to_device(batch.packed)).double().sum())
        lm.shift(-total / len(best))
        what = "chosen" if self.pairs else "best"
        print(
            f"scores shifted by {-total / len(best):.4g}: their mean over the {len(best)} {what} responses is 0"
        )

    def _best(self, example: TokenExample) -> int:
        """Which completion is chosen, or has the highest score of its list."""
        if self.pairs:
            return 0
        scores = example.values["scores"]
        return max(range(len(scores)), key=scores.__getitem__)

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        scores = scored.policy["scores"]
        if self.pairs:
            numbers = {_COLUMNS[column]: scored.column(column) for column in self.columns}
            output = fastalign.reward_loss(scores[0::2], scores[1::2], **numbers, **self.options, **known)
        else:
            output = fastalign.kwise_reward_loss(scores, *list_inputs(scored), **known)
        found, seen = output.metrics(), scores.detach()
        metrics = {name: found[key] for key, name in _PAIR_METRICS.items()}
        low, high = extremes_of(seen)
        return output.loss, {
            **metrics,
            "mean_reward": (seen.sum(), seen.numel()),
            "min_reward": low,
            "max_reward": high,
        }
