"""A language model's score as the reward of an online method: direct RLAIF (Lee et al. 2023, arXiv 2309.00267)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastalign.feedback.judges.asker import make_asker
from fastalign.feedback.judges.base import Response
from fastalign.feedback.judges.language import LanguageJudge
from fastalign.feedback.label import LabelConfig
from fastalign.train.online_config import OnlineConfig
from fastalign.train.sampling.rollout import Rollout


class JudgeReward:
    """r = 2 (sum of i P(i) - 1) / 9 - 1 in [-1, 1], P(1), ..., P(10) the probabilities of the scores that the
    model of `config.judge` may answer with. NaN where it cannot be asked (a response too long for it)."""

    def __init__(self, config: OnlineConfig, device: str):
        self.config = LabelConfig(
            model=config.judge,
            ask="score",
            dtype=config.dtype,
            device=device,
            trust_remote_code=config.trust_remote_code,
        )
        asker = make_asker(self.config, writes=False)
        self.judge, self.judge_lm = LanguageJudge(self.config, asker), asker.lm

    def check(self, rows: Sequence[object]) -> None: ...

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        items = [
            Response("sample", r.example.values["prompt"], r.text, dict(r.example.values)) for r in rollouts
        ]
        verdicts = self.judge.score(items)
        return torch.tensor([math.nan if v.value is None else v.value for v in verdicts])
