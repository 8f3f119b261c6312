"""Hugging Face checkpoints: safetensors to Flax and back, without torch, pickle or remote code.

Which tensor is which parameter is data in `models.families`. Every parameter of the decoder must be
in the checkpoint, and every tensor of the checkpoint in the decoder.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tqdm
import transformers
from flax import nnx
from huggingface_hub.errors import StrictDataclassError

from models import config as config_lib
from models import families
from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What is asked of the Hub: no code, no pickle, no second copy of the weights in another layout.
_DOWNLOADED = ["model*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_NOT_DOWNLOADED = ["*/*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

# Safetensors' names of the types that a parameter may be stored in.
_STORED_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

# Buffers that old checkpoints store; the frequencies follow from the config.
_IGNORED = re.compile(r"\brotary_emb\.inv_freq$")

_PROGRESS_FROM_BYTES = 10**9


class CheckpointError(InputError):
    """A checkpoint that cannot be used; says which file or tensor is at fault, and the way out."""


def load(
    folder_or_hub_id: str | os.PathLike, *, dtype=None
) -> tuple[Decoder, transformers.PreTrainedTokenizerBase | None]:
    """Loads a model in Hugging Face's format.

    Args:
        folder_or_hub_id: a folder with config.json and safetensors, or the id of such a repository
            on the Hugging Face Hub.
        dtype: of the parameters. By default they stay as they are stored, whatever config.json
            says (the widest type if several are stored).

    Returns:
        The decoder, and the tokenizer or None if the checkpoint has no tokenizer files.

    Raises:
        CheckpointError: naming the file, and the tensor or attribute.
    """
    folder = resolve(folder_or_hub_id)
    config = _read_config(folder)
    with contextlib.ExitStack() as stack:
        stored = _open(_shard_files(folder), stack)
        config = dataclasses.replace(config, dtype=_stored_dtype(stored))
        decoder = _read_decoder(folder, config, jnp.dtype(dtype or config.dtype), stored)
    return decoder, read_tokenizer(folder)


def stored_dtype(folder: pathlib.Path) -> str:
    """The type in which a checkpoint's parameters are stored, the widest if there are several.

    Raises:
        CheckpointError: naming the file that cannot be read.
    """
    with contextlib.ExitStack() as stack:
        return _stored_dtype(_open(_shard_files(folder), stack))


def save(
    decoder: Decoder,
    folder: str | os.PathLike,
    *,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model in Hugging Face's format, which `load` and transformers read.

    The folder appears only once it is complete. Parameters are stored in the type that they have.

    Args:
        decoder: the model.
        folder: where to; must not exist yet, or be empty.
        tokenizer: written beside the model; its special tokens go into config.json.
        max_shard_bytes: weights larger than this are split into several files with an index.

    Raises:
        CheckpointError: if the folder is not empty, or the family cannot express the model.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already; remove it or choose another folder")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_config(decoder, partial, tokenizer)
        _write_weights(decoder, partial, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def resolve(folder_or_hub_id: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint: the given one, or a snapshot of the Hub repository of that id.

    Raises:
        CheckpointError: if there is neither.
    """
    folder = pathlib.Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json")
    if folder.is_absolute() or str(folder_or_hub_id).count("/") > 1:
        raise CheckpointError(f"{folder}: no such folder")
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                str(folder_or_hub_id), allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED
            )
        )
    # OSError covers the network and the Hub's answers, ValueError an impossible id.
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder_or_hub_id}: no such folder, and not to be had from the Hugging Face Hub; "
            f"give the folder of a checkpoint, or check the id and the network ({error})"
        ) from error


