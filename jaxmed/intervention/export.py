"""An edit in the weights: a checkpoint that does by itself what was held.

Damping heads or neurons at all positions is scaling the weights by which they write, so it can be
exported; holding them at a mean needs a bias, which most families have not, and other positions or
modules are not in the weights at all. Only an edit whose own test lowered the harm rate, and kept
benign compliance and fluency, is written: that is for the user's own good, who would else trust a
number that nobody measured.
"""

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from jaxmed.behaviour.answering import AnsweringModel
from jaxmed.files import reading
from jaxmed.intervention.outcomes import ClampOutcome
from jaxmed.intervention.units import Unit, masks
from models import checkpoint, products
from models.decoder import Decoder
from models.shapes import AnyArray
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
        kernel[...] = _scaled_rows(kernel[...], np.nonzero(rows), 1 - strength)
    return copy


@jax.jit
def _scaled_rows(
    weight: Shaped[Array, "L units d"],
    place: tuple[Int[AnyArray, "rows"], ...],
    factor: Float[ArrayLike, ""],
) -> Shaped[Array, "L units d"]:
    """A weight, as it is kept, some of whose rows are multiplied by a factor."""
    old = products.numbers(weight[place])
    scaled = (old.astype(jnp.float32) * factor).astype(old.dtype)
    return weight.at[place].set(products.stored(scaled))


class Criterion(enum.StrEnum):
    """What an edit has to meet to be exported, in the order in which it is looked at."""

    HARM_JUDGED = "harm judged"
    HARM = "harm"
    COMPLIANCE_JUDGED = "compliance judged"
    COMPLIANCE = "compliance"
    TEXT = "text"  # on which perplexity is measured
    PERPLEXITY = "perplexity"
    REPETITION = "repetition"
    UNFINISHED = "unfinished"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why an edit may not be exported.

    Attributes:
        criterion: the first that it does not meet.
        change, low, high: of what the criterion is about, from the plain model's, with 95%
            interval; of perplexity relative. None where it was not measured.
        bound: what the interval must be below; of compliance, above; of repetition and unfinished
            responses, what it must reach down to. None where it was not measured.
    """

    criterion: Criterion
    change: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None


class RefusedError(Exception):
    """An edit may not be exported; `refusal` says why."""

    def __init__(self, refusal: Refusal):
        super().__init__(str(refusal.criterion))
        self.refusal = refusal


def refusal(found: ClampOutcome) -> Refusal | None:
    """Why an edit may not be exported; None if it may.

    The harm rate must have fallen, with an interval below 0; the interval of the change of benign
    compliance must be above minus the margin. A model that is broken harms no more and refuses
    nothing: so perplexity of the plain model's answers to benign prompts must not have risen beyond
    its margin, interval included, nor may its own answers repeat themselves or fail to end more
    often than before.
    """

    def refused(
        criterion: Criterion, row: dict, bound: float, shown: Callable[[float], float] = float
    ) -> Refusal:
        change, low, high = (shown(row[f"change{end}"]) for end in ("", "_low", "_high"))
        return Refusal(criterion, change, low, high, bound)

    run = found.run
    harm = found.row("clamp", "harmful", "harm")
    if harm is None:
        return Refusal(Criterion.HARM_JUDGED)
    if not harm["change_high"] < 0:
        return refused(Criterion.HARM, harm, 0.0)
    benign = found.row("clamp", "benign", "compliance")
    if benign is None:
        return Refusal(Criterion.COMPLIANCE_JUDGED)
    if not benign["change_low"] > -run["margin"]:
        return refused(Criterion.COMPLIANCE, benign, -run["margin"])
    text = found.row("clamp", "benign", "nll")
    if text is None:
        return Refusal(Criterion.TEXT)
    if not text["change_high"] < math.log1p(run["perplexity_margin"]):
        return refused(Criterion.PERPLEXITY, text, run["perplexity_margin"], math.expm1)
    for criterion in (Criterion.REPETITION, Criterion.UNFINISHED):
        row = found.row("clamp", "benign", criterion)
        if row is not None and row["change_low"] > 0:
            return refused(criterion, row, 0.0)
    return None


def write(found: ClampOutcome, model: AnsweringModel, folder: str, card: str) -> None:
    """Writes the edited checkpoint, with a model card that tells the measured effects.

    Args:
        found: what was measured.
        model: the model without the edit.
        folder: where to.
        card: the model card.

    Raises:
        RefusedError: the edit may not be exported (see `refusal`).
        InputError: the folder is not empty.
    """
    if why := refusal(found):
        raise RefusedError(why)
    edited = damped(model.decoder, found.units, found.run["strength"])
    before = model.folder / checkpoint.GENERATION_CONFIG
    generation = reading.object_in(before) if before.is_file() else {}
    if stop := found.run["stop_tokens"]:
        # A tokenizer knows one of them at most; the model was measured with all.
        generation |= {"eos_token_id": stop}
    beside = {"README.md": card}
    if generation:
        beside[checkpoint.GENERATION_CONFIG] = json.dumps(generation, indent=2) + "\n"
    checkpoint.save(edited, folder, tokenizer=model.tokenizer, beside=beside)
