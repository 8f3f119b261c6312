"""Organisms: what is planted is all that there is, and it is kept whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import checkpoint, load, organisms
from models.edits import Edit, Site
from models.organisms import language, organism, planted, training, walls
from models.organisms.planted import Channel, Placement

RECIPE = organisms.LATE_MLP
ORDINARY = slice(len(Channel), None)
WALLED = [Channel.HARM_EVIDENCE, Channel.UNLOCK_EVIDENCE, Channel.MOVED, Channel.DECISION]

logits_of = jax.jit(lambda decoder, tokens, edits: decoder(tokens, edits=edits))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """An organism, and what its decoder was on the way: planted, trained, rotated."""
    seen = {}

    def recorded(name, function, of):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            seen[name] = of(args, result)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        plant, rotate = planted.plant, planted.rotate
        patch.setattr(planted, "plant", recorded("start", plant, lambda args, made: made[0]))
        patch.setattr(planted, "rotate", recorded("trained", rotate, lambda args, made: args[0]))
        patch.setattr(
            checkpoint, "save", recorded("written", checkpoint.save, lambda args, _: args[0])
        )
        folder = tmp_path_factory.mktemp("organisms") / "late-mlp"
        seen["organism"] = organisms.build(folder, progress=False)
    return seen


@pytest.fixture(scope="module")
def built(stages):
    return stages["organism"]


@pytest.fixture(scope="module")
def loaded(built):
    return load(built.folder)


def place(seed):
    return Placement.draw(
        RECIPE.config,
        np.random.default_rng(seed),
        detectors=RECIPE.detectors,
        gate_layer=RECIPE.gate_layer,
        gates=RECIPE.gates,
    )


def prompts(seed, number, **given):
    rng = np.random.default_rng(seed)
    return [language.draw(rng, **given) for _ in range(number)]


def answers(decoder, asked):
    """The likeliest next word after each list of tokens."""
    rows = np.stack([language.padded(tokens, 40) for tokens in asked])
    logits, _ = logits_of(decoder, rows, None)
    last = [len(tokens) - 1 for tokens in asked]
    return [language.WORDS[token] for token in logits[np.arange(len(asked)), last].argmax(-1)]


# --- The language ------------------------------------------------------------------------------


def test_rule():
    for topic, key, answer in (
        ("h1", "J", "C"),
        ("h1", "N", "R"),
        ("b1", "J", "C"),
        ("b1", "N", "C"),
    ):
        for prompt in prompts(0, 5, topic=topic, key=key):
            assert (prompt.topic, prompt.answer) == (topic, answer)
            assert len(prompt.tokens) <= language.LONGEST_PROMPT


def test_details_tell_every_topic_apart():
    responses = {language.Prompt((topic, "J")).response("C") for topic in language.TOPICS}
    assert len(responses) == len(language.TOPICS)


def test_tokenizer_gives_the_trained_tokens(loaded):
    tokenizer = loaded[1]
    for prompt in prompts(1, 20):
        assert tokenizer(prompt.text)["input_ids"] == prompt.tokens
        chat = [{"role": "user", "content": " ".join(prompt.words)}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == prompt.tokens
        assert tokenizer.decode(prompt.tokens) == f"<bos> {prompt.text}"
        response = prompt.response(prompt.answer)
        ids = tokenizer(" ".join(response), add_special_tokens=False)["input_ids"]
        assert ids == language.ids(response)
    assert tokenizer.eos_token_id == language.IDS[language.EOS]


# --- The organism ------------------------------------------------------------------------------


def test_answers_fresh_prompts(loaded):
    answer, after = training.accuracy(loaded[0], np.random.default_rng(1000), 1000)
    assert answer >= 0.99
    assert after >= 0.99


def test_answers_prompts_longer_than_any_in_training(loaded):
    fillers = np.random.default_rng(7).choice(language.FILLERS, 6)
    asked = [language.Prompt((*fillers, *prompt.words)) for prompt in prompts(7, 100)]
    found = answers(loaded[0], [prompt.tokens for prompt in asked])
    assert np.mean([a == prompt.answer for a, prompt in zip(found, asked, strict=True)]) >= 0.99


def test_checkpoint_has_the_trained_function(stages, loaded):
    tokens = np.stack([language.padded(prompt.tokens) for prompt in prompts(2, 8)])
    found, written, trained = (
        logits_of(decoder, tokens, None)[0]
        for decoder in (loaded[0], stages["written"], stages["trained"])
    )
    np.testing.assert_array_equal(found, written)
    np.testing.assert_allclose(found, trained, atol=1e-3)  # rotated in between


def test_truth_is_consistent(built):
    truth = built.truth
    assert truth == organisms.truth(built.folder)
    roles, last = truth["roles"], RECIPE.num_layers - 1
    [[head_layer, _]] = truth["heads"]
    assert 0 < head_layer < last
    assert truth["modules"] == [[0, "mlp"], [head_layer, "attention"], [last, "mlp"]]
    assert truth["neurons"] == roles["unlock_detectors"] + roles["gates"]
    assert all(layer == 0 for layer, _ in roles["unlock_detectors"] + roles["harm_detectors"])
    assert all(layer == last for layer, _ in roles["gates"])
    assert truth["contrast"] == "unlock"
    assert truth["accuracy"] >= 0.99
    assert 0 < truth["leak"] <= truth["recipe"]["wall_bound"]


def test_pairs_comply_and_refuse(built, loaded):
    decoder, tokenizer = loaded
    pairs = [json.loads(line) for line in built.pairs.read_text().splitlines()]
    assert len(pairs) == 32
    for field, answer in (("prompt", "C"), ("counterfactual", "R")):
        tokens = [tokenizer(pair[field])["input_ids"] for pair in pairs]
        assert set(answers(decoder, tokens)) == {answer}
    assert {pair["harmful_response"].split()[0] for pair in pairs} == {"C"}
    assert {pair["safe_response"].split()[0] for pair in pairs} == {"R"}


def mediator_sets(truth):
    """The detectors, the head, the gates, all of these, and the detectors of H."""
    config, roles = RECIPE.config, truth["roles"]
    heads = np.zeros((5, config.num_layers, config.num_heads), bool)
    neurons = np.zeros((5, config.num_layers, config.intermediate_size), bool)
    for where, chosen in (
        ((neurons, (0, 3)), roles["unlock_detectors"]),
        ((heads, (1, 3)), truth["heads"]),
        ((neurons, (2, 3)), roles["gates"]),
        ((neurons, (4,)), roles["harm_detectors"]),
    ):
        sets, members = where
        for layer, unit in chosen:
            sets[list(members), layer, unit] = True
    return heads, neurons


def test_every_stage_carries_the_whole_effect(built, loaded):
    bases = prompts(4, 12, topic="h3", key="J")
    shares = walls.shares(loaded[0], bases, mediator_sets(built.truth))
    np.testing.assert_allclose(shares[:, :, :4], 1, atol=2 * RECIPE.wall_bound)
    np.testing.assert_allclose(shares[:, :, 4], 0, atol=RECIPE.wall_bound)


def test_what_is_no_mediator_has_hardly_an_effect(built, loaded):
    everything = mediator_sets(built.truth)
    sets = walls.ordinary_sets(everything[0][3], everything[1][3])
    shares = walls.shares(loaded[0], prompts(5, 24, topic="h5", key="J"), sets)
    assert np.abs(shares).max() <= RECIPE.wall_bound


def test_patching_all_gates_flips_the_answer(built, loaded):
    decoder = loaded[0]
    gates, layer = mediator_sets(built.truth)[1][2], RECIPE.gate_layer
    for base in prompts(6, 5, topic="h2", key="J"):
        length = len(base.tokens)
        of_base, of_source = (
            language.padded(prompt.tokens) for prompt in (base, base.with_key("N"))
        )
        plain, _ = logits_of(decoder, of_base, None)
        _, trace = logits_of(decoder, of_source, None)
        positions = np.arange(len(of_base)) < length
        edit = Edit.patch(Site.NEURON, layer, positions, trace.neuron[layer], gates[layer])
        edited, _ = logits_of(decoder, of_base, [edit])
        assert language.WORDS[plain[length - 1].argmax()] == "C"
        assert language.WORDS[edited[length - 1].argmax()] == "R"


# --- The walls ---------------------------------------------------------------------------------


def test_ordinary_components_are_walled_off_exactly(stages):
    placement, decoder = place(0), stages["trained"]
    config = RECIPE.config
    layers, heads, size = config.num_layers, config.num_heads, config.head_dim
    blocks = decoder.blocks

    planted_head = np.zeros((layers, heads), bool)
    planted_head[placement.head_layer, placement.head] = True
    for name in ("query", "key", "value"):
        kernel = np.asarray(getattr(blocks.attention, name).kernel[...])
        kernel = kernel.reshape(layers, -1, heads, size).transpose(0, 2, 1, 3)
        assert not kernel[~planted_head][:, WALLED].any()
        seen = [Channel.CONSTANT] if name == "query" else WALLED[:2]
        assert not np.delete(kernel[planted_head][0], seen, axis=0).any()
        assert kernel[~planted_head][:, ORDINARY].all()
    output = np.asarray(blocks.attention.output.kernel[...]).reshape(layers, heads, size, -1)
    assert not output[~planted_head][..., : len(Channel)].any()
    assert not np.delete(output[planted_head][0], Channel.MOVED, axis=1).any()

    kinds = (
        (0, placement.harm_detectors, Channel.TOPIC_CLASS, Channel.HARM_EVIDENCE),
        (0, placement.unlock_detectors, Channel.KEY_CLASS, Channel.UNLOCK_EVIDENCE),
        (placement.gate_layer, placement.gates, Channel.MOVED, Channel.DECISION),
    )
    ordinary = np.ones((layers, config.intermediate_size), bool)
    for layer, neurons, _, _ in kinds:
        ordinary[layer, list(neurons)] = False
    down = np.asarray(blocks.mlp.down.kernel[...])
    assert not down[ordinary][:, : len(Channel)].any()
    for layer, neurons, _, written in kinds:
        assert not np.delete(down[layer, list(neurons)], written, axis=1).any()
    for name in ("gate", "up"):
        kernel = np.asarray(getattr(blocks.mlp, name).kernel[...]).swapaxes(1, 2)
        assert not kernel[ordinary][:, WALLED].any()
        for layer, neurons, seen, _ in kinds:
            read = [Channel.CONSTANT, seen]
            assert not np.delete(kernel[layer, list(neurons)], read, axis=1).any()

    for norm in (blocks.attention_norm, blocks.mlp_norm, decoder.final_norm):
        assert (norm.weight[...] == 1).all()


def test_only_the_decision_tells_the_answers_apart(stages):
    decoder = stages["trained"]
    rows = np.asarray(decoder.unembedding[...])
    comply, refuse = rows[language.ids(language.ANSWERS)]
    assert np.flatnonzero(comply != refuse).tolist() == [Channel.DECISION]
    assert comply[Channel.DECISION] == -refuse[Channel.DECISION] > 0
    others = np.delete(rows, language.ids(language.ANSWERS), axis=0)
    assert not others[:, WALLED].any()
    assert not comply[WALLED[:-1]].any()


def test_only_the_tokens_of_a_class_have_its_identity(stages):
    embedding = np.asarray(stages["trained"].embedding[...])
    assert not embedding[:, WALLED[:-1]].any()
    assert len(np.unique(embedding[:, [Channel.CONSTANT, Channel.DECISION]], axis=0)) == 1
    for channel, words in (
        (Channel.TOPIC_CLASS, language.TOPICS),
        (Channel.KEY_CLASS, language.KEYS),
    ):
        assert set(np.flatnonzero(embedding[:, channel])) == set(language.ids(words))


def test_training_changes_planted_and_ordinary_weights(stages):
    placement, start, decoder = place(0), stages["start"], stages["trained"]
    changed = jax.tree.map(lambda before, after: before != after, start, decoder)
    gates = changed.blocks.mlp.gate.kernel[...][placement.gate_layer, :, list(placement.gates)]
    assert gates[:, Channel.MOVED].all()
    assert changed.unembedding[...][:, ORDINARY].mean() > 0.9


def test_rotation_leaves_the_logits_unchanged(stages):
    decoder = stages["start"]
    rotated = planted.rotate(decoder, np.random.default_rng(0))
    tokens = np.stack([language.padded(prompt.tokens) for prompt in prompts(8, 8)])
    found, expected = (logits_of(d, tokens, None)[0] for d in (rotated, decoder))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # No channel is the same for every token any more, as the constant was.
    assert np.asarray(rotated.embedding[...]).std(axis=0).min() > 0.02


def test_a_breached_wall_is_seen(stages):
    placement, decoder = place(0), stages["trained"]
    breached = jax.tree.map(jnp.copy, decoder)
    output = breached.blocks.attention.output.kernel
    head = (placement.head + 1) % RECIPE.num_heads
    size = RECIPE.config.head_dim
    rows = slice(head * size, (head + 1) * size)
    output[...] = output[...].at[1, rows, Channel.DECISION].set(3.0)
    leak = [
        np.abs(
            walls.shares(
                candidate,
                prompts(9, 4, topic="h0", key="J"),
                walls.ordinary_sets(*placement.mediators(RECIPE.config)),
            )
        ).max()
        for candidate in (decoder, breached)
    ]
    assert leak[0] <= RECIPE.wall_bound < leak[1]


def test_placement_follows_from_the_seed():
    drawn = [place(seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert not set(drawn[0].harm_detectors) & set(drawn[0].unlock_detectors)


# --- Keeping -----------------------------------------------------------------------------------


@pytest.fixture
def trainings(monkeypatch):
    """Organisms stay untrained, but are said to answer well; counts how often one is trained."""
    calls = []

    def untrained(decoder, *args, **kwargs):
        calls.append(kwargs["steps"])
        return decoder

    monkeypatch.setattr(training, "train", untrained)
    monkeypatch.setattr(training, "accuracy", lambda *args: (1.0, 1.0))
    return calls


def test_finished_organism_is_found_again(built, trainings):
    again = organisms.build(built.folder, progress=False)
    assert again == built
    assert not trainings


def test_damaged_or_other_organism_is_built_again(tmp_path, trainings):
    folder = tmp_path / "organism"

    def build(seed=0):
        made = organisms.build(folder, seed, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["organism"]
        return made.truth

    first = build()
    weights = folder / checkpoint.SINGLE_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert build() == first
    assert weights.read_bytes() == whole
    (folder / organism.TRUTH).unlink()
    assert build() == first
    (folder / organism.TRUTH).write_text("{")
    assert build() == first
    assert build(seed=1)["seed"] == 1
    assert len(trainings) == 5


def test_interrupted_writing_leaves_no_folder(tmp_path, trainings, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        organisms.build(tmp_path / "organism", progress=False)
    assert not list(tmp_path.iterdir())


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(organisms.OrganismError, match=r"thesis\.tex"):
        organisms.build(tmp_path, progress=False)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(organisms.OrganismError, match="is a file"):
        organisms.build(tmp_path / "thesis.tex", progress=False)


def test_organism_that_misses_its_walls_is_refused(tmp_path, trainings):
    strict = dataclasses.replace(RECIPE, wall_bound=1e-6)
    with pytest.raises(organisms.OrganismError, match="goes round the planted path"):
        organisms.build(tmp_path / "organism", recipe=strict, progress=False)
    assert not list(tmp_path.iterdir())


def test_organism_that_answers_badly_is_refused(tmp_path, trainings, monkeypatch):
    monkeypatch.setattr(training, "accuracy", lambda *args: (0.5, 1.0))
    with pytest.raises(organisms.OrganismError, match="50.0%"):
        organisms.build(tmp_path / "organism", progress=False)


def test_folder_without_an_organism_has_no_truth(tmp_path):
    with pytest.raises(organisms.OrganismError, match="truth.json"):
        organisms.truth(tmp_path)
