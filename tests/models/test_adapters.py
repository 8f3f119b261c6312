"""LoRA adapters are merged as their definition says, or refused with one message."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import models
from models import adapters, checkpoint
from models.checkpoint import Source
from models.errors import InputError
from models.products import numbers_on_host
from tests import tiny
from tests.lora import ALPHA, RANK, random_lora, stored, write
from tests.models.test_checkpoint import WEIGHTS, assert_equal, says

Q, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"
ALL = [name.format(layer) for layer in range(3) for name in (Q, UP)]


@pytest.fixture
def base(tmp_path):
    """A tiny checkpoint of three layers, whose embeddings are not tied."""
    tiny.save(tmp_path / "base")
    return tmp_path / "base"


def by_hand(folder, base, tensors, scale):
    """The checkpoint that the definition gives: W + scale B A, for Linear weights [out, in]."""
    changed = {name: np.array(value) for name, value in stored(base).items()}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")].astype("float64")
            added = scale(module) * (b @ tensors[name].astype("float64"))
            weight = changed[f"{module}.weight"]
            changed[f"{module}.weight"] = (weight + added).astype(weight.dtype)
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    safetensors.numpy.save_file(changed, folder / WEIGHTS, {"format": "pt"})
    return folder


def assert_near(a, b, within=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=within)


def merged(base, adapter, **options):
    return models.load(base, adapter=adapter, **options)[0]


# What is merged.

OPTIONS = {
    "plain": ({}, ALL, {}, lambda module: ALPHA / RANK),
    "stabilised": ({"use_rslora": True}, ALL, {}, lambda module: ALPHA / np.sqrt(RANK)),
    "regex": (
        {"target_modules": r".*\.(0|2)\..*up_proj"},
        [UP.format(0), UP.format(2)],
        {},
        lambda module: ALPHA / RANK,
    ),
    "all but some": (
        {"exclude_modules": ["1.mlp.up_proj"]},
        [module for module in ALL if module != UP.format(1)],
        {},
        lambda module: ALPHA / RANK,
    ),
    "layers": (
        {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
        ALL[2:],
        {},
        lambda module: ALPHA / RANK,
    ),
    "one layer": ({"layers_to_transform": 0}, ALL[:2], {}, lambda module: ALPHA / RANK),
    "patterns": (
        {
            "rank_pattern": {"q_proj": 3, r"layers\.1\..*": 1},
            "alpha_pattern": {"layers.2.mlp.up_proj": 5, "^model.layers.0.*q_proj": 7},
        },
        ALL,
        dict.fromkeys([Q.format(layer) for layer in range(3)], 3) | {UP.format(1): 1},
        lambda module: (
            {UP.format(2): 5, Q.format(0): 7}.get(module, ALPHA)
            / (3 if "q_proj" in module else 1 if ".1." in module else RANK)
        ),
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_weights_are_those_of_the_definition(case, base, tmp_path):
    options, modules, ranks, scale = OPTIONS[case]
    tensors = random_lora(base, modules, ranks)
    adapter = write(tmp_path / "adapter", tensors, **options)
    expected, _ = models.load(by_hand(tmp_path / "expected", base, tensors, scale))
    found = merged(base, adapter)
    assert_near(found, expected)
    plain, _ = models.load(base)
    moved = np.abs(np.asarray(found.blocks.mlp.up.kernel) - np.asarray(plain.blocks.mlp.up.kernel))
    assert moved.max() > 0.1


def test_every_linear_module(base, tmp_path):
    """But the unembedding, which peft leaves out too."""
    modules = [name.removesuffix(".weight") for name in stored(base) if "_proj" in name]
    tensors = random_lora(base, modules)
    adapter = write(tmp_path / "adapter", tensors, target_modules="all-linear")
    expected = by_hand(tmp_path / "expected", base, tensors, lambda module: ALPHA / RANK)
    assert_near(merged(base, adapter), models.load(expected)[0])


def test_whole_modules_and_embeddings(base, tmp_path):
    """Kept whole, and adapted by a LoRA of its own, whose B A is turned."""
    rng = np.random.default_rng(2)
    embedding, head = (stored(base)[n] for n in ("model.embed_tokens.weight", "lm_head.weight"))
    a, b = rng.normal(size=(RANK, len(embedding))), rng.normal(size=(embedding.shape[1], RANK))
    own_head = rng.normal(size=head.shape).astype("float32")
    prefix = "base_model.model."
    tensors = {
        f"{prefix}lm_head.weight": own_head,
        f"{prefix}model.embed_tokens.lora_embedding_A": a.astype("float32"),
        f"{prefix}model.embed_tokens.lora_embedding_B": b.astype("float32"),
        # peft keeps the embedding's own values too.
        f"{prefix}model.embed_tokens.base_layer.weight": embedding + 1,
    }
    adapter = write(
        tmp_path / "adapter",
        tensors,
        target_modules=["embed_tokens", "lm_head"],
        modules_to_save=["lm_head"],
    )
    found, plain = merged(base, adapter), models.load(base)[0]
    np.testing.assert_array_equal(found.unembedding[...], own_head)
    expected = embedding + 1 + ALPHA / RANK * (b @ a).T
    np.testing.assert_allclose(found.embedding[...], expected, rtol=0, atol=1e-5)
    assert_equal_blocks(found, plain)


def assert_equal_blocks(a, b):
    for x, y in zip(jax.tree.leaves(a.blocks), jax.tree.leaves(b.blocks), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("family", "module", "paths"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn", ("query", "key", "value")),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value", ("query", "key", "value")),
        ("phi3", "model.layers.1.self_attn.qkv_proj", ("query", "key", "value")),
    ],
)
def test_fused_modules(family, module, paths, tmp_path):
    """What is added is cut as the weight itself is: added to zeros, it is all there is."""
    tiny.save(tmp_path / "base", family)
    weights = stored(tmp_path / "base")
    shape = weights[f"{module}.weight"].shape
    inputs, outputs = shape if family == "gpt2" else shape[::-1]
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(RANK, inputs)), rng.normal(size=(outputs, RANK))
    a, b = a.astype("float32"), b.astype("float32")
    tensors = {
        f"base_model.model.{module}.lora_A.weight": a,
        f"base_model.model.{module}.lora_B.weight": b,
    }
    # peft goes by the kind of module, whatever fan_in_fan_out says.
    adapter = write(
        tmp_path / "adapter", tensors, target_modules=[module], fan_in_fan_out=family != "gpt2"
    )
    added = ALPHA / RANK * (b @ a)
    weights[f"{module}.weight"] = np.ascontiguousarray(added.T if family == "gpt2" else added)
    found, plain = merged(tmp_path / "base", adapter), models.load(tmp_path / "base")[0]
    safetensors.numpy.save_file(weights, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    alone, _ = models.load(tmp_path / "base")
    for path in paths:
        kernels = (getattr(d.blocks.attention, path).kernel[1] for d in (found, plain, alone))
        found_kernel, plain_kernel, alone_kernel = map(np.asarray, kernels)
        np.testing.assert_allclose(found_kernel, plain_kernel + alone_kernel, rtol=0, atol=1e-6)


@pytest.mark.parametrize("called", ["embed_out", "lm_head"])
def test_an_unembedding_of_two_names(called, tmp_path):
    """transformers 5 calls GPT-NeoX's as every other's; its checkpoints keep the old name."""
    tiny.save(tmp_path / "base", "gpt_neox")
    head = stored(tmp_path / "base")["embed_out.weight"]
    tensors = {
        f"base_model.model.{called}.lora_A.weight": np.ones((RANK, head.shape[1]), "float32"),
        f"base_model.model.{called}.lora_B.weight": np.ones((len(head), RANK), "float32"),
    }
    adapter = write(tmp_path / "adapter", tensors, target_modules=[called])
    found = merged(tmp_path / "base", adapter).unembedding[...]
    np.testing.assert_allclose(found, head + ALPHA, rtol=0, atol=1e-6)


def test_tensors_of_the_bare_model(tmp_path):
    """A checkpoint whose names lack the prefix that the adapter's have."""
    tiny.save(tmp_path / "base", "gpt2")
    module, file = "transformer.h.0.mlp.c_fc", tmp_path / "base" / WEIGHTS
    inputs, outputs = stored(tmp_path / "base")[f"{module}.weight"].shape
    tensors = {
        f"base_model.model.{module}.lora_A.weight": np.ones((RANK, inputs), "float32"),
        f"base_model.model.{module}.lora_B.weight": np.ones((outputs, RANK), "float32"),
    }
    adapter = write(tmp_path / "adapter", tensors, target_modules=["c_fc"], layers_to_transform=[0])
    whole = merged(tmp_path / "base", adapter)
    bare = {n.removeprefix("transformer."): t for n, t in stored(tmp_path / "base").items()}
    safetensors.numpy.save_file(bare, file, {"format": "pt"})
    assert_equal(merged(tmp_path / "base", adapter), whole)


