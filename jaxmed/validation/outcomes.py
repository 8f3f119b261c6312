"""What certification found: a row per organism, contrast, granularity and method."""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
from scipy import stats

from jaxmed.analysis import ranking

GROUP_SIZE = 8  # adjacent neurons that are edited together, as in arXiv 2604.11663

# Every method, by its name in the table.
METHODS = {
    **ranking.RANKINGS,
    "attribution": "attribution patching",
    "integrated": "integrated gradients",
    "activation": "activation difference",
    "groups": f"groups of {GROUP_SIZE} neurons",
}
CAUSAL = ("nie", "tie", "max", "joint")  # those that measure what an edit causes
# Those whose scores are effects, or estimates of effects, in the metric's unit.
EFFECTS = ("nie", "tie", "max", "attribution", "integrated", "groups")

ROW = pa.schema(
    [
        ("organism", pa.string()),
        ("seed", pa.int32()),
        ("contrast", pa.string()),
        ("granularity", pa.string()),
        ("method", pa.string()),
        ("auroc", pa.float64()),
        ("precision_at_k", pa.float64()),
        ("weakest_planted", pa.float64()),
        ("strongest_other", pa.float64()),
        ("joint_share", pa.float64()),
        ("joint_size", pa.int32()),
        ("true_size", pa.int32()),
        ("joint_planted", pa.int32()),
        ("cpr", pa.float64()),
        ("cmd", pa.float64()),
        ("candidates", pa.int32()),
        ("discoveries", pa.int32()),
        ("false_discoveries", pa.int32()),
        ("units", pa.int32()),
        ("uncomputed", pa.int32()),
        ("missed_bound", pa.int32()),
        ("seconds", pa.float64()),
    ]
)
CURVE = pa.schema(
    [
        ("organism", pa.string()),
        ("seed", pa.int32()),
        ("contrast", pa.string()),
        ("method", pa.string()),
        ("estimand", pa.string()),
        ("fraction", pa.float64()),
        ("faithfulness", pa.float64()),
    ]
)
ORGANISM = pa.schema(
    [
        ("organism", pa.string()),
        ("seed", pa.int32()),
        ("accuracy", pa.float64()),
        ("leak", pa.float64()),
        ("carried", pa.float64()),
        ("seconds", pa.float64()),
        ("unfit", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What certification found.

    Attributes:
        table: `certify.parquet`, a row per organism, seed, contrast, granularity and method.
            auroc, precision_at_k: fractions; null where nothing is planted.
            weakest_planted, strongest_other: of `EFFECTS`, the least size of a planted unit's mean
                effect (0 if a screen left it out) and the largest of another's, as shares of the
                mean TE; where nothing is planted, of the TE that a planted answer would have.
            joint_size, joint_planted, joint_share: of the joint set, how many neurons it has, how
                many of them are planted, and the lesser of its shares of TE by NIE and TIE on
                pairs that it was not searched on; null without such pairs.
            true_size: of the smallest planted set that carries the whole effect alone.
            cpr, cmd: of rankings of neurons, `circuits.circuit_areas`, the mean of both
                estimands; ranked and measured on the same pairs. Null where all neurons together
                carry next to nothing.
            candidates, discoveries, false_discoveries: of "max", units above the minimum effect,
                those above their random controls too (`controls.discoveries`), and those of them
                that are not planted.
            units: that have an exact effect.
            uncomputed, missed_bound: of "max" with a screen, the neurons that have none, and the
                95% bound on how many of these belong to the strongest (`audit.Audit`).
            seconds: that the method took on all pairs, compilation included where it was the first
                to need it; of a run, loading too. "nie", "tie" and "max" are one run, of both
                estimands; "joint" is that run and the search.
        curves: `faithfulness.parquet`, a row per organism, seed, contrast, method, estimand and
            fraction of the neurons; see `circuits.faithfulness`.
        organisms: `organisms.parquet`, a row per organism and seed: accuracy, leak and carried, the
            worst of both contrasts (`organisms.truth`); seconds that building took; or why it is
            unfit, and has no part in the tables.
        settings: by which the methods were run, by name.
        folder: where all this was written.
    """

    table: pa.Table
    curves: pa.Table
    organisms: pa.Table
    settings: dict
    folder: pathlib.Path

    @classmethod
    def of(
        cls, rows: list[dict], curves: list[dict], about: list[dict], settings: dict, folder
    ) -> "Certificate":
        """A certificate of rows; what a row does not have is null."""
        return cls(
            table_of(rows),
            pa.Table.from_pylist(curves, CURVE),
            pa.Table.from_pylist(about, ORGANISM),
            settings,
            pathlib.Path(folder),
        )


def table_of(rows: list[dict]) -> pa.Table:
    """Rows as `Certificate.table` has them."""
    return pa.Table.from_pylist(rows, ROW)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% t interval; None where there is nothing to be had."""

    mean: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, by_seed: list[float], bounds: tuple[float, float] = (0.0, np.inf)) -> "Interval":
        """Of one number for each seed, none of which can lie outside the bounds."""
        if not by_seed:
            return cls(None)
        mean, count = float(np.mean(by_seed)), len(by_seed)
        if count == 1:
            return cls(mean)
        half = stats.t.ppf(0.975, count - 1) * np.std(by_seed, ddof=1) / np.sqrt(count)
        return cls(mean, *np.clip([mean - half, mean + half], *bounds).tolist())

    def __str__(self) -> str:
        return self._shown("{:.3f}")

    @property
    def percent(self) -> str:
        """The interval of a share."""
        return self._shown("{:.2%}")

    def _shown(self, form: str) -> str:
        if self.mean is None:
            return ""
        mean = form.format(self.mean)
        if self.low is None:
            return mean
        low, high = form.format(self.low), form.format(self.high)
        return mean if low == high else f"{mean} ({low} to {high})"


# What is averaged over seeds, and within which bounds it lies.
_AVERAGED = {
    "auroc": (0.0, 1.0),
    "precision_at_k": (0.0, 1.0),
    "weakest_planted": (0.0, np.inf),
    "strongest_other": (0.0, np.inf),
    "cpr": (-np.inf, np.inf),
    "cmd": (0.0, np.inf),
}


def over_seeds(table: pa.Table, granularity: str) -> dict[tuple[str, str], dict[str, Interval]]:
    """What one granularity's rows say over seeds, by organism and method, in the table's order.

    Of each seed the mean over its contrasts is taken.
    """
    rows = [row for row in table.to_pylist() if row["granularity"] == granularity]
    return {
        key: {
            column: Interval.of(_by_seed(of, column), bounds)
            for column, bounds in _AVERAGED.items()
        }
        for key, of in grouped(rows, "organism", "method")
    }


def _by_seed(rows: list[dict], column: str) -> list[float]:
    known = [row for row in rows if row[column] is not None]
    return [float(np.mean([row[column] for row in of])) for _, of in grouped(known, "seed")]


def grouped(rows: list[dict], *columns: str):
    """Rows by the values of columns, in the order in which these first occur."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups.items()
