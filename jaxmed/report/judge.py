"""What is said at the end of a run of a judge."""

import dataclasses

from jaxmed.behaviour.judges import protocol
from jaxmed.behaviour.judges.outcome import JudgeOutcome
from jaxmed.report import rendering


@dataclasses.dataclass(frozen=True)
class Said:
    """What verdicts say by one of their parts.

    Attributes:
        part: of a verdict, as "harmful".
        number, above: responses of which it is said, and those of at least the threshold.
        mean: of the former.
    """

    part: str
    number: int
    above: int
    mean: float


def closing_lines(outcome: JudgeOutcome) -> list[str]:
    """Where the verdicts are, what they are on average, and how they agree with labels."""
    return rendering.lines(
        "judge.txt.j2",
        outcome=outcome,
        said=said(outcome),
        cut=sum(verdict.cut for verdict in outcome.verdicts),
        doubts=[doubt for doubt in protocol.doubts(outcome.verdicts) if doubt.none or doubt.unsure],
    )


def said(outcome: JudgeOutcome) -> list[Said]:
    """The verdicts by part, of those parts that the judge says anything of."""
    found = []
    for part in protocol.SAYS:
        values = [getattr(verdict, part) for verdict in outcome.verdicts]
        known = [value for value in values if value is not None]
        if known:
            above = sum(value >= outcome.threshold for value in known)
            found.append(Said(part, len(known), above, sum(known) / len(known)))
    return found
