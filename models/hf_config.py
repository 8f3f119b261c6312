"""The translation of a decoder's shape from and to a Hugging Face config.

It understands every attribute or refuses: an attribute that nobody looked at may well change what
the model computes. What differs between families is data in `models.families`.
"""

import dataclasses
import functools
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import transformers
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models import families
from models.config import ACTIVATIONS, DTYPES, DecoderConfig, Rotary, check_above
from models.families.family import FULL, SLIDING, Family, RotaryAttributes

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

# Why an attribute may have any value, and the attributes of which it is so. (Parameters of
# generation, which old checkpoints keep in config.json, are removed by transformers itself.)
HARMLESS_BY_REASON = {
    "acts in training alone": {
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "dropout",
        "embd_pdrop",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "initializer_factor",
        "initializer_range",
        "line_by_line",
        "neftune_noise_alpha",
        "resid_pdrop",
        "use_deepspeed_checkpointing",
    },
    "names tokens, or tells of the tokenizer; programs ask the tokenizer itself": {
        "bos_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "mask_token_id",
        "model_max_length",
        "pad_token_id",
        "sep_token_id",
        "tokenizer_class",
        "unk_token_id",
    },
    "is about what else a run returns or keeps, or how fast it is": {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "cache_implementation",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "pretraining_tp",
        "return_dict",
        "tie_last_hidden_states",
        "torchscript",
        "use_bfloat16",
        "use_cache",
        "use_flash_attention",
        "use_return_dict",
        "use_sdpa",
    },
    "tells how long training's texts were, not how long a run may be": {
        "max_sequence_length",
        "seq_length",
    },
    "tells who wrote the checkpoint and what for; all that is read here are decoders": {
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "auto_map",
        "custom_pipeline",
        "custom_pipelines",
        "is_decoder",
        "is_llama_config",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
    },
    "is for models of other tasks, which have a head of their own": {
        "_num_labels",
        "classifier_dropout",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
    },
}
HARMLESS = frozenset().union(*HARMLESS_BY_REASON.values())

# Attributes that change what is computed, by transformers or by another program that the checkpoint
# was made with. This is the value for which it is as here.
ONLY_AT = {
    "add_cross_attention": False,
    "is_causal": True,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}

# transformers makes a list of the layers: a damaged number would fill the memory.
MOST_LAYERS = 10_000

# Attributes that every family reads; and other names of them, from which transformers takes them.
_READ = {"dtype", "model_type", "rope_parameters"}
_OTHER_NAMES = {
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "torch_dtype",
}


def read(attributes: Mapping, ignored: Collection[str] = ()) -> DecoderConfig:
    """Translates what a config.json holds.

    A key at null is as good as absent, unless transformers gives null a meaning of its own (a
    `sliding_window` of null is none, whatever the family's default).

    Args:
        attributes: its content.
        ignored: as in `from_hf`.

    Raises:
        ValueError: as `from_hf`; transformers' classes, whose checks of values are not complete,
            may raise others.
    """
    _refuse_unsupported(attributes)
    model_type = attributes["model_type"]
    for name in ("num_hidden_layers", families.get(model_type).fields["num_layers"]):
        layers = attributes.get(name)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(f"{name} = {layers}: more layers than the {MOST_LAYERS} that are read")
    config_class = type(transformers.AutoConfig.for_model(model_type))
    # Some of their annotations are texts.
    may_be_null = {f.name for f in dataclasses.fields(config_class) if "None" in str(f.type)}
    given = {
        name: value
        for name, value in attributes.items()
        if name not in HARMLESS | {"model_type"} and (value is not None or name in may_be_null)
    }
    return from_hf(transformers.AutoConfig.for_model(model_type, **given), ignored)


def from_hf(
    hf_config: transformers.PreTrainedConfig, ignored: Collection[str] = ()
) -> DecoderConfig:
    """Translates a Hugging Face config.

    Args:
        hf_config: the config.
        ignored: attributes that are accepted though nobody has looked at what they mean.

    Raises:
        ValueError: naming the attribute and its value, if it describes a model that is not
            supported or is not understood.
    """
    attributes = hf_config.to_dict()
    _refuse_unsupported(attributes)
    family = families.get(hf_config.model_type)
    _refuse_unknown(hf_config, attributes, family, ignored)

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
        **fields | _positions(attributes, family, fields["max_positions"], ignored),
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


