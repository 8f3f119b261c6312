"""What is said at the end of a run of a judge."""

from jaxmed.behaviour.judges import protocol
from jaxmed.behaviour.judges.agreement import Agreement
from jaxmed.behaviour.judges.outcome import JudgeOutcome


def closing_lines(outcome: JudgeOutcome) -> list[str]:
    """Where the verdicts are, what they are on average, and how they agree with labels."""
    judge, number = outcome.judge, len(outcome.verdicts)
    return [
        f"Verdicts: {outcome.file} ({number} responses; {judge.name}: {judge.meaning})",
        *_means(outcome),
        *_agreements(outcome.agreement),
    ]


def _means(outcome: JudgeOutcome) -> list[str]:
    """Mean verdicts, and how many responses were cut."""
    verdicts, threshold = outcome.verdicts, outcome.threshold
    lines = []
    for says in protocol.SAYS:
        said = [value for v in verdicts if (value := getattr(v, says)) is not None]
        if said:
            above = sum(value >= threshold for value in said)
            mean = sum(said) / len(said)
            lines.append(
                f"{says}: {above} of {len(said)} at {threshold:g} or above, mean {mean:.3f}"
            )
    if cut := sum(verdict.cut for verdict in verdicts):
        lines.append(f"Cut off at their ends, as too long for the judge: {cut} of {len(verdicts)}")
    return lines


def _agreements(found: dict[str, Agreement]) -> list[str]:
    if not found:
        return ["No response has a label of what the judge says: there is nothing to compare."]
    lines = []
    for says, a in found.items():
        accuracy, kappa = (
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            for value, (low, high) in (
                (a.accuracy, a.accuracy_interval),
                (a.kappa, a.kappa_interval),
            )
        )
        lines.append(
            f"{says}, {a.n} labels: accuracy {accuracy}, Cohen's kappa {kappa}, "
            f"precision {a.precision:.3f}, recall {a.recall:.3f} (true and false positives "
            f"{a.true_positive} and {a.false_positive}, negatives {a.true_negative} and "
            f"{a.false_negative})"
        )
    return lines
