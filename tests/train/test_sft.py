"""Supervised fine-tuning: which tokens are learnt, what the loss is, and what the L1 norm does to the weights."""

import math

import pytest
import torch
import transformers
from chat import CHAT_SPECIALS, HARMFUL, TEMPLATES, assistant, byte_tokenizer, system, user
from safetensors.torch import load_file
from tiny import CHAT_TEMPLATE, make_demonstrations, make_model, make_tokenizer, write_jsonl

from fastalign.cli import main as cli
from fastalign.train import DataError, TokenExample, TrainConfig, UserError, train
from fastalign.train.data.examples import fingerprint, pack_examples
from fastalign.train.data.formats import supervised
from fastalign.train.data.tokenise import tokenise
from fastalign.train.methods.sft import SFT, shrink

TALK = [user("hi"), assistant("hello"), user("more?"), assistant("yes")]
# chatml with marks that leave the end of the turn outside
MARKED = (
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def chat(template):
    return byte_tokenizer(template, CHAT_SPECIALS, pad_token="<pad>")


def examples_of(tokenizer, *rows, loss_on=None, **options):
    numbered = ((f"line {i}", row) for i, row in enumerate(rows, 1))
    options = {"budget": 4096, "max_length": None, "overlong": "error", **options}
    return tokenise(numbered, tokenizer, supervised(loss_on), **options)


def learnt(tokenizer, row, **options):
    """(all text, the stretches that are scored) of one row."""
    (example,), _ = examples_of(tokenizer, row, **options)
    packed = pack_examples([example], [0], 4096)[0].packed
    ids, mask = packed.input_ids.tolist(), [False, *packed.mask.tolist()]
    starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
    stops = [next((j for j in range(i, len(ids)) if not mask[j]), len(ids)) for i in starts]
    return tokenizer.decode(ids), [tokenizer.decode(ids[i:j]) for i, j in zip(starts, stops)]


# --- which tokens are learnt --------------------------------------------------------------------------------


def test_positions_by_hand():
    """One token per byte: <start>user\\nhi<end>\\n is 1 + 7 + 1 + 1 tokens, <start>assistant\\n 11, hello<end> 6;
    then \\n, <start>user\\nmore?<end>\\n 13, <start>assistant\\n 11, yes<end> 4."""
    (example,), _ = examples_of(chat(TEMPLATES["chatml"]), {"messages": TALK})
    assert len(example.prompt) == 21
    assert example.masks() == [[True] * 6 + [False] * 25 + [True] * 4]
    # llama2: <s>[INST] hi [/INST] is 1 + 17 tokens, " hello </s>" 8; <s>[INST] more? [/INST] 21, " yes </s>" 6
    (example,), _ = examples_of(chat(TEMPLATES["llama2"]), {"messages": TALK})
    assert len(example.prompt) == 18
    assert example.masks() == [[True] * 8 + [False] * 21 + [True] * 6]


@pytest.mark.parametrize("name", [*TEMPLATES, "none"])
def test_every_turn_is_learnt_as_the_one_answer_to_its_prompt(name):
    """The conversation up to any of its answers has the tokens of that answer alone, and the same are scored."""
    tokenizer = chat(TEMPLATES.get(name))
    talk = TALK if name == "gemma" else [system("be kind"), *TALK]
    if name == "mistral":  # moves the system message into the last user turn
        with pytest.raises(
            DataError, match="differently once the conversation goes on.*--loss-on completion"
        ):
            examples_of(tokenizer, {"messages": talk})
        talk = TALK
    (whole,), report = examples_of(tokenizer, {"messages": talk})
    ids, mask = torch.cat([whole.prompt, whole.completions[0]]), whole.masks()[0]
    mask = [False] * len(whole.prompt) + mask
    for i, message in enumerate(talk):
        if message["role"] != "assistant":
            continue
        (one,), _ = examples_of(tokenizer, {"prompt": talk[:i], "completion": [message]})
        alone, first = torch.cat([one.prompt, one.completions[0]]), len(one.prompt)
        if name in ("bare", "none") and i < len(talk) - 1:  # nothing in the text ends a turn
            alone = alone[:-1]
            assert "1 with an earlier turn that no token ends" in str(report)
        assert torch.equal(ids[: len(alone)], alone)
        assert mask[first : len(alone)] == [True] * (len(alone) - first) and not any(mask[len(alone) :][:1])
    assert sum(mask) == sum(mask[len(whole.prompt) :])


def test_marks_of_the_template_decide():
    """They are transformers' own, with the token that ends the turn."""
    tokenizer = chat(MARKED)
    text, stretches = learnt(tokenizer, {"messages": TALK})
    assert stretches == ["hello<end>", "yes<end>"]
    inside = MARKED.replace("{% generation %}", "{% generation %}<think></think>")
    inside = chat(
        inside.replace("{% endgeneration %}", "<end>{% endgeneration %}").replace(
            "{% endif %}<end>", "{% endif %}"
        )
    )
    text, stretches = learnt(inside, {"messages": TALK})
    assert stretches == ["<think></think>hello<end>", "<think></think>yes<end>"]
    found = inside.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    (example,), _ = examples_of(inside, {"messages": TALK})
    mask = [0] * len(example.prompt) + [int(scored) for scored in example.masks()[0]]
    assert found["assistant_masks"][: len(mask)] == mask and not any(found["assistant_masks"][len(mask) :])
    # a line break behind the end, and the token that closes the conversation, are marked by some
    closing = MARKED.replace("{% endif %}<end>", "{% endif %}")
    closing = closing.replace("{% endgeneration %}", "<end>\n{% endgeneration %}") + (
        "{% if not add_generation_prompt %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    )
    assert learnt(chat(closing), {"messages": TALK})[1] == ["hello<end>", "yes<end>"]
    with pytest.raises(
        DataError, match="line 1: field 'messages': .* marks 1 stretches as generated .* 2 turns"
    ):
        examples_of(
            chat(MARKED.replace("== 'assistant'", "== 'assistant' and loop.last")), {"messages": TALK}
        )
    with pytest.raises(DataError, match=r"field 'messages\[1\]': .* changes the case"):
        examples_of(chat(MARKED.replace("{% generation %}{{ m.content", "{% generation %}{{ m.content | upper")),
                    {"messages": TALK})  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3", "moves system", "drops earlier turns", "upper case of answers"])
def test_a_template_that_does_something_else_is_refused(name):
    with pytest.raises(DataError, match=r"line 1: field 'messages\[\d\]': the tokenizer's chat template "):
        examples_of(chat(HARMFUL[name]), {"messages": [system("be kind"), *TALK]})


def test_what_is_learnt_can_be_chosen():
    tokenizer, row = chat(TEMPLATES["chatml"]), {"messages": [*TALK, user("bye")]}
    assert (
        learnt(tokenizer, row)[1]
        == learnt(tokenizer, row, loss_on="assistant")[1]
        == ["hello<end>", "yes<end>"]
    )
    assert learnt(tokenizer, row, loss_on="completion")[1] == ["yes<end>"]
    text, stretches = learnt(tokenizer, row, loss_on="all")
    assert text == "<start>" + stretches[0] and text.endswith("yes<end>")
    asked = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert learnt(tokenizer, asked)[1] == ["yes<end>"]
    assert learnt(tokenizer, asked, loss_on="assistant")[1] == ["hello<end>", "yes<end>"]
    plain = {"prompt": "The sky is", "completion": " blue."}
    assert learnt(tokenizer, plain) == ("The sky is blue.</s>", [" blue.</s>"])
    assert learnt(tokenizer, plain, loss_on="all") == ("The sky is blue.</s>", ["he sky is blue.</s>"])


def test_texts():
    assert learnt(byte_tokenizer(bos=True), {"text": "blue"}) == ("<s>blue</s>", ["blue</s>"])
    assert learnt(byte_tokenizer(), {"text": "blue</s>"}) == ("blue</s>", ["lue</s>"])
    # a conversation that was rendered before ends as one
    tokenizer = chat(TEMPLATES["chatml"])
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learnt(tokenizer, {"text": rendered})[0] == rendered.strip()


def test_one_turn_is_a_prompt_and_its_completion():
    tokenizer = chat(TEMPLATES["chatml"])
    one, other = (
        examples_of(tokenizer, row)[0]
        for row in ({"messages": TALK[:2]}, {"prompt": TALK[:1], "completion": TALK[1:2]})
    )
    assert fingerprint(one) == fingerprint(other)
    (talk,), _ = examples_of(tokenizer, {"messages": TALK})
    assert fingerprint([talk]) != fingerprint([TokenExample(talk.prompt, talk.completions)])


def test_contents_with_ends_of_turn_and_blank_ones():
    tokenizer = chat(TEMPLATES["chatml"])
    talk = [user("hi"), assistant("a </s> b<end>"), user("?"), assistant(" "), user("!"), assistant("<end>x")]
    (example,), report = examples_of(tokenizer, {"messages": talk})
    assert "1 with the name of a special token inside an answer" in str(report)
    assert tokenizer.eos_token_id not in example.completions[0]
    assert learnt(tokenizer, {"messages": talk})[1] == ["a </s> b<end>", "<end>", "<end>x<end>"]


def test_overlong_conversations():
    tokenizer, row = chat(TEMPLATES["chatml"]), {"messages": TALK}
    (cut,), report = examples_of(tokenizer, row, max_length=54, overlong="truncate_completion")
    assert report.truncated == 1 and cut.masks() == [[True] * 6 + [False] * 25 + [True] * 2]
    (cut,), _ = examples_of(tokenizer, row, max_length=40, overlong="truncate_prompt")
    assert len(cut.prompt) == 5 and sum(cut.masks()[0]) == 10
    with pytest.raises(DataError, match="a sequence of 56 tokens exceeds 40"):
        examples_of(tokenizer, row, max_length=40)


MALFORMED = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, None, "field 'completion': missing .*chosen.*; legal: 'prompt' and 'completion', or 'messages'"),
    ({"messages": TALK, "text": "a"}, None, "field 'text': beside another form"),
    ({"prompt": "a", "text": "b"}, None, "field 'text': beside another form"),
    ({"completion": "b"}, None, "field 'prompt': missing"),
    ({"prompt": "a", "completion": 3}, None, "field 'completion': expected text"),
    ({"messages": "hi"}, None, "field 'messages': expected a list of messages"),
    ({"messages": []}, None, "field 'messages': has no message"),
    ({"messages": [user("a")]}, None, "field 'messages': has no assistant turn"),
    ({"messages": [assistant("a"), *TALK]}, None, r"field 'messages\[0\]': opens the conversation"),
    ({"messages": [*TALK, assistant("a")]}, None, r"field 'messages\[4\]': follows another assistant turn"),
    ({"messages": [user("a"), {**assistant("b"), "tool_calls": [1]}]}, None, r"field 'messages\[1\].tool_calls'"),
    ({"messages": TALK, "tools": [{"name": "f"}]}, None, "field 'tools': not supported"),
    ({"messages": TALK, "prompt": "elsewhere"}, None, "field 'prompt': is in none of the messages"),
    ({"prompt": [user("a")], "completion": TALK[1:]}, None, "field 'completion': must hold assistant turns only"),
    ({"text": "a"}, "completion", "field 'text': has no completion: .*completion_only_loss"),
    ({"text": "a"}, "assistant", "field 'text': .*assistant_only_loss.*needs messages"),
    ({"prompt": "a", "completion": "b"}, "assistant", "field 'prompt': .*assistant_only_loss.*needs messages"),
    ({"text": ""}, None, "field 'text': gives no token|field 'text': has no token"),
    ({"prompt": "", "completion": "b"}, None, "field 'prompt': gives no token"),
]  # fmt: skip


