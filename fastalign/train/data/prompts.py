"""Prompts to sample from, and texts to mix in.

standard          {"prompt": "Q: 2 + 2 =", "answer": "4"}                              any other column goes to the reward function
conversational    {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}   the turn must be the assistant's
--ptx-data        {"text": "..."}
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from fastalign.train.data.examples import hold_out
from fastalign.train.data.formats import parse_prompt, parse_text, read_jsonl
from fastalign.train.data.tokenise import ExampleTokenizer, TokenExample
from fastalign.train.errors import DataError, UserError
from fastalign.train.online_config import OnlineConfig


def load_prompts(
    config: OnlineConfig,
    tokenizer: Any,
    positions: int | None,
    rows: Iterable[Any] | None = None,
    eval_rows: Iterable[Any] | None = None,
) -> tuple[list[TokenExample], list[TokenExample]]:
    """(training prompts, evaluation prompts): examples without completions, whose `values` are the columns of
    their line. `rows` and `eval_rows` stand in for the files."""
    to_tokens, limit = (
        ExampleTokenizer(tokenizer, template_options=config.template_options),
        sequence_limit(config, positions),
    )
    if config.max_new_tokens >= limit:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: a sequence has at most "
            f"{limit} tokens"
        )

    def load(name: str, path: str | None, rows: Iterable[Any] | None) -> list[TokenExample]:
        if rows is not None and path is not None:
            raise UserError(f"the {name} prompts are given both in memory and as the file {path}")
        if rows is None and path is None:
            raise UserError("--data is missing: it names the file with the prompts")
        kept, counts = [], {"truncated": 0, "dropped": 0}
        for source, row in (
            read_jsonl(path) if rows is None else ((f"{name} prompt {i}", row) for i, row in enumerate(rows))
        ):
            ids = to_tokens.prompt(parse_prompt(source, row))
            if not ids:
                raise DataError(
                    source,
                    "prompt",
                    "gives no token to sample from (it is empty and the tokenizer adds no BOS token)",
                )
            fitted = fit_prompt(ids, limit - config.max_new_tokens, config, tokenizer.bos_token_id, source)
            if fitted is not None:
                kept.append(TokenExample(torch.tensor(fitted, dtype=torch.int32), (), dict(row)))
            counts["dropped"] += fitted is None
            counts["truncated"] += fitted is not None and fitted is not ids
        if not kept:
            raise UserError(
                f"no prompt to sample from: {path or 'the list'} "
                + ("has over-long ones only" if counts["dropped"] else "is empty")
            )
        notes = "".join(f", {count} {what}" for what, count in counts.items() if count)
        notes += "".join(f", {count} {note}" for note, count in sorted(to_tokens.notes.items()))
        to_tokens.notes.clear()
        print(
            f"{name} data: {len(kept)} prompts, longest {max(len(p.prompt) for p in kept)} tokens{notes} "
            f"({path or 'in memory'})"
        )
        for remark in to_tokens.remarks() if name == "training" else ():
            print(remark)
        return kept

    train = load("training", config.data, rows)
    if eval_rows is not None or config.eval_data is not None:
        return train, load("evaluation", config.eval_data, eval_rows)
    return hold_out(config, train, "prompt")


def load_texts(
    config: OnlineConfig,
    tokenizer: Any,
    positions: int | None,
    texts: Iterable[str] | None = None,
    *,
    stops: Collection[int] = (),
) -> list[TokenExample]:
    """The texts of --ptx-data, each with BOS (if the tokenizer adds one) and EOS, cut to the longest sequence
    there may be. `stops`: see `ExampleTokenizer`."""
    to_tokens, limit, kept = ExampleTokenizer(tokenizer, stops), sequence_limit(config, positions), []
    lines = (
        read_jsonl(config.ptx_data)
        if texts is None
        else ((f"text {i}", {"text": text}) for i, text in enumerate(texts))
    )
    for source, row in lines:
        ids = to_tokens.text(source, parse_text(source, row))
        if len(ids) < 2:
            raise DataError(source, "text", "has no token that could be predicted")
        ids = torch.tensor(ids[:limit], dtype=torch.int32)
        kept.append(TokenExample(ids[:1], (ids[1:],)))
    if not kept:
        raise UserError(f"--ptx-data: {config.ptx_data} is empty")
    print(
        f"pretraining data: {len(kept)} texts, {sum(text.tokens() for text in kept)} tokens "
        f"({config.ptx_data or 'in memory'})"
    )
    return kept


def sequence_limit(config: OnlineConfig, positions: int | None) -> int:
    """The most tokens that a prompt and its response may have together."""
    if positions is not None and (config.max_length or 0) > positions:
        raise UserError(f"--max-length {config.max_length} exceeds the model's {positions} positions")
    return min(config.max_length or positions or config.tokens_per_batch, config.tokens_per_batch)


def fit_prompt(
    ids: Sequence[int], limit: int, config: Any, bos: int | None, source: str
) -> Sequence[int] | None:
    """The prompt if it has at most `limit` tokens, else what `config.overlong` makes of it; None: leave it out."""
    if len(ids) <= limit:
        return ids
    if config.overlong == "error":
        raise DataError(
            source,
            "prompt",
            f"has {len(ids)} tokens, and {limit} leave room for --max-new-tokens {config.max_new_tokens} "
            "(--max-length, the model's "
            "positions or --tokens-per-batch); choose --overlong drop or truncate_prompt",
        )
    if config.overlong == "drop":
        return None
    return [bos, *ids[len(ids) - limit + 1 :]] if ids[0] == bos and limit > 1 else ids[len(ids) - limit :]
