"""Units of work: who does them in which order, what becomes of those that fail, and SIGTERM."""

import os
import signal

import jax
import numpy as np
import pytest

from jaxmed.question.effects import Sizes, Status
from jaxmed.runs import sweep
from jaxmed.runs.processes import Process
from jaxmed.runs.sweep import Shared
from jaxmed.store.results import Results
from models.errors import InputError

UNITS = range(8)
RUN = {"metric": "logit_diff", "positions": "last", "precision": "float32"}
ALONE = Process()
FAULT = ValueError("first line\nsecond")
OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")


@pytest.fixture
def results(tmp_path):
    """A folder with eight units: a layer's effect of as many pairs."""
    sizes = Sizes(layers=1, heads=1, neurons=1, positions=1)
    return Results.create(tmp_path / "out", RUN, sizes, list(map(str, UNITS)), ["layer"])


def write(results, unit, status=Status.EXACT):
    results.write(unit, "layer", [float(unit)], [float(unit)], status)


def shared(results, process=ALONE, **options):
    def lacking(units):
        missing = set(results.missing("layer"))
        return [unit for unit in units if unit in missing]

    options |= {"name": "unit-{}".format, "lacking": lacking}
    return Shared(results, process, fail=lambda unit: fail(results, unit), **options)


def fail(results, unit):
    results.write(unit, "layer", [np.nan], [np.nan], Status.FAILED)


def run(results, compute=lambda unit, advance: unit, of=None, **options):
    """Does what is left, and says what was committed."""
    done = []

    def commit(unit, found):
        write(results, unit)
        done.append(found)

    options = {"name": "test", "shared": of or shared(results), "progress": False} | options
    sweep.run(UNITS, compute, commit, **options)
    return done


# Who does what.


def test_own_units_come_first_then_those_of_others_from_the_far_end(results):
    assert run(results, of=shared(results, Process(1, 3))) == [1, 4, 7, 6, 5, 3, 2, 0]
    assert run(results, of=shared(results, Process(0, 3))) == []


def test_what_is_done_or_begun_elsewhere_is_left_to_others_until_the_last(results):
    write(results, 3)
    for unit in (1, 5):
        results.begin(f"unit-{unit}", 0)
    turns = shared(results, Process(1, 2)).turns(UNITS)
    assert next(turns) == 7
    write(results, 7)
    write(results, 5)  # by process 0, which also begins
    results.begin("unit-4", 0)
    rest = []
    for unit in turns:
        rest.append(unit)
        write(results, unit)
    assert rest == [6, 2, 0, 1, 4]
    by = results.begun()
    assert [by[f"unit-{unit}"] for unit in (1, 5, 4, 7, 6, 2, 0)] == [0, 0, 0, 1, 1, 1, 1]


def test_what_a_process_was_at_when_it_was_stopped_it_begins_again(results):
    results.begin("unit-3", 1)
    results.begin("unit-5", 2)
    assert run(results, of=shared(results, Process(1, 2))) == [1, 3, 7, 6, 4, 2, 0, 5]


def test_several_at_once_do_no_more_twice_than_there_are_others(results):
    """Three take turns, each a unit at a time; none knows what the others are at but by marks."""
    taken = [shared(results, Process(index, 3)).turns(UNITS) for index in range(3)]
    at, done = [next(turns) for turns in taken], []
    while any(unit is not None for unit in at):
        for index, unit in enumerate(at):
            if unit is not None:
                write(results, unit)
                done.append(unit)
                at[index] = next(taken[index], None)
    assert set(done) == set(UNITS)
    assert sum(done.count(unit) > 1 for unit in UNITS) <= 2


# What fails.


def failing(times, error=FAULT):
    """Computes, but fails so often on each unit that is named."""
    left = dict(times)

    def compute(unit, advance):
        advance(0.5)
        if left.get(unit, 0):
            left[unit] -= 1
            raise error
        advance(0.5)
        return unit

    return compute


def test_a_unit_that_fails_once_is_tried_once_more(results, capsys):
    assert run(results, failing({2: 1}), progress=True) == list(UNITS)
    assert "unit-2 failed (ValueError: first line): tried once more" in capsys.readouterr().err
    sweep.check_failed(results)


def test_a_unit_that_fails_twice_has_no_effects_until_failed_ones_are_tried_again(results, capsys):
    done = run(results, failing({2: 2, 5: 2}), progress=True)
    assert done == [0, 1, 3, 4, 6, 7]
    assert "unit-2 failed again (ValueError: first line)" in capsys.readouterr().err
    assert results.done("layer")[[2, 5, 6], 0].tolist() == [3, 3, 1]
    with pytest.raises(sweep.UnitsFailedError, match="no effects: unit-2, unit-5; --retry_failed"):
        sweep.check_failed(results)
    assert run(results) == []
    again = shared(results, retry_failed=True)
    assert again.retries and run(results, failing({2: 2}), of=again) == [5]
    with pytest.raises(sweep.UnitsFailedError, match="no effects: unit-2; --retry"):
        sweep.check_failed(results)
    assert run(results, of=shared(results, retry_failed=True)) == [2]
    sweep.check_failed(results)
    assert not shared(results, retry_failed=True).retries


