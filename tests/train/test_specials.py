"""One BOS, one end of turn, on every path, whatever tokenizer, template and data bring along."""

import shutil

import pytest
import torch
import transformers
from chat import CHAT_SPECIALS, TEMPLATES, assistant, byte_tokenizer, user
from tiny import make_model

import fastalign.train.models.scorer as scorer
from fastalign.arena import review_task
from fastalign.train import (
    DataError,
    OnlineConfig,
    PackedCausalLM,
    TrainConfig,
    UserError,
    train,
    train_online,
)
from fastalign.train.data.formats import LISTWISE, PREFERENCE, UNPAIRED
from fastalign.train.data.prompts import load_prompts, load_texts
from fastalign.train.data.specials import stops
from fastalign.train.data.tokenise import ExampleTokenizer, TokenExample, tokenise
from fastalign.train.models.packed import load_stops
from fastalign.train.sampling.rewards import ModelReward
from fastalign.train.sampling.rollout import Rollout, Sampler


def tokens(tokenizer, form, row, **options):
    examples, _ = tokenise(
        [("line 1", row)], tokenizer, form, budget=4096, max_length=None, overlong="error", **options
    )
    return tokenizer.decode(examples[0].prompt), [tokenizer.decode(each) for each in examples[0].completions]


def everywhere(tokenizer, prompt, yes, no):
    """{path: (prompt, completions)} of the same texts or messages in every format, and the prompt of the
    online methods."""
    config = OnlineConfig(max_new_tokens=4, max_length=512)
    found = {
        "pairs": tokens(tokenizer, PREFERENCE, {"prompt": prompt, "chosen": yes, "rejected": no}),
        "responses": tokens(tokenizer, UNPAIRED, {"prompt": prompt, "completion": yes, "label": True}),
        "lists": tokens(
            tokenizer, LISTWISE, {"prompt": prompt, "completions": [yes, no, no], "scores": [1, 0, 0]}
        ),
        "implicit": tokens(tokenizer, PREFERENCE, {"chosen": prompt + yes, "rejected": prompt + no}),
    }
    return found, tokenizer.decode(load_prompts(config, tokenizer, 512, [{"prompt": prompt}])[0][0].prompt)


@pytest.mark.parametrize("eos", [False, True], ids=["", "adds EOS"])
@pytest.mark.parametrize("bos", [False, True], ids=["", "adds BOS"])
@pytest.mark.parametrize("given", ["", "<s>"], ids=["", "text has BOS"])
@pytest.mark.parametrize("ending", ["", "</s>", "</s>\n", "</s></s>", "</s>\n</s> "], ids=repr)
def test_texts(bos, eos, given, ending):
    found, prompt = everywhere(
        byte_tokenizer(bos=bos, eos=eos), given + "[INST] hi [/INST]", " yes" + ending, " no" + ending
    )
    expected = ("<s>" if bos or given else "") + "[INST] hi [/INST]"
    assert prompt == expected
    for text, completions in found.values():
        assert text == expected and completions == [" yes</s>", " no</s>", " no</s>"][: len(completions)]


@pytest.mark.parametrize("options", [{"bos": True}, {"eos": True}, {"bos": True, "eos": True}, {}], ids=str)
@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
@pytest.mark.parametrize("ending", ["", "<end>", "</s>", "<end></s>"])
def test_conversations_with_a_template_that_writes_bos(options, name, ending):
    tokenizer = byte_tokenizer(TEMPLATES[name], CHAT_SPECIALS, **options)
    found, prompt = everywhere(
        tokenizer, [user("hi")], [assistant("yes" + ending)], [assistant("no" + ending)]
    )
    end = " {}</s>" if name == "mistral" else "{}<end>"
    if name == "mistral" and "<end>" in ending:
        return  # not a token that ends anything there
    assert prompt.startswith("<s>") and prompt.count("<s>") == 1
    for text, completions in found.values():
        assert (
            text == prompt and completions == [end.format(w) for w in ("yes", "no", "no")][: len(completions)]
        )


