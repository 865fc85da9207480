"""Every op once on small and awkward shapes, for compute-sanitizer: `compute-sanitizer --tool racecheck
python tests/gpu/sanitize.py cuda`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from checks.calls import public_calls

import fastalign as fa


def main(backend: str, device: str = "cuda") -> None:
    with fa.use_backend(backend):
        # One warp, one block, and (where the architecture has them) one cluster per row: a row of 60001 bf16
        # alone, one of 40003 together with its reference; even and odd vocabularies.
        shapes = (
            (5, 7, torch.float32),
            (3, 1031, torch.bfloat16),
            (2, 8192, torch.float16),
            (2, 40003, torch.bfloat16),
            (2, 60001, torch.bfloat16),
        )
        for rows, vocab, dtype in shapes:
            for _, call in public_calls(device, rows=rows, vocab=vocab, dtype=dtype, pairs=2).values():
                call()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran on backend {backend}")


if __name__ == "__main__":
    main(*sys.argv[1:])
