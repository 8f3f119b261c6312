"""A model's own answers to prompts, judged; and of these the pairs that `launch.mediate` reads.

A prompt makes a pair where the model, asked several times, gave both a harmful and a safe response:
what it may say either way is then its own, and not another author's.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import pyarrow.parquet as pq

from jaxmed.behaviour import answering, answers, responses
from jaxmed.behaviour.answering import AnsweringModel
from jaxmed.behaviour.answers import PAIRS, TABLE, RespondOutcome, Unpaired
from jaxmed.behaviour.judges import protocol
from jaxmed.behaviour.judges.protocol import Doubt, Judge
from jaxmed.behaviour.responses import PLAIN, Asked, Response
from jaxmed.data import pairing, splits
from jaxmed.data import prompts as prompts_lib
from jaxmed.data.pairing import UnpairedError
from jaxmed.data.pairs import Pair
from jaxmed.data.prompts import Prompt
from jaxmed.files import atomic
from jaxmed.files.reading import DataError
from jaxmed.runs import asking, loading, sweep
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.asking import AnswerSettings
from jaxmed.runs.settings import like, setting
from jaxmed.runs.skipping import Skipped
from jaxmed.store import claims
from models.errors import InputError

_OWN_FILES = (*responses.FILES, TABLE, PAIRS)
# What responses do not depend on: a folder that has them can be judged and paired in other ways,
# and samples can be added.
_MAY_CHANGE = (
    *asking.MAY_CHANGE,
    "samples",
    "counterfactual",
    "count",
    "most_length_difference",
    "safe_template",
    "threshold",
)


@dataclasses.dataclass(frozen=True)
class RespondSettings(AnswerSettings):
    """Which answers are asked for, and what pairs are made of them."""

    samples: int = like(AnswerSettings, "samples", default=8)
    temperature: float = like(AnswerSettings, "temperature", default=1.0)
    counterfactual: str = setting(
        help="Where the counterfactuals of harmful prompts are found. given: in the file. matched: "
        "harmless prompts of the same source that correspond to them, as those of XSTest and "
        "JailbreakBench do. length: the benign prompts that are nearest in their number of tokens. "
        "A counterfactual is of the same split.",
        default="given",
        choices=pairing.COUNTERFACTUALS,
    )
    count: int = setting(
        help="--counterfactual=matched or length: how many a prompt has at most.",
        default=1,
        least=1,
    )
    most_length_difference: int | None = setting(
        help="--counterfactual=length: by how many tokens a counterfactual may differ; prompts "
        "that have none so near make no pair. By default any number.",
        default=None,
        least=0,
        needs="counterfactual=length",
    )
    safe_template: str = setting(
        help="A text that is the safe response of prompts which were never refused; by default "
        "these make no pair.",
        default="",
    )
    threshold: float = setting(
        help="A verdict of at least this counts as yes.", default=0.5, least=0, most=1
    )


def run(
    settings: RespondSettings, *, own_judges: Sequence[Judge] = (), progress: bool = True
) -> RespondOutcome:
    """Has prompts answered and the answers judged, and writes what is found and the pairs.

    A folder that holds a stopped run is gone on with; one that holds a finished run is judged and
    paired anew, and sampled further if there are to be more samples. Nothing is written before
    settings, checkpoint, prompts, counterfactuals and judges have been checked.

    Args:
        settings: what is asked.
        own_judges: in the place of those that the settings name.
        progress: show progress bars, and say what goes on.

    Raises:
        InputError: something that the user gave cannot be used; or no pair can be made of the
            responses, which are kept.
    """
    check(settings)
    settings = loading.settled(settings)
    say = sweep.teller(progress)
    claims.check_kind(settings.out, "respond")
    files = asking.read_files(settings, say, judged=not own_judges)
    say(f"Loading {settings.model}")
    model = asking.load(settings, say)
    asked = asking.as_asked(settings, files, model, say)
    prompts = asked
    if settings.most_prompts:  # all others may still be counterfactuals of those that are drawn
        prompts = responses.drawn(asked, settings.most_prompts, settings.seed, ["harmful"])
    pairs = find_pairs(settings, model, prompts, say)
    templates = _templates(settings, model, responses.of_split(prompts, label="harmful"))
    if settings.counterfactual != "given":
        prompts = _needed(prompts, pairs, say)
    if settings.most_prompts:
        prompts = responses.drawn(prompts, settings.most_prompts, settings.seed)
    judges = list(own_judges) or asking.read_judges(settings, model, prompts)
    for line in model.encoder.told:
        say(line)
    folder = pathlib.Path(settings.out)
    described = asking.described(settings, "respond", model, asked, judges)
    claims.claim(folder, described, _OWN_FILES, settings.overwrite, _MAY_CHANGE)
    answered = responses.response_log(folder)
    verdicts = responses.verdict_log(folder, described["judges_hash"])
    answering.answer(
        model,
        prompts,
        [PLAIN],
        judges,
        answered,
        verdicts,
        sampling=settings.sampling,
        samples=settings.samples,
        seed=settings.seed,
        progress=progress,
    )
    counted = {"samples": settings.samples, "threshold": settings.threshold}
    table = answers.tabulate(prompts, answered, verdicts, **counted)
    atomic.replace_file(folder / TABLE, lambda path: pq.write_table(table, path))
    responses.write_exchanges(folder / responses.EXCHANGES, prompts, answered, verdicts)
    (folder / PAIRS).unlink(missing_ok=True)  # of another way of pairing
    seen = {
        one.prompt.id: answers.of_prompt(one.prompt.id, answered, verdicts, **counted)
        for one in responses.of_split(prompts, label="harmful")
    }
    complete = {
        name: dataclasses.replace(both, safe=both.safe or templates.get(name))
        for name, both in seen.items()
    }
    bases = {pair.base for pair in pairs}
    made = [pair for pair in pairs if complete[pair.base].are_a_pair]
    wanted = list(responses.keys([PLAIN.name], prompts, settings.samples))
    doubts = protocol.doubts(verdicts.values[key] for key in wanted)
    if not made:
        got = answers.unpaired([seen[name] for name in bases])
        raise InputError(_why_no_pair(settings, got, doubts))
    answers.write_pairs(folder / PAIRS, made, asked, complete, model.encoder)
    return RespondOutcome(
        folder=folder,
        model=settings.model,
        adapter=settings.adapter,
        dtype=settings.dtype,
        ignore_config=settings.ignore_config,
        chat=settings.chat,
        date=settings.date if model.encoder.reads_date else "",
        template_args=settings.template_args,
        samples=settings.samples,
        max_tokens=settings.max_tokens,
        table=table,
        pairs={split: sum(pair.split == split for pair in made) for split in splits.SPLITS},
        unpaired=answers.unpaired([complete[name] for name in bases]),
        only_think=sum(answered.values[key].only_thinks for key in wanted),
        templates=sum(seen[pair.base].safe is None for pair in made),
        same_start=sum(complete[pair.base].start_alike for pair in made),
        after_thoughts=sum(complete[pair.base].came_of_thoughts for pair in made),
        meanings={judge.name: judge.meaning for judge in judges},
        doubts=doubts,
        length_differences=(
            [_length_difference(pair) for pair in made]
            if settings.counterfactual == "length"
            else None
        ),
    )


def check(settings: RespondSettings) -> None:
    """Raises `InputError` where settings contradict each other; nothing is loaded for it."""
    asking.check(settings)
    if settings.counterfactual == "given" and settings_lib.given(settings, "count"):
        raise InputError(
            "--count needs --counterfactual=matched or length: of given ones all are used"
        )


def find_pairs(
    settings: RespondSettings,
    model: AnsweringModel,
    asked: Sequence[Asked],
    say: Callable[[str], None],
) -> list[Pair]:
    """The harmful prompts and their counterfactuals, without answers.

    Args:
        settings: how counterfactuals are found.
        model: gets them.
        asked: the prompts.
        say: told of prompts that have none, where these are to be skipped.

    Raises:
        InputError: there is no harmful prompt, or one has no counterfactual that the model can get
            (none of them has, where such are to be skipped).
    """
    harmful = [_without_answers(one.prompt) for one in responses.of_split(asked, label="harmful")]
    if not harmful:
        raise DataError(
            f"{', '.join(settings.prompts)}: none of {len(asked)} prompts is harmful, and pairs "
            "are of harmful prompts; --prompts=harmful=FILE labels a file that does not say it"
        )
    labels = pairing.LENDERS.get(settings.counterfactual, ())
    lenders = [one.prompt for one in asked if one.prompt.label in labels]
    if labels and not lenders:
        raise DataError(
            f"--counterfactual={settings.counterfactual}: {', '.join(settings.prompts)} have no "
            f"{' or '.join(labels)} prompts; give some, --prompts={labels[0]}=FILE"
        )
    if settings.counterfactual == "given" and not any(
        one.counterfactuals or one.counterfactual_ids for one in harmful
    ):
        raise DataError(
            f"--counterfactual=given: no harmful prompt of {', '.join(settings.prompts)} has a "
            "counterfactual in its file; give --counterfactual=matched or length, and benign "
            "--prompts"
        )
    skipped = Skipped("prompts", settings.skip_bad_prompts, say, told="No pair")

    def skip(error: DataError) -> None:
        # What the bound leaves without a counterfactual was asked to be left out.
        is_far = isinstance(error, UnpairedError) and settings.most_length_difference is not None
        if not (settings.skip_bad_prompts or is_far):
            raise error
        skipped.leave_out(error)

    try:
        pairs = pairing.pair_up(
            harmful + lenders,
            settings.counterfactual,
            model.encoder,
            count=settings.count,
            most_length_difference=settings.most_length_difference,
            seed=settings.seed,
            on_bad=skip,
        )
    except DataError as error:
        raise DataError(
            f"--counterfactual={settings.counterfactual}: {error}{skipped.way_out}"
        ) from None
    usable = []
    for pair in pairs:
        what = f"{pair.where}: the counterfactual of prompt '{pair.base}'"
        try:
            asking.check_tokens(what, pair.counterfactual_ids, settings, model)
            usable.append(pair)
        except DataError as error:
            skipped.add(error)
    if not usable:
        raise DataError(f"not one of {len(harmful)} harmful prompts has a usable counterfactual")
    if skipped.count:
        bases = {pair.base for pair in usable}
        say(f"{len(bases)} of {len(harmful)} harmful prompts can be paired")
    if settings.counterfactual == "length":
        differences = [_length_difference(pair) for pair in usable]
        say(
            f"{differences.count(0)} of {len(usable)} counterfactuals have as many tokens as their "
            f"prompts; the farthest differs by {max(differences)}"
        )
    return usable


def _length_difference(pair: Pair) -> int:
    """By how many tokens the two prompts differ."""
    return abs(len(pair.prompt_ids) - len(pair.counterfactual_ids))


def _needed(
    asked: Sequence[Asked], pairs: Sequence[Pair], say: Callable[[str], None]
) -> list[Asked]:
    """All prompts but benign ones that could have been counterfactuals and are none, of which a
    file may hold tens of thousands."""
    used = {pair.counterfactual_ids for pair in pairs}
    needed = [one for one in asked if one.prompt.label != "benign" or one.tokens in used]
    if len(needed) < len(asked):
        say(
            f"{len(asked) - len(needed)} benign prompts are no counterfactual of any pair, and are "
            "not answered"
        )
    return needed


def _without_answers(prompt: Prompt) -> Prompt:
    """The prompt, without what others wrote as its answers."""
    return dataclasses.replace(
        prompt, harmful_response="", safe_response="", harmful_ids=(), safe_ids=()
    )


def _templates(
    settings: RespondSettings, model: AnsweringModel, asked: Sequence[Asked]
) -> dict[str, Response]:
    """The safe response of those prompts that got none, by a prompt's id."""
    if not settings.safe_template:
        return {}
    if model.tokenizer is None:
        raise InputError(f"--safe_template: is text, and {settings.model} has no tokenizer")
    found = {}
    for one in asked:
        after = prompts_lib.written(one.prompt, model.encoder)
        tokens = model.encoder.answer(
            settings.safe_template, "safe_response", f"{one.prompt.where}: --safe_template", after
        )
        if not settings.safe_template.strip() or not tokens:
            raise InputError("--safe_template: has no tokens")
        found[one.prompt.id] = Response(tokens, settings.safe_template, True)
    return found


def _why_no_pair(
    settings: RespondSettings,
    got: Unpaired,
    doubts: Sequence[Doubt],
) -> str:
    """Why nothing could be paired, and what can be done."""
    ways = ["more --samples", "another --threshold"]
    if not settings.safe_template:
        ways.append("or --safe_template=TEXT for those that got harmful ones alone")
    unjudged = "".join(
        f"On {doubt.none} of {doubt.number} responses there is no verdict ({doubt.says}), since "
        "all answers of the judge model together had less than "
        f"{doubt.least} of its probability. "
        for doubt in doubts
        if doubt.none
    )
    return (
        f"{settings.out}: no pair, since no prompt got both a harmful and a safe response. Of "
        f"{got.prompts} harmful prompts with counterfactuals {got.safe_alone} got safe ones alone, "
        f"{got.harmful_alone} harmful ones alone, {got.neither} neither. "
        f"{unjudged}The responses are kept: the same command goes on from them with "
        f"{', '.join(ways)}; a higher --temperature or other --prompts need another --out"
    )
