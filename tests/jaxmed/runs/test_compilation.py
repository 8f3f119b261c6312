"""What is counted of compilation, and how a progress bar tells it apart from the work."""

import io
import time

import jax
import pytest

from jaxmed.runs import compilation, sweep
from jaxmed.runs.compilation import Compilation


def test_a_program_is_counted_once_with_what_is_traced_inside_of_it():
    counted = compilation._Counted()
    counted.span("/jax/core/compile/jaxpr_trace_duration", 1.0, 1.5)
    counted.span("/jax/core/compile/jaxpr_trace_duration", 1.6, 1.7)
    counted.span("/jax/core/compile/jaxpr_trace_duration", 0.5, 2.0)  # holds both
    counted.span("/jax/core/compile/jaxpr_to_mlir_module_duration", 2.0, 2.25)
    counted.span("/jax/something_else", 0.0, 100.0)
    counted.span("/jax/core/compile/backend_compile_duration", 3.0, 5.0)
    assert counted.ready == 1
    assert counted.seconds == pytest.approx(1.5 + 0.25 + 2.0)


def test_jax_tells_of_what_it_compiles():
    before = compilation.so_far()
    jax.jit(lambda x: x + 17)(1.0)
    found = compilation.so_far().since(before)
    assert found.programs + found.cached == 1
    assert 0 < found.seconds < 60


def test_what_is_told():
    assert Compilation().told == ""
    assert Compilation(3, 20, 12.3).told == (
        "Compilation took 12 seconds: 3 programs were compiled, 20 came from the cache"
    )


def test_a_unit_is_told_with_its_seconds_beside_compilation(monkeypatch):
    now, compiled = [0.0], [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(compilation, "so_far", lambda: Compilation(seconds=compiled[0]))

    def compute(unit, advance):
        now[0] += 10 + unit
        compiled[0] += 8

    done = []
    sweep.run(
        [1, 2],
        compute,
        lambda unit, found: None,
        name="unit",
        on_done=lambda *told: done.append(told),
        progress=False,
    )
    assert done == [(1, 3.0), (2, 4.0)]


def test_the_time_to_go_is_by_the_work_and_not_by_compilation(monkeypatch):
    """Half of the work took 10 s, the compilation before it 90."""
    taken = iter([Compilation(), *[Compilation(seconds=90.0)] * 9])
    monkeypatch.setattr(compilation, "so_far", lambda: next(taken))
    shown = io.StringIO()
    bar = sweep._Bar(total=8, desc="pair 1/2", bar_format=sweep._BAR, file=shown, ncols=100)
    bar.start_t = time.time() - 100
    bar.update(4)
    bar.refresh()
    bar.close()
    assert "01:40 gone, 01:30 of it compiling, 00:10 to go" in shown.getvalue()
