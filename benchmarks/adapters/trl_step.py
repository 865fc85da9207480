"""Time and peak memory of a step of TRL's DPOTrainer and GRPOTrainer, alone and with fastalign in them, on the CPU:
`python benchmarks/adapters/trl_step.py OUT.json [--rows 16 --tokens 820 ...]`. Each contestant is a process
of its own, in turns, whose high-water mark the kernel reports; model, reference, gradients and optimizer are
in it. TRL's defaults hold (gradient checkpointing is on); completions of GRPO are given, so that no time of
sampling is in it."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from process import measured
from trl_runs import contestant
from trl_table import step as table

STEPS = ("DPO", "GRPO")
CONTESTANTS = ("theirs", "ours")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=32, help="sequences of a step; a pair is two")
    parser.add_argument("--tokens", type=int, default=820, help="of a sequence")
    parser.add_argument("--completion", type=int, default=410, help="tokens of it that are scored, about")
    for name, value in (("vocab", 32000), ("hidden", 256), ("layers", 4), ("threads", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", nargs=2, metavar=("STEP", "CONTESTANT"), help="this process is a contestant")
    return parser.parse_args(words)


# --- a contestant -------------------------------------------------------------------------------------------


def one(arguments: argparse.Namespace) -> None:
    """Two steps; the second is timed."""
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    name, who = arguments.one
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, contestant(who):
        trainer = build(name, arguments, folder)
        trainer.add_callback(Clock())
        trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    found = {"seconds": times[-1], "loss": logged["loss"], "grad_norm": logged["grad_norm"]}
    arguments.out.write_text(json.dumps(found), encoding="utf-8")


def build(name: str, arguments: argparse.Namespace, folder: str) -> Any:
    import datasets
    import torch
    import transformers
    import trl

    datasets.disable_progress_bars()
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(f"w{draw.randrange(2, arguments.vocab)}" for _ in range(tokens))

    config = transformers.LlamaConfig(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2 * arguments.tokens,
        bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = make_tokenizer(arguments.vocab)
    transformers.LlamaForCausalLM(config).save_pretrained(Path(folder, "model"))
    tokenizer.save_pretrained(Path(folder, "model"))
    prompt = arguments.tokens - arguments.completion
    common = {
        "output_dir": folder, "max_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "bf16": False, "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    given: dict[str, Any] = {"model": str(Path(folder, "model")), "processing_class": tokenizer}
    if name == "DPO":
        pairs = arguments.rows // 2
        rows = [
            {"prompt": text(prompt), "chosen": " " + text(arguments.completion - 1),
                "rejected": " " + text(arguments.completion - 1 - i % 7)}
            for i in range(2 * pairs)
        ]  # fmt: skip
        args = trl.DPOConfig(per_device_train_batch_size=pairs, max_length=arguments.tokens, **common)
        return trl.DPOTrainer(args=args, train_dataset=datasets.Dataset.from_list(rows), **given)
    rows = [{"prompt": text(prompt)} for _ in range(arguments.rows)]
    args = trl.GRPOConfig(
        per_device_train_batch_size=arguments.rows, num_generations=4,
        max_completion_length=arguments.completion, beta=0.04, **common
    )  # fmt: skip

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        made = [
            [draw.randrange(2, arguments.vocab) for _ in range(arguments.completion - i % 7)] for i in range(len(prompts))
        ]  # fmt: skip
        ids = [tokenizer(p)["input_ids"] for p in prompts]
        return {"prompt_ids": ids, "completion_ids": made, "logprobs": None}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(x) % 13) for x in completions]

    return trl.GRPOTrainer(
        args=args, train_dataset=datasets.Dataset.from_list(rows), reward_funcs=reward, rollout_func=rollout,
        **given
    )  # fmt: skip


def make_tokenizer(vocab: int) -> Any:
    """Of the words w2, w3, ..."""
    import tokenizers
    import transformers

    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )


# --- all of them --------------------------------------------------------------------------------------------


def main(words: list[str]) -> None:
    arguments = parse(words)
    if arguments.one:
        return one(arguments)
    from fastalign.cli.info import machine

    shape = {k: v for k, v in vars(arguments).items() if k not in ("out", "one")}
    passed = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    steps: dict[str, Any] = {
        name: {who: {"seconds": [], "peak_mib": [], "loss": [], "grad_norm": []} for who in CONTESTANTS} for name in STEPS
    }  # fmt: skip
    for turn in range(arguments.repeats):
        for name in STEPS:
            for who in CONTESTANTS if turn % 2 == 0 else CONTESTANTS[::-1]:
                for what, value in measured(__file__, passed, [name, who], arguments.threads).items():
                    steps[name][who][what].append(value)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
    report = {
        "date": str(datetime.date.today()),
        "machine": machine()["processor"],
        "versions": versions,
        "shape": shape,
        "steps": steps,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
