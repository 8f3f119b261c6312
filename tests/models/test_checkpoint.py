"""Checkpoints are read and written exactly, or refused with one message that names the fault."""

import json
import os
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

import models
from models import checkpoint
from models.config import Rotary
from models.errors import InputError
from models.products import numbers_on_host
from tests import lora, tiny, words

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def assert_equal(a, b):
    assert a.config == b.config
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def folder(tmp_path):
    """A small sound checkpoint, to be spoiled."""
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, **changes):
    """Changes tensors of a checkpoint (None removes one); dots are written as `__`."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in tensors.items() if value is not None}
    safetensors.numpy.save_file(kept, folder / WEIGHTS, {"format": "pt"})


def reconfigure(folder, **attributes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | attributes))


def refusal(folder, **options):
    """What `load` says of a checkpoint that it refuses."""
    with pytest.raises(checkpoint.CheckpointError) as caught:
        models.load(folder, **options)
    return str(caught.value)


def says(message, *parts):
    assert all(str(part) in message for part in parts), message


# Reading and writing.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_round_trip(family, dtype, tmp_path):
    decoder = tiny.save(tmp_path / "model", family, dtype=dtype)
    loaded, tokenizer = models.load(tmp_path / "model")
    assert tokenizer is None
    assert_equal(loaded, decoder)


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_embeddings": True},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"num_layers": 1, "num_kv_heads": 1},
    ],
)
def test_round_trip_of_other_shapes(fields, tmp_path):
    decoder = tiny.save(tmp_path / "model", **fields)
    assert_equal(models.load(tmp_path / "model")[0], decoder)


def test_round_trip_float64(tmp_path):
    with jax.enable_x64(True):
        decoder = tiny.save(tmp_path / "model", dtype="float64")
        assert_equal(models.load(tmp_path / "model")[0], decoder)
    says(refusal(tmp_path / "model"), "float64", "jax_enable_x64")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_other_dtype(folder, dtype):
    plain, _ = models.load(folder)
    converted, _ = models.load(folder, dtype=dtype)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(converted), strict=True):
        np.testing.assert_array_equal(x.astype(dtype), numbers_on_host(y))


def test_float64_of_a_bfloat16_checkpoint(tmp_path):
    """The definition of an effect in float64 takes the checkpoint's weights as they are."""
    decoder = tiny.save(tmp_path / "model", dtype="bfloat16")
    with jax.enable_x64(True):
        wide, _ = models.load(tmp_path / "model", dtype=jnp.float64)
        assert wide.config.dtype == "bfloat16"
        for x, y in zip(jax.tree.leaves(decoder), jax.tree.leaves(wide), strict=True):
            assert y.dtype == jnp.float64
            np.testing.assert_array_equal(numbers_on_host(x).astype(float), y)
        assert wide(jnp.arange(5))[0].dtype == jnp.float64


def test_stored_type_counts_and_not_that_of_config(folder):
    reconfigure(folder, dtype="bfloat16")
    assert models.load(folder)[0].config.dtype == "float32"


def test_mixed_types_give_the_widest(tmp_path):
    decoder = tiny.save(tmp_path / "model", dtype="bfloat16")
    rewrite(tmp_path / "model", model__norm__weight=np.full(24, 1 + 2**-20, np.float32))
    loaded, _ = models.load(tmp_path / "model")
    assert loaded.config.dtype == "float32"
    np.testing.assert_array_equal(loaded.final_norm.weight[...], 1 + 2**-20)
    np.testing.assert_array_equal(loaded.embedding[...], numbers_on_host(decoder.embedding[...]))


