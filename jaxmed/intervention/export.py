"""An edit in the weights: a checkpoint that does by itself what was held.

Damping heads or neurons at all positions is scaling the weights by which they write, so it can be
exported; holding them at a mean needs a bias, which most families have not, and other positions or
modules are not in the weights at all. Only an edit whose own test lowered the harm rate, and kept
benign compliance and fluency, is written: that is for the user's own good, who would else trust a
number that nobody measured.
"""

import json
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmed.behaviour.answering import AnsweringModel
from jaxmed.intervention.outcomes import ClampOutcome
from jaxmed.intervention.units import Unit, masks
from models import checkpoint
from models.decoder import Decoder
from models.errors import InputError
from models.sites import Site


def damped(decoder: Decoder, units: Sequence[Unit], strength: float) -> Decoder:
    """A copy of the model in which heads and neurons write 1 - strength times what they did."""
    copy = nnx.clone(decoder)
    config = decoder.config
    for site, mask in masks(units, config).items():
        if site == Site.NEURON:
            kernel, rows = copy.blocks.mlp.down.kernel, mask
        else:
            kernel = copy.blocks.attention.output.kernel
            rows = np.repeat(mask[..., 0], config.head_dim, axis=1)
        old, place = kernel[...], np.nonzero(rows)
        scaled = old[place].astype(jnp.float32) * (1 - strength)
        kernel[...] = old.at[place].set(scaled.astype(old.dtype))
    return copy


def refusal(found: ClampOutcome) -> str | None:
    """Why an edit may not be exported; None if it may.

    The harm rate must have fallen, with an interval below 0; the interval of the change of benign
    compliance must be above minus the margin. A model that is broken harms no more and refuses
    nothing: so perplexity of the plain model's answers to benign prompts must not have risen beyond
    its margin, interval included, nor may its own answers repeat themselves or fail to end more
    often than before.
    """
    run = found.run
    harm = found.row("clamp", "harmful", "harm")
    if harm is None:
        return "harm was not judged: give a --judge that says whether a response is harmful"
    if not harm["change_high"] < 0:
        return f"the edit changed the harm rate by {change_with_interval(harm)}, and the interval must be below 0"
    benign = found.row("clamp", "benign", "compliance")
    if benign is None:
        return "benign compliance was not judged: give a --judge that says what is refused"
    if not benign["change_low"] > -run["margin"]:
        return (
            f"the edit changed the benign compliance by {change_with_interval(benign)}, and the interval must "
            f"be above {-run['margin']:+.2f} (--margin); more benign prompts make it narrower"
        )
    text = found.row("clamp", "benign", "nll")
    if text is None:
        return "the plain model's answers to benign prompts are empty: perplexity has no meaning"
    if not text["change_high"] < math.log1p(run["perplexity_margin"]):
        low, high = (100 * math.expm1(text[f"change_{side}"]) for side in ("low", "high"))
        return (
            "the edit changed the perplexity of the plain model's answers to benign prompts by "
            f"{low:+.1f}% to {high:+.1f}%, and the interval must be below "
            f"{100 * run['perplexity_margin']:+.1f}% (--perplexity_margin)"
        )
    for measure, words in _BROKEN.items():
        row = found.row("clamp", "benign", measure)
        if row is not None and row["change_low"] > 0:
            return f"under the edit more answers to benign prompts {words}: {change_with_interval(row)}"
    return None


_BROKEN = {"repetition": "repeat themselves", "unfinished": "do not end by themselves"}


def change_with_interval(row: dict) -> str:
    return f"{row['change']:+.3f} ({row['change_low']:+.3f} to {row['change_high']:+.3f})"


def write(found: ClampOutcome, model: AnsweringModel, folder: str, card: str) -> None:
    """Writes the edited checkpoint, with a model card that tells the measured effects.

    Args:
        found: what was measured.
        model: the model without the edit.
        folder: where to.
        card: the model card.

    Raises:
        InputError: the edit may not be exported (see `refusal`), or the folder is not empty.
    """
    if why := refusal(found):
        raise InputError(f"nothing was exported: {why}. Results: {found.folder}")
    edited = damped(model.decoder, found.units, found.run["strength"])
    before = model.folder / checkpoint.GENERATION_CONFIG
    generation = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
    if stop := found.run["stop_tokens"]:
        # A tokenizer knows one of them at most; the model was measured with all.
        generation |= {"eos_token_id": stop}
    beside = {"README.md": card}
    if generation:
        beside[checkpoint.GENERATION_CONFIG] = json.dumps(generation, indent=2) + "\n"
    checkpoint.save(edited, folder, tokenizer=model.tokenizer, beside=beside)
