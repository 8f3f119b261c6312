"""Certification: every method looks for answers that were planted, and is scored by what it finds.

No one knows the true mediators inside a real model. An organism's are known by construction, so a
method and a setting that do not find them there are not to be believed elsewhere.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm

from jaxmed.analysis import circuits, controls, screening
from jaxmed.analysis import joint as joint_lib
from jaxmed.analysis import ranking as ranking_lib
from jaxmed.files import atomic
from jaxmed.question.effects import ESTIMANDS
from jaxmed.question.positions import Align, Positions
from jaxmed.report import certificate
from jaxmed.runs import mediate
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.mediate import MediateRun, MediateSettings
from jaxmed.runs.settings import like, setting
from jaxmed.store.results import Results
from jaxmed.validation import outcomes, scoring
from jaxmed.validation.outcomes import GROUP_SIZE, Certificate
from jaxmed.validation.truth import pairs_file
from jaxmed.version import __version__
from models import organisms
from models.errors import InputError
from models.organisms import Organism

GRADIENT_STEPS = 8  # of integrated gradients

_SCORES = "scores.json"
_METHOD = "settings.json"
_METRIC = "logit_diff"  # which the planted truth, and the walls, are about
# What, beside the settings, scores follow from.
_CONSTANTS = {
    "group_size": GROUP_SIZE,
    "gradient_steps": GRADIENT_STEPS,
    "candidates": joint_lib.CANDIDATES,
    "circuit_sizes": circuits.CIRCUIT_SIZES,
    "minimum_share": controls.MINIMUM_SHARE,
    "draws": controls.DRAWS,
    "columns": outcomes.ROW.names + outcomes.CURVE.names,
    "jaxmed": __version__,
}


@dataclasses.dataclass(frozen=True)
class CertifySettings:
    """Which organisms are looked at, and how the methods are run on them."""

    seeds: int = setting(
        help="How many of each organism; their seeds count from 0.", default=1, least=1
    )
    organism: tuple[str, ...] = setting(
        help=f"Which: any of {', '.join(organisms.RECIPES)}.",
        default=tuple(organisms.RECIPES),
        choices=organisms.RECIPES,
        commas=True,
    )
    organisms: str = setting(
        help="Folder that the trained models are kept in; half a minute each.",
        default="out/organisms",
        path=True,
    )
    out: str = setting(
        help="Folder for the results; what was scored there is not run again. Tables and figures "
        "hold the organisms and seeds that the last command asked for.",
        default="out/certify",
        path=True,
    )
    # Detectors read the middle of the prompt: at the last token they have no effect.
    positions: str = like(MediateSettings, "positions", default="prompt")
    align: str = like(MediateSettings, "align")
    screen: int = like(MediateSettings, "screen")
    screen_audit: int = like(MediateSettings, "screen_audit")
    screen_steps: int = like(MediateSettings, "screen_steps")
    # What is found should be no larger than what was planted, up to seven neurons.
    joint_size: int = like(MediateSettings, "joint_size", default=14)
    joint_share: float = like(MediateSettings, "joint_share")
    joint_pairs: int = like(MediateSettings, "joint_pairs")
    dtype: str = like(MediateSettings, "dtype")
    matmul_precision: str = like(MediateSettings, "matmul_precision")
    memory_gb: float | None = like(MediateSettings, "memory_gb")
    mesh: str = like(MediateSettings, "mesh")
    overwrite: bool = like(MediateSettings, "overwrite")

    @property
    def of_a_run(self) -> MediateSettings:
        """How the methods are run, on no checkpoint and no pairs yet."""
        own = {field.name for field in dataclasses.fields(self)}
        shared = [field.name for field in dataclasses.fields(MediateSettings) if field.name in own]
        values: dict[str, Any] = {name: getattr(self, name) for name in shared}
        # Each run is this process's own, whatever a launcher has started beside it.
        return MediateSettings(model="", pairs="", process=0, processes=1, **values)


def run(settings: CertifySettings, *, progress: bool = True) -> Certificate:
    """Builds or loads organisms, runs every method on them, and writes tables and figures.

    What was scored is kept under `settings.out`, and not run again.

    Args:
        settings: what is asked.
        progress: show a progress bar.

    Raises:
        InputError: a setting or a folder cannot be used, the folder holds scores of other settings
            (which `settings.overwrite` replaces), or not one organism was fit.
    """
    asked, names = settings.of_a_run, list(dict.fromkeys(settings.organism))
    _check(settings)
    for flag in ("organisms", "out"):
        folder = getattr(settings, flag)
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--{flag}={folder}: cannot be made ({error.strerror})") from error
    method = _method(asked)
    _write_method(pathlib.Path(settings.out) / _METHOD, method, settings.overwrite)
    rows, curves, about = [], [], []
    todo = list(itertools.product(range(settings.seeds), names))
    with tqdm.tqdm(todo, unit="organism", disable=not progress) as bar:
        for seed, name in bar:
            folder = pathlib.Path(settings.organisms) / f"{name}-{seed}"
            recipe = organisms.RECIPES[name]
            verb = "loading" if folder.exists() else "training"
            bar.set_description(f"{name} {seed}: {verb}")
            try:
                organism = organisms.build(folder, seed, recipe=recipe, progress=False)
            except organisms.UnfitError as error:
                about.append({"organism": name, "seed": seed, "unfit": str(error)})
                continue
            about.append(_about(organism))
            for contrast in organisms.CONTRASTS:
                bar.set_description(f"{name} {seed}: {contrast}")
                found = measure(organism, contrast, asked)
                rows += found["rows"]
                curves += found["curves"]
    if not rows:
        raise InputError(f"no organism is fit: {'; '.join(row['unfit'] for row in about)}")
    found = Certificate.of(rows, curves, about, method["settings"], settings.out)
    certificate.write(found)
    return found


def _check(settings: CertifySettings) -> None:
    """Refuses what cannot be run, before anything is trained."""
    settings_lib.check(settings)
    if not settings.organism:
        raise InputError(f"--organism: name any of {', '.join(organisms.RECIPES)}")
    if settings.positions == Positions.RESPONSE:
        raise InputError(
            "--positions=response: what is planted decides the first token of the answer, which no "
            "position of the answer can change"
        )
    if settings.align == Align.SPAN:
        raise InputError("--align=span: the organisms' pairs name no spans")
    asked = _settings_of(settings.of_a_run, "neuron")
    mediate.check(asked)
    computed = screening.MARGIN * settings.screen + settings.screen_audit
    for name in settings.organism:
        config = organisms.RECIPES[name].config
        mediate.check_counts(asked, config)
        neurons = config.num_layers * config.intermediate_size
        if settings.screen and computed >= neurons:
            raise InputError(
                f"--screen={settings.screen} --screen_audit={settings.screen_audit}: computes "
                f"{computed} neurons exactly, and {name} has {neurons}; make one of them smaller"
            )


def measure(organism: Organism, contrast: str, settings: MediateSettings) -> dict[str, list[dict]]:
    """Runs every method on one organism and contrast, unless its scores are there already.

    Args:
        organism: the organism.
        contrast: one of `organisms.CONTRASTS`.
        settings: how the methods are run; its out is the folder for the results. Its model, pairs
            and granularity are not read.

    Returns:
        "rows" and "curves", those of `Certificate`.

    Raises:
        InputError: the settings ask for another metric than that of the planted truth.
    """
    if settings.metric != _METRIC:
        raise InputError(f"--metric={settings.metric}: the planted truth is that of {_METRIC}")
    truth = organism.truth
    place = {
        "organism": truth["recipe"]["name"],
        "seed": truth["seed"],
        "contrast": contrast,
    }
    folder = pathlib.Path(settings.out) / "runs" / "-".join(map(str, place.values()))
    identity = _identity(organism, contrast, settings)
    if (scored := _kept_scores(folder / _SCORES, identity)) is not None:
        return scored
    settings = dataclasses.replace(
        settings,
        model=str(organism.folder),
        pairs=str(pairs_file(organism, contrast)),
        out=str(folder),
        overwrite=True,
    )
    scored = {
        part: [place | row for row in rows] for part, rows in _scored(settings, folder).items()
    }
    content = json.dumps(scored | {"identity": identity})
    atomic.replace_file(folder / _SCORES, lambda path: path.write_text(content, encoding="utf-8"))
    return scored


def _identity(organism: Organism, contrast: str, settings: MediateSettings) -> dict:
    """All that scores follow from, as JSON has it."""
    truth = organism.truth
    made = {
        "files": truth["files"],
        "truth": truth["contrasts"][contrast],
        "pairs": truth["drawn"]["contrasts"][contrast],
    }
    return json.loads(json.dumps({"organism": made} | _method(settings)))


def _method(settings: MediateSettings) -> dict:
    """The part of it that is the same for all organisms."""
    elsewhere = ("model", "pairs", "out", "granularity", "overwrite", "show_text", "memory_gb")
    elsewhere += ("mesh", "process", "processes", "retry_failed", "dry_run", "accelerator")
    asked = {
        name: value for name, value in dataclasses.asdict(settings).items() if name not in elsewhere
    }
    return json.loads(json.dumps({"settings": asked, "constants": _CONSTANTS}))


def _write_method(file: pathlib.Path, method: dict, overwrite: bool) -> None:
    """Notes by which settings the folder's scores are made; one folder has those of one method."""
    if (earlier := _read_object(file)) and not overwrite:
        changed = [
            f"{'--' if part == 'settings' else ''}{name} was {before}, is now {value}"
            for part, values in method.items()
            for name, value in values.items()
            if (before := earlier.get(part, {}).get(name)) != value
        ]
        if changed:
            raise InputError(
                f"{file.parent} holds scores of other settings: {'; '.join(changed)}: choose "
                "another --out, or --overwrite"
            )
    content = json.dumps(method, indent=2) + "\n"
    atomic.replace_file(file, lambda path: path.write_text(content, encoding="utf-8"))


