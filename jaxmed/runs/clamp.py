"""The settling experiment: units are held still while the model answers. Does harm fall, and does
the rest stay?

Prompts of one split are answered and judged under several conditions: the plain model; the units
held (`intervention`); random units like them, held in the same way; their whole modules; fewer
units, other strengths, and single units. Of each condition the mean over prompts and its difference
from the plain model are told, with intervals; a prompt's samples have the same seeds under all
conditions. What units are held at is measured on the other splits.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.parquet as pq

from jaxmed.behaviour import responses
from jaxmed.behaviour.answering import AnsweringModel
from jaxmed.behaviour.judges import protocol
from jaxmed.behaviour.judges.protocol import Judge
from jaxmed.behaviour.responses import Asked
from jaxmed.data import prompts, sets
from jaxmed.data.splits import SPLITS
from jaxmed.files import atomic
from jaxmed.files.reading import DataError
from jaxmed.intervention import experiment, export, outcomes, units, values
from jaxmed.intervention.experiment import (
    EDITS,
    REFERENCE_PROMPTS,
    Experiment,
    TooFewRefusedError,
)
from jaxmed.intervention.outcomes import CONTROLS, LEAST_PROMPTS, TABLE, ClampOutcome
from jaxmed.intervention.units import Unit
from jaxmed.report import clamp, model_card
from jaxmed.runs import asking, loading, sweep
from jaxmed.runs.asking import AnswerSettings
from jaxmed.runs.settings import like, setting
from jaxmed.runs.skipping import Skipped
from jaxmed.store import claims
from jaxmed.store.results import Results
from models import checkpoint
from models.errors import InputError

_OWN_FILES = (*responses.FILES, TABLE, CONTROLS, "report.html", "figures")
# What responses under a condition do not depend on: a folder that has them can be asked for more
# conditions, judged otherwise, and exported from.
_MAY_CHANGE = (
    *asking.MAY_CHANGE,
    "samples",
    "random",
    "module",
    "top_doses",
    "strength_doses",
    "alone",
    "margin",
    "perplexity_margin",
    "export",
)


@dataclasses.dataclass(frozen=True)
class ClampSettings(AnswerSettings):
    """What is held, how, and what it is compared with."""

    most_prompts: int = like(
        AnswerSettings,
        "most_prompts",
        help="Prompts of a label that are tested at most, and of those of the other splits that "
        "what units are held at is measured on, drawn by hash; 0 for all that are tested, and "
        f"{REFERENCE_PROMPTS} of the others.",
    )
    results: str = setting(
        help="Folder of a run of launch.mediate, local or gs://bucket/path, which ranks the units "
        "that are held.",
        default="",
        path=True,
        bucket=True,
    )
    granularity: str = setting(
        help="--results: of the units.", default="neuron", choices=units.GRANULARITIES
    )
    by: str = setting(
        help="--results: what the units are ranked by: the size of the mean NIE or TIE, the larger "
        "of both (max), or as the greedy joint set has them.",
        default="max",
        choices=units.BY,
    )
    top: int = setting(
        help="--results: how many of the strongest are held; 0 for the whole joint set.",
        default=0,
        least=0,
    )
    units: tuple[str, ...] = setting(
        help="A unit that is held, instead of --results: neuron:LAYER.INDEX, head:LAYER.INDEX, "
        "attention:LAYER or mlp:LAYER; may be given several times.",
        default=(),
    )
    edit: str = setting(
        help="What units are held at: their mean over harmful prompts that the plain model "
        "refuses, or over benign prompts; zero; or their values at each prompt's own "
        "counterfactual (source).",
        default="refused",
        choices=EDITS,
    )
    strength: float = setting(
        help="Share of the way there: y <- (1 - strength) y + strength value. With --edit=zero it "
        "is damping by the factor 1 - strength.",
        default=1.0,
        least=0,
    )
    positions: str = setting(
        help="Where units are held: at all positions, at the prompt's, or at those that the answer "
        "is read from (the prompt's last and the generated ones).",
        default="all",
        choices=values.POSITIONS,
    )
    split: str = setting(
        help="The prompts that are answered: split A, B or C (where the file gives none a hash: of "
        "a published set's text, else of the id). What units are held at is measured on the "
        "others. Empty for all, which then do both jobs.",
        default="C",
        choices=("", *SPLITS),
    )
    random: int = setting(
        help="How often random units are held instead: as many in the same layers, alike in how "
        "much they differ between answered and refused prompts and in their output norm.",
        default=5,
        least=0,
    )
    module: bool = setting(help="Also hold the whole modules that the units are in.", default=True)
    top_doses: tuple[str, ...] = setting(
        help="Also hold only so many of the strongest; may be given several times.", default=()
    )
    strength_doses: tuple[str, ...] = setting(
        help="Also hold with this strength; may be given several times.", default=()
    )
    alone: int = setting(
        help="Also hold each of so many of the strongest units alone.", default=0, least=0
    )
    margin: float = setting(
        help="--export: how far benign compliance may fall, its interval included.",
        default=0.05,
        least=0,
        most=1,
    )
    perplexity_margin: float = setting(
        help="--export: by what share the perplexity of the plain model's answers to benign "
        "prompts may rise, its interval included.",
        default=0.1,
        least=0,
    )
    export: str = setting(
        help="Folder for a checkpoint with the edit in its weights (--edit=zero, heads or neurons, "
        "all positions), written only if harm fell and benign compliance stayed.",
        default="",
        path=True,
    )
    show_text: bool = setting(
        help="Show prompts and responses in the report, escaped.", default=False
    )


def run(
    settings: ClampSettings, *, own_judges: Sequence[Judge] = (), progress: bool = True
) -> ClampOutcome:
    """Answers, judges, and writes tables and report.

    A folder that holds a run of the same units and prompts is gone on with, from where it stopped
    or with more conditions. Nothing is written before settings, checkpoint, judges and prompts have
    been checked.

    Args:
        settings: what is asked.
        own_judges: in the place of those that the settings name.
        progress: show progress bars, and say what goes on.

    Raises:
        InputError: something that the user gave cannot be used; the message names it.
    """
    check(settings)
    results = _opened(settings)
    say = sweep.teller(progress)
    if results:
        settings = asked_alike(settings, results.run)
    settings = loading.settled(settings)
    ranked = _ranked(settings, results) if results else None
    claims.check_kind(settings.out, "clamp")
    files = asking.read_files(settings, say, judged=not own_judges)
    say(f"Loading {settings.model}")
    model = asking.load(settings, say)
    if results:
        _check_weights(settings, results, model)
        for line in asked_otherwise(settings, results.run, reads_date=model.encoder.reads_date):
            say(line)
    chosen = ranked or units.named(settings.units, model.decoder.config)
    asked = asking.as_asked(settings, files, model, say)
    tested, reference = _splits(settings, asked)
    if results:
        tested = _held_out(settings, tested, results, say)
    sources = {}
    if settings.edit == "source":
        sources = _sources(settings, model, tested, say)
        tested = [one for one in tested if one.prompt.id in sources]
    if settings.most_prompts:
        tested = responses.drawn(tested, settings.most_prompts, settings.seed)
    random = settings.random if all(unit.index is not None for unit in chosen) else 0
    _check_numbers(settings, asked, tested, reference, random=random > 0)
    judges = list(own_judges) or asking.read_judges(settings, model, [*tested, *reference])
    _check_judges(settings, judges)
    for line in model.encoder.told:
        say(line)
    folder = pathlib.Path(settings.out)
    described = asking.described(settings, "clamp", model, asked, judges)
    described |= {"chosen": list(map(str, chosen)), "sources_hash": asking.hash_of(sources)}
    run = claims.claim(folder, described, _OWN_FILES, settings.overwrite, _MAY_CHANGE)
    made = Experiment(
        model=model,
        judges=judges,
        responses=responses.response_log(folder),
        verdicts=responses.verdict_log(folder, run["judges_hash"]),
        sampling=settings.sampling,
        samples=settings.samples,
        seed=settings.seed,
        progress=progress,
    )
    try:
        at, controls = made.prepare(
            chosen,
            reference,
            edit=settings.edit,
            random=random,
            sources=[sources[one.prompt.id] for one in tested] if sources else [],
            file=folder / CONTROLS,
            most=settings.most_prompts,
        )
    except TooFewRefusedError as error:
        raise InputError(_too_few_refused(settings, error)) from None
    config = model.decoder.config
    held = experiment.conditions(
        chosen,
        [units.named([unit["unit"] for unit in draw], config) for draw in controls["draws"]],
        strength=settings.strength,
        module=settings.module,
        top_doses=doses(settings.top_doses, "top_doses", int),
        strength_doses=doses(settings.strength_doses, "strength_doses", float),
        alone=settings.alone,
    )
    compared = [
        experiment.condition(
            each,
            at,
            positions=settings.positions,
            of_each_prompt=settings.edit == "source",
            config=config,
        )
        for each in held
    ]
    measured = made.measure(compared, tested)
    said = made.said(compared, tested)
    found = ClampOutcome(
        table=outcomes.summarise(held, tested, measured),
        held=held,
        units=chosen,
        controls=controls,
        run=run,
        folder=folder,
        cuts=sum(verdict.cut for verdict in said),
        doubts=protocol.doubts(said),
        only_think=made.only_think(compared, tested),
    )
    atomic.replace_file(folder / TABLE, lambda path: pq.write_table(found.table, path))
    responses.write_exchanges(folder / responses.EXCHANGES, tested, made.responses, made.verdicts)
    clamp.write(found, made.texts(held, tested) if settings.show_text else [])
    if settings.export:
        _export(found, model, settings.export)
    return found


def _export(found: ClampOutcome, model: AnsweringModel, folder: str) -> None:
    """Writes the edited checkpoint.

    Raises:
        InputError: its own test does not allow that.
    """
    if refused := export.refusal(found):
        why = model_card.refusal(refused)
        raise InputError(f"--export: nothing was written: {why}. Results: {found.folder}")
    card = model_card.card(found, str(model.decoder.dtype))
    export.write(found, model, folder, card)


def check(settings: ClampSettings) -> None:
    """Raises `InputError` where settings contradict each other; nothing is loaded for it."""
    asking.check(settings)
    if bool(settings.units) == bool(settings.results):
        raise InputError("give either --results=DIR, of a run of launch.mediate, or --units")
    if settings.units and settings.top:
        raise InputError("--top needs --results: --units names the units itself")
    if settings.results and not settings.top and settings.by != "joint":
        raise InputError("--top=K: how many of the strongest units are held?")
    if 0 < settings.most_prompts < LEAST_PROMPTS:
        raise InputError(
            f"--most_prompts={settings.most_prompts}: an interval needs {LEAST_PROMPTS}"
        )
    doses(settings.top_doses, "top_doses", int)
    doses(settings.strength_doses, "strength_doses", float)
    if settings.export:
        _check_export(settings)


def doses(given: Sequence[str], flag: str, kind: type) -> list:
    """The numbers of a flag.

    Raises:
        InputError: one is no positive number of that kind, or is named twice.
    """
    shown = f"--{flag}={','.join(given)}"
    try:
        found = [kind(number) for number in given]
    except ValueError:
        raise InputError(f"{shown}: must be numbers") from None
    if any(not 0 < number < np.inf for number in found):
        raise InputError(f"{shown}: must be above 0")
    if len({f"{number:g}" for number in found}) < len(found):
        raise InputError(f"{shown}: names a dose twice")
    return found


def _check_export(settings: ClampSettings) -> None:
    """Raises `InputError` where an edit could not be exported however its test turns out."""
    if settings.edit != "zero" or settings.positions != "all":
        raise InputError(
            f"--export with --edit={settings.edit} --positions={settings.positions}: only damping "
            "at all positions (--edit=zero, any --strength, --positions=all) can be put into "
            "weights"
        )
    modules = settings.granularity == "module" if settings.results else False
    if modules or any(name.split(":")[0] in ("attention", "mlp") for name in settings.units):
        raise InputError("--export: heads and neurons can be exported, modules cannot")
    if not settings.split:
        raise InputError(
            "--export with --split=: an edit is exported only if it was tested on prompts that had "
            "no other part in it; name a split"
        )
    checkpoint.check_free(pathlib.Path(settings.export))


def _opened(settings: ClampSettings) -> Results | None:
    """The run that ranks the units.

    Raises:
        InputError: it is not finished.
    """
    if not settings.results:
        return None
    results = Results.open(settings.results)
    if not results.run["finished"]:
        raise InputError(
            f"--results={settings.results}: that run is not finished; give its command again first"
        )
    if "weights_hash" not in results.run:
        raise InputError(
            f"--results={settings.results}: was saved from Python, which keeps neither weights nor "
            "prompts in mind; name the units instead (--units), or run launch.mediate"
        )
    return results


def asked_alike(settings: ClampSettings, run: dict) -> ClampSettings:
    """The settings, with the chat template's date and arguments of the run that ranks the units
    where they say none themselves.

    Args:
        settings: how prompts are asked here.
        run: `run.json` of that run, which says how they were asked there.
    """
    unsaid = [name for name in ("date", "template_args") if not getattr(settings, name)]
    return dataclasses.replace(settings, **{name: run[name] for name in unsaid})


def asked_otherwise(settings: ClampSettings, run: dict, *, reads_date: bool) -> list[str]:
    """What makes the prompts other ones than those that the units were chosen by.

    Args:
        settings: how prompts are asked here, settled.
        run: `run.json` of the run that ranks the units.
        reads_date: whether the chat template asks what day it is.
    """
    names = ("chat", *(["date"] if reads_date else []), "template_args")
    return [
        f"--{name}={here}: {settings.results} chose the units by other prompts, with "
        f"--{name}={there}"
        for name in names
        if (here := getattr(settings, name)) != (there := run[name])
    ]


def _check_weights(settings: ClampSettings, results: Results, model: AnsweringModel) -> None:
    """Raises `InputError` where the run that ranks the units is of another checkpoint."""
    if results.run["adapter_hash"] != model.adapter_hash:
        measured = results.run["adapter"] or "no adapter"
        raise InputError(
            f"--results={settings.results}: is a run of {results.run['model']} with {measured}, "
            f"which is not that of --adapter={settings.adapter}: give the same"
        )
    measured = results.run["weights_hash"], results.run["config_hash"]
    if measured != (model.weights_hash, model.config_hash):
        raise InputError(
            f"--results={settings.results}: is a run of {results.run['model']}, whose weights or "
            f"config are not those of {settings.model}; to hold the same units there, name them: "
            "--units"
        )


def _ranked(settings: ClampSettings, results: Results) -> list[Unit]:
    """The units to be held, the strongest first.

    Raises:
        InputError: the run does not rank so many of that kind.
    """
    try:
        return units.strongest(results, settings.granularity, settings.by, settings.top)
    except InputError as error:
        raise InputError(f"--results={settings.results}: {error}") from None


def _too_few_refused(settings: ClampSettings, error: TooFewRefusedError) -> str:
    """Why units cannot be held at --edit=refused, and what can be done."""
    ways = [f"give more harmful --prompts of other splits than {settings.split}"]
    if not settings.split:
        ways = ["give more harmful --prompts"]
    if settings.most_prompts and error.harmful >= settings.most_prompts:
        ways = [f"raise --most_prompts={settings.most_prompts}", *ways]
    return (
        f"--edit=refused: of {error.harmful} harmful prompts that values are measured on the plain "
        f"model refuses {error.refused}, and their mean needs {LEAST_PROMPTS}: {', '.join(ways)}, "
        "or give --edit=benign, zero or source (other prompts, and another --edit, need another "
        "--out)"
    )


def _splits(settings: ClampSettings, asked: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """The prompts that are tested, and those that held values are measured on."""
    splits = [settings.split] if settings.split else SPLITS
    others = [split for split in SPLITS if split not in splits] or SPLITS
    return responses.of_split(asked, splits), responses.of_split(asked, others)


def _check_numbers(
    settings: ClampSettings,
    asked: Sequence[Asked],
    tested: Sequence[Asked],
    reference: Sequence[Asked],
    *,
    random: bool,
) -> None:
    """Raises `InputError` where too few prompts are in the splits; `random` says whether there are
    to be random units."""
    for label in sets.LABELS:
        number = len(responses.of_split(tested, label=label))
        if number < LEAST_PROMPTS and (number or label in ("harmful", "benign")):
            everywhere = len(responses.of_split(asked, label=label))
            raise InputError(
                f"--split={settings.split}: {number} of {everywhere} {label} prompts are in it, "
                f"and an interval needs {LEAST_PROMPTS}; give more --prompts, or --split= to test "
                "on all (values are then measured on the prompts that they are tested on)"
            )
    needs = {
        "harmful": settings.edit == "refused" or random,
        "benign": settings.edit == "benign" or random,
    }
    for label, needed in needs.items():
        number = len(responses.of_split(reference, label=label))
        if needed and number < LEAST_PROMPTS:
            why = (
                f"what units are held at (--edit={settings.edit})"
                if settings.edit in ("refused", "benign")
                else f"which units are like these (--random={settings.random})"
            )
            raise InputError(
                f"--split={settings.split}: {number} {label} prompts are in the other splits, "
                f"where it is measured {why}, which needs {LEAST_PROMPTS}; give more --prompts, "
                "or do without it"
            )


def _sources(
    settings: ClampSettings,
    model: AnsweringModel,
    tested: Sequence[Asked],
    say: Callable[[str], None],
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The tokens of each prompt's counterfactuals, by its id; of prompts without those that are to
    be left out, nothing.

    Raises:
        DataError: one has none, or one that the model cannot get, and is not to be left out.
    """
    found, skipped = {}, Skipped("prompts", settings.skip_bad_prompts, say)
    for one in tested:
        try:
            several = prompts.all_counterfactual_tokens(one.prompt, model.encoder)
            for tokens in several:
                where = f"{one.prompt.where}: a counterfactual of prompt '{one.prompt.id}'"
                asking.check_tokens(where, tokens, settings, model)
            found[one.prompt.id] = several
        except DataError as error:
            if skipped.on_bad is None:
                raise DataError(f"--edit=source: {error}{skipped.way_out}") from None
            skipped.on_bad(error)
    return found