@pytest.mark.parametrize("bos", [False, True])
def test_conversations_without_a_template(bos):
    found, prompt = everywhere(
        byte_tokenizer(bos=bos, eos=True), [user("hi")], [assistant("yes</s>")], [assistant("")]
    )
    assert prompt == "<s>" * bos + "user: hi\n\nassistant:"
    assert all(
        text == prompt and completions[:2] == [" yes</s>", " </s>"][: len(completions)]
        for text, completions in found.values()
    )


def test_empty_completions_are_one_end_of_turn():
    for bos in (False, True):
        found, _ = everywhere(byte_tokenizer(bos=bos, eos=True), "hi:", "", "</s>")
        assert all(
            set(completions) == {"</s>"} for name, (_, completions) in found.items() if name != "implicit"
        )
    found, _ = everywhere(
        byte_tokenizer(TEMPLATES["gemma"], CHAT_SPECIALS),
        [user("hi")],
        [assistant("")],
        [assistant("<end>\n")],
    )
    assert all(set(completions) == {"<end>"} for name, (_, completions) in found.items())


@pytest.mark.parametrize("ending", ["", "<end>", "</s>", "<end>\n</s>"])
def test_a_text_that_was_rendered_before_ends_as_the_conversation_does(ending):
    tokenizer = byte_tokenizer(TEMPLATES["gemma"], CHAT_SPECIALS, bos=True)
    rendered = tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)
    for text, completions in everywhere(tokenizer, rendered, "yes" + ending, "no" + ending)[0].values():
        assert text == rendered and completions[0] == "yes<end>"
    assert everywhere(tokenizer, "hi:", " yes", " no")[0]["pairs"] == ("<s>hi:", [" yes</s>", " no</s>"])


def test_other_ends_of_the_models_generation():
    """A tokenizer without a template; the model's generation stops at <end> as well."""
    tokenizer = byte_tokenizer(None, CHAT_SPECIALS)
    end = tokenizer.convert_tokens_to_ids("<end>")
    row = {"prompt": "hi:", "chosen": " yes<end>", "rejected": " no</s>"}
    assert tokens(tokenizer, PREFERENCE, row, stops={1, end})[1] == [" yes</s>", " no</s>"]
    # an id that is a letter of the tokenizer stands in many configurations that nobody looked at
    assert (
        tokens(tokenizer, PREFERENCE, {**row, "chosen": " yes"}, stops=tokenizer("s")["input_ids"])[1][0]
        == " yes</s>"
    )
    assert stops(make_model().config, None, transformers.GenerationConfig(eos_token_id=[1, 5])) == {1, 5}


def test_stops_of_a_directory(tmp_path):
    model = make_model()
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path)
    assert load_stops(str(tmp_path), model.config) == load_stops(None, model.config, model) == {1, 7}
    (tmp_path / "generation_config.json").unlink()
    assert load_stops(str(tmp_path), model.config) == {1}


@pytest.mark.parametrize(
    "row, field, words",
    [
        (
            {"prompt": "hi:", "chosen": " yes</s> and", "rejected": " no"},
            "chosen",
            "holds the end of a turn, '</s>', before its end",
        ),
        ({"prompt": "hi:", "chosen": " yes", "rejected": " <s>no"}, "rejected", "holds the BOS token, '<s>'"),
        (
            {"prompt": "<s><s>hi:", "chosen": " yes", "rejected": " no"},
            "prompt",
            "begins with the BOS token '<s>' twice",
        ),
    ],
)
def test_special_tokens_in_the_wrong_place(row, field, words):
    with pytest.raises(DataError) as error:
        tokens(byte_tokenizer(bos=True), PREFERENCE, row)
    assert error.value.field == field and words in str(error.value)


