"""What a profiler's trace says of kernels: traces written by hand as a GPU, a TPU and a CPU make
them, and one that is made here."""

import csv

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from jaxmed.validation import kernels
from models.errors import InputError

OPERATIONS = {
    ("jit_carry", "fusion_3"): "jit(carry)/while/body/attend/vmap(jit(multiplied))/dot_general",
    ("jit_carry", "loop_add_fusion"): "jit(carry)/while/body/closed_call/feed/add",
    ("jit_carry", "while_1"): "jit(carry)/while",
}
MS = 10**9  # of a trace's picoseconds


def plane(name, lines):
    """A plane of lines of events: name, start and length in ms, module and instruction."""
    names = sorted({event[0] for events in lines.values() for event in events})
    text = [f'planes {{ name: "{name}"']
    for number, called in enumerate(names, start=1):
        text.append(f'event_metadata {{ key: {number} value {{ id: {number} name: "{called}" }} }}')
    for number, called in enumerate(("hlo_module", "hlo_op"), start=1):
        text.append(f'stat_metadata {{ key: {number} value {{ id: {number} name: "{called}" }} }}')
    for number, (line, events) in enumerate(lines.items()):
        text.append(f'lines {{ id: {number} name: "{line}" timestamp_ns: 1000')
        for called, start, length, *stats in events:
            told = " ".join(
                f'stats {{ metadata_id: {place} str_value: "{value}" }}'
                for place, value in enumerate(stats, start=1)
                if value
            )
            text.append(
                f"events {{ metadata_id: {names.index(called) + 1} offset_ps: {start * MS} "
                f"duration_ps: {length * MS} {told} }}"
            )
        text.append("}")
    return "\n".join([*text, "}"])


def read(*planes):
    data = ProfileData.text_proto_to_serialized_xspace("\n".join(planes))
    return kernels.read("a run", ProfileData.from_serialized_xspace(data), OPERATIONS)


def told(profile):
    return [
        (k.program, k.scope, k.operation, k.name, k.calls, pytest.approx(1e3 * k.seconds))
        for k in profile.kernels
    ]


def test_a_gpu_has_its_kernels_on_streams_and_idles_between_them():
    streams = {
        "Stream #13(Compute)": [
            ("sm90_gemm", 0, 4, "jit_carry", "fusion.3"),
            ("sm90_gemm", 10, 4, "jit_carry", "fusion.3"),
            # A kernel of a CUDA graph is known by its own name alone.
            ("loop_add_fusion", 14, 2, "jit_carry", "call"),
        ],
        "Stream #20(MemcpyD2H)": [("MemcpyD2H", 3, 3)],
        "XLA Ops": [("fusion.3", 0, 100, "jit_carry", "fusion.3")],
    }
    host = {"python": [("waiting", 0, 500)], "tf_XLA": [("thunk", 0, 20, "jit_carry", "copy.1")]}
    found = read(plane("/host:CPU", host), plane("/device:GPU:0", streams))
    assert found.device == "/device:GPU:0"  # though the host computes longer
    assert told(found) == [
        ("carry", "attend/multiplied", "dot_general", "sm90_gemm", 2, 8),
        ("", "", "", "MemcpyD2H", 1, 3),
        ("carry", "feed", "add", "loop_add_fusion", 1, 2),
    ]
    assert found.seconds == pytest.approx(0.016)
    assert found.busy_seconds == pytest.approx(0.012)  # the copy overlaps for 1 ms
    assert found.idle == pytest.approx(0.25)
    (wait,) = found.waits
    assert (wait.what, wait.calls, wait.seconds) == ("carry", 1, pytest.approx(0.004))
    assert [share.what for share in found.scopes] == ["carry attend/multiplied", "", "carry feed"]
    assert found.kernel_seconds == pytest.approx(0.013)


def test_a_kernel_that_begins_before_another_ends_is_not_inside_of_it():
    """As on a GPU, which prepares the next while the last blocks of one are computed."""
    stream = {
        "Stream #13(Compute)": [
            ("sm90_gemm", 0, 4, "jit_carry", "fusion.3"),
            ("loop_add_fusion", 3, 4, "jit_carry", "call"),
            ("sm90_gemm", 6, 4, "jit_carry", "fusion.3"),
        ],
    }
    found = read(plane("/device:GPU:0", stream))
    assert told(found) == [
        ("carry", "attend/multiplied", "dot_general", "sm90_gemm", 2, 8),
        ("carry", "feed", "add", "loop_add_fusion", 1, 4),
    ]
    assert found.busy_seconds == pytest.approx(0.01)


def test_a_tpu_has_whole_instructions_inside_each_other():
    lines = {
        "XLA Modules": [("jit_carry", 0, 10)],
        "XLA Ops": [
            ("%while.1 = (f32[2]) while(...)", 0, 10, "jit_carry"),
            ("%fusion.3 = f32[2] fusion(...)", 2, 5, "jit_carry"),
            ("%fusion.3 = f32[2] fusion(...)", 7, 2, "jit_carry"),
        ],
    }
    assert told(read(plane("/device:TPU:0", lines))) == [
        ("carry", "attend/multiplied", "dot_general", "fusion.3", 2, 7),
        ("carry", "", "while", "while.1", 1, 3),
    ]


def test_a_cpu_has_operations_on_threads_whose_loops_wait():
    lines = {
        "python": [("scan_pair", 0, 100)],
        "tf_XLA/1": [
            ("while.1", 0, 50, "jit_carry", "while.1"),
            ("fusion.3", 1, 5, "jit_carry", "fusion.3"),
        ],
        "tf_XLA/2": [("fusion.3", 2, 6, "jit_carry", "fusion.3")],
    }
    found = read(plane("/host:metadata", {}), plane("/host:CPU", lines))
    assert told(found) == [("carry", "attend/multiplied", "dot_general", "fusion.3", 2, 11)]
    assert found.busy_seconds == pytest.approx(0.007)
    assert found.idle == 0


def test_a_trace_without_kernels_says_what_it_has():
    with pytest.raises(InputError, match="no kernels .* it has /host:CPU: python$"):
        read(plane("/host:CPU", {"python": [("scan_pair", 0, 100)]}))


def test_a_run_is_traced_and_its_table_written(tmp_path):
    @jax.jit
    def grow(x):
        with jax.named_scope("rows"):
            return jnp.sin(x) @ x

    x = jnp.ones((64, 64))
    grow(x).block_until_ready()

    def run():
        grow(x).block_until_ready()

    kernels.profiled("an earlier run", run, tmp_path)
    found = kernels.profiled("growing", run, tmp_path)
    assert {kernel.program for kernel in found.kernels} == {"grow"}
    assert any(kernel.scope == "rows" for kernel in found.kernels)
    assert 0 < found.busy_seconds <= found.seconds
    with open(tmp_path / "kernels.csv") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [k.name for k in found.kernels]
