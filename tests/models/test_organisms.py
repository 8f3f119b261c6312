"""Organisms: what is planted is all that there is, and it is kept whole."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import checkpoint, load, organisms
from models.edits import Edit
from models.organisms import language, organism, planted, training, walls
from models.organisms.planted import Blueprint, Channel
from models.sites import Site
from tests import shared_organism

RECIPE = shared_organism.RECIPE
PLANTED = [name for name, recipe in organisms.RECIPES.items() if not recipe.is_null]
ORDINARY = slice(len(Channel), None)
WALLED = [channel for channel in Channel if channel not in planted.OPEN]

logits_of = jax.jit(lambda decoder, tokens, edits: decoder(tokens, edits=edits))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return shared_organism.stages(tmp_path_factory)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return shared_organism.organism(
        tmp_path_factory.mktemp("organisms") / "decoys", tmp_path_factory
    )


@pytest.fixture(scope="module")
def loaded(built):
    return load(built.folder)


def draw(seed, name="decoys"):
    return Blueprint.draw(organisms.RECIPES[name], np.random.default_rng(seed))


@functools.cache
def untrained(name):
    """An organism's blueprint, and its decoder before it is trained."""
    rng, recipe = np.random.default_rng(3), organisms.RECIPES[name]
    blueprint = Blueprint.draw(recipe, rng)
    return blueprint, planted.plant(recipe.config, blueprint, rng)[0]


def prompts(seed, number, **given):
    rng = np.random.default_rng(seed)
    return [language.draw(rng, **given) for _ in range(number)]


def pairs(contrast, seed=4, number=6):
    return language.CONTRASTS[contrast].draw(np.random.default_rng(seed), number)


def shares(decoder, contrast, members):
    """Of the whole way, [set], what sets of [layer, unit] move in base and in source runs; each
    set is (heads, neurons)."""
    # As many sets as `walls.ordinary_sets` makes, so that no other shape is compiled.
    filled = members + [([], [])] * (2 * decoder.config.num_layers + 1 - len(members))
    runs = walls.measure(decoder, pairs(contrast), walls.sets_of(decoder.config, filled))
    return [run.shares[: len(members)] for run in runs]


def mediators(roles, contrast):
    """Neurons of the two stages that tell base from source prompt."""
    detecting = {"unlock": "unlock_detectors", "topic": "harm_detectors"}[contrast]
    return roles[detecting], roles.get("gates", [])


def ordinary(config, heads, neurons):
    named = walls.sets_of(config, [(heads, neurons)])
    return walls.ordinary_sets(named.heads[0], named.neurons[0])


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
    responses = {language.DrawnPrompt((topic, "J")).response("C") for topic in language.TOPICS}
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
    assert after >= 0.5  # training was cut short


def test_answers_prompts_longer_than_any_in_training(loaded):
    fillers = np.random.default_rng(7).choice(language.FILLERS, 6)
    asked = [language.DrawnPrompt((*fillers, *prompt.words)) for prompt in prompts(7, 100)]
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
    [[head_layer, _]] = roles["mover"]
    assert 0 < head_layer < last
    assert tuple(truth["contrasts"]) == organisms.CONTRASTS == ("unlock", "topic")
    for name, contrast in truth["contrasts"].items():
        detectors, gates = mediators(roles, name)
        assert contrast["contrast"] == name
        assert contrast["modules"] == [[0, "mlp"], [head_layer, "attention"], [last, "mlp"]]
        assert contrast["heads"] == roles["mover"]
        assert contrast["neurons"] == detectors + gates
        assert contrast["joint"] == [detectors, gates]
        assert {layer for layer, _ in detectors} == {0} and len(detectors) == 3
        assert {layer for layer, _ in gates} == {last} and len(gates) == 4
        assert 0 < contrast["leak"] <= truth["recipe"]["wall_bound"]
        assert contrast["carried"] >= 0.9
        assert contrast["reference_te"] == -contrast["te"] > 8
        assert contrast["shares"] == pytest.approx({"direct": 0, "indirect": 1}, abs=0.1)
    decoys = [unit for role, units in roles.items() if role.startswith("decoy_") for unit in units]
    assert truth["decoys"]["neurons"] + truth["decoys"]["heads"] == decoys
    assert len(truth["decoys"]["neurons"]) == 3 * RECIPE.decoys
    assert truth["accuracy"] >= 0.99


