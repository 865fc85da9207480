"""The patcher on a made-up trainer: every importing module is patched, and everything is put back."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType

import pytest

from fastalign import adapters
from fastalign.adapters.common import Adapter, AdapterError, Seam
from fastalign.cli import main as cli


def theirs(x):
    return x


def ours(x):
    return x + 1


class Trainer:
    def loss(self):
        return "theirs"


def our_loss(self):
    return "ours"


@pytest.fixture
def trainer(monkeypatch):
    """A package with a module that defines a function and one that has imported it under another name."""
    package, utils, uses = (ModuleType(name) for name in ("madeup", "madeup.utils", "madeup.uses"))
    utils.f, uses.g, utils.Trainer = (
        theirs,
        theirs,
        type("Trainer", (), {"loss": Trainer.loss, "__module__": "madeup.utils"}),
    )
    for module in (package, utils, uses):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    seams = (
        Seam("madeup.utils:f", f"{__name__}:ours", "adds one"),
        Seam("madeup.utils:Trainer.loss", f"{__name__}:our_loss", "another loss"),
    )
    version = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "1.2.3" if name == "madeup-dist" else version(name)
    )
    made = Adapter("madeup", "madeup-dist", ">=1.2,<1.3", seams)
    yield made, utils, uses
    made.unpatch()


def test_every_importing_module_is_patched_and_put_back(trainer):
    adapter, utils, uses = trainer
    with adapter.patch() as report:
        assert (utils.f(1), uses.g(1), utils.Trainer().loss()) == (2, 2, "ours")
        assert [(r.place, r.name) for r in report.replaced] == [
            ("madeup.utils", "f"), ("madeup.uses", "g"), ("madeup.utils.Trainer", "loss"),
        ]  # fmt: skip
        assert str(report).splitlines()[0] == "madeup 1.2.3: 3 places patched"
        assert f"madeup.uses.g is now {__name__}.ours" in str(report)
        late = ModuleType("madeup.late")  # imported while the patch is on
        late.f = utils.f
        sys.modules["madeup.late"] = late
    assert (utils.f, uses.g, late.f, utils.Trainer().loss()) == (theirs, theirs, theirs, "theirs")
    del sys.modules["madeup.late"]
    adapter.unpatch()  # again: nothing


def test_a_seam_of_one_module(trainer):
    adapter, utils, uses = trainer
    adapter.seams = (adapter.seams[0]._replace(everywhere=False),)
    with adapter.patch() as report:
        assert (utils.f(1), uses.g(1), len(report.replaced)) == (2, 1, 1)
    assert utils.f is theirs and uses.g is theirs


def test_a_patch_is_refused_in_one_line(trainer, monkeypatch):
    adapter, utils, uses = trainer
    adapter.versions = ">=1.3"
    with pytest.raises(AdapterError, match=r"madeup-dist is 1\.2\.3; tested: >=1\.3"):
        adapter.patch()
    adapter.patch(untested=True)
    with pytest.raises(AdapterError, match="patched already"):
        adapter.patch(untested=True)
    adapter.unpatch()
    adapter.seams += (Seam("madeup.utils:Trainer.lost", f"{__name__}:ours", ""),)
    with pytest.raises(AdapterError, match=r"madeup-dist 1\.2\.3 has no madeup\.utils\.Trainer\.lost"):
        adapter.patch(untested=True)
    assert utils.f is theirs and utils.Trainer().loss() == "theirs"  # all or nothing
    with pytest.raises(AdapterError, match="not installed"):
        Adapter("madeup", "fastalign-no-such-trainer", ">=1", adapter.seams).patch()


def test_unknown_trainers_are_refused():
    with pytest.raises(AdapterError, match="there is no adapter for 'tlr'; legal: "):
        adapters.patch("tlr")


def test_the_command_says_what_is_installed(capsys):
    assert cli.main(["adapters"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in adapters.NAMES)
    assert cli.main(["adapters", "trl"]) == 0
    assert "verl: " not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["adapters", "tlr"])
    assert "there is no adapter for 'tlr'; legal: trl, verl, " in capsys.readouterr().err


def test_an_inherited_method_is_the_class_s_own_while_it_is_patched(trainer):
    adapter, utils, uses = trainer
    utils.Child = type("Child", (utils.Trainer,), {"__module__": "madeup.utils"})
    adapter.seams = (Seam("madeup.utils:Child.loss", f"{__name__}:our_loss", "another loss"),)
    with adapter.patch():
        assert utils.Child().loss() == "ours" and utils.Trainer().loss() == "theirs"
    assert utils.Child().loss() == "theirs" and "loss" not in vars(utils.Child)


def test_a_seam_whose_module_needs_what_is_not_there_is_left_out(trainer):
    adapter, utils, uses = trainer
    adapter.seams += (Seam("madeup.lost:f", f"{__name__}:ours", "", needs="fastalign_no_such_package"),)
    with adapter.patch() as report:
        assert utils.f is ours
        assert "madeup.lost.f is left as it is: fastalign_no_such_package is not installed" in str(report)
    assert utils.f is theirs
