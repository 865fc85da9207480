"""The patcher. A trainer is a table of seams; nothing of a trainer is imported before it is to be patched."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType, TracebackType
from typing import Any, NamedTuple


class AdapterError(RuntimeError):
    """A trainer cannot be patched: it is not installed, of a version that was not tested, or already patched."""


INHERITED: Any = object()  # stands for the value of a name that a class has from its bases


class Seam(NamedTuple):
    """One function, method or class of a trainer, and what takes its place.

    where: module and name in it, "trl.trainer.utils:selective_log_softmax"; of a method
        "trl.trainer.dpo_trainer:DPOTrainer._compute_loss". A method that the class inherits is its own while
        it is patched.
    by: the same of ours. The value found there takes the place of the trainer's.
    changes: what that changes for the user, in one line; that numbers stay what they are goes without saying.
    everywhere: in every module, too, that has imported it by name; False: only in the module of `where`.
    needs: a package that the module in `where` imports and that not every user of the trainer has. Without it
        the seam is left out, and the report says so.
    """

    where: str
    by: str
    changes: str
    everywhere: bool = True
    needs: str | None = None

    @property
    def is_usable(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


class Replaced(NamedTuple):
    """A place where a trainer's function has been replaced: `name` in `owner` (a module or class)."""

    owner: Any
    name: str
    before: Any
    seam: Seam

    @property
    def place(self) -> str:
        inside = self.owner.__name__
        return inside if isinstance(self.owner, ModuleType) else f"{self.owner.__module__}.{inside}"


@dataclasses.dataclass
class Report:
    """What `patch` has done, and its end: as a context manager it takes the patch back on leaving.

    replaced: every place, the importing modules' own names included.
    version: of the trainer. `str()` is a line for each place."""

    adapter: Adapter
    version: str
    replaced: tuple[Replaced, ...]

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.adapter.unpatch()

    def __str__(self) -> str:
        lines = [f"{r.place}.{r.name} is now {r.seam.by.replace(':', '.')}" for r in self.replaced]
        left = [
            f"{seam.where.replace(':', '.')} is left as it is: {seam.needs} is not installed"
            for seam in self.adapter.seams
            if seam not in {r.seam for r in self.replaced}
        ]
        return "\n".join(
            [f"{self.adapter.trainer} {self.version}: {len(lines)} places patched", *lines, *left]
        )


@dataclasses.dataclass
class Adapter:
    """The table of one trainer.

    trainer: its name, which is that of its package; distribution: its name for pip.
    versions: a PEP 440 specifier of the versions that the seams were tested against; empty: of a trainer that is
        not on the package index, nothing is patched, and what it is to call was tested against its signature.
    seams: what is replaced. registers: what is registered with the trainer in its own way, without a patch, and
        where: in words, for `fastalign adapters`."""

    trainer: str
    distribution: str
    versions: str
    seams: tuple[Seam, ...] = ()
    registers: tuple[str, ...] = ()
    report: Report | None = None

    def installed(self) -> str | None:
        """The installed version; None: it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def tested(self, version: str) -> bool:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(self.versions).contains(version, prereleases=True)

    def patch(self, *, untested: bool = False) -> Report:
        """Put ours in the place of the trainer's functions: in the modules that define them and in every one of
        the trainer's modules that has imported them by name. All or nothing.

        Args:
            untested: patch a version outside `versions`, too.

        Returns:
            A `Report`, which is a context manager: `with patch("trl"): ...` ends with `unpatch`.

        Raises:
            AdapterError: the trainer is not installed, its version is outside `versions`, it is patched
                already, or a seam is not where the table has it."""
        if not self.seams:
            raise AdapterError(f"{self.trainer} is not patched: {'; '.join(self.registers)}")
        version = self.installed()
        if version is None:
            raise AdapterError(f"{self.distribution} is not installed; tested: {self.versions}")
        if self.report is not None:
            raise AdapterError(f"{self.trainer} is patched already; unpatch it first")
        if not untested and not self.tested(version):
            raise AdapterError(
                f"{self.distribution} is {version}; tested: {self.versions}. untested=True patches it all the same"
            )
        found = [(seam, *self._find(seam, version)) for seam in self.seams if seam.is_usable]
        replaced: list[Replaced] = []
        for seam, owner, name, before in found:
            ours = _load(seam.by)
            places = (
                [(owner, name), *self._importers(before)]
                if isinstance(owner, ModuleType) and seam.everywhere
                else [(owner, name)]
            )
            for place in dict.fromkeys(places):
                replaced.append(Replaced(*place, before, seam))
                setattr(*place, ours)
        self.report = Report(self, version, tuple(replaced))
        return self.report

    def unpatch(self) -> None:
        """Put the trainer's functions back, in modules too that have imported ours since. Without effect where
        nothing is patched."""
        if self.report is None:
            return
        for place in self.report.replaced:
            ours = _load(place.seam.by)
            if place.before is INHERITED:
                delattr(place.owner, place.name)
            else:
                setattr(place.owner, place.name, place.before)
            if isinstance(place.owner, ModuleType):
                for module, name in self._importers(ours):
                    setattr(module, name, place.before)
        self.report = None

    def _find(self, seam: Seam, version: str) -> tuple[Any, str, Any]:
        """(owner, name, value) of what a seam replaces."""
        module, path = seam.where.split(":")
        *outer, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for part in outer:
                owner = getattr(owner, part)
            if isinstance(owner, type) and name not in vars(owner) and hasattr(owner, name):
                return owner, name, INHERITED
            return owner, name, vars(owner)[name]
        except (ImportError, AttributeError, KeyError) as error:
            raise AdapterError(
                f"{self.distribution} {version} has no {seam.where.replace(':', '.')} ({error}); nothing was "
                "patched"
            ) from error

    def _importers(self, value: Any) -> list[tuple[ModuleType, str]]:
        """The trainer's imported modules that have this very object, and its name there."""
        return [
            (module, name)
            for path, module in list(sys.modules.items())
            if path.partition(".")[0] == self.trainer and isinstance(module, ModuleType)
            for name, held in list(vars(module).items())
            if held is value
        ]


def _load(where: str) -> Any:
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)
