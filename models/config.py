"""The shape of a decoder, and its translation from and to a Hugging Face config.

The translation understands every attribute or refuses: an attribute that nobody looked at may well
change what the model computes. What differs between families is data in `models.families`.
"""

import dataclasses
from collections.abc import Mapping

import transformers

from models import families


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding.

    Attributes:
        theta: the base of the frequencies.
        kind: "default", "linear" (positions divided by `factor`) or "llama3" (the slow frequencies
            divided by `factor`).
        factor: how far the context was stretched.
        low_freq_factor, high_freq_factor: "llama3" only; turns within the original context below
            which a frequency is divided by `factor`, and above which it is kept.
        original_max_positions: "llama3" only; length of the context before it was stretched.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        family: Hugging Face's `model_type`.
        vocab_size, hidden_size, intermediate_size, num_layers: sizes.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, size of each.
        norm_eps: added to the mean square in every norm.
        max_positions: the longest sequence that the model was made for.
        rotary: position embedding.
        qkv_bias, output_bias, mlp_bias: whether these projections have a bias.
        activation: of the MLP's gate; "silu".
        windows: sliding window of each layer, None for full attention; key j is visible to query i
            iff i - window < j <= i.
        tie_embeddings: whether the unembedding is the embedding.
        dtype: of the checkpoint's parameters; float16, bfloat16, float32 or float64.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rotary: Rotary
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str
    windows: tuple[int | None, ...]
    tie_embeddings: bool
    dtype: str

    def __post_init__(self):
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*sizes, "num_kv_heads", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} is odd; the rotary embedding needs pairs")


ACTIVATIONS = ("silu",)
DTYPES = ("float16", "bfloat16", "float32", "float64")

# rope_type -> what it needs: a field of Rotary <- a key of the HF config's rope_parameters.
_LINEAR = {"theta": "rope_theta", "factor": "factor"}
ROTARY_KINDS = {
    "default": {"theta": "rope_theta"},
    "linear": _LINEAR,
    "llama3": _LINEAR
    | {
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
}

# Attributes that mark a kind of model which no family computes, and what it is called.
UNSUPPORTED = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "text_config": "a multimodal model",
    "vision_config": "a multimodal model",
    "audio_config": "a multimodal model",
    "quantization_config": "a quantised model",
    "per_layer_config": "a model whose layers differ in shape",
    "is_encoder_decoder": "an encoder-decoder",
}

# Attributes that no family's forward pass reads outside training. (Parameters of generation, which
# old checkpoints keep in config.json, are removed by transformers itself.)
HARMLESS = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_sequence_length",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tie_last_hidden_states",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}

# Attributes that transformers neither declares nor reads, but which published checkpoints carry;
# they tell other programs how the model is computed. This is the value for which it is as here.
STRAY = {"is_llama_config": True, "rope_interleaved": False, "use_mrope": False}


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

    fields = {field: attributes.get(name) for field, name in family.FIELDS.items()}
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_heads"]
    if fields["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"{family.FIELDS['activation']} = {fields['activation']!r} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    # transformers' own default, where config.json does not say.
    dtype = attributes["dtype"] or "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    return DecoderConfig(
        family=family.MODEL_TYPE,
        rotary=_rotary(attributes["rope_parameters"]),
        windows=family.windows(attributes),
        dtype=dtype,
        **family.FIXED,
        **fields,
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
    rotary_keys = ROTARY_KINDS[config.rotary.kind]
    hf_config = transformers.AutoConfig.for_model(
        config.family,
        architectures=[family.ARCHITECTURE],
        rope_parameters={"rope_type": config.rotary.kind}
        | {key: getattr(config.rotary, field) for field, key in rotary_keys.items()},
        dtype=config.dtype,
        **{name: getattr(config, field) for field, name in family.FIELDS.items()},
        **family.window_attributes(config.windows),
        **token_ids,
    )
    wanted, back = dataclasses.asdict(config), dataclasses.asdict(from_hf(hf_config))
    lost = [f"{field} = {wanted[field]!r}" for field in wanted if wanted[field] != back[field]]
    if lost:
        raise ValueError(f"a {config.family} checkpoint cannot express {', '.join(lost)}")
    return hf_config


def refuse_unsupported(attributes: Mapping) -> None:
    """Raises ValueError if the attributes of config.json are those of an unsupported model."""
    model_type = attributes.get("model_type")
    for name, kind in UNSUPPORTED.items():
        if attributes.get(name):
            raise ValueError(f"model_type {model_type!r} is {kind} ({name}): not supported")
    families.get(model_type)


def _refuse_unknown(hf_config, attributes: Mapping, family) -> None:
    """Raises ValueError at the first attribute whose meaning nobody has looked at."""
    understood = {*family.FIELDS.values(), *family.WINDOW_ATTRIBUTES, "rope_parameters", "dtype"}
    declared = {f.name: f.default for f in dataclasses.fields(hf_config)}
    # At its default, an attribute that transformers declares is how the family is computed.
    expected = STRAY | declared
    for name in sorted(attributes.keys() - understood - HARMLESS):
        value = attributes[name]
        if name not in expected or value != expected[name]:
            raise ValueError(
                f"attribute {name} = {value!r} is not understood for model_type "
                f"{family.MODEL_TYPE!r}; remove it from config.json only if it does not change "
                "what the model computes"
            )


def _rotary(parameters: Mapping) -> Rotary:
    kind = parameters["rope_type"]
    if kind not in ROTARY_KINDS:
        raise ValueError(
            f"rope_parameters: rope_type = {kind!r} is not supported; "
            f"supported: {', '.join(ROTARY_KINDS)}"
        )
    keys = ROTARY_KINDS[kind]
    # A key at None is as good as absent; "type" is the old name of rope_type.
    given = {key: value for key, value in parameters.items() if value is not None}
    for key in sorted(given.keys() - set(keys.values()) - {"rope_type", "type"}):
        if (key, given[key]) != ("partial_rotary_factor", 1.0):
            raise ValueError(
                f"rope_parameters: {key} = {given[key]!r} is not understood for rope_type {kind!r}"
            )
    for key in keys.values():
        if key not in given:
            raise ValueError(f"rope_parameters: rope_type {kind!r} needs {key}")
    return Rotary(kind=kind, **{field: given[key] for field, key in keys.items()})
