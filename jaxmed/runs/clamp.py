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
from jaxmed.behaviour.judges.protocol import Judge
from jaxmed.behaviour.responses import Asked
from jaxmed.data import prompts, sets
from jaxmed.data.splits import SPLITS
from jaxmed.files import atomic
from jaxmed.files.reading import DataError
from jaxmed.intervention import experiment, export, outcomes, units, values
from jaxmed.intervention.experiment import EDITS, Experiment
from jaxmed.intervention.outcomes import CONTROLS, LEAST_PROMPTS, TABLE, ClampOutcome
from jaxmed.intervention.units import Unit
from jaxmed.report import clamp, model_card
from jaxmed.runs import asking
from jaxmed.store import claims
from jaxmed.store.results import Results
from models import checkpoint
from models.errors import InputError

CHOICES = asking.CHOICES | {
    "edit": EDITS,
    "positions": tuple(values.POSITIONS),
    "granularity": units.GRANULARITIES,
    "by": units.BY,
    "split": ("", *SPLITS),
}
LEAST = asking.LEAST | {
    "top": 0,
    "strength": 0,
    "most_prompts": 0,
    "random": 0,
    "alone": 0,
    "margin": 0,
    "perplexity_margin": 0,
}
MOST = asking.MOST | {"margin": 1}

_OWN_FILES = (*responses.FILES, TABLE, CONTROLS, "report.html", "figures")
# What responses under a condition do not depend on: a folder that has them can be asked for more
# conditions, judged otherwise, and exported from.
_MAY_CHANGE = (
    *asking.MAY_CHANGE,
    *("samples", "most_prompts", "random", "module", "top_doses", "strength_doses", "alone"),
    *("margin", "perplexity_margin", "export"),
)


@dataclasses.dataclass(frozen=True)
class Settings(asking.Settings):
    """What is held, how, and what it is compared with; one field per flag of `launch.clamp`.

    Attributes:
        results: folder of a run that ranks the units; "" where they are named.
        granularity: of the units that it ranks.
        by: how it ranks them.
        top: how many; 0 for the whole joint set.
        units: names of units, as `units.named` reads them, instead of results.
        edit: what they are held at: the mean over harmful prompts that the plain model refuses
            ("refused") or over benign prompts ("benign"), "zero", or the value at each prompt's own
            counterfactual ("source").
        strength: share of the way there; see `values.holds`.
        positions: where, one of `values.POSITIONS`.
        split: the prompts that are answered; what units are held at is measured on the others. ""
            for all, which then do both jobs.
        most_prompts: how many prompts of a label are answered at most, drawn by hash; 0 for all.
        random: draws of random units like these; there are none like modules.
        module: hold the units' whole modules as well.
        top_doses: further numbers of units, the strongest of the chosen.
        strength_doses: further strengths.
        alone: hold each of so many of the strongest units alone.
        margin: the fall of benign compliance that an exported edit may have.
        perplexity_margin: the relative rise of the perplexity of the plain model's answers to
            benign prompts that it may have.
        export: folder for a checkpoint with the edit in its weights; "" for none.
    """

    results: str = ""
    granularity: str = "neuron"
    by: str = "max"
    top: int = 0
    units: tuple[str, ...] = ()
    edit: str = "refused"
    strength: float = 1.0
    positions: str = "all"
    split: str = "C"
    most_prompts: int = 0
    random: int = 5
    module: bool = True
    top_doses: tuple[str, ...] = ()
    strength_doses: tuple[str, ...] = ()
    alone: int = 0
    margin: float = 0.05
    perplexity_margin: float = 0.1
    export: str = ""


