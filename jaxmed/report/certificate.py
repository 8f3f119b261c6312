"""The certificate: what certification found, as tables, figures and verdicts; what these say is in
`templates/certificate*`."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed.analysis import circuits
from jaxmed.files import atomic
from jaxmed.report import rendering
from jaxmed.report.figures import certificate as figures
from jaxmed.validation import outcomes, scoring
from jaxmed.validation.outcomes import CAUSAL, METHODS, Certificate, Interval, grouped
from models import organisms

TABLE, CURVES, ORGANISMS = "certify.parquet", "faithfulness.parquet", "organisms.parquet"
SCORES_FIGURE, CURVES_FIGURE = "certify.png", "faithfulness.png"
_DPI = 160


@dataclasses.dataclass(frozen=True)
class OrganismRow:
    """The organisms of a name, and the worst of them; None where nothing is planted."""

    organism: str
    seeds: int
    least_accuracy: float | None
    largest_leak: float | None
    least_carried: float | None
    most_seconds: float | None


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """How a method scores on an organism: as `outcomes.Certificate` has it, over seeds; None where
    it does not rank units of a granularity."""

    organism: str
    method: str
    module_auroc: Interval | None
    head_auroc: Interval | None
    neuron: dict[str, Interval]
    median_seconds: float


@dataclasses.dataclass(frozen=True)
class JointRow:
    """The joint sets of an organism and contrast: their share of TE on other pairs, how many
    neurons they have, how many of all these are planted, and how many the true set has."""

    organism: str
    contrast: str
    share: Interval
    least_size: int
    most_size: int
    planted: int
    neurons: int
    true_size: int
    median_seconds: float


@dataclasses.dataclass(frozen=True)
class DiscoveryRow:
    """How many units of a granularity have an exact effect, are above the minimum effect and above
    their controls, and are none the less not planted."""

    organism: str
    granularity: str
    units: int
    candidates: int
    discoveries: int
    false_discoveries: int


@dataclasses.dataclass(frozen=True)
class Extreme:
    """The first row that has a least or largest value, and how many others have it.

    Attributes:
        row: of the certificate's table.
        ties: others that have it.
        everywhere: all rows have it, and they are several.
    """

    row: dict
    ties: int
    everywhere: bool

    @classmethod
    def of(
        cls, choose: Callable, rows: Sequence[dict], value: Callable[[dict], float]
    ) -> "Extreme | None":
        """Chosen by min or max of a value; None of no rows."""
        if not rows:
            return None
        row = choose(rows, key=value)
        count = sum(value(each) == value(row) for each in rows)
        return cls(row, count - 1, everywhere=count == len(rows) > 1)


@dataclasses.dataclass(frozen=True)
class FalseDiscoveries:
    """Units that were discovered where nothing is planted, of so many."""

    discoveries: int
    units: int


@dataclasses.dataclass(frozen=True)
class Worst:
    """The worst figures over all organisms, seeds and contrasts; None where there are none.

    Attributes:
        auroc: by the larger effect, of modules and heads.
        precision: of neurons, by the causal method that does best.
        joint_size: for the size of its truth.
        joint_share: on pairs that were not searched.
        false_discoveries: where nothing is planted.
        missed: the bound on strong neurons that a screen left out.
    """

    auroc: Sequence[Extreme]
    precision: Extreme | None
    joint_size: Extreme | None
    joint_share: Extreme | None
    false_discoveries: FalseDiscoveries | None
    missed: Extreme | None


def write(certificate: Certificate) -> None:
    """Writes tables and figures to the certificate's folder, in the place of earlier ones."""
    folder = certificate.folder
    for name, table in (
        (TABLE, certificate.table),
        (CURVES, certificate.curves),
        (ORGANISMS, certificate.organisms),
    ):
        atomic.replace_file(folder / name, lambda path, table=table: pq.write_table(table, path))
    precision = {
        granularity: {
            key: cells["precision_at_k"].mean
            for key, cells in outcomes.over_seeds(certificate.table, granularity).items()
            if cells["precision_at_k"].mean is not None
        }
        for granularity in scoring.TRUTH_KEYS
    }
    curves = _mean_curves(certificate.curves)
    drawings = {
        SCORES_FIGURE: all(precision.values()) and figures.draw_certificate(precision, METHODS),
        CURVES_FIGURE: curves
        and figures.draw_faithfulness(curves, circuits.CIRCUIT_SIZES, METHODS),
    }
    for name, drawing in drawings.items():
        if drawing:
            atomic.replace_file(
                folder / name,
                lambda path, drawing=drawing: drawing.savefig(path, format="png", dpi=_DPI),
            )
        else:
            (folder / name).unlink(missing_ok=True)


def _mean_curves(curves: pa.Table) -> dict[str, dict[str, np.ndarray]]:
    """Faithfulness by organism and method: over seeds, contrasts and estimands, [size]."""
    found = {}
    for row in curves.to_pylist():
        place = found.setdefault(row["organism"], {}).setdefault(row["method"], {})
        place.setdefault(row["fraction"], []).append(row["faithfulness"])
    return {
        organism: {
            method: np.array([np.mean(by_size[size]) for size in circuits.CIRCUIT_SIZES])
            for method, by_size in methods.items()
        }
        for organism, methods in found.items()
    }


