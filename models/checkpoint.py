"""Hugging Face checkpoints: safetensors to Flax and back, without torch, pickle or remote code.

Which tensor is which parameter is data in `models.families`. Every parameter of the decoder must be
in the checkpoint, and every tensor of the checkpoint in the decoder.

Weights go straight to their place: each tensor is read once, in small pieces, into the buffers that
become the parameters, and a host reads only what its devices hold. `launch.convert` keeps weights
as they lie in memory; a checkpoint that it has converted is read from there (`models.cache`).
An adapter (`models.adapters`) is merged piece by piece, as the weights that it changes are read.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

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
from jaxtyping import Array, Shaped

from jaxmed.files import reading
from models import adapters, cache, families, hf_config, placement, weights
from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import InputError, failures_as
from models.families.family import Family
from models.placement import Placing
from models.products import numbers_on_host
from models.shapes import Layer
from models.weights import Path, Row

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"  # where a response stops

# What is asked of the Hub: no code, no pickle, no second copy of the weights in another layout.
_DOWNLOADED = [
    "model*.safetensors",
    adapters.WEIGHTS,
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
]
_NOT_DOWNLOADED = ["*/*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

# Files of a checkpoint of several; and the suffixes of what is only read by unpickling it.
_SHARDS = "model-*-of-*.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# The way out where a model that ties its embeddings has a config.json that does not say so.
_TIED = "the model ties its embeddings: set tie_word_embeddings to true in config.json"

# Modules that turn tokenizer.model into a fast tokenizer.
_OF_SENTENCEPIECE = ("sentencepiece", "google.protobuf")

# Safetensors' names of the types that a parameter may be stored in.
_STORED_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

# Names of tensors that hold quantised weights, and what wrote them.
_QUANTISED = {
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.(absmax|nested_absmax|quant_map|SCB)$|\.quant_state\.": "bitsandbytes",
    r"\.(weight_scale|weight_scale_inv|weight_packed|weight_shape)$": "FP8 or compressed-tensors",
    r"_(blocks|scales)$": "MXFP4",
}

# Bytes that are read at a time. The file's pages count as resident until they are let go.
_PIECE_BYTES = 2**23
_READERS = min(8, os.cpu_count() or 1)

# What transformers' classes, whose own checks are not complete, raise for a value of another kind.
_OF_ANOTHER_KIND = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

_PROGRESS_FROM_BYTES = 10**9

_log = logging.getLogger(__name__)


class CheckpointError(InputError):
    """A checkpoint that cannot be used; says which file or tensor is at fault, and the way out."""


def load(
    folder_or_hub_id: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dtype=None,
    mesh: jax.sharding.Mesh | None = None,
    cache_dir: str | os.PathLike | None = None,
    ignore_config: Collection[str] = (),
) -> tuple[Decoder, transformers.PreTrainedTokenizerBase | None]:
    """Loads a model in Hugging Face's format.

    Args:
        folder_or_hub_id: a folder with config.json and safetensors, or the id of such a repository
            on the Hugging Face Hub.
        adapter: folder or hub id of a LoRA adapter in peft's format, which is merged into the
            weights; None for none. Its own tokenizer is taken, where it has one.
        dtype: of the parameters. By default they stay as they are stored, whatever config.json
            says (the widest type if several are stored, an adapter's among them).
        mesh: devices to spread the parameters over, with the axes `sweep` and `model`, as
            `models.placement` says; by default the default device. It is the decoder's `mesh`.
        cache_dir: where `launch.convert` keeps converted weights, by default
            `models.cache.default_folder()`. They are used if they are there; none are written.
        ignore_config: keys of config.json that are accepted though their meaning is not known here,
            because they do not change what the model computes.

    Returns:
        The decoder, and the tokenizer or None if the checkpoint has no tokenizer files.

    Raises:
        CheckpointError, adapters.AdapterError: naming the file, and the tensor or attribute.
    """
    source = Source.examine(
        resolve(folder_or_hub_id), dtype, resolve_adapter(adapter), ignore_config
    )
    tokenizer = read_tokenizer(source.folder, source.adapter)
    if tokenizer is not None:
        _check_tokenizer(source, tokenizer)
    return source.load(mesh, cache_dir), tokenizer


def size(
    folder_or_hub_id: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dtype=None,
    ignore_config: Collection[str] = (),
) -> int:
    """Bytes that a model's parameters will take in memory; arguments and errors as of `load`."""
    folder = resolve(folder_or_hub_id)
    source = Source.examine(folder, dtype, resolve_adapter(adapter), ignore_config)
    return source.parameter_bytes


def save(
    decoder: Decoder,
    folder: str | os.PathLike,
    *,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    beside: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model in Hugging Face's format, which `load` and transformers 4 and 5 read.

    The folder appears only once it is complete. Parameters are stored in the type that they have.

    Args:
        decoder: the model.
        folder: where to; must not exist yet, or be empty.
        tokenizer: written beside the model; its special tokens go into config.json.
        beside: texts of further files, by their names, such as `GENERATION_CONFIG`, which names
            the tokens that a response stops at: a tokenizer knows only one of them.
        max_shard_bytes: weights larger than this are split into several files with an index.

    Raises:
        CheckpointError: if the folder is not empty, or the family cannot express the model.
    """
    folder = pathlib.Path(folder)
    check_free(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_config(decoder, partial, tokenizer)
        _write_weights(decoder, partial, max_shard_bytes)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, partial)
        for name, text in (beside or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def shapes(
    folder_or_hub_id: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dtype=None,
    ignore_config: Collection[str] = (),
) -> tuple[Decoder, transformers.PreTrainedTokenizerBase | None]:
    """What `load` gives, but that the weights are not read: the decoder has their shapes and types
    instead, and says what a model costs. Arguments and errors as of `load`."""
    source = Source.examine(
        resolve(folder_or_hub_id), dtype, resolve_adapter(adapter), ignore_config
    )
    tokenizer = read_tokenizer(source.folder, source.adapter)
    if tokenizer is not None:
        _check_tokenizer(source, tokenizer)
    return source.shapes(), tokenizer


def check_free(folder: pathlib.Path) -> None:
    """Raises CheckpointError if a folder to be written is not empty, or cannot be made."""
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CheckpointError(f"{folder}: cannot be made, since {above} cannot be written to")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already; remove it or choose another folder")


def resolve(folder_or_hub_id: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint: the given one, or a snapshot of the Hub repository of that id.

    Raises:
        CheckpointError: if there is neither.
    """
    folder = pathlib.Path(os.path.expanduser(folder_or_hub_id))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json")
    if folder.is_absolute() or str(folder_or_hub_id).count("/") > 1:
        raise CheckpointError(f"{folder}: no such folder")
    try:
        snapshot = pathlib.Path(
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
    if not any(snapshot.glob("*.safetensors")):
        raise CheckpointError(f"{folder_or_hub_id}: {_lack_of_weights(_on_hub(folder_or_hub_id))}")
    return snapshot


def _on_hub(hub_id: str | os.PathLike) -> list[str]:
    """The files of a repository on the Hub; none where it cannot be asked."""
    try:
        return huggingface_hub.list_repo_files(str(hub_id))
    except (OSError, ValueError):
        return []


def resolve_adapter(adapter: str | os.PathLike | None) -> pathlib.Path | None:
    """The folder of an adapter, as `resolve`; None where none is asked for, by None or ""."""
    return resolve(adapter) if adapter else None


def weights_hash(folder: pathlib.Path, cache_dir: str | os.PathLike | None = None) -> str:
    """BLAKE2b of the weight files, in the order of their names; 64 hex digits.

    That of large files is remembered in the cache folder, until one of them changes.
    """
    files = _shard_files(folder)

    def compute() -> str:
        digest = hashlib.blake2b(digest_size=32)
        total = sum(file.stat().st_size for file in files)
        with _progress(f"Hashing {folder.name}", total) as progress:
            for shard in files:
                with shard.open("rb") as file:
                    while chunk := file.read(_PIECE_BYTES):
                        digest.update(chunk)
                        progress.update(len(chunk))
        return digest.hexdigest()

    return cache.remembered_hash(_cache_folder(cache_dir), files, compute)


def config_hash(config: DecoderConfig) -> str:
    """BLAKE2b of what a config says of the computation, 64 hex digits: of the same weights,
    another one makes another model."""
    return hashlib.blake2b(repr(config).encode(), digest_size=32).hexdigest()


def adapter_hash(adapter: pathlib.Path | None) -> str | None:
    """BLAKE2b of an adapter's config and weights, 64 hex digits; None without an adapter."""
    if adapter is None:
        return None
    digest = hashlib.blake2b(digest_size=32)
    for file in (adapter / adapters.CONFIG, adapter / adapters.WEIGHTS):
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that can be loaded; made by `examine`, which reads no weights.

    Attributes:
        folder: where it is.
        adapter: where the adapter is that is merged into it; None without one.
        config: the shape of its model.
        dtype: in which its parameters are wanted.
        rows: the weights, in the order of the files.
    """

    folder: pathlib.Path
    adapter: pathlib.Path | None
    config: DecoderConfig
    dtype: jnp.dtype
    rows: tuple[Row, ...]
    _stored: Mapping[str, "_Stored"]
    _graph: nnx.GraphDef
    _parameters: Mapping[Path, nnx.Param]

    @classmethod
    def examine(
        cls,
        folder: pathlib.Path,
        dtype=None,
        adapter: pathlib.Path | None = None,
        ignore_config: Collection[str] = (),
    ) -> "Source":
        """Looks at everything but the weights' values.

        Args:
            folder: of the checkpoint.
            dtype: in which its parameters are wanted, by default as they are stored.
            adapter: folder of an adapter that is merged into them.
            ignore_config: as in `load`.

        Raises:
            CheckpointError, adapters.AdapterError: naming the file, and the tensor or attribute.
        """
        _check_adapter(folder, adapter)
        config = read_config(folder, ignore_config)
        family = families.get(config.family)
        stored, added = _headers(folder, family), _adapter_tensors(adapter)
        config = dataclasses.replace(config, dtype=_widest(stored | added))
        dtype = jnp.dtype(dtype or config.dtype)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise CheckpointError(
                f"{folder}: parameters of type {dtype} need jax_enable_x64; or pass another dtype"
            )
        # Built without weights: they come from the checkpoint.
        graph, parameters = _parameters(
            nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
        )
        prefix = _missing_prefix(family, stored)
        named = _rows(config, parameters)
        rows = [dataclasses.replace(row, name=row.name.removeprefix(prefix)) for row in named]
        if not (folder / SINGLE_FILE).is_file():
            _check_index(folder, config, stored, prefix)
        elif (folder / INDEX).is_file() and _named_files(folder) != {SINGLE_FILE}:
            _log.warning("%s: none of its files is there; %s is read", folder / INDEX, SINGLE_FILE)
        _check_names(folder, rows, config, stored, prefix)
        if adapter is not None:
            shapes = {name: tensor.shape for name, tensor in added.items()}
            for name, change in adapters.changes(adapter, named, shapes).items():
                name = name.removeprefix(prefix)
                stored[name] = _changed(stored[name], change, added, config.dtype)
        _check_shapes(rows, stored)
        order = {name: position for position, name in enumerate(stored)}
        rows.sort(key=lambda row: order[row.name])
        return cls(folder, adapter, config, dtype, tuple(rows), stored, graph, parameters)

    def cached(self, cache_dir: str | os.PathLike | None = None) -> cache.Entry | None:
        """The converted weights in the cache, or None where there are none.

        Raises:
            cache.DamagedEntryError: they are there, but not as they were written.
        """
        folder = _cache_folder(cache_dir)
        # Without a hash, which takes seconds, where there can be none.
        if not cache.may_hold(folder, self._file_bytes):
            return None
        return cache.find(folder, self._entry_name(folder))

    def shapes(self) -> Decoder:
        """The model with shapes and types in the place of its weights."""
        return nnx.merge(self._graph, nnx.from_flat_state(list(self._parameters.items())))

    def write_cache(self, cache_dir: str | os.PathLike | None = None) -> cache.Entry:
        """Reads the weights, and writes them to the cache in the type in which they are stored.

        Raises:
            CheckpointError: as in `load`.
            OSError: there is no place for them, or no permission.
        """
        if self.dtype != self.config.dtype:
            raise ValueError(f"the cache keeps {self.config.dtype}, and not {self.dtype}")
        folder = _cache_folder(cache_dir)
        name = self._entry_name(folder)
        _, parameters = _parameters(self.read())
        if self._entry_name(folder) != name:
            raise CheckpointError(f"{self.folder}: changed while it was read; run this again")
        # Those that are kept as bits alone: of others no copy is made where they are on a device.
        arrays = {
            path: numbers_on_host(kept[...]) if kept.dtype == np.uint16 else kept[...]
            for path, kept in parameters.items()
        }
        about = {"model": str(self.folder), "dtype": self.config.dtype}
        if self.adapter is not None:
            about["adapter"] = str(self.adapter)
        return cache.write(folder, name, arrays, about)

    def load(
        self,
        mesh: jax.sharding.Mesh | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> Decoder:
        """The model, from the cache where it has the weights.

        Args:
            mesh, cache_dir: as in `load`.

        Raises:
            CheckpointError: naming the file and the tensor whose values cannot be used.
        """
        try:
            entry = self.cached(cache_dir)
            if entry is not None:
                return self._from_cache(entry, mesh)
        except cache.DamagedEntryError as error:
            _log.warning(
                "%s; the checkpoint itself is read. To write it again: "
                "python -m launch.convert --model=%s%s",
                error,
                self.folder,
                f" --adapter={self.adapter}" if self.adapter else "",
            )
        return self.read(mesh)

    def read(self, mesh: jax.sharding.Mesh | None = None) -> Decoder:
        """The model, from the checkpoint's own files; arguments and errors as in `load`."""
        placings = self._placings(mesh)
        done: dict[Path, jax.Array] = {}
        left = Counter(path for row in self.rows for path in row.paths)

        def fill(row: Row) -> None:
            for index, path in enumerate(row.paths):
                for piece in placings[path].pieces:
                    self._stored[row.name].read_into(row, index, piece.of_layer(row.layer))

        with _readers() as pool, _progress(self.folder.name, self.parameter_bytes) as progress:
            for row, _ in zip(self.rows, pool.map(fill, self.rows), strict=True):
                progress.update(row.size * self.dtype.itemsize)
                left.subtract(row.paths)
                for path in row.paths:
                    if not left[path]:
                        done[path] = placings.pop(path).hand_over(self._parameters[path].dtype)
        return self._decoder(done, mesh)

    def _from_cache(self, entry: cache.Entry, mesh: jax.sharding.Mesh | None) -> Decoder:
        can_overflow = jnp.promote_types(self.config.dtype, self.dtype) != self.dtype
        placings = self._placings(mesh)
        done = {}

        def fill(path: Path) -> None:
            for piece in placings[path].pieces:
                entry.read_into(path, piece.where, piece.buffer)
                if can_overflow and not placement.all_finite(piece.buffer):
                    row = next(row for row in self.rows if path in row.paths)
                    raise self._stored[row.name].not_finite(self.dtype)

        label = f"{self.folder.name} (converted)"
        with _readers() as pool, _progress(label, self.parameter_bytes) as progress:
            paths = list(placings)
            for path, _ in zip(paths, pool.map(fill, paths), strict=True):
                done[path] = placings.pop(path).hand_over(self._parameters[path].dtype)
                progress.update(done[path].nbytes)
        return self._decoder(done, mesh)

    def _entry_name(self, cache_dir: pathlib.Path) -> str:
        hashes = weights_hash(self.folder, cache_dir), adapter_hash(self.adapter)
        return cache.name(*hashes, self._file_bytes, self.rows)

    @property
    def _file_bytes(self) -> int:
        files = _shard_files(self.folder)
        if self.adapter is not None:
            files.append(self.adapter / adapters.WEIGHTS)
        return sum(file.stat().st_size for file in files)

    @property
    def parameter_bytes(self) -> int:
        """That the parameters take in memory."""
        return sum(row.size for row in self.rows) * self.dtype.itemsize

    def _placings(self, mesh: jax.sharding.Mesh | None) -> dict[Path, Placing]:
        if mesh is not None:
            placement.check(mesh)
        placings = {}
        for path, parameter in self._parameters.items():
            shape = parameter.shape
            sharding = None if mesh is None else placement.sharding(path, shape, mesh)
            placings[path] = Placing(shape, self.dtype, sharding)
        return placings

    def _decoder(self, arrays: Mapping[Path, jax.Array], mesh: jax.sharding.Mesh | None) -> Decoder:
        state = [(path, p.replace(arrays[path])) for path, p in self._parameters.items()]
        decoder = nnx.merge(self._graph, nnx.from_flat_state(state))
        decoder.mesh = mesh if mesh is not None and mesh.size > 1 else None
        return decoder


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One tensor of a shard, unread.

    Attributes:
        name: of the tensor.
        shard: the file that holds it.
        shape: of the tensor.
        dtype: numpy's name of its type.
    """

    name: str
    shard: pathlib.Path
    shape: tuple[int, ...]
    dtype: str

    def read(self, where: tuple[slice, ...]) -> np.ndarray:
        """A part of the tensor. The file is mapped only as long as this takes."""
        try:
            with safetensors.safe_open(self.shard, framework="numpy") as file:
                return file.get_slice(self.name)[where]
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.shard}: {self.name} cannot be read any more ({error}); the file was "
                "changed or removed meanwhile"
            ) from error

    def steps(self, where: tuple[slice, ...]) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Cuts a part of the tensor along its first axis into what is read at a time.

        Yields:
            The rows, counted from those of the part; and where they are in the tensor.
        """
        sizes = [s.stop - s.start for s in where]
        row_bytes = int(np.prod(sizes[1:])) * jnp.dtype(self.dtype).itemsize
        rows = max(1, _PIECE_BYTES // row_bytes)
        for first in range(0, sizes[0], rows):
            last = min(first + rows, sizes[0])
            start = where[0].start
            yield slice(first, last), (slice(start + first, start + last), *where[1:])

    def read_into(self, row: Row, parameter: int, piece: placement.Piece) -> None:
        """Reads what a piece of one of the row's parameters needs, and converts it."""
        *inputs, outputs = piece.where
        for run, held in row.runs(parameter, outputs):
            where, out = (*inputs, held), piece.buffer[..., run]
            if row.transposed:
                where, out = where[::-1], out.T
            for rows, step in self.steps(where):
                if not placement.copy(self.read(step), out[rows]):
                    raise self.not_finite(out.dtype)

    def not_finite(self, dtype: np.dtype) -> CheckpointError:
        """The error that says so."""
        as_type = "" if dtype == self.dtype else f" when converted to {dtype}"
        return CheckpointError(f"{self.shard}: {self.name} has NaN or infinite values{as_type}")


@dataclasses.dataclass(frozen=True)
class _Merged(_Stored):
    """A tensor of a shard, and what an adapter adds to it; `dtype` is that of their sum.

    Attributes:
        base: the tensor.
        factors: A and B.
        scale, turned: as in `adapters.Change`.
    """

    base: _Stored
    factors: tuple[_Stored, _Stored]
    scale: float
    turned: bool

    def read(self, where: tuple[slice, ...]) -> np.ndarray:
        """A part of the sum, which is computed in float32 at least."""
        first, second = self.factors
        outputs, inputs = where[::-1] if self.turned else where
        number = jnp.promote_types(jnp.float32, self.dtype)
        a, b = (
            factor.read(part).astype(number)
            for factor, part in (
                (first, (slice(0, first.shape[0]), inputs)),
                (second, (outputs, slice(0, second.shape[1]))),
            )
        )
        added = number.type(self.scale) * (b @ a)
        base = self.base.read(where).astype(number)
        return (base + (added.T if self.turned else added)).astype(jnp.dtype(self.dtype))

    def not_finite(self, dtype: np.dtype) -> CheckpointError:
        """The error that says so."""
        first, _ = self.factors
        plain = super().not_finite(dtype)
        return CheckpointError(f"{plain}, once the LoRA of {first.shard} is added")


def _changed(
    tensor: _Stored, change: adapters.Change, added: Mapping[str, _Stored], dtype: str
) -> _Stored:
    """What becomes of a tensor by an adapter, whose own tensors are `added`."""
    base = added[change.replacement] if change.replacement else tensor
    if change.factors is None:
        return base
    first, second = (added[name] for name in change.factors)
    return _Merged(
        tensor.name,
        tensor.shard,
        base.shape,
        dtype,
        base=base,
        factors=(first, second),
        scale=change.scale,
        turned=change.turned,
    )


def _rows(config: DecoderConfig, parameters: Mapping[Path, nnx.Param]) -> list[Row]:
    """The tensors of a checkpoint of this model, as transformers names them."""
    shapes = {path: parameter.shape for path, parameter in parameters.items()}
    return weights.rows(families.get(config.family).weights, config, shapes)


def _parameters(module: Decoder) -> tuple[nnx.GraphDef, dict[Path, nnx.Param]]:
    graph, state = nnx.split(module)
    return graph, {tuple(map(str, path)): parameter for path, parameter in nnx.to_flat_state(state)}


def _table_names(family: Family, prefix: str) -> dict[str, str]:
    """The tensor of each parameter that is stored alone or first, without the missing prefix."""
    return {weight.parameters[0]: weight.tensor.removeprefix(prefix) for weight in family.weights}


def _missing_prefix(family: Family, stored: Mapping[str, _Stored]) -> str:
    """What the names of all tensors lack, if they are those of the bare model; else nothing."""
    bare = not any(name.startswith(family.base_prefix) for name in stored)
    return family.base_prefix if bare else ""


def _check_names(
    folder: pathlib.Path,
    rows: list[Row],
    config: DecoderConfig,
    stored: Mapping[str, _Stored],
    prefix: str,
) -> None:
    """Refuses a checkpoint that lacks a tensor, or has one that the decoder has no place for."""
    expected = {row.name for row in rows}
    missing = sorted(expected - stored.keys())
    if missing:
        names = _table_names(families.get(config.family), prefix)
        tied = f"; or {_TIED}" if missing == [names["unembedding"]] else ""
        raise CheckpointError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)} weights are); "
            f"config.json describes another model, or the checkpoint is incomplete{tied}"
        )
    unexpected = stored.keys() - expected
    if config.tie_embeddings:
        unexpected -= _equal_unembedding(config, stored, prefix)
    if unexpected:
        name = min(unexpected)
        raise CheckpointError(
            f"{stored[name].shard}: {name} has no place in a {config.family} model of this "
            f"config.json ({len(unexpected)} such tensors)"
        )


