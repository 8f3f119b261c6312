"""The certificate: what certification found, as tables, figures and sentences."""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from jaxmed import estimands, figures, scoring
from jaxmed import results as results_lib
from models import organisms

TABLE, CURVES, ORGANISMS = "certify.parquet", "faithfulness.parquet", "organisms.parquet"
SCORES_FIGURE, CURVES_FIGURE = "certify.png", "faithfulness.png"
_DPI = 160

GROUP_SIZE = 8  # adjacent neurons that are edited together, as in arXiv 2604.11663

# Every method, by its name in the table.
METHODS = {
    **scoring.RANKINGS,
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
        ("direction", pa.string()),
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
            cpr, cmd: of rankings of neurons, `estimands.circuit_areas`, the mean of both
                directions; ranked and measured on the same pairs. Null where all neurons together
                carry next to nothing.
            candidates, discoveries, false_discoveries: of "max", units above the minimum effect,
                those above their random controls too (`controls.discoveries`), and those of them
                that are not planted.
            units: that have an exact effect.
            uncomputed, missed_bound: of "max" with a screen, the neurons that have none, and the
                95% bound on how many of these belong to the strongest (`attribution.Audit`).
            seconds: that the method took on all pairs, compilation included where it was the first
                to need it; of a run, loading too. "nie", "tie" and "max" are one run, of both
                directions; "joint" is that run and the search.
        curves: `faithfulness.parquet`, a row per organism, seed, contrast, method, direction and
            fraction of the neurons; see `estimands.faithfulness`.
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


def write(certificate: Certificate) -> None:
    """Writes tables and figures to the certificate's folder, in the place of earlier ones."""
    folder = certificate.folder
    for name, table in (
        (TABLE, certificate.table),
        (CURVES, certificate.curves),
        (ORGANISMS, certificate.organisms),
    ):
        results_lib.replace_file(
            folder / name, lambda path, table=table: pq.write_table(table, path)
        )
    precision = {
        granularity: {
            key: cells["precision_at_k"].mean
            for key, cells in over_seeds(certificate.table, granularity).items()
            if cells["precision_at_k"].mean is not None
        }
        for granularity in scoring.TRUTH_KEYS
    }
    curves = _mean_curves(certificate.curves)
    drawings = {
        SCORES_FIGURE: all(precision.values()) and figures.draw_certificate(precision, METHODS),
        CURVES_FIGURE: curves
        and figures.draw_faithfulness(curves, estimands.CIRCUIT_SIZES, METHODS),
    }
    for name, drawing in drawings.items():
        if drawing:
            results_lib.replace_file(
                folder / name,
                lambda path, drawing=drawing: drawing.savefig(path, format="png", dpi=_DPI),
            )
        else:
            (folder / name).unlink(missing_ok=True)


def _mean_curves(curves: pa.Table) -> dict[str, dict[str, np.ndarray]]:
    """Faithfulness by organism and method: over seeds, contrasts and directions, [size]."""
    found = {}
    for row in curves.to_pylist():
        place = found.setdefault(row["organism"], {}).setdefault(row["method"], {})
        place.setdefault(row["fraction"], []).append(row["faithfulness"])
    return {
        organism: {
            method: np.array([np.mean(by_size[size]) for size in estimands.CIRCUIT_SIZES])
            for method, by_size in methods.items()
        }
        for organism, methods in found.items()
    }


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
        for key, of in _grouped(rows, "organism", "method")
    }


def _by_seed(rows: list[dict], column: str) -> list[float]:
    known = [row for row in rows if row[column] is not None]
    return [float(np.mean([row[column] for row in of])) for _, of in _grouped(known, "seed")]


def lines(certificate: Certificate) -> list[str]:
    """The certificate as Markdown tables, and what they say."""
    about = certificate.organisms.to_pylist()
    parts = [
        [_settings_line(certificate.settings)],
        _organism_lines([row for row in about if row["unfit"] is None]),
        method_lines(certificate.table),
        _joint_lines(certificate.table),
        _discovery_lines(certificate.table),
        [
            *_worst_lines(certificate.table),
            *_screen_lines(certificate.table),
            *(
                f"Not certified: {row['organism']} {row['seed']}: {row['unfit']}"
                for row in about
                if row["unfit"] is not None
            ),
            _files_line(certificate.folder),
        ],
    ]
    return [line for part in parts if part for line in (*part, "")][:-1]


def _settings_line(settings: dict) -> str:
    """What was certified, as the flags that ask for it."""
    given = (f"--{name}={value}" for name, value in settings.items() if value not in ("", [], None))
    return f"By the settings {' '.join(given)}:"


def _files_line(folder: pathlib.Path) -> str:
    files = (TABLE, CURVES, ORGANISMS, SCORES_FIGURE, CURVES_FIGURE)
    return f"Results: {folder} ({', '.join(name for name in files if (folder / name).exists())})"


def _markdown(header: list[str], rows: list[list]) -> list[str]:
    """A table; nothing where it would have no rows."""
    if not rows:
        return []
    cells = [
        header,
        ["---"] * len(header),
        *(["" if c is None else str(c) for c in r] for r in rows),
    ]
    return [f"| {' | '.join(row)} |" for row in cells]


def _organism_lines(about: list[dict]) -> list[str]:
    rows = []
    for (name,), of in _grouped(about, "organism"):
        found = [name, len(of)]
        for column, extreme, shown in (
            ("accuracy", min, "{:.3f}"),
            ("leak", max, "{:.1%}"),
            ("carried", min, "{:.1%}"),
            ("seconds", max, "{:.0f}"),
        ):
            values = [row[column] for row in of if row[column] is not None]
            found.append(shown.format(extreme(values)) if values else None)
        rows.append(found)
    header = ["organism", "seeds", "least accuracy", "largest leak", "least carried"]
    return _markdown([*header, "most seconds to build"], rows)