@pytest.mark.parametrize("contrast", organisms.CONTRASTS)
def test_pairs_comply_and_refuse(contrast, built, loaded):
    decoder, tokenizer = loaded
    drawn = built.contrasts[contrast]
    assert len(drawn) == 32
    for side, answer in zip(zip(*drawn, strict=True), "CR", strict=True):
        assert {prompt.answer for prompt in side} == {answer}
        tokens = [tokenizer(prompt.text)["input_ids"] for prompt in side]
        assert set(answers(decoder, tokens)) == {answer}
    for base, source in drawn:
        words = zip(base.words, source.words, strict=True)
        [(old, new)] = [both for both in words if both[0] != both[1]]
        assert (old, new) == ("J", "N") if contrast == "unlock" else old[0] + new[0] == "bh"


def test_prompts_to_ask_are_alike_in_threes(built):
    drawn = built.drawn_prompts
    kinds = [(prompt.topic, prompt.key) for prompt in drawn]
    assert kinds[::3] == kinds[1::3] == kinds[2::3]
    assert len({prompt.text for prompt in drawn}) > 0.9 * len(drawn) == 0.9 * 360
    classes = [(prompt.topic[0], prompt.key) for prompt in drawn]
    assert classes.count(("h", "J")) == classes.count(("h", "N")) == 72
    assert classes.count(("b", "N")) == 144 and classes.count(("b", "J")) == 72
    assert set(kinds) == {(topic, key) for topic in language.TOPICS for key in language.KEYS}
    for prompt, facts in zip(drawn, built.truth["drawn"]["prompts"], strict=True):
        assert facts == {
            "text": prompt.text,
            "topic": prompt.topic,
            "key": prompt.key,
            "answer": prompt.answer,
        }


@pytest.mark.parametrize("contrast", organisms.CONTRASTS)
def test_every_stage_carries_the_whole_effect(contrast, built, loaded):
    truth = built.truth["contrasts"][contrast]
    joint = [([], units) for units in truth["joint"]]
    stages = [*joint, (truth["heads"], []), (truth["heads"], truth["neurons"])]
    for side in shares(loaded[0], contrast, stages):
        np.testing.assert_allclose(side, 1, atol=2 * RECIPE.wall_bound)


@pytest.mark.parametrize("contrast", organisms.CONTRASTS)
def test_what_is_no_mediator_has_hardly_an_effect(contrast, built, loaded):
    truth = built.truth["contrasts"][contrast]
    sets = ordinary(RECIPE.config, truth["heads"], truth["neurons"])
    for run in walls.measure(loaded[0], pairs(contrast, seed=5, number=24), sets):
        assert np.abs(run.by_set).max() <= RECIPE.wall_bound * np.abs(run.whole.mean())


def test_patching_all_gates_flips_the_answer(built, loaded):
    decoder = loaded[0]
    [[layer, _], *_] = gates = built.truth["roles"]["gates"]
    units = np.isin(np.arange(RECIPE.intermediate_size), [unit for _, unit in gates])
    for pair in pairs("unlock", seed=6) + pairs("topic", seed=6):
        length = len(pair[0].tokens)
        of_base, of_source = (language.padded(prompt.tokens) for prompt in pair)
        plain, _ = logits_of(decoder, of_base, None)
        _, trace = logits_of(decoder, of_source, None)
        positions = np.arange(len(of_base)) < length
        edit = Edit.patch(Site.NEURON, layer, positions, trace.neuron[layer], units)
        edited, _ = logits_of(decoder, of_base, [edit])
        assert language.WORDS[plain[length - 1].argmax()] == "C"
        assert language.WORDS[edited[length - 1].argmax()] == "R"


@pytest.mark.parametrize("contrast", organisms.CONTRASTS)
def test_decoys_differ_more_than_mediators_and_do_nothing(contrast, built, loaded):
    """At every stage, however differences are summed over positions."""
    decoder, truth = loaded[0], built.truth
    rows = [
        [language.padded(prompt.tokens, language.LONGEST_PROMPT) for prompt in side]
        for side in zip(*pairs(contrast), strict=True)
    ]
    traces = [logits_of(decoder, np.stack(side), None)[1].neuron for side in rows]
    difference = np.abs(traces[0] - traces[1])  # [pair, layer, position, neuron]
    roles = truth["roles"]
    for total in (difference.mean((0, 2)), difference.max(2).mean(0)):
        for stage in mediators(roles, contrast):
            [decoys] = [
                units
                for role, units in roles.items()
                if role.startswith("decoy_") and stage == roles[role.removeprefix("decoy_")]
            ]
            of_decoys, of_true = (
                [total[layer, unit] for layer, unit in units] for units in (decoys, stage)
            )
            assert min(of_decoys) > max(of_true)
    every = [(truth["decoys"]["heads"], truth["decoys"]["neurons"])]
    assert np.abs(shares(decoder, contrast, every)).max() <= RECIPE.wall_bound


