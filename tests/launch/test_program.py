"""Where programs keep what they compile."""

import jax
import pytest

from launch import program
from tests.launch import process

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def kept_options(monkeypatch):
    """JAX's options are as they were afterwards; the environment names no folder."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield before
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program.keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxmed" / "compiled")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert list((tmp_path / "jaxmed" / "compiled").iterdir()) == []  # nothing is left of the try
    assert capsys.readouterr().err == ""


def test_the_folder_can_be_named_and_turned_off(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/from/the/environment")
    program.keep_compiled(str(tmp_path / "own"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    program.keep_compiled("")
    assert jax.config.jax_compilation_cache_dir is None


def test_the_environment_has_its_way(kept_options, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/from/the/environment")
    program.keep_compiled(None)
    assert {name: getattr(jax.config, name) for name in OPTIONS} == kept_options
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told_and_not_used(kept_options, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    program.keep_compiled(str(tmp_path / "file" / "cache"))
    assert {name: getattr(jax.config, name) for name in OPTIONS} == kept_options
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"Compiled programs are not kept: {tmp_path / 'file' / 'cache'} cannot")


KEEPS = """
import sys
import jax
from launch import program

jax.monitoring.register_event_listener(lambda name, **_: print(name))
program.keep_compiled(sys.argv[1])
print(jax.jit(lambda x: 3 * x)(2.0))
jax.clear_caches()
print(jax.jit(lambda x: 3 * x)(2.0))
"""


def test_small_programs_are_kept_too_and_found_again(tmp_path):
    done = process.run_python("-c", KEEPS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("6.0\n")[:2]
    assert "cache_hits" in second and "cache_hits" not in first
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("certify", []),
        ("clamp", ["--model=gone", "--prompts=gone"]),
        ("convert", ["--model=gone"]),
        ("demo", []),
        ("judge", ["--judge=gone", "--responses=gone"]),
        ("respond", ["--model=gone", "--prompts=gone"]),
    ],
)
def test_programs_that_write_to_no_bucket_say_so_before_anything_is_loaded(
    name, flags, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    failed = process.call(name, *flags, "--out=gs://bucket/out")
    assert failed.returncode == 1 and list(tmp_path.iterdir()) == []
    assert failed.stderr.splitlines()[-1] == (
        "Error: --out=gs://bucket/out: must be a local path, and no bucket"
    )


def test_the_mesh_of_chips_that_are_compiled_for_is_not_that_of_this_machine():
    told = process.call("benchmark", "--compile_for=v5e:2x4", "--mesh=4")
    assert told.returncode == 1 and "--mesh=4: must be two numbers" in told.stderr
    assert "Runs on " in told.stderr and ", mesh " not in told.stderr
