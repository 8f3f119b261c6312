"""The two torch baselines of the benchmark compute the effects that jaxmed defines."""

import importlib

import jax
import numpy as np
import pytest

from jaxmed.data import pairs
from jaxmed.question import metrics
from jaxmed.question import question as question_lib
from jaxmed.reference import definition
from models.errors import InputError
from tests import tiny

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="the baselines are written in torch: make parity")
baselines = importlib.import_module("jaxmed.validation.baselines")

# Of the run's largest logit: Y is a difference of two logits, an effect a difference of two Y, and
# each logit is rounded by a few units in its last place.
TOLERANCE = 8 * np.finfo(np.float32).eps

HARMFUL, SAFE = 6, 7
CASES = {
    "grouped": {},
    "tied-multi-query": {"tie_embeddings": True, "num_kv_heads": 1},
    "biases-multi-head": {
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "num_kv_heads": 4,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_both_baselines_give_the_plain_definition(case):
    prompt, counterfactual = np.random.default_rng(0).integers(8, 61, (2, 12)).tolist()
    pair = pairs.Pair("12-11", tuple(prompt), tuple(counterfactual[1:]), (HARMFUL,), (SAFE,))
    question = question_lib.Question(metrics.LogitDifference())
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64", **CASES[case])
        reference = definition.define_pair(decoder, pair, question, ["neuron"]).nie["neuron"]
        largest_logit = np.abs(decoder(np.array(prompt))[0][-1]).max()
    assert np.abs(reference).max() > 1e4 * TOLERANCE * largest_logit

    # All neurons, in an order that mixes the layers of every batch.
    units = np.indices(reference.shape, np.int32).reshape(2, -1)
    layers, neurons = np.random.default_rng(1).permutation(units, axis=1)
    decoder = tiny.decoder("llama", **CASES[case])
    for baseline, batch, onednn in (
        (baselines.Hooks, None, True),
        (baselines.Hooks, None, False),
        (baselines.Prefix, None, True),
        (baselines.Prefix, 50, False),
    ):
        model = baselines.torch_model(decoder, onednn=onednn)
        asked = (model, prompt, pair.counterfactual_ids, HARMFUL, SAFE, batch)
        found = baseline(*asked).effects(layers, neurons)
        error = np.abs(found - reference[layers, neurons]).max() / largest_logit
        print(f"\n{baseline.__name__}, oneDNN {onednn}: {error:.1e} of the largest logit")
        assert error <= TOLERANCE


def test_a_baseline_runs_in_its_type_and_leaves_torch_as_it_was():
    torch = baselines.torch
    seen = []

    class Loop(baselines.Prefix):
        def patched(self, layers, neurons):
            seen.append((self.residual.dtype, torch.backends.cuda.matmul.allow_tf32))
            return super().patched(layers, neurons)

    decoder, ids = tiny.decoder("llama"), [8, 9, 10, 11]
    units = np.array([0, 1]), np.array([3, 5])
    found = {}
    for number_type in ("float32", "tf32", "bfloat16"):
        model = baselines.torch_model(decoder, number_type)
        loop = Loop(model, ids, ids[::-1], HARMFUL, SAFE, tf32=number_type == "tf32")
        found[number_type] = loop.effects(*units)
        assert not torch.backends.cuda.matmul.allow_tf32
    assert seen == [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
    # On a CPU TF32 changes nothing; bfloat16 rounds.
    np.testing.assert_array_equal(found["tf32"], found["float32"])
    assert (found["bfloat16"] != found["float32"]).any()


def test_other_families_are_refused():
    with pytest.raises(InputError, match="qwen2 model has no torch baseline"):
        baselines.torch_model(tiny.decoder("qwen2"))
