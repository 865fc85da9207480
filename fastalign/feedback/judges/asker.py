"""Language models that choose among options: what `writers` do, and `choose`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

import fastalign
from fastalign.feedback.judges.options import Path, contexts, from_server, normalised, option_mass
from fastalign.feedback.server import Failure
from fastalign.feedback.settings import WriterConfig
from fastalign.feedback.writers import ModelWriter, ServerWriter
from fastalign.train.data.formats import Messages
from fastalign.train.errors import DataError, UserError

ANSWER_TOKENS = 16  # of a server's answer, before which it may say "Answer:"
TOP_LOGPROBS = 20  # the most that servers give


class Question(NamedTuple):
    """messages: a conversation that ends with a question; options: its answers."""

    source: str
    messages: Messages
    options: tuple[str, ...]


class Choice(NamedTuple):
    """probabilities: of the options, adding up to 1; None: `failure` says why."""

    probabilities: list[float] | None
    failure: Failure | None = None


class ServerAsker(ServerWriter):
    """By log-probs where the server gives them, else by the answer's text."""

    def __init__(self, config: WriterConfig):
        super().__init__(config)
        if config.endpoint != "chat":
            raise UserError("--endpoint completions: a judge is asked in conversations; legal here: chat")
        self.logprobs = True  # until the server refuses to give them

    def choose(self, questions: Sequence[Question]) -> list[Choice]:
        return [self._choose(question) for question in questions]

    def _choose(self, question: Question) -> Choice:
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": ANSWER_TOKENS}
        asked = self.logprobs
        wanted = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if asked else {}
        answer, failure = self.server.write(question.messages, self.config.seed, **options, **wanted)
        if asked and failure is not None and failure.final and "status 4" in failure.reason:
            answer, failure = self.server.write(question.messages, self.config.seed, **options)
            self.logprobs = self.logprobs and answer is None
        if answer is None:
            return Choice(None, failure)
        mass = from_server(question.options, *answer)
        probabilities = None if mass is None else normalised(mass)
        return Choice(probabilities, None if probabilities else Failure("malformed answer", final=True))


class ModelAsker(ModelWriter):
    """By the probabilities of the options' tokens after the question, in one call for a batch of questions."""

    def __init__(self, config: WriterConfig, writes: bool = True):
        super().__init__(config, head=None, writes=writes)

    def choose(self, questions: Sequence[Question]) -> list[Choice]:
        paths: list[list[list[Path]] | Failure] = []
        wanted = []  # (question, context, its tokens, token ids of question and context)
        for i, question in enumerate(questions):
            try:
                ids, ways = self._read(question)
            except DataError as error:
                paths.append(self.refused(error))
                continue
            needed = contexts(ways)
            if self.limit is not None and len(ids) + max(map(len, needed)) > self.limit:
                paths.append(Failure("over-long", final=True))
                continue
            paths.append(ways)
            wanted += [(i, context, tokens, [*ids, *context]) for context, tokens in needed.items()]
        logprobs: list[dict[Path, Mapping[int, float]]] = [{} for _ in questions]
        for start in range(0, len(wanted), self.batch):
            chunk = wanted[start : start + self.batch]
            with self.memory():
                found = self._logprobs([ids for *_, ids in chunk], [tokens for _, _, tokens, _ in chunk])
            for (i, context, tokens, _), row in zip(chunk, found):
                logprobs[i][context] = dict(zip(tokens, row))
        choices = []
        for ways, known in zip(paths, logprobs):
            if isinstance(ways, Failure):
                choices.append(Choice(None, ways))
                continue
            probabilities = normalised(option_mass(ways, known))
            choices.append(
                Choice(probabilities, None if probabilities else Failure("no finite log-prob", final=True))
            )
        return choices

    def _read(self, question: Question) -> tuple[list[int], list[list[Path]]]:
        """Token ids of the question, and of every way to write each option after it."""
        source, special = question.source, self.to_tokens.special
        text = self.to_tokens.template.prompt(source, question.messages)
        bare = not self.to_tokens.template.own

        def tokens(text: str) -> list[int]:
            return special.begun(source, "prompt", special.encode(text), bare=bare)

        ids, ways = tokens(text), []
        for option in question.options:
            found = []
            for written in (option, " " + option):
                whole = tokens(text + written)
                if whole[: len(ids)] == ids and len(whole) > len(ids):
                    found.append(tuple(whole[len(ids) :]))
            # A token across the end of the question: the option's own tokens follow the question's.
            ways.append([*dict.fromkeys(found)] or [tuple(special.encode(option))])
        return ids, ways

    @torch.no_grad()
    def _logprobs(self, sequences: list[list[int]], tokens: list[list[int]]) -> list[list[float]]:
        """Log-probs of these tokens after each sequence."""
        batch = self.lm.to_device(fastalign.pack(sequences))
        last = batch.cu_seqlens[1:].long() - 1
        wanted = torch.full((len(tokens), max(map(len, tokens))), -1, dtype=torch.int64)
        for row, each in enumerate(tokens):
            wanted[row, : len(each)] = torch.tensor(each)
        wanted = wanted.to(last.device)
        head = self.lm.fused
        if head is None:
            logits = self.lm.logits(batch)[last]
            found = fastalign.token_logprobs(logits, torch.where(wanted < 0, -100, wanted))
        else:
            with self.lm.autocast():
                support = fastalign.logprobs_at(
                    self.lm.scores(batch).hidden[last],
                    head.weight,
                    wanted,
                    bias=head.bias,
                    logit_scale=head.logit_scale,
                    softcap=head.softcap,
                    with_mass=True,
                )
            found = support.logprobs + support.log_mass[:, None]
        return found.double().cpu().tolist()


def make_asker(config: WriterConfig, writes: bool) -> ServerAsker | ModelAsker:
    """writes: whether it is asked for more than a choice."""
    config.check_writer()
    return ServerAsker(config) if config.server is not None else ModelAsker(config, writes)
