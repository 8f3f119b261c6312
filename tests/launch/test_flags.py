"""Flags are the fields of a program's settings, and no more."""

import dataclasses
import importlib

import pytest
from absl import app
from absl import flags as absl_flags
from absl.testing import flagsaver

from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.settings import about_field, like, setting
from launch import flags
from tests.launch import process

PROGRAMS = sorted(
    file.stem
    for file in (process.ROOT / "launch").glob("*.py")
    if file.stem not in ("__init__", "flags", "program")
)


def defined(define):
    """What a function returns, and the flags that it defines, which are forgotten again."""
    before = set(absl_flags.FLAGS)
    with flagsaver.flagsaver():
        returned = define()
        return returned, {
            name: absl_flags.FLAGS[name] for name in absl_flags.FLAGS if name not in before
        }


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_flags_of_a_program_are_the_fields_of_its_settings(name, monkeypatch):
    kind = getattr(importlib.import_module(f"jaxmed.runs.{name}"), f"{name.title()}Settings")
    monkeypatch.setattr(app, "run", lambda main: None)
    before = set(absl_flags.FLAGS)
    module = importlib.import_module(f"launch.{name}")
    assert set(absl_flags.FLAGS) == before  # an import defines none
    _, found = defined(module.main)
    assert found.pop("compilation_cache").default is None
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert set(found) == set(fields)
    for name, field in fields.items():
        about, flag = about_field(field), found[name]
        assert about.help and about.help in flag.help
        default = tuple(flag.default) if isinstance(flag.default, list) else flag.default
        required = field.default is dataclasses.MISSING
        assert default == (None if required else field.default)
        choices = getattr(flag.parser, "enum_values", [])
        assert tuple(choices) == (() if isinstance(default, tuple) else about.choices)
        bounds = [getattr(flag.parser, bound, None) for bound in ("lower_bound", "upper_bound")]
        assert bounds == [about.above if about.least is None else about.least, about.most]


@dataclasses.dataclass(frozen=True)
class Example:
    model: str = setting(help="A folder.")
    rounds: int = setting(help="How often.", default=5, least=1)
    share: float | None = setting(help="Of all.", default=None, above=0, most=1)
    side: str | None = setting(help="Which.", default=None, choices=("nie", "tie"))
    quick: bool = setting(help="Skip half.", default=False)
    sites: tuple[str, ...] = setting(help="Where.", default=("mlp",), commas=True)
    units: tuple[str, ...] = setting(help="Which; several times.", default=())


def parsed(*given, kind=Example, **defaults):
    """The settings that these flags give."""
    with flagsaver.flagsaver():
        settings = flags.of(kind, **defaults)
        absl_flags.FLAGS(["example", *given])
        return settings()


def test_a_field_is_all_that_a_newcomer_writes_for_a_flag():
    @dataclasses.dataclass(frozen=True)
    class WithAnother(Example):
        patience: int = setting(help="Rounds without news.", default=3, least=2)

    _, found = defined(lambda: flags.of(WithAnother))
    assert found["patience"].help.startswith("Rounds without news.")
    with flagsaver.flagsaver():
        settings = flags.of(WithAnother)
        absl_flags.FLAGS(["example", "--model=m", "--patience=4"])
        assert settings() == WithAnother("m", patience=4)


def test_flags_become_settings_of_the_fields_types():
    assert parsed("--model=m") == Example("m")
    assert parsed("--model=m", rounds=9) == Example("m", rounds=9)
    given = ("--model=m", "--rounds=2", "--share=0.5", "--side=tie", "--quick", "--sites=a,b")
    found = parsed(*given, "--units=x,y", "--units=z")
    assert found == Example("m", 2, 0.5, "tie", True, ("a", "b"), ("x,y", "z"))
    assert parsed("--model=m", "--sites=").sites == ()


@dataclasses.dataclass(frozen=True)
class Paths:
    folder: str = setting(help="A folder.", default="~", path=True)
    files: tuple[str, ...] = setting(help="NAME=FILE.", default=(), path=True)
    kept: str | None = setting(help="A folder.", default=None, path=True)
    text: str = setting(help="No path.", default="~/text")
    again: str = like(MediateSettings, "out", default="~/again")


def test_a_tilde_is_the_users_home_in_every_flag_that_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {
        "~/a.csv": "/home/me/a.csv",
        "harmful=~/b.csv": "harmful=/home/me/b.csv",
        "c:benign=~/d=e.csv": "c:benign=/home/me/d=e.csv",
        "/f~/~g/~": "/f~/~g/~",
        "h~/i": "h~/i",
        "=~no-such-user/j": "=~no-such-user/j",
    }
    found = parsed(*(f"--files={path}" for path in given), kind=Paths)
    assert found.files == tuple(given.values())
    assert (found.folder, found.kept, found.text) == ("/home/me", None, "~/text")
    assert found.again == "/home/me/again"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "--model must have a value"),
        (("--model=m", "--rounds=0"), "rounds"),
        (("--model=m", "--share=2"), "share"),
        (("--model=m", "--side=te"), "should be one of <nie|tie>"),
        (("--model=m", "--walls=2"), "Unknown command line flag 'walls'"),
    ],
)
def test_flags_out_of_range_are_refused_by_name(given, said):
    with pytest.raises(absl_flags.Error, match=said):
        parsed(*given)
