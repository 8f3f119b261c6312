"""Edits in the weights: the checkpoint does by itself what was held."""

import numpy as np
import pytest

from jaxmed.intervention import export, units
from jaxmed.intervention.units import Unit
from models.edits import Edit
from models.sites import Site
from tests import tiny

UNITS = [
    Unit(Site.NEURON, 0, 3),
    Unit(Site.NEURON, 2, 39),
    Unit(Site.NEURON, 2, 0),
    Unit(Site.HEAD, 1, 2),
    Unit(Site.HEAD, 1, 3),
]
TOKENS = np.array([5, 9, 30, 12, 44, 7, 7, 60])


def damping(decoder, strength):
    """The same as edits of a run."""
    everywhere = np.ones(len(TOKENS), bool)
    found = []
    for site, mask in units.masks(UNITS, decoder.config).items():
        for layer, own in enumerate(mask.reshape(decoder.config.num_layers, -1)):
            if own.any():
                found.append(Edit.affine(site, layer, everywhere, 1 - strength, 0.0, own))
    return found


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("family", tiny.costly_families())
def test_damped_weights_are_the_edit(family, strength):
    decoder = tiny.decoder(family)
    before = np.asarray(decoder(TOKENS)[0])
    wanted = np.asarray(decoder(TOKENS, edits=damping(decoder, strength))[0])
    found = np.asarray(export.damped(decoder, UNITS, strength)(TOKENS)[0])
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    assert np.abs(wanted - before).max() > 1e-3 * np.abs(before).max()
    assert (np.asarray(decoder(TOKENS)[0]) == before).all()  # the model itself is as it was
