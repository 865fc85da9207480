"""What a chat template makes of messages is compared with the messages: every word in the tokens it belongs
to, nothing else scored, and the prompt that the online methods sample from."""

import re

import pytest
import tokenizers
import transformers
from chat import CHAT_SPECIALS, HARMFUL, TEMPLATES, assistant, byte_tokenizer, system, user

from fastalign.cli import main as cli
from fastalign.train import DataError, OnlineConfig, UserError
from fastalign.train.data.formats import LISTWISE, PREFERENCE, UNPAIRED, parse_prompt
from fastalign.train.data.prompts import load_prompts
from fastalign.train.data.tokenise import ExampleTokenizer, tokenise

PROMPT = [system("obey me"), user("first question"), assistant("first answer"), user("a longer SECRET")]
ANSWERS = ([assistant("certainly, yes")], [assistant("no")])


def tokenizer_of(template, **options):
    return byte_tokenizer(template, CHAT_SPECIALS, pad_token="<pad>", **options)


def rows_of(prompt, answers):
    """The same in every format that has completions."""
    return {
        "pairs": (PREFERENCE, {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}),
        "implicit": (PREFERENCE, {"chosen": [*prompt, *answers[0]], "rejected": [*prompt, *answers[1]]}),
        "responses": (UNPAIRED, {"prompt": prompt, "completion": answers[0], "label": True}),
        "lists": (LISTWISE, {"prompt": prompt, "completions": list(answers), "scores": [1, 0]}),
    }


def tokens(tokenizer, form, row):
    (example,), report = tokenise(
        [("line 1", row)], tokenizer, form, budget=4096, max_length=None, overlong="error"
    )
    return tokenizer.decode(example.prompt), [tokenizer.decode(each) for each in example.completions], report


def online_prompt(tokenizer, prompt, **options):
    config = OnlineConfig(max_new_tokens=4, max_length=512, template_options=options)
    return tokenizer.decode(load_prompts(config, tokenizer, 512, [{"prompt": prompt}])[0][0].prompt)


