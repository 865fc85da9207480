"""Language models that write: of a directory, or behind a server. Both give a response per (prompt, seed)."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from fastalign.feedback.server import Failure, Server, in_threads
from fastalign.feedback.settings import WriterConfig
from fastalign.runtime.checks import shown
from fastalign.train.data.formats import Messages, parse_prompt
from fastalign.train.errors import DataError, TrainingError, UserError


class Request(NamedTuple):
    """source: where the prompt stands, for messages."""

    source: str
    prompt: str | Messages
    seed: int


class Reply(NamedTuple):
    """text: the response. failure: why there is none."""

    text: str | None
    failure: Failure | None = None


class ServerWriter:
    """Responses by a server, as they come."""

    batch = at_once = None  # what is asked at the same time changes nothing

    def __init__(self, config: WriterConfig):
        self.config, self.server = config, Server(config)

    def check(self, source: str, prompt: str | Messages) -> str | None:
        """Why a prompt is left out. Raises `DataError` for one that cannot be answered at all."""
        if self.config.endpoint == "completions" and not isinstance(prompt, str):
            raise DataError(source, "prompt", "is messages; --endpoint completions takes texts")
        return None

    def contents(self) -> dict[str, str]:
        return {}

    def write(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        return in_threads(self.reply, requests, self.config.concurrency)

    def write_here(self, requests: Sequence[Request]) -> list[Reply]:
        """In this thread, one after another."""
        return [self.reply(request) for request in requests]

    def reply(self, request: Request) -> Reply:
        answer, failure = self.server.write(request.prompt, request.seed)
        return Reply(None, failure) if answer is None else Reply(answer[0])


class ModelWriter:
    """Responses by a model directory, a batch at a time. head: see `PackedCausalLM`; writes: whether it will be
    asked to write at all."""

    def __init__(self, config: WriterConfig, head: str | None = "logits", writes: bool = True):
        # What takes seconds to import is imported where a model is used.
        from fastalign.train.data.prompts import fit_prompt
        from fastalign.train.data.tokenise import ExampleTokenizer, TokenExample
        from fastalign.train.models import companions
        from fastalign.train.models import packed as models
        from fastalign.train.models.causal import PackedCausalLM
        from fastalign.train.sampling.own_draws import SeededSampler

        self.config, self.batch, self._fit, self._example = config, config.batch, fit_prompt, TokenExample
        self.at_once = config.batch
        # What is asked in the middle of the work cannot be refused beforehand.
        self.overlong = getattr(config, "overlong", "drop")
        trust = {"trust_remote_code": config.trust_remote_code}
        models.check_device(config.device)
        self.tokenizer = models.load_tokenizer(config.model, **trust)
        positions = companions.max_positions(models.load_config(config.model, **trust))
        if positions is not None and (config.max_length or 0) > positions:
            raise UserError(f"--max-length {config.max_length} exceeds the model's {positions} positions")
        self.limit = config.max_length or positions
        if writes and self.limit is not None and config.max_new_tokens >= self.limit:
            raise UserError(
                f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: a sequence has at most "
                f"{self.limit} tokens"
            )
        self.to_tokens = ExampleTokenizer(self.tokenizer, template_options=config.template_options)
        model = models.load_model(config.model, **trust).requires_grad_(False)
        self.lm = PackedCausalLM(model, head=head, dtype=config.dtype, device=config.device)
        known = max(models.token_ids(self.tokenizer)) + 1
        settings = SimpleNamespace(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            sample_batch=config.batch,
            template_options=config.template_options,
        )
        self.sampler = SeededSampler(self.lm, self.tokenizer, settings, known)

    def check(self, source: str, prompt: str | Messages) -> str | None:
        ids = self._tokens(source, prompt)
        if ids is None:
            return "over-long"
        self.lm.check_tokens("model", [torch.tensor(ids)])
        self.lm.check_generation(len(ids) + self.config.max_new_tokens)
        return None

    def contents(self) -> dict[str, str]:
        return {"--model": hash_directory(self.config.model)}

    def write(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for start in range(0, len(requests), self.batch):
            chunk, replies, prompts = requests[start : start + self.batch], {}, {}
            for i, request in enumerate(chunk):
                try:
                    ids = self._tokens(request.source, request.prompt)
                except DataError as error:  # of a conversation that came about on the way
                    replies[i] = Reply(None, self.refused(error))
                    continue
                if ids is None:
                    replies[i] = Reply(None, Failure("over-long", final=True))
                else:
                    prompts[i] = self._example(torch.tensor(ids, dtype=torch.int32), ())
            with self.memory():
                found = (
                    self.sampler.each([*prompts.values()], [chunk[i].seed for i in prompts])
                    if prompts
                    else []
                )
            replies |= {i: Reply(rollout.text) for i, rollout in zip(prompts, found)}
            for i in range(len(chunk)):
                yield start + i, replies[i]

    @staticmethod
    def refused(error: DataError) -> Failure:
        """What is wrong with a prompt, without the place where it stands."""
        return Failure(str(error).removeprefix(f"{error.source}: "), final=True)

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Too little of it becomes one line."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory at --batch {self.config.batch}; the same command with a smaller one goes on "
                "from here"
            ) from error

    def write_here(self, requests: Sequence[Request]) -> list[Reply]:
        return [reply for _, reply in self.write(requests)]

    def _tokens(self, source: str, prompt: str | Messages) -> Sequence[int] | None:
        ids = self.to_tokens.prompt(parse_prompt(source, {"prompt": prompt}))
        if not ids:
            raise DataError(
                source,
                "prompt",
                "gives no token to sample from (it is empty and the tokenizer adds no BOS token)",
            )
        if self.limit is None:
            return ids
        room = self.limit - self.config.max_new_tokens
        settings = SimpleNamespace(overlong=self.overlong, max_new_tokens=self.config.max_new_tokens)
        return self._fit(ids, room, settings, self.tokenizer.bos_token_id, source)


def make_writer(config: WriterConfig) -> ServerWriter | ModelWriter:
    config.check_writer()
    return ServerWriter(config) if config.server is not None else ModelWriter(config)


def hash_directory(directory: str) -> str:
    """Hash of what a model directory holds; where it lies does not matter."""
    seen = hashlib.blake2b(digest_size=12)
    for path in sorted(Path(directory).expanduser().iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"):
            seen.update(path.name.encode())
            with path.open("rb") as file:
                while part := file.read(1 << 22):
                    seen.update(part)
    return seen.hexdigest()


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2^63) from anything that JSON holds."""
    text = json.dumps(parts, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def completion(prompt: str | Messages, text: str) -> Any:
    """A response in the form of its prompt: text, or an assistant's message."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text


def words_of(source: str, field: str, value: Any, prompt: str | Messages) -> str:
    """The text of a completion, which has the form of its prompt."""
    if isinstance(prompt, str):
        if isinstance(value, str):
            return value
        raise DataError(source, field, f"expected a text, as the prompt is one, got {shown(value)}")
    message = value[0] if isinstance(value, list) and len(value) == 1 else None
    if (
        isinstance(message, dict)
        and message.get("role") == "assistant"
        and isinstance(message.get("content"), str)
    ):
        return message["content"]
    raise DataError(
        source,
        field,
        f"expected a list with one assistant's message, as the prompt has messages, got {shown(value)}",
    )


def parse_completions(source: str, row: Any) -> list[str]:
    """The words of the responses of a line with a prompt and `completions`."""
    parse_prompt(source, row)
    completions = row.get("completions")
    if not isinstance(completions, list):
        if "completions" in row:
            raise DataError(source, "completions", f"expected a list, got {shown(completions)}")
        raise DataError(source, "completions", f"missing (the line has: {', '.join(map(str, row))})")
    return [words_of(source, f"completions[{i}]", each, row["prompt"]) for i, each in enumerate(completions)]
