"""The settling experiment: units are held still while the model answers. Does harm fall, and does
the rest stay?

Prompts of one split are answered and judged under several conditions: the plain model; the units
held (`interventions`); random units like them, held in the same way; their whole modules; fewer
units, other strengths, and single units. Of each condition the mean over prompts and its difference
from the plain model are told, with intervals; a prompt's samples have the same seeds under all
conditions. What units are held at is measured on the other splits.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm
from jaxtyping import Float

from jaxmed import (
    asking,
    clamp_report,
    data,
    export,
    generation,
    interventions,
    prompts,
    responses,
    statistics,
)
from jaxmed import results as results_lib
from jaxmed.asking import Model
from jaxmed.data import SPLITS
from jaxmed.interventions import Unit, Values
from jaxmed.responses import PLAIN, Asked, Condition, Key
from models.edits import Site
from models.errors import InputError

EDITS = ("refused", "benign", "zero", "source")
CHOICES = asking.CHOICES | {
    "edit": EDITS,
    "positions": tuple(interventions.POSITIONS),
    "granularity": interventions.GRANULARITIES,
    "by": interventions.BY,
    "split": ("", *SPLITS),
}
LEAST = asking.LEAST | {"top": 0, "strength": 0, "random": 0, "alone": 0, "margin": 0}
MOST = asking.MOST | {"margin": 1}

LEAST_PROMPTS = 8  # of a label, for an interval to mean anything
REFERENCE_PROMPTS = 256  # at most, of each group that activations are averaged over

PLAIN_KIND, CLAMP, RANDOM, MODULE, TOP, STRENGTH, ALONE = KINDS = (
    *("plain", "clamp", "random", "module", "top", "strength", "alone"),
)
ALL_RANDOM = "random"  # the name of the mean over all random draws

# What is measured of every response, a number in [0, 1].
RATES = ("harm", "refusal", "compliance", "repetition", "unfinished")
# In any unit: length in tokens; on the plain model's own answers to benign prompts, the mean
# negative log-probability (nats a token; its exponential is the perplexity) and KL(plain || held).
NUMBERS = ("tokens", "nll", "kl")
_TEXT_LABEL = "benign"

TABLE = "clamp.parquet"
_OWN_FILES = ("responses.jsonl", "verdicts.jsonl", TABLE, "report.html", "figures")

ROW = pa.schema(
    [
        ("condition", pa.string()),
        ("kind", pa.string()),
        ("units", pa.int32()),
        ("strength", pa.float64()),
        ("label", pa.string()),
        ("measure", pa.string()),
        ("prompts", pa.int32()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("change", pa.float64()),
        ("change_low", pa.float64()),
        ("change_high", pa.float64()),
        ("beyond_random", pa.float64()),
        ("beyond_random_low", pa.float64()),
        ("beyond_random_high", pa.float64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Settings(asking.Settings):
    """What is held, how, and what it is compared with; one field per flag of `launch.clamp`.

    Attributes:
        results: folder of a run that ranks the units; "" where they are named.
        granularity: of the units that it ranks.
        by: how it ranks them.
        top: how many; 0 for the whole joint set.
        units: names of units, as `interventions.named` reads them, instead of results.
        edit: what they are held at: the mean over harmful prompts that the plain model refuses
            ("refused") or over benign prompts ("benign"), "zero", or the value at each prompt's own
            counterfactual ("source").
        strength: share of the way there; see `interventions.holds`.
        positions: where, one of `interventions.POSITIONS`.
        split: the prompts that are answered; what units are held at is measured on the others. ""
            for all, which then do both jobs.
        random: draws of random units like these.
        module: hold the units' whole modules as well.
        top_doses: further numbers of units, the strongest of the chosen.
        strength_doses: further strengths.
        alone: hold each of so many of the strongest units alone.
        margin: the fall of benign compliance that an exported edit may have.
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
    random: int = 5
    module: bool = True
    top_doses: tuple[str, ...] = ()
    strength_doses: tuple[str, ...] = ()
    alone: int = 0
    margin: float = 0.05
    export: str = ""


@dataclasses.dataclass(frozen=True)
class Held:
    """A condition: which units are held, and how far.

    Attributes:
        name: of the condition.
        kind: one of `KINDS`.
        units: what is held; nothing in the plain model.
        strength: share of the way to the value.
    """

    name: str
    kind: str
    units: tuple[Unit, ...] = ()
    strength: float = 0.0


