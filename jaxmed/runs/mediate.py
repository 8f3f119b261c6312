"""Runs that last: from a checkpoint and a file of pairs to a results folder, resumable."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from scipy import stats

import models
from jaxmed.analysis import audit as audit_lib
from jaxmed.analysis import joint as joint_lib
from jaxmed.analysis import ranking, screening, statistics, summary
from jaxmed.data import pairs as pairs_lib
from jaxmed.data import splits, tokens
from jaxmed.data.pairs import Pair
from jaxmed.engine import cost, memory, propagate, scan
from jaxmed.files.reading import DataError
from jaxmed.question import directions as directions_lib
from jaxmed.question import effects, metrics
from jaxmed.question import question as question_lib
from jaxmed.question import sites as sites_lib
from jaxmed.question.effects import Status
from jaxmed.question.positions import Align, Positions
from jaxmed.report import mediation
from jaxmed.store import circumstances
from jaxmed.store.results import Results
from models import checkpoint, organisms
from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import InputError

# The values that a setting may have, where they can be listed.
CHOICES = {
    "metric": tuple(metrics.METRICS),
    "response_part": ("all", "decision", "continuation"),
    "positions": tuple(Positions),
    "align": tuple(Align),
    "dtype": ("", "float16", "bfloat16", "float32", "float64"),
    "matmul_precision": tuple(propagate.MATMUL_PRECISIONS),
}
# The least value of a number.
LEAST = {
    "group_size": 1,
    "joint_size": 0,
    "joint_share": 0,
    "joint_pairs": 1,
    "decision_tokens": 1,
    "screen": 0,
    "screen_audit": 0,
    "screen_steps": 1,
    "memory_gb": 1e-3,
}
# The largest.
MOST = {"joint_share": 1}
SCREEN_SEED = 0  # of the audit sample
# Settings that only one metric reads.
_OF_ONE_METRIC = {
    "logit_diff": ("harmful_tokens", "safe_tokens"),
    "response_logprob_diff": ("response_part", "decision_tokens"),
}
# Settings that say nothing without a screen, or without a joint set.
OF_THE_SCREEN = ("screen_audit", "screen_steps")
OF_THE_JOINT_SET = ("joint_share", "joint_pairs")
AS_IT_STANDS = (
    "Prompts are text and are used as they stand; --chat wraps them in the tokenizer's chat "
    "template"
)
_BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of a checkpoint and a file of pairs; one field per flag of `launch.mediate`.

    Attributes:
        model: folder or Hugging Face hub id.
        pairs: JSONL file.
        out: results folder.
        granularity: any of layer, module, head, token, neuron, and direction.
        directions: npz file of the directions to patch, as `directions.read` reads it; it adds the
            granularity direction. "" for none.
        metric: "logit_diff" or "response_logprob_diff".
        split: the splits whose pairs are used, of A, B and C; () for all.
        positions: which positions are edited.
        align: how base and source prompt are laid against each other.
        group_size: adjacent neurons that are edited together.
        screen: compute exactly only the neurons that may be among the so many strongest, by their
            gradients; 0 for all neurons.
        screen_audit: neurons that are computed beside them, drawn from all others (screen).
        screen_steps: points at which the gradient is taken (screen); see `attribution.scores`.
        joint_size: neurons of the greedy joint set, at most; 0 for none.
        joint_share: share of TE, in both directions, at which the joint set is complete.
        joint_pairs: how many pairs, from the first, the joint set is searched on; the others
            confirm it.
        chat: wrap text prompts in the tokenizer's chat template.
        harmful_tokens, safe_tokens: first tokens that replace every pair's own answers
            (logit_diff): token ids, or texts whose first token counts.
        response_part, decision_tokens: which part of the response is read, and where it is cut
            (response_logprob_diff).
        dtype: of the parameters; "" for the checkpoint's own, but at least float32 on a CPU.
        matmul_precision: of the operands of matrix products that act on differences, "float32" or
            "bfloat16"; plain runs and all else are float32.
        memory_gb: memory that the run may take on its device, weights and program included, in GiB;
            by default most of what is free.
        skip_bad_pairs: leave out, and count, pairs that cannot be used.
        overwrite: start again in a folder that holds an earlier run.
        show_text: show prompts in the report.
    """

    model: str
    pairs: str
    out: str
    granularity: tuple[str, ...] = ("layer", "module", "head", "token", "neuron")
    metric: str = "logit_diff"
    split: tuple[str, ...] = ()
    positions: str = "last"
    align: str = "end"
    directions: str = ""
    group_size: int = 1
    screen: int = 0
    screen_audit: int = screening.AUDIT
    screen_steps: int = 1
    joint_size: int = 0
    joint_share: float = joint_lib.SHARE
    joint_pairs: int = 8
    chat: bool = False
    harmful_tokens: tuple[str, ...] = ()
    safe_tokens: tuple[str, ...] = ()
    response_part: str = "all"
    decision_tokens: int = 1
    dtype: str = ""
    matmul_precision: str = "float32"
    memory_gb: float | None = None
    skip_bad_pairs: bool = False
    overwrite: bool = False
    show_text: bool = False

    @property
    def granularities(self) -> tuple[str, ...]:
        """Those that are computed: a file of directions is enough to ask for them."""
        added = ("direction",) if self.directions else ()
        return tuple(dict.fromkeys((*self.granularity, *added)))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run, once everything has been read and checked.

    Attributes:
        decoder, pairs, question, settings: what is asked of what.
        budget: bytes of memory.
        progress: show progress bars, and say what goes on.
    """

    decoder: Decoder
    pairs: list[Pair]
    question: question_lib.Question
    settings: Settings
    budget: int
    progress: bool

    def say(self, text: str) -> None:
        """Tells people what goes on."""
        if self.progress:
            _say(text)


def run(settings: Settings) -> Results:
    """Computes every effect that is asked for, and writes files and report; see `measure`."""
    results, asked = measure(settings)
    summary.write_summary(results)
    mediation.write(results.folder, settings.show_text, asked.pairs)
    results.finish()
    return results


def measure(settings: Settings, *, progress: bool = True) -> tuple[Results, Asked]:
    """Computes every effect that is asked for, and stores them, without summary and report.

    A folder that holds an unfinished run of the same settings is gone on with. Nothing is written
    before the checkpoint and every pair have been checked.

    Args:
        settings: what is asked.
        progress: show progress bars, and say what goes on.

    Returns:
        The results, and what they are of; its pairs are in the results' order.

    Raises:
        InputError: something that the user gave cannot be used; the message names it.
    """
    began = time.time()
    check(settings)
    say = _say if progress else _keep_silent
    say(f"Loading {settings.model}")
    folder = checkpoint.resolve(settings.model)
    decoder, tokenizer = models.load(folder, dtype=parameter_type(settings.dtype, folder))
    check_counts(settings, decoder.config)
    budget = memory.free(settings.memory_gb)
    question = question_lib.Question(
        _metric(settings, decoder, tokenizer),
        Positions(settings.positions),
        Align(settings.align),
        settings.group_size,
        directions_lib.read(settings.directions, decoder.config) if settings.directions else None,
    )
    pairs, skipped = _read_pairs(settings, decoder, tokenizer, question, say)
    results = Results.resume_or_create(
        settings.out,
        _description(settings, question, folder, pairs, skipped),
        question_lib.sizes(decoder.config, pairs, question, settings.granularities),
        [pair.id for pair in pairs],
        settings.granularities,
        overwrite=settings.overwrite,
    )
    asked = Asked(decoder, pairs, question, settings, budget, progress)
    selection = _screen(asked, results) if settings.screen else None
    _scan(asked, results, selection)
    measured = {}
    if selection:
        measured["audit"] = _audit(results, selection, settings.screen)
    if settings.joint_size and "joint" not in results.run:
        if joint := _joint(asked, results):
            measured["joint"] = joint
    # A run that was stopped, or is repeated, adds to what it took before.
    measured["seconds"] = results.run.get("seconds", 0) + time.time() - began
    results.record(measured)
    return results, asked


def report_again(folder: str, show_text: bool) -> Results:
    """Writes the report of a finished or unfinished run anew; see `report.write`.

    Raises:
        InputError: the folder is no results folder, or the texts to show are gone.
    """
    results = Results.open(folder)
    run = results.run
    pairs = None
    if show_text:
        tokenizer = checkpoint.read_tokenizer(checkpoint.resolve(run["model"]))
        pairs = pairs_lib.read(run["pairs"], tokenizer, chat=run["chat"])
        if missing := set(results.pair_ids) - {pair.id for pair in pairs}:
            raise InputError(
                f"--show_text: {run['pairs']} no longer has pair '{sorted(missing)[0]}'"
            )
    mediation.write(results.folder, show_text, pairs)
    return results


def check(settings: Settings) -> None:
    """Raises `InputError` where settings contradict each other; nothing is loaded for it."""
    for name, known in CHOICES.items():
        if getattr(settings, name) not in known:
            raise InputError(f"--{name}={getattr(settings, name)}: not one of {', '.join(known)}")
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name}={value}: must be a number, and at least {least}")
    for name, most in MOST.items():
        if getattr(settings, name) > most:
            raise InputError(f"--{name}={getattr(settings, name)}: must be {most} at most")
    unknown = set(settings.granularity) - set(sites_lib.SITES)
    if unknown or not settings.granularity:
        raise InputError(
            f"--granularity={','.join(sorted(unknown))}: not one of {', '.join(sites_lib.SITES)}"
        )
    if unknown := sorted(set(settings.split) - set(splits.SPLITS)):
        raise InputError(f"--split={','.join(unknown)}: not one of {', '.join(splits.SPLITS)}")
    if "direction" in settings.granularity and not settings.directions:
        raise InputError("--granularity=direction needs --directions=FILE.npz")
    if settings.positions == Positions.RESPONSE and settings.metric == "logit_diff":
        raise InputError(
            "--positions=response: logit_diff reads the last prompt token, which no later "
            "position can change; use --metric=response_logprob_diff"
        )
    for metric, names in _OF_ONE_METRIC.items():
        for name in names:
            if settings.metric != metric and getattr(settings, name) != getattr(Settings, name):
                raise InputError(f"--{name} needs --metric={metric}")
    for name in OF_THE_SCREEN:
        if not settings.screen and getattr(settings, name) != getattr(Settings, name):
            raise InputError(f"--{name} needs --screen=K")
    for name in OF_THE_JOINT_SET:
        if not settings.joint_size and getattr(settings, name) != getattr(Settings, name):
            raise InputError(f"--{name} needs --joint_size=K")
    if settings.screen and "neuron" not in settings.granularity:
        raise InputError("--screen needs --granularity=neuron: nothing else is screened")
    if settings.joint_size and (settings.group_size > 1 or "neuron" not in settings.granularity):
        raise InputError("--joint_size needs --granularity=neuron and --group_size=1")


def check_counts(settings: Settings, config: DecoderConfig) -> None:
    """Raises `InputError` where more neurons are looked for than the model has."""
    most = config.num_layers * sites_lib.group_count(config, settings.group_size)
    units = "neurons" if settings.group_size == 1 else "groups of neurons"
    for name in ("joint_size", "screen"):
        if getattr(settings, name) > most:
            raise InputError(f"--{name}={getattr(settings, name)}: the model has {most} {units}")


def parameter_type(asked: str, folder) -> str | None:
    """The type that parameters are loaded in, given what `Settings.dtype` asks; None for the
    checkpoint's own."""
    if asked or jax.default_backend() != "cpu":
        return asked or None
    # XLA's CPU backend slices no 16-bit floats: it would convert all layers for every chunk.
    return str(jnp.promote_types(checkpoint.stored_dtype(folder), jnp.float32))