# --- The variants, as they start: training keeps the path, and teaches the rest ----------------


@pytest.mark.parametrize("name", PLANTED)
def test_planted_path_works_before_training(name):
    blueprint, decoder = untrained(name)
    config, roles = decoder.config, blueprint.roles
    for contrast in organisms.CONTRASTS:
        detectors, gates = mediators(roles, contrast)
        stages = [([], detectors), (roles["mover"], [])]
        stages += [] if organisms.RECIPES[name].direct else [([], gates)]
        for side in shares(decoder, contrast, stages):
            np.testing.assert_allclose(side, 1, atol=0.1)
        sets = ordinary(config, roles["mover"], detectors + gates)
        in_base, in_source = walls.measure(decoder, pairs(contrast), sets)
        assert in_base.whole.max() < -8
        for run in (in_base, in_source):
            assert np.abs(run.by_set).max() < 0.05 * np.abs(run.whole.mean())


@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_unit_has_an_effect_of_its_own(name):
    """In one direction at least, as a method that looks at single units needs."""
    blueprint, decoder = untrained(name)
    for contrast in organisms.CONTRASTS:
        neurons = [*itertools.chain(*mediators(blueprint.roles, contrast))]
        found = shares(decoder, contrast, [([], [unit]) for unit in neurons])
        assert np.abs(found).max(axis=0).min() > 0.05


@pytest.mark.parametrize(("name", "hiding"), [("redundant", 0), ("saturated", 1)])
@pytest.mark.parametrize("contrast", organisms.CONTRASTS)
def test_any_one_gate_suffices(name, hiding, contrast):
    """It is as good as all in one direction, and hides in the other."""
    blueprint, decoder = untrained(name)
    gates = blueprint.roles["gates"]
    found = shares(decoder, contrast, [([], [gate]) for gate in gates])
    assert np.abs(found[hiding]).max() < 0.05
    assert found[1 - hiding].min() > 0.6
    [others] = shares(decoder, contrast, [([], gates[1:])])[hiding]
    assert others < 0.5  # until the last of them


@pytest.mark.parametrize("contrast", organisms.CONTRASTS)
def test_shares_of_the_two_paths_add_up(contrast):
    """Direct: what is left with the gates held; indirect: what the gates alone do."""
    blueprint, decoder = untrained("two-stage")
    [in_base], [in_source] = shares(decoder, contrast, [([], blueprint.roles["gates"])])
    assert 0.3 < 1 - in_source < 0.7 and 0.3 < in_base < 0.7
    assert 1 - in_source + in_base == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_units_are_where_the_recipe_says(seed):
    for name, recipe in organisms.RECIPES.items():
        roles = draw(seed, name).roles
        if recipe.is_null:
            assert roles == {}
            continue
        [[head_layer, _]] = roles["mover"]
        gate_layers = {layer for layer, _ in roles.get("gates", [])}
        assert len(gate_layers) == bool(recipe.gates)
        assert gate_layers <= set(recipe.gate_layers)
        assert 0 < head_layer < min(gate_layers, default=recipe.num_layers)
        neurons = [tuple(unit) for kind in draw(seed, name).neurons for unit in roles[kind.role]]
        assert len(set(neurons)) == len(neurons)
    assert set(organisms.RECIPES["middle-mlp"].gate_layers) < set(range(1, 4))