def method_lines(table: pa.Table) -> list[str]:
    """How each method scores on each organism, as a Markdown table."""
    modules, heads, neurons = (over_seeds(table, name) for name in scoring.TRUTH_KEYS)
    timed = [
        row
        for row in table.to_pylist()
        if row["granularity"] == "neuron" and row["seconds"] is not None
    ]
    seconds = {
        key: [row["seconds"] for row in of] for key, of in _grouped(timed, "organism", "method")
    }
    rows = []
    for (organism, method), cells in neurons.items():
        if cells["auroc"].mean is None:
            continue
        coarse = [found.get((organism, method)) for found in (modules, heads)]
        rows.append(
            [organism, METHODS[method]]
            + [found and found["auroc"] for found in coarse]
            + [cells[column] for column in ("auroc", "precision_at_k")]
            + [cells[column].percent for column in ("weakest_planted", "strongest_other")]
            + [cells[column] for column in ("cpr", "cmd")]
            + [f"{np.median(seconds[organism, method]):.1f}"]
        )
    header = ["organism", "method", "module AUROC", "head AUROC", "neuron AUROC"]
    header += ["neuron precision@k", "weakest planted", "strongest other", "CPR", "CMD"]
    header += ["median seconds"]
    return _markdown(header, rows)


def _joint_lines(table: pa.Table) -> list[str]:
    rows = [row for row in table.to_pylist() if row["joint_size"] is not None]
    found = []
    for (organism, contrast), of in _grouped(rows, "organism", "contrast"):
        sizes = [row["joint_size"] for row in of]
        found.append(
            [
                organism,
                contrast,
                Interval.of([row["joint_share"] for row in of if row["joint_share"] is not None]),
                f"{min(sizes)} to {max(sizes)}",
                f"{sum(row['joint_planted'] for row in of)} of {sum(sizes)}",
                of[0]["true_size"],
                f"{np.median([row['seconds'] for row in of]):.1f}",
            ]
        )
    header = ["organism", "contrast", "joint share of TE", "neurons", "planted", "true set"]
    return _markdown([*header, "median seconds"], found)


def _discovery_lines(table: pa.Table) -> list[str]:
    columns = ("units", "candidates", "discoveries", "false_discoveries")
    rows = [row for row in table.to_pylist() if row["units"] is not None]
    found = [
        [organism, granularity, *(sum(row[column] for row in of) for column in columns)]
        for (organism, granularity), of in _grouped(rows, "organism", "granularity")
    ]
    header = ["organism", "granularity", "units", "above the minimum", "discoveries"]
    return _markdown([*header, "not planted"], found)


def _grouped(rows: list[dict], *columns: str):
    """Rows by the values of columns, in the order in which these first occur."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups.items()


def _worst_lines(table: pa.Table) -> list[str]:
    """The worst figures of the causal methods, over all organisms, seeds and contrasts."""
    rows = table.to_pylist()
    planted = [row for row in rows if row["auroc"] is not None]
    said = []
    for granularity in ("module", "head"):
        if of := [r for r in planted if (r["granularity"], r["method"]) == (granularity, "max")]:
            least, where = _extreme(min, of, lambda row: row["auroc"])
            said.append(
                f"Least {granularity} AUROC by the larger effect: {least['auroc']:.3f} ({where})."
            )
    causal = [r for r in planted if r["granularity"] == "neuron" and r["method"] in CAUSAL]
    if causal:
        best = [
            max(of, key=lambda row: row["precision_at_k"])
            for _, of in _grouped(causal, "organism", "seed", "contrast")
        ]
        least, where = _extreme(min, best, lambda row: row["precision_at_k"])
        said.append(
            "Least neuron precision@k of the best causal method: "
            f"{least['precision_at_k']:.3f} ({where})."
        )
    if joint := [row for row in rows if row["joint_size"] is not None]:
        largest, where = _extreme(max, joint, lambda row: row["joint_size"] / row["true_size"])
        said.append(
            f"Largest joint set for its truth: {largest['joint_size']} neurons for "
            f"{largest['true_size']} ({where})."
        )
    if shared := [row for row in rows if row["joint_share"] is not None]:
        least, where = _extreme(min, shared, lambda row: row["joint_share"])
        said.append(
            "Least joint share of TE, on pairs that were not searched: "
            f"{least['joint_share']:.3f} ({where})."
        )
    null = [
        row
        for row in rows
        if row["units"] is not None and organisms.RECIPES[row["organism"]].is_null
    ]
    if null:
        false, units = (sum(row[name] for row in null) for name in ("false_discoveries", "units"))
        said.append(
            f"Discoveries where nothing is planted: {false} of {units} units ({false / units:.1%})."
        )
    return said


def _extreme(choose, rows: list[dict], value) -> tuple[dict, str]:
    """The first row of the least or largest value, and which rows have it."""
    found = choose(rows, key=value)
    ties = sum(value(row) == value(found) for row in rows)
    if ties == len(rows) > 1:
        return found, "everywhere"
    others = f", and {ties - 1} more" if ties > 1 else ""
    return found, f"{found['organism']} {found['seed']}, {found['contrast']}{others}"


def _screen_lines(table: pa.Table) -> list[str]:
    """How many of the strongest neurons a screen may have missed."""
    screened = [row for row in table.to_pylist() if row["uncomputed"] is not None]
    if not screened:
        return []
    worst, where = _extreme(max, screened, lambda row: row["missed_bound"])
    return [
        "Of the strongest neurons, missed by the screen: at most "
        f"{worst['missed_bound']} among {worst['uncomputed']} that were not computed ({where})."
    ]
