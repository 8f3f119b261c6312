"""Terms of a metric that are read off one run.

A metric's terms share their prompt. What is edited in the prompt is therefore carried once for all
of them: their responses follow the prompt side by side, as branches that do not see each other.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int

from jaxmed.question.metrics import Reading, Term
from models.shapes import AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """What one term adds to what is read.

    Attributes:
        sign: +1 or -1.
        rows: the term's rows among those of the run, [n].
        reading: the term's own; its offsets are those of a run of its response alone.
    """

    sign: int = dataclasses.field(metadata={"static": True})
    rows: Int[AnyArray, "*batch n"]
    reading: Reading


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Readings:
    """What is read off one run; arrays, as in `Reading`.

    Attributes:
        offsets: positions whose logits are read, counted from the last prompt token, [R]:
            increasing, each once, but that the last is repeated as padding.
        parts: what the terms make of them.
    """

    offsets: Int[AnyArray, "*batch R"]
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Joined:
    """One run of the metric, and all that is read off it.

    Attributes:
        response: tokens after the prompt: those of all responses, one after another.
        branches: which response each of these is of, from 1; none where there are not several.
        reading: what is read.
        whole_vocabulary: whether a term asks for the log-normaliser.
    """

    response: tuple[int, ...]
    branches: tuple[int, ...]
    reading: Readings
    whole_vocabulary: bool

    @property
    def rows(self) -> int:
        """At how many positions logits are read."""
        return len(np.unique(self.reading.offsets))

    def alike(self) -> tuple:
        """What runs have in common whose readings can be stacked, and made by one program."""
        leaves, structure = jax.tree.flatten(self.reading)
        return structure, self.whole_vocabulary, *map(np.shape, leaves)

    def branches_after(self, prompt: tuple[int, ...]) -> tuple[int, ...] | None:
        """The branches of a run's tokens, as of `Span`; None where there are not several."""
        return (0,) * len(prompt) + self.branches if self.branches else None


def together(terms: list[Term]) -> Joined:
    """All terms in one run. Responses end with the last position that is read, and equal ones are
    one, so that nothing is computed that nothing depends on."""
    lasts = [max(0, int(np.max(term.reading.offsets))) for term in terms]
    responses = [term.response[:last] for term, last in zip(terms, lasts, strict=True)]
    each = [response for response in dict.fromkeys(responses) if response]
    starts = dict(zip(each, np.cumsum([0, *map(len, each)]).tolist(), strict=False))
    offsets = []
    for term, response in zip(terms, responses, strict=True):
        own = np.asarray(term.reading.offsets)
        offsets.append(np.where(own > 0, own + starts.get(response, 0), own))
    branches = tuple(number for number, response in enumerate(each, 1) for _ in response)
    return Joined(
        response=tuple(token for response in each for token in response),
        branches=branches if len(each) > 1 else (),
        reading=_readings(terms, offsets),
        whole_vocabulary=any(term.whole_vocabulary for term in terms),
    )


def apart(terms: list[Term]) -> list[Joined]:
    """Each term in a run of its own, with its whole response."""
    return [
        Joined(
            response=term.response,
            branches=(),
            reading=_readings([term], [np.asarray(term.reading.offsets)]),
            whole_vocabulary=term.whole_vocabulary,
        )
        for term in terms
    ]


def _readings(terms: list[Term], offsets: list[Int[np.ndarray, "n"]]) -> Readings:
    """What terms read at the given offsets of their run."""
    read = np.unique(np.concatenate(offsets))
    parts = [
        Part(term.sign, np.searchsorted(read, own).astype(np.int32), term.reading)
        for term, own in zip(terms, offsets, strict=True)
    ]
    # A multiple of 8, so that responses of other lengths share a compilation.
    extra = -len(read) % 8 if len(read) > 1 else 0
    return Readings(np.pad(read, (0, extra), mode="edge").astype(np.int32), tuple(parts))