def _held_out(
    settings: ClampSettings, tested: Sequence[Asked], results: Results, say: Callable[[str], None]
) -> list[Asked]:
    """The prompts that the units were not chosen by.

    Raises:
        InputError: some were, and are not to be left out.
    """
    used = set(results.run["prompt_hashes"])
    kept = [one for one in tested if not one.fingerprints & used]
    if len(kept) < len(tested):
        first = next(one.prompt for one in tested if one.fingerprints & used)
        message = (
            f"--split={settings.split}: {len(tested) - len(kept)} of {len(tested)} prompts, as "
            f"'{first.id}' ({first.where}), are among those that {settings.results} chose the "
            "units by"
        )
        if not settings.skip_bad_prompts:
            raise InputError(
                f"{message}; run launch.mediate on the other splits alone (--split=A,B), or give "
                "other --prompts; where the same prompts are in other splits there, leave them "
                "out: --skip_bad_prompts"
            )
        say(f"Skipped: {message}")
    return kept


def _check_judges(settings: ClampSettings, given: Sequence[Judge]) -> None:
    """Raises `InputError` where judges do not say what the experiment must know."""
    needed = {
        "refused": (settings.edit == "refused" or settings.export, "refuse"),
        "harmful": (settings.export, "are harmful"),
    }
    said = {name for judge in given for name in judge.says}
    for name, (is_needed, words) in needed.items():
        if is_needed and name not in said:
            names = ", ".join(judge.name for judge in given)
            raise InputError(
                f"--judge={names}: does not say whether responses {words}, which "
                f"{'--export' if settings.export else '--edit=refused'} has to know; give another "
                "--judge beside it"
            )