def test_what_another_process_has_tried_again_is_not_tried_again(results):
    run(results, failing({2: 2, 5: 2}))
    first, second = (shared(results, Process(n, 2), retry_failed=True) for n in range(2))
    assert run(results, failing({2: 2}), of=first) == [5]
    assert run(results, of=second) == []  # 2 has failed again since, 5 is done


def test_a_unit_that_another_process_has_done_is_not_given_up(results):
    of = shared(results, Process(1, 2))

    def compute(unit, advance):
        write(results, unit)  # by the other
        raise ValueError

    sweep.run([0], compute, lambda *_: None, name="test", shared=of, progress=False)
    assert results.done("layer")[0, 0] == Status.EXACT
    sweep.check_failed(results)


def test_a_unit_that_another_process_has_done_is_not_committed_again(results):
    def compute(unit, advance):
        if unit == 4:
            write(results, unit)  # by the other
        return unit

    assert run(results, compute, of=shared(results, Process(0, 2))) == [0, 2, 6, 7, 5, 3, 1]


def test_a_unit_that_another_process_has_given_up_is_committed(results):
    other = shared(results, Process(1, 2))

    def compute(unit, advance):
        if unit == 4:
            assert other.give_up(unit, FAULT)
        return unit

    assert run(results, compute, of=shared(results, Process(0, 2))) == [0, 2, 4, 6, 7, 5, 3, 1]
    assert results.done("layer")[4, 0] == Status.EXACT
    sweep.check_failed(results)


def test_units_that_fail_one_after_the_other_stop_the_process(results):
    with pytest.raises(RuntimeError, match="4 units .* with ValueError: first line. All that"):
        run(results, failing(dict.fromkeys(range(2, 8), 2)))
    assert results.missing("layer") == [6, 7]


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError()])
def test_memory_that_does_not_suffice_halves_batches_as_often_as_it_can(error, results, capsys):
    tried = []

    def compute(unit, advance):
        tried.append(unit)
        if unit in (3, 3.0, 1.5):
            raise error
        return unit

    halves = {3: 1.5, 1.5: 0.75}
    of = shared(results, smaller=halves.get)
    assert run(results, compute, of=of, progress=True) == [0, 1, 2, 0.75, 4, 5, 6, 7]
    assert tried == [0, 1, 2, 3, 1.5, 0.75, 4, 5, 6, 7]
    assert (
        capsys.readouterr().err.count("unit-3: out of memory; tried again in batches of half") == 2
    )
    sweep.check_failed(results)


def test_memory_that_never_suffices_is_a_failure_like_others(results):
    of = shared(results, smaller={3: 1.5}.get)
    done = run(results, failing({3: 9, 1.5: 9}, MemoryError()), of=of)
    assert done == [0, 1, 2, 4, 5, 6, 7]
    with pytest.raises(sweep.UnitsFailedError, match="unit-3"):
        sweep.check_failed(results)


def test_other_runtime_errors_halve_nothing(results):
    of = shared(results, smaller={3: 1.5}.get)
    error = jax.errors.JaxRuntimeError("INTERNAL: no more")
    assert 1.5 not in run(results, failing({3: 2}, error), of=of)


def test_what_the_store_or_the_input_does_not_allow_ends_the_run(results):
    with pytest.raises(InputError):
        run(results, failing({2: 1}, InputError("disk full")))
    assert results.missing("layer") == list(range(2, 8))
    sweep.check_failed(results)


def test_without_a_store_what_fails_is_raised(results):
    with pytest.raises(ValueError, match="first line"):
        run(results, failing({2: 1}), shared=None)


def test_a_bar_goes_back_by_what_a_failed_attempt_had_told(results, monkeypatch):
    bars = []

    class Bar(sweep._Bar):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(sweep, "_Bar", Bar)
    of = shared(results, Process(0, 2))
    run(results, failing({4: 1}), of=of, costs=dict.fromkeys(UNITS, 1.0), progress=True)
    # Its own four, and then those that the other left.
    assert bars[0].n == bars[0].total == 8


# SIGTERM.


def end(unit):
    """The system ends the program while this unit is computed."""

    def compute(each, advance):
        if each == unit:
            os.kill(os.getpid(), signal.SIGTERM)
        return each

    return compute


def test_sigterm_lets_the_unit_under_way_be_committed(results):
    before = signal.getsignal(signal.SIGTERM)
    with sweep.terminable():
        with pytest.raises(sweep.Terminated):
            run(results, end(3))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second ends at once
    assert results.missing("layer") == [4, 5, 6, 7]
    assert signal.getsignal(signal.SIGTERM) == before
    with sweep.terminable():
        assert run(results) == [4, 5, 6, 7]


def test_sigterm_between_units_ends_at_once(results):
    with sweep.terminable():
        run(results)
        with pytest.raises(sweep.Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
