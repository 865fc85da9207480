"""A tiny Llama, a byte-level tokenizer and pairs that it can learn in seconds."""

import json

import tokenizers
import torch
import transformers

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(chat_template=None):
    """Byte-level BPE with a few merges, so that tokens can straddle the prompt boundary."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(["the cat sat on the mat", "a dog is good", "that is bad"] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def make_model(vocabulary=300, seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **options,
        }
    )
    return transformers.LlamaForCausalLM(config)


def make_rows(count=12):
    """Standard pairs of different lengths: chosen praises, rejected does not."""
    return [
        {
            "prompt": f"the {'cat ' * (i % 4)}number {i}:",
            "chosen": " good" * (1 + i % 3),
            "rejected": " bad" * (1 + (i + 1) % 4),
        }
        for i in range(count)
    ]


def make_responses(count=12):
    """Single responses: two good ones, then a bad one."""
    return [{"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 != 0}
            for i, row in enumerate(make_rows(count))]  # fmt: skip


def make_demonstrations(count=12):
    """Completions to imitate, conversations of one and two turns, and texts."""
    return [
        (
            {"prompt": row["prompt"], "completion": row["chosen"]},
            {
                "messages": [
                    {"role": role, "content": words}
                    for words in (row["prompt"], "and?")[: 1 + i % 2]
                    for role, words in (("user", words), ("assistant", row["chosen"].strip()))
                ]
            },
            {"text": row["prompt"] + row["chosen"]},
        )[i % 3]
        for i, row in enumerate(make_rows(count))
    ]


def make_lists(count=12):
    """Lists of two to four responses."""
    lists = []
    for i, row in enumerate(make_rows(count)):
        completions, scores = [row["rejected"], row["chosen"], " that is so so", " dog"], [0, 2, 1, 0.5]
        lists.append(
            {"prompt": row["prompt"], "completions": completions[: 2 + i % 3], "scores": scores[: 2 + i % 3]}
        )
    return lists


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def without_times(history):
    return [{name: value for name, value in record.items() if name != "step_time"} for record in history]


# Data of every format.
ROWS = {
    "pairs": make_rows(11),
    "responses": make_responses(11),
    "lists": make_lists(11),
    "demonstrations": make_demonstrations(11),
}
