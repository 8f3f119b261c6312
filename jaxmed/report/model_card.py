"""What is said of an edit in the weights: the model card of an exported checkpoint, or why there is
none."""

from jaxmed.intervention.export import Refusal
from jaxmed.intervention.outcomes import ClampOutcome
from jaxmed.report import rendering


def card(found: ClampOutcome, dtype: str) -> str:
    """The model card, Markdown.

    Args:
        found: what was measured.
        dtype: of the weights that are written.
    """
    text = rendering.render(
        "model_card.md.j2",
        run=found.run,
        units=found.units,
        kept=1 - found.run["strength"],
        dtype=dtype,
        rows=[row for row in found.table.to_pylist() if row["condition"] == "clamp"],
    )
    return text + "\n"


def refusal(why: Refusal) -> str:
    """Why nothing was exported, as part of a sentence."""
    return rendering.render("refusal.txt.j2", why=why)