def _check_shapes(rows: list[Row], stored: Mapping[str, _Stored]) -> None:
    for row in rows:
        tensor = stored[row.name]
        if tensor.shape != row.shape:
            raise CheckpointError(
                f"{tensor.shard}: {tensor.name} has shape {list(tensor.shape)}, but config.json "
                f"asks for {list(row.shape)}"
            )


def _equal_unembedding(
    config: DecoderConfig, stored: Mapping[str, _Stored], prefix: str
) -> set[str]:
    """Name of the unembedding, if a tied checkpoint stores it though it follows from the embedding.

    transformers unties the two if they differ. Here that is an error: config.json says otherwise.
    """
    names = _table_names(families.get(config.family), prefix)
    if names["unembedding"] not in stored:
        return set()
    embedding, unembedding = stored[names["embedding"]], stored[names["unembedding"]]
    whole = tuple(slice(0, size) for size in embedding.shape)
    if embedding.shape != unembedding.shape or not all(
        np.array_equal(embedding.read(step), unembedding.read(step))
        for _, step in embedding.steps(whole)
    ):
        raise CheckpointError(
            f"{unembedding.shard}: {unembedding.name} differs from {embedding.name}, but "
            "config.json ties them; set tie_word_embeddings to false there to use both"
        )
    return {unembedding.name}


