"""Directions that the user gives, and every way in which their file can be wrong."""

import numpy as np
import pytest

from jaxmed.question import directions
from models.errors import InputError
from models.sites import Site
from tests import tiny

CONFIG = tiny.config("llama")
RESIDUAL = np.eye(24)[:3]


def saved(tmp_path, **arrays):
    np.savez_compressed(tmp_path / "d.npz", **arrays)
    return str(tmp_path / "d.npz")


def test_directions_are_read_by_site_and_layer(tmp_path):
    path = saved(
        tmp_path, **{"residual.2": RESIDUAL, "mlp.0": RESIDUAL[0], "residual.0": -RESIDUAL}
    )
    found = directions.read(path, CONFIG)
    assert found.sites == (Site.RESIDUAL, Site.MLP)
    assert found.given.shape == (3, 2, 3)
    np.testing.assert_array_equal(found.given.sum(axis=-1), [[3, 1], [0, 0], [3, 0]])
    residual, mlp = found.of_site
    np.testing.assert_array_equal(residual.layers, [0, 0, 0, 2, 2, 2])
    np.testing.assert_array_equal(residual.numbers, [0, 1, 2] * 2)
    np.testing.assert_array_equal(residual.vectors, np.concatenate([-RESIDUAL, RESIDUAL]))
    assert (mlp.layers.tolist(), mlp.vectors.shape) == ([0], (1, 24))


def test_half_precision_vectors_are_scaled_to_length_1(tmp_path):
    vector = np.full(24, 24**-0.5, np.float16)
    found = directions.read(saved(tmp_path, **{"mlp.1": vector}), CONFIG)
    assert np.linalg.norm(found.of_site[0].vectors[0]) == pytest.approx(1, abs=1e-6)


def test_another_vector_place_or_site_is_another_hash(tmp_path):
    cases = [{"mlp.1": RESIDUAL}, {"mlp.2": RESIDUAL}, {"layer.1": RESIDUAL}, {"mlp.1": -RESIDUAL}]
    hashes = {directions.read(saved(tmp_path, **case), CONFIG).hash for case in cases}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"embedding.0": RESIDUAL}, "'embedding.0' is not named SITE.LAYER"),
        ({"mlp.3": RESIDUAL}, "'mlp.3' is not named SITE.LAYER .* a layer below 3"),
        ({"mlp.01": RESIDUAL}, "'mlp.01' is not named"),
        ({"mlp." + "9" * 5000: RESIDUAL}, "is not named"),
        ({"neuron.1": RESIDUAL}, r"'neuron.1' is float64 \[3, 24\]; floats \[40\]"),
        ({"mlp.1": RESIDUAL.astype(int)}, "'mlp.1' is int64"),
        ({"mlp.1": 2 * RESIDUAL}, "vector 0 of array 'mlp.1' has length 2; unit vectors"),
        ({"mlp.1": RESIDUAL * np.nan}, "has length nan"),
        ({"mlp.1": np.zeros((0, 24))}, "an array of none"),
        ({}, "it has no vectors"),
        ({"mlp.1": np.array([{}], object)}, "no npz file of plain arrays"),
    ],
)
def test_bad_arrays_are_named(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        directions.read(saved(tmp_path, **arrays), CONFIG)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + b"0" * 60])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no npz file of plain arrays"):
        directions.read(str(path), CONFIG)
    np.save(tmp_path / "d.npy", RESIDUAL)
    with pytest.raises(InputError, match="no npz file of plain arrays"):
        directions.read(str(tmp_path / "d.npy"), CONFIG)
    with pytest.raises(InputError, match="no npz file of plain arrays"):
        directions.read(str(tmp_path / "none.npz"), CONFIG)


def test_damaged_content_is_named(tmp_path):
    path = saved(tmp_path, **{"mlp.1": np.random.default_rng(0).normal(size=(50, 24))})
    with open(path, "r+b") as file:
        file.seek(200)
        file.write(bytes(200))
    with pytest.raises(InputError, match="no npz file of plain arrays"):
        directions.read(path, CONFIG)
