"""Converted weights are the checkpoint's own, or are not used."""

import hashlib
import json
import logging
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

import models
from models import cache, checkpoint
from models.checkpoint import Source
from tests import tiny
from tests.models.test_checkpoint import assert_equal, refusal, rewrite, says

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def entry(folder, cache_dir):
    return Source.examine(folder).write_cache(cache_dir)


@pytest.fixture
def files_unread(monkeypatch):
    """The checkpoint's own weights cannot be read any more."""
    monkeypatch.setattr(checkpoint._Stored, "read", None)


def load(folder, cache_dir, **options):
    return models.load(folder, cache_dir=cache_dir, **options)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_round_trip(family, dtype, tmp_path, cache_dir, monkeypatch):
    decoder = tiny.save(tmp_path / "model", family, dtype=dtype)
    Source.examine(tmp_path / "model").write_cache(cache_dir)
    monkeypatch.setattr(checkpoint._Stored, "read", None)
    assert_equal(load(tmp_path / "model", cache_dir), decoder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_other_dtype(folder, cache_dir, dtype, request):
    read = load(folder, cache_dir, dtype=dtype)
    request.getfixturevalue("entry")
    request.getfixturevalue("files_unread")
    assert_equal(load(folder, cache_dir, dtype=dtype), read)


def test_float64(entry, folder, cache_dir, files_unread):
    with jax.enable_x64(True):
        wide = load(folder, cache_dir, dtype="float64")
        assert wide.embedding.dtype == jnp.float64
        np.testing.assert_array_equal(wide.embedding[...], tiny.decoder().embedding[...])


def test_overflow_of_another_dtype(folder, cache_dir, monkeypatch):
    rewrite(folder, **{UP: np.full((40, 24), 1e6, np.float32)})
    Source.examine(folder).write_cache(cache_dir)
    monkeypatch.setattr(checkpoint._Stored, "read", None)
    message = refusal(folder, cache_dir=cache_dir, dtype="float16")
    says(message, "up_proj.weight", "infinite values when converted to float16")


def test_it_is_an_orbax_checkpoint(entry):
    restored = ocp.PyTreeCheckpointer().restore(entry.folder / "arrays")
    _, parameters = checkpoint._parameters(tiny.decoder())
    assert restored.keys() == {".".join(path) for path in parameters}
    for path, parameter in parameters.items():
        np.testing.assert_array_equal(restored[".".join(path)], parameter[...])


def test_zeros_are_stored(cache_dir):
    """Zarr leaves out chunks of zeros unless told otherwise; here what is gone is damage."""
    zeros = {("zeros",): np.zeros((3, 5), "f4"), ("negative",): -np.zeros((3, 5), "f4")}
    entry = cache.write(cache_dir, "entry", zeros, {})
    for path, values in zeros.items():
        out = np.ones((3, 5), np.float32)
        entry.read_into(path, (slice(0, 3), slice(0, 5)), out)
        np.testing.assert_array_equal(np.signbit(out), np.signbit(values))
        assert not out.any()


def test_arrays_beyond_a_gigabyte(cache_dir):
    """Stacked parameters of large models; Orbax has a limit, which must grow with them."""
    size = 10**9 + 10**6
    entry = cache.write(cache_dir, "entry", {("large",): np.ones(size, np.int8)}, {})
    assert entry.size > size
    shutil.rmtree(cache_dir)


def test_mesh(entry, folder, cache_dir, files_unread):
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("sweep", "model"), axis_types=axes)
    decoder = load(folder, cache_dir, mesh=mesh)
    assert_equal(decoder, tiny.decoder())
    assert decoder.embedding.sharding.spec == P(None, "model")
    assert decoder.mesh is None  # of one device


def test_loading_writes_nothing(folder, cache_dir):
    load(folder, cache_dir)
    assert not cache_dir.exists()


def test_other_weights_are_another_entry(entry, folder, cache_dir):
    decoder = load(folder, cache_dir)
    rewrite(folder, **{UP: np.ones((40, 24), np.float32)})
    assert Source.examine(folder).cached(cache_dir) is None
    changed = load(folder, cache_dir)
    assert not np.array_equal(changed.blocks.mlp.up.kernel[...], decoder.blocks.mlp.up.kernel[...])


def test_weights_that_change_while_they_are_read_are_not_kept(folder, cache_dir, monkeypatch):
    source, read = Source.examine(folder), Source.read

    def read_and_change(self, mesh=None):
        decoder = read(self, mesh)
        name = source.rows[0].name
        rewrite(folder, **{name: np.zeros(source.rows[0].shape, np.float32)})
        return decoder

    monkeypatch.setattr(Source, "read", read_and_change)
    with pytest.raises(checkpoint.CheckpointError, match="changed while it was read"):
        source.write_cache(cache_dir)
    assert not list(cache_dir.glob("weights/*"))


