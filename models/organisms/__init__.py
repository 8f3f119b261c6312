"""Models with a planted answer, on which the whole method is scored.

An organism is a small Llama trained on an abstract token language, in which the only path from the
prompt to the comply/refuse logits is known by construction: detectors in layer 0, one head, gates.

    from models import organisms

    organism = organisms.build("late-mlp")      # trains it in about a minute; later calls find it
    decoder, tokenizer = load(organism.folder)
    organism.truth["neurons"]                   # the true mediators
"""

from models.organisms.organism import LATE_MLP, TRUTH, Organism, OrganismError, Recipe, build, truth

__all__ = ["LATE_MLP", "Organism", "OrganismError", "Recipe", "TRUTH", "build", "truth"]