def _metric(settings: Settings, decoder: Decoder, tokenizer) -> metrics.Metric:
    if settings.metric == "response_logprob_diff":
        return metrics.ResponseLogprobDifference(settings.response_part, settings.decision_tokens)
    return metrics.LogitDifference(
        *(
            tokens.first_tokens(
                getattr(settings, name), decoder.config.vocab_size, tokenizer, where=f"--{name}"
            )
            for name in ("harmful_tokens", "safe_tokens")
        )
    )


def _read_pairs(
    settings: Settings,
    decoder: Decoder,
    tokenizer,
    question: question_lib.Question,
    say: Callable[[str], None],
) -> tuple[list[Pair], int]:
    """The pairs that can be used, and how many cannot."""
    bad = []

    def skip(error: DataError) -> None:
        bad.append(error)
        say(f"Skipped: {error}")

    on_bad = skip if settings.skip_bad_pairs else None
    pairs = pairs_lib.read(settings.pairs, tokenizer, chat=settings.chat, on_bad=on_bad)
    if settings.split:
        everywhere = len(pairs)
        pairs = [pair for pair in pairs if pair.split in settings.split]
        if not pairs:
            raise DataError(
                f"--split={','.join(settings.split)}: none of the {everywhere} pairs of "
                f"{settings.pairs} is in it"
            )
        say(f"{len(pairs)} of {everywhere} pairs are in split {' or '.join(settings.split)}")
    usable = []
    for pair in pairs:
        try:
            question_lib.check(decoder.config, pair, question, settings.granularities)
            usable.append(pair)
        except DataError as error:
            if on_bad is None:
                raise DataError(f"{error} (or leave such pairs out: --skip_bad_pairs)") from None
            on_bad(error)
    if not usable:
        raise DataError(f"{settings.pairs}: not one of its pairs can be used")
    if bad:
        say(f"Skipped {len(bad)} of {len(bad) + len(usable)} pairs")
    same = sum(pair.prompt_ids == pair.counterfactual_ids for pair in usable)
    if same:
        say(f"{same} of {len(usable)} pairs have identical prompts: all their effects are 0")
    is_text = usable[0].prompt_text is not None and not usable[0].is_chat
    if is_text and tokenizer.chat_template:
        say(AS_IT_STANDS)
    return usable, len(bad)