def test_the_same_weights_elsewhere_are_the_same_entry(entry, folder, cache_dir, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert Source.examine(tmp_path / "copy").cached(cache_dir) == entry


def test_another_reading_of_the_same_weights_is_another_entry(tmp_path, cache_dir):
    """Four heads or two: the same tensors, cut otherwise."""
    tiny.save(tmp_path / "model", "gpt_neox")
    Source.examine(tmp_path / "model").write_cache(cache_dir)
    file = tmp_path / "model" / "config.json"
    attributes = json.loads(file.read_text())
    assert attributes["num_attention_heads"] == 4
    file.write_text(json.dumps(attributes | {"num_attention_heads": 2}))
    assert Source.examine(tmp_path / "model").cached(cache_dir) is None


def truncate(entry):
    file = max(entry.folder.rglob("c/*/*/*"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-8])


def lose_a_chunk(entry):
    next(file for file in entry.folder.rglob("c/*/*/*") if file.is_file()).unlink()


def change_a_chunk(entry):
    file = next(file for file in entry.folder.rglob("c/*/*/*") if file.is_file())
    file.write_bytes(bytes(file.stat().st_size))


def lose_the_manifest(entry):
    (entry.folder / "entry.json").unlink()


def break_the_manifest(entry):
    (entry.folder / "entry.json").write_text('{"files": {')


@pytest.mark.parametrize(
    "damage",
    [truncate, lose_a_chunk, change_a_chunk, lose_the_manifest, break_the_manifest],
)
def test_damaged(damage, entry, folder, cache_dir, caplog):
    """The checkpoint is read instead, and one message says why; converting replaces the entry."""
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert_equal(load(folder, cache_dir), tiny.decoder())
    (message,) = caplog.messages
    says(message, entry.folder, "the checkpoint itself is read", "python -m launch.convert --model")
    with pytest.raises(cache.DamagedEntryError):
        Source.examine(folder).cached(cache_dir)
    Source.examine(folder).write_cache(cache_dir)
    caplog.clear()
    assert_equal(load(folder, cache_dir), tiny.decoder())
    assert not caplog.messages
    assert [file.name for file in (cache_dir / "weights").iterdir()] == [entry.folder.name]


def test_damage_that_reading_finds(entry, folder, cache_dir, caplog):
    """A file that is as long and as old as it was, but not what it was."""
    file = next(entry.folder.rglob("blocks.mlp.up.kernel/zarr.json"))
    stat = file.stat()
    file.write_bytes(b"{" * stat.st_size)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_equal(load(folder, cache_dir), tiny.decoder())
    says(caplog.text, "blocks.mlp.up.kernel", "cannot be read")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_half_an_entry_is_none(error, folder, cache_dir, monkeypatch):
    whole = cache._write_arrays

    def stopped(*arguments):
        whole(*arguments)
        raise error

    monkeypatch.setattr(cache, "_write_arrays", stopped)
    with pytest.raises(type(error)):
        Source.examine(folder).write_cache(cache_dir)
    assert not list((cache_dir / "weights").iterdir())


def test_no_room(folder, cache_dir, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="GB are needed, 1e-08 GB are free"):
        Source.examine(folder).write_cache(cache_dir)
    assert not list((cache_dir / "weights").iterdir())


def test_two_at_once(folder, cache_dir, monkeypatch):
    """Who comes second finds the entry of who was first."""
    whole = cache._write_arrays
    first = []

    def overtaken(*arguments):
        whole(*arguments)
        if not first:
            monkeypatch.setattr(cache, "_write_arrays", whole)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: -1)
                first.append(Source.examine(folder).write_cache(cache_dir))

    monkeypatch.setattr(cache, "_write_arrays", overtaken)
    assert Source.examine(folder).write_cache(cache_dir) == first[0]
    assert [file.name for file in (cache_dir / "weights").iterdir()] == [first[0].folder.name]
    assert_equal(load(folder, cache_dir), tiny.decoder())


def test_what_a_killed_process_left_is_removed(folder, cache_dir):
    """But not what another process is writing, or another machine that shares the folder."""
    name = Source.examine(folder)._entry_name(cache_dir)
    prefix = cache._partial_prefix(cache_dir / "weights" / name)
    ended = subprocess.Popen(["true"])
    ended.wait()
    kept = [f"{prefix}{os.getppid()}", f".{name}.partial-elsewhere-{ended.pid}"]
    for unfinished in (*kept, f"{prefix}{ended.pid}"):
        (cache_dir / "weights" / unfinished).mkdir(parents=True)
    Source.examine(folder).write_cache(cache_dir)
    assert {file.name for file in (cache_dir / "weights").iterdir()} == {name, *kept}


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "jaxmed"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache.default_folder() == tmp_path / "home" / ".cache" / "jaxmed"


# Hashes.


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_REMEMBERED_FROM_BYTES", 1)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    return file


def digest(content):
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def hashed(weights, cache_dir):
    """The hash, and whether it was computed."""
    computed = []

    def compute():
        computed.append(True)
        return digest(weights.read_bytes())

    return cache.remembered_hash(cache_dir, [weights], compute), bool(computed)


def test_a_hash_is_remembered(weights, cache_dir):
    assert hashed(weights, cache_dir) == (digest(b"one"), True)
    assert hashed(weights, cache_dir) == (digest(b"one"), False)
    weights.write_bytes(b"two")
    assert hashed(weights, cache_dir) == (digest(b"two"), True)
    stat = weights.stat()
    weights.write_bytes(b"six")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashed(weights, cache_dir) == (digest(b"six"), True)


@pytest.mark.parametrize("torn", ["", "0" * 63])
def test_a_torn_note_is_not_believed(weights, cache_dir, torn):
    first = hashed(weights, cache_dir)
    (note,) = (cache_dir / "hashes").iterdir()
    note.write_text(torn)
    assert hashed(weights, cache_dir) == first
    assert hashed(weights, cache_dir) == (first[0], False)


def test_a_hash_of_what_changes_meanwhile_is_not_remembered(weights, cache_dir):
    def compute():
        weights.write_bytes(b"three")
        return "one"

    assert cache.remembered_hash(cache_dir, [weights], compute) == "one"
    assert hashed(weights, cache_dir) == (digest(b"three"), True)


def test_small_files_are_hashed_anew(weights, cache_dir, monkeypatch):
    monkeypatch.setattr(cache, "_REMEMBERED_FROM_BYTES", 4)
    hashed(weights, cache_dir)
    assert not cache_dir.exists()


def test_no_place_for_notes(weights, tmp_path):
    (tmp_path / "file").touch()
    assert hashed(weights, tmp_path / "file") == (digest(b"one"), True)
