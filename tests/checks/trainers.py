"""The trainers' own functions, out of the installed packages. The Makefile puts the packages into a folder of
their own (without what they depend on); `tests/run_all.py trainers` puts it in front of the path. What they
import besides and the tested functions do not use is made up here, by name: no other module is."""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import os
import re
import sys
import typing
from pathlib import Path
from types import ModuleType

import run_all
import torch
import typing_extensions

os.environ["TORCHDYNAMO_DISABLE"] = (
    "1"  # of a function of OpenRLHF's that is compiled: it is run as it stands
)
MADE_UP = (
    "accelerate", "aiohttp", "codetiming", "datasets", "deepspeed", "flash_attn", "omegaconf", "orjson",
    "peft", "pylatexenc", "ray", "tensordict",
    "torchaudio", "torchdata", "torchvision", "transformers", "vllm", "wandb",
)  # fmt: skip
NOT_MADE_UP = ("flash_attn.ops",)  # where it is found, log-probs are its


class Anything(type):
    """A class that takes anything, and of which every name is one, too."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return made_up(name)


def made_up(name):
    if name.startswith("is_"):  # is such a thing installed, or configured?
        return lambda *args, **kwargs: False
    if name == "_is_package_available":
        return lambda *args, **kwargs: (False, "0")
    made = {
        "__init__": lambda self, *args, **kwargs: None,
        "__call__": lambda self, decorated=None: decorated,
    }
    return Anything(name, (), made)


class MadeUp(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, made_up(name))
        return vars(self)[name]


class MadeUpModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MADE_UP and not name.startswith(NOT_MADE_UP):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MadeUp(spec.name)

    def exec_module(self, module):
        module.__version__ = "0.10.0"


def add_entry_points(folder):
    """fastalign's entry points, as an installation of it would have them."""
    info = Path(folder) / "fastalign_checkout-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastalign-checkout\nVersion: 0\n")
    table = re.search(
        r'\[project\.entry-points\."(.+)"\]\n((?:.+\n)+)', (run_all.ROOT / "pyproject.toml").read_text()
    )
    (info / "entry_points.txt").write_text(f"[{table[1]}]\n" + table[2].replace('"', ""))
    sys.path.append(str(folder))


def newer_python():
    """What Python 3.10 lacks, which LLaMA-Factory no longer takes."""
    if not hasattr(typing, "Self"):
        typing.Self = typing_extensions.Self
    if not hasattr(enum, "StrEnum"):

        class StrEnum(str, enum.Enum):
            __str__ = str.__str__

        enum.StrEnum = StrEnum


def make_up():
    """To be called before a trainer is imported."""
    newer_python()
    run_all.check_trainers()
    sys.meta_path.insert(0, MadeUpModules())


def same(ours, theirs, *wrt, tolerance=1e-5):
    """Values, dtypes and gradients, by an upstream gradient that differs from token to token."""
    one, other = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
    assert len(one) == len(other)
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    if wrt:
        grads = []
        for outputs in (one, other):
            total = sum((x.double() * weights(x)).sum() for x in outputs if x.requires_grad)
            grads.append(torch.autograd.grad(total, wrt, retain_graph=True, allow_unused=True))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def weights(x):
    return torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape)
