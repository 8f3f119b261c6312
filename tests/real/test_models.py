"""Published models: logits, layers, texts and effects against transformers and hooks in torch."""

import functools
from collections import Counter
from typing import NamedTuple

import jax
import numpy as np
import pytest

import jaxmed
from jaxmed.behaviour import generation
from jaxmed.behaviour.generation import Sampling
from jaxmed.data.pairs import Pair
from jaxmed.report import benchmark as tables
from jaxmed.validation import benchmark, numerical_error
from models import checkpoint, products
from tests.launch import process
from tests.models.test_parity import distance, run_hf, run_ours
from tests.real import published

pytestmark = pytest.mark.real
torch = pytest.importorskip("torch", reason="needs torch: make real")
transformers = pytest.importorskip("transformers")

# Of the largest value. Rounding grows with depth: SmolLM2's last layer is 1.7e-5 off in float32. In
# float64 transformers' rotary angles stay float32, whose rounding grows with the position: the
# texts are short there (SmolLM2: 6.7e-8, and 2.1e-6 at 783 tokens).
TOLERANCE = {"float32": 1e-4, "float64": 1e-6}
# Of the largest effect: the engine in float32 against two runs in float64. What a difference is
# carried through is a run in float32, whose last layer is as far off as above (SmolLM2: neurons
# 5.3e-6, heads 1.9e-5).
EFFECT_TOLERANCE = 5e-5
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=published.NAMES)
def folder(request):
    return published.folder(request.param)


@pytest.fixture(scope="module")
def ours(folder):
    return checkpoint.load(folder)


def theirs(folder, dtype):
    """transformers' own model."""
    # Eager attention has its softmax in float32, whatever the type of the rest.
    attention = "sdpa" if dtype == "float64" else "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    ).eval()
    if dtype == "float64":
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(rms_norm, module)
    return model


def rms_norm(module, inputs):
    """The norm in the type of its inputs, where transformers has it in float32."""
    gemma = hasattr(module, "eps")
    epsilon = module.eps if gemma else module.variance_epsilon
    normed = inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + epsilon)
    return normed * (module.weight + gemma)


def told(folder, what, worst):
    print(f"\n{folder.name}: {what} {worst:.2e}")
    return worst


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_and_every_layer(folder, dtype):
    model = theirs(folder, dtype)
    with jax.enable_x64(dtype == "float64"):
        decoder, tokenizer = checkpoint.load(folder, dtype=dtype)
        for text in (*published.TEXTS, *([published.LONG] if dtype == "float32" else [])):
            tokens = np.array(tokenizer(text)["input_ids"])
            logits, residual, normed = run_ours(decoder, tokens)
            logits2, residual2, normed2 = run_hf(model, tokens)
            layers = max(map(distance, residual, residual2))
            worst = max(distance(logits, logits2), layers, distance(normed, normed2))
            what = f"{dtype}, {len(tokens)} tokens: logits {distance(logits, logits2):.2e}, layers"
            told(folder, what, layers)
            assert worst <= TOLERANCE[dtype]


def test_greedy_texts(folder, ours):
    """Token by token what transformers generates."""
    decoder, tokenizer = ours
    model = theirs(folder, "float32")
    prompts = [tokenizer(text)["input_ids"] for text in published.TEXTS]
    made = generation.generate(
        decoder, prompts, stop=(), sampling=Sampling(NEW_TOKENS, temperature=0.0)
    )
    for prompt, one in zip(prompts, made, strict=True):
        with torch.inference_mode():
            wanted = model.generate(
                torch.tensor([prompt]),
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
            )
        assert list(one.tokens) == wanted[0, len(prompt) :].tolist()


def test_bfloat16_copy(folder, tmp_path):
    """As near to its float32 run as before; transformers' bfloat16 run is as far as it rounds."""
    copy = tmp_path / "copy"
    ran = process.call(
        "convert",
        f"--model={folder}",
        f"--out={copy}",
        "--dtype=bfloat16",
        f"--cache_dir={tmp_path / 'cache'}",
    )
    assert ran.returncode == 0, ran.stderr
    decoder, tokenizer = checkpoint.load(copy)
    assert decoder.config.dtype == "bfloat16"
    models = [theirs(copy, dtype) for dtype in ("float32", "bfloat16")]
    # A rounding is at most 2^-9. Some eight of them in each layer add up as random ones do.
    bound = 2**-9 * (8 * decoder.config.num_layers) ** 0.5
    for text in published.TEXTS:
        tokens = np.array(tokenizer(text)["input_ids"])
        exact, rounded = (run_hf(model, tokens)[0] for model in models)
        logits = run_ours(decoder, tokens)[0]
        told(folder, "a bfloat16 copy to its float32 run:", distance(logits, exact))
        told(folder, f"to transformers in bfloat16 (bound {bound:.2e}):", distance(logits, rounded))
        assert distance(logits, exact) <= TOLERANCE["float32"]
        assert distance(logits, rounded) <= bound


