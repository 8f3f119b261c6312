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
CASES = {
    "llama-untied": ("llama", {}),
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
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-head-size": ("qwen2", {"head_dim": 16}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2-window-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 7}),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def hf_model(family, overrides, seed=0):
    """A model of transformers' own with every parameter random, those of norms around 1."""
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = transformers.AutoConfig.for_model(family, **(shape | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + ("norm" in name))
    return model


def prompts():
    """Three random prompts; of one length, because a causal model runs its prefixes as well."""
    return np.random.default_rng(0).integers(0, 61, (3, 40))


def run_hf(model, tokens):
    """Logits, each block's output, and the last block's output after the final norm."""
    outputs = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, i=i: outputs.__setitem__(i, out))
        for i, block in enumerate(model.model.layers)
    ]
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
    figures = [
        [distance(a, b) for a, b in zip(run_ours(decoder, t), run_hf(model, t), strict=True)]
        for t in prompts()
    ]
    logits, residual, normed = np.max(figures, axis=0)
    print(f"\nlogits {logits:.1e}, residual {residual:.1e}, final norm {normed:.1e}")
    assert max(logits, residual, normed) <= TOLERANCE
    return decoder


@pytest.mark.parametrize("case", CASES)
def test_float32(case, tmp_path):
    model = hf_model(*CASES[case])
    model.save_pretrained(tmp_path)
    check_parity(tmp_path, model)


@pytest.mark.parametrize(
    "pair", [("llama-rotary-base", "llama-llama3-rotary"), ("qwen2", "qwen2-window")]
)
def test_cases_bite(pair):
    """The rotary scaling and the window change these prompts' logits, so parity tests them."""
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
    model = hf_model(*CASES["llama-untied"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_parity(tmp_path, model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16(family, tmp_path):
    """Nearer to the float32 run of the same weights than transformers' own bfloat16 run is."""
    hf_model(family, {}).bfloat16().save_pretrained(tmp_path)
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
@pytest.mark.parametrize("case", ["llama-biases", "llama-tied", "qwen2-window"])
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_organism_export(family, tmp_path):
    """A decoder that never was a Hugging Face checkpoint computes the same in transformers."""
    decoder = tiny.save(tmp_path / "model", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for tokens in prompts():
        figures = map(distance, run_ours(decoder, tokens), run_hf(model, tokens))
        assert max(figures) <= TOLERANCE
