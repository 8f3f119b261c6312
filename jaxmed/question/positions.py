"""Which positions of a base and a source prompt correspond, and which of them are edited."""

import dataclasses
import enum

import numpy as np

from jaxmed.data.pairs import Pair
from jaxmed.files.reading import DataError


class Align(enum.StrEnum):
    """How the two prompts are laid against each other."""

    END = "end"  # the last min(T, T') positions pair up: the chat template's suffix stays aligned
    START = "start"  # the first min(T, T') positions pair up
    SPAN = "span"  # the pair's own prompt_span and counterfactual_span pair up


class Positions(enum.StrEnum):
    """Which positions are edited."""

    LAST = "last"  # the last prompt token
    DIFFERING = "differing"  # from the first aligned position that differs to the prompt's end
    PROMPT = "prompt"  # all aligned prompt positions
    RESPONSE = "response"  # the positions of the teacher-forced response


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Which positions of the two prompts correspond.

    Attributes:
        base, source, length: positions [base, base + length) of x correspond to
            [source, source + length) of x'.
    """

    base: int
    source: int
    length: int

    def swapped(self) -> "Alignment":
        """The same with the roles of x and x' exchanged."""
        return Alignment(self.source, self.base, self.length)


@dataclasses.dataclass(frozen=True)
class Edited:
    """The edited positions of the base run, and where the source run has their values.

    Attributes:
        base, source: increasing, int [n]; a response follows its prompt in either run.
    """

    base: np.ndarray
    source: np.ndarray

    def swapped(self) -> "Edited":
        """The same with the roles of x and x' exchanged."""
        return Edited(self.source, self.base)


def align(pair: Pair, how: Align = Align.END) -> Alignment:
    """Pairs up the prompts' positions.

    Raises:
        DataError: alignment by span, and the pair has no spans, unequal ones, or ones outside it.
    """
    lengths = len(pair.prompt_ids), len(pair.counterfactual_ids)
    common = min(lengths)
    if how == Align.END:
        return Alignment(lengths[0] - common, lengths[1] - common, common)
    if how == Align.START:
        return Alignment(0, 0, common)
    base, source = pair.prompt_span, pair.counterfactual_span
    if base is None or source is None:
        raise DataError(
            f"{pair.where}: pair '{pair.id}' cannot be aligned by span: it gives no "
            "'prompt_span' and 'counterfactual_span'"
        )
    size = base[1] - base[0]
    if size != source[1] - source[0] or base[1] > lengths[0] or source[1] > lengths[1]:
        raise DataError(
            f"{pair.where}: pair '{pair.id}' cannot be aligned by span: {base} of "
            f"{lengths[0]} tokens and {source} of {lengths[1]} must be equally long and inside"
        )
    return Alignment(base[0], source[0], size)


def edited(
    pair: Pair, positions: Positions, how: Align = Align.END, response_length: int = 0
) -> Edited:
    """The positions that are edited, in both runs.

    Args:
        pair: the pair.
        positions: which positions are asked for.
        how: the alignment.
        response_length: tokens of the teacher-forced response that follows either prompt.

    Raises:
        DataError: the asked positions do not pair up.
    """
    lengths = len(pair.prompt_ids), len(pair.counterfactual_ids)
    if positions == Positions.RESPONSE:
        if not response_length:
            raise DataError(
                f"{pair.where}: pair '{pair.id}': positions='response', but the metric reads no "
                "response; use response_logprob_diff, or other positions"
            )
        offsets = np.arange(response_length)
        return Edited(lengths[0] + offsets, lengths[1] + offsets)
    paired = align(pair, how)
    ends_pair = (
        paired.base + paired.length == lengths[0] and paired.source + paired.length == lengths[1]
    )
    if positions in (Positions.LAST, Positions.DIFFERING) and not ends_pair:
        raise DataError(
            f"{pair.where}: pair '{pair.id}' cannot be aligned for positions='{positions}': its "
            f"prompts have {lengths[0]} and {lengths[1]} tokens, and with align='{how}' their "
            "last positions do not correspond; use align='end', or positions='prompt'"
        )
    first = 0
    if positions == Positions.LAST:
        first = paired.length - 1
    elif positions == Positions.DIFFERING:
        first = _first_difference(pair, paired, lengths)
    offsets = np.arange(first, paired.length)
    return Edited(paired.base + offsets, paired.source + offsets)


def _first_difference(pair: Pair, paired: Alignment, lengths: tuple[int, int]) -> int:
    """Offset of the first aligned position that differs; the end where the prompts are the same."""
    base = np.array(pair.prompt_ids)[paired.base :][: paired.length]
    source = np.array(pair.counterfactual_ids)[paired.source :][: paired.length]
    differing = np.flatnonzero(base != source)
    if len(differing):
        return int(differing[0])
    if lengths[0] != lengths[1]:
        raise DataError(
            f"{pair.where}: pair '{pair.id}' cannot be aligned for positions='differing': its "
            f"prompts of {lengths[0]} and {lengths[1]} tokens differ in no aligned position"
        )
    return paired.length
