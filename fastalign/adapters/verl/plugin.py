"""The entry point that verl loads while it is imported (group `verl.plugins`).

Nothing of verl is imported here: the registrations wait for the modules that hold the registries. What
cannot be registered is said in a warning, and verl goes on."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _core_algos(module: ModuleType) -> None:
    from fastalign.adapters.verl.advantages import ESTIMATORS
    from fastalign.adapters.verl.losses import POLICY_LOSSES

    for name, function in POLICY_LOSSES.items():
        module.register_policy_loss(name)(function)
    for name, function in ESTIMATORS.items():
        module.register_adv_est(name)(function)


def _distillation(module: ModuleType) -> None:
    from fastalign.adapters.verl.distillation import NAMES, reverse_kl

    settings = module.DistillationLossSettings(names=NAMES, use_estimator=True)
    module.register_distillation_loss(settings)(reverse_kl)


# Module of verl's -> what to do once it has been executed.
WAITING: dict[str, Callable[[ModuleType], None]] = {
    "verl.trainer.ppo.core_algos": _core_algos,
    "verl.trainer.distillation.losses": _distillation,
}


def _register(name: str, module: ModuleType) -> None:
    try:
        WAITING.pop(name)(module)
    except Exception as error:  # verl must start without what we cannot register, and says nothing itself
        warnings.warn(f"fastalign is not registered with {name}: {error}", stacklevel=2)


class _Loader(importlib.abc.Loader):
    """A module's own loader, and its registration afterwards."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self.loader
        _register(module.__name__, module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the waiting modules as everybody else does, and puts `_Loader` around their loaders."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WAITING or self not in sys.meta_path:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


def start() -> None:
    """Register with what is there, and wait for what is not."""
    for name in list(WAITING):
        if name in sys.modules:
            _register(name, sys.modules[name])
    if WAITING:
        sys.meta_path.insert(0, _Finder())


start()
