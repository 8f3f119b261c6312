"""Qwen2 and Qwen2.5, without experts or vision (transformers.Qwen2ForCausalLM).

Llama with biases on query, key and value, and a sliding window on some layers.
"""

from collections.abc import Mapping

from models.families import llama

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"

FIXED = {"qkv_bias": True, "output_bias": False, "mlp_bias": False}
# transformers reads head_dim where config.json has it, though its class does not declare it.
FIELDS = {field: name for field, name in llama.FIELDS.items() if field not in FIXED}
WINDOW_ATTRIBUTES = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

WEIGHTS = llama.WEIGHTS


def windows(attributes: Mapping) -> tuple[int | None, ...]:
    """Sliding window of each layer, from `layer_types`.

    transformers derives `layer_types` from the other attributes where config.json has none, and
    sets `sliding_window` to None unless `use_sliding_window`.
    """
    window = attributes["sliding_window"]
    of_type = {"full_attention": None, "sliding_attention": window}
    unknown = set(attributes["layer_types"]) - of_type.keys()
    if unknown:
        raise ValueError(
            f"layer_types has {', '.join(sorted(unknown))}; supported: {', '.join(of_type)}"
        )
    if "sliding_attention" in attributes["layer_types"] and not window:
        raise ValueError(
            f"layer_types has sliding_attention, but sliding_window = {window!r} "
            f"and use_sliding_window = {attributes['use_sliding_window']!r}"
        )
    return tuple(of_type[layer_type] for layer_type in attributes["layer_types"])


def window_attributes(windows: tuple[int | None, ...]) -> dict:
    """The inverse of `windows`, as far as there is one: all windows are of the same size."""
    first = next((layer for layer, window in enumerate(windows) if window), len(windows))
    window = windows[first] if first < len(windows) else None
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }
