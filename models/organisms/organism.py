"""Builds, checks and keeps organisms: a recipe and a seed make a folder."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time

import jax
import numpy as np

from models import checkpoint
from models.decoder import Decoder
from models.errors import InputError
from models.organisms import language, planted, training, walls
from models.organisms.language import DrawnPrompt
from models.organisms.planted import Blueprint
from models.organisms.recipes import RECIPES, Recipe

VERSION = 5  # of this package; an organism of another version is built again

CONTRASTS = tuple(language.CONTRASTS)
TRUTH = "truth.json"
_FILES = {
    TRUTH,
    "chat_template.jinja",
    "config.json",
    checkpoint.SINGLE_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
}

_NUM_PAIRS = 32  # of each contrast
# Topics and keys of the prompts that are drawn, and how many are; half of those with a topic of H
# have the key that unlocks them.
_PROMPTS = (
    (language.HARMFUL_TOPICS, language.KEYS, 144),
    (language.BENIGN_TOPICS, (language.LOCK,), 144),
    (language.BENIGN_TOPICS, (language.UNLOCK,), 72),
)
_ALIKE = 3  # prompts in a row have one topic and key: dealt out to three, each gets as many of all
_NUM_FRESH = 512  # prompts that the accuracy is measured on
_LEAST_ACCURACY = 0.99
_LEAST_CARRIED = 0.9  # share of the total effect that each stage of the planted path must have

# The detectors that tell base from source prompt; the others see the same in both.
_DETECTORS = {"unlock": "unlock_detectors", "topic": "harm_detectors"}


class OrganismError(InputError):
    """An organism that cannot be built or read; says why."""


class UnfitError(OrganismError):
    """A trained organism whose accuracy, walls or path are not as its recipe asks."""


@dataclasses.dataclass(frozen=True)
class Organism:
    """A finished organism.

    Attributes:
        folder: a checkpoint in Hugging Face's format, with `truth.json`.
        truth: what `truth` reads.
    """

    folder: pathlib.Path
    truth: dict

    @property
    def contrasts(self) -> dict[str, list[tuple[DrawnPrompt, DrawnPrompt]]]:
        """The base and source prompts that were drawn for each of `CONTRASTS`."""
        drawn = self.truth["drawn"]["contrasts"]
        return {
            name: [
                (DrawnPrompt.read(base["text"]), DrawnPrompt.read(source["text"]))
                for base, source in of
            ]
            for name, of in drawn.items()
        }

    @property
    def drawn_prompts(self) -> list[DrawnPrompt]:
        """Prompts to ask: topics of H with either key, then topics of B with N, then with J. Three
        in a row have the same topic and key."""
        return [DrawnPrompt.read(prompt["text"]) for prompt in self.truth["drawn"]["prompts"]]


def build(
    folder: str | os.PathLike,
    seed: int = 0,
    *,
    recipe: Recipe = RECIPES["late-mlp"],
    progress: bool = True,
) -> Organism:
    """Trains an organism, unless the folder holds it already.

    The folder appears, or is replaced, only once the organism is complete and has passed its
    checks. One that is damaged, or of another recipe, seed or version, is built again.

    Args:
        folder: where the organism is kept.
        seed: placement, weights and prompts follow from it.
        recipe: what is built; one of `RECIPES`, or another.
        progress: show a progress bar.

    Raises:
        OrganismError: if the folder holds files of something else.
        UnfitError: if the trained model misses the accuracy or the walls that the recipe asks for.
    """
    folder = pathlib.Path(os.path.expanduser(folder)).resolve()
    if folder.exists():
        if _is_finished(folder, seed, recipe):
            return Organism(folder, truth(folder))
        _refuse_foreign(folder)
    began = time.monotonic()
    rng = np.random.default_rng(seed)
    blueprint = Blueprint.draw(recipe, rng)
    # Accelerators round the products of float32 numbers unless told otherwise.
    with jax.default_matmul_precision("highest"):
        decoder, roles = planted.plant(recipe.config, blueprint, rng)
        decoder = training.train(decoder, roles, rng, recipe, progress=progress)
        decoder = planted.rotate(decoder, rng)
        pairs = {name: drawn.draw(rng, _NUM_PAIRS) for name, drawn in language.CONTRASTS.items()}
        facts = _facts(blueprint, recipe)
        facts |= _answers(decoder, recipe, rng)
        for contrast, about in facts["contrasts"].items():
            gates = blueprint.roles.get("gates", [])
            about |= _measured(decoder, recipe, about, gates, pairs[contrast])
            _check(about, recipe)
    facts["drawn"] = {
        "contrasts": {
            name: [[base.facts, source.facts] for base, source in of] for name, of in pairs.items()
        },
        "prompts": [prompt.facts for prompt in _draw_prompts(rng)],
    }
    facts |= {"seconds": time.monotonic() - began} | _origin(seed, recipe)
    _write(folder, decoder, facts)
    return Organism(folder, truth(folder))


def truth(folder: str | os.PathLike) -> dict:
    """Reads an organism's planted answer.

    Returns:
        contrasts: for each of `CONTRASTS`
            contrast: its name. "unlock": J -> N in prompts with a topic of H; "topic": B -> H in
                prompts with N. The base prompt is answered C, the source prompt R.
            modules, heads, neurons: the true mediators, as [layer, "attention" or "mlp"],
                [layer, head] and [layer, neuron].
            joint: sets of neurons, each of which alone carries the whole effect, patched into the
                base run as into the source run: all detectors, and all gates where all of it
                passes through them.
            te: mean total effect: by how much logit C - logit R is larger in the source run.
            reference_te: size of the total effect that others are compared with: that of `te`, or
                where nothing is planted, that which a planted answer would have.
            leak: the most that what is no mediator moves logit C - logit R in any pair, patched
                into either run, as a share of `reference_te`; where nothing is planted, the total
                effect counts too. Under the recipe's `wall_bound`.
            shares: of the total effect, "indirect", what the gates move when they are patched into
                the base run, and "direct", what is left of it when they are patched into the
                source run; absent where nothing is planted, as is
            carried: the least share of the total effect that a joint set or the planted head
                moves, patched into either run.
        roles: what the planted units do.
        decoys: the "heads" and "neurons" that copy planted units to no effect.
        drawn: prompts that were drawn and had no part in training, each with its text, topic, key
            and true answer: for each of "contrasts" pairs of a base and a source prompt; and
            "prompts" to ask (`Organism.drawn_prompts`).
        accuracy, continuation_accuracy: on fresh prompts, of the answer and of what follows it.
        seconds: that building it took.
        version, seed, recipe: what it was built from.
        files: BLAKE2b of every other file.

    Raises:
        OrganismError: if the folder holds no organism.
    """
    file = pathlib.Path(os.path.expanduser(folder)) / TRUTH
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OrganismError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict) or "contrasts" not in content:
        raise OrganismError(f"{file}: is not the truth of an organism of this version")
    return content


def _origin(seed: int, recipe: Recipe) -> dict:
    """As JSON has it, which knows no tuples."""
    recipe = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return {"version": VERSION, "seed": seed, "recipe": recipe}


def _facts(blueprint: Blueprint, recipe: Recipe) -> dict:
    """The part of `truth.json` that follows from where the units are."""
    roles = blueprint.roles
    heads, gates = (roles.get(role, []) for role in ("mover", "gates"))
    contrasts = {}
    for contrast, detecting in _DETECTORS.items():
        detectors = roles.get(detecting, [])
        sufficient = [detectors] + ([] if recipe.direct else [gates])
        stages = (("mlp", detectors), ("attention", heads), ("mlp", gates))
        contrasts[contrast] = {
            "contrast": contrast,
            "modules": [[units[0][0], module] for module, units in stages if units],
            "heads": heads,
            "neurons": detectors + gates,
            "joint": [units for units in sufficient if units],
        }
    decoys = {
        "heads": [[head.layer, head.unit] for head in blueprint.heads if not head.trained],
        "neurons": [
            unit for kind in blueprint.neurons if not kind.trained for unit in roles[kind.role]
        ],
    }
    return {"contrasts": contrasts, "roles": roles, "decoys": decoys}


def _answers(decoder: Decoder, recipe: Recipe, rng: np.random.Generator) -> dict[str, float]:
    """How well it answers; raises `UnfitError` if not well enough."""
    accuracy, continuation = training.accuracy(decoder, rng, _NUM_FRESH)
    if not (accuracy >= _LEAST_ACCURACY or recipe.is_null):
        raise UnfitError(
            f"the organism answers {accuracy:.1%} of fresh prompts rightly after {recipe.steps} "
            f"steps, and should {_LEAST_ACCURACY:.0%}; give the recipe more steps"
        )
    return {"accuracy": accuracy, "continuation_accuracy": continuation}


def _measured(
    decoder: Decoder,
    recipe: Recipe,
    about: dict,
    gates: list[list[int]],
    pairs: list[tuple[DrawnPrompt, DrawnPrompt]],
) -> dict:
    """What is measured of a contrast, for `truth.json`.

    Args:
        decoder, recipe, gates: the organism.
        about: what `_facts` says of the contrast.
        pairs: its prompts.
    """
    heads, neurons = about["heads"], about["neurons"]
    stages = [([], units) for units in about["joint"]] + [(heads, [])]
    named = walls.sets_of(recipe.config, [(heads, neurons), ([], gates), *stages])
    ordinary = walls.ordinary_sets(named.heads[0], named.neurons[0])
    runs = walls.measure(decoder, pairs, named + ordinary)

    te = float(runs[0].whole.mean())
    reference = recipe.gating.total_effect if recipe.is_null else abs(te)
    loose = [run.by_set[:, len(named) :] for run in runs]
    loose += [runs[0].whole] if recipe.is_null else []
    leak = max(float(np.abs(moved).max()) for moved in loose) / reference
    measured = {"te": te, "reference_te": reference, "leak": leak}
    if recipe.is_null:
        return measured
    base, source = (run.shares for run in runs)
    return measured | {
        "carried": float(min(shares[2 : len(named)].min() for shares in (base, source))),
        "shares": {"direct": float(1 - source[1]), "indirect": float(base[1])},
    }


def _draw_prompts(rng: np.random.Generator) -> list[DrawnPrompt]:
    """The prompts to ask."""
    drawn = []
    for topics, keys, number in _PROMPTS:
        for place in np.arange(number) // _ALIKE:
            topic, key = topics[place // len(keys) % len(topics)], keys[place % len(keys)]
            drawn.append(language.draw(rng, topic=topic, key=key))
    return drawn


def _check(about: dict, recipe: Recipe) -> None:
    """Raises `UnfitError` if the truth of a contrast would be wrong."""
    contrast, leak = about["contrast"], about["leak"]
    if not leak <= recipe.wall_bound:
        raise UnfitError(
            f"{leak:.1%} of the total effect goes round the planted path (contrast {contrast}), "
            f"more than the recipe's bound of {recipe.wall_bound:.1%}; its truth would be wrong. "
            "Try another seed"
        )
    carried = about.get("carried")
    if carried is not None and not carried >= _LEAST_CARRIED:
        raise UnfitError(
            f"a stage of the planted path carries {carried:.1%} of the total effect (contrast "
            f"{contrast}), and should {_LEAST_CARRIED:.0%}. Try another seed"
        )


def _write(folder: pathlib.Path, decoder: Decoder, facts: dict) -> None:
    """Writes the organism beside its folder, and moves it there when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
        complete = pathlib.Path(partial) / "organism"
        checkpoint.save(decoder, complete, tokenizer=language.tokenizer())
        facts |= {"files": _digests(complete)}
        (complete / TRUTH).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(complete, folder)


def _is_finished(folder: pathlib.Path, seed: int, recipe: Recipe) -> bool:
    """Whether the folder holds this very organism, whole."""
    try:
        found = truth(folder)
    except OrganismError:
        return False
    origin = _origin(seed, recipe)
    return {name: found.get(name) for name in origin} == origin and (
        found.get("files") == _digests(folder)
    )


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """BLAKE2b of an organism's files, but for `truth.json`."""
    return {
        file.name: hashlib.blake2b(file.read_bytes(), digest_size=32).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name in _FILES - {TRUTH}
    }


def _refuse_foreign(folder: pathlib.Path) -> None:
    """Raises unless everything in the folder may be replaced."""
    if not folder.is_dir():
        raise OrganismError(f"{folder}: is a file; choose a folder for the organism")
    own = set(_FILES)
    with contextlib.suppress(OrganismError):  # Those of another version are its own as well.
        own |= set(truth(folder).get("files", ()))
    foreign = sorted(file.name for file in folder.iterdir() if file.name not in own)
    if foreign:
        raise OrganismError(
            f"{folder}: holds {foreign[0]}, which is no file of an organism; choose another folder"
        )
