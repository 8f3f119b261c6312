"""Every attribute of a Hugging Face config is understood, or refused by its name."""

import dataclasses
import json

import pytest
import transformers

from models import config as config_lib
from models.config import Rotary
from tests import tiny

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def translate(family="llama", **attributes):
    return config_lib.from_hf(transformers.AutoConfig.for_model(family, **(SHAPE | attributes)))


def test_llama():
    config = translate(rms_norm_eps=1e-6, rope_theta=5e5, dtype="bfloat16")
    assert config == config_lib.DecoderConfig(
        family="llama",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=56,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-6,
        max_positions=64,
        rotary=Rotary(theta=5e5),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        activation="silu",
        windows=(None,) * 4,
        tie_embeddings=False,
        dtype="bfloat16",
    )
    assert hash(config) == hash(dataclasses.replace(config))


def test_llama_biases():
    config = translate(attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)


def test_qwen2_biases():
    config = translate("qwen2")
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_head_size(family):
    assert translate(family).head_dim == 8
    assert translate(family, head_dim=16).head_dim == 16


def test_dtype_defaults_to_that_of_transformers():
    assert translate().dtype == "float32"


@pytest.mark.parametrize(
    ("attributes", "windows"),
    [
        ({}, (None, None, None, None)),
        ({"sliding_window": 9, "max_window_layers": 1}, (None, None, None, None)),
        (
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
            (None, None, None, 9),
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (9, None, 9, None),
        ),
    ],
)
def test_windows(attributes, windows):
    assert translate("qwen2", **attributes).windows == windows


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"layer_types": ["sliding_attention"] * 4, "sliding_window": 9},
            "sliding_window = None and use_sliding_window = False",
        ),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types has chunked_attention"),
    ],
)
def test_windows_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        translate("qwen2", **attributes)


@pytest.mark.parametrize(
    ("parameters", "rotary"),
    [
        ({"rope_theta": 7.0}, Rotary(7.0)),
        ({"rope_theta": 7.0, "type": "linear", "factor": 2.0}, Rotary(7.0, "linear", 2.0)),
        (
            {
                "rope_theta": 7.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 16,
            },
            Rotary(7.0, "llama3", 8.0, 1.5, 3.0, 16),
        ),
    ],
)
def test_rotary(parameters, rotary):
    assert translate(rope_parameters=dict(parameters)).rotary == rotary


def test_rotary_as_transformers_4_wrote_it():
    config = translate(rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rotary == Rotary(7.0, "linear", 2.0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type = 'yarn' is not supported"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic' is not supported"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            "rope_type = 'longrope' is not supported",
        ),
        ({"rope_type": "linear", "factor": None}, "rope_type 'linear' needs factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not understood"),
        (
            {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5},
            "attention_factor = 1.5 is not understood for rope_type 'linear'",
        ),
    ],
)
def test_rotary_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        translate(rope_parameters={"rope_theta": 7.0, **parameters})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_scale", 0.5),
        ("sliding_window", 4),
        ("original_max_position_embeddings", 32),
        ("rope_interleaved", True),
        ("is_llama_config", False),
        ("use_mrope", True),
        ("chunk_size_feed_forward", 2),
        ("layer_types", ["full_attention"] * 4),
        ("unheard_of", None),
    ],
)
def test_unknown_attribute_refused(name, value):
    with pytest.raises(ValueError, match=f"attribute {name} = .* is not understood"):
        translate(**{name: value})


def test_harmless_attributes():
    plain = translate()
    assert plain == translate(
        architectures=["LlamaForCausalLM"],
        attention_dropout=0.1,
        bos_token_id=5,
        eos_token_id=[6, 7],
        initializer_range=0.3,
        is_llama_config=True,
        pretraining_tp=4,
        rope_interleaved=False,
        temperature=0.6,
        use_cache=False,
    )


def test_activation_refused():
    with pytest.raises(ValueError, match="hidden_act = 'gelu' is not supported; supported: silu"):
        translate(hidden_act="gelu")


def test_dtype_refused():
    with pytest.raises(ValueError, match="dtype = 'float8_e4m3fn' is not supported"):
        translate(dtype="float8_e4m3fn")


@pytest.mark.parametrize(
    ("config_class", "message"),
    [
        (transformers.MixtralConfig, "'mixtral' is a mixture of experts .num_local_experts."),
        (transformers.Qwen2MoeConfig, "'qwen2_moe' is a mixture of experts .num_experts."),
        (transformers.DeepseekV3Config, "'deepseek_v3' is a mixture of experts .n_routed_experts."),
        (transformers.LlavaConfig, "'llava' is a multimodal model .text_config."),
        (transformers.T5Config, "'t5' is an encoder-decoder"),
        (transformers.GPT2Config, "'gpt2' is not supported; supported: llama, qwen2"),
    ],
)
def test_other_models_refused(config_class, message):
    with pytest.raises(ValueError, match=message):
        config_lib.from_hf(config_class())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "is a quantised model"),
        ("num_local_experts", 8, "is a mixture of experts"),
        ("is_encoder_decoder", True, "is an encoder-decoder"),
        ("per_layer_config", {"0": {"intermediate_size": 8}}, "whose layers differ in shape"),
    ],
)
def test_other_kinds_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        translate(**{name: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("windows", (None,), "1 windows for 3 layers"),
        ("num_kv_heads", 3, "4 query heads cannot share 3 key/value heads"),
        ("head_dim", 7, "head size 7 is odd"),
    ],
)
def test_impossible_shape_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**{field: value})


LLAMA3 = Rotary(5e5, "llama3", 8.0, 1.0, 4.0, 16)


@pytest.mark.parametrize(
    "config",
    [
        tiny.config("llama", tie_embeddings=True, dtype="bfloat16", rotary=LLAMA3),
        tiny.config("llama", qkv_bias=True, output_bias=True, mlp_bias=True),
        tiny.config("llama", rotary=Rotary(1e4, "linear", 4.0), num_kv_heads=1),
        tiny.config("qwen2"),
        tiny.config("qwen2", windows=(None, None, None)),
        tiny.config("qwen2", windows=(4, None, 4)),
    ],
)
def test_there_and_back(config):
    attributes = json.loads(config_lib.to_hf(config).to_json_string())
    del attributes["model_type"]
    assert config_lib.from_hf(transformers.AutoConfig.for_model(config.family, **attributes)) == (
        config
    )


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"windows": (None, 4, 4)}, "llama checkpoint cannot express windows"),
        ("llama", {"qkv_bias": True}, "cannot express qkv_bias = True"),
        ("qwen2", {"qkv_bias": False}, "qwen2 checkpoint cannot express qkv_bias = False"),
        ("qwen2", {"windows": (None, 4, 8)}, "cannot express windows = .None, 4, 8."),
    ],
)
def test_inexpressible(family, fields, message):
    with pytest.raises(ValueError, match=message):
        config_lib.to_hf(tiny.config(family, **fields))


def test_windowed_export_reads_the_same_without_layer_types():
    """Older programs derive the windows from max_window_layers."""
    attributes = config_lib.to_hf(tiny.config("qwen2")).to_dict()
    del attributes["layer_types"], attributes["model_type"]
    hf_config = transformers.AutoConfig.for_model("qwen2", **attributes)
    assert config_lib.from_hf(hf_config) == tiny.config("qwen2")