def _description(
    settings: Settings, question: question_lib.Question, folder, pairs: list[Pair], skipped: int
) -> dict:
    """What `run.json` says of the run."""
    return (dataclasses.asdict(settings) | circumstances.circumstances()) | {
        "metric_unit": question.metric.metric_unit,
        "meaning": question.metric.meaning,
        # The name under which the results' arrays record it.
        "precision": settings.matmul_precision,
        "weights_hash": checkpoint.weights_hash(folder),
        "pairs_hash": _pairs_hash(pairs),
        "pair_bases": [pair.base for pair in pairs],
        "prompt_hashes": _prompt_hashes(pairs),
        "directions_hash": question.directions and question.directions.hash,
        "skipped": skipped,
        "truth": _truth(folder, pairs),
        "seeds": {"bootstrap": statistics.SEED, "screen": SCREEN_SEED},
    }


def _pairs_hash(pairs: list[Pair]) -> str:
    """Of what the run reads of the pairs: their tokens and spans."""
    fields = [
        (pair.prompt_ids, pair.counterfactual_ids, pair.harmful_ids, pair.safe_ids)
        + (pair.prompt_span, pair.counterfactual_span)
        for pair in pairs
    ]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _prompt_hashes(pairs: list[Pair]) -> list[str]:
    """Of all base and source prompts: what is tested later must not be among them."""
    return sorted(
        set().union(
            *(splits.fingerprints(pair.prompt_text, pair.prompt_ids) for pair in pairs),
            *(
                splits.fingerprints(pair.counterfactual_text, pair.counterfactual_ids)
                for pair in pairs
            ),
        )
    )


