"""Inputs that cannot be used: the first ends a run, or where that is asked all are left out."""

from collections.abc import Callable

from jaxmed.files.reading import DataError


class Skipped:
    """Inputs of a kind that were left out.

    Attributes:
        count: how many.
        on_bad: leaves one out, for what reads a file; None where the first one is an error.
        way_out: the end of the message of such an error; empty where there is none.
    """

    def __init__(
        self, kind: str, is_asked: bool, say: Callable[[str], None], told: str = "Skipped"
    ):
        """Begins with none.

        Args:
            kind: of the inputs, as `--skip_bad_KIND` has it.
            is_asked: whether that is asked.
            say: told why each is left out.
            told: how that begins.
        """
        self.count = 0
        self.on_bad = self.leave_out if is_asked else None
        self.way_out = "" if is_asked else f" (or leave such {kind} out: --skip_bad_{kind})"
        self._kind, self._say, self._told = kind, say, told

    def add(self, error: DataError) -> None:
        """Leaves one out; raises its error, with the way out, where that is not asked."""
        if self.on_bad is None:
            raise DataError(f"{error}{self.way_out}") from None
        self.on_bad(error)

    def tell(self, used: int) -> None:
        """Says how many were left out, if any, beside those that are used."""
        if self.count:
            self._say(f"Skipped {self.count} of {self.count + used} {self._kind}")

    def leave_out(self, error: DataError) -> None:
        """Counts it, and says why."""
        self.count += 1
        self._say(f"{self._told}: {error}")
