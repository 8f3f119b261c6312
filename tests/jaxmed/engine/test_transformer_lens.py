"""The engine against TransformerLens's activation patching, on random checkpoints.

Each side reads the checkpoint by itself, and TransformerLens runs the model without processing its
weights. In its words the run that is patched is the corrupted one, and the run that lends
activations the clean one: for NIE these are base and source, for TIE source and base. Its own
sweeps are used where it has one.
"""

import numpy as np
import pytest

import jaxmed
from models import load
from tests import words
from tests.jaxmed.scans import UNEQUAL, pair
from tests.models.test_parity import hf_model

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="parity tests need torch: make parity")
transformer_lens = pytest.importorskip(
    "transformer_lens", reason="needs TransformerLens, of the parity extra: make parity"
)
patching = pytest.importorskip("transformer_lens.patching")
bridges = pytest.importorskip("transformer_lens.model_bridge")
name_of = transformer_lens.utilities.get_act_name

# Of the pair's largest effect of a granularity: jaxmed's float32 against their float64, in which
# transformers leaves Llama's softmax in float32.
TOLERANCE = 5e-6

# TransformerLens names positions by one index for both runs; of unequal prompts it is lent values
# that have been shifted to where the ends correspond.
PAIRS = {"equal": pair(12, 12), "unequal": UNEQUAL}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products are so small that threads would only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request, tmp_path_factory):
    """A checkpoint of transformers' own, as either side reads it."""
    folder = tmp_path_factory.mktemp(request.param)
    hf_model(request.param, {}).save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)  # TransformerLens looks for one; no text is used
    bridge = bridges.TransformerBridge.boot_transformers(
        str(folder), device="cpu", dtype=torch.float64
    )
    return load(folder)[0], bridge


def end_aligned(own, lender):
    """The run's own activations [1, T, ...], and the lender's where their ends correspond."""
    common = min(own.shape[1], lender.shape[1])
    kept = own[:, : own.shape[1] - common]
    return torch.cat([kept, lender[:, lender.shape[1] - common :]], dim=1)


def take_all(activation, index, lent):
    return lent


def take_neuron(activation, index, lent):
    _, neuron = index
    activation[..., neuron] = lent[..., neuron]
    return activation


@torch.no_grad()
def patch(bridge, into, lender, answers, granularity):
    """Y of the run `into`, and how it changes with each unit of the run `lender` patched in."""
    tokens, others = torch.tensor([into]), torch.tensor([lender])
    logits, own = bridge.run_with_cache(tokens)
    _, other = bridge.run_with_cache(others)
    layers, neurons = bridge.cfg.n_layers, own[name_of("post", 0)].shape[-1]
    keys = [
        name_of(name, layer)
        for name in ("resid_post", "attn_out", "mlp_out", "z", "post")
        for layer in range(layers)
    ]
    lent = {key: end_aligned(own[key], other[key]) for key in keys}

    def y(logits):
        return logits[0, -1, answers[0]] - logits[0, -1, answers[1]]

    def change(logits):
        # Subtracted here, because sweeps keep what a metric gives in float32.
        return y(logits) - y_plain

    def sweep(how=patching.generic_activation_patch, lent=lent, **options):
        return how(bridge, tokens, lent, change, **options)

    def everywhere(name, **options):
        options |= {"activation_name": name, "index_axis_names": ("layer",)}
        return sweep(patch_setter=take_all, **options)

    y_plain = y(logits)
    if granularity == "layer":
        # The stream into the block stays, and what the block adds to it is lent.
        added = {}
        for layer in range(layers):
            before, after = name_of("resid_pre", layer), name_of("resid_post", layer)
            writes = end_aligned(own[after] - own[before], other[after] - other[before])
            added[after] = own[before] + writes
        found = everywhere("resid_post", lent=added)
    elif granularity == "module":
        found = torch.stack([everywhere("attn_out"), everywhere("mlp_out")], dim=-1)
    elif granularity == "head":
        found = sweep(patching.get_act_patch_attn_head_out_all_pos)
    elif granularity == "token":
        residual = sweep(
            patch_setter=patching.layer_pos_patch_setter,
            activation_name="resid_post",
            index_axis_names=("layer", "pos"),
        )
        attention = sweep(patching.get_act_patch_attn_out)
        mlp = sweep(patching.get_act_patch_mlp_out)
        # jaxmed counts positions from the prompt's end.
        found = torch.stack([residual, attention, mlp], dim=1).flip(-1)
        found = found[..., : min(len(into), len(lender))]
    else:
        units = patching.make_df_from_ranges([layers, neurons], ["layer", "neuron"])
        found = sweep(patch_setter=take_neuron, activation_name="post", index_df=units)
        found = found.reshape(layers, neurons)
    return float(y_plain), found.numpy()


@pytest.mark.parametrize("prompts", PAIRS)
@pytest.mark.parametrize("granularity", ["layer", "module", "head", "token", "neuron"])
def test_effects(models, granularity, prompts):
    decoder, bridge = models
    asked = PAIRS[prompts]
    found = jaxmed.scan(decoder, [asked], granularity, positions="prompt")[granularity]
    answers = asked.harmful_ids[0], asked.safe_ids[0]
    base, source = asked.prompt_ids, asked.counterfactual_ids
    y_base, nie = patch(bridge, base, source, answers, granularity)
    y_source, restored = patch(bridge, source, base, answers, granularity)
    tie = -restored

    largest = max(np.abs(nie).max(), np.abs(tie).max())
    assert largest > 0.1 and np.abs(nie - tie).max() > 1e3 * TOLERANCE * largest
    errors = []
    for ours, theirs in ((found.nie[0], nie), (found.tie[0], tie)):
        assert ours.shape == theirs.shape
        errors.append(np.abs(ours - theirs).max() / largest)
    print(f"\n{granularity}, {prompts}: NIE {errors[0]:.1e}, TIE {errors[1]:.1e} of {largest:.2g}")
    assert max(errors) <= TOLERANCE
    plain = [found.y_base[0] - y_base, found.y_source[0] - y_source]
    assert np.abs(plain).max() <= TOLERANCE * max(1, abs(y_base), abs(y_source))
