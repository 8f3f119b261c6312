"""The translation of a decoder's shape from and to a Hugging Face config.

It understands every attribute or refuses: an attribute that nobody looked at may well change what
the model computes. What differs between families is data in `models.families`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import transformers

from models import families
from models.config import ACTIVATIONS, DTYPES, DecoderConfig, Rotary, check_above
from models.families.family import Family, RotaryAttributes

# rope_type -> field of Rotary -> the key of the HF config's rope_parameters that holds it.
_DEFAULT = {"theta": "rope_theta"}
_LINEAR = _DEFAULT | {"factor": "factor"}
_ORIGINAL = {"original_max_positions": "original_max_position_embeddings"}
ROTARY_KINDS = {
    "default": _DEFAULT,
    "linear": _LINEAR,
    "llama3": _LINEAR
    | _ORIGINAL
    | {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "longrope": _DEFAULT
    | _ORIGINAL
    | {"short_factors": "short_factor", "long_factors": "long_factor"},
}
# What may be there too.
_OPTIONAL = {"longrope": {"factor": "factor", "attention_factor": "attention_factor"}}

# Attributes that mark a kind of model which no family computes, and what it is called.
UNSUPPORTED = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "text_config": "a multimodal model",
    "vision_config": "a multimodal model",
    "audio_config": "a multimodal model",
    "per_layer_config": "a model whose layers differ in shape",
    "is_encoder_decoder": "an encoder-decoder",
}

# Attributes that no family's forward pass reads outside training, or that transformers copies to
# where they are read. (Parameters of generation, which old checkpoints keep in config.json, are
# removed by transformers itself.)
HARMLESS = {
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "attention_dropout",
    "attn_pdrop",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "classifier_dropout",
    "embd_pdrop",
    "eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "label2id",
    "max_sequence_length",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "partial_rotary_factor",
    "pretraining_tp",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "task_specific_params",
    "tie_last_hidden_states",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}

# Attributes that transformers neither declares nor reads, but which published checkpoints carry;
# they tell other programs how the model is computed. This is the value for which it is as here.
STRAY = {
    "add_cross_attention": False,
    "is_llama_config": True,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}


def from_hf(hf_config: transformers.PreTrainedConfig) -> DecoderConfig:
    """Translates a Hugging Face config.

    Raises:
        ValueError: naming the attribute and its value, if it describes a model that is not
            supported or is not understood.
    """
    attributes = hf_config.to_dict()
    refuse_unsupported(attributes)
    family = families.get(hf_config.model_type)
    _refuse_unknown(hf_config, attributes, family)

    fields: dict[str, Any] = {field: attributes.get(name) for field, name in family.fields.items()}
    heads, width = fields["num_heads"], fields["hidden_size"]
    check_above(0, family.fields["num_heads"], heads)
    usual = {
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": 4 * width,
    }
    fields |= {field: size for field, size in usual.items() if fields.get(field) is None}
    if fields["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"{family.fields['activation']} = {fields['activation']!r} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    # transformers' own default, where config.json does not say.
    dtype = attributes["dtype"] or "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    return DecoderConfig(
        family=family.model_type,
        windows=family.windows.read(attributes, fields["num_layers"]),
        dtype=dtype,
        **family.fixed,
        **fields | _positions(attributes, family, fields["max_positions"]),
    )


def to_hf(config: DecoderConfig, **token_ids: int | None) -> transformers.PreTrainedConfig:
    """The Hugging Face config that `from_hf` translates into this one.

    Args:
        config: the shape of the model.
        **token_ids: `bos_token_id` and the like, which a DecoderConfig does not hold.

    Raises:
        ValueError: naming the fields, if the family's Hugging Face class cannot express them.
    """
    family = families.get(config.family)
    hf_config = transformers.AutoConfig.for_model(
        config.family,
        architectures=[family.architecture],
        dtype=config.dtype,
        **{name: getattr(config, field) for field, name in family.fields.items()}
        | _position_attributes(config, family),
        **family.windows.write(config.windows),
        **token_ids,
    )
    wanted, back = dataclasses.asdict(config), dataclasses.asdict(from_hf(hf_config))
    lost = [f"{field} = {wanted[field]!r}" for field in wanted if wanted[field] != back[field]]
    if lost:
        raise ValueError(f"a {config.family} checkpoint cannot express {', '.join(lost)}")
    return hf_config


def older_spelling(config: DecoderConfig) -> dict:
    """What `to_hf`'s attributes are called by transformers 4, where it has other names for them.

    Written beside them: it takes its class's defaults for what it does not find. transformers 5
    reads either.
    """
    found: dict[str, Any] = {"torch_dtype": config.dtype}
    named, rotary = families.get(config.family).rotary, config.rotary
    if rotary is None or named is None:
        return found
    found[named.older_base] = rotary.theta
    if named.by_layer_type:
        found["rope_local_base_freq"] = (config.window_rotary or rotary).theta
    if named.partial:
        found[named.older_fraction] = rotary.fraction
    found["rope_scaling"] = None
    if rotary.kind != "default":
        scaling = _rope_parameters(rotary, named)
        kind = scaling.pop("rope_type")
        # What stands beside it, and a stretched context's length, which does so already.
        beside = {"rope_theta", "partial_rotary_factor"}
        if rotary.kind == "longrope":
            beside |= set(_ORIGINAL.values())
        scaling = {key: value for key, value in scaling.items() if key not in beside}
        found["rope_scaling"] = {named.older_kind: kind} | scaling
    return found


def refuse_unsupported(attributes: Mapping) -> None:
    """Raises ValueError if the attributes of config.json are those of an unsupported model."""
    model_type = attributes.get("model_type")
    quantisation = attributes.get("quantization_config")
    if quantisation:
        method = dict(quantisation).get("quant_method", "by an unknown method")
        raise ValueError(
            f"the weights are quantised ({method}; quantization_config): their rounding is not "
            "that of the model which was trained, and effects would be of both; take the "
            "checkpoint that it was made from, or dequantise it"
        )
    for name, kind in UNSUPPORTED.items():
        if attributes.get(name):
            raise ValueError(f"model_type {model_type!r} is {kind} ({name}): not supported")
    families.get(model_type)


def _refuse_unknown(
    hf_config: transformers.PreTrainedConfig, attributes: Mapping, family: Family
) -> None:
    """Raises ValueError at the first attribute whose meaning nobody has looked at."""
    understood = {*family.fields.values(), *family.windows.attributes, "rope_parameters", "dtype"}
    declared = {f.name: f.default for f in dataclasses.fields(hf_config)}
    # At its default, an attribute that transformers declares is how the family is computed.
    expected = [{**STRAY, **family.stray}, declared]
    for name in sorted(attributes.keys() - understood - HARMLESS - family.harmless):
        value = attributes[name]
        if not any(name in values and value == values[name] for values in expected):
            raise ValueError(
                f"attribute {name} = {value!r} is not understood for model_type "
                f"{family.model_type!r}; remove it from config.json only if it does not change "
                "what the model computes"
            )


def _positions(attributes: Mapping, family: Family, max_positions: int) -> dict:
    """The fields of a DecoderConfig that say how positions are embedded."""
    if family.rotary is None:
        return {"rotary": None}
    parameters = attributes["rope_parameters"]
    by_field = {"rotary": parameters}
    if family.rotary.by_layer_type:
        by_field = {"rotary": parameters[_FULL], "window_rotary": parameters[_SLIDING]}
    found: dict[str, Any] = {field: _rotary(of, family) for field, of in by_field.items()}
    rotary = found["rotary"]
    if rotary.kind == "longrope":
        # Beyond the original context transformers changes the frequencies of all positions as soon
        # as a run is that long: no prefix of a run would be a run.
        found["rotary"] = dataclasses.replace(rotary, stretched_max_positions=max_positions)
        found["max_positions"] = rotary.original_max_positions
    return found


def _rotary(parameters: Mapping, family: Family) -> Rotary:
    kind = parameters["rope_type"]
    if kind not in ROTARY_KINDS:
        raise ValueError(
            f"rope_parameters: rope_type = {kind!r} is not supported; "
            f"supported: {', '.join(ROTARY_KINDS)}"
        )
    needed, optional = ROTARY_KINDS[kind], dict(_OPTIONAL.get(kind, {}))
    if family.rotary is not None and family.rotary.partial:
        optional["fraction"] = "partial_rotary_factor"
    # A key at None is as good as absent; "type" is the old name of rope_type.
    given = {key: value for key, value in parameters.items() if value is not None}
    understood = {*needed.values(), *optional.values(), "rope_type", "type"}
    for key in sorted(given.keys() - understood):
        if (key, given[key]) != ("partial_rotary_factor", 1.0):
            raise ValueError(
                f"rope_parameters: {key} = {given[key]!r} is not understood for rope_type {kind!r} "
                f"of model_type {family.model_type!r}"
            )
    for key in needed.values():
        if key not in given:
            raise ValueError(f"rope_parameters: rope_type {kind!r} needs {key}")
    check_above(0, needed["theta"], given[needed["theta"]])
    values: dict[str, Any] = {
        field: tuple(given[key]) if isinstance(given[key], list) else given[key]
        for field, key in (optional | needed).items()
        if key in given
    }
    return Rotary(kind=kind, **values)


def _position_attributes(config: DecoderConfig, family: Family) -> dict:
    """The inverse of `_positions`."""
    if config.rotary is None or family.rotary is None:
        return {}
    rotary = config.rotary
    if not family.rotary.by_layer_type:
        found: dict[str, Any] = {"rope_parameters": _rope_parameters(rotary, family.rotary)}
    else:
        sliding = config.window_rotary or rotary
        by_type = {_FULL: rotary, _SLIDING: sliding}
        found = {
            "rope_parameters": {
                name: _rope_parameters(of, family.rotary) for name, of in by_type.items()
            }
        }
    if rotary.kind == "longrope":
        found[family.fields["max_positions"]] = rotary.stretched_max_positions
        # Of transformers' two places for it, the one that it gives priority.
        found["original_max_position_embeddings"] = rotary.original_max_positions
    return found


def _rope_parameters(rotary: Rotary, named: RotaryAttributes) -> dict:
    keys = ROTARY_KINDS[rotary.kind] | _OPTIONAL.get(rotary.kind, {})
    values = {key: getattr(rotary, field) for field, key in keys.items()}
    if named.partial or rotary.fraction != 1:  # A fraction of 1 is not every class's default.
        values["partial_rotary_factor"] = rotary.fraction
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    given = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": rotary.kind} | given


# transformers' names of kinds of layers.
_FULL, _SLIDING = "full_attention", "sliding_attention"