def run(
    settings: Settings, *, own_judges: Sequence[Judge] = (), progress: bool = True
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
    say = asking.say if progress else _keep_silent
    say(f"Loading {settings.model}")
    model = asking.load(settings)
    results = _opened(settings, model)
    chosen = chosen_units(settings, model, results)
    asked = asking.read_prompts(settings, model, say)
    tested, reference = _splits(settings, asked)
    if results:
        tested = _held_out(settings, tested, results, say)
    if settings.edit == "source":
        tested = _with_counterfactuals(settings, model, tested, say)
    if settings.most_prompts:
        tested = [
            one
            for label in sets.LABELS
            for one in responses.drawn(tested, label, settings.most_prompts, settings.seed)
        ]
    sources = _sources(settings, model, tested) if settings.edit == "source" else []
    random = settings.random if all(unit.index is not None for unit in chosen) else 0
    _check_numbers(settings, asked, tested, reference, random=random > 0)
    judges = list(own_judges) or asking.read_judges(settings, model)
    _check_judges(settings, judges)
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
    at, controls = made.prepare(
        chosen,
        reference,
        edit=settings.edit,
        random=random,
        sources=sources,
        file=folder / CONTROLS,
    )
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
    found = ClampOutcome(
        table=outcomes.summarise(held, tested, measured),
        held=held,
        units=chosen,
        controls=controls,
        run=run,
        folder=folder,
        cuts=made.cuts(compared, tested),
    )
    atomic.replace_file(folder / TABLE, lambda path: pq.write_table(found.table, path))
    responses.write_exchanges(folder / responses.EXCHANGES, tested, made.responses)
    clamp.write(found, made.texts(held, tested) if settings.show_text else [])
    if settings.export:
        card = model_card.card(found, model.decoder.embedding.dtype)
        export.write(found, model, settings.export, card)
    return found


def check(settings: Settings) -> None:
    """Raises `InputError` where settings contradict each other; nothing is loaded for it."""
    asking.check(settings, CHOICES, LEAST, MOST)
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


def _check_export(settings: Settings) -> None:
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


def _opened(settings: Settings, model: AnsweringModel) -> Results | None:
    """The run that ranks the units.

    Raises:
        InputError: it is not finished, or of another checkpoint.
    """
    if not settings.results:
        return None
    results = Results.open(settings.results)
    if not results.run["finished"]:
        raise InputError(
            f"--results={settings.results}: that run is not finished; give its command again first"
        )
    if results.run["weights_hash"] != model.weights_hash:
        raise InputError(
            f"--results={settings.results}: is a run of {results.run['model']}, whose weights are "
            f"not those of {settings.model}; to hold the same units there, name them: --units"
        )
    return results


def chosen_units(settings: Settings, model: AnsweringModel, results: Results | None) -> list[Unit]:
    """The units to be held, the strongest first."""
    if results is None:
        return units.named(settings.units, model.decoder.config)
    return units.strongest(results, settings.granularity, settings.by, settings.top)


def _splits(settings: Settings, asked: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """The prompts that are tested, and those that held values are measured on."""
    splits = [settings.split] if settings.split else SPLITS
    others = [split for split in SPLITS if split not in splits] or SPLITS
    return responses.of_split(asked, splits), responses.of_split(asked, others)


def _check_numbers(
    settings: Settings,
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
    settings: Settings, model: AnsweringModel, tested: Sequence[Asked]
) -> list[tuple[tuple[int, ...], ...]]:
    """The tokens of each prompt's counterfactuals.

    Raises:
        DataError: one has none, or one that the model cannot get.
    """
    found = []
    for one in tested:
        several = prompts.all_counterfactual_tokens(one.prompt, model.tokenizer, chat=settings.chat)
        for tokens in several:
            where = f"{one.prompt.where}: a counterfactual of prompt '{one.prompt.id}'"
            asking.check_tokens(where, tokens, settings, model)
        found.append(several)
    return found


def _with_counterfactuals(
    settings: Settings, model: AnsweringModel, tested: Sequence[Asked], say: Callable[[str], None]
) -> list[Asked]:
    """The prompts that have counterfactuals.

    Raises:
        DataError: one has none that can be used, and is not to be left out.
    """
    kept = []
    for one in tested:
        try:
            _sources(settings, model, [one])
            kept.append(one)
        except DataError as error:
            if not settings.skip_bad_prompts:
                raise DataError(f"--edit=source: {error} {asking.LEAVE_OUT}") from None
            say(f"Skipped: {error}")
    return kept


def _held_out(
    settings: Settings, tested: Sequence[Asked], results: Results, say: Callable[[str], None]
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


def _check_judges(settings: Settings, given: Sequence[Judge]) -> None:
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


def _keep_silent(text: str) -> None:
    """In the place of `asking.say` where nothing is to be told."""