def _screen(asked: Asked, results: Results) -> screening.Selection:
    """Which neurons are computed exactly, by the strength that gradients estimate.

    The estimates are kept, so that a run that goes on elsewhere selects the same neurons.
    """
    todo, settings = results.missing_estimates(), asked.settings
    hidden = not (todo and asked.progress)
    for index in tqdm.tqdm(todo, unit="pair", desc="gradient screen", disable=hidden):
        estimates = screening.scores(
            asked.decoder, asked.pairs[index], asked.question, steps=settings.screen_steps
        )
        results.write_estimates(index, *estimates)
    estimated = ranking.strength(*results.estimates())
    return screening.select(estimated, settings.screen, settings.screen_audit, SCREEN_SEED)


def _audit(results: Results, selection: screening.Selection, top: int) -> dict:
    """What the exact effects say of the neurons that were not computed, for `run.json`."""
    exact = ranking.strength(*results.effects("neuron", exact=True))
    # A failed candidate raises no threshold, and a failed sample is a hit: the bound still holds.
    failed = np.where(selection.sampled, np.inf, 0)
    audit = audit_lib.missed(selection, np.where(np.isnan(exact), failed, exact), top)
    return dataclasses.asdict(audit) | {
        "candidates": int(selection.candidates.sum()),
        "sampled": int(selection.sampled.sum()),
        "strata": [
            {
                "units": int((selection.stratum == number).sum()),
                "sampled": int(selection.sampled[selection.stratum == number].sum()),
            }
            for number in range(selection.stratum.max() + 1)
        ],
        "spearman": _spearman(
            exact[selection.sampled], ranking.strength(*results.estimates())[selection.sampled]
        ),
    }


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation over the units that have both; NaN where there is none."""
    both = np.isfinite(left) & np.isfinite(right)
    left, right = stats.rankdata(left[both]), stats.rankdata(right[both])
    if not (left.size and np.ptp(left) and np.ptp(right)):
        return math.nan
    return float(np.corrcoef(left, right)[0, 1])


def _scan(asked: Asked, results: Results, selection: screening.Selection | None) -> None:
    """Computes what is missing, pair by pair, with a progress bar.

    Args:
        asked, results: the run.
        selection: the neurons to compute; all without one.
    """
    pairs, settings, say = asked.pairs, asked.settings, asked.say
    missing = {name: set(results.missing(name)) for name in results.granularities}
    todo = {
        index: [name for name in results.granularities if index in missing[name]]
        for index in range(len(pairs))
    }
    todo = {index: names for index, names in todo.items() if names}
    if not todo:
        say(f"Nothing is left to compute in {results.folder}")
        return
    if len(todo) < len(pairs):
        say(f"Going on with {results.folder}: {len(pairs) - len(todo)} pairs are done")
    chosen = {"neuron": selection.computed} if selection else {}
    config, question = asked.decoder.config, asked.question
    costs = {
        index: cost.operations(config, pairs[index], question, names, chosen)
        for index, names in todo.items()
    }
    if asked.progress:
        _announce(asked, results, len(todo), sum(costs.values()), chosen)
    # By operations, not by pairs, so that the time left is honest where lengths differ.
    with tqdm.tqdm(total=sum(costs.values()), bar_format=_BAR, disable=not asked.progress) as bar:
        for done, (index, names) in enumerate(todo.items(), start=1):
            bar.set_description(f"pair {done}/{len(todo)}")
            found = scan.scan_pair(
                asked.decoder,
                pairs[index],
                question,
                names,
                chosen=chosen,
                matmul_precision=settings.matmul_precision,
                memory=asked.budget,
                on_operations=bar.update,
            )
            results.write_totals(index, found.y_base, found.y_source)
            for name in names:
                _write(results, index, name, found, question, selection)


def _write(
    results: Results,
    index: int,
    granularity: str,
    found: effects.PairEffects,
    question: question_lib.Question,
    selection: screening.Selection | None,
) -> None:
    """Writes one pair's effects; estimates stand in for neurons that were not computed."""
    shape = results.sizes.shape(granularity)
    sides = [effects.fitted(side[granularity], shape) for side in (found.nie, found.tie)]
    status = Status.EXACT
    if granularity == "direction":
        status = np.where(question.directions.given, Status.EXACT, Status.NOT_RUN)
    elif granularity == "neuron" and selection:
        status = np.where(selection.computed, Status.EXACT, Status.ESTIMATED)
        sides = [
            np.where(selection.computed, *both)
            for both in zip(sides, results.estimates(index), strict=True)
        ]
    results.write(index, granularity, *sides, status)


