"""A question, and whether a pair and a model fit it."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxmed.data.pairs import Pair
from jaxmed.files.reading import DataError
from jaxmed.question import positions, sites
from jaxmed.question.directions import Directions
from jaxmed.question.effects import Sizes
from jaxmed.question.metrics import Metric
from jaxmed.question.positions import Align, Positions
from jaxmed.question.sites import SITES
from models.config import DecoderConfig
from models.sites import Site


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of every pair.

    Attributes:
        metric: the metric Y.
        positions: which positions are edited. The token granularity edits each aligned prompt
            position alone, whatever is asked here.
        align: how base and source prompt are laid against each other.
        group_size: adjacent neurons that are edited together.
        directions: what the direction granularity patches.
    """

    metric: Metric
    positions: Positions = Positions.LAST
    align: Align = Align.END
    group_size: int = 1
    directions: Directions | None = None


def unit_count(config: DecoderConfig, question: Question, site: Site) -> int:
    """Units of a site in each layer: query heads, groups of neurons, or 1."""
    if site == Site.HEAD:
        return config.num_heads
    return sites.group_count(config, question.group_size) if site == Site.NEURON else 1


def shapes(
    config: DecoderConfig, pair: Pair, question: Question, granularities: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Shape of one pair's effects by granularity; the first axis is the layer."""
    return {
        name: (config.num_layers, *_units_shape(config, pair, question, name))
        for name in granularities
    }


def _units_shape(
    config: DecoderConfig, pair: Pair, question: Question, granularity: str
) -> tuple[int, ...]:
    """Shape of what one layer has."""
    match granularity:
        case "layer":
            return ()
        case "module":
            return (len(SITES["module"]),)
        case "head":
            return (config.num_heads,)
        case "token":
            return len(SITES["token"]), int(token_columns(pair, question).max()) + 1
        case "neuron":
            return (sites.group_count(config, question.group_size),)
        case "direction" if question.directions is not None:
            return question.directions.given.shape[1:]
        case "direction":
            raise ValueError("granularity 'direction', and the question has no directions")
    raise ValueError(f"granularity '{granularity}' is not one of {', '.join(SITES)}")


def sizes(
    config: DecoderConfig,
    pairs: Iterable[Pair],
    question: Question,
    granularities: Iterable[str],
) -> Sizes:
    """How many units the model and these pairs have under the question."""
    positions = 0
    if "token" in granularities:
        positions = max(shapes(config, pair, question, ["token"])["token"][-1] for pair in pairs)
    directions = question.directions
    return Sizes(
        layers=config.num_layers,
        heads=config.num_heads,
        neurons=sites.group_count(config, question.group_size),
        positions=positions,
        sites=directions.sites if directions else (),
        directions=directions.given.shape[-1] if directions else 0,
    )


def token_columns(pair: Pair, question: Question) -> np.ndarray:
    """Where the token granularity stores the aligned positions: counted from the prompt's end,
    int [n], the last prompt token being 0."""
    edited = positions.edited(pair, Positions.PROMPT, question.align)
    return len(pair.prompt_ids) - 1 - edited.base


def check(
    config: DecoderConfig, pair: Pair, question: Question, granularities: Iterable[str]
) -> None:
    """Finds out whether a pair fits the model and the question, before anything is computed.

    Raises:
        DataError: it does not; the message names its file and line.
    """
    for name in ("prompt", "counterfactual", "harmful", "safe"):
        ids = getattr(pair, f"{name}_ids")
        outside = [i for i in ids if not 0 <= i < config.vocab_size]
        if outside:
            raise DataError(
                f"{pair.where}: pair '{pair.id}': token id {outside[0]} of {name}_ids is outside "
                f"the vocabulary of {config.vocab_size}"
            )
    terms = question.metric.terms(pair)
    for name in ("prompt", "counterfactual"):
        length = len(getattr(pair, f"{name}_ids"))
        longest = length + max(len(term.response) for term in terms)
        if not length:
            raise DataError(f"{pair.where}: pair '{pair.id}' has an empty {name}")
        if longest > config.max_positions:
            raise DataError(
                f"{pair.where}: pair '{pair.id}': its {name} with the response has {longest} "
                f"tokens, and the model has {config.max_positions} positions"
            )
    for term in terms:
        for tokens in np.asarray(term.reading.tokens)[np.asarray(term.reading.weights) > 0]:
            if not 0 <= tokens < config.vocab_size:
                raise DataError(
                    f"{pair.where}: pair '{pair.id}': {question.metric.name} reads token id "
                    f"{tokens}, outside the vocabulary of {config.vocab_size}"
                )
    edits = [
        positions.edited(pair, question.positions, question.align, len(term.response)).base
        for term in terms
    ]
    last_read = len(pair.prompt_ids) - 1 + np.array([np.max(t.reading.offsets) for t in terms])
    if any(map(len, edits)) and not any(
        np.any(e <= r) for e, r in zip(edits, last_read, strict=True)
    ):
        raise DataError(
            f"{pair.where}: pair '{pair.id}': {question.metric.name} reads nothing at or after the "
            f"positions that positions='{question.positions}' edits, so every effect would be 0"
        )
    if "token" in granularities:
        positions.edited(pair, Positions.PROMPT, question.align)