@pytest.mark.parametrize("row, loss_on, words", MALFORMED)
def test_malformed_lines(row, loss_on, words):
    with pytest.raises(DataError, match=f"line 1: {words}"):
        examples_of(chat(TEMPLATES["chatml"]), row, loss_on=loss_on)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"loss_on": "prompt"}, "--loss-on is 'prompt'; legal: completion, assistant, all"),
        ({"loss": "dpo"}, "--loss dpo is unknown to fastalign train sft; legal: sft"),
        ({"loss_options": {"beta": 1}}, "no option 'beta'"),
        ({"ref_model": "x"}, "has no setting --ref-model"),
        ({"l1_coef": -1}, "--l1-coef is -1: it must not be negative"),
        ({"loss_on": "all", "overlong": "truncate_prompt"}, "there is no prompt"),
    ],
)
def test_settings_that_are_refused(config, settings, words):
    with pytest.raises(UserError, match=words):
        SFT(config(**settings))
    with pytest.raises(UserError, match="no setting --loss-on"):
        train("dpo", config(loss_on="all"))


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.fixture
def talking(tmp_path):
    folder = tmp_path / "talking"
    make_model().save_pretrained(folder)
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_the_loss_is_the_cross_entropy_of_the_scored_tokens(config, talking, head):
    """Against transformers' logits in float64, each sequence alone; N counts over all packs of the step."""
    rows, tokenizer = make_demonstrations(7), make_tokenizer(CHAT_TEMPLATE)
    settings = config(
        data=None, model=str(talking), head=head, batch_size=7, max_steps=1, tokens_per_batch=64
    )
    record = train("sft", settings, examples=rows).history[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(talking).double()
    losses, entropies, hits = [], [], []
    for example in examples_of(tokenizer, *rows)[0]:
        ids = torch.cat([example.prompt, example.completions[0]]).long()
        mask = torch.tensor(example.masks()[0])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(example.prompt) - 1 : -1][mask]
        labels = example.completions[0].long()[mask]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        hits.append((logits.argmax(-1) == labels).double())
    for name, values in (("loss", losses), ("entropy", entropies), ("mean_token_accuracy", hits)):
        assert record[name] == pytest.approx(torch.cat(values).mean().item(), rel=2e-6), name
    assert not any(name.startswith("logits/") for name in record)


