"""A reward model on packed sequences: a transformer with one score per sequence, read at its last token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from fastalign.train.data.tokenise import ExampleTokenizer
from fastalign.train.errors import UserError
from fastalign.train.models import packed as models


def load_scorer(
    directory: str, *, seed: int | None = None, trust_remote_code: bool = False
) -> torch.nn.Module:
    """The sequence classifier with one label in a directory, in float32. The directory of a causal LM gives
    one whose score head is new, drawn from `seed`; with seed None that is refused, as are other missing
    weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        model, info = models.from_directory(
            AutoModelForSequenceClassification.from_pretrained,
            directory,
            "sequence classifier with one label",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            num_labels=1,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
    models.check_sizes(directory, info)
    head = score_head(model)
    new = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if module is head
        for part, _ in module.named_parameters()
    }
    wrong = sorted(set(info["missing_keys"]) - (new if seed is not None else set()))
    if wrong:
        raise UserError(
            f"the model directory {directory} lacks weights of its sequence classifier: "
            f"{', '.join(wrong[:3])}"
        )
    return model


def score_head(model: torch.nn.Module) -> torch.nn.Module:
    """The linear layer from a hidden state to the score."""
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1 or model.base_model is model:
        raise UserError(
            f"{type(model).__name__} has no linear head 'score' with one output on top of its transformer"
        )
    return head


# What is added to the scores: an entry of the model's configuration, since score heads have no bias.
# transformers keeps it and adds nothing.
SHIFT = "score_shift"


def score_shift(model: torch.nn.Module) -> float:
    return float(getattr(model.config, SHIFT, 0.0))


class PackedScorer(models.PackedModel):
    """A sequence classifier with one label on packed sequences: `scorer.scores(batch)` is [S]."""

    def __init__(self, model: torch.nn.Module, **options: Any):
        self.head = score_head(model)
        super().__init__(model, **options)

    def rows(self, batch: Any) -> torch.Tensor:
        """Hidden states [T, H]."""
        return self.forward(self.model.base_model, batch)[0].squeeze(0)

    def scores(self, batch: Any) -> torch.Tensor:
        """The score of every sequence [S], float32, read at its last token. No sequence may be empty."""
        scores, shift = (
            self.head(self.rows(batch)[batch.cu_seqlens[1:].long() - 1].float()),
            score_shift(self.model),
        )
        return scores.squeeze(-1) + shift if shift else scores.squeeze(-1)

    def shift(self, by: float) -> None:
        """Add this to every score from now on, and in what is saved."""
        setattr(self.model.config, SHIFT, score_shift(self.model) + by)

    def frozen_copy(self) -> PackedScorer:
        twin = super().frozen_copy()
        twin.head = score_head(twin.model)
        return twin

    def load_weights(self, directory: str, *, trust_remote_code: bool = False) -> None:
        self.model.load_state_dict(load_scorer(directory, trust_remote_code=trust_remote_code).state_dict())


def with_padding(model: torch.nn.Module, tokenizer: Any) -> Any:
    """A copy of the tokenizer with a padding token, which the model's configuration gets as well.

    transformers reads the score of a padded sequence at its last token that is not padding. Were that a token
    which ends a turn, as is usual where a tokenizer has no padding of its own, the end, where the score is
    trained, would be passed over: another special token takes its place, and where there is none the
    tokenizer gets one."""
    tokenizer, ends = copy.deepcopy(tokenizer), ExampleTokenizer(tokenizer).special.ends
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        others = [
            token
            for token in (tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens)
            if token is not None
        ]
        usable = [token for token in others if tokenizer.convert_tokens_to_ids(token) not in ends]
        if usable:
            tokenizer.pad_token = usable[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        print(f"padding token of the reward model: {tokenizer.pad_token!r}")
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer
