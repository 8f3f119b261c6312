"""Merged weights against peft's own, on tiny random checkpoints."""

import numpy as np
import pytest
import safetensors.numpy

import models
from models import checkpoint
from tests import tiny
from tests.models.test_checkpoint import WEIGHTS

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="parity tests need torch: make parity")
peft = pytest.importorskip("peft", reason="parity tests need peft: make parity")
transformers = pytest.importorskip("transformers")

# Of every weight, in float32.
TOLERANCE = 1e-6

PATTERNS = {
    "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "up_proj": 1},
    "alpha_pattern": {r"layers\.2\..*": 3, "q_proj": 9},
}
CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama-all": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "llama-patterns": ("llama", {"target_modules": ["q_proj", "up_proj"], **PATTERNS}),
    "llama-regex": (
        "llama",
        {"target_modules": r".*layers\.[12]\.mlp\.\w+_proj", "exclude_modules": ["1.mlp.up_proj"]},
    ),
    "llama-layers": ("llama", {"target_modules": ["k_proj"], "layers_to_transform": [0, 2]}),
    "llama-layers-pattern": (
        "llama",
        {"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "llama-saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-stabilised": ("gpt2", {"target_modules": ["c_attn"], "use_rslora": True}),
    "gpt_neox": (
        "gpt_neox",
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "lm_head"]},
    ),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "bias": "none"}),
}


def adapted(folder, family, options):
    """A model of peft's with every weight of the adapter random, saved beside its base."""
    tiny.save(folder / "base", family)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("case", CASES)
def test_merged_weights(case, tmp_path):
    """Those that `merge_and_unload` gives, every one of them."""
    model = adapted(tmp_path, *CASES[case])
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    decoder, _ = models.load(tmp_path / "base", adapter=tmp_path / "adapter")
    checkpoint.save(decoder, tmp_path / "ours")
    ours, theirs, plain = (
        safetensors.numpy.load_file(tmp_path / name / WEIGHTS)
        for name in ("ours", "theirs", "base")
    )
    assert ours.keys() == theirs.keys()
    worst = max(np.abs(ours[name] - theirs[name]).max() for name in theirs)
    moved = sum(not np.array_equal(plain[name], theirs[name]) for name in theirs)
    print(f"\n{moved} of {len(theirs)} weights are changed, the worst is off by {worst:.1e}")
    assert worst <= TOLERANCE and moved > 0


@pytest.mark.parametrize("case", ["llama-patterns", "gpt2", "gpt_neox"])
def test_logits_of_the_model_that_was_trained(case, tmp_path):
    """As peft computes them without merging."""
    model = adapted(tmp_path, *CASES[case])
    tokens = np.random.default_rng(0).integers(0, 61, 12)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)[None]).logits[0].numpy()
    ours, _ = models.load(tmp_path / "base", adapter=tmp_path / "adapter")[0](tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_a_variant_is_refused_by_name(tmp_path):
    adapted(tmp_path, "llama", {"target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(ValueError, match=r"use_dora = True \(DoRA\)"):
        models.load(tmp_path / "base", adapter=tmp_path / "adapter")