def test_training_learns_and_evaluates(config, talking, capsys):
    settings = config(data=None, model=str(talking), max_steps=12, eval_fraction=0.2, learning_rate=1e-2)
    run = train("sft", settings, examples=make_demonstrations(10))
    evaluations = [record["eval_loss"] for record in run.history if "eval_loss" in record]
    assert evaluations[-1] < 0.7 * evaluations[0]
    shown = capsys.readouterr().out
    assert "learnt: " in shown and "loss sft" in shown


def test_the_command(config, talking, tmp_path, capsys):
    data = write_jsonl(tmp_path / "talk.jsonl", [{"messages": TALK}, {"text": "hi"}])
    words = ["train", "sft", "--model", str(talking), "--data", str(data), "--output", str(tmp_path / "o")]
    assert cli.main([*words, "--loss-on", "assistant"]) == 2
    error = capsys.readouterr().err
    assert "talk.jsonl, line 2: field 'text'" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()


# --- the L1 norm --------------------------------------------------------------------------------------------


def test_the_proximal_step_finds_the_closed_form():
    """min_w |w - a|^2 / 2 + c |w - w0|_1 has w0 + shrink(a - w0, c): gradient steps with the method's step between
    them reach it, exact zeros among it."""
    torch.manual_seed(0)
    start, target, c, rate = torch.randn(50), torch.randn(50), 0.8, 0.3
    method = SFT(TrainConfig(output="out", l1_coef=c))
    weight = torch.nn.Parameter(start.clone())

    class LM:
        model = torch.nn.ParameterList([weight])

    method.start(LM)
    for _ in range(60):
        with torch.no_grad():
            weight -= rate * (weight - target)
        metrics = method.updated(rate, {})
    change = shrink(target - start, c)
    assert torch.allclose(weight - start, change, atol=1e-6)
    still = target.sub(start).abs() < c
    assert 5 < still.sum() < 45 and torch.equal(weight[still], start[still])
    assert metrics["l1/zeros"] == pytest.approx(still.float().mean().item())
    assert metrics["l1/norm"] == pytest.approx(change.abs().sum().item(), rel=1e-5)


def test_a_sparse_change(config, talking):
    settings = {"data": None, "model": str(talking), "max_steps": 4, "warmup_ratio": 0.0}
    runs = {
        c: train(
            "sft",
            config(**settings, l1_coef=c, output=config().output + str(c)),
            examples=make_demonstrations(8),
        )
        for c in (0.0, 0.9)
    }
    start = load_file(talking / "model.safetensors")
    same = {}
    for c, run in runs.items():
        weights = load_file(run.output / "model.safetensors")
        same[c] = sum((weights[n] == start[n]).sum().item() for n in start) / sum(
            w.numel() for w in start.values()
        )
    assert "l1/zeros" not in runs[0.0].history[-1]
    assert same[0.9] > same[0.0] + 0.1
    assert runs[0.9].history[-1]["l1/zeros"] == pytest.approx(same[0.9], abs=1e-6)
    assert math.isfinite(runs[0.9].history[-1]["l1/norm"])