def weights_hash(folder: pathlib.Path) -> str:
    """BLAKE2b of the weight files, in the order of their names; 64 hex digits."""
    digest = hashlib.blake2b(digest_size=32)
    for shard in _shard_files(folder):
        with shard.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One tensor of an open shard."""

    name: str
    shard: pathlib.Path
    handle: safetensors.safe_open

    @property
    def dtype(self) -> str:
        dtype = self.handle.get_slice(self.name).get_dtype()
        if dtype not in _STORED_DTYPES:
            raise CheckpointError(
                f"{self.shard}: {self.name} is stored as {dtype}; supported: "
                f"{', '.join(_STORED_DTYPES)}. A quantised checkpoint must be dequantised first"
            )
        return _STORED_DTYPES[dtype]

    def read_into(self, out: np.ndarray, transpose: bool) -> None:
        """Reads the tensor into `out`, converting its type; transposed if asked to."""
        wanted = out.shape[::-1] if transpose else out.shape
        shape = tuple(self.handle.get_slice(self.name).get_shape())
        if shape != wanted:
            raise CheckpointError(
                f"{self.shard}: {self.name} has shape {list(shape)}, but config.json asks for "
                f"{list(wanted)}"
            )
        values = self.handle.get_tensor(self.name)
        with np.errstate(over="ignore"):  # what overflows is refused below
            out[...] = values.T if transpose else values
        if not np.isfinite(out).all():
            as_type = "" if out.dtype == self.dtype else f" when converted to {out.dtype}"
            raise CheckpointError(f"{self.shard}: {self.name} has NaN or infinite values{as_type}")


@dataclasses.dataclass(frozen=True)
class _Row:
    """A parameter of a decoder, and the tensors that it is stored as.

    Attributes:
        path: of the parameter.
        names: of its tensors; one per layer if `stacked`, else a single one.
        stacked: whether the parameter has a leading layer axis.
        transpose: whether each tensor is the transpose of the parameter.
        shape: of the parameter.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    stacked: bool
    transpose: bool
    shape: tuple[int, ...]

    def part(self, array: np.ndarray | jax.Array, layer: int) -> np.ndarray | jax.Array:
        """What `names[layer]` holds of an array of this parameter's shape."""
        return array[layer] if self.stacked else array


def _rows(config: DecoderConfig, parameters: Mapping[tuple[str, ...], nnx.Param]) -> list[_Row]:
    """The family's weight table, expanded to the parameters that a decoder has."""
    rows = []
    for name, path, transpose in families.get(config.family).WEIGHTS:
        path = tuple(path.split("."))
        if path not in parameters:
            continue
        stacked = "{layer}" in name
        layers = range(config.num_layers) if stacked else (0,)
        names = tuple(name.format(layer=layer) for layer in layers)
        rows.append(_Row(path, names, stacked, transpose, parameters[path].shape))
    unnamed = parameters.keys() - {row.path for row in rows}
    if unnamed:
        raise ValueError(f"the weight table of {config.family} lacks {sorted(unnamed)}")
    return rows


def _parameters(module: Decoder) -> tuple[nnx.GraphDef, dict[tuple[str, ...], nnx.Param]]:
    graph, state = nnx.split(module)
    return graph, dict(nnx.to_flat_state(state))