def _kept_scores(file: pathlib.Path, identity: dict) -> dict[str, list[dict]] | None:
    """Scores of an earlier run of the same; None if there are none, or no whole ones."""
    scored = _read_object(file)
    return scored if scored.pop("identity", None) == identity else None


def _read_object(file: pathlib.Path) -> dict:
    """The JSON object of a file; empty where it holds none that is whole."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _settings_of(
    settings: MediateSettings, granularity: str, group_size: int = 1
) -> MediateSettings:
    """The settings of a run of one granularity: what only single neurons have is left out
    elsewhere."""
    changes: dict[str, Any] = {"granularity": (granularity,), "group_size": group_size}
    if granularity != "neuron" or group_size > 1:
        left_out = ("screen", "joint_size")
        for field in dataclasses.fields(MediateSettings):
            if field.name in left_out or settings_lib.about_field(field).needs in left_out:
                changes[field.name] = field.default
    return dataclasses.replace(settings, **changes)


def _measured(
    settings: MediateSettings, folder: pathlib.Path, granularity: str, group_size: int = 1
) -> tuple[Results, MediateRun]:
    """A run by the ordinary pipeline, in a folder of its own."""
    name = granularity if group_size == 1 else "group"
    settings = _settings_of(settings, granularity, group_size)
    return mediate.measure(dataclasses.replace(settings, out=str(folder / name)), progress=False)


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """Scores of units, [layer, unit], and the seconds that they took."""

    scores: np.ndarray
    seconds: float


def _scored(settings: MediateSettings, folder: pathlib.Path) -> dict[str, list[dict]]:
    """The rows of every granularity and method, and the curves of the neurons' rankings."""
    rows, curves = [], []
    for granularity in scoring.TRUTH_KEYS:
        results, asked = _measured(settings, folder, granularity)
        ranked = _ranked_by_run(results, granularity)
        ranked |= _ranked_without_edits(asked, granularity)
        if granularity == "neuron":
            ranked["groups"] = _ranked_in_groups(settings, folder, results.sizes.neurons)
        planted = scoring.truth_mask(results, granularity)
        truth = results.run["truth"]
        by_method = {
            name: _score_row(name, ranking, planted, truth) for name, ranking in ranked.items()
        }
        strength = ranked["max"].scores
        by_method["max"] |= _discovered(asked, granularity, strength, planted, truth)
        if audit := results.run.get("audit"):
            by_method["max"] |= {
                "uncomputed": audit["uncomputed"],
                "missed_bound": audit["bound"],
            }
        if granularity == "neuron" and truth["joint"]:
            joint = by_method.setdefault("joint", {})
            joint |= _joint_row(results.run.get("joint"), planted, truth)
            for name, curve in _faithfulness(asked, ranked).items():
                cpr, cmd = (float(np.mean(area)) for area in circuits.circuit_areas(curve))
                by_method[name] |= {"cpr": cpr, "cmd": cmd}
                curves += _curve_rows(name, curve)
        rows += [
            {"granularity": granularity, "method": name} | row for name, row in by_method.items()
        ]
    return {part: list(map(_without_nan, of)) for part, of in (("rows", rows), ("curves", curves))}


