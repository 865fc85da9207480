"""Dataclasses made of `setting(...)`: what their base refuses, and flags of every type."""

import argparse
import dataclasses

import pytest

from fastalign.train.config import add_arguments, from_arguments
from fastalign.train.errors import UserError
from fastalign.train.settings import POSITIVE, Settings, setting


@dataclasses.dataclass(frozen=True)
class Own(Settings):
    """A command's settings."""

    name: tuple[str, ...] = setting((), "names", metavar="NAME")
    count: int = setting(1, "how many", POSITIVE)
    kind: str = setting("a", "which", choices=("a", "b"))


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser, Own, ("name", "count", "kind"), {"all": ("name", "count", "kind")})
    return from_arguments(parser.parse_args(argv), Own)


def test_a_setting_of_several_texts_is_repeatable():
    assert parse() == Own() and Own().name == ()
    assert parse("--name", "x", "--name", "y", "--count", "3") == Own(name=["x", "y"], count=3)
    assert Own(name=["x"]).name == ("x",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"name": "x"}, "name must be a list of texts, got 'x'"), ({"name": ("x", 3)}, "name must be a list of texts, got 3"),
     ({"count": 0}, "--count is 0: it must be positive"), ({"count": True}, "count must be an integer, got True"),
     ({"kind": "c"}, "--kind is 'c'; legal: a, b")],
)  # fmt: skip
def test_wrong_settings(settings, said):
    with pytest.raises(UserError, match=f"^{said}"):
        Own(**settings)
