"""The settling experiment: units are held still while the model answers. Does harm fall, and does
the rest stay?

Prompts of one split are answered and judged under several conditions: the plain model; the units
held (`interventions`); random units like them, held in the same way; their whole modules; fewer
units, other strengths, and single units. Of each condition the mean over prompts and its difference
from the plain model are told, with intervals; a prompt's samples have the same seeds under all
conditions. What units are held at is measured on the other splits.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.parquet as pq
import tqdm
from jaxtyping import Float

from jaxmed.behaviour import generation, responses
from jaxmed.behaviour.answers import Model
from jaxmed.behaviour.judges.protocol import Judge
from jaxmed.behaviour.responses import PLAIN, Asked, Condition, Key
from jaxmed.data import chat, prompts, sets
from jaxmed.data.splits import SPLITS
from jaxmed.files import atomic
from jaxmed.files.reading import DataError
from jaxmed.intervention import export as export_lib
from jaxmed.intervention import likeness, outcomes
from jaxmed.intervention import units as units_lib
from jaxmed.intervention import values as values_lib
from jaxmed.intervention.outcomes import (
    ALONE,
    CLAMP,
    LEAST_PROMPTS,
    MEASURES,
    MODULE,
    PLAIN_KIND,
    RANDOM,
    RATES,
    STRENGTH,
    TEXT_LABEL,
    TOP,
    Found,
    Held,
)
from jaxmed.intervention.units import Unit
from jaxmed.intervention.values import Values
from jaxmed.report import clamp, model_card
from jaxmed.runs import asking, sweep
from jaxmed.runs.asking import AnswerSettings
from jaxmed.runs.settings import setting
from jaxmed.store import claims
from jaxmed.store.results import Results
from models.errors import InputError
from models.sites import Site

EDITS = ("refused", "benign", "zero", "source")
REFERENCE_PROMPTS = 256  # at most, of each group that activations are averaged over

TABLE, CONTROLS = "clamp.parquet", "controls.json"
_OWN_FILES = (*responses.FILES, TABLE, CONTROLS, "report.html", "figures")
# What responses under a condition do not depend on: a folder that has them can be asked for more
# conditions, judged otherwise, and exported from.
_MAY_CHANGE = (
    *asking.MAY_CHANGE,
    *("samples", "most_prompts", "random", "module", "top_doses", "strength_doses", "alone"),
    *("margin", "perplexity_margin", "export"),
)
_ATTEMPTS = 20  # to draw random units that were not drawn before


@dataclasses.dataclass(frozen=True)
class ClampSettings(AnswerSettings):
    """What is held, how, and what it is compared with."""

    results: str = setting(
        help="Folder of a run of launch.mediate, which ranks the units that are held.", default=""
    )
    granularity: str = setting(
        help="--results: of the units.", default="neuron", choices=units_lib.GRANULARITIES
    )
    by: str = setting(
        help="--results: what the units are ranked by: the size of the mean NIE or TIE, the larger "
        "of both (max), or as the greedy joint set has them.",
        default="max",
        choices=units_lib.BY,
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
        choices=values_lib.POSITIONS,
    )
    split: str = setting(
        help="The prompts that are answered: split A, B or C (where the file gives none a hash: of "
        "a published set's text, else of the id). What units are held at is measured on the "
        "others. Empty for all, which then do both jobs.",
        default="C",
        choices=("", *SPLITS),
    )
    most_prompts: int = setting(
        help="Prompts of a label that are answered at most, drawn by hash; 0 for all.",
        default=0,
        least=0,
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
    )
    show_text: bool = setting(
        help="Show prompts and responses in the report, escaped.", default=False
    )


def run(
    settings: ClampSettings, *, own_judges: Sequence[Judge] = (), progress: bool = True
) -> Found:
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
    say = sweep.teller(progress)
    say(f"Loading {settings.model}")
    model = asking.load(settings)
    results = _opened(settings, model)
    units = chosen_units(settings, model, results)
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
            for one in _drawn(tested, label, settings.most_prompts, settings.seed)
        ]
    sources = _sources(settings, model, tested) if settings.edit == "source" else []
    _check_numbers(settings, units, asked, tested, reference)
    given = list(own_judges) or asking.read_judges(settings, model)
    _check_judges(settings, given)
    folder = pathlib.Path(settings.out)
    described = asking.described(settings, "clamp", model, asked, given)
    described |= {"chosen": list(map(str, units)), "sources_hash": asking.hash_of(sources)}
    run = claims.claim(folder, described, _OWN_FILES, settings.overwrite, _MAY_CHANGE)
    experiment = _Experiment(settings, model, given, run, folder, progress)
    values, controls = experiment.prepare(units, reference, sources)
    draws = [
        units_lib.named([unit["unit"] for unit in draw], model.decoder.config)
        for draw in controls["draws"]
    ]
    held = conditions(settings, units, draws)
    measured = experiment.measure(held, values, tested)
    table = outcomes.summarise(held, tested, measured)
    keys = responses.keys([each.name for each in held], tested, settings.samples)
    cuts = sum(experiment.verdicts.values[key].cut for key in keys)
    found = Found(table, held, units, controls, run, folder, cuts)
    atomic.replace_file(folder / TABLE, lambda path: pq.write_table(table, path))
    responses.write_exchanges(folder / responses.EXCHANGES, tested, experiment.responses)
    texts = experiment.texts(tested, held) if settings.show_text else []
    clamp.write(found, texts)
    if settings.export:
        card = model_card.card(found, model.decoder.embedding.dtype)
        export_lib.write(found, model, settings.export, card)
    return found


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
        export_lib.check(settings)


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
    if len({_dose(number) for number in found}) < len(found):
        raise InputError(f"{shown}: names a dose twice")
    return found


def _dose(number: float) -> str:
    return f"{number:g}"


def _opened(settings: ClampSettings, model: Model) -> Results | None:
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


def chosen_units(settings: ClampSettings, model: Model, results: Results | None) -> list[Unit]:
    """The units to be held, the strongest first."""
    if results is None:
        return units_lib.named(settings.units, model.decoder.config)
    return units_lib.strongest(results, settings.granularity, settings.by, settings.top)


def _splits(settings: ClampSettings, asked: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """The prompts that are tested, and those that held values are measured on."""
    splits = [settings.split] if settings.split else SPLITS
    others = [split for split in SPLITS if split not in splits] or SPLITS
    return asking.of_split(asked, splits), asking.of_split(asked, others)


def _drawn(asked: Sequence[Asked], label: str, most: int, seed: int) -> list[Asked]:
    """At most so many of a label, drawn by hash, so that all files have their share."""
    chosen = asking.of_split(asked, label=label)
    by_hash = sorted(chosen, key=lambda one: responses.seed_of(one.prompt.id, 0, seed))
    kept = {one.prompt.id for one in by_hash[:most]}
    return [one for one in chosen if one.prompt.id in kept]


def _random_draws(settings: ClampSettings, units: Sequence[Unit]) -> int:
    """How many draws of random units there are to be; no unit is like a whole module."""
    return settings.random if all(unit.index is not None for unit in units) else 0


def _check_numbers(
    settings: ClampSettings, units: Sequence[Unit], asked, tested, reference
) -> None:
    """Raises `InputError` where too few prompts are in the splits."""
    for label in sets.LABELS:
        number = len(asking.of_split(tested, label=label))
        if number < LEAST_PROMPTS and (number or label in ("harmful", "benign")):
            everywhere = len(asking.of_split(asked, label=label))
            raise InputError(
                f"--split={settings.split}: {number} of {everywhere} {label} prompts are in it, "
                f"and an interval needs {LEAST_PROMPTS}; give more --prompts, or --split= to test "
                "on all (values are then measured on the prompts that they are tested on)"
            )
    random = _random_draws(settings, units) > 0
    needs = {
        "harmful": settings.edit == "refused" or random,
        "benign": settings.edit == "benign" or random,
    }
    for label, needed in needs.items():
        number = len(asking.of_split(reference, label=label))
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
    settings: ClampSettings, model: Model, tested: Sequence[Asked]
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
    settings: ClampSettings, model: Model, tested: Sequence[Asked], say
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
    settings: ClampSettings, tested: Sequence[Asked], results: Results, say
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


def conditions(
    settings: ClampSettings, units: Sequence[Unit], draws: Sequence[Sequence[Unit]]
) -> list[Held]:
    """Everything that is compared; the plain model first."""
    strength = settings.strength
    found = [Held(PLAIN.name, PLAIN_KIND), Held("clamp", CLAMP, tuple(units), strength)]
    for number, drawn in enumerate(draws, start=1):
        found.append(Held(f"random {number}", RANDOM, tuple(drawn), strength))
    modules = tuple(units_lib.modules_of(units))
    if settings.module and set(modules) != set(units):
        found.append(Held("module", MODULE, modules, strength))
    for number in doses(settings.top_doses, "top_doses", int):
        if number < len(units):
            found.append(Held(f"top {number}", TOP, tuple(units[:number]), strength))
    for dose in doses(settings.strength_doses, "strength_doses", float):
        if dose != strength:
            found.append(Held(f"strength {_dose(dose)}", STRENGTH, tuple(units), dose))
    if len(units) > 1:
        found += [
            Held(f"only {unit}", ALONE, (unit,), strength) for unit in units[: settings.alone]
        ]
    return found


class _Experiment:
    """What is run, and where its responses are kept."""

    def __init__(
        self, settings: ClampSettings, model: Model, given, run: dict, folder, progress: bool
    ):
        self.settings, self.model, self.judges = settings, model, given
        self.folder, self.progress = folder, progress
        self.responses = responses.response_log(folder)
        self.verdicts = responses.verdict_log(folder, run["judges_hash"])

    def answer(self, asked: Sequence[Asked], held: Sequence[Condition], label: str) -> None:
        """Generates and judges what is not there yet."""
        asking.answer(
            *(self.settings, self.model, asked, held, self.judges, self.responses, self.verdicts),
            label=label,
            progress=self.progress,
        )

    def prepare(
        self, units: Sequence[Unit], reference: Sequence[Asked], sources
    ) -> tuple[Values, dict]:
        """What every site is held at, and the controls, as `Found` has them.

        Controls are matched by how far a unit's means are apart between harmful prompts that the
        plain model answers and those that it refuses (or, where it does not do both often enough,
        between harmful and benign ones), and by its output norm.
        """
        modules = units_lib.modules_of(units)
        sites = sorted({unit.site for unit in (*units, *modules)})
        number = _random_draws(self.settings, units)
        file = self.folder / CONTROLS
        controls = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        controls["groups"] = self._groups(reference, controls.get("groups", {}), number)
        by_id = {one.prompt.id: one for one in reference}
        names = list(dict.fromkeys(itertools.chain(*controls["groups"].values())))
        members = {
            group: np.isin(names, own) if own else np.zeros(len(names), bool)
            for group, own in controls["groups"].items()
        }
        tokens = [by_id[name].tokens for name in names]
        means = values_lib.group_means(self.model.decoder, tokens, members, sites)
        controls |= self._matched(units, means, controls, number)
        text = json.dumps(controls, indent=2) + "\n"
        atomic.replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))
        values = self._values(means, controls["groups"], sites, sources)
        return values, controls | {"draws": controls["draws"][:number]}

    def _groups(
        self, reference: Sequence[Asked], kept: dict[str, list[str]], random: int
    ) -> dict[str, list[str]]:
        """The ids of the prompts that activations are averaged over. Those of an earlier run stay:
        what was answered with units held at their means must not be mixed with other means, though
        other judges or more samples may find others refused."""
        edit, seed = self.settings.edit, self.settings.seed
        if not (edit in ("refused", "benign") or random):
            return kept
        groups = {
            label: [one.prompt.id for one in _drawn(reference, label, REFERENCE_PROMPTS, seed)]
            for label in ("harmful", "benign")
        } | kept
        if (edit == "refused" or random) and "refused" not in groups:
            harmful = [one for one in reference if one.prompt.id in set(groups["harmful"])]
            self.answer(harmful, [PLAIN], "reference prompts")
            rates = self._by_prompt(PLAIN.name, harmful, "refusal")
            for name, here in (("refused", rates >= 0.5), ("complied", rates < 0.5)):
                groups[name] = [
                    one.prompt.id for one, is_in in zip(harmful, here, strict=True) if is_in
                ]
        return groups

    def _matched(
        self, units: Sequence[Unit], means: dict[str, Values], kept: dict, number: int
    ) -> dict:
        """The parts of controls that random units make; draws of an earlier run stay, though
        another machine may round the traits that they follow from otherwise."""
        found = [
            units_lib.named([unit["unit"] for unit in draw], self.model.decoder.config)
            for draw in kept.get("draws", [])
        ]
        if not (number or found):
            return {"contrast": [], "units": [], "draws": []}
        both = ("complied", "refused")
        enough = all(len(kept["groups"][name]) >= LEAST_PROMPTS for name in both)
        contrast = both if enough else ("harmful", "benign")
        traits = {
            site: (
                likeness.difference(*(means[name] for name in contrast), site),
                likeness.output_norms(self.model.decoder, site),
            )
            for site in means[contrast[0]]
            if site in (Site.NEURON, Site.HEAD)
        }
        for index in range(len(found), number):
            drawn = self._draw(units, traits, index, found)
            if drawn is None:
                break
            found.append(drawn)

        def told(units: Sequence[Unit]) -> list[dict]:
            return [
                {"unit": str(unit), "difference": float(difference), "norm": float(norm)}
                for unit in units
                for difference, norm in [
                    (trait[unit.layer, unit.index] for trait in traits[unit.site])
                ]
            ]

        return {
            "contrast": list(contrast),
            "units": told(units) if found else [],
            "draws": [told(draw) for draw in found],
        }

    def _draw(
        self, units: Sequence[Unit], traits, index: int, before: Sequence[Sequence[Unit]]
    ) -> list[Unit] | None:
        """Random units, other than those that were drawn before; None if none are found."""
        taken = [set(draw) for draw in before]
        rng = np.random.default_rng([self.settings.seed, index])
        for _ in range(_ATTEMPTS):
            drawn = likeness.matched(units, traits, rng)
            if drawn is None or set(drawn) not in taken:
                return drawn
        return None

    def _values(self, means: dict[str, Values], groups: dict, sites, sources) -> Values:
        """What units are held at."""
        settings, decoder = self.settings, self.model.decoder
        if settings.edit == "zero":
            return values_lib.zero(sites, decoder.config)
        if settings.edit == "source":
            return values_lib.activations(decoder, sources, sites)
        if len(groups[settings.edit]) < LEAST_PROMPTS:
            others = f" outside split {settings.split}" if settings.split else ""
            raise InputError(
                f"--edit={settings.edit}: of {len(groups['harmful'])} harmful prompts{others} the "
                f"plain model refuses {len(groups['refused'])}, and their mean needs "
                f"{LEAST_PROMPTS}; give more --prompts or choose another --edit"
            )
        return means[settings.edit]

    def measure(
        self, held: Sequence[Held], values: Values, tested: Sequence[Asked]
    ) -> dict[tuple[str, str], Float[np.ndarray, "prompt"]]:
        """Every measure of every condition, by prompt; NaN where a prompt has none."""
        made = [Condition(each.name, self._holds(each, values)) for each in held]
        made[0] = PLAIN
        self.answer(tested, made, "prompts")
        found = {
            (each.name, measure): self._by_prompt(each.name, tested, measure)
            for each in held
            for measure in (*RATES, "tokens")
        }
        return found | self._on_benign_text(made, tested)

    def _holds(self, held: Held, values: Values) -> Callable:
        """The holds of a condition, for prompts by their rows: values of each prompt's own are
        large, and are laid out for those prompts alone that a batch has."""
        settings, config = self.settings, self.model.decoder.config

        def of(rows):
            own = values
            if settings.edit == "source":
                own = {site: tuple(each[rows] for each in both) for site, both in values.items()}
            return values_lib.holds(held.units, own, held.strength, settings.positions, config)

        return of

    def _by_prompt(
        self, condition: str, asked: Sequence[Asked], measure: str
    ) -> Float[np.ndarray, "prompt"]:
        """Mean of a measure over each prompt's samples; NaN where none has it."""

        def value(prompt: str, sample: int) -> float:
            key = Key(condition, prompt, sample)
            return MEASURES[measure](self.responses.values[key], self.verdicts.values[key])

        return responses.by_prompt(asked, self.settings.samples, value)

    def _on_benign_text(self, made: Sequence[Condition], tested: Sequence[Asked]):
        """Log-probability of the plain model's first answers to benign prompts, and KL there."""
        decoder, budget = self.model.decoder, self.model.budget
        rows, texts = [], []
        for row, one in enumerate(tested):
            answer = self.responses.values[Key(PLAIN.name, one.prompt.id, 0)].tokens
            if one.prompt.label == TEXT_LABEL and answer:
                rows.append(row)
                texts.append((one.tokens, answer))
        found = {
            (condition.name, name): np.full(len(tested), np.nan)
            for condition in made
            for name in ("nll", "kl")
        }
        with tqdm.tqdm(
            total=len(made), desc="benign text", unit="condition", disable=not self.progress
        ) as bar:
            for condition in made if texts else ():
                own = condition.holds(np.array(rows))
                with asking.under(condition):
                    logprobs = generation.logprobs(decoder, texts, holds=own, memory=budget)
                    divergences = generation.kl(decoder, texts, own, memory=budget)
                for name, means in (("nll", -logprobs.means), ("kl", divergences.means)):
                    found[condition.name, name][rows] = means
                bar.update(1)
        return found

    def texts(self, tested: Sequence[Asked], held: Sequence[Held]) -> list[dict]:
        """Prompts and first responses, for the report."""
        return [
            {
                "id": one.prompt.id,
                "label": one.prompt.label,
                "prompt": _text(one),
                "responses": [
                    (each.name, response.text or str(list(response.tokens)))
                    for each in held
                    if each.kind in (PLAIN_KIND, CLAMP)
                    for response in [self.responses.values[Key(each.name, one.prompt.id, 0)]]
                ],
            }
            for one in tested
        ]


def _text(one: Asked) -> str:
    """What the report shows of a prompt."""
    if one.prompt.prompt is None:
        return str(list(one.tokens))
    return chat.as_text(one.prompt.prompt)
