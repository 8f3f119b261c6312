"""What a family of models has to say of itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

Windows = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, or one of every layer.

    Attributes:
        tensor: its name; `{layer}` stands for the index of the layer.
        parameters: the parameters that it holds, dotted; several are joined along their outputs,
            which are a parameter's last axis.
        transposed: whether it is stored with its outputs first, as torch's Linear is.
        by_head: whether parameters are joined head by head (q0 k0 v0 q1 k1 v1 ...), and not as
            wholes (q k v).
    """

    tensor: str
    parameters: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False


def plain(tensor: str, parameter: str) -> tuple[Weight, ...]:
    """A tensor that is a parameter."""
    return (Weight(tensor, (parameter,)),)


def norm(tensor: str, module: str) -> tuple[Weight, ...]:
    """Weight and bias of a norm."""
    return tuple(Weight(f"{tensor}.{name}", (f"{module}.{name}",)) for name in ("weight", "bias"))


def linear(
    tensor: str, *modules: str, transposed: bool = True, by_head: bool = False
) -> tuple[Weight, ...]:
    """Weight and bias of a linear map, or of several that are stored as one."""
    kernels = tuple(f"{module}.kernel" for module in modules)
    biases = tuple(f"{module}.bias" for module in modules)
    return (
        Weight(f"{tensor}.weight", kernels, transposed, by_head),
        Weight(f"{tensor}.bias", biases, by_head=by_head),
    )


# transformers' names of types of layers.
FULL, SLIDING = "full_attention", "sliding_attention"


class NoWindows:
    """All layers have full attention."""

    def understood(self, attributes: Mapping) -> set[str]:
        """The attributes of a Hugging Face config that say what `read` makes of them."""
        found = {"use_sliding_window", "max_window_layers"}
        if set(attributes.get("layer_types") or ()) <= {FULL}:
            found.add("layer_types")
        if attributes.get("use_sliding_window") is False:
            found.add("sliding_window")
        return found

    def read(self, attributes: Mapping, layers: int) -> Windows:
        """Sliding window of each layer, from the attributes of a Hugging Face config.

        Raises:
            ValueError: they contradict each other.
        """
        return (None,) * layers

    def write(self, windows: Windows) -> dict:
        """The inverse of `read`, as far as there is one."""
        return {}


class OneWindow(NoWindows):
    """All layers have the same window, or none has."""

    def understood(self, attributes):
        """The window; types of layers that agree; a flag, which transformers does not read."""
        window = attributes["sliding_window"]
        found = {"sliding_window", "use_sliding_window"}
        if set(attributes.get("layer_types") or ()) <= {SLIDING if window else FULL}:
            found.add("layer_types")
        return found if window else found | {"max_window_layers"}

    def read(self, attributes, layers):
        """The one window, for every layer."""
        window = attributes["sliding_window"]
        if window is not None:
            _refuse_unread_flag(attributes)
        return (window,) * layers

    def write(self, windows):
        """The first layer's, which is every layer's."""
        return {"sliding_window": windows[0]}


class WindowsByType(NoWindows):
    """`layer_types` says which layers have the window.

    transformers derives `layer_types` from other attributes where config.json has none.

    Attributes:
        deriving: the attributes that it is derived from.
    """

    def __init__(self, *deriving: str):
        self.deriving = deriving

    def understood(self, attributes):
        """The window, the types, and what they are derived from."""
        found = {"sliding_window", "layer_types", "use_sliding_window", *self.deriving}
        # What the first Gemma 2 called its window.
        if attributes.get("sliding_window_size") == attributes["sliding_window"]:
            found.add("sliding_window_size")
        return found

    def read(self, attributes, layers):
        """The window of each layer by its type; `ValueError` where the types cannot be had."""
        window, types = attributes["sliding_window"], attributes["layer_types"]
        of_type = {FULL: None, SLIDING: window}
        unknown = set(types) - of_type.keys()
        if unknown:
            raise ValueError(
                f"layer_types has {', '.join(sorted(unknown))}; supported: {', '.join(of_type)}"
            )
        if SLIDING in types and not window:
            given = [f"{name} = {attributes.get(name)!r}" for name in self.deriving]
            raise ValueError(
                f"layer_types has {SLIDING}, but "
                + " and ".join([f"sliding_window = {window!r}", *given])
            )
        if SLIDING in types:
            _refuse_unread_flag(attributes)
        return tuple(of_type[layer_type] for layer_type in types)

    def write(self, windows):
        """Each layer's type, and the window if any layer has it."""
        window = next(filter(None, windows), None)
        types = [SLIDING if w else FULL for w in windows]
        return {"layer_types": types} | ({"sliding_window": window} if window else {})


class WindowsFromLayer(WindowsByType):
    """As `WindowsByType`, derived from a flag and the first layer that has the window.

    transformers sets `sliding_window` to None where the flag is not set.
    """

    def __init__(self):
        super().__init__("use_sliding_window", "max_window_layers")

    def write(self, windows):
        """As of types, with the flag and the first layer that they are derived from."""
        first = next((layer for layer, window in enumerate(windows) if window), len(windows))
        flag = {"use_sliding_window": first < len(windows), "max_window_layers": first}
        return super().write(windows) | flag


def _refuse_unread_flag(attributes: Mapping) -> None:
    """Raises ValueError where there is a window, but a flag that is said not to be used.

    transformers reads the flag in some families alone, and gives the others their window.
    """
    if attributes.get("use_sliding_window") is False:
        raise ValueError(
            f"sliding_window = {attributes['sliding_window']!r} contradicts use_sliding_window = "
            "False, which transformers does not read in this family; set sliding_window to null if "
            "the model has no window, or take use_sliding_window out"
        )


@dataclasses.dataclass(frozen=True)
class RotaryAttributes:
    """What a family's `rope_parameters` may say beside the kind of the embedding.

    Attributes:
        partial: whether `partial_rotary_factor` is read.
        by_layer_type: whether there is one set of parameters for each type of layer.
        older_base, older_fraction: what transformers 4 calls `rope_theta` and
            `partial_rotary_factor`, which stand beside its `rope_scaling`.
        older_kind: what it calls `rope_type` in there.
    """

    partial: bool = False
    by_layer_type: bool = False
    older_base: str = "rope_theta"
    older_fraction: str = "partial_rotary_factor"
    older_kind: str = "rope_type"


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of a family are read.

    Attributes:
        model_type: Hugging Face's `model_type`.
        architecture: name of the transformers class, written into exported checkpoints.
        fields: field of DecoderConfig -> attribute of the HF config.
        fixed: fields of DecoderConfig that the family always has.
        weights: the tensors of a checkpoint, and the parameters that they hold.
        windows: how the HF config says which layers have a sliding window.
        rotary: what it may say of the rotary embedding; None if there is none.
        harmless: attributes of this family alone that its forward pass does not read.
        only_at: attributes that published checkpoints carry for other programs, and the value for
            which these compute the same.
        base_prefix: begins the names of most tensors; checkpoints of the bare model lack it.
        ignored: patterns of names of tensors that are no weights: they follow from the config.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    weights: tuple[Weight, ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: NoWindows = dataclasses.field(default_factory=NoWindows)
    rotary: RotaryAttributes | None = RotaryAttributes()
    harmless: frozenset[str] = frozenset()
    only_at: Mapping[str, object] = dataclasses.field(default_factory=dict)
    base_prefix: str = "model."
    ignored: tuple[str, ...] = (r"\brotary_emb\.inv_freq$",)
