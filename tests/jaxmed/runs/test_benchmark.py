"""What is measured in which precision, and what of it is written."""

import dataclasses
import json

import pytest

from jaxmed.runs import benchmark
from jaxmed.runs.benchmark import BenchmarkSettings
from jaxmed.validation import lists, numerical_error
from jaxmed.validation.benchmark import GenerationFigures
from jaxmed.validation.lists import ListFigures, ListSpeed


@dataclasses.dataclass
class Measured:
    """Stands for a function that measures: keeps what it was asked, gives figures of it."""

    figures: object
    asked: list = dataclasses.field(default_factory=list)

    def __call__(self, preset, **asked):
        self.asked.append({"preset": preset} | asked)
        return dataclasses.replace(self.figures, precision=asked["precision"])


@pytest.fixture
def told(tmp_path):
    """Runs a benchmark: what it said, and what stands in the file."""

    def run(**settings):
        said, file = [], tmp_path / "figures.json"
        benchmark.run(BenchmarkSettings(**settings, json=str(file)), said.append)
        return said, json.loads(file.read_text())

    return run


def test_many_rows_are_generated_in_each_precision_and_rivals_once(told, monkeypatch):
    nothing = GenerationFigures("small", "cpu", "float32", "", 1, 8, 1, 1, 1.0, 1.0, 0.0, 1)
    measure = Measured(nothing)
    monkeypatch.setattr(benchmark.benchmark, "measure_generation", measure)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)
    _, written = told(
        generate=True,
        rows=64,
        dtype="bfloat16",
        matmul_precision=("float32", "split3"),
        against=("transformers",),
        against_types=("tf32", "bfloat16"),
    )
    assert [each["precision"] for each in written] == ["float32", "split3"]
    first, second = measure.asked
    assert (first["batch"], first["dtype"], first["precision"]) == (64, "bfloat16", "float32")
    assert (first["against"], second["against"]) == (("transformers",), ())
    assert first["against_types"] == ("tf32", "bfloat16")
    told(generate=True)
    assert (measure.asked[2]["batch"], measure.asked[2]["precision"]) == (8, "auto")


def test_lists_are_measured_in_each_precision(told, monkeypatch):
    one = ListSpeed("layer", "last", 2.0, 1.0, 10.0, 12.0, 10.0)
    measure = Measured(ListFigures("small", "cpu", "float32", "", 1, 6, (one,), 1))
    monkeypatch.setattr(lists, "measure", measure)
    asked = {"lists": True, "layers": 2, "rounds": 3, "matmul_precision": ("split2", "bfloat16")}
    said, written = told(**asked)
    assert [each["precision"] for each in written] == ["split2", "bfloat16"]
    assert [(each["layers"], each["rounds"]) for each in measure.asked] == [(2, 3), (2, 3)]
    assert sum(line.startswith("layer ") for line in said) == 2


def test_errors_of_the_random_model_alone_need_no_training(told, monkeypatch):
    row = numerical_error.NumericalError("random", "differences", "float32", "NIE", 1e-7, 1e-8, 1.0)
    monkeypatch.setattr(numerical_error, "measure", lambda *args, runs: [row])
    _, written = told(accuracy=True, organism="")
    assert written == [dataclasses.asdict(row)]