ENDS = {
    "command-r": "<end></s>",
    "mistral": "</s>",
    "llama2": " </s>",
    "zephyr": "</s>",
    "olmo": "</s>",
    "bare": "</s>",
}
BEFORE = {"llama2": " ", "mistral": " "}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_write_what_they_are_given(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    prompt = PROMPT if name != "gemma" else PROMPT[1:]
    expected = tokenizer.apply_chat_template(
        prompt
        if name != "parts"
        else [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in prompt],
        tokenize=False,
        add_generation_prompt=True,
    )
    for form, row in rows_of(prompt, ANSWERS).values():
        text, completions, report = tokens(tokenizer, form, row)
        assert text == expected and all(message["content"] in text for message in prompt)
        ends = BEFORE.get(name, "") + "{}" + ENDS.get(name, "<end>")
        assert completions == [ends.format(words) for words in ("certainly, yes", "no")][: len(completions)]
        assert not report.boundary_moved and (
            "system message that the chat template moves" in str(report)
        ) == (name == "mistral")
    assert online_prompt(tokenizer, prompt) == expected


NAMES = {
    "moves system": "leaves out the system message ('obey me') once an answer follows",
    "drops system": "leaves out the system message",
    "drops earlier turns": "leaves out the user message",
    "reverses": "puts the messages in another order",
    "upper case": "changes the case of letters in the system message",
    "upper case of answers": "changes the case of letters in the assistant message",
    "first 9 letters": "changes the user message ('first question'",
    "qwen3": r"writes '<think>\\n\\n</think>\\n\\n' before the assistant's words",
    "opens a think block": r"writes the prompt differently once an answer follows: '<think>\\n' becomes 'certainly",
    "no generation prompt": r"writes '<start>assistant\\n' before the assistant's words (it does not heed add_generation_prompt)",
    "signs": "writes ' (by a machine)<end>' behind the assistant's words",
    "ignores content": "leaves out the system message",
    "counts turns": "writes the prompt differently once an answer follows: '4>",
    "preface when answered": "writes the prompt differently once an answer follows",
    "BOS twice": "begins with the BOS token '<s>' twice",
}


@pytest.mark.parametrize("name", NAMES)
def test_templates_that_do_something_else_are_refused_by_name(name):
    for form, row in rows_of(PROMPT, ANSWERS).values():
        with pytest.raises(
            DataError,
            match="line 1.*the tokenizer's chat template .*" + re.escape(NAMES[name]).replace(r"\\\\", r"\\"),
        ):
            tokens(tokenizer_of(HARMFUL[name]), form, row)


@pytest.mark.parametrize("name", ["moves system", "opens a think block"])
def test_what_is_wrong_with_an_answer_only_is_right_online(name):
    """The prompt alone holds every word, and nothing is appended to it but the sample."""
    assert all(
        message["content"] in online_prompt(tokenizer_of(HARMFUL[name]), PROMPT[:2]) for message in PROMPT[:2]
    )


@pytest.mark.parametrize(
    "name", ["drops system", "reverses", "upper case", "first 9 letters", "ignores content", "BOS twice"]
)
def test_prompts_to_sample_from_are_compared_too(name):
    with pytest.raises(DataError, match="the tokenizer's chat template"):
        online_prompt(tokenizer_of(HARMFUL[name]), PROMPT)


def test_content_decides_what_some_templates_do():
    def refused(name, prompt, answers, words):
        with pytest.raises(DataError, match=words):
            tokens(tokenizer_of(HARMFUL[name]), *rows_of(prompt, answers)["pairs"])

    thought = "<think>\nwhy\n</think>\n\n"
    refused(
        "deepseek-r1",
        [user("hi")],
        ([assistant(thought + "yes")], ANSWERS[1]),
        "cuts the reasoning out of the assistant message",
    )
    refused(
        "deepseek-r1",
        [user("hi"), assistant(thought + "yes"), user("so?")],
        ANSWERS,
        "cuts the reasoning out of the assistant message",
    )
    refused("qwen3", [user("hi"), assistant(thought + "yes"), user("so?")], ANSWERS, "cuts the reasoning")
    refused("keeps one of a role", [user("one"), user("two")], ANSWERS, "leaves out the user message")
    refused("escapes", [user('say "hi"')], ANSWERS, "changes the user message")
    # where they do nothing, they are no reason to refuse
    text, (yes, no), _ = tokens(
        tokenizer_of(HARMFUL["deepseek-r1"]), *rows_of([user("hi")], ANSWERS)["pairs"]
    )
    assert (text, yes, no) == ("<s><|User|>hi<|Assistant|>", "certainly, yes</s>", "no</s>")
    text, (yes, no), _ = tokens(
        tokenizer_of(HARMFUL["qwen3"]),
        *rows_of([user("hi")], ([assistant(thought + "yes")], [assistant(thought + "no")]))["pairs"],
    )
    assert (text, yes, no) == (
        "<start>user\nhi<end>\n<start>assistant\n",
        thought + "yes<end>",
        thought + "no<end>",
    )
    text, _, _ = tokens(
        tokenizer_of(TEMPLATES["merging"]), *rows_of([user("one"), user("two")], ANSWERS)["pairs"]
    )
    assert "one\ntwo<end>" in text


def test_variables_of_the_template():
    row = rows_of([user("hi")], ANSWERS)["pairs"]
    off = {"enable_thinking": False}
    (example,), _ = tokenise(
        [("1", row[1])],
        tokenizer_of(HARMFUL["qwen3"]),
        row[0],
        budget=4096,
        max_length=None,
        overlong="error",
        template_options=off,
    )
    prompt = "<start>user\nhi<end>\n<start>assistant\n<think>\n\n</think>\n\n"
    assert (
        tokenizer_of(None).decode(example.prompt)
        == prompt
        == online_prompt(tokenizer_of(HARMFUL["qwen3"]), [user("hi")], **off)
    )
    assert tokenizer_of(None).decode(example.chosen) == "certainly, yes<end>"
    for name, words in (
        ("enable_think", "is no variable of the tokenizer's chat template"),
        ("messages", "is set by the trainer"),
    ):
        with pytest.raises(UserError, match=f"--template {name}: it {words}"):
            ExampleTokenizer(tokenizer_of(HARMFUL["qwen3"]), template_options={name: 1})
    with pytest.raises(UserError, match="no variable"):
        ExampleTokenizer(tokenizer_of(None), template_options=off)


def test_variables_on_the_command_line(model_dir, data_file, tmp_path, capsys):
    argv = [
        "train",
        "dpo",
        "--model",
        model_dir,
        "--data",
        data_file,
        "--output",
        tmp_path / "out",
        "--template",
        "enable_thinking=false",
    ]
    assert cli.main([str(part) for part in argv]) == 2
    assert (
        "error: --template enable_thinking: it is no variable of the tokenizer's chat template"
        in capsys.readouterr().err
    )


def test_white_space_that_a_template_trims_is_counted():
    padded = [user("  hi\n")], ([assistant(" yes ")], [assistant("no")])
    text, completions, report = tokens(tokenizer_of(TEMPLATES["llama3"]), *rows_of(*padded)["pairs"])
    assert "\n\nhi<end>" in text and completions == ["yes<end>", "no<end>"]
    assert "1 with white space around a message that the chat template trims" in str(report)
    text, completions, report = tokens(tokenizer_of(TEMPLATES["chatml"]), *rows_of(*padded)["pairs"])
    assert "\n  hi\n<end>" in text and completions == [" yes <end>", "no<end>"] and "trims" not in str(report)


def test_names_and_other_fields():
    named = [user("hi", name="Ada")]
    with pytest.raises(DataError, match="leaves out the name 'Ada' of a message"):
        tokens(tokenizer_of(TEMPLATES["chatml"]), *rows_of(named, ANSWERS)["pairs"])
    writes = TEMPLATES["chatml"].replace("{{ m.role }}", "{{ m.role }}{{ ' ' + m.name if m.name else '' }}")
    assert "<start>user Ada\nhi<end>" in tokens(tokenizer_of(writes), *rows_of(named, ANSWERS)["pairs"])[0]
    _, _, report = tokens(tokenizer_of(writes), *rows_of([user("hi", time=12)], ANSWERS)["pairs"])
    assert "1 with a message field 'time' that the chat template ignores" in str(report)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content", "thinking", "images"])
def test_words_beside_the_content_are_refused(place, field):
    prompt, answers = [user("hi")], ([assistant("yes")], [assistant("no")])
    (prompt if place == 0 else answers[0])[0][field] = ["something"]
    with pytest.raises(DataError, match=f"{field}': not supported"):
        tokens(tokenizer_of(TEMPLATES["chatml"]), *rows_of(prompt, answers)["pairs"])


def test_contents_in_parts():
    part = {"type": "text", "text": "hi"}
    for name in ("chatml", "parts"):
        text, _, _ = tokens(tokenizer_of(TEMPLATES[name]), *rows_of([user([part])], ANSWERS)["pairs"])
        assert text == "<start>user\nhi<end>\n<start>assistant\n"
    for parts in ([], [part, part], [{"type": "image"}], ["hi"]):
        with pytest.raises(DataError, match=r"prompt\[0\].content': expected text, or a list of one part"):
            parse_prompt("line 1", {"prompt": [user(parts)]})


def test_a_completion_is_one_turn():
    with pytest.raises(DataError, match="'chosen'.*has 2 assistant turns; a completion is one"):
        tokens(
            tokenizer_of(TEMPLATES["chatml"]),
            *rows_of([user("hi")], ([*ANSWERS[0], *ANSWERS[1]], ANSWERS[1]))["pairs"],
        )


def test_blank_contents():
    prompt = [system(""), user("hi")]
    text, completions, _ = tokens(
        tokenizer_of(TEMPLATES["llama2"]), *rows_of(prompt, ([assistant("")], ANSWERS[1]))["pairs"]
    )
    assert text == "<s>[INST] hi [/INST]" and completions == [" </s>", " no </s>"]
    skips = TEMPLATES["chatml"].replace(
        "{{ m.content }}<end>\n", "{% if m.content %}{{ m.content }}<end>\n{% endif %}"
    )
    assert tokens(tokenizer_of(skips), *rows_of([user("hi")], ([assistant("")], ANSWERS[1]))["pairs"])[1] == [
        "<end>",
        "no<end>",
    ]


def test_a_template_that_nobody_wrote_marks_for():
    """Words of the template that equal those of the data prove nothing: "user" stands in the header either
    way."""
    with pytest.raises(DataError, match="leaves out the user message"):
        tokens(tokenizer_of(HARMFUL["ignores content"]), *rows_of([user("user")], ANSWERS)["pairs"])


def test_remarks_and_unknown_characters(capsys):
    dated = "{{ bos_token }}<start>system\n{{ strftime_now('%Y') }}<end>\n" + TEMPLATES["chatml"]
    to_tokens = ExampleTokenizer(tokenizer_of(dated))
    assert to_tokens.remarks() == []  # it has not been used
    to_tokens.prompt(parse_prompt("line 1", {"prompt": [user("hi")]}))
    end, date = to_tokens.remarks()
    assert (
        "a turn ends with '<end>', not with the tokenizer's EOS '</s>'" in end and "writes the date" in date
    )
    to_tokens = ExampleTokenizer(tokenizer_of(TEMPLATES["qwen2.5"]))
    to_tokens.prompt(parse_prompt("line 1", {"prompt": [user("hi")]}))
    assert "words of its own: '<start>system\\nYou are a helpful assistant.<end>" in "".join(
        to_tokens.remarks()
    )
    to_tokens = ExampleTokenizer(tokenizer_of(TEMPLATES["zephyr"], bos=True))
    to_tokens.prompt(parse_prompt("line 1", {"prompt": [user("hi")]}))
    assert "conversations have no BOS" in to_tokens.remarks()[0]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>"
    )
    rows = [
        ("1", {"prompt": "a b", "chosen": " b", "rejected": " a"}),
        ("2", {"prompt": "a", "chosen": " z", "rejected": " a"}),
    ]
    _, report = tokenise(rows, tokenizer, PREFERENCE, budget=64, max_length=None, overlong="error")
    assert "1 with characters that the tokenizer does not know" in str(report)