def _refuse_unsupported(attributes: Mapping) -> None:
    """Raises ValueError if the attributes of config.json are those of an unsupported model."""
    model_type = attributes.get("model_type")
    quantisation = attributes.get("quantization_config")
    if quantisation:
        named = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
        raise ValueError(
            f"the weights are quantised ({named or 'by an unknown method'}; quantization_config): "
            "their rounding is not that of the model which was trained, and effects would be of "
            "both; take the checkpoint that it was made from, or dequantise it"
        )
    for name, kind in UNSUPPORTED.items():
        if attributes.get(name):
            raise ValueError(f"model_type {model_type!r} is {kind} ({name}): not supported")
    families.get(model_type)


def _refuse_unknown(
    hf_config: transformers.PreTrainedConfig,
    attributes: Mapping,
    family: Family,
    ignored: Collection[str],
) -> None:
    """Raises ValueError at the first attribute whose meaning nobody has looked at.

    One that is off (null, false, 0 or empty) has none, unless transformers declares it.
    """
    parameters = attributes.get("rope_parameters") or {}
    # In some families transformers reads only one of their names, and leaves the other as it is.
    copied = {name: parameters[name] for name in parameters.keys() & _OTHER_NAMES}
    required = {**ONLY_AT, **family.only_at, **copied}
    understood = {*family.fields.values(), *family.windows.understood(attributes), *_READ}
    taken = _OTHER_NAMES - attributes.keys()
    known = understood | taken | required.keys() | UNSUPPORTED.keys()
    for name in sorted(ignored):
        if name in known | {"quantization_config"}:
            raise ValueError(
                f"ignore_config: {name} cannot be ignored: it is known to say what the model "
                "computes"
            )
    # At its default, an attribute that transformers declares is how the family is computed.
    declared = {f.name: f.default for f in dataclasses.fields(hf_config)}
    harmless = HARMLESS | family.harmless | set(ignored)
    for name in sorted(attributes.keys() - understood - harmless):
        value = attributes[name]
        usual = required.get(name, declared.get(name))
        if value != usual and (value or usual):
            way_out = (
                f": it would be computed as for {usual!r}" if name in required else _way_out(name)
            )
            raise ValueError(
                f"attribute {name} = {reprlib.repr(value)} is not understood for model_type "
                f"{family.model_type!r}{way_out}"
            )


@functools.cache
def _of_other_models() -> dict[str, list[str]]:
    """The attributes that transformers' decoders declare beyond what every config has, each with
    the model types that do. That takes a second: it is for messages."""
    everywhere = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    found: dict[str, list[str]] = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type in transformers.CONFIG_MAPPING:
            declared = dataclasses.fields(transformers.CONFIG_MAPPING[model_type])
            for name in {field.name for field in declared} - everywhere:
                found.setdefault(name, []).append(model_type)
    return found


def _way_out(name: str) -> str:
    """The way out, where an attribute is refused for nothing but that it is unknown: to ignore it,
    unless there are models that compute by it."""
    _, inside, parameter = name.partition("rope_parameters.")
    if inside and parameter in RopeParameters.__annotations__:
        return "; it changes what another rope_type computes: is that the one of this model?"
    if kinds := _of_other_models().get(name):
        return (
            f"; it changes what models of type {', '.join(kinds[:3])} compute: is that the "
            "model_type of this one?"
        )
    return (
        "; where it does not change what the model computes, have it ignored: "
        f"--ignore_config={name}, or from Python ignore_config=({name!r},)"
    )


def _positions(
    attributes: Mapping, family: Family, max_positions: int, ignored: Collection[str]
) -> dict:
    """The fields of a DecoderConfig that say how positions are embedded."""
    if family.rotary is None:
        return {"rotary": None}
    parameters = attributes["rope_parameters"]
    by_field = {"rotary": parameters}
    if family.rotary.by_layer_type:
        by_field = {"rotary": parameters[FULL], "window_rotary": parameters[SLIDING]}
    found: dict[str, Any] = {field: _rotary(of, family, ignored) for field, of in by_field.items()}
    rotary = found["rotary"]
    if rotary.kind == "longrope":
        # Beyond the original context transformers changes the frequencies of all positions as soon
        # as a run is that long: no prefix of a run would be a run.
        found["rotary"] = dataclasses.replace(rotary, stretched_max_positions=max_positions)
        found["max_positions"] = rotary.original_max_positions
    return found


def _rotary(parameters: Mapping, family: Family, ignored: Collection[str]) -> Rotary:
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
        name = f"rope_parameters.{key}"
        harmless = not given[key] or (key, given[key]) == ("partial_rotary_factor", 1.0)
        if not harmless and name not in ignored:
            raise ValueError(
                f"rope_parameters: {key} = {given[key]!r} is not understood for rope_type {kind!r} "
                f"of model_type {family.model_type!r}{_way_out(name)}"
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
        by_type = {FULL: rotary, SLIDING: sliding}
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