def test_types(tmp_path):
    """The widest of what is stored, the adapter's tensors among it; sums are of float32."""
    tiny.save(tmp_path / "base", dtype="bfloat16")
    tensors = random_lora(tmp_path / "base", ALL)
    adapter = write(tmp_path / "adapter", tensors)
    wide = merged(tmp_path / "base", adapter)
    assert wide.config.dtype == "float32"
    narrow = write(tmp_path / "narrow", {n: t.astype(jnp.bfloat16) for n, t in tensors.items()})
    found = merged(tmp_path / "base", narrow)
    assert found.config.dtype == "bfloat16"
    up, expected = (numbers_on_host(of.blocks.mlp.up.kernel[...]) for of in (found, wide))
    np.testing.assert_allclose(up.astype("float32"), expected, rtol=0.01, atol=0.01)


def test_a_large_tensor_is_merged_in_pieces(base, tmp_path, monkeypatch):
    adapter = write(tmp_path / "adapter", random_lora(base, ALL))
    whole = merged(base, adapter)
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 300)
    assert_near(merged(base, adapter), whole)


# What is kept.


def test_converted_weights_are_of_one_adapter(base, tmp_path, monkeypatch):
    """Another adapter, or none, is another entry; the same one loads without the checkpoint."""
    cache_dir = tmp_path / "cache"
    tensors = random_lora(base, ALL)
    adapter, other = write(tmp_path / "a", tensors), write(tmp_path / "b", tensors, lora_alpha=1)
    source = Source.examine(base, adapter=adapter)
    expected = source.read()
    entry = source.write_cache(cache_dir)
    assert entry.about["adapter"] == str(adapter)
    for another in (Source.examine(base), Source.examine(base, adapter=other)):
        assert another.cached(cache_dir) is None
    monkeypatch.setattr(checkpoint._Stored, "read", None)
    assert_equal(merged(base, adapter, cache_dir=cache_dir), expected)


