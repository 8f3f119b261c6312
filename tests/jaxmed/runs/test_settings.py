"""A setting is one field: its help, range and default are written there and nowhere else."""

import dataclasses
import math

import pytest

from jaxmed.runs import settings as settings_lib
from jaxmed.runs.benchmark import BenchmarkSettings
from jaxmed.runs.certify import CertifySettings
from jaxmed.runs.clamp import ClampSettings
from jaxmed.runs.convert import ConvertSettings
from jaxmed.runs.demo import DemoSettings
from jaxmed.runs.judge import JudgeSettings
from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.report import ReportSettings
from jaxmed.runs.respond import RespondSettings
from jaxmed.runs.settings import like, setting
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Example:
    model: str = setting(help="A folder.")
    rounds: int = setting(help="How often.", default=5, least=1)
    share: float = setting(help="Of all.", default=0.5, above=0, most=1)
    gigabytes: float | None = setting(help="Memory.", default=None, least=0.25)
    side: str = setting(help="Which.", default="nie", choices=("nie", "tie"))
    sites: tuple[str, ...] = setting(help="Where.", default=(), choices=("mlp", "head"))
    steps: int = setting(help="Of the rounds.", default=1, least=1, needs="side=tie")
    draws: int = setting(help="Of the rounds.", default=1, needs="gigabytes")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 0}, "--rounds=0: must be a number, and at least 1"),
        ({"rounds": -math.inf}, "--rounds=-inf: must be a number, and at least 1"),
        ({"rounds": math.inf}, "--rounds=inf: must be a number, and at least 1"),
        ({"gigabytes": math.nan}, "--gigabytes=nan: must be a number, and at least 0.25"),
        ({"gigabytes": 0}, "--gigabytes=0: must be a number, and at least 0.25"),
        ({"share": 0.0}, "--share=0.0: must be above 0"),
        ({"share": math.nan}, "--share=nan: must be above 0"),
        ({"share": 1.5}, "--share=1.5: must be a number, and at most 1"),
        ({"side": "te"}, "--side=te: not one of nie, tie"),
        ({"sites": ("mlp", "wall", "gate")}, "--sites=gate,wall: not one of mlp, head"),
        ({"steps": 2}, "--steps needs --side=tie"),
        ({"draws": 2}, "--draws needs --gigabytes=K"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(changes, said):
    with pytest.raises(InputError) as caught:
        settings_lib.check(Example("m", **changes))
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rounds": 1, "share": 1, "gigabytes": 0.25},
        {"side": "tie", "steps": 2},
        {"gigabytes": 1.0, "draws": 2},
        {"sites": ("head", "mlp")},
    ],
)
def test_values_in_range_pass(changes):
    settings_lib.check(Example("m", **changes))


def test_a_setting_without_a_default_must_be_given():
    with pytest.raises(TypeError, match="model"):
        Example()


def test_a_setting_of_another_program_keeps_what_is_not_said_anew():
    @dataclasses.dataclass(frozen=True)
    class Other:
        model: str = like(Example, "model")
        rounds: int = like(Example, "rounds", default=7, least=3)

    model, rounds = dataclasses.fields(Other)
    assert model.default is dataclasses.MISSING
    assert settings_lib.about_field(model).help == "A folder."
    assert settings_lib.about_field(rounds) == settings_lib.Setting("How often.", least=3)
    assert Other("m").rounds == 7
    assert Example("m").rounds == 5
    with pytest.raises(InputError, match="--rounds=2: must be a number, and at least 3"):
        settings_lib.check(Other("m", rounds=2))


def test_a_setting_is_given_if_it_is_not_its_default():
    assert not settings_lib.given(Example("m", rounds=5), "rounds")
    assert settings_lib.given(Example("m", rounds=6), "rounds")


def test_types_of_settings():
    types = {
        field.name: settings_lib.value_type(Example, field.name)
        for field in dataclasses.fields(Example)
    }
    assert types == {
        "model": str,
        "rounds": int,
        "share": float,
        "gigabytes": float,
        "side": str,
        "sites": tuple,
        "steps": int,
        "draws": int,
    }


# Settings that name a file, folder, checkpoint or hub id, or NAME=PATH of one.
PATHS = {
    "adapter", "cache_dir", "directions", "export", "gguf", "json", "judge", "judge_template",
    "model", "organisms", "out", "pairs", "prompts", "responses", "results",
}  # fmt: skip
ALL = [
    BenchmarkSettings, CertifySettings, ClampSettings, ConvertSettings, DemoSettings, JudgeSettings,
    MediateSettings, ReportSettings, RespondSettings,
]  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_every_setting_that_is_a_path_is_known_to_be_one(kind):
    named = PATHS | ({"organism", "profile"} if kind is BenchmarkSettings else set())
    for field in dataclasses.fields(kind):
        assert settings_lib.about_field(field).path == (field.name in named), field.name


BUCKETS = {(MediateSettings, "out"), (ReportSettings, "results"), (ClampSettings, "results")}


@pytest.mark.parametrize("kind", ALL)
def test_a_path_is_local_unless_the_setting_says_that_it_may_be_in_a_bucket(kind):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    several = {name for name in fields if settings_lib.value_type(kind, name) is tuple}

    def given(name, path):
        return {name: (path,) if name in several else path}

    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    least = {name: value for each in needed for name, value in given(each, "x").items()}
    for name, field in fields.items():
        if not settings_lib.about_field(field).path:
            continue
        for path in ("gs://bucket/x", "s3://bucket/x", "a=https://host/x"):
            settings = kind(**least | given(name, path))
            if path.startswith("gs:") and (kind, name) in BUCKETS:
                settings_lib.check(settings)
                continue
            with pytest.raises(InputError) as error:
                settings_lib.check(settings)
            assert str(error.value).startswith(f"--{name}={path}: must be a local path, ")
