"""An OpenAI-compatible server: requests by urllib, in threads, repeated when they fail."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastalign.feedback.settings import WriterConfig
from fastalign.train.errors import UserError

LONGEST_WAIT = 60.0  # seconds between two attempts; Retry-After may ask for five times that
LARGEST_ANSWER = 64 << 20  # bytes
RETRIED = (408, 409, 425, 429)  # and 5xx: the server may answer later
NEVER = (401, 403, 404, 405)  # nothing that is asked there will be answered


class Failure(NamedTuple):
    """Why there is no answer. final: asking again would not help."""

    reason: str
    final: bool = False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Where a server points to is not where the key was meant to go."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Server:
    """Asks; waits and asks again. Threads share one: a rate limit, and a pause that the server asks for, hold for
    all of them."""

    def __init__(self, config: WriterConfig):
        self.config, self.base = config, config.server.rstrip("/")
        key = os.environ.get(config.server_key, "").strip()
        if not key and config.server_key != WriterConfig.server_key:
            raise UserError(f"--server-key {config.server_key}: this environment variable is not set")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"--server-key {config.server_key}: the variable holds what no header may hold")
        self.headers = {"Content-Type": "application/json", "User-Agent": "fastalign"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.lock, self.next_start = threading.Lock(), 0.0
        self.refused: str | None = None

    def ask(
        self, path: str, body: Mapping[str, Any], read: Callable[[Any], Any]
    ) -> tuple[Any, Failure | None]:
        """(what `read` makes of the answer, None), or (None, why there is none) after all attempts. `read` raises
        `ValueError` for what is no answer."""
        failure = Failure("no attempt")
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(self._backoff(attempt))
            self._wait_for_turn()
            if self.refused:
                return None, Failure(self.refused)
            try:
                return read(self._post(path, body)), None
            except urllib.error.HTTPError as error:
                failure = self._of_status(error)
                if failure.final or self.refused:
                    return None, failure
            except ValueError:  # not JSON, or not of the form of an answer
                failure = Failure("malformed answer", final=True)
            except TimeoutError:
                failure = Failure("timed out")
            except (OSError, http.client.HTTPException) as error:
                timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
                failure = Failure("timed out" if timed_out else "no connection")
        return None, failure

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        end = time.monotonic() + self.config.timeout
        request = urllib.request.Request(
            f"{self.base}/{path}", json.dumps(body).encode(), self.headers, method="POST"
        )
        with self.opener.open(request, timeout=self.config.timeout) as answer:
            text = b""
            while part := answer.read1(1 << 16):  # a timeout holds for one part only
                text += part
                if time.monotonic() > end:
                    raise TimeoutError
                if len(text) > LARGEST_ANSWER:
                    raise ValueError("too long")
            if answer.length:  # what was announced did not come
                raise http.client.IncompleteRead(text, answer.length)
        try:
            return json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def _of_status(self, error: urllib.error.HTTPError) -> Failure:
        with error:
            if error.code in RETRIED or error.code >= 500:
                self._pause(_seconds(error.headers.get("Retry-After")))
                return Failure(f"status {error.code}")
            words = _message(error)
        if error.code in NEVER or 300 <= error.code < 400:
            with self.lock:
                self.refused = f"status {error.code} from {self.base}{words}"
            return Failure(self.refused)
        return Failure(f"refused by the server with status {error.code}", final=True)

    def _backoff(self, attempt: int) -> float:
        """Doubled each time, and spread, so that those who failed together do not come back together."""
        return min(LONGEST_WAIT, self.config.backoff * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)

    def _wait_for_turn(self) -> None:
        rate = self.config.requests_per_minute
        with self.lock:
            start = max(time.monotonic(), self.next_start)
            self.next_start = start + 60.0 / rate if rate else self.next_start
        time.sleep(max(0.0, start - time.monotonic()))

    def _pause(self, seconds: float | None) -> None:
        if seconds is not None:
            with self.lock:
                until = time.monotonic() + min(max(seconds, 0.0), 5 * LONGEST_WAIT)
                self.next_start = max(self.next_start, until)

    def messages(self, prompt: Any) -> list[dict[str, Any]]:
        return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]

    def write(
        self, prompt: Any, seed: int, **options: Any
    ) -> tuple[tuple[str, list[Mapping[str, Any]]] | None, Failure | None]:
        """((the response, its tokens' log-probs where the server gives them), None) or (None, failure)."""
        config = self.config
        body: dict[str, Any] = {
            "model": config.server_model,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "seed": seed % (1 << 31),
        }
        body |= {"top_p": config.top_p} if config.top_p < 1 else {}
        body |= {"top_k": config.top_k} if config.top_k else {}
        if config.endpoint == "chat":
            return self.ask(
                "chat/completions", body | {"messages": self.messages(prompt)} | options, read_chat
            )
        return self.ask("completions", body | {"prompt": prompt} | options, read_completion)


def read_chat(answer: Any) -> tuple[str, list[Mapping[str, Any]]]:
    """The text of an answer of chat/completions, and its `logprobs.content` ([] where there is none)."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        entries = (choice.get("logprobs") or {}).get("content") or []
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("no chat completion") from None
    if not isinstance(text, str) or not isinstance(entries, list):
        raise ValueError("no chat completion")
    return text, entries


def read_completion(answer: Any) -> tuple[str, list[Mapping[str, Any]]]:
    """The text of an answer of completions."""
    try:
        text = answer["choices"][0]["text"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("no completion") from None
    if not isinstance(text, str):
        raise ValueError("no completion")
    return text, []


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says about it, if it says so in the usual form."""
    try:
        said = json.loads(error.read(1 << 16))["error"]
        said = said["message"] if isinstance(said, dict) else said
        return f": {' '.join(str(said).split())[:200]}"
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return ""


def _seconds(text: str | None) -> float | None:
    """Retry-After: a number of seconds, or a date."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None


def in_threads(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int
) -> Iterator[tuple[int, Any]]:
    """(index, function(item)) as they are ready. Whoever stops reading is not kept waiting for the rest."""
    todo, ready = queue.SimpleQueue(), queue.SimpleQueue()  # type: ignore[var-annotated]
    for pair in enumerate(items):
        todo.put(pair)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                i, item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                ready.put((i, function(item), None))
            except BaseException as error:  # it is raised where the results are read
                ready.put((i, None, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(len(items)):
            i, result, error = ready.get()
            if error is not None:
                raise error
            yield i, result
    finally:
        stop.set()


def spread(
    work: Callable[[Sequence[Any]], list[Any]],
    items: Sequence[Any],
    size: Callable[[Any], int],
    at_once: int | None,
    workers: int,
) -> Iterator[tuple[Any, Any]]:
    """(item, its result) as they are ready. at_once: `work` gets so many items in a row as come to this size,
    one at least; None: it gets them one by one, in threads, since it waits for a server."""
    if at_once is None:
        for i, result in in_threads(lambda item: work([item])[0], items, workers):
            yield items[i], result
        return
    start = 0
    while start < len(items):
        end, total = start + 1, size(items[start])
        while end < len(items) and total + size(items[end]) <= at_once:
            total += size(items[end])
            end += 1
        yield from zip(items[start:end], work(items[start:end]), strict=True)
        start = end
