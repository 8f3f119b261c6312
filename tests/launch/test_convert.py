"""A checkpoint is converted once; bad input ends with one message and leaves nothing behind."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import models
from jaxmed.runs import convert
from models import checkpoint, gguf_files
from models.checkpoint import Source
from tests import lora, tiny, words
from tests.launch import process

# As the program, but for a Ctrl-C between its arrays' being written and its noting that they are.
STOPPED = """
import os, signal
from launch import convert
from models import cache

write = cache._write_arrays

def write_and_stop(*args):
    write(*args)
    os.kill(os.getpid(), signal.SIGINT)

# A job in the background is started with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
cache._write_arrays = write_and_stop
convert.main()
"""

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs torch: make parity"
)


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(
        tiny.decoder("gpt_neox", dtype="bfloat16"), tmp_path / "m", tokenizer=words.tokenizer()
    )
    return tmp_path / "m"


def command(folder, *flags):
    return [f"--model={folder}", f"--cache_dir={folder.parent / 'cache'}", *flags]


def run(folder, *flags):
    return process.run("convert", *command(folder, *flags))


def call(folder, *flags):
    """As `run`, but without a process of its own."""
    return process.call("convert", *command(folder, *flags))


def test_converts_and_exports(folder):
    cache_dir, out = folder.parent / "cache", folder.parent / "out"
    ran = run(folder, f"--out={out}", "--dtype=float32")
    assert ran.returncode == 0, ran.stderr
    entry = Source.examine(folder).cached(cache_dir)
    assert f"Converted: {entry.folder} (" in ran.stdout
    assert f"models.load(..., cache_dir='{cache_dir}')" in ran.stdout
    assert f"Exported: {out} (" in ran.stdout
    assert "orbax" not in ran.stderr
    decoder, tokenizer = models.load(out)
    np.testing.assert_array_equal(
        decoder.embedding[...], models.load(folder, dtype="float32")[0].embedding[...]
    )
    assert decoder.config.dtype == "float32"
    assert tokenizer("how to").input_ids == words.tokenizer()("how to").input_ids

    again = call(folder)
    assert again.returncode == 0
    assert f"Was converted before: {entry.folder} (" in again.stdout


def test_ignores_a_key_of_config_json(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trained_in": 0.5}))
    ran = call(folder)
    assert ran.returncode == 1 and "--ignore_config=trained_in" in ran.stderr
    ran = call(folder, "--ignore_config=trained_in", f"--out={folder.parent / 'out'}")
    assert ran.returncode == 0, ran.stderr
    assert models.load(folder.parent / "out")


def test_converts_a_damaged_entry_anew(folder):
    cache_dir = folder.parent / "cache"
    entry = Source.examine(folder).write_cache(cache_dir)
    (entry.folder / "entry.json").unlink()
    ran = call(folder)
    assert ran.returncode == 0
    assert "entry.json: cannot be read" in ran.stdout and "converted anew" in ran.stdout
    assert Source.examine(folder).cached(cache_dir) is not None


MODULE = "gpt_neox.layers.1.mlp.dense_h_to_4h"


@pytest.fixture
def adapter(folder):
    tensors = lora.random_lora(folder, [MODULE])
    options = {"target_modules": ["dense_h_to_4h"], "layers_to_transform": [1]}
    return lora.write(folder.parent / "adapter", tensors, **options)


def test_exports_with_an_adapter(folder, adapter):
    """Merged into what is kept, under a name of its own, and into what is written."""
    out = folder.parent / "out"
    ran = call(folder, f"--adapter={adapter}", f"--out={out}")
    assert ran.returncode == 0, ran.stderr
    assert "use it from now on" not in ran.stdout  # it is not where they look for it
    a, b = (
        lora.random_lora(folder, [MODULE])[f"base_model.model.{MODULE}.lora_{name}.weight"]
        for name in "AB"
    )
    base = lora.stored(folder)[f"{MODULE}.weight"].astype("float32")
    expected = base + lora.ALPHA / lora.RANK * (b @ a)
    np.testing.assert_allclose(lora.stored(out)[f"{MODULE}.weight"], expected, rtol=0, atol=1e-6)
    entries = [Source.examine(folder, adapter=given) for given in (None, adapter)]
    plain, merged = (source.cached(folder.parent / "cache") for source in entries)
    assert plain is None and merged is not None
    wrong = call(adapter)
    assert wrong.returncode == 1
    assert "is an adapter, without the model that it was trained on: give --model=" in wrong.stderr


@needs_torch
@pytest.mark.parity
def test_verify_with_an_adapter(folder, adapter):
    """Against peft's own merge."""
    pytest.importorskip("peft", reason="parity tests need peft: make parity")
    ran = call(folder, f"--adapter={adapter}", "--verify")
    assert ran.returncode == 0, ran.stderr
    assert "Verified: logits of a random prompt of 64 tokens differ from" in ran.stdout