def test_the_hash_is_of_both_files(base, tmp_path):
    tensors = random_lora(base, ALL)
    written = [
        write(tmp_path / "a", tensors),
        write(tmp_path / "b", tensors, lora_alpha=1),
        write(tmp_path / "c", {name: -tensor for name, tensor in tensors.items()}),
    ]
    assert len({checkpoint.adapter_hash(folder) for folder in written}) == 3
    assert checkpoint.adapter_hash(write(tmp_path / "d", tensors)) == checkpoint.adapter_hash(
        written[0]
    )
    assert checkpoint.adapter_hash(None) is None


# What is refused.


def refused(base, adapter):
    with pytest.raises(InputError) as caught:
        models.load(base, adapter=adapter)
    return str(caught.value)


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora = True (DoRA)"),
    "other kinds": ({"peft_type": "IA3"}, "peft_type = 'IA3': only LoRA is merged"),
    "no kind": ({"peft_type": None}, "peft_type = None: only LoRA is merged"),
    "biases": ({"bias": "lora_only"}, "bias = 'lora_only': trained biases are not merged"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': it was trained on"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = "),
    "parameters": ({"target_parameters": ["experts.up"]}, "target_parameters = ['experts.up']"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices = [3]"),
    "unknown": ({"use_magic": 1}, "use_magic = 1 is no plain LoRA"),
    "no targets": ({"target_modules": None}, "target_modules = None: must name"),
    "other targets": ({"target_modules": ["w1"]}, "up_proj.lora_A.weight belongs to no module of"),
    "more targets": (
        {"target_modules": ["q_proj", "up_proj", "k_proj"]},
        "k_proj.lora_A.weight is",
    ),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, but"),
    "rank": ({"r": 4}, "has shape [2, 24], but the model and the rank in adapter_config.json ask"),
    "no rank": ({"r": 0}, "r = 0: a rank is a whole number above 0"),
    "alpha": ({"lora_alpha": "high"}, "lora_alpha = 'high': must be a number"),
    "a bad regex": ({"target_modules": "("}, "adapter_config.json: "),
    "a bad pattern": ({"rank_pattern": [1]}, "adapter_config.json: "),
    "a bad regex of a pattern": ({"alpha_pattern": {"(": 1}}, "adapter_config.json: "),
    "saved is a number": ({"modules_to_save": 1}, "adapter_config.json: "),
    "a bad exclusion": ({"exclude_modules": 5}, "adapter_config.json: "),
    "an endless alpha": ({"lora_alpha": float("inf")}, "lora_alpha = inf: must be a number"),
    "layers of a regex": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "layers_to_transform and a regex in target_modules exclude each other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_named(case, base, tmp_path):
    options, message = REFUSED[case]
    adapter = write(tmp_path / "adapter", random_lora(base, ALL), **options)
    says(refused(base, adapter), tmp_path / "adapter", message)


def test_tensors_that_are_no_lora_are_named(base, tmp_path):
    tensors = random_lora(base, ALL)
    vector = f"base_model.model.{Q.format(0)}.lora_magnitude_vector"
    adapter = write(tmp_path / "adapter", tensors | {vector: np.ones(32, "float32")})
    says(refused(base, adapter), vector, "neither A or B of a LoRA nor a weight")
    first = f"base_model.model.{Q.format(0)}.lora_A.weight"
    write(adapter, {name: tensor for name, tensor in tensors.items() if name != first})
    says(refused(base, adapter), first, "is missing", "incomplete")
    write(adapter, tensors | {first: np.full_like(tensors[first], np.nan)})
    says(refused(base, adapter), Q.format(0), "NaN or infinite", "once the LoRA of", adapter)


def test_a_tied_embedding(tmp_path):
    tiny.save(tmp_path / "base", tie_embeddings=True)
    rows, width = stored(tmp_path / "base")["model.embed_tokens.weight"].shape
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((RANK, rows), "float32"),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((width, RANK), "float32"),
    }
    adapter = write(tmp_path / "adapter", tensors, target_modules=["embed_tokens"])
    says(refused(tmp_path / "base", adapter), "ties to its unembedding", "both would change")


def test_files_that_are_not_there(base, tmp_path):
    says(refused(base, base), base, "has no adapter_config.json")
    adapter = write(tmp_path / "adapter", random_lora(base, ALL))
    (adapter / adapters.WEIGHTS).rename(adapter / "adapter_model.bin")
    says(refused(base, adapter), "has no adapter_model.safetensors", ".bin", "never read")
    (adapter / adapters.CONFIG).write_text("[1")
    (adapter / "adapter_model.bin").rename(adapter / adapters.WEIGHTS)
    says(refused(base, adapter), adapters.CONFIG, "not JSON")


def test_an_adapter_beside_weights_is_not_passed_over(base, caplog, tmp_path):
    write(base, random_lora(base, ALL))
    with caplog.at_level(logging.WARNING):
        message = refused(base, None)
    says(message, base, "beside the weights", f"--adapter={base}", "adapter=")
    other = write(tmp_path / "other", random_lora(base, ALL))
    says(refused(base, other), base, "beside the weights", f"--adapter={base}")
    with pytest.raises(InputError, match="beside the weights"):
        checkpoint.Source.examine(base)
    found = merged(base, base)
    (base / adapters.CONFIG).unlink()
    plain, _ = models.load(base)
    assert np.abs(found.blocks.mlp.up.kernel[...] - plain.blocks.mlp.up.kernel[...]).max() > 0.1


def test_an_adapter_is_no_model(base, tmp_path):
    adapter = write(tmp_path / "adapter", random_lora(base, ALL))
    for given in (None, adapter):
        message = refused(adapter, given)
        says(message, f"{adapter}: is an adapter", f"--model=someone/base --adapter={adapter}")