def _read_decoder(
    folder: pathlib.Path, config: DecoderConfig, dtype: jnp.dtype, stored: Mapping[str, _Stored]
) -> Decoder:
    """Builds the decoder abstractly and fills it, one stacked parameter after the other.

    At no time is more than one parameter held twice.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{folder}: parameters of type {dtype} need jax_enable_x64; or pass another dtype"
        )
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, parameters = _parameters(abstract)
    rows = _rows(config, parameters)
    _check_names(folder, rows, config, stored)

    total = sum(np.prod(row.shape) * dtype.itemsize for row in rows)
    progress = tqdm.tqdm(
        total=int(total),
        desc=folder.name,
        unit="B",
        unit_scale=True,
        disable=total < _PROGRESS_FROM_BYTES,
    )
    with progress:
        for row in rows:
            buffer = np.empty(row.shape, dtype)
            for layer, name in enumerate(row.names):
                part = row.part(buffer, layer)
                stored[name].read_into(part, row.transpose)
                progress.update(part.nbytes)
            parameters[row.path] = parameters[row.path].replace(jax.device_put(buffer))
    return nnx.merge(graph, nnx.from_flat_state(parameters))


def _check_names(
    folder: pathlib.Path, rows: list[_Row], config: DecoderConfig, stored: Mapping[str, _Stored]
) -> None:
    """Refuses a checkpoint that lacks a tensor, or has one that the decoder has no place for."""
    expected = {name for row in rows for name in row.names}
    missing = sorted(expected - stored.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)} weights are); "
            "config.json describes another model, or the checkpoint is incomplete"
        )
    unexpected = {name for name in stored.keys() - expected if not _IGNORED.search(name)}
    if config.tie_embeddings:
        unexpected -= _equal_unembedding(config, stored)
    if unexpected:
        name = min(unexpected)
        raise CheckpointError(
            f"{stored[name].shard}: {name} has no place in a {config.family} model of this "
            f"config.json ({len(unexpected)} such tensors)"
        )


def _equal_unembedding(config: DecoderConfig, stored: Mapping[str, _Stored]) -> set[str]:
    """Name of the unembedding, if a tied checkpoint stores it though it follows from the embedding.

    transformers unties the two if they differ. Here that is an error: config.json says otherwise.
    """
    names = {path: name for name, path, _ in families.get(config.family).WEIGHTS}
    embedding, unembedding = names["embedding"], names["unembedding"]
    if unembedding not in stored:
        return set()
    values = [stored[name].handle.get_tensor(name) for name in (embedding, unembedding)]
    if not np.array_equal(*values):
        raise CheckpointError(
            f"{stored[unembedding].shard}: {unembedding} differs from {embedding}, but config.json "
            "ties them; set tie_word_embeddings to false there to use both"
        )
    return {unembedding}


def _shard_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weight files, in the order of their names; a single file goes before an index."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX
    if not index.is_file():
        pickles = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise CheckpointError(
                f"{folder}: has only pickled weights ({min(pickles)}), which are never read; where "
                "you trust them, convert with transformers: AutoModelForCausalLM.from_pretrained("
                "old_folder).save_pretrained(new_folder)"
            )
        raise CheckpointError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if pathlib.Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}, which is not a file in its folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is missing; download it again")
    return [folder / name for name in names]


def _open(shards: list[pathlib.Path], stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """All tensors of the shards, unread; the files stay open as long as `stack`."""
    stored = {}
    for shard in shards:
        try:
            handle = stack.enter_context(safetensors.safe_open(shard, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{shard}: truncated or corrupt ({error}); download it again"
            ) from error
        for name in handle.offset_keys():
            if name in stored:
                raise CheckpointError(f"{shard}: {name} is in {stored[name].shard.name} as well")
            stored[name] = _Stored(name, shard, handle)
    if not stored:
        raise CheckpointError(f"{shards[0]}: holds no tensors")
    return stored


def _stored_dtype(stored: Mapping[str, _Stored]) -> str:
    """The narrowest type that holds every weight as it is stored."""
    dtypes = [tensor.dtype for tensor in stored.values() if not _IGNORED.search(tensor.name)]
    # Of jnp, which knows what holds bfloat16; pairwise, because that keeps float64 in any case.
    return jnp.dtype(functools.reduce(jnp.promote_types, dtypes)).name


def _read_config(folder: pathlib.Path) -> DecoderConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no config.json; is it a Hugging Face checkpoint?")
    attributes = _read_json(file)
    if "auto_map" in attributes:
        raise CheckpointError(
            f"{file}: auto_map asks for code from the checkpoint, which is never run; remove "
            "auto_map if the model is one that transformers itself computes"
        )
    try:
        # Before transformers builds its class: it knows less well what is not supported here.
        config_lib.refuse_unsupported(attributes)
        hf_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config_lib.from_hf(hf_config)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_tokenizer(folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer in a checkpoint's folder, or None if it has no tokenizer files."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's own reader raises
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error


def _read_json(file: pathlib.Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def _write_config(
    decoder: Decoder,
    folder: pathlib.Path,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
) -> None:
    config = dataclasses.replace(decoder.config, dtype=decoder.embedding.dtype.name)
    # Given even when None: the defaults of transformers' classes are those of one published model.
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    token_ids = {name: getattr(tokenizer, name, None) for name in names}
    try:
        config_lib.to_hf(config, **token_ids).save_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _write_weights(decoder: Decoder, folder: pathlib.Path, max_shard_bytes: int) -> None:
    """Writes the weights shard by shard; no more than one shard is held on the host."""
    _, parameters = _parameters(decoder)
    tensors = {
        name: (row, layer)
        for row in _rows(decoder.config, parameters)
        for layer, name in enumerate(row.names)
    }
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: parameters[tensor[0].path].nbytes // len(tensor[0].names),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )

    def values(row: _Row, layer: int) -> np.ndarray:
        part = np.asarray(row.part(parameters[row.path][...], layer))
        return np.ascontiguousarray(part.T if row.transpose else part)

    for file, names in plan.filename_to_tensors.items():
        # transformers reads only files that are marked as written for torch.
        safetensors.numpy.save_file(
            {name: values(*tensors[name]) for name in names}, folder / file, {"format": "pt"}
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