def test_prompts_are_those_of_the_template(folder, ours, tmp_path):
    """Text in the chat template, or with the tokenizer's special tokens where there is none."""
    _, tokenizer = ours
    chats = folder.name == "smollm2"
    assert bool(tokenizer.chat_template) == chats
    file = tmp_path / "pairs.jsonl"
    file.write_text(PAIR_LINE)
    pair = jaxmed.read_pairs(file, tokenizer, chat=chats)[0]
    for text, found in zip(("Name a river.", "Name a lake."), _prompts(pair), strict=True):
        if chats:
            wanted = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        else:
            wanted = tokenizer(text)["input_ids"]
        assert list(found) == list(wanted)


PAIR_LINE = (
    '{"id": "1", "prompt": "Name a river.", "counterfactual": "Name a lake.", '
    '"harmful_response": "The Rhine", "safe_response": "Lake Como"}'
)


def _prompts(pair):
    return pair.prompt_ids, pair.counterfactual_ids


class Place(NamedTuple):
    """What a unit computes: columns of a module's input or output, from the first to the last."""

    layer: int
    module: torch.nn.Module
    of_input: bool
    columns: tuple[int | None, int | None]


class Hooked:
    """Effects by the definition: a run of transformers' model in float64 with a unit replaced.

    The runs of many units are rows of one batch. All are of the same prompt, so nothing is padded;
    and each is the plain run up to its unit's layer, so it joins the batch there.

    Attributes:
        model: transformers' model.
        last: how many positions are patched, from the end.
    """

    def __init__(self, model, last):
        self.model, self.last = model, last
        self.blocks = blocks = model.base_model.layers
        norms = hasattr(blocks[0], "post_feedforward_layernorm")
        self.heads = [block.self_attn.o_proj for block in blocks]
        self.neurons = [block.mlp.down_proj for block in blocks]
        # What a module adds to the residual stream: Gemma 3 norms it first.
        self.modules = [
            (block.post_attention_layernorm, block.post_feedforward_layernorm)
            if norms
            else (block.self_attn, block.mlp)
            for block in blocks
        ]

    def where(self, granularity, unit):
        layer, index = unit
        if granularity == "module":
            module = self.modules[layer][("attention", "mlp").index(index)]
            return Place(layer, module, False, (None, None))
        if granularity == "head":
            size = self.model.config.head_dim
            return Place(layer, self.heads[layer], True, (index * size, (index + 1) * size))
        return Place(layer, self.neurons[layer], True, (index, index + 1))

    @torch.inference_mode()
    def run(self, tokens, answers, changes, joining=()):
        """The logit difference at the end of each row: of the plain run, and of those that join.

        Args:
            tokens: of the prompt.
            answers: the two tokens.
            changes: by place, a function that is given what is there at the last positions,
                [row, position, column], and may write into it.
            joining: ascending layers; for each, a row joins before it.
        """

        def join(rows, block, inputs):
            return (torch.cat([inputs[0], inputs[0][:1].expand(rows, -1, -1)]), *inputs[1:])

        def changed(place, activation):
            activation = activation.clone()
            changes[place](activation[:, -self.last :, slice(*place.columns)])
            return activation

        def before(place, module, inputs):
            return (changed(place, inputs[0]), *inputs[1:])

        def after(place, module, inputs, output):
            if isinstance(output, tuple):
                return (changed(place, output[0]), *output[1:])
            return changed(place, output)

        hooks = [
            place.module.register_forward_pre_hook(functools.partial(before, place))
            if place.of_input
            else place.module.register_forward_hook(functools.partial(after, place))
            for place in changes
        ]
        hooks += [
            self.blocks[layer].register_forward_pre_hook(functools.partial(join, rows))
            for layer, rows in Counter(joining).items()
        ]
        ran = self.model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        first, second = ran.logits[:, -1, list(answers)].numpy().T
        return first - second

    def seen(self, tokens, answers, places):
        """What is at each place in the plain run."""
        found = {}

        def look(place, activation):
            found[place] = activation[0].clone()

        self.run(tokens, answers, {place: functools.partial(look, place) for place in places})
        return found

    def changes(self, tokens, answers, values):
        """What the logit difference changes by where one place has its values, by place."""

        def write(row, value, activation):
            activation[row] = value

        places = sorted(values, key=lambda place: place.layer)
        writes = {
            place: functools.partial(write, row, values[place])
            for row, place in enumerate(places, start=1)
        }
        plain, *changed = self.run(tokens, answers, writes, [place.layer for place in places])
        return dict(zip(places, np.array(changed) - plain, strict=True))

    def effects(self, base, source, answers, chosen):
        """NIE and TIE of each unit, [unit, 2], by granularity."""
        places = {
            granularity: [self.where(granularity, unit) for unit in units]
            for granularity, units in chosen.items()
        }
        every = [place for some in places.values() for place in some]
        nie = self.changes(base, answers, self.seen(source, answers, every))
        tie = self.changes(source, answers, self.seen(base, answers, every))
        return {
            granularity: np.array([(nie[place], -tie[place]) for place in some])
            for granularity, some in places.items()
        }


