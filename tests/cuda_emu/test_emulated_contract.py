"""The contract tests of all backends, on the emulated CUDA kernels, each under one of two kinds of interleaving
or under every one of --emu-seeds."""

import importlib
from pathlib import Path

# Under the name of their file, as two files may have a test of the same name.
for _path in sorted((Path(__file__).parents[1] / "contract").glob("test_*.py")):
    for _name, _value in vars(importlib.import_module(f"contract.{_path.stem}")).items():
        if _name.startswith("test_"):
            globals()[f"{_path.stem}_{_name}"] = _value