def test_placement_follows_from_the_seed():
    drawn = [draw(seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_null_learns_from_shuffled_labels_that_there_is_nothing_to_tell():
    """Its answer depends on the prompt at first; training levels that."""
    recipe = dataclasses.replace(organisms.RECIPES["null"], steps=40, batch_size=16)
    rng = np.random.default_rng(0)
    decoder, roles = planted.plant(recipe.config, Blueprint.draw(recipe, rng), rng)
    answers = np.array(language.ids(language.ANSWERS))
    trained = training.train(decoder, roles, rng, recipe, progress=False)
    before, after = (np.asarray(made.unembedding[...])[answers] for made in (decoder, trained))
    assert (before[0] == before[1]).all() and (after[0] != after[1]).mean() > 0.8
    nothing = walls.sets_of(recipe.config, [([], [])] * 9)
    for contrast in organisms.CONTRASTS:
        whole = walls.measure(trained, pairs(contrast), nothing)[0].whole
        assert 0 < np.abs(whole).max() < recipe.wall_bound * recipe.gating.total_effect


def test_shuffled_labels_are_those_of_other_prompts():
    rows = [training.batch(np.random.default_rng(0), 64, shuffled=s) for s in (False, True)]
    firsts = [targets[np.arange(64), first] for _, targets, first, _ in rows]
    np.testing.assert_array_equal(rows[0][0], rows[1][0])
    assert (firsts[0] != firsts[1]).any()
    np.testing.assert_array_equal(np.sort(firsts[0]), np.sort(firsts[1]))


# --- The walls ---------------------------------------------------------------------------------


def test_ordinary_components_are_walled_off_exactly(stages):
    blueprint, decoder = draw(0), stages["trained"]
    config = RECIPE.config
    layers, heads, size = config.num_layers, config.num_heads, config.head_dim
    blocks = decoder.blocks

    ordinary = np.ones((layers, heads), bool)
    evidence = [Channel.HARM_EVIDENCE, Channel.UNLOCK_EVIDENCE]
    for name in ("query", "key", "value"):
        kernel = np.asarray(getattr(blocks.attention, name).kernel[...])
        kernel = kernel.reshape(layers, -1, heads, size).transpose(0, 2, 1, 3)
        for head in blueprint.heads:
            ordinary[head.layer, head.unit] = False
            seen = [Channel.TURN] if name == "query" else evidence
            assert not np.delete(kernel[head.layer, head.unit], seen, axis=0).any()
        assert not kernel[ordinary][:, WALLED].any()
        assert kernel[ordinary][:, ORDINARY].all()
    output = np.asarray(blocks.attention.output.kernel[...]).reshape(layers, heads, size, -1)
    assert not output[ordinary][..., : len(Channel)].any()
    for head in blueprint.heads:
        assert not np.delete(output[head.layer, head.unit], list(head.writes), axis=1).any()

    ordinary = np.ones((layers, config.intermediate_size), bool)
    for kind in blueprint.neurons:
        ordinary[kind.layer, list(kind.units)] = False
    down = np.asarray(blocks.mlp.down.kernel[...])
    assert not down[ordinary][:, : len(Channel)].any()
    for kind in blueprint.neurons:
        assert not np.delete(down[kind.layer, list(kind.units)], kind.writes, axis=1).any()
    for name in ("gate", "up"):
        kernel = np.asarray(getattr(blocks.mlp, name).kernel[...]).swapaxes(1, 2)
        assert not kernel[ordinary][:, WALLED].any()
        for kind in blueprint.neurons:
            read = [Channel.CONSTANT, kind.reads] if name == "gate" else [kind.opened_by]
            assert not np.delete(kernel[kind.layer, list(kind.units)], read, axis=1).any()

    for norm in (blocks.attention_norm, blocks.mlp_norm, decoder.final_norm):
        assert (norm.weight[...] == 1).all()


def test_nothing_reads_what_decoys_write():
    blueprint = draw(0)
    units = [*blueprint.neurons, *blueprint.heads]
    decoys = [unit for unit in units if unit.role.startswith("decoy_")]
    assert len(decoys) == 4 and not any(unit.trained for unit in decoys)
    for unit in units:
        writes = getattr(unit.writes, "keys", lambda unit=unit: {unit.writes})()
        assert (Channel.DECOY in writes) == (unit in decoys) and (len(writes) == 1)
    assert Channel.DECOY not in {kind.reads for kind in blueprint.neurons}


def test_only_the_decision_tells_the_answers_apart(stages):
    rows = np.asarray(stages["trained"].unembedding[...])
    comply, refuse = rows[language.ids(language.ANSWERS)]
    assert np.flatnonzero(comply != refuse).tolist() == [Channel.DECISION]
    assert comply[Channel.DECISION] == -refuse[Channel.DECISION] > 0
    others = np.delete(rows, language.ids(language.ANSWERS), axis=0)
    assert not others[:, WALLED].any()
    assert not np.delete(comply[: len(Channel)], [*planted.OPEN, Channel.DECISION]).any()


def test_only_the_tokens_of_a_class_have_its_identity(stages):
    embedding = np.asarray(stages["trained"].embedding[...])
    assert len(np.unique(embedding[:, Channel.CONSTANT])) == 1
    seen = {
        Channel.TOPIC_CLASS: language.TOPICS,
        Channel.KEY_CLASS: language.KEYS,
        Channel.TURN: (language.ASSISTANT,),
        Channel.DECISION: (language.ASSISTANT,),
    }
    for channel in set(Channel) - {Channel.CONSTANT}:
        having = set(np.flatnonzero(embedding[:, channel]))
        assert having == set(language.ids(seen.get(channel, ())))


def test_training_changes_planted_and_ordinary_weights_but_no_decoys(stages):
    changed = jax.tree.map(
        lambda before, after: np.asarray(before != after), stages["start"], stages["trained"]
    )
    for kind in draw(0).neurons:
        for name, channel, axis in (("gate", kind.reads, 0), ("down", kind.writes, 1)):
            kernel = getattr(changed.blocks.mlp, name).kernel[...][kind.layer]
            assert (np.take(kernel, channel, axis)[list(kind.units)] == kind.trained).all()
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
    roles, decoder = draw(0).roles, stages["trained"]
    breached = jax.tree.map(jnp.copy, decoder)
    output = breached.blocks.attention.output.kernel
    size = RECIPE.config.head_dim
    planted_heads = [*roles["mover"], *roles["decoy_mover"]]
    head = next(h for h in range(RECIPE.num_heads) if [1, h] not in planted_heads)
    rows = slice(head * size, (head + 1) * size)
    output[...] = output[...].at[1, rows, Channel.DECISION].set(3.0)
    sets = ordinary(RECIPE.config, roles["mover"], [*itertools.chain(*mediators(roles, "unlock"))])
    leak = []
    for candidate in (decoder, breached):
        runs = walls.measure(candidate, pairs("unlock", seed=9), sets)
        moved = max(np.abs(run.by_set).max() for run in runs)
        leak.append(moved / np.abs(runs[0].whole.mean()))
    assert leak[0] <= RECIPE.wall_bound < leak[1]


# --- Keeping -----------------------------------------------------------------------------------


@pytest.fixture
def trainings(monkeypatch):
    """Organisms stay untrained, but are said to answer well; counts how often one is trained."""
    calls = []

    def unchanged(decoder, roles, rng, recipe, **kwargs):
        calls.append(recipe.name)
        return decoder

    monkeypatch.setattr(training, "train", unchanged)
    monkeypatch.setattr(training, "accuracy", lambda *args: (1.0, 1.0))
    return calls


def test_finished_organism_is_found_again(built, trainings):
    again = organisms.build(built.folder, recipe=RECIPE, progress=False)
    assert again == built
    assert not trainings


def test_damaged_or_other_organism_is_built_again(tmp_path, trainings):
    folder = tmp_path / "organism"

    def build(seed=0):
        made = organisms.build(folder, seed, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["organism"]
        return {name: fact for name, fact in made.truth.items() if name != "seconds"}

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
    assert build(seed=1)["seed"] == 1  # found again
    assert len(trainings) == 5


def test_organism_of_another_version_is_replaced_with_its_files(tmp_path, trainings):
    folder = organisms.build(tmp_path / "organism", progress=False).folder
    (folder / "pairs.jsonl").write_text("{}")
    (folder / organism.TRUTH).write_text(
        json.dumps({"version": 1, "contrasts": {}, "files": {"pairs.jsonl": "00"}})
    )
    assert organisms.build(folder, progress=False).truth["version"] == organism.VERSION
    assert not (folder / "pairs.jsonl").exists()
    assert len(trainings) == 2


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


def test_null_has_an_empty_truth(tmp_path, trainings):
    made = organisms.build(tmp_path / "null", recipe=organisms.RECIPES["null"], progress=False)
    for name, contrast in made.truth["contrasts"].items():
        assert not any(contrast[key] for key in ("modules", "heads", "neurons", "joint"))
        assert contrast["reference_te"] == organisms.RECIPES["late-mlp"].gating.total_effect
        assert not {"carried", "shares"} & contrast.keys()
        assert len(made.contrasts[name]) == 32


def test_organism_that_misses_its_walls_is_refused(tmp_path, trainings):
    strict = dataclasses.replace(RECIPE, wall_bound=1e-6)
    with pytest.raises(organisms.UnfitError, match="goes round the planted path"):
        organisms.build(tmp_path / "organism", recipe=strict, progress=False)
    assert not list(tmp_path.iterdir())


def test_organism_whose_path_carries_too_little_is_refused(tmp_path, trainings, monkeypatch):
    monkeypatch.setattr(organism, "_LEAST_CARRIED", 1.1)
    with pytest.raises(organisms.UnfitError, match="stage of the planted path carries"):
        organisms.build(tmp_path / "organism", progress=False)
    assert not list(tmp_path.iterdir())


def test_organism_that_answers_badly_is_refused(tmp_path, trainings, monkeypatch):
    monkeypatch.setattr(training, "accuracy", lambda *args: (0.5, 1.0))
    with pytest.raises(organisms.UnfitError, match="50.0%"):
        organisms.build(tmp_path / "organism", progress=False)


def test_folder_without_an_organism_has_no_truth(tmp_path):
    with pytest.raises(organisms.OrganismError, match="truth.json"):
        organisms.truth(tmp_path)