def _shard_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weight files, in the order of their names.

    Raises:
        CheckpointError: there are none, or two sets of them. (transformers reads the single file,
            even where that is the one that is out of date.)
    """
    if not (folder / SINGLE_FILE).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    others = {file.name for file in folder.glob(_SHARDS)}
    if (folder / INDEX).is_file():
        others |= {name for name in _named_files(folder) if (folder / name).is_file()}
    if others := sorted(others - {SINGLE_FILE}):
        raise CheckpointError(
            f"{folder}: has two sets of weights, {SINGLE_FILE} and {others[0]} ({len(others)} such "
            "files), and one of them must be out of date: remove it, with its index"
        )
    return [folder / SINGLE_FILE]


def _named_files(folder: pathlib.Path) -> set[str]:
    """The files that the index names, there or not."""
    index = folder / INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or "\0" in name or pathlib.Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}, which is not a file in its folder")
    return set(weight_map.values())


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    """Which file holds which tensor, by the index of a checkpoint of several files."""
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: {_lack_of_weights([file.name for file in folder.iterdir()])}"
        )
    for name in sorted(_named_files(folder)):
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is missing; download it again")
    return _read_json(index)["weight_map"]


def _lack_of_weights(names: Collection[str]) -> str:
    """What there is in place of weights that can be read, by the names of the files, and what to do
    about it; the end of a message."""
    by_suffix = {pathlib.PurePath(name).suffix: name for name in sorted(names, reverse=True)}
    if ".safetensors" in by_suffix:
        return (
            f"has {by_suffix['.safetensors']}, but neither {SINGLE_FILE} nor {INDEX}, which says "
            "what such files hold; download the checkpoint again, in the layout of transformers"
        )
    if pickles := [by_suffix[suffix] for suffix in _PICKLED if suffix in by_suffix]:
        return (
            f"has only pickled weights ({pickles[0]}), which are never read; where you trust them, "
            "convert with transformers and torch: AutoModelForCausalLM.from_pretrained("
            "old_folder).save_pretrained(new_folder). Or have them converted on the Hub, by its "
            "Space safetensors/convert, which opens a pull request: hf download ID --revision "
            "refs/pr/NUMBER --local-dir new_folder"
        )
    if ".gguf" in by_suffix:
        return (
            f"has only {by_suffix['.gguf']}; python -m launch.convert --gguf=FILE --out=DIR makes "
            "a checkpoint of it"
        )
    return f"has neither {SINGLE_FILE} nor {INDEX}"


def _headers(folder: pathlib.Path, family: Family) -> dict[str, _Stored]:
    """All weights of a checkpoint, unread, in the order of the files.

    Raises:
        CheckpointError: a file cannot be read, or weights are quantised.
    """
    stored: dict[str, _Stored] = {}
    for shard in _shard_files(folder):
        for name, shape, dtype in _header(shard):
            if name in stored:
                raise CheckpointError(f"{shard}: {name} is in {stored[name].shard.name} as well")
            stored[name] = _Stored(name, shard, shape, dtype)
    stored = {name: tensor for name, tensor in stored.items() if not _is_ignored(name, family)}
    if not stored:
        raise CheckpointError(f"{_shard_files(folder)[0]}: holds no tensors")
    return {name: _understood(tensor) for name, tensor in stored.items()}


def _adapter_tensors(adapter: pathlib.Path | None) -> dict[str, _Stored]:
    """All tensors of an adapter, unread; none without one."""
    if adapter is None:
        return {}
    file = adapter / adapters.WEIGHTS
    tensors = [_Stored(name, file, shape, dtype) for name, shape, dtype in _header(file)]
    return {tensor.name: _understood(tensor) for tensor in tensors}


def _check_adapter(folder: pathlib.Path, adapter: pathlib.Path | None) -> None:
    """Refuses an adapter that would be passed over in silence, and one that is none."""
    has_weights = (folder / SINGLE_FILE).is_file() or (folder / INDEX).is_file()
    if adapters.is_in(folder) and not has_weights:
        base = adapters.base_model(folder) or "ITS_BASE_MODEL"
        raise CheckpointError(
            f"{folder}: is an adapter, without the model that it was trained on: give "
            f"--model={base} --adapter={folder}; from Python load({base!r}, adapter=...)"
        )
    if adapters.is_in(folder) and (adapter is None or adapter.resolve() != folder.resolve()):
        raise CheckpointError(
            f"{folder}: has an adapter ({adapters.CONFIG}) beside the weights: --adapter={folder} "
            "merges it (from Python load(..., adapter=...), for a judge launch.convert with --out);"
            f" without it, use a copy of the folder that has no {adapters.CONFIG}"
        )
    if adapter is None:
        return
    if not adapters.is_in(adapter):
        raise CheckpointError(
            f"{adapter}: has no {adapters.CONFIG}; an adapter is a folder that peft has saved"
        )
    if not (adapter / adapters.WEIGHTS).is_file():
        raise CheckpointError(
            f"{adapter}: has no {adapters.WEIGHTS}; pickled weights (.bin) are never read: load it "
            "with peft, and save it again"
        )


def _header(shard: pathlib.Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and safetensors' name of the type of each tensor of a file, in its order."""
    try:
        with safetensors.safe_open(shard, framework="numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            return [(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices]
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shard}: truncated or corrupt ({error}); download it again"
        ) from error