def _ranked_by_run(results: Results, granularity: str) -> dict[str, _Ranking]:
    """The rankings of the run itself: of single effects, and of the joint set."""
    whole = results.run["seconds"]
    searching = results.run.get("joint", {}).get("seconds", 0.0)
    return {
        name: _Ranking(scores, whole if name == "joint" else whole - searching)
        for name, scores in ranking_lib.rankings(results, granularity).items()
    }


def _ranked_without_edits(asked: MediateRun, granularity: str) -> dict[str, _Ranking]:
    """The rankings of methods that make no edit: gradients and activations."""

    def gradients(steps: int) -> np.ndarray:
        estimates = [
            screening.scores(
                asked.decoder, pair, asked.question, granularity=granularity, steps=steps
            )
            for pair in asked.pairs
        ]
        return ranking_lib.strength(*(np.stack(side) for side in zip(*estimates, strict=True)))

    def activations() -> np.ndarray:
        each = [
            controls.activation_difference(asked.decoder, pair, asked.question, granularity)
            for pair in asked.pairs
        ]
        return np.mean(each, axis=0)

    return {
        "attribution": _timed(lambda: gradients(1)),
        "integrated": _timed(lambda: gradients(GRADIENT_STEPS)),
        "activation": _timed(activations),
    }


def _timed(rank: Callable[[], np.ndarray]) -> _Ranking:
    began = time.monotonic()
    return _Ranking(rank(), time.monotonic() - began)