def _announce(
    asked: Asked, results: Results, todo: int, operations: float, chosen: dict[str, np.ndarray]
) -> None:
    """Says what the run will cost.

    Args:
        asked, results: the run.
        todo: pairs to be scanned.
        operations: floating-point operations of their scan.
        chosen: by granularity, the units that are computed; all of the others.
    """
    settings, pairs = asked.settings, asked.pairs
    joint = settings.joint_size * sum(
        cost.run_operations(asked.decoder.config, pair, asked.question) * joint_lib.CANDIDATES
        for pair in pairs[: settings.joint_pairs]
    )
    units = sum(
        chosen[name].sum() if name in chosen else math.prod(results.sizes.shape(name))
        for name in results.granularities
    )
    rate = _product_rate(asked.decoder, settings.matmul_precision)
    asked.say(
        f"{todo} pairs, at most {units:,} units each, in both directions: "
        f"{operations:.2e} floating-point operations"
        + (f", and at most {joint:.2e} for the joint set" if joint else "")
        + f". This machine's matrix products make {rate:.1e} a second, so it takes at "
        f"least {_duration(operations / rate)}, and compilation beside (some seconds for "
        "each length of prompt, most of the time for a small model); the bar tells the real time."
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.2g} seconds"


def _product_rate(decoder: Decoder, matmul_precision: str) -> float:
    """Floating-point operations a second of a product of the MLP's shape, measured now."""
    rows, config = 512, decoder.config
    dtype = propagate.MATMUL_PRECISIONS[matmul_precision] or decoder.compute_dtype
    left = jnp.ones((rows, config.hidden_size), dtype)
    right = jnp.ones((config.hidden_size, config.intermediate_size), dtype)
    product = jax.jit(
        functools.partial(
            jnp.matmul, precision="float32", preferred_element_type=decoder.compute_dtype
        )
    )
    product(left, right).block_until_ready()
    repeats = 5
    start = time.perf_counter()
    for _ in range(repeats):
        product(left, right).block_until_ready()
    seconds = time.perf_counter() - start
    return 2.0 * rows * config.hidden_size * config.intermediate_size * repeats / seconds