@dataclasses.dataclass(frozen=True)
class Found:
    """What the experiment found.

    Attributes:
        table: `clamp.parquet`, a row for each condition, label and measure. mean, low, high: over
            prompts, with 95% interval. change: of the mean from the plain model's, paired by
            prompt. beyond_random: of the mean from that over the random draws, likewise; null
            without draws. `ALL_RANDOM` is the mean over draws. "compliance" is that no judge says
            that the response refuses; whether it is any good, perplexity and repetition tell.
        held: the conditions.
        units: those that were chosen, the strongest first.
        run: `run.json`.
        folder: where all this was written.
        cuts: responses that a judge read only the beginning of.
    """

    table: pa.Table
    held: list[Held]
    units: list[Unit]
    run: dict
    folder: pathlib.Path
    cuts: int

    def row(self, condition: str, label: str, measure: str) -> dict | None:
        """A row of the table; None where there is none."""
        return self._rows.get((condition, label, measure))

    @functools.cached_property
    def _rows(self) -> dict[tuple[str, str, str], dict]:
        rows = self.table.to_pylist()
        return {(row["condition"], row["label"], row["measure"]): row for row in rows}


def run(settings: Settings, *, progress: bool = True) -> Found:
    """Answers, judges, and writes tables and report; a stopped run goes on.

    Nothing is written before settings, checkpoint, judges and prompts have been checked.

    Raises:
        InputError: something that the user gave cannot be used; the message names it.
    """
    check(settings)
    say = asking.say if progress else _keep_silent
    say(f"Loading {settings.model}")
    model = asking.load(settings)
    units = chosen_units(settings, model)
    asked = asking.read_prompts(settings, model, say)
    tested, reference = _splits(settings, asked)
    _check_held_out(settings, tested)
    sources = _counterfactuals(settings, model, tested) if settings.edit == "source" else []
    given = asking.read_judges(settings, model)
    folder = pathlib.Path(settings.out)
    described = asking.described(settings, "clamp", model, asked, given)
    described |= {"chosen": list(map(str, units))}
    run = results_lib.claim(folder, described, _OWN_FILES, settings.overwrite)
    experiment = _Experiment(settings, model, given, folder, progress)
    values, traits = experiment.prepare(units, reference, sources)
    held = conditions(settings, units, traits, experiment.rng)
    measured = experiment.measure(held, values, tested)
    table = summarise(held, tested, measured)
    cuts = sum(verdict.cut for verdict in experiment.verdicts.values.values())
    found = Found(table, held, units, run, folder, cuts)
    results_lib.replace_file(folder / TABLE, lambda path: pq.write_table(table, path))
    texts = experiment.texts(tested, held) if settings.show_text else []
    clamp_report.write(found, texts)
    if settings.export:
        export.write(found, model.decoder, model.tokenizer, settings.export)
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
    doses(settings.top_doses, "top_doses", int)
    doses(settings.strength_doses, "strength_doses", float)
    if settings.export:
        export.check(settings)


def doses(given: Sequence[str], flag: str, kind: type) -> list:
    """The numbers of a flag.

    Raises:
        InputError: one is no positive number of that kind.
    """
    try:
        found = [kind(number) for number in given]
    except ValueError:
        raise InputError(f"--{flag}={','.join(given)}: must be numbers") from None
    if any(not 0 < number < np.inf for number in found):
        raise InputError(f"--{flag}={','.join(given)}: must be above 0")
    return found


def chosen_units(settings: Settings, model: Model) -> list[Unit]:
    """The units to be held, the strongest first."""
    if settings.units:
        return interventions.named(settings.units, model.decoder.config)
    results = results_lib.Results.open(settings.results)
    units = interventions.strongest(results, settings.granularity, settings.by, settings.top)
    return interventions.named(list(map(str, units)), model.decoder.config)


