"""What tests of effects share: a pair, directions, and how far two results are apart."""

import contextlib
import itertools

import jax
import numpy as np

from jaxmed.data import pairs
from jaxmed.question import directions
from jaxmed.reference import definition
from models.sites import Site

GRANULARITIES = ("layer", "module", "head", "token", "neuron")


def pair(base, source, harmful=2, safe=3, seed=0):
    """A random pair of the given numbers of tokens; its prompts end in the same two tokens."""
    generator = np.random.default_rng(seed)

    def draw(length):
        return tuple(generator.integers(8, 61, length).tolist())

    suffix = draw(2)
    return pairs.Pair(
        f"{base}-{source}",
        draw(base - 2) + suffix,
        draw(source - 2) + suffix,
        (6, *draw(harmful - 1)),
        (7, *draw(safe - 1)),
    )


# Unequal prompts whose four runs with responses have few lengths: 12 and 11 tokens, with 2 and 3.
UNEQUAL = pair(12, 11)


def some_directions(config, folder):
    """Directions at every site that may have them; read from a file, as a user's are."""
    generator = np.random.default_rng(5)
    counts = {
        "residual.0": 2,
        "layer.2": 1,
        "attention.0": 1,
        "mlp.1": 1,
        "head.1": 2,
        "neuron.2": 3,
    }
    arrays = {}
    for name, count in counts.items():
        size = directions.site_size(config, Site(name.partition(".")[0]))
        array = generator.normal(size=(count, size))
        arrays[name] = array / np.linalg.norm(array, axis=1, keepdims=True)
    np.savez(folder / "some.npz", **arrays)
    return directions.read(str(folder / "some.npz"), config)


@contextlib.contextmanager
def compiled_without_optimising():
    """For what is slower to compile than to run, and is not itself what users run."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def define(decoder, pair, question, granularities):
    """`definition.define_pair`, compiled in half the time."""
    with compiled_without_optimising():
        return definition.define_pair(decoder, pair, question, granularities)


def largest(found):
    sides = itertools.chain(found.nie.values(), found.tie.values())
    return max(np.nanmax(np.abs(side)) for side in sides)


def worst(found, reference):
    """Largest error of any unit, of the pair's largest effect."""
    errors = []
    for side, name in itertools.product(("nie", "tie"), reference.nie):
        got, want = getattr(found, side)[name], getattr(reference, side)[name]
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        errors.append(np.nanmax(np.abs(got - want)))
    return max(errors) / largest(reference)
