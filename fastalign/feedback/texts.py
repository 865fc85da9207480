"""Templates and constitutions: the project's own files, or the user's in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import yaml

from fastalign.runtime.checks import shown
from fastalign.train.errors import UserError

OWN = Path(__file__).parent / "templates"


class Templates:
    """The templates of these names: those in `folder`, where it has them, the project's else. `render(name,
    **variables)`. `contents`: hashes of what has been read."""

    def __init__(self, names: tuple[str, ...], folder: str | None, variables: Mapping[str, str]):
        self.contents: dict[str, str] = {}
        environment = jinja2.sandbox.SandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
        )
        own = Path(folder).expanduser() if folder is not None else None
        if own is not None and not own.is_dir():
            raise UserError(f"--templates {folder}: no such directory")
        files = {name: own / f"{name}.j2" if own and (own / f"{name}.j2").is_file() else OWN / f"{name}.j2" for name in names}  # fmt: skip
        if own is not None and all(file.parent == OWN for file in files.values()):
            raise UserError(
                f"--templates {folder}: holds none of {', '.join(f'{name}.j2' for name in names)}, which are "
                "used here"
            )
        self.templates = {}
        for name, file in files.items():
            text = read_text(file)
            self.contents[file.name] = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
            try:
                self.templates[name] = environment.from_string(text)
            except jinja2.TemplateError as error:
                raise UserError(f"{file}: {error}") from None
            try:  # now, not in the middle of the work
                self.templates[name].render(variables)
            except Exception as error:  # a template is a program of the user's
                legal = ", ".join(sorted(variables))
                raise UserError(f"{file}: {error}; its variables are {legal}") from None

    def render(self, name: str, **variables: str) -> str:
        return self.templates[name].render(variables).strip()


def read_constitution(path: str | None, column: str) -> tuple[list[str], dict[str, str]]:
    """The principles of a constitution file, each by its `column`, and the file's hash."""
    file = OWN / "constitution.yaml" if path is None else Path(path).expanduser()
    text = read_text(file)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, list) or not found:
        raise UserError(f"{file}: expected a list of principles, got {shown(found)}")
    principles = []
    for i, principle in enumerate(found, start=1):
        if not isinstance(principle, dict) or not isinstance(principle.get(column), str):
            raise UserError(f"{file}, principle {i}: field '{column}': missing, or not a text")
        principles.append(principle[column].strip())
    return principles, {"constitution": hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start})") from None


def as_text(prompt: Any) -> str:
    """A prompt as a judge reads it: a conversation with the names of who speaks, unless it is one message."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
