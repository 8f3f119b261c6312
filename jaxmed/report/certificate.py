"""The certificate: what certification found, as tables, figures and sentences."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed.analysis import circuits
from jaxmed.files import atomic
from jaxmed.report.figures import certificate as certificate_lib
from jaxmed.validation import outcomes, scoring
from jaxmed.validation.outcomes import CAUSAL, METHODS, Certificate, Interval, grouped
from models import organisms

TABLE, CURVES, ORGANISMS = "certify.parquet", "faithfulness.parquet", "organisms.parquet"
SCORES_FIGURE, CURVES_FIGURE = "certify.png", "faithfulness.png"
_DPI = 160


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
        SCORES_FIGURE: all(precision.values())
        and certificate_lib.draw_certificate(precision, METHODS),
        CURVES_FIGURE: curves
        and certificate_lib.draw_faithfulness(curves, circuits.CIRCUIT_SIZES, METHODS),
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
    for (name,), of in grouped(about, "organism"):
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
    modules, heads, neurons = (outcomes.over_seeds(table, name) for name in scoring.TRUTH_KEYS)
    timed = [
        row
        for row in table.to_pylist()
        if row["granularity"] == "neuron" and row["seconds"] is not None
    ]
    seconds = {
        key: [row["seconds"] for row in of] for key, of in grouped(timed, "organism", "method")
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
    for (organism, contrast), of in grouped(rows, "organism", "contrast"):
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
        for (organism, granularity), of in grouped(rows, "organism", "granularity")
    ]
    header = ["organism", "granularity", "units", "above the minimum", "discoveries"]
    return _markdown([*header, "not planted"], found)


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
            for _, of in grouped(causal, "organism", "seed", "contrast")
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
