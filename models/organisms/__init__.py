"""Models with a planted answer, on which the whole method is scored.

An organism is a small Llama trained on an abstract token language, in which the only path from the
prompt to the comply/refuse logits is known by construction: detectors in layer 0, one head, gates.
`RECIPES` has its variants.

    from models import organisms

    organism = organisms.build("out/organisms/late-mlp-0", recipe=organisms.RECIPES["late-mlp"])
    decoder, tokenizer = load(organism.folder)      # trained in a minute; later calls find it
    organism.contrasts["unlock"]                    # base and source prompts
    organism.truth["contrasts"]["unlock"]["neurons"]    # the true mediators
"""

from models.organisms.organism import (
    CONTRASTS,
    TRUTH,
    Organism,
    OrganismError,
    UnfitError,
    build,
    truth,
)
from models.organisms.recipes import RECIPES, Recipe

__all__ = [
    "CONTRASTS",
    "RECIPES",
    "TRUTH",
    "Organism",
    "OrganismError",
    "Recipe",
    "UnfitError",
    "build",
    "truth",
]
