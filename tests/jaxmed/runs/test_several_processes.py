"""Processes that do one run together, in one folder or bucket: whatever becomes of them, the
effects are those of a run that nothing disturbed."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from jaxmed.engine import cost
from jaxmed.runs import mediate
from jaxmed.runs.mediate import MediateSettings
from jaxmed.store.results import Results
from tests import tiny
from tests.jaxmed.runs import sharing
from tests.launch import process

GRANULARITIES = ("layer", "module", "neuron")
SHAPE = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 12, "head_dim": 4}
PAIRS = [
    {
        "id": str(number),
        "prompt_ids": [1, 2, 3 + number, 4],
        "counterfactual_ids": [1, 9, 3 + number, 4],
        "harmful_ids": [7],
        "safe_ids": [10],
    }
    for number in range(6)
]
PLACE = {"TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"}  # of the tests' buckets
SECONDS = 0.05  # that a unit takes beside what it computes


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Settings of a run, whose folder is not there yet."""
    folder = tmp_path_factory.mktemp("together")
    tiny.save(folder / "model", **SHAPE)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    out = str(folder / "undisturbed")
    pairs = str(folder / "pairs.jsonl")
    return MediateSettings(str(folder / "model"), pairs, out, granularity=GRANULARITIES)


@pytest.fixture(scope="module")
def undisturbed(asked):
    """The run of a process that is alone; it has compiled what the others run."""
    return alone(asked)


def alone(asked, **changes):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sharing.SIZES.items():
            patch.setattr(cost, name, value)
        return mediate.run(dataclasses.replace(asked, **changes))


def arrays(found):
    """All measured values."""
    group = zarr.open_group(found.place.folder / "effects.zarr", mode="r")
    return {
        name: array[...]
        for name, array in group.members(None)
        if isinstance(array, zarr.Array) and array.dtype.kind in "fu"
    }


def assert_same(found, expected):
    """To the bit."""
    found, expected = arrays(found), arrays(expected)
    assert found.keys() == expected.keys() and len(found) == 12
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


class Started:
    """A process, and what it says."""

    def __init__(self, asked, out, log: pathlib.Path, number: int, count: int):
        flags = {"model": asked.model, "pairs": asked.pairs, "out": str(out)}
        flags |= {"granularity": ",".join(GRANULARITIES), "process": number, "processes": count}
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.jaxmed.runs.sharing", str(SECONDS)]
                + [f"--{name}={value}" for name, value in flags.items()],
                cwd=process.ROOT,
                env=process.ENVIRONMENT
                | {name: os.environ[name] for name in PLACE & {*os.environ}},
                stdout=file,
                stderr=file,
            )

    def units(self) -> list[str]:
        """Those that it says it has done."""
        return re.findall(r"Process \d: (\S+) \(", self.log.read_text())

    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """As the kernel does."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Its exit status."""
        return self._process.wait(timeout=120)


@contextlib.contextmanager
def started(asked, out, folder, count):
    """So many processes at once, in a folder of logs."""
    folder.mkdir(exist_ok=True)
    each = [Started(asked, out, folder / f"{n}.log", n, count) for n in range(count)]
    try:
        yield each
    finally:
        for one in each:
            one.kill()


def wait_for_units(processes, number):
    """Until so many units are done, or all processes have ended."""
    while sum(len(one.units()) for one in processes) < number:
        if not any(one.is_running() for one in processes):
            return
        time.sleep(0.01)


def test_three_processes_do_every_unit_and_few_twice(asked, undisturbed, tmp_path):
    with started(asked, tmp_path / "out", tmp_path / "logs", 3) as processes:
        statuses = [one.end() for one in processes]
    told = [one.log.read_text() for one in processes]
    assert statuses == [0, 0, 0], told
    done = collections.Counter(unit for one in processes for unit in one.units())
    begun = {path.name for path in (tmp_path / "out" / "sweep" / "begun").iterdir()}
    assert set(done) == begun and len(begun) == len(undisturbed.run["blocks"]) == 18
    assert sum(times > 1 for times in done.values()) <= 2
    assert all(one.units() for one in processes)
    assert [f"Nothing is left for process {n} of 3" in told[n] for n in range(3)] == [0, 1, 1]
    assert ["Results: " in text for text in told] == [True, False, False]
    found = alone(asked, out=str(tmp_path / "out"))
    assert found.run["finished"] is True and found.run["blocks"] == undisturbed.run["blocks"]
    assert_same(found, undisturbed)


def killed(asked, undisturbed, folder, seed, count, again):
    """Kills one of the processes at a random moment, and then all at another; the rest is done by
    other ones, of which there are `again`, with other memory."""
    moments = random.Random(seed)
    units = len(undisturbed.run["blocks"])
    out = folder / "out"
    with started(asked, out, folder / "killed", count) as processes:
        wait_for_units(processes, moments.randint(1, units // 2))
        time.sleep(moments.uniform(0, 2 * SECONDS))
        processes.pop(moments.randrange(count)).kill()
        wait_for_units(processes, moments.randint(1, units // 2))
        time.sleep(moments.uniform(0, 2 * SECONDS))
    if again > 1:
        with started(asked, out, folder / "again", again) as processes:
            assert [one.end() for one in processes] == [0] * again
    found = alone(asked, out=str(out), memory_gb=6.0)
    assert found.run["finished"] is True and not any(map(found.missing, GRANULARITIES))
    assert_same(found, undisturbed)


def test_what_killed_processes_have_left_others_do_to_the_same_bits(asked, undisturbed, tmp_path):
    killed(asked, undisturbed, tmp_path, seed=time.time_ns(), count=2, again=1)


@pytest.mark.parity
def test_two_processes_do_a_run_in_a_bucket_that_fails_in_between(
    asked, undisturbed, buckets, bucket, tmp_path
):
    moments, statuses = random.Random(0), (503, 429, -503)

    def trouble(method, name):
        return moments.choice(statuses) if moments.random() < 0.1 else 0

    out = f"{bucket}/out"
    with buckets.troubled(trouble), started(asked, out, tmp_path / "logs", 2) as processes:
        ended = [one.end() for one in processes]
    assert ended == [0, 0], [one.log.read_text() for one in processes]
    done = collections.Counter(unit for one in processes for unit in one.units())
    assert len(done) == 18 and sum(times > 1 for times in done.values()) <= 1
    found = alone(asked, out=out)
    assert found.run["finished"] is True
    found.copy(tmp_path / "copy")
    assert_same(Results.open(tmp_path / "copy"), undisturbed)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
def test_at_other_moments(seed, asked, undisturbed, tmp_path):
    killed(asked, undisturbed, tmp_path, seed, count=2 + seed % 2, again=1 + seed % 3)
