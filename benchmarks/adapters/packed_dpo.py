"""Time and peak memory of a DPO step on pairs of real lengths, on the CPU: TRL's padded trainer, the same
with fastalign's rows in it (`patch("trl")`), and PackedDPOTrainer.

    python benchmarks/adapters/packed_dpo.py OUT.json --data PAIRS.jsonl [--pairs 8 --max-length 1024 ...]

PAIRS.jsonl: TRL's preference format; the tokenizer is trained on it. Every contestant is a process of its
own, in turns, whose high-water mark the kernel reports; model, reference, gradients and optimizer are in it.
Of two steps the second is timed. TRL's defaults hold, gradient checkpointing among them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from process import measured
from trl_table import packed as table

CONTESTANTS = {
    "TRL": "padded",
    "TRL, fastalign's rows": 'padded, fastalign.adapters.patch("trl")',
    "PackedDPOTrainer": "packed",
}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    numbers = {
        "pairs": 8, "max-length": 1024, "vocab": 32000, "hidden": 256, "layers": 4, "threads": 1,
        "repeats": 3, "seed": 0,
    }  # fmt: skip
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--one", nargs=2, metavar=("CONTESTANT", "FOLDER"), help="this process is a contestant"
    )
    arguments = parser.parse_args(words)
    if not arguments.data.is_file():
        parser.error(f"--data {arguments.data}: there is no such file")
    return arguments


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Model, tokenizer and rows in a folder; how much of a padded batch is padding."""
    import tokenizers
    import torch
    import transformers

    lines = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]

    def text(part: Any) -> str:
        return part if isinstance(part, str) else "\n".join(turn["content"] for turn in part)

    rows = [{name: text(line[name]) for name in ("prompt", "chosen", "rejected")} for line in lines]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=arguments.vocab, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator((text for row in rows for text in row.values()), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=arguments.max_length, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(arguments.seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    lengths = [
        min(len(tokenizer(row["prompt"] + row[side])["input_ids"]) + 1, arguments.max_length)
        for row in rows for side in ("chosen", "rejected")
    ]  # fmt: skip
    return {
        "mean_tokens": statistics.mean(lengths),
        "median_tokens": statistics.median(lengths),
        "max_tokens": max(lengths),
    }


def one(arguments: argparse.Namespace) -> None:
    import datasets
    import torch
    import transformers
    import trl

    from fastalign import adapters

    name, folder = arguments.one[0], Path(arguments.one[1])
    torch.set_num_threads(arguments.threads)
    datasets.disable_progress_bars()
    times: list[float] = []
    batches: list[dict[str, int]] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    kind = trl.DPOTrainer
    if name == "PackedDPOTrainer":
        from fastalign.adapters.trl import PackedDPOTrainer as kind
    patched = adapters.patch("trl") if "rows" in name else contextlib.nullcontext()
    rows = datasets.Dataset.from_list(json.loads((folder / "rows.json").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as output, patched:
        trainer = kind(
            str(folder / "model"),
            args=trl.DPOConfig(
                output, max_steps=2, per_device_train_batch_size=arguments.pairs, max_length=arguments.max_length,
                logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
                dataloader_pin_memory=False, seed=arguments.seed,
            ),
            train_dataset=rows,
        )  # fmt: skip
        collate = trainer.data_collator

        def counted(examples: list[Any]) -> Any:
            batch = collate(examples)
            mask = batch["attention_mask"]
            batches.append({"tokens": int(mask.sum()), "padded_tokens": mask.numel(), "sequences": len(mask)})
            return batch

        trainer.data_collator = counted
        trainer.add_callback(Clock())
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry][1]
    step = {"seconds": times[1], "loss": logged["loss"], "grad_norm": logged["grad_norm"]}
    found = step | batches[1]  # the loader is a batch ahead
    arguments.out.write_text(json.dumps(found), encoding="utf-8")


def main(words: list[str]) -> None:
    arguments = parse(words)
    if arguments.one:
        return one(arguments)
    from fastalign.cli.info import machine

    shape = {name: value for name, value in vars(arguments).items() if name not in ("out", "one", "data")}
    passed = [w for name, value in shape.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    passed += ["--data", str(arguments.data)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as made:
        lengths = prepare(arguments, Path(made))
        for turn in range(arguments.repeats):
            for name in list(CONTESTANTS)[:: 1 if turn % 2 == 0 else -1]:
                runs[name].append(measured(__file__, passed, [name, made], arguments.threads))
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
    report = {
        "date": str(datetime.date.today()), "machine": machine()["processor"], "versions": versions,
        "shape": shape | {"data": arguments.data.name}, "lengths": lengths, "contestants": CONTESTANTS,
        "runs": runs,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