@pytest.fixture
def gguf(folder, monkeypatch):
    """A file that stands for a GGUF file of the model in `folder`."""
    file = folder.parent / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_files, "check_installed", lambda: None)
    monkeypatch.setattr(
        gguf_files, "unpack", lambda file, made: shutil.copytree(folder, made, dirs_exist_ok=True)
    )
    return file


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("source", ["model", "gguf"])
def test_what_is_verified_is_the_export(
    source, spoiled, folder, gguf, adapter, tmp_path, monkeypatch
):
    """Against what it was made of, and not against itself. (Here all is computed by jaxmed.)"""

    def theirs(given, dtype, prompt):
        assert (given.adapter, dtype) == (adapter, "float32")
        return np.asarray(given.load(cache_dir=tmp_path / "none")(prompt)[0])

    save = checkpoint.save

    def save_spoiled(decoder, *args, **options):
        kernel = decoder.blocks.mlp.up.kernel
        kernel[...] = kernel[...] * 1.5
        save(decoder, *args, **options)

    monkeypatch.setattr(convert, "_transformers_logits", theirs)
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: name)
    if spoiled:
        monkeypatch.setattr(checkpoint, "save", save_spoiled)
    given = f"--gguf={gguf}" if source == "gguf" else f"--model={folder}"
    out, cache_dir = tmp_path / "out", tmp_path / "cache"
    flags = [given, f"--adapter={adapter}", f"--out={out}", f"--cache_dir={cache_dir}"]
    ran = process.call("convert", *flags, "--verify")
    if spoiled:
        assert ran.returncode == 1
        assert f"{out}: logits of a random prompt" in ran.stderr and "please" in ran.stderr.lower()
    else:
        assert ran.returncode == 0, ran.stderr
        assert "Verified: logits of a random prompt" in ran.stdout
    assert not list(tmp_path.glob(".out.gguf-*"))


@needs_torch
@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_verify_an_export_with_an_adapter(folder, gguf, adapter, dtype, tmp_path):
    """Of a type that rounds the sum too: transformers' is rounded alike."""
    pytest.importorskip("peft", reason="parity tests need peft: make parity")
    flags = [f"--gguf={gguf}", f"--adapter={adapter}", f"--out={tmp_path / 'out'}"]
    ran = process.call("convert", *flags, f"--dtype={dtype}", "--verify")
    assert ran.returncode == 0, ran.stderr
    assert "Verified: logits of a random prompt of 64 tokens differ from" in ran.stdout


@needs_torch
@pytest.mark.parity
def test_verify(folder):
    ran = call(folder, "--verify")
    assert ran.returncode == 0, ran.stderr
    assert "Verified: logits of a random prompt of 64 tokens differ from" in ran.stdout


@needs_torch
@pytest.mark.parity
def test_verify_notices(folder):
    """A model that is computed from other weights than transformers': the cache's were spoiled."""
    ran = call(folder)
    entry = Source.examine(folder).cached(folder.parent / "cache")
    chunk = next(f for f in entry.folder.rglob("embedding/c/*/*") if f.is_file())
    content = bytearray(chunk.read_bytes())
    content[1] ^= 64
    chunk.write_bytes(content)
    manifest = json.loads((entry.folder / "entry.json").read_text())
    name = chunk.relative_to(entry.folder).as_posix()
    manifest["files"][name] = [chunk.stat().st_size, chunk.stat().st_mtime_ns]
    (entry.folder / "entry.json").write_text(json.dumps(manifest))
    ran = call(folder, "--verify")
    assert ran.returncode == 1
    assert "differ from transformers' by at most" in ran.stderr
    assert "rounding rarely explains more than 1e-04" in ran.stderr


def test_nan_weights(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    safetensors.numpy.save_file(tensors, file)
    ran = call(folder)
    assert ran.returncode == 1
    assert ran.stderr.strip() == f"Error: {file}: {name} has NaN or infinite values"
    assert not list(folder.parent.glob("cache/weights/*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype=float32"], "--dtype is the type of what --out writes"),
        (["--cache_dir=/dev/null"], "/dev/null: cannot be written to"),
    ],
)
def test_bad_flags(folder, flags, message):
    ran = call(folder, *flags)
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1].startswith(f"Error: {message}")


def test_gguf_without_what_reads_it(tmp_path, monkeypatch):
    """One message that says what to install; with it, one for a file that is none."""
    file, out = tmp_path / "a.gguf", tmp_path / "out"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_files, "_NEEDED", ("no_such_package",))
    ran = process.call("convert", f"--gguf={file}", f"--out={out}")
    assert ran.returncode == 1
    assert ran.stderr.strip() == (
        "Error: GGUF files are read by transformers with torch and gguf; to install what is "
        "missing (no_such_package): pip install 'jaxmed[gguf]'"
    )
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --model or --gguf"),
        (["--model=a", "--gguf=b"], "give either --model or --gguf"),
        (["--gguf=b"], "--gguf needs --out"),
        (["--gguf=b", "--out=c"], "--gguf: b: no such file"),
    ],
)
def test_model_or_gguf(flags, message):
    ran = process.call("convert", *flags)
    assert ran.returncode == 1
    assert ran.stderr.strip().startswith(f"Error: {message}")


def test_stopped(folder):
    """Ctrl-C while it writes leaves nothing half-written."""
    stopped = process.run_python("-c", STOPPED, *command(folder))
    assert stopped.returncode == 130
    assert "the same command goes on." in stopped.stderr
    assert not list((folder.parent / "cache" / "weights").iterdir())
