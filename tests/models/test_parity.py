"""Logits and hidden states against transformers itself, on tiny random checkpoints."""

import json

import jax
import numpy as np
import pytest

from models import checkpoint
from tests import tiny

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="parity tests need torch: make parity")
transformers = pytest.importorskip("transformers")

# Of the largest logit, in float32.
TOLERANCE = 1e-5

# Of this head's four frequencies one is kept, one is blended and two are divided by the factor.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
}
GEMMA3_ROTARY = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
WINDOW = {"sliding_window": 7}
FIRST_FULL = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0}
# Prompts have 40 tokens: windows are shorter, and contexts longer.
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-rotary-base": ("llama", {"rope_theta": 100.0}),
    "llama-llama3-rotary": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rotary": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "llama-head-size": ("llama", {"head_dim": 16}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-norm-eps": ("llama", {"rms_norm_eps": 0.1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", WINDOW),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral-head-size": ("mistral", WINDOW | {"head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-head-size": ("qwen2", {"head_dim": 16}),
    "qwen2-window": ("qwen2", FIRST_FULL),
    "qwen2-window-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 7}),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3-window": ("qwen3", FIRST_FULL | {"attention_bias": True}),
    "gemma": ("gemma", {}),
    "gemma-multi-query": ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma-untied": ("gemma", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", WINDOW | CAPS),
    "gemma2-no-caps": ("gemma2", WINDOW | dict.fromkeys(CAPS)),
    "gemma2-scale": ("gemma2", CAPS | {"query_pre_attn_scalar": 3, "num_key_value_heads": 1}),
    "gemma3_text": ("gemma3_text", WINDOW | {"sliding_window_pattern": 2}),
    "gemma3_text-rotary": (
        "gemma3_text",
        WINDOW | {"sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROTARY},
    ),
    "gemma3_text-multi-query": (
        "gemma3_text",
        {"num_key_value_heads": 1, "query_pre_attn_scalar": 5, "tie_word_embeddings": False},
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-window": ("phi3", WINDOW | {"num_key_value_heads": 1}),
    "phi3-partial-rotary": ("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 48,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-multi-query": ("olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    "olmo2-linear-rotary": (
        "olmo2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "olmo2-tied": ("olmo2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": None}),
    "gpt2-layer-scale": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    "gpt_neox-rotary": ("gpt_neox", {"rotary_pct": 1.0, "tie_word_embeddings": True}),
    "gpt_neox-no-biases": ("gpt_neox", {"attention_bias": False, "hidden_act": "relu"}),
}

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SHAPE = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_inner": 56,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
}
# The classes' own head sizes are those of the published models.
OF_FAMILY = {
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
}


def hf_model(family, overrides, seed=0):
    """A model of transformers' own with every parameter random; norms scale by around 1."""
    shape = GPT2_SHAPE if family == "gpt2" else SHAPE | OF_FAMILY.get(family, {})
    if family == "gpt_neox":
        shape.pop("num_key_value_heads")
    token_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.AutoConfig.for_model(family, **shape | token_ids | overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            scales = name.endswith("weight") and ("norm" in name or ".ln_" in name)
            parameter.copy_(noise + (scales and not family.startswith("gemma")))
    return model.eval()


def prompts():
    """Three random prompts; of one length, because a causal model runs its prefixes as well."""
    return np.random.default_rng(0).integers(0, 61, (3, 40))


def run_hf(model, tokens):
    """Logits, each block's output, and the last block's output after the final norm."""
    outputs = {}

    def keep(layer):
        def hook(module, inputs, output):
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    body = model.base_model
    blocks = body.h if hasattr(body, "h") else body.layers
    hooks = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
    with torch.no_grad():
        result = model(torch.tensor(tokens)[None], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    residual = np.stack([outputs[i][0].float().numpy() for i in range(len(outputs))])
    return result.logits[0].float().numpy(), residual, result.hidden_states[-1][0].float().numpy()


@jax.jit
def run_decoder(decoder, tokens):
    logits, trace = decoder(tokens)
    return logits, trace.residual, decoder.final_norm(trace.residual[-1])


def run_ours(decoder, tokens):
    with jax.default_matmul_precision("highest"):
        return [np.asarray(value) for value in run_decoder(decoder, tokens)]


def distance(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def check_parity(folder, model):
    decoder, _ = checkpoint.load(folder)
    logits, layers, normed = np.max([distances(decoder, model, t) for t in prompts()], axis=0)
    print(f"\nlogits {logits:.1e}, worst layer {layers:.1e}, final norm {normed:.1e}")
    assert max(logits, layers, normed) <= TOLERANCE
    return decoder


def distances(decoder, model, tokens):
    """Of logits, of the worst layer's output, and of the normed last one."""
    ours, theirs = run_ours(decoder, tokens), run_hf(model, tokens)
    layers = max(map(distance, ours[1], theirs[1]))
    return distance(ours[0], theirs[0]), layers, distance(ours[2], theirs[2])


@pytest.mark.parametrize("case", CASES)
def test_float32(case, tmp_path):
    model = hf_model(*CASES[case])
    model.save_pretrained(tmp_path)
    check_parity(tmp_path, model)


@pytest.mark.parametrize(
    "pair",
    [
        ("llama-rotary-base", "llama-llama3-rotary"),
        ("mistral", "mistral-window"),
        ("qwen2", "qwen2-window"),
        ("llama", "llama-linear-rotary"),
        ("llama", "llama-norm-eps"),
        ("gemma2-no-caps", "gemma2"),
        ("gemma2", "gemma2-scale"),
        ("gemma3_text", "gemma3_text-rotary"),
        ("phi3", "phi3-longrope"),
        ("phi3", "phi3-partial-rotary"),
        ("gpt2", "gpt2-layer-scale"),
        ("gpt_neox", "gpt_neox-serial"),
        ("gpt_neox", "gpt_neox-rotary"),
    ],
)
def test_cases_bite(pair):
    """What sets two cases apart changes these prompts' logits, so parity tests it."""
    plain, changed = (hf_model(*CASES[case]) for case in pair)
    tokens = prompts()[0]
    assert distance(run_hf(changed, tokens)[0], run_hf(plain, tokens)[0]) > 100 * TOLERANCE


def test_legacy_config(tmp_path):
    """config.json as transformers 4 wrote it."""
    model = hf_model(*CASES["llama-llama3-rotary"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    attributes = json.loads(file.read_text())
    rotary = attributes.pop("rope_parameters")
    attributes |= {
        "rope_theta": rotary.pop("rope_theta"),
        "rope_scaling": rotary,
        "torch_dtype": attributes.pop("dtype"),
        "temperature": 0.6,
        "rope_interleaved": False,
    }
    file.write_text(json.dumps(attributes))
    check_parity(tmp_path, model)


def test_sharded(tmp_path):
    model = hf_model(*CASES["llama"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_parity(tmp_path, model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16(family, tmp_path):
    """Nearer to the float32 run of the same weights than transformers' own bfloat16 run is."""
    hf_model(*CASES[family]).bfloat16().save_pretrained(tmp_path)
    decoder, _ = checkpoint.load(tmp_path)
    assert decoder.config.dtype == "bfloat16"
    ours = [run_ours(decoder, tokens)[0] for tokens in prompts()]
    # Read from the file and not converted, which would round the rotary frequencies as well.
    float32, bfloat16 = (
        [run_hf(model, tokens)[0] for tokens in prompts()]
        for dtype in ("float32", "bfloat16")
        for model in [transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)]
    )
    our_error = max(map(distance, ours, float32))
    their_error = max(map(distance, bfloat16, float32))
    print(f"\nto float32: ours {our_error:.1e}, transformers' bfloat16 {their_error:.1e}")
    assert our_error <= TOLERANCE < their_error


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("case", [*tiny.FAMILIES, "llama-biases", "llama-tied", "phi3-longrope"])
def test_export(case, max_shard_bytes, tmp_path):
    """What `save` writes, transformers reads: the same weights, the same logits."""
    model = hf_model(*CASES[case])
    model.save_pretrained(tmp_path / "theirs")
    decoder, _ = checkpoint.load(tmp_path / "theirs")
    checkpoint.save(decoder, tmp_path / "ours", max_shard_bytes=max_shard_bytes)

    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    ours, theirs = back.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for tokens in prompts():
        for a, b in zip(run_hf(back, tokens), run_hf(model, tokens), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox-rotary", "gemma"])
def test_bare_model(case, tmp_path):
    """Without the head, tensors lack the prefix of their names, as in the first GPT-2's file."""
    model = hf_model(*CASES[case])
    model.base_model.save_pretrained(tmp_path)
    check_parity(tmp_path, model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_organism_export(family, tmp_path):
    """A decoder that never was a Hugging Face checkpoint computes the same in transformers."""
    decoder = tiny.save(tmp_path / "model", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for tokens in prompts():
        assert max(distances(decoder, model, tokens)) <= TOLERANCE