def test_sharded(tmp_path):
    decoder = tiny.decoder("qwen2")
    checkpoint.save(decoder, tmp_path / "model", max_shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert_equal(models.load(tmp_path / "model")[0], decoder)


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(
            tiny.decoder(), tmp_path / "model", tokenizer=words.tokenizer(), max_shard_bytes=20_000
        )
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert len([name for name in modes if name.endswith(".safetensors")]) > 1
    assert set(modes.values()) == {0o640}, modes


def test_save_refuses_a_folder_in_use(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(checkpoint.CheckpointError, match="is there already; remove it or choose"):
        tiny.save(folder, seed=1)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        tiny.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_save_refuses_what_the_family_cannot_express(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="a llama checkpoint cannot express"):
        tiny.save(tmp_path / "model", qkv_bias=True)


def test_tokenizer(tmp_path):
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>"
    )
    checkpoint.save(tiny.decoder(), tmp_path / "model", tokenizer=tokenizer)
    _, loaded = models.load(tmp_path / "model")
    assert loaded("b a b").input_ids == [3, 2, 3]
    attributes = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (attributes["bos_token_id"], attributes["eos_token_id"]) == (0, 1)


def with_tokens(folder, count, special=()):
    """A checkpoint of 61 tokens whose tokenizer has `count`, and special ones beyond."""
    words = {f"word{index}": index for index in range(count)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    model.add_special_tokens(list(special))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    checkpoint.save(tiny.decoder(), folder, tokenizer=tokenizer)
    return folder


def test_tokenizer_with_special_tokens_beyond_the_vocabulary(tmp_path):
    """As Gemma 3's for images."""
    _, tokenizer = models.load(with_tokens(tmp_path / "model", 61, special=["<image>"]))
    assert tokenizer.convert_tokens_to_ids("<image>") == 61


def test_tokenizer_of_another_model(tmp_path):
    message = refusal(with_tokens(tmp_path / "model", 63, special=["<image>"]))
    says(message, tmp_path / "model", "'word61' of id 61", "has 61 (2 such tokens)")


def test_an_adapters_tokenizer_is_named_where_it_does_not_fit(tmp_path):
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    tiny.save(folder)
    module = "model.layers.0.mlp.up_proj"
    options = {"target_modules": ["up_proj"], "layers_to_transform": [0]}
    lora.write(adapter, lora.random_lora(folder, [module]), **options)
    with_tokens(tmp_path / "other", 63, special=["<image>"])
    for file in (tmp_path / "other").glob("tokenizer*"):
        shutil.copy(file, adapter)
    message = refusal(folder, adapter=adapter)
    assert message.startswith(f"{adapter}: the tokenizer has a token 'word61' of id 61")


def test_tied_checkpoint_may_store_the_unembedding(tmp_path):
    decoder = tiny.save(tmp_path / "model", tie_embeddings=True)
    rewrite(tmp_path / "model", lm_head__weight=np.asarray(decoder.embedding[...]))
    assert_equal(models.load(tmp_path / "model")[0], decoder)


def test_rotary_buffers_are_ignored(folder):
    plain, _ = models.load(folder)
    buffer = np.ones(4, np.float64)
    rewrite(folder, model__layers__0__self_attn__rotary_emb__inv_freq=buffer)
    assert_equal(models.load(folder)[0], plain)


BARE = {"llama": "model.", "gpt2": "transformer.", "gpt_neox": "gpt_neox."}


@pytest.mark.parametrize("family", BARE)
def test_names_of_the_bare_model(family, tmp_path):
    """As in the published GPT-2: without the prefix of the model that a head was put on."""
    decoder = tiny.save(tmp_path / "model", family)
    tensors = safetensors.numpy.load_file(tmp_path / "model" / WEIGHTS)
    bare = {name.removeprefix(BARE[family]): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    safetensors.numpy.save_file(bare, tmp_path / "model" / WEIGHTS)
    loaded, _ = models.load(tmp_path / "model")
    assert_equal(loaded, decoder)
    checkpoint.save(loaded, tmp_path / "again")
    again = safetensors.numpy.load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == tensors.keys()


def test_buffers_of_another_type_are_ignored(tmp_path):
    """Old checkpoints of GPT-2 store the causal mask."""
    decoder = tiny.save(tmp_path / "model", "gpt2")
    mask = np.tril(np.ones((1, 1, 64, 64), np.uint8))
    rewrite(tmp_path / "model", transformer__h__0__attn__bias=mask)
    assert_equal(models.load(tmp_path / "model")[0], decoder)


@pytest.mark.parametrize("family", tiny.costly_families())
def test_export_is_bit_equal(family, tmp_path):
    """Every tensor, its name and its type, there and back again."""
    tiny.save(tmp_path / "model", family, dtype="bfloat16")
    decoder, _ = models.load(tmp_path / "model")
    checkpoint.save(decoder, tmp_path / "again")
    before, after = (
        safetensors.numpy.load_file(tmp_path / name / WEIGHTS) for name in ("model", "again")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name], tensor)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (
        tmp_path / "model" / WEIGHTS
    ).read_bytes()


def test_read_in_small_pieces(tmp_path, monkeypatch):
    """As large tensors are: in rows, each of them once."""
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 100)
    for family in tiny.FAMILIES:
        decoder = tiny.save(tmp_path / family, family)
        assert_equal(models.load(tmp_path / family)[0], decoder)
    decoder = tiny.save(tmp_path / "tied", tie_embeddings=True)
    rewrite(tmp_path / "tied", lm_head__weight=np.asarray(decoder.embedding[...]))
    assert_equal(models.load(tmp_path / "tied")[0], decoder)


def test_weights_hash(folder, tmp_path):
    tiny.save(tmp_path / "same")
    tiny.save(tmp_path / "other", seed=1)
    checkpoint.save(tiny.decoder(), tmp_path / "sharded", max_shard_bytes=20_000)
    hashes = [
        checkpoint.weights_hash(tmp_path / name) for name in ("model", "same", "other", "sharded")
    ]
    assert len(hashes[0]) == 64
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


# Folders and the Hub.


def test_missing_folder(tmp_path):
    says(refusal(tmp_path / "nowhere"), tmp_path / "nowhere", "no such folder")


def test_file_in_place_of_a_folder(folder):
    says(refusal(folder / WEIGHTS), WEIGHTS, "is a file; give the folder")


def test_hub_is_asked_for_no_code_and_no_pickle(folder, monkeypatch):
    published = [
        *("config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json"),
        *("chat_template.jinja", "tokenizer.model", "merges.txt", "vocab.txt"),
    ]
    refused = [
        *("modeling.py", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors"),
        *("original/params.json", "README.md", "model.onnx", "training_args.bin"),
    ]

    def download(repo_id, *, allow_patterns, ignore_patterns):
        assert repo_id == "someone/model"
        taken = huggingface_hub.utils.filter_repo_objects(
            published + refused, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(taken) == published
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.resolve("someone/model") == folder


def test_the_home_of_nobody_is_no_folder():
    with pytest.raises(checkpoint.CheckpointError, match=r"^~no-such-user/a/b: no such folder"):
        checkpoint.resolve("~no-such-user/a/b")


def test_what_the_hub_says_is_told_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise OSError("404 Client Error.\n\nRepository Not Found for url.\n  Is it private?")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(InputError) as error:
        checkpoint.resolve("someone/gone")
    assert str(error.value).endswith(
        "(404 Client Error. Repository Not Found for url. Is it private?)"
    )


def test_hub_cannot_be_reached(monkeypatch):
    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    says(refusal("someone/model"), "someone/model: no such folder", "no network")


# Files.


def test_no_config(folder):
    (folder / "config.json").unlink()
    says(refusal(folder), folder, "has no config.json")


def test_config_not_json(folder):
    (folder / "config.json").write_text('{"model_type": ')
    says(refusal(folder), folder / "config.json", "not JSON")


def test_remote_code(folder):
    reconfigure(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    says(refusal(folder), folder / "config.json", "auto_map asks for modeling.Model", "never run")


def test_remote_code_that_transformers_took_over(folder):
    """As Phi-3's config.json has it: transformers' own class of that name is meant."""
    reconfigure(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert_equal(models.load(folder)[0], tiny.decoder())


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, "),
        ({"model_type": "not_even_known"}, "model_type 'not_even_known' is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "is a mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised (gptq"),
        ({"logit_scale": 0.5}, "attribute logit_scale = 0.5 is not understood"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_config_refused(folder, attributes, message):
    reconfigure(folder, **attributes)
    says(refusal(folder), folder / "config.json", message)


def test_unknown_attribute_is_ignored_by_name(folder):
    reconfigure(folder, trained_in=0.5)
    says(refusal(folder), folder / "config.json", "trained_in", "ignore_config=('trained_in',)")
    loaded, _ = models.load(folder, ignore_config=["trained_in"])
    assert_equal(loaded, tiny.decoder())
    says(refusal(folder, ignore_config=["head_dim"]), "ignore_config: head_dim cannot be ignored")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    says(refusal(folder), folder, f"has neither {WEIGHTS} nor {INDEX}")


def test_pickle_only(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    says(message, "pytorch_model.bin", "never read", "save_pretrained(new_folder)")
    says(message, "Space safetensors/convert", "--revision refs/pr/NUMBER")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.gguf"], "has only model.gguf; python -m launch.convert --gguf=FILE"),
        (["model-00001-of-00002.safetensors"], f"but neither {WEIGHTS} nor {INDEX}, which says"),
        (["consolidated.safetensors", "x.pth"], "has consolidated.safetensors, but neither"),
        (["model.ckpt", "model.gguf"], "has only pickled weights (model.ckpt)"),
    ],
)
def test_what_there_is_in_place_of_weights(folder, names, message):
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    says(refusal(folder), folder, message)


def test_hub_repository_of_pickles(folder, monkeypatch):
    """They are not asked for, so that the folder does not show them."""
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    files = ["config.json", "pytorch_model-00001-of-00002.bin"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: files)
    message = refusal("someone/model")
    says(message, "someone/model: has only pickled weights (pytorch_model-00001", "never read")

    def fail(_):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    says(refusal("someone/model"), f"someone/model: has neither {WEIGHTS} nor {INDEX}")


@pytest.mark.parametrize("size", [0, 5, 200, 20_000, -1])
def test_truncated(folder, size):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])
    says(refusal(folder), folder / WEIGHTS, "truncated or corrupt", "download it again")


def test_not_safetensors(folder):
    (folder / WEIGHTS).write_bytes(b"<!doctype html>" * 1000)
    says(refusal(folder), folder / WEIGHTS, "truncated or corrupt")


def test_empty_file(folder):
    safetensors.numpy.save_file({}, folder / WEIGHTS)
    says(refusal(folder), folder / WEIGHTS, "holds no tensors")


@pytest.fixture
def sharded(tmp_path):
    checkpoint.save(tiny.decoder(), tmp_path / "model", max_shard_bytes=20_000)
    return tmp_path / "model"


@pytest.fixture
def sharded_elsewhere(tmp_path):
    checkpoint.save(tiny.decoder(), tmp_path / "elsewhere", max_shard_bytes=20_000)
    return tmp_path / "elsewhere"


def test_missing_shard(sharded):
    shard = min(sharded.glob("*.safetensors"))
    shard.unlink()
    says(refusal(sharded), sharded / INDEX, shard.name, "is missing")


def test_index_names_a_tensor_that_no_file_has(sharded):
    index = json.loads((sharded / INDEX).read_text())
    shard = min(index["weight_map"].values())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded)
    says(message, sharded / INDEX, "names model.layers.9.mlp.up_proj.weight", shard, "no file")


def test_mixed_up_shards(sharded):
    """Two files under each other's name."""
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.rename(sharded / "aside")
    second.rename(first)
    (sharded / "aside").rename(second)
    message = refusal(sharded)
    says(message, "lacks", first.name, second.name, "mixed up: download them again")


def test_shard_of_another_model(sharded, tmp_path):
    checkpoint.save(tiny.decoder(hidden_size=32), tmp_path / "other", max_shard_bytes=20_000)
    name = min(file.name for file in sharded.glob("*.safetensors"))
    other = min((tmp_path / "other").glob("*.safetensors"))
    (sharded / name).write_bytes(other.read_bytes())
    says(refusal(sharded), sharded, "download")


@pytest.mark.parametrize("with_index", [True, False])
def test_a_second_set_of_weights(sharded, with_index, tmp_path):
    """transformers reads the single file, which may be the one that is out of date."""
    tiny.save(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / WEIGHTS, sharded / WEIGHTS)
    if not with_index:
        (sharded / INDEX).unlink()
    shard = min(sharded.glob("model-*.safetensors")).name
    message = f"has two sets of weights, {WEIGHTS} and {shard} ("
    says(refusal(sharded), sharded, message, "out of date: remove it")
    with pytest.raises(checkpoint.CheckpointError, match="two sets of weights"):
        checkpoint.weights_hash(sharded)


def test_a_second_set_of_weights_under_other_names(sharded, tmp_path):
    index = json.loads((sharded / INDEX).read_text())
    for file in sharded.glob("model-*.safetensors"):
        file.rename(sharded / f"part-{file.name}")
    index["weight_map"] = {name: f"part-{file}" for name, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    assert_equal(models.load(sharded)[0], tiny.decoder())
    tiny.save(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / WEIGHTS, sharded / WEIGHTS)
    says(refusal(sharded), f"two sets of weights, {WEIGHTS} and part-model-00001")


def test_an_index_that_was_left_behind(folder, sharded_elsewhere, caplog):
    """Its files are gone: the single one is read, as transformers does, and this is told."""
    shutil.copy(sharded_elsewhere / INDEX, folder / INDEX)
    assert_equal(models.load(folder)[0], tiny.decoder())
    assert f"{folder / INDEX}: none of its files is there; {WEIGHTS} is read" in caplog.text


def test_an_index_of_one_file(folder, caplog):
    names = safetensors.numpy.load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    assert_equal(models.load(folder)[0], tiny.decoder())
    assert not caplog.records


UNEMBEDDINGS = {"llama": "lm_head.weight", "gpt2": "lm_head.weight", "gpt_neox": "embed_out.weight"}


@pytest.mark.parametrize("family", UNEMBEDDINGS)
def test_an_index_may_name_what_is_tied_and_what_is_no_weight(family, tmp_path):
    """safetensors writes a tensor that is shared only once."""
    folder, buffer = tmp_path / "model", "rotary_emb.inv_freq"
    decoder = tiny.decoder(family, tie_embeddings=True)
    checkpoint.save(decoder, folder, max_shard_bytes=20_000)
    index = json.loads((folder / INDEX).read_text())
    last = max(index["weight_map"].values())
    index["weight_map"][UNEMBEDDINGS[family]] = last
    if family != "gpt2":
        index["weight_map"][buffer] = last
    (folder / INDEX).write_text(json.dumps(index))
    assert_equal(models.load(folder)[0], decoder)


def test_an_index_that_names_an_unembedding_of_an_untied_model(sharded):
    """config.json may be what is wrong."""
    name = "lm_head.weight"
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][name]
    kept = safetensors.numpy.load_file(sharded / shard)
    del kept[name]
    kept |= {} if kept else {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    safetensors.numpy.save_file(kept, sharded / shard)
    message = refusal(sharded)
    says(message, sharded / INDEX, f"names {name} in {shard}, but no file holds it")
    says(message, "set tie_word_embeddings to true in config.json")


def test_index_leads_out_of_the_folder(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {UP: "../other.safetensors"}}))
    says(refusal(sharded), sharded / INDEX, "'../other.safetensors', which is not a file in its")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', "{"])
def test_bad_index(sharded, content):
    (sharded / INDEX).write_text(content)
    says(refusal(sharded), sharded / INDEX)


def test_tensor_in_two_shards(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(first) | safetensors.numpy.load_file(second)
    safetensors.numpy.save_file(tensors, second)
    says(refusal(sharded), second, first.name, "as well")


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    says(refusal(folder), folder, "the tokenizer cannot be read")


def test_tokenizer_model_without_what_reads_it(folder, monkeypatch):
    """transformers then asks for a package that would not help."""
    monkeypatch.setattr(checkpoint, "_OF_SENTENCEPIECE", ("json", "not_there", "nor_this.module"))
    (folder / "tokenizer.model").write_bytes(b"")
    message = refusal(folder)
    says(message, folder, "tokenizer.model alone, without tokenizer.json", "not_there and nor_this")
    says(message, "pip install 'jaxmed[sentencepiece]'")


def test_tokenizer_model_with_what_reads_it(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(f"{a}{b} {b}{c}a" for a in "abc" for b in "abc" for c in "abc"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=20,
        model_type="bpe",
        minloglevel=2,
    )
    folder = tmp_path / "model"
    tiny.save(folder)
    shutil.copy(tmp_path / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    _, tokenizer = models.load(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer("ab bca", add_special_tokens=False).input_ids == theirs.encode("ab bca")


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_tokenizer_without_vocabulary(folder, kind):
    """transformers makes one that has special tokens alone, which finds none in any text."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    message = "the tokenizer has special tokens alone: its vocabulary is not in tokenizer_config"
    says(refusal(folder), folder, message)


def test_vocabulary_without_merges(folder):
    (folder / "vocab.json").write_text('{"a": 0}')
    says(refusal(folder), folder, "has vocab.json without merges.txt")


# Tensors.


def test_missing_weight(folder):
    rewrite(folder, **{UP: None, "model.norm.weight": None})
    says(refusal(folder), folder, f"{UP} is missing (2 of 30 weights are)")


def test_untied_without_unembedding(folder):
    rewrite(folder, lm_head__weight=None)
    says(refusal(folder), folder, "lm_head.weight is missing", "set tie_word_embeddings to true")


def test_unexpected_weight(folder):
    name = "model.layers.1.self_attn.q_norm.weight"
    rewrite(folder, **{name: np.ones(8, np.float32)})
    says(refusal(folder), folder / WEIGHTS, f"{name} has no place in a llama model")


def test_tied_checkpoint_with_another_unembedding(tmp_path):
    decoder = tiny.save(tmp_path / "model", tie_embeddings=True)
    rewrite(tmp_path / "model", lm_head__weight=np.asarray(decoder.embedding[...]) + 1)
    message = refusal(tmp_path / "model")
    says(message, WEIGHTS, "lm_head.weight differs from model.embed_tokens.weight")
    says(message, "set tie_word_embeddings to false")


@pytest.mark.parametrize("shape", [(24, 40), (40, 23), (40, 24, 1)])
def test_wrong_shape(folder, shape):
    rewrite(folder, **{UP: np.ones(shape, np.float32)})
    says(refusal(folder), folder / WEIGHTS, f"{UP} has shape {list(shape)}", "asks for [40, 24]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_finite(value, dtype, tmp_path):
    tiny.save(tmp_path / "model", dtype=dtype)
    weights = np.ones((40, 24), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weights[3, 4] = value
    rewrite(tmp_path / "model", **{UP: weights})
    says(refusal(tmp_path / "model"), WEIGHTS, f"{UP} has NaN or infinite values")


def test_overflow_of_another_dtype(folder):
    rewrite(folder, **{UP: np.full((40, 24), 1e6, np.float32)})
    assert models.load(folder)
    says(refusal(folder, dtype="float16"), UP, "infinite values when converted to float16")


@pytest.mark.parametrize(("dtype", "name"), [(np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_quantised_tensor(folder, dtype, name):
    rewrite(folder, **{UP: np.ones((40, 24), dtype)})
    says(refusal(folder), folder / WEIGHTS, f"{UP} is stored as {name}", "dequantised first")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("model.layers.1.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.1.mlp.up_proj.g_idx", "GPTQ or AWQ"),
        (f"{UP}.absmax", "bitsandbytes"),
        (f"{UP}.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.1.mlp.up_proj.SCB", "bitsandbytes"),
        (f"{UP}_scale_inv", "FP8 or compressed-tensors"),
    ],
)
def test_quantised_checkpoint_that_does_not_say_so(folder, name, method):
    rewrite(folder, **{UP: np.ones((40, 24), np.int8), name: np.ones(3, np.float32)})
    message = refusal(folder)
    says(message, folder / WEIGHTS, f"quantised by {method}", "from before it was quantised")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exports_name_things_as_transformers_4_does_too(family, tmp_path):
    """It takes its classes' defaults for what it does not find by its own names."""
    made = tiny.save(tmp_path / "model", family)
    attributes = json.loads((tmp_path / "model" / "config.json").read_text())
    assert attributes["torch_dtype"] == attributes["dtype"] == "float32"
    rotary = made.config.rotary
    base = "rotary_emb_base" if family == "gpt_neox" else "rope_theta"
    assert attributes.get(base) == (rotary and rotary.theta)
    if family == "gemma3_text":
        assert attributes["rope_local_base_freq"] == made.config.window_rotary.theta
    if family == "gpt_neox":
        assert attributes["rotary_pct"] == rotary.fraction
    assert checkpoint.load(tmp_path / "model")[0].config == made.config


def test_exported_tokenizer_is_of_a_class_that_transformers_4_has(tmp_path):
    tokenizer = words.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[USER]", "[BOT]"]})
    checkpoint.save(tiny.decoder(), tmp_path / "model", tokenizer=tokenizer)
    attributes = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert attributes["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert attributes["additional_special_tokens"] == ["[USER]", "[BOT]"]
    assert "extra_special_tokens" not in attributes
    _, back = checkpoint.load(tmp_path / "model")
    assert back.all_special_tokens == tokenizer.all_special_tokens


def test_a_whole_head_rotated_in_gpt_neox_is_exported(tmp_path):
    """Its class's own fraction is another."""
    made = tiny.save(tmp_path / "model", "gpt_neox", rotary=Rotary(theta=100.0))
    assert checkpoint.load(tmp_path / "model")[0].config == made.config