@pytest.mark.parametrize("template", [TEMPLATES["gemma"], None], ids=["template", "none"])
def test_the_name_of_a_special_token_in_a_message_is_letters(template):
    tokenizer = byte_tokenizer(template, CHAT_SPECIALS, bos=True)
    row = {
        "prompt": [user("hi")],
        "chosen": [assistant("a</s> b<s>c<end></s>")],
        "rejected": [assistant("<s>old</s>new")],
    }
    (pair,), report = tokenise(
        [("line 1", row)], tokenizer, PREFERENCE, budget=4096, max_length=None, overlong="error"
    )
    first, second = ("a</s> b<s>c", "<s>old</s>new") if template else (" a</s> b<s>c<end>", " <s>old</s>new")
    end = "<end>" if template else "</s>"
    for ids, words in zip(pair.completions, (first, second)):
        assert tokenizer.decode(ids) == words + end and not {0, 1} & set(ids[:-1].tolist())
        assert ids[-1] == tokenizer.convert_tokens_to_ids(end)
    assert "1 with the name of a special token inside an answer, taken as letters" in str(report)


def test_bos_and_eos_may_be_one_token():
    tokenizer = byte_tokenizer(
        None, CHAT_SPECIALS, bos=True, bos_token="<s>", eos_token="<s>", pad_token="<s>"
    )
    assert tokens(tokenizer, PREFERENCE, {"prompt": "hi:", "chosen": " yes<s>", "rejected": ""}) == (
        "<s>hi:",
        [" yes<s>", "<s>"],
    )


class Stubborn:
    """A tokenizer of its own code, which puts BOS and EOS around every text whatever it is asked for."""

    def __init__(self):
        self.inner = byte_tokenizer(bos=True, eos=True)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __call__(self, text, add_special_tokens=True, **options):
        return self.inner(text, add_special_tokens=True, **options)


def test_a_tokenizer_that_always_adds_them():
    found, prompt = everywhere(Stubborn(), "hi:", " yes", " no</s>")
    assert prompt == "<s>hi:" and all(
        text == "<s>hi:" and completions[0] == " yes</s>" for text, completions in found.values()
    )


