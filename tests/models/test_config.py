"""Every attribute of a Hugging Face config is understood, or refused by its name."""

import dataclasses
import json

import pytest
import transformers

from models import hf_config
from models.config import DecoderConfig, Rotary
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
    return hf_config.from_hf(transformers.AutoConfig.for_model(family, **(SHAPE | attributes)))


def test_llama():
    config = translate(rms_norm_eps=1e-6, rope_theta=5e5, dtype="bfloat16")
    assert config == DecoderConfig(
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


def test_a_rotary_base_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="rope_theta is 'x'; it must be a number above 0"):
        translate(rope_parameters={"rope_type": "default", "rope_theta": "x"})


def test_llama_biases():
    config = translate(attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)


def test_qwen2_biases():
    config = translate("qwen2")
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "olmo2", "phi3"])
def test_head_size(family):
    assert translate(family).head_dim == 8


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_head_size_of_its_own(family):
    assert translate(family, head_dim=16).head_dim == 16


def test_what_gpt2_leaves_out():
    config = hf_config.from_hf(transformers.GPT2Config(n_embd=24, n_head=4, n_inner=None))
    assert (config.num_kv_heads, config.head_dim, config.intermediate_size) == (4, 6, 96)


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
        ({"rope_theta": 7.0, "type": "linear", "factor": 2.0}, Rotary(7.0, "linear", factor=2.0)),
        (
            {
                "rope_theta": 7.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 16,
            },
            Rotary(
                7.0,
                "llama3",
                factor=8.0,
                low_freq_factor=1.5,
                high_freq_factor=3.0,
                original_max_positions=16,
            ),
        ),
    ],
)
def test_rotary(parameters, rotary):
    assert translate(rope_parameters=dict(parameters)).rotary == rotary


def test_rotary_as_transformers_4_wrote_it():
    config = translate(rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rotary == Rotary(7.0, "linear", factor=2.0)


def test_longrope_is_computed_within_the_original_context():
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 7.0,
        "short_factor": [1.0, 2.0, 3.0, 4.0],
        "long_factor": [5.0] * 4,
    }
    config = translate(
        "phi3",
        rope_parameters=parameters,
        max_position_embeddings=512,
        original_max_position_embeddings=48,
    )
    assert config.max_positions == config.rotary.original_max_positions == 48
    assert config.rotary.stretched_max_positions == 512
    assert config.rotary.short_factors == (1.0, 2.0, 3.0, 4.0)


def test_rotary_by_type_of_layer():
    config = translate(
        "gemma3_text", head_dim=8, sliding_window=9, sliding_window_pattern=3, rope_theta=7.0
    )
    assert config.windows == (9, 9, None, 9)
    assert (config.rotary, config.window_rotary) == (Rotary(7.0), Rotary(10000.0))


@pytest.mark.parametrize("family, share", [("phi3", 0.5), ("gpt_neox", 0.25)])
def test_part_of_each_head_may_be_rotated(family, share):
    shape = {name: size for name, size in SHAPE.items() if name != "num_key_value_heads"}
    described = transformers.AutoConfig.for_model(
        family, **shape, rope_parameters={"rope_theta": 7.0, "partial_rotary_factor": share}
    )
    rotary = hf_config.from_hf(described).rotary
    assert rotary == Rotary(7.0, fraction=share)
    assert rotary.rotated(8) == 8 * share


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type = 'yarn' is not supported"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic' is not supported"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3},
            "3 short factors for 4 rotary frequencies",
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
        ("use_mrope", True),
        ("use_bidirectional_attention", True),
        ("is_causal", False),
        ("chunk_size_feed_forward", 2),
        ("layer_types", ["full_attention"] * 3 + ["sliding_attention"]),
        ("attention_chunk_size", 8),
        ("rotary_pct", 0.5),
        ("unheard_of", "something"),
    ],
)
def test_unknown_attribute_refused(name, value):
    with pytest.raises(ValueError, match=f"attribute {name} = .* is not understood"):
        translate(**{name: value})


# What issue reports name, and more of each kind: off, harmless at any value, or in agreement.
ACCEPTED = {
    "unk_token_id": 0,
    "_model_name_or_path": "someone/model",
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "quantization_config": None,
    "text_config": None,
    "num_experts": 0,
    "is_decoder": False,
    "tokenizer_class": "LlamaTokenizer",
    "layer_types": ["full_attention"] * 4,
    "torchscript": False,
    "model_max_length": 64,
    "hidden_dropout_prob": 0,
    "mlp_bias": None,
    "tie_word_embeddings": None,
    "head_dim": None,
    "num_key_value_heads": None,
    "attention_bias": None,
    "rope_theta": None,
    "rms_norm_eps": None,
    "is_llama_config": False,
    "use_cache": None,
    "unheard_of": None,
    "unheard_of_too": False,
    "unheard_of_as_well": 0.0,
    "unheard_of_text": "",
    "unheard_of_table": {},
}


