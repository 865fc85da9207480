"""A tokenizer with one token per byte, and small chat templates that behave as well-known ones do."""

import tokenizers
import transformers

PLAIN_SPECIALS = ("<s>", "</s>")
CHAT_SPECIALS = (*PLAIN_SPECIALS, "<pad>", "<start>", "<end>", "<think>", "</think>")


def byte_tokenizer(template=None, specials=PLAIN_SPECIALS, *, bos=False, eos=False, **options):
    """`bos`, `eos`: the tokenizer puts them around every text. `options`: other special tokens (pad_token,
    ...)."""
    vocabulary = {
        token: i
        for i, token in enumerate([*specials, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])
    }
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in specials]
    )
    if bos or eos:
        single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[(token, vocabulary[token]) for token in PLAIN_SPECIALS]
        )
    options = {"bos_token": "<s>", "eos_token": "</s>", **options}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, clean_up_tokenization_spaces=False, **options
    )


def says(role, content, **fields):
    return {"role": role, "content": content, **fields}


def user(content, **fields):
    return says("user", content, **fields)


def assistant(content, **fields):
    return says("assistant", content, **fields)


def system(content):
    return says("system", content)


_EACH, _END = "{% for m in messages %}", "{% endfor %}"
_TURN = "<start>{{ m.role }}\n{{ m.content }}<end>\n"
_ASK = "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
_REST = "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"

TEMPLATES = {
    "chatml": _EACH + _TURN + _END + _ASK,
    # system inside the first user turn, a BOS before every exchange, white space around the answer
    "llama2": _REST + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first and s %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}" + _EACH + "<start>{{ m.role }}\n\n{{ m.content | trim }}<end>" + _END
    + "{% if add_generation_prompt %}<start>assistant\n\n{% endif %}",
    # system before the last user turn
    "mistral": _REST + "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index %}{% endif %}"
    "{% endfor %}{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.index == ns.last and s %}{{ s "
    "}}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + _EACH
    + "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n" + _END
    + "{% if add_generation_prompt %}<start>model\n{% endif %}",
    "qwen2.5": "{% if messages[0].role != 'system' %}<start>system\nYou are a helpful assistant.<end>\n{% endif %}" + _EACH + _TURN + _END + _ASK,
    "zephyr": _EACH + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}" + _END,
    # closes the whole conversation with EOS
    "phi3": _EACH + "<|{{ m.role }}|>\n{{ m.content }}<end>\n" + _END + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    # two special tokens behind the words, of which the second is EOS
    "command-r": "{{ bos_token }}" + _EACH + "<start>{{ m.role }}:{{ m.content }}<end>{{ eos_token }}" + _END
    + "{% if add_generation_prompt %}<start>assistant:{% endif %}",
    "olmo": "{{ bos_token }}" + _EACH + "{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}{{ eos_token }}{% if not loop.last %}\n{% endif %}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}" + _END + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # walks over parts, as templates of models that see do
    "parts": _EACH + "<start>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<end>\n" + _END + _ASK,
    # no special token at all ends a turn
    "bare": _EACH + "### {{ m.role }}\n{{ m.content }}\n" + _END + "{% if add_generation_prompt %}### assistant\n{% endif %}",
    # consecutive turns of one role become one
    "merging": _EACH + "{% if loop.first or messages[loop.index0 - 1].role != m.role %}<start>{{ m.role }}\n{% else %}\n\n{% endif %}{{ m.content }}"
    "{% if loop.last or messages[loop.index0 + 1].role != m.role %}<end>\n{% endif %}" + _END + _ASK,
}  # fmt: skip

_QWEN3 = (  # with enable_thinking=false the empty block belongs to the prompt
    _EACH
    + "{% set c = m.content %}{% set think = '' %}{% if m.role == 'assistant' and '</think>' in c %}{% set think = c.split('</think>')[0]"
    ".split('<think>')[-1].strip() %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}<start>{{ "
    "m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ think }}\n</think>\n\n{% endif %}{{ c }}<end>\n"
    + _END
    + "{% if add_generation_prompt %}<start>assistant\n{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
_CUTS = "{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}{% set c = c.split('</think>')[-1].strip() %}{% endif %}"
HARMFUL = {
    "moves system": _REST + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}{% if loop.last and s %}[INST] {{ s }}\n\n{{ m.content }}[/INST]"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% "
    "endfor %}",
    "drops system": _EACH + "{% if m.role != 'system' %}" + _TURN + "{% endif %}" + _END + _ASK,
    "drops earlier turns": _EACH + "{% if m.role == 'system' or loop.revindex <= 2 %}" + _TURN + "{% endif %}" + _END + _ASK,
    "keeps one of a role": _EACH + "{% if loop.last or messages[loop.index].role != m.role %}" + _TURN + "{% endif %}" + _END + _ASK,
    "reverses": "{% for m in messages | reverse %}" + _TURN + _END + _ASK,
    "upper case": _EACH + "<start>{{ m.role }}\n{{ m.content | upper }}<end>\n" + _END + _ASK,
    "upper case of answers": _EACH + "<start>{{ m.role }}\n{{ m.content | upper if m.role == 'assistant' else m.content }}<end>\n" + _END + _ASK,
    "first 9 letters": _EACH + "<start>{{ m.role }}\n{{ m.content[:9] }}<end>\n" + _END + _ASK,
    "escapes": _EACH + "<start>{{ m.role }}\n{{ m.content | tojson }}<end>\n" + _END + _ASK,
    "qwen3": _QWEN3,
    "deepseek-r1": "{{ bos_token }}" + _EACH + _CUTS + "{% if m.role == 'user' %}<|User|>{{ c }}{% else %}<|Assistant|>{{ c }}{{ eos_token }}{% endif %}" + _END
    + "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
    "opens a think block": _EACH + _TURN + _END + "{% if add_generation_prompt %}<start>assistant\n<think>\n{% endif %}",
    "no generation prompt": _EACH + _TURN + _END,
    "signs": _EACH + "<start>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %} (by a machine){% endif %}<end>\n" + _END + _ASK,
    "ignores content": "{{ bos_token }}" + _EACH + "<start>{{ m.role }}<end>" + _END + _ASK,
    "counts turns": "<{{ messages | length }}>" + _EACH + _TURN + _END + _ASK,
    "preface when answered": "{% if messages[-1].role == 'assistant' %}<start>system\nBe good.<end>\n{% endif %}" + _EACH + _TURN + _END + _ASK,
    "BOS twice": "{{ bos_token }}{{ bos_token }}" + _EACH + _TURN + _END + _ASK,
}  # fmt: skip
