"""The settling experiment: prompts answered with units held and without, and what is compared.

An `Experiment` answers and judges prompts under conditions, finds what units are held at and which
random units are like them, and measures.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm
from jaxtyping import Float

from jaxmed.behaviour import answering, likelihood, responses
from jaxmed.behaviour.answering import AnsweringModel
from jaxmed.behaviour.judges.protocol import Judge, Verdict
from jaxmed.behaviour.responses import PLAIN, Asked, Condition, Key, Log, Response
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data import chat
from jaxmed.files import atomic
from jaxmed.intervention import likeness, units, values
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
    Held,
)
from jaxmed.intervention.units import Unit
from jaxmed.intervention.values import Values
from models.config import DecoderConfig
from models.errors import InputError
from models.sites import Site

EDITS = ("refused", "benign", "zero", "source")  # what units are held at; see `Experiment.prepare`
REFERENCE_PROMPTS = 256  # at most, of each group that activations are averaged over


class TooFewRefusedError(InputError):
    """Units cannot be held at their mean over refused prompts.

    Attributes:
        harmful: prompts that might have been refused.
        refused: those that were.
    """

    def __init__(self, harmful: int, refused: int):
        super().__init__(
            f"edit='refused': of {harmful} harmful prompts the plain model refuses {refused}, and "
            f"their mean needs {LEAST_PROMPTS}"
        )
        self.harmful, self.refused = harmful, refused


def conditions(
    chosen: Sequence[Unit],
    draws: Sequence[Sequence[Unit]],
    *,
    strength: float,
    module: bool = False,
    top_doses: Sequence[int] = (),
    strength_doses: Sequence[float] = (),
    alone: int = 0,
) -> list[Held]:
    """Everything that is compared; the plain model first.

    Args:
        chosen: the units that are held, the strongest first.
        draws: random units like these.
        strength: share of the way to their values.
        module: hold the units' whole modules as well.
        top_doses: further numbers of units, the strongest of the chosen.
        strength_doses: further strengths.
        alone: hold each of so many of the strongest units alone.
    """
    found = [Held(PLAIN.name, PLAIN_KIND), Held("clamp", CLAMP, tuple(chosen), strength)]
    for number, drawn in enumerate(draws, start=1):
        found.append(Held(f"random {number}", RANDOM, tuple(drawn), strength))
    modules = tuple(units.modules_of(chosen))
    if module and set(modules) != set(chosen):
        found.append(Held("module", MODULE, modules, strength))
    for number in top_doses:
        if number < len(chosen):
            found.append(Held(f"top {number}", TOP, tuple(chosen[:number]), strength))
    for dose in strength_doses:
        if dose != strength:
            found.append(Held(f"strength {dose:g}", STRENGTH, tuple(chosen), dose))
    if len(chosen) > 1:
        found += [Held(f"only {unit}", ALONE, (unit,), strength) for unit in chosen[:alone]]
    return found


def condition(
    held: Held, at: Values, *, positions: str, of_each_prompt: bool, config: DecoderConfig
) -> Condition:
    """What responses are generated under where units are held.

    Args:
        held: which units, and how far.
        at: the values that they are held at.
        positions: where, one of `values.POSITIONS`.
        of_each_prompt: whether the values are of each prompt's own. They are large, and are laid
            out for those prompts alone that a batch has.
        config: of the model.
    """
    if held.kind == PLAIN_KIND:
        return PLAIN

    def holds(rows):
        own = at
        if of_each_prompt:
            own = {site: (before[rows], last[rows]) for site, (before, last) in at.items()}
        return values.holds(held.units, own, held.strength, positions, config)

    return Condition(held.name, holds)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Prompts answered and judged under conditions; what is there already is not done again.

    Attributes:
        model: answers.
        judges: each says what those before it do not say.
        responses, verdicts: where both are kept.
        sampling: how tokens are chosen.
        samples: responses of each prompt.
        seed: of all samples, and of all that is drawn.
        progress: show progress bars.
    """

    model: AnsweringModel
    judges: Sequence[Judge]
    responses: Log[Response]
    verdicts: Log[Verdict]
    sampling: Sampling
    samples: int = 1
    seed: int = 0
    progress: bool = True

    def prepare(
        self,
        chosen: Sequence[Unit],
        reference: Sequence[Asked],
        *,
        edit: str,
        random: int,
        sources: Sequence[Sequence[Sequence[int]]],
        file: pathlib.Path,
        most: int = 0,
    ) -> tuple[Values, dict]:
        """What every site is held at, and what the units are compared with.

        Random units are matched by how far a unit's means are apart between harmful prompts that
        the plain model answers and those that it refuses (or, where it does not do both often
        enough, between harmful and benign ones), and by its output norm.

        Args:
            chosen: the units to be held.
            reference: the prompts that activations may be averaged over.
            edit: what units are held at, one of `EDITS`: the mean over harmful reference prompts
                that the plain model refuses ("refused") or over benign ones ("benign"), "zero", or
                the value at each tested prompt's own counterfactuals ("source").
            random: draws of random units.
            sources: for "source", the tokens of each tested prompt's counterfactuals.
            file: where the controls are kept (JSON). Those of an earlier run stay.
            most: reference prompts of a label that are used at most, where that is fewer than
                `REFERENCE_PROMPTS`; 0 for these.

        Returns:
            The values; and the controls, as `ClampOutcome` has them.

        Raises:
            TooFewRefusedError: too few reference prompts are refused.
        """
        modules = units.modules_of(chosen)
        sites = sorted({unit.site for unit in (*chosen, *modules)})
        controls = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        most = min(most or REFERENCE_PROMPTS, REFERENCE_PROMPTS)
        groups = self._groups(reference, controls.get("groups", {}), edit, random, most)
        if edit == "refused" and len(groups["refused"]) < LEAST_PROMPTS:
            raise TooFewRefusedError(len(groups["harmful"]), len(groups["refused"]))
        controls["groups"] = groups
        by_id = {one.prompt.id: one for one in reference}
        names = list(dict.fromkeys(itertools.chain(*groups.values())))
        members = {
            group: np.isin(names, own) if own else np.zeros(len(names), bool)
            for group, own in groups.items()
        }
        tokens = [by_id[name].tokens for name in names]
        with tqdm.tqdm(
            total=len(tokens), desc="values of units", unit="prompt", disable=not self.progress
        ) as bar:
            means = values.group_means(
                self.model.decoder,
                tokens,
                members,
                sites,
                memory=self.model.budget,
                progress=bar.update,
            )
        controls |= self._matched(chosen, means, controls, random)
        text = json.dumps(controls, indent=2) + "\n"
        atomic.replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))
        at = self._values(edit, means, sites, sources)
        return at, controls | {"draws": controls["draws"][:random]}

    def _groups(
        self,
        reference: Sequence[Asked],
        kept: Mapping[str, list[str]],
        edit: str,
        random: int,
        most: int,
    ) -> dict[str, list[str]]:
        """The ids of the prompts that activations are averaged over. Those of an earlier run stay:
        what was answered with units held at their means must not be mixed with other means, though
        other judges or more samples may find others refused."""
        if not (edit in ("refused", "benign") or random):
            return dict(kept)
        drawn = responses.drawn(reference, most, self.seed)
        groups = {
            label: [one.prompt.id for one in responses.of_split(drawn, label=label)]
            for label in ("harmful", "benign")
        } | dict(kept)
        if (edit == "refused" or random) and "refused" not in groups:
            harmful = [one for one in reference if one.prompt.id in set(groups["harmful"])]
            self.answer(harmful, [PLAIN], "reference prompts")
            rates = self.by_prompt(PLAIN.name, harmful, "refusal")
            for name, here in (("refused", rates >= 0.5), ("complied", rates < 0.5)):
                groups[name] = [
                    one.prompt.id for one, is_in in zip(harmful, here, strict=True) if is_in
                ]
        return groups

    def _matched(
        self, chosen: Sequence[Unit], means: Mapping[str, Values], kept: dict, number: int
    ) -> dict:
        """The parts of the controls that random units make; draws of an earlier run stay, though
        another machine may round the traits that they follow from otherwise."""
        decoder = self.model.decoder
        draws = [
            units.named([unit["unit"] for unit in draw], decoder.config)
            for draw in kept.get("draws", [])
        ]
        if not (number or draws):
            return {"contrast": [], "units": [], "draws": []}
        both = ("complied", "refused")
        enough = all(len(kept["groups"][name]) >= LEAST_PROMPTS for name in both)
        first, second = contrast = both if enough else ("harmful", "benign")
        traits = likeness.traits(decoder, means[first], means[second])
        while len(draws) < number:
            drawn = likeness.another(chosen, traits, draws, seed=self.seed)
            if drawn is None:
                break
            draws.append(drawn)
        return {
            "contrast": list(contrast),
            "units": likeness.described(chosen, traits) if draws else [],
            "draws": [likeness.described(draw, traits) for draw in draws],
        }

    def _values(
        self,
        edit: str,
        means: Mapping[str, Values],
        sites: Sequence[Site],
        sources: Sequence[Sequence[Sequence[int]]],
    ) -> Values:
        """What units are held at."""
        decoder = self.model.decoder
        if edit == "zero":
            return values.zero(sites, decoder.config)
        if edit == "source":
            return values.activations(decoder, sources, sites, memory=self.model.budget)
        return means[edit]

    def measure(
        self, compared: Sequence[Condition], tested: Sequence[Asked]
    ) -> dict[tuple[str, str], Float[np.ndarray, "prompt"]]:
        """Every measure of every condition (by its name), by prompt; NaN where a prompt has
        none."""
        self.answer(tested, compared, "prompts")
        found = {
            (each.name, measure): self.by_prompt(each.name, tested, measure)
            for each in compared
            for measure in (*RATES, "tokens")
        }
        return found | self._on_benign_text(compared, tested)

    def answer(self, asked: Sequence[Asked], compared: Sequence[Condition], label: str) -> None:
        """Generates and judges what is not there yet; `label` names the progress bars."""
        answering.answer(
            self.model,
            asked,
            compared,
            self.judges,
            self.responses,
            self.verdicts,
            sampling=self.sampling,
            samples=self.samples,
            seed=self.seed,
            label=label,
            progress=self.progress,
        )

    def by_prompt(
        self, name: str, asked: Sequence[Asked], measure: str
    ) -> Float[np.ndarray, "prompt"]:
        """Mean of a measure over each prompt's samples under the condition of this name; NaN where
        none has it."""

        def value(prompt: str, sample: int) -> float:
            key = Key(name, prompt, sample)
            return MEASURES[measure](self.responses.values[key], self.verdicts.values[key])

        return responses.by_prompt(asked, self.samples, value)

    def _on_benign_text(
        self, compared: Sequence[Condition], tested: Sequence[Asked]
    ) -> dict[tuple[str, str], Float[np.ndarray, "prompt"]]:
        """Negative log-probability of the plain model's first answers to benign prompts, and KL
        there."""
        decoder, budget = self.model.decoder, self.model.budget
        rows, texts = [], []
        for row, one in enumerate(tested):
            answer = self.responses.values[Key(PLAIN.name, one.prompt.id, 0)].tokens
            if one.prompt.label == TEXT_LABEL and answer:
                rows.append(row)
                texts.append((one.tokens, answer))
        found = {
            (each.name, name): np.full(len(tested), np.nan)
            for each in compared
            for name in ("nll", "kl")
        }
        with tqdm.tqdm(
            total=len(compared), desc="benign text", unit="condition", disable=not self.progress
        ) as bar:
            for each in compared if texts else ():
                own = each.holds(np.array(rows))
                with answering.under(each):
                    logprobs = likelihood.logprobs(decoder, texts, holds=own, memory=budget)
                    divergences = likelihood.kl(decoder, texts, own, memory=budget)
                found[each.name, "nll"][rows] = -logprobs.means
                found[each.name, "kl"][rows] = divergences.means
                bar.update(1)
        return found

    def said(self, compared: Sequence[Condition], tested: Sequence[Asked]) -> list[Verdict]:
        """The verdicts on all responses."""
        keys = responses.keys([each.name for each in compared], tested, self.samples)
        return [self.verdicts.values[key] for key in keys]

    def only_think(self, compared: Sequence[Condition], tested: Sequence[Asked]) -> int:
        """How many responses ended within their thoughts."""
        keys = responses.keys([each.name for each in compared], tested, self.samples)
        return sum(self.responses.values[key].only_thinks for key in keys)

    def texts(self, held: Sequence[Held], tested: Sequence[Asked]) -> list[dict]:
        """Prompts and first responses of the plain model and with the units held, for the
        report."""
        names = [each.name for each in held if each.kind in (PLAIN_KIND, CLAMP)]
        return [
            {
                "id": one.prompt.id,
                "label": one.prompt.label,
                "prompt": chat.as_text(one.prompt.prompt) or str(list(one.tokens)),
                "responses": [(name, self._first_response(name, one)) for name in names],
            }
            for one in tested
        ]

    def _first_response(self, name: str, one: Asked) -> str:
        """A condition's first response to a prompt, as text or as token ids."""
        response = self.responses.values[Key(name, one.prompt.id, 0)]
        return response.text or str(list(response.tokens))