def _joint(asked: Asked, results: Results) -> dict | None:
    """The greedy joint set, as `run.json` and the report have it; None where TE is too small.

    Its fields are those of `estimands.JointSet`; "share" that it was searched for; "confirmed": its
    shares on the pairs that it was not searched on, and how many pairs they are, None if there are
    none or their TE is too small; "seconds" that search and confirmation took. The search sees
    nothing of those other pairs, but that a screen has chosen its neurons by all of them.
    """
    settings, say = asked.settings, asked.say
    searched = slice(settings.joint_pairs)
    others = slice(settings.joint_pairs, None)
    if not _has_total_effect(results, searched):
        say(
            f"No joint set: the mean total effect of its pairs is less than "
            f"{ranking.MINIMUM_TOTAL_EFFECT}, and shares of it would say nothing"
        )
        return None
    began = time.time()
    with tqdm.tqdm(
        total=settings.joint_size, unit="neuron", desc="joint set", disable=not asked.progress
    ) as bar:
        found = joint_lib.greedy_set(
            asked.decoder,
            asked.pairs[searched],
            asked.question,
            ranking.strength(*(side[searched] for side in results.effects("neuron", exact=True))),
            size=settings.joint_size,
            share=settings.joint_share,
            memory=asked.budget,
            on_step=bar.update,
        )
    confirmed = None
    if _has_total_effect(results, others):
        members = np.zeros((1, *results.sizes.shape("neuron")), bool)
        members[0][tuple(np.transpose(found.picked))] = True
        nie, tie = joint_lib.joint_shares(
            asked.decoder, asked.pairs[others], asked.question, members, asked.budget
        )
        confirmed = {
            "share_nie": float(nie[0]),
            "share_tie": float(tie[0]),
            "pairs": len(asked.pairs[others]),
        }
    return dataclasses.asdict(found) | {
        "share": settings.joint_share,
        "seconds": time.time() - began,
        "confirmed": confirmed,
    }


def _has_total_effect(results: Results, pairs: slice) -> bool:
    """Whether shares of the mean total effect of these pairs can be formed; not without pairs."""
    te = results.te[pairs]
    return len(te) > 0 and abs(float(np.mean(te))) >= ranking.MINIMUM_TOTAL_EFFECT


def _truth(folder, pairs: list[Pair]) -> dict | None:
    """What was planted for the contrast that an organism's pairs are of.

    None for any other checkpoint, and where the pairs' category is no contrast of the organism.
    """
    if not (folder / organisms.TRUTH).is_file():
        return None
    categories = {pair.category for pair in pairs}
    contrasts = organisms.truth(folder)["contrasts"]
    return contrasts.get(categories.pop()) if len(categories) == 1 else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _keep_silent(text: str) -> None:
    """In the place of `_say`, where nobody looks on."""