def pair_of(tokenizer):
    """Two prompts that differ in a word, and two answers."""
    base, source = (tuple(tokenizer(text)["input_ids"]) for text in published.PAIR)
    harmful, safe = (
        tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in published.ANSWERS
    )
    return Pair(
        "pair",
        prompt_ids=base,
        counterfactual_ids=source,
        harmful_ids=(harmful,),
        safe_ids=(safe,),
    )


def test_precisions(folder, ours):
    """In bfloat16, neurons by every precision of products against float64: three parts are as
    exact as float32, two nearly."""
    decoder, tokenizer = ours
    some = benchmark.spread(decoder.config, 512)
    rows = numerical_error.measure(folder.name, decoder, pair_of(tokenizer), chosen=some)
    print("\n" + "\n".join(tables.numerical_error_table(rows)))
    worst = {
        precision: max(row.frobenius for row in rows if row.dtype == precision)
        for precision in products.PRECISIONS
    }
    order = {
        precision: min(row.spearman for row in rows if row.dtype == precision)
        for precision in products.PRECISIONS
    }
    # Differences are carried through a run in float32, whose last layer is some 1e-5 off itself.
    assert worst["float32"] <= EFFECT_TOLERANCE
    assert worst["split3"] <= 1.5 * worst["float32"]
    assert worst["split2"] <= 1.5 * worst["float32"] and worst["bfloat16"] <= 1e-2
    assert min(order["split3"], order["split2"]) >= 0.99999
    # 0.9997 on SmolLM2: of neurons whose effects are nearly equal some change places.
    assert order["bfloat16"] >= 0.999


def test_effects(folder, ours):
    """40 neurons, 20 heads and all modules, patched at every position of the prompt."""
    decoder, tokenizer = ours
    config = decoder.config
    pair = pair_of(tokenizer)
    base, source = pair.prompt_ids, pair.counterfactual_ids
    answers = [*pair.harmful_ids, *pair.safe_ids]
    rng = np.random.default_rng(0)

    def drawn(count, size):
        numbers = rng.choice(config.num_layers * size, count, replace=False)
        return [(int(number) // size, int(number) % size) for number in numbers]

    chosen = {
        "neuron": drawn(40, config.intermediate_size),
        "head": drawn(20, config.num_heads),
        "module": [(layer, m) for layer in range(config.num_layers) for m in ("attention", "mlp")],
    }
    found = jaxmed.scan(
        decoder, [pair], tuple(chosen), positions="prompt", chosen=chosen, progress=False
    )
    hooked = Hooked(theirs(folder, "float64"), min(len(base), len(source)))
    all_wanted = hooked.effects(base, source, answers, chosen)
    for granularity, units in chosen.items():
        wanted = all_wanted[granularity]
        index = [
            (layer, ("attention", "mlp").index(u) if isinstance(u, str) else u)
            for layer, u in units
        ]
        layers, numbers = np.transpose(index)
        both = (getattr(found[granularity], name)[0] for name in ("nie", "tie"))
        got = np.stack([effects[layers, numbers] for effects in both], axis=1)
        largest = np.abs(wanted).max()
        assert largest > 1e-3
        worst = told(
            folder,
            f"{granularity} effects, of the largest ({largest:.3g}):",
            np.abs(got - wanted).max() / largest,
        )
        assert worst <= EFFECT_TOLERANCE
