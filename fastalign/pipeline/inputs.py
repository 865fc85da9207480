"""What a recipe may ask its user for: the standard inputs, each with its kind and one line of its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastalign.train.data import formats


class Input(NamedTuple):
    """`kind`: model (a directory), data (a file of JSON lines), or word (anything else). `parse`: (source,
    row) -> the checked row; `example`: one line, for `data`."""

    kind: str
    about: str
    parse: Callable[[str, Any], Any] | None = None
    example: str | None = None


INPUTS: dict[str, Input] = {
    "model": Input("model", "directory of a Hugging Face causal LM: config, weights, tokenizer"),
    "reward_model": Input("model", "directory of a reward model: a sequence classifier with one label"),
    "judge": Input("model", "directory of a Hugging Face causal LM that judges"),
    "demos": Input(
        "data",
        "demonstrations",
        formats.parse_supervised,
        '{"prompt": "The sky is", "completion": " blue."}',
    ),
    "pairs": Input(
        "data",
        "preference pairs",
        formats.parse_preference,
        '{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}',
    ),
    "labels": Input(
        "data",
        "responses, each good or bad",
        formats.parse_unpaired,
        '{"prompt": "The sky is", "completion": " green.", "label": false}',
    ),
    "scores": Input(
        "data",
        "responses with a score",
        formats.parse_unpaired,
        '{"prompt": "The sky is", "completion": " green.", "score": 0.25}',
    ),
    "lists": Input(
        "data",
        "ranked lists of responses",
        formats.parse_listwise,
        '{"prompt": "The sky is", "completions": [" blue.", " grey.", " green."], "scores": [1.0, 0.6, 0.0]}',
    ),
    "prompts": Input("data", "prompts", formats.parse_prompt, '{"prompt": "2 + 2 ="}'),
    "texts": Input(
        "data", "texts of the pretraining kind", formats.parse_text, '{"text": "The sky is blue."}'
    ),
    "reward": Input("word", "reward function, MODULE:FUNCTION (docs/training_online.md)"),
}