def _is_ignored(name: str, family: Family) -> bool:
    """Whether a tensor of this name is no weight."""
    return any(re.search(pattern, name) for pattern in family.ignored)


def _check_index(
    folder: pathlib.Path, config: DecoderConfig, stored: Mapping[str, _Stored], prefix: str
) -> None:
    """Refuses files that do not hold what the index says.

    It may name what need not be there: tensors that are no weights, and the unembedding of a model
    that ties it, which is written only once.
    """
    family = families.get(config.family)
    unembedding = _table_names(family, prefix)["unembedding"]
    for name, file in _weight_map(folder).items():
        if _is_ignored(name, family) or (config.tie_embeddings and name == unembedding):
            continue
        if name not in stored:
            tied = f"; or, if {_TIED}" if name == unembedding else ""
            raise CheckpointError(
                f"{folder / INDEX}: names {name} in {file}, but no file holds it; download the "
                f"index and its files again{tied}"
            )
        if stored[name].shard.name != file:
            raise CheckpointError(
                f"{folder / file}: lacks {name}, which {INDEX} says it holds and which is in "
                f"{stored[name].shard.name}; the files are mixed up: download them again"
            )


def _understood(tensor: _Stored) -> _Stored:
    """The tensor with numpy's name of its type, unless its values are no plain numbers."""
    for pattern, method in _QUANTISED.items():
        if re.search(pattern, tensor.name):
            raise CheckpointError(
                f"{tensor.shard}: {tensor.name} belongs to weights quantised by {method}, which "
                "are not supported: effects would be those of the rounding too. Take the "
                "checkpoint from before it was quantised, or dequantise it"
            )
    if tensor.dtype not in _STORED_DTYPES:
        raise CheckpointError(
            f"{tensor.shard}: {tensor.name} is stored as {tensor.dtype}; supported: "
            f"{', '.join(_STORED_DTYPES)}. A quantised checkpoint must be dequantised first"
        )
    return dataclasses.replace(tensor, dtype=_STORED_DTYPES[tensor.dtype])