def read(family="llama", ignored=(), **attributes):
    """As of a config.json that has these attributes, and a small shape."""
    shape = {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 4}
    if family not in ("gpt2", "gpt_neox"):
        shape["num_key_value_heads"] = 8
    return hf_config.read({"model_type": family, **shape, **attributes}, ignored)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_off_or_harmless_is_accepted(name):
    assert read(**{name: ACCEPTED[name]}) == read()


@pytest.mark.parametrize("name", sorted(hf_config.HARMLESS))
def test_harmless_at_any_value(name):
    plain = read()
    for value in (None, False, True, 0, -1, 0.5, "", "text", [1], {"a": 1}):
        assert read(**{name: value}) == plain


@pytest.mark.parametrize(
    ("family", "name", "meaning"),
    [
        ("gemma", "tie_word_embeddings", {"tie_embeddings": True}),
        ("gemma", "head_dim", {"head_dim": 256}),
        ("gpt_neox", "use_parallel_residual", {"parallel": True}),
        ("gpt_neox", "attention_bias", {"qkv_bias": True, "output_bias": True}),
        ("gpt2", "tie_word_embeddings", {"tie_embeddings": True}),
        ("gpt2", "scale_attn_weights", {}),
        ("mistral", "num_key_value_heads", {"num_kv_heads": 8}),
        # Where transformers gives null a meaning of its own, it has that.
        ("mistral", "sliding_window", {"windows": (None,) * 4}),
        ("gemma2", "attn_logit_softcapping", {"score_cap": None}),
        ("qwen2", "layer_types", {"windows": (None,) * 4}),
    ],
)
def test_null_is_the_family_s_default(family, name, meaning):
    config = read(family, **{name: None})
    assert {field: getattr(config, field) for field in meaning} == meaning


@pytest.mark.parametrize(
    ("family", "attributes", "message"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False .* as for True"),
        ("gpt_neox", {"rope_theta": 500.0}, "rope_theta = 500.0 .* as for 10000"),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 .* as for 0.25"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "= True .* as for False"),
        ("mistral", {"sliding_window": 8, "use_sliding_window": False}, "8 contradicts use_slid"),
        ("gemma2", {"sliding_window": 8, "use_sliding_window": False}, "8 contradicts use_slid"),
        ("gemma2", {"sliding_window": 8, "sliding_window_size": 9}, "sliding_window_size = 9"),
        (
            "mistral",
            {"sliding_window": 8, "layer_types": ["full_attention"] * 4},
            "attribute layer_types",
        ),
        ("llama", {"quantization_config": "x"}, "quantised .by an unknown method"),
        ("llama", {"num_experts": 8}, "is a mixture of experts"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "truncate": 3}}, "truncate"),
    ],
)
def test_what_changes_the_model_is_not_accepted(family, attributes, message):
    with pytest.raises(ValueError, match=message):
        read(family, **attributes)


@pytest.mark.parametrize(
    ("family", "attributes"),
    [
        ("mistral", {"sliding_window": 8, "use_sliding_window": True}),
        ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4}),
        ("gemma2", {"sliding_window": 8, "sliding_window_size": 8}),
        ("llama", {"sliding_window": 8, "use_sliding_window": False}),
        ("gpt_neox", {"rope_theta": 7.0, "rotary_emb_base": 7.0, "partial_rotary_factor": 0.25}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "truncate": False}}),
    ],
)
def test_what_agrees_is_accepted(family, attributes):
    assert read(family, **attributes).family == family


def test_an_unknown_attribute_may_be_ignored():
    said = "--ignore_config=trained_in, or from Python ignore_config=.'trained_in',."
    with pytest.raises(ValueError, match=said):
        read(trained_in=0.5)
    assert read(trained_in=0.5, ignored=["trained_in"]) == read()
    assert read(ignored=["trained_in"]) == read()
    with pytest.raises(ValueError, match="attribute residual_scale = 2 is not understood"):
        read(trained_in=0.5, residual_scale=2, ignored=["trained_in"])


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"logit_scale": 0.5}, "it changes what models of type cohere"),
        ({"attention_multiplier": 0.5}, "it changes what models of type granite"),
        ({"clip_qkv": 8.0}, "it changes what models of type olmo"),
        ({"final_logit_softcapping": 30.0}, "it changes what models of type .*gemma2"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 2.0}},
            "mscale = 2.0 .* changes what another rope_type computes",
        ),
    ],
)
def test_what_other_models_compute_by_is_not_to_be_ignored(attributes, said):
    with pytest.raises(ValueError, match=said) as caught:
        read(**attributes)
    assert "ignore_config" not in str(caught.value)


