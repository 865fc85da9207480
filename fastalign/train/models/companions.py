"""Models beside the policy (reference, reward model, DPO model): whether they fit its tokenizer and its
sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastalign.train.errors import UserError
from fastalign.train.models.packed import load_config, load_tokenizer

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)


def max_positions(config: Any) -> int | None:
    """How many positions a model of this configuration has; None where it sets no bound."""
    parts = [
        config,
        *(getattr(config, name, None) for name in ("text_config", "llm_config")),
    ]  # of a model that sees, too
    found = [
        getattr(part, name, None)
        for part in parts
        for name in ("max_position_embeddings", "n_positions", "max_seq_len")
    ]
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def check_positions(what: str, config: Any, longest: int) -> None:
    """Refuse a model beside the policy that has fewer positions than a sequence may have tokens: it would
    read beyond them, or fail."""
    positions = max_positions(config)
    if positions is not None and positions < longest:
        raise UserError(
            f"{what}: it has {positions} positions, and a sequence may have {longest} tokens; lower "
            "--max-length"
        )


def has_tokenizer(directory: str) -> bool:
    """Whether a tokenizer was saved in a model directory."""
    return any(any(Path(directory).expanduser().glob(name)) for name in _TOKENIZER_FILES)


def check_tokenizer(what: str, theirs: Any, ours: Any, whose: str = "the policy's") -> None:
    """A model beside the policy reads the policy's token ids, so a token must mean the same to both."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    for token, number in a.items():
        if token in b and b[token] != number:
            raise UserError(
                f"{what}: its tokenizer differs from {whose}: {token!r} is {b[token]} there and {number} here"
            )
    missing = [token for token in a if token not in b]
    if missing:
        raise UserError(
            f"{what}: its tokenizer differs from {whose}: it lacks {len(missing)} tokens, {missing[0]!r} first"
        )


def check_companion(
    flag: str, directory: str, tokenizer: Any, longest: int, *, trust_remote_code: bool = False
) -> None:
    """Refuse the directory of a model beside the policy whose tokenizer (where it has one) or positions do
    not fit; no weight is read."""
    what = f"{flag} {directory}"
    check_positions(what, load_config(directory, trust_remote_code=trust_remote_code), longest)
    if has_tokenizer(directory):
        check_tokenizer(what, load_tokenizer(directory, trust_remote_code=trust_remote_code), tokenizer)
