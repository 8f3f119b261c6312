"""The config.json of published checkpoints, as they are, are understood as transformers does.

`configs/` holds their attributes, each file named after its checkpoint.
"""

import json
import pathlib

import pytest
import transformers

from models import families, hf_config

CONFIGS = {file.stem: file for file in (pathlib.Path(__file__).parent / "configs").glob("*.json")}
# Of each attribute that transformers may call otherwise, the names.
NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "activation": ("hidden_activation", "hidden_act", "activation_function"),
    "tie_embeddings": ("tie_word_embeddings",),
    "query_scalar": ("query_pre_attn_scalar",),
    "score_cap": ("attn_logit_softcapping",),
    "logit_cap": ("final_logit_softcapping",),
    "parallel": ("use_parallel_residual",),
}


def first(theirs, names):
    return next((getattr(theirs, name) for name in names if hasattr(theirs, name)), None)


def windows(theirs):
    """As transformers' decoders choose masks: by type, or one for all."""
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None)
    if types is None:
        return (window,) * theirs.num_hidden_layers
    return tuple(window if of == "sliding_attention" else None for of in types)


def test_every_family_is_there():
    found = {json.loads(file.read_text())["model_type"] for file in CONFIGS.values()}
    assert found == families.FAMILIES.keys()
    assert len(CONFIGS) >= 20


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_read_as_transformers_reads_it(name, tmp_path):
    attributes = json.loads(CONFIGS[name].read_text())
    (tmp_path / "config.json").write_text(json.dumps(attributes))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    config = hf_config.read(attributes)
    for field, names in NAMES.items():
        expected = first(theirs, names)
        if field != "activation" or theirs.model_type != "gemma":
            assert getattr(config, field) == (expected or getattr(type(config), field, expected))
    heads = theirs.num_attention_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    assert config.head_dim == head_dim
    assert config.num_kv_heads == (getattr(theirs, "num_key_value_heads", None) or heads)
    inner = getattr(theirs, "intermediate_size", None) or getattr(theirs, "n_inner", None)
    assert config.intermediate_size == (inner or 4 * theirs.hidden_size)
    assert config.windows == windows(theirs)
    assert config.dtype == str(theirs.dtype or "float32").removeprefix("torch.")
    check_rotary(config, theirs)
    # Written and read again, it is the same.
    assert hf_config.from_hf(hf_config.to_hf(config)) == config


def check_rotary(config, theirs):
    parameters = getattr(theirs, "rope_parameters", None)
    if parameters is None:
        assert config.rotary is None
        assert config.max_positions == theirs.max_position_embeddings
        return
    by_type = {"rotary": parameters}
    if "full_attention" in parameters:
        by_type = {
            "rotary": parameters["full_attention"],
            "window_rotary": parameters["sliding_attention"],
        }
    for field, expected in by_type.items():
        rotary = getattr(config, field)
        assert rotary.theta == expected["rope_theta"]
        assert rotary.kind == expected["rope_type"]
        assert rotary.fraction == expected.get("partial_rotary_factor", 1.0)
        assert rotary.factor == expected.get("factor")
        assert list(rotary.short_factors) == expected.get("short_factor", [])
    # A stretched context is computed within the original one.
    longest = theirs.max_position_embeddings
    if config.rotary.kind == "longrope":
        longest = theirs.original_max_position_embeddings
    assert config.max_positions == longest
