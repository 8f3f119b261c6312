"""What a judge said of a file of responses."""

import dataclasses
import pathlib

from jaxmed.behaviour.judges.agreement import Agreement
from jaxmed.behaviour.judges.protocol import Judge, Verdict


@dataclasses.dataclass(frozen=True)
class JudgeOutcome:
    """What a judge said of a file of responses.

    Attributes:
        file: where its verdicts are, beside what was judged.
        judge: the judge.
        verdicts: one on each response, in the file's order.
        agreement: with people's labels, of each part of a verdict that has any.
        threshold: a verdict of at least this counts as yes.
    """

    file: pathlib.Path
    judge: Judge
    verdicts: list[Verdict]
    agreement: dict[str, Agreement]
    threshold: float