@pytest.mark.parametrize("text", ["a text", "<s>a text", "a text</s>", "<s>a text</s></s>\n"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_texts_to_mix_in(text, bos, eos):
    tokenizer = byte_tokenizer(bos=bos, eos=eos)
    (example,) = load_texts(OnlineConfig(output="x", max_length=64), tokenizer, 64, [text])
    found = tokenizer.decode(torch.cat([example.prompt, *example.completions]))
    assert found == "<s>" * (bos or text.startswith("<s>")) + "a text</s>"


def test_the_sandbox_goes_the_same_way():
    tokenizer = byte_tokenizer(bos=True, eos=True, pad_token="</s>")
    batch = review_task._pack(tokenizer, [review_task.Example("hi:", " yes")])
    assert tokenizer.decode(batch.input_ids) == "<s>hi: yes</s>"
    (sample,) = review_task.generate(
        make_model(len(tokenizer)).eval(), tokenizer, ["hi:"], seed=0, max_new_tokens=2
    )
    assert tokenizer.decode(sample.prompt) == "<s>hi:"


# --- reward models ------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A causal LM whose template ends turns with <end>, and the settings of short runs."""
    tokenizer = byte_tokenizer(TEMPLATES["gemma"], CHAT_SPECIALS, pad_token="<pad>")
    make_model(len(tokenizer), pad_token_id=2).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    yield (
        tmp_path,
        tokenizer,
        {"progress": False, "tensorboard": False, "max_steps": 1, "learning_rate": 1e-4},
    )
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("chat", [True, False], ids=["messages", "texts"])
@pytest.mark.parametrize("stop", ["<end>", "</s>"])
def test_a_reward_model_is_read_where_it_was_trained(folders, monkeypatch, chat, stop):
    """Whichever of its stops a sample ends with."""
    tmp_path, tokenizer, settings = folders
    seen, plain = [], scorer.PackedScorer.scores

    def recording(self, batch):
        ends = batch.cu_seqlens[1:].long().tolist()
        seen.append([tokenizer.decode(batch.input_ids[a:b]) for a, b in zip([0, *ends], ends)])
        return plain(self, batch)

    monkeypatch.setattr(scorer.PackedScorer, "scores", recording)
    prompt, yes, no = ([user("hi")], [assistant("yes")], [assistant("no")]) if chat else ("hi:", "yes", "no")
    rows = [{"prompt": prompt, "chosen": yes, "rejected": no}] * 2
    train(
        "reward",
        TrainConfig(model=str(tmp_path / "lm"), output=str(tmp_path / "rm"), batch_size=2, **settings),
        examples=rows,
    )
    trained = next(text for text in seen[-1] if "yes" in text)
    model = make_model(len(tokenizer), pad_token_id=2)
    model.generation_config.eos_token_id = [1, 4]
    answer = tokenizer("yes" + stop, return_tensors="pt")["input_ids"]
    model.generate = lambda input_ids, **_: torch.cat([input_ids, answer.expand(len(input_ids), -1)], 1)
    seen.clear()
    config = OnlineConfig(output=str(tmp_path / "out"), reward_model=str(tmp_path / "rm"), batch_size=1, max_new_tokens=8, minibatches=1,
                          rollout_epochs=1, **settings)  # fmt: skip
    train_online("ppo", config, model=model, tokenizer=tokenizer, prompts=[{"prompt": prompt}])
    assert seen[0] == [trained] and trained.endswith("yes<end>" if chat else "yes</s>")


def test_a_response_that_was_cut_off_is_read_as_it_is():
    tokenizer = byte_tokenizer(TEMPLATES["gemma"], CHAT_SPECIALS)
    reward = ModelReward(None, 64, ExampleTokenizer(tokenizer).special)
    cut = Rollout(
        TokenExample(torch.tensor([9]), (torch.tensor([9, 10]),), {"prompt": [user("hi")]}), False, ""
    )
    assert reward._as_trained(cut) is cut.example


def test_the_end_must_be_there_to_be_read():
    with pytest.raises(
        UserError,
        match="--overlong truncate_completion cuts off the end of the turn, where the score is read",
    ):
        train("reward", TrainConfig(overlong="truncate_completion", output="x"))


def test_padding_is_none_of_the_ends(folders):
    """transformers reads a score before the padding: were the end of a turn the padding, it would be read
    before the end."""
    tmp_path, tokenizer, settings = folders
    for pad in (None, "</s>", "<end>"):
        tokenizer.pad_token = pad
        config = TrainConfig(
            model=str(tmp_path / "lm"), output=str(tmp_path / f"rm {pad}"), batch_size=2, **settings
        )
        model = scorer.load_scorer(str(tmp_path / "lm"), seed=0)
        rows = [
            {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("a longer no")]}
        ] * 2
        result = train("reward", config, model=model, tokenizer=tokenizer, examples=rows)
        saved = transformers.AutoTokenizer.from_pretrained(result.output)
        assert saved.pad_token not in ("<end>", "</s>", None)


# --- sampling -----------------------------------------------------------------------------------------------


def test_samples_stop_where_the_template_ends_a_turn():
    tokenizer = byte_tokenizer(TEMPLATES["gemma"], CHAT_SPECIALS)
    model = make_model(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    sampler = Sampler(PackedCausalLM(model), tokenizer, OnlineConfig(max_new_tokens=300))
    assert sampler.eos == [1, 4]
    rollouts = sampler([TokenExample(torch.tensor([0, 9], dtype=torch.int32), (), {"prompt": ""})], 8, seed=0)
    for rollout in rollouts:
        ids = rollout.example.completions[0].tolist()
        assert (
            not {1, 4} & set(ids[:-1])
            and rollout.ended == (ids[-1] in (1, 4))
            and "<end>" not in rollout.text
        )