def _widest(stored: Mapping[str, _Stored]) -> str:
    """The narrowest type that holds every weight as it is stored."""
    # Of jnp, which knows what holds bfloat16; pairwise, because that keeps float64 in any case.
    dtypes = [tensor.dtype for tensor in stored.values()]
    return jnp.dtype(functools.reduce(jnp.promote_types, dtypes)).name


def read_config(folder: pathlib.Path, ignored: Collection[str] = ()) -> DecoderConfig:
    """The shape of a checkpoint's model, by its config.json alone.

    Args:
        folder: of the checkpoint.
        ignored: as `ignore_config` in `load`.

    Raises:
        CheckpointError: naming the file, and the key.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no config.json; is it a Hugging Face checkpoint?")
    attributes = _read_json(file)
    try:
        config = hf_config.read(attributes, ignored)
        _refuse_code(attributes)
        return config
    except (ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    except _OF_ANOTHER_KIND as error:
        raise CheckpointError(
            f"{file}: a value is not of the kind that its key has ({type(error).__name__}: {error})"
        ) from error


def _refuse_code(attributes: Mapping) -> None:
    """Raises ValueError if the checkpoint asks for code of its own, which is never run.

    It is ignored where it is what transformers later took over: the same class by name (Phi-3).
    This is said, for a checkpoint may have changed what the class computes.
    """
    auto_map = attributes.get("auto_map")
    named = isinstance(auto_map, Mapping) and str(auto_map.get("AutoModelForCausalLM") or "")
    family = families.get(attributes["model_type"])
    if named and named.rpartition(".")[2] != family.architecture:
        raise ValueError(
            f"auto_map asks for {named}, code from the checkpoint, which is never run; remove "
            "auto_map if the model is one that transformers itself computes"
        )
    if named:
        _log.warning(
            "%s, code from the checkpoint, is never run; the model is computed as transformers' "
            "own %s is",
            named,
            family.architecture,
        )


def read_tokenizer(
    folder: pathlib.Path, adapter: pathlib.Path | None = None
) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer in a checkpoint's folder, or None if it has no tokenizer files.

    That of an adapter comes first: training has added its tokens and its chat template there.
    """
    if adapter is not None and (own := read_tokenizer(adapter)):
        return own
    found = {name for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if not found:
        return None
    if "tokenizer.json" not in found:
        _check_vocabulary(folder, found)
    with failures_as(CheckpointError, f"{folder}: the tokenizer cannot be read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # transformers makes one of special tokens alone where the vocabulary's file is missing.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{folder}: the tokenizer has special tokens alone: its vocabulary is not in "
            f"{', '.join(sorted(found))}; download tokenizer.json or tokenizer.model as well"
        )
    return tokenizer


def _check_vocabulary(folder: pathlib.Path, found: Collection[str]) -> None:
    """Refuses a vocabulary that transformers would misread or cannot read: without
    tokenizer.json, it makes one of the older files."""
    if "vocab.json" in found:
        if not (folder / "merges.txt").is_file():
            raise CheckpointError(
                f"{folder}: has vocab.json without merges.txt, which says how text is cut into its "
                "tokens; download it again"
            )
    elif "tokenizer.model" in found:
        lacking = [name for name in _OF_SENTENCEPIECE if not _is_installed(name)]
        if lacking:
            raise CheckpointError(
                f"{folder}: the tokenizer is in tokenizer.model alone, without tokenizer.json; to "
                f"read it, {' and '.join(lacking)} must be installed: "
                "pip install 'jaxmed[sentencepiece]'"
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what holds it is not installed
        return False


def _check_tokenizer(source: Source, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer whose ordinary tokens the model does not have.

    Published models have special tokens beyond their vocabulary (Gemma 3's, for images). Text
    does not contain them.
    """
    size = source.config.vocab_size
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= size}
    if ordinary := beyond.keys() - special:
        first = min(ordinary)
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the tokenizer has a token {beyond[first]!r} of id {first}, "
            f"but the model's vocabulary has {size} ({len(ordinary)} such tokens); the tokenizer "
            "is that of another model"
        )


def _read_json(file: pathlib.Path) -> dict:
    return reading.object_in(file, CheckpointError, "; download it again")


def _cache_folder(cache_dir: str | os.PathLike | None) -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(cache_dir)) if cache_dir else cache.default_folder()


@contextlib.contextmanager
def _readers() -> Iterator[concurrent.futures.Executor]:
    """Threads that read; they stop at the first error."""
    pool = concurrent.futures.ThreadPoolExecutor(_READERS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _progress(label: str, total: int) -> tqdm.tqdm:
    """A progress bar of bytes, for what takes long enough to need one."""
    return tqdm.tqdm(
        total=total,
        desc=label,
        unit="B",
        unit_scale=True,
        disable=total < _PROGRESS_FROM_BYTES,
    )


def _write_config(
    decoder: Decoder,
    folder: pathlib.Path,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
) -> None:
    config = dataclasses.replace(decoder.config, dtype=decoder.dtype.name)
    # Given even when None: the defaults of transformers' classes are those of one published model.
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    token_ids = {name: getattr(tokenizer, name, None) for name in names}
    try:
        attributes = json.loads(hf_config.to_hf(config, **token_ids).to_json_string())
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error
    _write_json(folder / "config.json", attributes | hf_config.older_spelling(config))


def _write_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, folder: pathlib.Path) -> None:
    """Writes the tokenizer by names that transformers 4 knows too."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    attributes = _read_json(file)
    if attributes["tokenizer_class"] == "TokenizersBackend":
        attributes["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 takes names for those of the other key, and fails at a list.
    if isinstance(attributes.get("extra_special_tokens"), list):
        attributes["additional_special_tokens"] = attributes.pop("extra_special_tokens")
    _write_json(file, attributes)


def _write_json(file: pathlib.Path, content: Mapping) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@jax.jit
def _of_layer(stacked: Shaped[Array, "L ..."], layer: Layer) -> Shaped[Array, "..."]:
    return stacked[layer]


def _write_weights(decoder: Decoder, folder: pathlib.Path, max_shard_bytes: int) -> None:
    """Writes the weights shard by shard; no more than one shard is held on the host."""
    _, parameters = _parameters(decoder)
    rows = {row.name: row for row in _rows(decoder.config, parameters)}
    itemsize = decoder.dtype.itemsize
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        rows,
        get_storage_size=lambda row: row.size * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )

    def values(row: Row) -> np.ndarray:
        arrays = [parameters[path][...] for path in row.paths]
        return row.join(
            [numbers_on_host(a if row.layer is None else _of_layer(a, row.layer)) for a in arrays]
        )

    for file, names in plan.filename_to_tensors.items():
        # safetensors lets only the user read what it writes; others may as the umask says.
        (folder / file).touch()
        mode = (folder / file).stat().st_mode
        # transformers reads only files that are marked as written for torch.
        safetensors.numpy.save_file(
            {name: values(rows[name]) for name in names}, folder / file, {"format": "pt"}
        )
        (folder / file).chmod(mode)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / INDEX, index)