def _ranked_in_groups(settings: MediateSettings, folder: pathlib.Path, neurons: int) -> _Ranking:
    """Neurons by the effect of the group that they are in."""
    results, _ = _measured(settings, folder, "neuron", GROUP_SIZE)
    scores = ranking_lib.rankings(results, "neuron")["max"]
    return _Ranking(np.repeat(scores, GROUP_SIZE, axis=1)[:, :neurons], results.run["seconds"])


def _score_row(name: str, ranking: _Ranking, planted: np.ndarray, truth: dict) -> dict:
    """How well one ranking finds what was planted."""
    scores = ranking.scores
    row: dict[str, float | None] = {
        "auroc": ranking_lib.auroc(scores, planted),
        "precision_at_k": ranking_lib.precision_at_k(scores, planted),
        "seconds": ranking.seconds,
    }
    if name in outcomes.EFFECTS:
        # A unit that a screen left out has no effect that anybody would see.
        shares = np.nan_to_num(scores) / truth["reference_te"]
        row["weakest_planted"] = float(shares[planted].min()) if planted.any() else None
        row["strongest_other"] = float(shares[~planted].max())
    return row


def _discovered(
    asked: MediateRun, granularity: str, strength: np.ndarray, planted: np.ndarray, truth: dict
) -> dict:
    """How many units are discoveries, and how many of those are not planted."""
    reference = truth["reference_te"]
    found = controls.discoveries(
        asked.decoder,
        asked.pairs,
        asked.question,
        granularity,
        strength,
        reference,
        memory=asked.budget,
    )
    return {
        "candidates": int(controls.above_minimum(strength, reference).sum()),
        "discoveries": int(found.sum()),
        "false_discoveries": int((found & ~planted).sum()),
        "units": int(np.isfinite(strength).sum()),
    }


def _joint_row(joint: dict | None, planted: np.ndarray, truth: dict) -> dict:
    """How much the joint set carries, and how many neurons it and the truth need for it."""
    row = {"true_size": min(map(len, truth["joint"]))}
    if joint is None:
        return row
    row["joint_size"] = len(joint["picked"])
    row["joint_planted"] = int(sum(planted[tuple(neuron)] for neuron in joint["picked"]))
    if confirmed := joint["confirmed"]:
        row["joint_share"] = min(confirmed["share_nie"], confirmed["share_tie"])
    return row


def _faithfulness(asked: MediateRun, ranked: dict[str, _Ranking]) -> dict[str, np.ndarray]:
    return circuits.faithfulness(
        asked.decoder,
        asked.pairs,
        asked.question,
        {name: ranking.scores for name, ranking in ranked.items()},
        asked.budget,
    )


def _curve_rows(name: str, curve: np.ndarray) -> list[dict]:
    return [
        {"method": name, "estimand": estimand, "fraction": fraction, "faithfulness": float(value)}
        for estimand, values in zip(ESTIMANDS, curve, strict=True)
        for fraction, value in zip(circuits.CIRCUIT_SIZES, values, strict=True)
    ]


def _without_nan(row: dict) -> dict:
    """JSON and parquet have a null for it."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in row.items()
    }


def _about(organism: Organism) -> dict:
    truth = organism.truth
    contrasts = truth["contrasts"].values()
    carried = [about["carried"] for about in contrasts if "carried" in about]
    return {
        "organism": truth["recipe"]["name"],
        "seed": truth["seed"],
        "accuracy": truth["accuracy"] if carried else None,
        "leak": max(about["leak"] for about in contrasts),
        "carried": min(carried, default=None),
        "seconds": truth["seconds"],
    }
