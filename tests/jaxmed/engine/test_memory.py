"""The budget: what is asked, less what is taken."""

import types

import jax
import psutil
import pytest

from jaxmed.engine import memory
from models.errors import InputError

GIB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A CPU with 10 GiB free, of which this process has taken 2, and no container."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10 * GIB))
    taken = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(rss=2 * GIB))
    monkeypatch.setattr(psutil, "Process", lambda: taken)
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    return tmp_path


def test_most_of_what_is_free_by_default(machine):
    assert memory.free() == 8 * GIB


def test_a_budget_counts_what_is_taken_already(machine):
    assert memory.free(3.25) == 1 * GIB
    assert memory.free(100.0) == 10 * GIB
    with pytest.raises(
        InputError, match=r"memory_gb=1.5 \(--memory_gb\): model and program take 2.25 GiB"
    ):
        memory.free(1.5)


# Control groups.

V1, V2 = "cgroup cgroup rw,memory", "cgroup2 cgroup2 rw"


def process(root, *, cgroup, mounts):
    """What the kernel says of a process: its groups, and top, mount and kind of hierarchies."""
    folder = root / "proc/self"
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in cgroup))
    lines = [f"31 23 0:28 {top} {point} rw shared:9 - {kind}\n" for top, point, kind in mounts]
    (folder / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/a rw\n" + "".join(lines))


def group(folder, limit, used, cached=0, *, high="max", version=2):
    """A control group; sizes in GiB."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    values = [limit if isinstance(limit, str) else f"{int(limit * GIB)}", f"{int(used * GIB)}"]
    for name, value in zip(names, values, strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    if version == 2:
        (folder / "memory.high").write_text(f"{high}\n")
    prefix = "" if version == 2 else "total_"
    # Half of the pages were used of late; of v1 the keys without total_ are of the group alone.
    half = int(cached * GIB / 2)
    keys = {f"{prefix}inactive_file": half, f"{prefix}active_file": half, "shmem": 3 * GIB}
    own = {} if version == 2 else {"inactive_file": 9 * GIB}
    lines = [f"{key} {value}\n" for key, value in (own | keys).items()]
    (folder / "memory.stat").write_text("".join(lines))


def test_a_container_may_have_less_than_the_machine(machine):
    process(machine, cgroup=["0::/"], mounts=[("/", "/sys/fs/cgroup", V2)])
    group(machine / "sys/fs/cgroup", 6, 2)
    assert memory.free() == int(0.8 * 4 * GIB)
    group(machine / "sys/fs/cgroup", "max", 2)
    assert memory.free() == 8 * GIB


def test_pages_of_files_are_not_used_up(machine):
    """Reading a checkpoint fills the page cache up to the limit, and the kernel takes it back."""
    process(machine, cgroup=["0::/"], mounts=[("/", "/sys/fs/cgroup", V2)])
    group(machine / "sys/fs/cgroup", 6, 6, cached=4)
    assert memory.left_in_cgroups(machine) == 4 * GIB
    group(machine / "sys/fs/cgroup", 1, 2, cached=0.5)
    assert memory.left_in_cgroups(machine) == 0


def test_the_tightest_of_nested_groups(machine):
    process(machine, cgroup=["0::/a/b/c"], mounts=[("/", "/sys/fs/cgroup", V2)])
    (machine / "sys/fs/cgroup").mkdir(parents=True)  # The root of all has no limit.
    group(machine / "sys/fs/cgroup/a", 5, 4)
    group(machine / "sys/fs/cgroup/a/b", "max", 1)
    group(machine / "sys/fs/cgroup/a/b/c", 3, 1)
    assert memory.left_in_cgroups(machine) == 1 * GIB
    group(machine / "sys/fs/cgroup/a/b", "max", 1, high=str(int(1.5 * GIB)))
    assert memory.left_in_cgroups(machine) == 0.5 * GIB
    group(machine / "sys/fs/cgroup/d", 0, 0)  # Not of this process.
    assert memory.left_in_cgroups(machine) == 0.5 * GIB


def test_the_first_version(machine):
    """Its hierarchies have a mount each, and the other version may be mounted beside them."""
    process(
        machine,
        cgroup=["5:cpu,cpuacct:/a", "4:memory:/a/b", "0::/a"],
        mounts=[
            ("/", "/sys/fs/cgroup/cpu", "cgroup cgroup rw,cpu,cpuacct"),
            ("/", "/sys/fs/cgroup/memory", V1),
            ("/", "/sys/fs/cgroup/unified", V2),
        ],
    )
    (machine / "sys/fs/cgroup/unified/a").mkdir(parents=True)
    top = machine / "sys/fs/cgroup/memory"
    group(top, "9223372036854771712", 20, version=1)
    group(top / "a", 8, 7, cached=2, version=1)
    group(top / "a/b", 7, 1, version=1)
    assert memory.left_in_cgroups(machine) == 3 * GIB


@pytest.mark.parametrize(
    ("path", "top"),
    [("/docker/id", "/docker/id"), ("/docker/id", "/"), ("/../..", "/"), ("/kube/x", "/docker/id")],
)
def test_a_container_that_sees_its_own_group_alone(path, top, machine):
    process(machine, cgroup=[f"4:memory:{path}"], mounts=[(top, "/sys/fs/cgroup/memory", V1)])
    group(machine / "sys/fs/cgroup/memory", 3, 1, version=1)
    assert memory.left_in_cgroups(machine) == 2 * GIB


def test_a_machine_without_groups(machine):
    assert memory.left_in_cgroups(machine) is None
    process(machine, cgroup=["0::/"], mounts=[("/", "/sys/fs/cgroup", V2)])
    assert memory.left_in_cgroups(machine) is None


# Accelerators.


def accelerator(monkeypatch, stats):
    device = types.SimpleNamespace(
        memory_stats=lambda: stats, platform="gpu", device_kind="Some GPU"
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    return device


def test_an_accelerator_tells_its_own(machine, monkeypatch):
    accelerator(monkeypatch, {"bytes_in_use": 5 * GIB, "bytes_limit": 15 * GIB})
    assert memory.free() == 8 * GIB
    assert memory.free(6.0) == 1 * GIB


@pytest.mark.parametrize("stats", [None, {"bytes_in_use": 5 * GIB}])
def test_an_accelerator_that_does_not_tell(stats, machine, monkeypatch):
    """The host's memory says nothing of it: how much there is must be given."""
    device = accelerator(monkeypatch, stats)
    with pytest.raises(
        InputError,
        match=r"memory_gb \(--memory_gb\): the device, Some GPU, does not say .*; give all",
    ):
        memory.free()
    sizes = [(device, 4 * GIB), (device, GIB), (object(), 7 * GIB)]
    shards = [
        types.SimpleNamespace(device=on, data=types.SimpleNamespace(nbytes=size))
        for on, size in sizes
    ]
    array = types.SimpleNamespace(addressable_shards=shards)
    monkeypatch.setattr(jax, "live_arrays", lambda: [array])
    assert memory.free(6.0) == 1 * GIB
    assert memory.free(1000.0) == 995 * GIB
    with pytest.raises(InputError, match="take 5.00 GiB already, .* on top: give more"):
        memory.free(4.0)
