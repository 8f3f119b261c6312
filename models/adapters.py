"""LoRA adapters in peft's format: what one does to which weight of a model.

    W' = W + scale B A        scale: alpha / r, or alpha / sqrt(r) where use_rslora says so

A folder has `adapter_config.json`, which says which modules are adapted and how strongly, and
`adapter_model.safetensors`, which holds A and B of each. The meaning of both is that of peft's
`merge_and_unload`; an option that changes the sum in another way is refused by name. Nothing is
read here but the config: `models.checkpoint` reads the tensors, and merges them as it loads.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmed.files import reading
from models.errors import InputError
from models.weights import Row

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Begins the names of all tensors: peft's wrapper, and its tuner.
_PREFIX = "base_model.model."
_OF_LINEAR = (".lora_A.weight", ".lora_B.weight")
_OF_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_FACTOR = re.compile(r"(.+)(\.lora_[AB]\.weight|\.lora_embedding_[AB])")
# By the last word of a parameter's name, what a tensor is to peft; norms and biases are nothing.
_KINDS = {
    "kernel": "linear",
    "unembedding": "head",
    "embedding": "embedding",
    "positions": "embedding",
}

# What `_Config` reads.
_UNDERSTOOD = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
# What says nothing of merged weights: how it was trained, and by what.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # of tied embeddings, which are refused in any case
    "eva_config",
    "fan_in_fan_out",  # follows from the module, which peft goes by too
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # of use_qalora, which is refused
    "revision",
    "runtime_config",
    "task_type",
}
# The others (pissa, olora, corda, loftq, lora_ga) change the base weights before they are trained.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# What a refused option is, where its name does not say it.
_CALLED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a bias of B",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "LoRA of single parameters",
    "layer_replication": "a model with repeated layers",
    "trainable_token_indices": "new embeddings of some tokens",
}


class AdapterError(InputError):
    """An adapter that cannot be merged; says which file, option or tensor, and the way out."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of a checkpoint.

    Attributes:
        replacement: name of the adapter's tensor that takes its place; None if none does.
        factors: names of the adapter's A [r, ...] and B [..., r]; None without a LoRA.
        scale: what B A is multiplied by before it is added.
        turned: whether the tensor is stored as the transpose of B A.
    """

    replacement: str | None = None
    factors: tuple[str, str] | None = None
    scale: float = 0.0
    turned: bool = False


def is_in(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def base_model(folder: pathlib.Path) -> str:
    """The model that an adapter says it was trained on; "" where it does not say."""
    return str(_attributes(folder / CONFIG).get("base_model_name_or_path") or "")


def changes(
    folder: pathlib.Path, rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Change]:
    """What an adapter does to a model's weights.

    Args:
        folder: the adapter's.
        rows: the tensors of the model, with their full names.
        shapes: of the adapter's tensors, by their names.

    Returns:
        By name of a row, what becomes of it; nothing of those that stay.

    Raises:
        AdapterError: the adapter is no LoRA that can be merged, or not one of this model.
    """
    file = folder / CONFIG
    attributes = _attributes(file)
    try:
        config = _Config.of(attributes)
        named = _named(rows, shapes)
        modules = {n.removesuffix(".weight"): row for n, row in named.items() if _kind(row)}
        targeted = {name for name, row in modules.items() if config.targets(name, _kind(row))}
    except (ValueError, TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise AdapterError(f"{file}: {error}") from error
    weights = folder / WEIGHTS
    whole = _whole(weights, named, shapes)
    _check_saved(file, config, whole)
    found = {named[name].name: Change(stored) for name, stored in whole.items()}
    _check_targeted(weights, modules, targeted, shapes)
    for module in targeted:
        row = modules[module]
        lora = _lora(weights, module, row, config, shapes)
        found[row.name] = dataclasses.replace(found.get(row.name, Change()), **lora)
    if not found:
        raise AdapterError(f"{file}: target_modules names no module of this model")
    _check_tied(file, rows, found)
    return found


def _named(rows: Iterable[Row], shapes: Iterable[str]) -> dict[str, Row]:
    """The tensors by the names that the adapter has for them.

    Since version 5 transformers calls every unembedding lm_head, GPT-NeoX's embed_out too.
    """
    newer = any(name.startswith(f"{_PREFIX}lm_head.") for name in shapes)
    return {"lm_head.weight" if newer and _kind(row) == "head" else row.name: row for row in rows}


def _lora(
    weights: pathlib.Path,
    module: str,
    row: Row,
    config: "_Config",
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The fields of `Change` that say what is added to a module's weight."""
    first, second = _factors(module, row)
    # torch's Linear is stored with its outputs first, as B A is; Conv1D and embeddings are not.
    turned = _kind(row) == "embedding" or (_kind(row) == "linear" and not row.transposed)
    outputs, inputs = row.shape[::-1] if turned else row.shape
    rank = config.rank(module)
    for name, shape in ((first, (rank, inputs)), (second, (outputs, rank))):
        if shapes[name] != shape:
            raise AdapterError(
                f"{weights}: {name} has shape {list(shapes[name])}, but the model and the rank in "
                f"{CONFIG} ask for {list(shape)}; it is an adapter of another model, or the two "
                "files are not of one adapter"
            )
    return {"factors": (first, second), "scale": config.scale(module), "turned": turned}


