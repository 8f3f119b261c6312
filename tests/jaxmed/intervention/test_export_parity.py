"""Edits in the weights, as transformers reads them from the checkpoint."""

import numpy as np
import pytest

from jaxmed.intervention import export
from models import checkpoint
from tests import tiny
from tests.jaxmed.intervention.test_export import TOKENS, UNITS, damping

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="parity tests need torch: make parity")
transformers = pytest.importorskip("transformers")

STRENGTH = 0.7


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_reads_the_edit_from_the_checkpoint(family, tmp_path):
    decoder = tiny.decoder(family)
    wanted = np.asarray(decoder(TOKENS, edits=damping(decoder, STRENGTH))[0])
    checkpoint.save(export.damped(decoder, UNITS, STRENGTH), tmp_path / "edited")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "edited", attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS)[None]).logits[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
