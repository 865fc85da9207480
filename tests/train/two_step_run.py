"""The command line as a user meets it: two optimizer steps on a file, the saved model loads, and a wrong
input ends with exit code 2."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import transformers
from tiny import make_model, make_rows, make_tokenizer, write_jsonl


def fastalign(*arguments, expect=0):
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == expect, (
        f"exit code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}"
    )
    return done


def main(folder):
    model, data, output = folder / "model", write_jsonl(folder / "pairs.jsonl", make_rows(8)), folder / "out"
    for part in (make_model(), make_tokenizer()):
        part.save_pretrained(model)
    fastalign(
        "train",
        "dpo",
        "--model",
        model,
        "--data",
        data,
        "--output",
        output,
        "--batch-size",
        4,
        "--max-steps",
        2,
    )
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert len(steps) == 2 and abs(steps[0]["loss"] - math.log(2)) < 1e-6, records
    transformers.AutoModelForCausalLM.from_pretrained(output)
    wrong = fastalign(
        "train", "dpo", "--model", model, "--data", data, "--output", folder / "x", "--loss", "dop", expect=2
    )
    assert "dop" in wrong.stderr and "dpo" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1, (
        wrong.stderr
    )
    assert "token_stats_fwd" in fastalign("info").stdout
    print("two optimizer steps, a loadable model, one clear refusal")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