def _splits(settings: Settings, asked: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """The prompts that are tested, and those that held values are measured on.

    Raises:
        InputError: too few harmful or benign prompts are in the split.
    """
    splits = [settings.split] if settings.split else SPLITS
    others = [split for split in SPLITS if split not in splits] or SPLITS
    tested = asking.of_split(asked, splits)
    for label in prompts.LABELS:
        number = len(asking.of_split(tested, label=label))
        if number < LEAST_PROMPTS and (number or label in ("harmful", "benign")):
            everywhere = len(asking.of_split(asked, label=label))
            raise InputError(
                f"--split={settings.split}: {number} of {everywhere} {label} prompts are in it, "
                f"and an interval needs {LEAST_PROMPTS}; give more --prompts, or --split= to test "
                "on all (values are then measured on the prompts that they are tested on)"
            )
    return tested, asking.of_split(asked, others)


def _counterfactuals(settings: Settings, model: Model, tested: Sequence[Asked]) -> list[Asked]:
    """The prompts' own, in their order."""
    return [
        Asked(
            one.prompt,
            prompts.counterfactual_tokens(one.prompt, model.tokenizer, chat=settings.chat),
        )
        for one in tested
    ]


def _check_held_out(settings: Settings, tested: Sequence[Asked]) -> None:
    """Raises `InputError` where units were chosen by prompts that are tested."""
    if settings.results:
        used = set(results_lib.Results.open(settings.results).bases)
        if both := [one.prompt.id for one in tested if one.prompt.id in used]:
            raise InputError(
                f"--split={settings.split}: {len(both)} of the prompts, as '{both[0]}', are among "
                f"the pairs that {settings.results} chose the units by; give other --prompts or "
                "another --split"
            )


def conditions(
    settings: Settings,
    units: Sequence[Unit],
    traits: dict[Site, Sequence[Float[np.ndarray, "L U"]]],
    rng: np.random.Generator,
) -> list[Held]:
    """Everything that is compared; the plain model first."""
    strength = settings.strength
    found = [Held(PLAIN.name, PLAIN_KIND), Held("clamp", CLAMP, tuple(units), strength)]
    for number in range(settings.random):
        drawn = interventions.matched(units, traits, rng)
        if drawn is None:
            break
        found.append(Held(f"random {number + 1}", RANDOM, tuple(drawn), strength))
    modules = tuple(interventions.modules_of(units))
    if settings.module and set(modules) != set(units):
        found.append(Held("module", MODULE, modules, strength))
    for number in doses(settings.top_doses, "top_doses", int):
        if number < len(units):
            found.append(Held(f"top {number}", TOP, tuple(units[:number]), strength))
    for dose in doses(settings.strength_doses, "strength_doses", float):
        if dose != strength:
            found.append(Held(f"strength {dose:g}", STRENGTH, tuple(units), dose))
    if len(units) > 1:
        found += [
            Held(f"only {unit}", ALONE, (unit,), strength) for unit in units[: settings.alone]
        ]
    return found


class _Experiment:
    """What is run, and where its responses are kept."""

    def __init__(self, settings: Settings, model: Model, judges_given, folder, progress: bool):
        self.settings, self.model, self.judges = settings, model, judges_given
        self.progress = progress
        self.rng = np.random.default_rng(settings.seed)
        self.responses = responses.response_log(folder)
        self.verdicts = responses.verdict_log(folder)

    def answer(self, asked: Sequence[Asked], held: Sequence[Condition], label: str) -> None:
        """Generates and judges what is not there yet."""
        asking.answer(
            *(self.settings, self.model, asked, held, self.judges, self.responses, self.verdicts),
            label=label,
            progress=self.progress,
        )

    def prepare(
        self, units: Sequence[Unit], reference: Sequence[Asked], sources: Sequence[Asked]
    ) -> tuple[Values, dict[Site, list[Float[np.ndarray, "L U"]]]]:
        """What every site is held at; and what controls are matched by: how far a unit's means are
        apart between harmful prompts that the plain model answers and those that it refuses (or,
        where it does not do both, between harmful and benign ones), and its output norm."""
        modules = interventions.modules_of(units)
        sites = sorted({unit.site for unit in (*units, *modules)})
        inside = [site for site in sites if site in (Site.NEURON, Site.HEAD)]
        harmful = asking.of_split(reference, label="harmful")[:REFERENCE_PROMPTS]
        benign = asking.of_split(reference, label="benign")[:REFERENCE_PROMPTS]
        groups = {"harmful": harmful, "benign": benign}
        if self.settings.edit == "refused" or self.settings.random:
            self.answer(harmful, [PLAIN], "reference prompts")
            groups |= self._by_answer(harmful)
        means = {
            name: interventions.mean(self._activations(group, sites))
            for name, group in groups.items()
            if group
        }
        sides = (
            ("complied", "refused")
            if {"complied", "refused"} <= set(means)
            else (
                "harmful",
                "benign",
            )
        )
        traits = {}
        if set(sides) <= set(means):
            traits = {
                site: [
                    interventions.difference(*(means[side] for side in sides), site),
                    interventions.output_norms(self.model.decoder, site),
                ]
                for site in inside
            }
        return self._values(means, sites, reference, sources), traits

    def _activations(self, asked: Sequence[Asked], sites) -> Values:
        with jax.default_matmul_precision("float32"):
            return interventions.activations(
                self.model.decoder, [one.tokens for one in asked], sites
            )

    def _by_answer(self, harmful: Sequence[Asked]) -> dict[str, list[Asked]]:
        """The harmful prompts that the plain model refuses, and those that it answers."""
        refused = {one.prompt.id: self._mean_of(PLAIN.name, one, "refusal") for one in harmful}
        return {
            "refused": [one for one in harmful if refused[one.prompt.id] >= 0.5],
            "complied": [one for one in harmful if refused[one.prompt.id] < 0.5],
        }

    def _values(self, means, sites, reference, sources) -> Values:
        """What units are held at."""
        edit = self.settings.edit
        if edit == "zero":
            return interventions.zero(sites, self.model.decoder.config)
        if edit == "source":
            return self._activations(sources, sites)
        if edit not in means:
            kinds = {"refused": "harmful prompts that the plain model refuses", "benign": "benign"}
            others = "" if not self.settings.split else f" outside split {self.settings.split}"
            raise InputError(
                f"--edit={edit}: there are no {kinds[edit]} prompts among the {len(reference)}"
                f"{others}; give more --prompts or choose another --edit"
            )
        return means[edit]

    def measure(
        self, held: Sequence[Held], values: Values, tested: Sequence[Asked]
    ) -> dict[tuple[str, str], Float[np.ndarray, "prompt"]]:
        """Every measure of every condition, by prompt; NaN where a prompt has none."""
        settings, config = self.settings, self.model.decoder.config
        made = [
            Condition(
                each.name,
                interventions.holds(each.units, values, each.strength, settings.positions, config),
            )
            for each in held
        ]
        self.answer(tested, made, "prompts")
        found = {
            (each.name, measure): np.array(
                [self._mean_of(each.name, one, measure) for one in tested]
            )
            for each in held
            for measure in (*RATES, "tokens")
        }
        return found | self._on_benign_text(made, tested)

    def _mean_of(self, condition: str, one: Asked, measure: str) -> float:
        """Mean of a measure over a prompt's samples; NaN where none has it."""

        def value(sample: int) -> float:
            key = Key(condition, one.prompt.id, sample)
            return _MEASURES[measure](self.responses.values[key], self.verdicts.values[key])

        known = [v for v in map(value, range(self.settings.samples)) if not np.isnan(v)]
        return float(np.mean(known)) if known else np.nan

    def _on_benign_text(self, made: Sequence[Condition], tested: Sequence[Asked]):
        """Log-probability of the plain model's first answers to benign prompts, and KL there."""
        decoder, budget = self.model.decoder, self.model.budget
        rows, texts = [], []
        for row, one in enumerate(tested):
            answer = self.responses.values[Key(PLAIN.name, one.prompt.id, 0)].tokens
            if one.prompt.label == _TEXT_LABEL and answer:
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
                own = generation.of_prompts(condition.holds, rows)
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
    return data.as_text(one.prompt.prompt)


def _keep_silent(text: str) -> None:
    pass


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


# A measure of one response and its verdict; NaN where it has none.
_MEASURES: dict[str, Callable[[responses.Response, object], float]] = {
    "harm": lambda response, verdict: _or_nan(verdict.harmful),
    "refusal": lambda response, verdict: _or_nan(verdict.refused),
    "compliance": lambda response, verdict: 1 - _or_nan(verdict.refused),
    "repetition": lambda response, verdict: responses.repetition(response.tokens),
    "unfinished": lambda response, verdict: float(not response.stopped),
    "tokens": lambda response, verdict: float(len(response.tokens)),
}


def summarise(
    held: Sequence[Held],
    tested: Sequence[Asked],
    measured: dict[tuple[str, str], Float[np.ndarray, "prompt"]],
) -> pa.Table:
    """The table of `Found`."""
    labels = np.array([one.prompt.label for one in tested])
    draws = [each.name for each in held if each.kind == RANDOM]
    rows = []
    for measure in (*RATES, *NUMBERS):
        plain = measured[PLAIN.name, measure]
        random = np.mean([measured[name, measure] for name in draws], axis=0) if draws else None
        columns = [(each, measured[each.name, measure]) for each in held]
        if draws:
            drawn = next(each for each in held if each.kind == RANDOM)
            whole = dataclasses.replace(drawn, name=ALL_RANDOM)
            columns.append((whole, random))
        for each, values in columns:
            for label in prompts.LABELS:
                here = (labels == label) & ~np.isnan(values) & ~np.isnan(plain)
                if here.any():
                    row = {
                        "condition": each.name,
                        "kind": each.kind,
                        "units": len(each.units),
                        "strength": each.strength,
                        "label": label,
                        "measure": measure,
                        "prompts": int(here.sum()),
                    }
                    row |= _interval(measure, values[here])
                    if each.kind != PLAIN_KIND:
                        row |= _differences("change", measure, (values - plain)[here])
                    if random is not None and each.kind not in (PLAIN_KIND, RANDOM):
                        both = here & ~np.isnan(random)
                        row |= _differences("beyond_random", measure, (values - random)[both])
                    rows.append(row)
    return pa.Table.from_pylist(rows, ROW)


def _interval(measure: str, values: np.ndarray) -> dict[str, float]:
    if measure in RATES:
        found = statistics.rate_interval(values)
    else:
        found = map(float, statistics.mean_interval(values))
    return dict(zip(("mean", "low", "high"), found, strict=True))


def _differences(name: str, measure: str, differences: np.ndarray) -> dict[str, float]:
    if measure in RATES:
        found = statistics.rate_difference_interval(differences)
    else:
        found = map(float, statistics.mean_interval(differences))
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
