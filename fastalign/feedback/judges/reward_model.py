"""A trained reward model as the judge: it scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastalign.feedback.judges.base import Response, Verdict
from fastalign.feedback.server import Failure
from fastalign.feedback.writers import completion, hash_directory
from fastalign.train.data.examples import pack_examples
from fastalign.train.data.formats import Texts
from fastalign.train.data.tokenise import ExampleTokenizer
from fastalign.train.errors import UserError
from fastalign.train.models import companions
from fastalign.train.models import packed as models
from fastalign.train.models.scorer import PackedScorer, load_scorer


class RewardModelJudge:
    """`config.reward_model`: the directory of a sequence classifier with one label. It reads a response as `train
    reward` does: after its prompt, with the end of a turn behind it."""

    def __init__(self, config: Any):
        self.config, self.at_once = config, config.batch
        directory, trust = config.reward_model, {"trust_remote_code": config.trust_remote_code}
        models.check_device(config.device)
        own, tokenizer = models.load_config(directory, **trust), models.load_tokenizer(directory, **trust)
        positions = companions.max_positions(own)
        if positions is not None and (config.max_length or 0) > positions:
            raise UserError(f"--max-length {config.max_length} exceeds the model's {positions} positions")
        self.limit = config.max_length or positions
        stops = models.load_stops(directory, own)
        self.to_tokens = ExampleTokenizer(tokenizer, stops, config.template_options)
        self.scorer = PackedScorer(
            load_scorer(directory, **trust).requires_grad_(False), dtype=config.dtype, device=config.device
        )
        self.scorer.check_tokens("reward model", [torch.tensor(sorted(models.token_ids(tokenizer)))])

    def contents(self) -> dict[str, str]:
        return {"--reward-model": hash_directory(self.config.reward_model)}

    @torch.no_grad()
    def score(self, items: Sequence[Response]) -> list[Verdict]:
        verdicts = [Verdict(None, Failure("over-long", final=True)) for _ in items]
        examples = [self._example(item) for item in items]
        fitting = [i for i, e in enumerate(examples) if self.limit is None or e.longest() <= self.limit]
        if not fitting:
            return verdicts
        # At once, as many tokens as the longest of a full batch would have, padded.
        budget = max(examples[i].tokens() for i in fitting) * self.config.batch
        for batch in pack_examples(examples, fitting, budget):
            scores = self.scorer.scores(self.scorer.to_device(batch.packed)).double().tolist()
            for i, score in zip(batch.members, scores):
                verdicts[i] = Verdict(score)
        return verdicts

    def compare(self, items: Any) -> Any:
        raise UserError(
            "--reward-model scores responses; pairs are judged by --model, --server or --preference"
        )

    def _example(self, item: Response) -> Any:
        """Its tokens; words and messages as the trainer has them."""
        texts = Texts(item.source, item.prompt, (completion(item.prompt, item.text),), ("completions",))
        return self.to_tokens(texts)[0]