def lines(certificate: Certificate) -> list[str]:
    """The certificate as Markdown tables, and what they say."""
    about = certificate.organisms.to_pylist()
    files = (TABLE, CURVES, ORGANISMS, SCORES_FIGURE, CURVES_FIGURE)
    return rendering.lines(
        "certificate.md.j2",
        settings={k: v for k, v in certificate.settings.items() if v not in ("", [], None)},
        organisms=_organism_rows([row for row in about if row["unfit"] is None]),
        methods=method_rows(certificate.table),
        joint=_joint_rows(certificate.table),
        discoveries=_discovery_rows(certificate.table),
        worst=worst(certificate.table),
        unfit=[row for row in about if row["unfit"] is not None],
        folder=certificate.folder,
        files=[name for name in files if (certificate.folder / name).exists()],
    )


def method_lines(table: pa.Table) -> list[str]:
    """How each method scores on each organism, as a Markdown table."""
    return rendering.lines("certificate_methods.md.j2", methods=method_rows(table))


def _organism_rows(about: list[dict]) -> list[OrganismRow]:
    def worst(of: list[dict], column: str, choose: Callable) -> float | None:
        return choose((row[column] for row in of if row[column] is not None), default=None)

    return [
        OrganismRow(
            organism=name,
            seeds=len(of),
            least_accuracy=worst(of, "accuracy", min),
            largest_leak=worst(of, "leak", max),
            least_carried=worst(of, "carried", min),
            most_seconds=worst(of, "seconds", max),
        )
        for (name,), of in grouped(about, "organism")
    ]


def method_rows(table: pa.Table) -> list[MethodRow]:
    """How each method scores on each organism where something is planted."""
    modules, heads, neurons = (outcomes.over_seeds(table, name) for name in scoring.TRUTH_KEYS)
    timed = [
        row
        for row in table.to_pylist()
        if row["granularity"] == "neuron" and row["seconds"] is not None
    ]
    seconds = {
        key: [row["seconds"] for row in of] for key, of in grouped(timed, "organism", "method")
    }
    return [
        MethodRow(
            organism=key[0],
            method=METHODS[key[1]],
            module_auroc=modules[key]["auroc"] if key in modules else None,
            head_auroc=heads[key]["auroc"] if key in heads else None,
            neuron=cells,
            median_seconds=float(np.median(seconds[key])),
        )
        for key, cells in neurons.items()
        if cells["auroc"].mean is not None
    ]


def _joint_rows(table: pa.Table) -> list[JointRow]:
    rows = [row for row in table.to_pylist() if row["joint_size"] is not None]
    found = []
    for (organism, contrast), of in grouped(rows, "organism", "contrast"):
        sizes = [row["joint_size"] for row in of]
        shares = [row["joint_share"] for row in of if row["joint_share"] is not None]
        found.append(
            JointRow(
                organism=organism,
                contrast=contrast,
                share=Interval.of(shares),
                least_size=min(sizes),
                most_size=max(sizes),
                planted=sum(row["joint_planted"] for row in of),
                neurons=sum(sizes),
                true_size=of[0]["true_size"],
                median_seconds=float(np.median([row["seconds"] for row in of])),
            )
        )
    return found


def _discovery_rows(table: pa.Table) -> list[DiscoveryRow]:
    columns = ("units", "candidates", "discoveries", "false_discoveries")
    rows = [row for row in table.to_pylist() if row["units"] is not None]
    return [
        DiscoveryRow(
            organism, granularity, **{name: sum(row[name] for row in of) for name in columns}
        )
        for (organism, granularity), of in grouped(rows, "organism", "granularity")
    ]


def worst(table: pa.Table) -> Worst:
    """The worst figures of the causal methods."""
    rows = table.to_pylist()
    planted = [row for row in rows if row["auroc"] is not None]
    coarse = [
        Extreme.of(
            min,
            [r for r in planted if (r["granularity"], r["method"]) == (granularity, "max")],
            lambda row: row["auroc"],
        )
        for granularity in ("module", "head")
    ]
    causal = [r for r in planted if r["granularity"] == "neuron" and r["method"] in CAUSAL]
    best = [
        max(of, key=lambda row: row["precision_at_k"])
        for _, of in grouped(causal, "organism", "seed", "contrast")
    ]
    null = [
        row
        for row in rows
        if row["units"] is not None and organisms.RECIPES[row["organism"]].is_null
    ]
    false, units = (sum(row[name] for row in null) for name in ("false_discoveries", "units"))
    return Worst(
        auroc=[each for each in coarse if each is not None],
        precision=Extreme.of(min, best, lambda row: row["precision_at_k"]),
        joint_size=Extreme.of(
            max,
            [row for row in rows if row["joint_size"] is not None],
            lambda row: row["joint_size"] / row["true_size"],
        ),
        joint_share=Extreme.of(
            min,
            [row for row in rows if row["joint_share"] is not None],
            lambda row: row["joint_share"],
        ),
        false_discoveries=FalseDiscoveries(false, units) if null else None,
        missed=Extreme.of(
            max,
            [row for row in rows if row["uncomputed"] is not None],
            lambda row: row["missed_bound"],
        ),
    )
