"""Generation against transformers' generate, token by token, on tiny random checkpoints."""

import importlib

import numpy as np
import pytest

from jaxmed.behaviour import generation
from jaxmed.behaviour.sampling import Sampling
from models import checkpoint
from tests import tiny

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="parity tests need torch: make parity")
transformers = pytest.importorskip("transformers")

TOKENS = 64
PROMPTS = [
    np.random.default_rng(length).integers(0, 61, length).tolist() for length in (1, 7, 20, 31, 45)
]
# How far ahead the chosen token must be, of the largest logit: float32 rounds at 1e-6 of it.
MARGIN = 1e-5


def generate_hf(model, prompt):
    """The likeliest tokens, and how far the closest call was from a tie."""
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.stack(found.logits)[:, 0]
    first, second = logits.topk(2).values.unbind(-1)
    margin = ((first - second) / logits.abs().amax(-1)).min()
    return tuple(found.sequences[0, len(prompt) :].tolist()), float(margin)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family, tmp_path):
    tiny.save(tmp_path, family, max_positions=128)
    decoder, _ = checkpoint.load(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    wanted, margins = zip(*(generate_hf(model, prompt) for prompt in PROMPTS), strict=True)
    print(f"\nsmallest margin {min(margins):.1e} of the largest logit")
    assert min(margins) > MARGIN
    found = generation.generate(decoder, PROMPTS, stop=(), sampling=Sampling(TOKENS), batch_size=4)
    assert [response.tokens for response in found] == list(wanted)


def test_the_baseline_of_the_benchmark_generates_the_same():
    baselines = importlib.import_module("jaxmed.validation.baselines")
    decoder = tiny.decoder("llama", max_positions=128)
    prompts = np.random.default_rng(0).integers(0, 61, (3, 9))
    found = generation.generate(
        decoder, prompts.tolist(), stop=(), sampling=Sampling(20), batch_size=4
    )
    for onednn in (False, True):
        baseline = baselines.Generate(baselines.torch_model(decoder, onednn=onednn), prompts, 20)
        assert baseline().tolist() == [list(response.tokens) for response in found]