def test_an_unknown_rotary_parameter_may_be_ignored():
    scaling = {"type": "linear", "factor": 2.0, "finetuned": True}
    with pytest.raises(ValueError, match="--ignore_config=rope_parameters.finetuned"):
        read(rope_scaling=dict(scaling))
    ignored = ["rope_parameters.finetuned"]
    assert read(rope_scaling=dict(scaling), ignored=ignored).rotary == Rotary(
        1e4, "linear", factor=2.0
    )


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "rope_scaling",
        "rope_theta",
        "is_causal",
        "num_experts",
        "quantization_config",
    ],
)
def test_what_is_understood_cannot_be_ignored(name):
    with pytest.raises(ValueError, match=f"ignore_config: {name} cannot be ignored"):
        read(ignored=[name])


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


# The attributes of published config.json files that differ from the defaults of transformers'
# classes, or that these do not declare.
PUBLISHED = {
    "Llama-2-7b-hf": {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None},
    "Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "eos_token_id": [128001, 128008, 128009],
        "mlp_bias": False,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
    },
    "Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "Mistral-7B-v0.1": {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0},
    "Mistral-7B-Instruct-v0.3": {
        "model_type": "mistral",
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "vocab_size": 32768,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "max_window_layers": 28,
        "num_hidden_layers": 28,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "gemma-2b": {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
    "gemma-2-2b": {
        "model_type": "gemma2",
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "gemma-3-1b-it": {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "num_hidden_layers": 26,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "Phi-3-mini-4k-instruct": {
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
    },
    "Phi-4-mini-instruct": {
        "model_type": "phi3",
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [1.5] * 48,
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "OLMo-2-1124-7B": {
        "model_type": "olmo2",
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "vocab_size": 100352,
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_ctx": 1024,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "summary_type": "cls_index",
    },
    "gpt2-medium": {"model_type": "gpt2", "n_special": 0, "predict_special_tokens": True},
    "gpt2-xl": {"model_type": "gpt2", "output_past": True, "n_layer": 48, "n_embd": 1600},
    "gpt-neox-20b": {
        "model_type": "gpt_neox",
        "attention_probs_dropout_prob": 0,
        "hidden_act": "gelu_fast",
        "hidden_dropout_prob": 0,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
    },
    "pythia-70m": {
        "model_type": "gpt_neox",
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
}


ROTARY_10K = Rotary(10000.0)
# What of it is easily misread.
MEANT = {
    "Llama-2-7b-hf": {"tie_embeddings": False, "rotary": ROTARY_10K},
    "Llama-3.1-8B-Instruct": {
        "rotary": Rotary(500000.0, "llama3", factor=8.0, original_max_positions=8192)
    },
    "Mistral-7B-v0.1": {"windows": (4096,) * 32, "qkv_bias": False},
    "Mistral-7B-Instruct-v0.3": {"windows": (None,) * 32, "rotary": Rotary(1e6)},
    "Qwen2.5-7B-Instruct": {"windows": (None,) * 32, "qkv_bias": True},
    "Qwen3-0.6B": {"head_dim": 128, "query_key_norm": "head", "tie_embeddings": True},
    "gemma-2b": {"activation": "gelu_pytorch_tanh", "scale_embedding": True, "logit_cap": None},
    "gemma-2-2b": {"windows": (4096, None) * 13, "score_cap": 50.0, "query_scalar": 256},
    "gemma-3-1b-it": {
        "windows": tuple(None if layer % 6 == 5 else 512 for layer in range(26)),
        "rotary": Rotary(1000000),
        "window_rotary": Rotary(10000),
        "logit_cap": None,
    },
    "Phi-3-mini-4k-instruct": {"windows": (2047,) * 32, "max_positions": 4096},
    "Phi-4-mini-instruct": {"max_positions": 4096, "num_kv_heads": 8, "head_dim": 128},
    "OLMo-2-1124-7B": {"pre_norm": False, "post_norm": True, "query_key_norm": "all"},
    "gpt2": {"num_kv_heads": 12, "head_dim": 64, "intermediate_size": 3072, "rotary": None},
    "gpt2-medium": {"tie_embeddings": True},
    "gpt2-xl": {"intermediate_size": 6400, "num_layers": 48},
    "gpt-neox-20b": {"activation": "gelu_fast", "rotary": Rotary(10000, fraction=0.25)},
    "pythia-70m": {"parallel": True, "qkv_bias": True, "rotary": Rotary(10000, fraction=0.25)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = hf_config.from_hf(transformers.AutoConfig.from_pretrained(tmp_path))
    assert {field: getattr(config, field) for field in MEANT[name]} == MEANT[name]
    assert hf_config.from_hf(hf_config.to_hf(config)) == config


def test_activation_refused():
    with pytest.raises(ValueError, match="hidden_act = 'tanh' is not supported; supported: silu"):
        translate(hidden_act="tanh")


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
        (transformers.Gemma3Config, "'gemma3' is a multimodal model .text_config."),
        (transformers.GPTJConfig, "'gptj' is not supported; supported: llama, mistral, qwen2"),
    ],
)
def test_other_models_refused(config_class, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(config_class())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "are quantised .gptq;"),
        ("quantization_config", {"quant_method": "awq"}, "are quantised .awq;.*dequantise it"),
        ("quantization_config", {"quant_method": "bitsandbytes"}, "quantised .bitsandbytes;"),
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
        ("head_dim", 7, "7 of the 7 channels of a head would be rotated"),
        ("rotary", Rotary(7.0, fraction=0.4), "3 of the 8 channels"),
        ("activation", "tanh", "activation 'tanh' is not one of silu"),
        ("score_cap", 0.0, "score_cap is 0.0; it must be a number above 0"),
        ("windows", (None, 0, None), "sliding_window is 0; it must be a number above 0"),
        ("windows", (-1, None, None), "sliding_window is -1"),
        ("norm_eps", -1e-5, "norm_eps is -1e-05"),
        ("rotary", Rotary(float("nan")), "rope_theta is nan; it must be a number above 0"),
        ("rotary", Rotary(7.0, "linear", factor=0), "factor of the rotary embedding is 0"),
        (
            "rotary",
            Rotary(7.0, "llama3", factor=8.0, low_freq_factor=4.0),
            "high_freq_factor is 4.0; it must be a number above 4.0",
        ),
        ("rotary", Rotary(7.0, "llama3", factor=8.0), "original_max_position_embeddings is 0"),
        ("rotary", Rotary(float("inf")), "rope_theta is inf; it must be a number above 0"),
        ("num_heads", True, "num_heads is True; it must be a whole number"),
    ],
)
def test_impossible_shape_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**{field: value})


LLAMA3 = Rotary(5e5, "llama3", factor=8.0, original_max_positions=16)
LONGROPE = Rotary(
    1e4,
    "longrope",
    original_max_positions=48,
    stretched_max_positions=512,
    short_factors=(1.0, 2.0, 3.0),
    long_factors=(2.0, 4.0, 8.0),
)


@pytest.mark.parametrize(
    "config",
    [
        tiny.config("llama", tie_embeddings=True, dtype="bfloat16", rotary=LLAMA3),
        tiny.config("llama", qkv_bias=True, output_bias=True, mlp_bias=True),
        tiny.config("llama", rotary=Rotary(1e4, "linear", factor=4.0), num_kv_heads=1),
        *map(tiny.config, tiny.FAMILIES),
        tiny.config("phi3", rotary=LONGROPE, max_positions=48),
        tiny.config("gpt_neox", parallel=False, tie_embeddings=True),
        tiny.config("gpt2", inverse_layer_scale=True, activation="gelu"),
        tiny.config("gemma2", score_cap=None, logit_cap=None),
        tiny.config("qwen2", windows=(None, None, None)),
        tiny.config("qwen2", windows=(4, None, 4)),
    ],
)
def test_there_and_back(config):
    attributes = json.loads(hf_config.to_hf(config).to_json_string())
    del attributes["model_type"]
    assert hf_config.from_hf(transformers.AutoConfig.for_model(config.family, **attributes)) == (
        config
    )


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"windows": (None, 4, 4)}, "llama checkpoint cannot express windows"),
        ("llama", {"qkv_bias": True}, "cannot express qkv_bias = True"),
        ("qwen2", {"qkv_bias": False}, "qwen2 checkpoint cannot express qkv_bias = False"),
        ("gpt2", {"head_dim": 8}, "gpt2 checkpoint cannot express head_dim = 8"),
        ("gemma", {"logit_cap": 3.0}, "gemma checkpoint cannot express logit_cap = 3.0"),
        ("llama", {"rotary": Rotary(7.0, fraction=0.5)}, "partial_rotary_factor = 0.5"),
        ("mistral", {"windows": (None, 4, 4)}, "cannot express windows"),
        ("qwen2", {"windows": (None, 4, 8)}, "cannot express windows = .None, 4, 8."),
    ],
)
def test_inexpressible(family, fields, message):
    with pytest.raises(ValueError, match=message):
        hf_config.to_hf(tiny.config(family, **fields))


def test_windowed_export_reads_the_same_without_layer_types():
    """Older programs derive the windows from max_window_layers."""
    attributes = hf_config.to_hf(tiny.config("qwen2")).to_dict()
    del attributes["layer_types"], attributes["model_type"]
    described = transformers.AutoConfig.for_model("qwen2", **attributes)
    assert hf_config.from_hf(described) == tiny.config("qwen2")
