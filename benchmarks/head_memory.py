"""Peak memory of one step of `fastalign train dpo` with `--head fused` and `--head logits`, on the CPU:
`python benchmarks/head_memory.py OUT.json` writes the numbers and prints the README's table. A process of its
own for each, whose high-water mark the kernel reports: policy, reference, gradients and optimizer are in
it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY, HIDDEN, TOKENS = 128_256, 256, (2048, 4096, 8192)
HEADS = ("logits", "fused")
PROMPT = 8  # tokens; completions fill what is left of a pack of four pairs


def table(results: dict[str, Any]) -> str:
    """One line per size of a pack."""
    lines = [
        "| tokens in a pass | their logits, fp32 | peak with `--head logits` | peak with `--head fused` "
        "(default) | saved |",
        "|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        logits = run["tokens"] * results["vocabulary"] * 4 / (1 << 20)
        whole, fused = (run["peak_mib"][head] for head in HEADS)
        lines.append(
            f"| {run['tokens']:,} | {logits:,.0f} MiB | {whole:,.0f} MiB | {fused:,.0f} MiB | "
            f"{whole - fused:,.0f} MiB |"
        )
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """The largest pack in one sentence."""
    run = results["runs"][-1]
    whole, fused = (run["peak_mib"][head] / 1024 for head in HEADS)
    return (
        f"`fastalign train` never holds all logits: a DPO step on {run['tokens']:,} tokens with a vocabulary "
        f"of {results['vocabulary']:,} peaks at "
        f"{fused:.1f} GiB where `--head logits` takes {whole:.1f} GiB (small model, CPU, policy, reference "
        "and optimizer included)."
    )


def make_model(folder: Path) -> None:
    """A Llama with random weights, the vocabulary of a current model, and a tokenizer of bytes."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_ = tokenizers.Tokenizer(
        tokenizers.models.BPE({t: i for i, t in enumerate(["<s>", "</s>", *letters])}, [])
    )
    bytes_.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = tokenizers.decoders.ByteLevel()
    bytes_.add_special_tokens(["<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_pairs(path: Path, tokens: int) -> None:
    """Four pairs that fill a pack: each sequence is tokens / 8 long, its end-of-sequence token included."""
    length = tokens // 8 - PROMPT - 2  # beginning and end of the sequence
    rows = [
        {"prompt": "x" * PROMPT, "chosen": "ab"[i % 2] * length, "rejected": "cd"[i % 2] * length}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def peak_of(head: str, folder: Path, tokens: int) -> float:
    """MiB of the process that takes one step; all tokens are in one pass."""
    data, output = folder / f"{tokens}.jsonl", folder / f"{head}-{tokens}"
    write_pairs(data, tokens)
    settings = {
        "model": folder / "model",
        "data": data,
        "output": output,
        "head": head,
        "batch-size": 4,
        "max-steps": 1,
    }
    settings |= {"tokens-per-batch": tokens, "device": "cpu"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "fastalign", "train", "dpo", *flags, "--no-progress", "--no-tensorboard"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"head_memory: {' '.join(command)} failed")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = next(record for record in map(json.loads, lines) if "loss" in record)
    if not 0.9 * tokens <= record["num_tokens"] <= tokens:
        sys.exit(f"head_memory: the step had {record['num_tokens']} tokens, not about {tokens}")
    return usage.ru_maxrss / 1024  # Linux counts KiB


def main(out: str) -> None:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        runs = [
            {"tokens": n, "peak_mib": {head: round(peak_of(head, folder, n)) for head in HEADS}}
            for n in TOKENS
        ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {
        "vocabulary": VOCABULARY,
        "hidden": HIDDEN,
        "layers": 2,
        "threads": 2,
        "versions": versions,
        "runs": runs,
    }
    Path(out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
