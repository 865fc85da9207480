"""Prompt boundary, EOS, templates, over-long pairs."""

import copy

import pytest
import torch
from tiny import CHAT_TEMPLATE, make_rows, make_tokenizer

from fastalign.train import DataError, UserError, plain_template, token_pair
from fastalign.train.data.formats import PREFERENCE, parse_preference
from fastalign.train.data.tokenise import ExampleTokenizer, fit, tokenise


def encode(tokenizer, row):
    return ExampleTokenizer(tokenizer)(parse_preference("test", row))


def text(tokenizer, *parts):
    return tokenizer.decode(torch.cat(parts))


def test_tokens_spell_the_texts_and_end_with_one_eos(tokenizer):
    pair, moved = encode(tokenizer, {"prompt": "hello:", "chosen": " good", "rejected": " bad"})
    assert not moved
    assert text(tokenizer, pair.prompt) == "hello:"
    assert text(tokenizer, pair.chosen) == " good</s>" and text(tokenizer, pair.rejected) == " bad</s>"
    assert (pair.chosen == tokenizer.eos_token_id).sum() == 1


def test_an_eos_in_the_data_is_not_doubled(tokenizer):
    pair, _ = encode(tokenizer, {"prompt": "hello:", "chosen": " good</s>", "rejected": "</s>"})
    assert text(tokenizer, pair.chosen) == " good</s>" and text(tokenizer, pair.rejected) == "</s>"


def test_empty_completion_is_its_eos(tokenizer):
    pair, _ = encode(tokenizer, {"prompt": "hello:", "chosen": "", "rejected": " bad"})
    assert pair.chosen.tolist() == [tokenizer.eos_token_id]


def test_a_token_across_the_boundary_moves_it_for_both_sides(tokenizer):
    """In "the ca" + "t" the last letters become one token, which begins before the boundary; both sides must
    continue from the same prompt tokens, so "a" is scored on both."""
    whole, prompt = tokenizer("the cat")["input_ids"], tokenizer("the ca")["input_ids"]
    assert whole[: len(prompt)] != prompt, "the tokenizer no longer merges here"
    pair, moved = encode(tokenizer, {"prompt": "the ca", "chosen": "t", "rejected": "b"})
    assert moved
    assert text(tokenizer, pair.prompt) == "the c"
    assert text(tokenizer, pair.chosen) == "at</s>" and text(tokenizer, pair.rejected) == "ab</s>"
    assert torch.cat([pair.prompt, pair.chosen]).tolist() == whole + [tokenizer.eos_token_id]


def test_nothing_to_predict_from(tokenizer):
    with pytest.raises(DataError, match="'prompt'.*no BOS"):
        encode(tokenizer, {"prompt": "", "chosen": "a", "rejected": "b"})


def test_chat_template_and_its_white_space_after_eos():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    pair, moved = encode(
        tokenizer,
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
    )
    assert not moved
    assert text(tokenizer, pair.prompt) == "<s>[user]hi</s>\n[assistant]"
    assert text(tokenizer, pair.chosen) == "yes</s>" and text(tokenizer, pair.rejected) == "no</s>"


def test_a_template_that_refuses_is_a_data_error():
    tokenizer = make_tokenizer("{{ raise_exception('no system\n turns') }}")
    row = {
        "prompt": [{"role": "system", "content": "x"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    with pytest.raises(DataError, match="test: field 'prompt'.*no system turns"):
        encode(tokenizer, row)


def test_plain_template_without_a_chat_template(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert plain_template(messages, True) == "system: be brief\n\nuser: hi\n\nassistant:"
    pair, _ = encode(
        tokenizer,
        {
            "prompt": messages,
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
    )
    assert text(tokenizer, pair.prompt) == "system: be brief\n\nuser: hi\n\nassistant:"
    assert text(tokenizer, pair.chosen) == " yes</s>"


def test_tokenizer_without_eos(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(UserError, match="no EOS"):
        ExampleTokenizer(bare)


def pair_of(prompt, chosen, rejected):
    return token_pair(*(torch.arange(n, dtype=torch.int32) for n in (prompt, chosen, rejected)))


def lengths(pair):
    return None if pair is None else (len(pair.prompt), *map(len, pair.completions))


@pytest.mark.parametrize(
    "overlong, sizes, expected",
    [
        ("drop", (5, 10, 3), None),
        ("truncate_prompt", (5, 10, 3), (2, 10, 3)),
        ("truncate_prompt", (5, 12, 3), None),  # the completion alone fills the limit
        ("truncate_completion", (5, 10, 3), (5, 7, 3)),
        ("truncate_completion", (12, 3, 3), None),  # the prompt alone fills the limit
        (
            "truncate_completion",
            (5, 7, 7),
            (5, 5, 5),
        ),  # fits max_length, not the budget of 20: both sides get half of it
        ("drop", (5, 5, 5), (5, 5, 5)),
    ],
)
def test_overlong(overlong, sizes, expected):
    pair = fit(pair_of(*sizes), budget=20, max_length=12, overlong=overlong, bos=None, source="s")
    assert lengths(pair) == expected
    if pair is not None:
        assert pair.tokens() <= 20 and pair.longest() <= 12
        assert pair.prompt.tolist() == list(range(sizes[0]))[-len(pair.prompt) :]


def test_truncating_the_prompt_keeps_bos():
    assert fit(
        pair_of(5, 10, 3), budget=40, max_length=12, overlong="truncate_prompt", bos=0, source="s"
    ).prompt.tolist() == [0, 4]


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((5, 10, 3), "a sequence of 15 tokens exceeds 12"),
        ((5, 7, 7), "example's 24 tokens exceed --tokens-per-batch 20"),
    ],
)
def test_overlong_is_an_error_by_default(sizes, words):
    with pytest.raises(DataError, match=words):
        fit(pair_of(*sizes), budget=20, max_length=12, overlong="error", bos=None, source="s")


def test_what_was_cut_or_dropped_is_counted(tokenizer):
    rows = [
        ("0", make_rows()[0]),
        ("1", {"prompt": "x", "chosen": "y" * 40, "rejected": "z"}),
        ("2", pair_of(30, 2, 2)),
    ]
    pairs, report = tokenise(
        rows, tokenizer, PREFERENCE, budget=60, max_length=30, overlong="truncate_completion"
    )
    assert (len(pairs), report.count, report.truncated, report.dropped) == (2, 2, 1, 1)
    assert "1 truncated" in str(report) and "1 dropped" in str(report)