def _whole(weights: pathlib.Path, names: Iterable[str], shapes: Iterable[str]) -> dict[str, str]:
    """Tensors of the model that the adapter holds whole, and what it calls them."""
    found = {}
    for stored in shapes:
        if _FACTOR.fullmatch(stored):
            continue
        # An embedding that has a LoRA as well is kept under its wrapper's name.
        name = stored.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if not stored.startswith(_PREFIX) or name not in names:
            raise AdapterError(
                f"{weights}: {stored} is neither A or B of a LoRA nor a weight that this model has "
                "of its own; it is an adapter of another kind, or of another model"
            )
        found[name] = stored
    return found


def _check_saved(file: pathlib.Path, config: "_Config", replaced: Iterable[str]) -> None:
    """Refuses an adapter that lacks a module which it says it holds whole."""
    for module in config.saved:
        if not any(f".{module}." in f".{name}" for name in replaced):
            raise AdapterError(
                f"{file}: modules_to_save names {module}, but {WEIGHTS} holds no weight of it that "
                "this model has"
            )


def _check_targeted(
    weights: pathlib.Path,
    modules: Mapping[str, Row],
    targeted: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuses an adapter whose two files do not speak of the same modules."""
    wanted = {name for module in targeted for name in _factors(module, modules[module])}
    held = {name for name in shapes if _FACTOR.fullmatch(name)}
    if held - wanted:
        raise AdapterError(
            f"{weights}: {min(held - wanted)} belongs to no module of this model that {CONFIG} "
            "targets; it is an adapter of another model, or the two files are not of one adapter"
        )
    if wanted - held:
        raise AdapterError(
            f"{weights}: {min(wanted - held)} is missing, though {CONFIG} targets its module; the "
            "file is incomplete: save the adapter again"
        )


def _check_tied(file: pathlib.Path, rows: Iterable[Row], changed: Iterable[str]) -> None:
    """Refuses a change of an embedding that is the unembedding too.

    While it is trained only the embedding has the LoRA; once merged, both have it.
    """
    names = {_kind(row): row.name for row in rows if row.paths[0] != ("positions",)}
    if "head" not in names and names["embedding"] in changed:
        raise AdapterError(
            f"{file}: changes {names['embedding']}, which this model ties to its unembedding: "
            "merged, both would change, which is not what was trained. Merge it with peft into a "
            "model with tie_word_embeddings false, and save that"
        )


def _factors(module: str, row: Row) -> tuple[str, str]:
    """Names of A and B of a module."""
    first, second = _OF_EMBEDDING if _kind(row) == "embedding" else _OF_LINEAR
    return _PREFIX + module + first, _PREFIX + module + second


def _kind(row: Row) -> str:
    """What peft sees in the module of a tensor; "" where it is nothing that can be adapted."""
    return _KINDS.get(row.paths[0][-1], "")


@dataclasses.dataclass(frozen=True)
class _Config:
    """`adapter_config.json`, as far as merged weights depend on it; its names are peft's.

    Attributes:
        target, exclude: a regex of whole names of modules, or ends of names.
        saved: names of modules that the adapter holds whole.
        layers, layers_pattern: which layers are adapted, and what the list of layers is called.
        r, alpha: of modules that no pattern names.
        ranks, alphas: those of modules by regex of the end of a name; the first that matches.
        stabilised: whether the scale is alpha / sqrt(r).
    """

    target: str | list[str]
    exclude: str | list[str]
    saved: list[str]
    layers: list[int]
    layers_pattern: list[str]
    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    stabilised: bool

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> "_Config":
        """Reads the options; ValueError names one that cannot be merged."""
        kind = attributes.get("peft_type")
        if kind != "LORA":
            raise ValueError(
                f"peft_type = {kind!r}: only LoRA is merged; merge it with peft, and save the model"
            )
        _refuse_others(attributes)
        target = attributes.get("target_modules")
        if not target:
            raise ValueError(f"target_modules = {target!r}: must name the adapted modules")
        layers = attributes.get("layers_to_transform")
        if isinstance(target, str) and layers is not None:
            raise ValueError("layers_to_transform and a regex in target_modules exclude each other")
        pattern = attributes.get("layers_pattern") or []
        return cls(
            target=target,
            exclude=attributes.get("exclude_modules") or [],
            saved=list(attributes.get("modules_to_save") or []),
            layers=[layers] if isinstance(layers, int) else list(layers or []),
            layers_pattern=[pattern] if isinstance(pattern, str) else list(pattern),
            r=_positive("r", attributes.get("r", 8)),
            alpha=_number("lora_alpha", attributes.get("lora_alpha", 8)),
            ranks={
                _regex(pattern): _positive("rank_pattern", rank)
                for pattern, rank in (attributes.get("rank_pattern") or {}).items()
            },
            alphas={
                _regex(pattern): _number("alpha_pattern", alpha)
                for pattern, alpha in (attributes.get("alpha_pattern") or {}).items()
            },
            stabilised=bool(attributes.get("use_rslora")),
        )

    def targets(self, module: str, kind: str) -> bool:
        """Whether a module is adapted, by peft's rules."""
        if _is_one_of(self.exclude, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if self.target == "all-linear":
            return kind == "linear"
        return _is_one_of(self.target, module) and self._is_of_layers(module)

    def rank(self, module: str) -> int:
        """r of a module."""
        return self.ranks.get(_pattern_of(self.ranks, module), self.r)

    def scale(self, module: str) -> float:
        """What B A of a module is multiplied by."""
        alpha = self.alphas.get(_pattern_of(self.alphas, module), self.alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def _is_of_layers(self, module: str) -> bool:
        """Whether a module is in a layer that is adapted: all are, unless some are named."""
        if not self.layers:
            return True
        # The first number in a name is that of the layer.
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(pattern, module):
                return int(match[1]) in self.layers
        return False


def _refuse_others(attributes: Mapping[str, Any]) -> None:
    """Raises ValueError at the first option that changes the sum, or whose meaning is unknown."""
    bias = attributes.get("bias", "none")
    if bias not in ("none", None):
        raise ValueError(
            f"bias = {bias!r}: trained biases are not merged; merge it with peft, and save the "
            "model"
        )
    start = attributes.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights = {start!r}: it was trained on base weights that this changed; "
            "convert it with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name in sorted(attributes.keys() - _UNDERSTOOD - _HARMLESS):
        if attributes[name]:
            called = f" ({_CALLED[name]})" if name in _CALLED else ""
            raise ValueError(
                f"{name} = {attributes[name]!r}{called} is no plain LoRA, and is not merged; merge "
                "it with peft, and save the model"
            )


def _is_one_of(names: str | list[str], module: str) -> bool:
    """Whether a regex is of the module's whole name, or one of several ends it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_of(patterns: Iterable[str], module: str) -> str:
    """The first pattern that a module's name ends with; "" if there is none."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), "")


def _regex(pattern: str) -> str:
    """The pattern, if it is one; re.error if not."""
    re.compile(f"(.*\\.)?({pattern})$")
    return pattern


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r}: a rank is a whole number above 0")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r}: must be a number")
    return float(value)


def _attributes(file: pathlib.Path) -> dict[str, Any]:
    return reading.object_in(file, AdapterError, "; download it again")
