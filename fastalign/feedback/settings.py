"""Settings that the commands share. In a setting's metadata, `group` is its heading in --help; `free`: whether it
may differ when a command goes on, because no line of the output depends on it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from fastalign.train.errors import UserError
from fastalign.train.settings import NOT_BELOW_0, POSITIVE, SEED, SHARE, Bound, Settings, setting

HOT = Bound("be 0, or lie in [1e-6, 1e6]", lambda x: x == 0 or 1e-6 <= x <= 1e6)
FINITE = Bound("be a finite number", math.isfinite)
FILES, MODEL, SERVER, SAMPLING = "data and output", "model", "server", "sampling"


@dataclasses.dataclass(frozen=True)
class CommandConfig(Settings):
    """What every command has."""

    data: str | None = setting(
        None, "required: one JSON object per line (docs/feedback.md)", metavar="FILE", group=FILES, free=True
    )
    output: str | None = setting(
        None,
        "required: JSON lines are appended here; FILE.json keeps the settings and FILE.done what is done, so "
        "that the same command goes on where it was stopped",
        metavar="FILE",
        group=FILES,
        free=True,
    )
    overwrite: bool = setting(
        False, "start again: remove what an earlier run of this command wrote", group=FILES, free=True
    )
    progress: bool = setting(True, "show a progress bar on a terminal", group=FILES, free=True)

    def paths(self) -> tuple[Path, Path]:
        """(data, output), given and different."""
        for name in ("data", "output"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is missing: {type(self).metadata(name)['doc'][10:].split(';')[0]}")
        data, output = (Path(path).expanduser().resolve() for path in (self.data, self.output))
        if data == output:
            raise UserError(f"--output is the file of --data: {data}")
        return data, output

    @classmethod
    def metadata(cls, name: str) -> Any:
        return cls.__dataclass_fields__[name].metadata

    def only(self, needs: str, there: bool, *names: str) -> None:
        """Refuse settings that would be ignored: `names` mean something where `there`, which is called `needs`."""
        for name in names:
            field = type(self).__dataclass_fields__[name]
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            if not there and getattr(self, name) != default:
                raise UserError(f"{self.flag(name)} goes with {needs} only")

    def recorded(self) -> dict[str, Any]:
        """The settings on which the output depends."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata.get("free")
        }


@dataclasses.dataclass(frozen=True)
class WriterConfig(CommandConfig):
    """Settings of commands that have a language model write: of a directory, or behind a server."""

    model: str | None = setting(
        None,
        "this or --server is required: directory of a Hugging Face causal LM",
        metavar="DIR",
        group=MODEL,
        free=True,  # its contents are recorded
    )
    dtype: str = setting(
        "float32", "precision of the forward pass", choices=("float32", "bfloat16"), group=MODEL
    )
    device: str = setting(
        "auto", "torch device; auto: cuda if there is one, else cpu", group=MODEL, free=True
    )
    batch: int = setting(
        64, "sequences that the model directory takes at once", POSITIVE, group=MODEL, free=True
    )
    max_length: int | None = setting(
        None, "longest sequence in tokens; default: the model's positions", POSITIVE, group=MODEL
    )
    template_options: dict[str, Any] = setting(
        {},
        "a variable of the tokenizer's chat template, for example --template enable_thinking=false "
        "(repeatable)",
        flag="--template",
        metavar="VARIABLE=VALUE",
        group=MODEL,
    )
    trust_remote_code: bool = setting(
        False, "run Python code that the model directory brings along", group=MODEL, free=True
    )

    server: str | None = setting(
        None,
        "base address of an OpenAI-compatible server, such as http://localhost:8000/v1",
        metavar="URL",
        group=SERVER,
        free=True,
    )
    server_model: str | None = setting(None, "name of the model there", metavar="NAME", group=SERVER)
    server_key: str = setting(
        "OPENAI_API_KEY",
        "environment variable with the key; no key is sent where it is not set",
        metavar="VARIABLE",
        group=SERVER,
        free=True,
    )
    endpoint: str = setting(
        "chat",
        "chat/completions (a prompt that is a text becomes the user's message), or completions (texts only)",
        choices=("chat", "completions"),
        group=SERVER,
    )
    timeout: float = setting(120.0, "seconds that an answer may take", POSITIVE, group=SERVER, free=True)
    retries: int = setting(5, "further attempts after a failed one", NOT_BELOW_0, group=SERVER, free=True)
    backoff: float = setting(
        1.0,
        "seconds before the first of them; doubled each time, up to 60; Retry-After goes before",
        NOT_BELOW_0,
        group=SERVER,
        free=True,
    )
    concurrency: int = setting(
        8, "requests at the same time", POSITIVE, Bound("be at most 1024", lambda x: x <= 1024), group=SERVER, free=True
    )  # fmt: skip
    requests_per_minute: float | None = setting(
        None, "requests are spread to at most this rate; default: no limit", POSITIVE, group=SERVER, free=True
    )
    give_up_after: int = setting(
        20,
        "stop after this many lines without a usable answer, and none with one between",
        POSITIVE,
        group=SERVER,
        free=True,
    )

    max_new_tokens: int = setting(512, "longest response in tokens", POSITIVE, group=SAMPLING)
    temperature: float = setting(1.0, "sampling temperature; 0: the most likely token", HOT, group=SAMPLING)
    top_p: float = setting(
        1.0, "nucleus sampling: the smallest set with this probability", POSITIVE, SHARE, group=SAMPLING
    )
    top_k: int = setting(0, "the most likely tokens only; 0: all of them", NOT_BELOW_0, group=SAMPLING)
    seed: int = setting(
        0, "the same seed gives the same responses to a prompt, wherever a run begins", SEED, group=SAMPLING
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        groups: dict[str, list[str]] = {}
        for name in WriterConfig.__dataclass_fields__:
            groups.setdefault(self.metadata(name)["group"], []).append(name)
        server = self.server is not None
        self.only("--server", server, *groups[SERVER][1:])
        self.only("a model directory", self.runs_model(), *groups[MODEL][1:])
        self.only("--model or --server", server or self.model is not None, *groups[SAMPLING])

    def runs_model(self) -> bool:
        """Whether a model is run here."""
        return self.model is not None

    def check_writer(self) -> None:
        """Exactly one of --model and --server, and what belongs to it."""
        if (self.model is None) == (self.server is None):
            raise UserError(
                "--model and --server exclude each other"
                if self.model
                else "no model: give --model DIR, or --server URL and --server-model NAME"
            )
        if self.server is not None and self.server_model is None:
            raise UserError("--server-model is missing: it names the model that the server is to use")
        if self.server is not None and not re.match(r"https?://[^\s/?#]+[^\s?#]*$", self.server, re.ASCII):
            raise UserError(
                f"--server {self.server}: expected an address that begins with http:// or https://, such as "
                "http://localhost:8000/v1"
            )
