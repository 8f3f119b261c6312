"""Runs that last: from a checkpoint and a file of pairs to a results folder, resumable."""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm
from scipy import stats

from jaxmed.analysis import audit as audit_lib
from jaxmed.analysis import joint as joint_lib
from jaxmed.analysis import ranking, screening, statistics, summary
from jaxmed.behaviour import responses
from jaxmed.data import clusters, splits
from jaxmed.data import pairs as pairs_lib
from jaxmed.data.pairs import Pair
from jaxmed.data.tokens import Encoder
from jaxmed.engine import blocks as blocks_lib
from jaxmed.engine import cost, memory, rates, scan
from jaxmed.engine.blocks import Block
from jaxmed.engine.cost import Devices
from jaxmed.files import reading
from jaxmed.files.reading import DataError
from jaxmed.question import directions as directions_lib
from jaxmed.question import effects, metrics
from jaxmed.question.effects import Status
from jaxmed.question.positions import Align, Positions
from jaxmed.question.question import Question, sizes, token_columns
from jaxmed.question.question import check as check_pair
from jaxmed.question.sites import SITES, group_count
from jaxmed.report import mediation
from jaxmed.runs import compilation, loading, processes, sweep
from jaxmed.runs import costs as costs_lib
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.processes import Process
from jaxmed.runs.settings import setting
from jaxmed.runs.skipping import Skipped
from jaxmed.runs.sweep import Shared
from jaxmed.store import circumstances, claims
from jaxmed.store.results import Results
from models import checkpoint, organisms, placement, products
from models.config import DTYPES, DecoderConfig
from models.decoder import Decoder
from models.errors import InputError

SCREEN_SEED = 0  # of the audit sample
DRAW_SEED = 0  # of --most_pairs
SCOUT_SEED = 0  # of --scout_pairs
_SCREENED = "screen-"  # units of work whose gradients are taken


@dataclasses.dataclass(frozen=True)
class MediateSettings:
    """What is asked of a checkpoint and a file of pairs."""

    model: str = setting(help="Folder or Hugging Face hub id of a checkpoint.", path=True)
    pairs: str = setting(
        help="JSONL file, one pair a line: id, prompt (text or chat messages; the run that "
        "complies), counterfactual, harmful_response, safe_response; or prompt_ids, "
        "counterfactual_ids, harmful_ids, safe_ids.",
        path=True,
    )
    out: str = setting(
        help="Folder for the results, local or gs://bucket/path; a stopped run goes on.",
        path=True,
        bucket=True,
    )
    granularity: tuple[str, ...] = setting(
        help=f"Any of {', '.join(SITES)}. token edits each aligned prompt position alone, "
        "whatever --positions says. direction needs --directions, and --directions alone is enough "
        "to ask for it.",
        default=("layer", "module", "head", "token", "neuron"),
        choices=SITES,
        commas=True,
    )
    adapter: str = setting(
        help="Folder or hub id of a LoRA adapter in peft's format, which is merged into the "
        "weights as they are loaded.",
        default="",
        path=True,
    )
    metric: str = setting(
        help="logit_diff: logit of the harmful answer's first token minus that of the safe one's, "
        "at the last prompt position. response_logprob_diff: mean token log-probability of the "
        "harmful response minus that of the safe one, in nats per token.",
        default="logit_diff",
        choices=metrics.METRICS,
    )
    split: tuple[str, ...] = setting(
        help="Use only the pairs of these splits, of A, B and C (a hash of the base prompt's name, "
        "where the file gives none), so that the others are left for launch.clamp; by default all.",
        default=(),
        choices=splits.SPLITS,
        commas=True,
    )
    most_pairs: int = setting(
        help="Pairs that are used at most, drawn by hash from those of --split; 0 for all.",
        default=0,
        least=0,
    )
    positions: str = setting(
        help="Which positions are edited: the last prompt token; from the first aligned position "
        "that differs to the prompt's end (with prompts of unequal length mostly the first one); "
        "all aligned prompt positions; or those of the response.",
        default="last",
        choices=Positions,
    )
    align: str = setting(
        help="How base and source prompt are laid against each other: their ends, their starts, or "
        "each pair's prompt_span and counterfactual_span ([start, stop), in tokens).",
        default="end",
        choices=Align,
    )
    directions: str = setting(
        help="npz file of directions to patch, such as steering vectors, probes or decoder rows of "
        "an SAE: arrays named SITE.LAYER, as residual.12, of unit vectors, [size] or "
        "[number, size]. They are measured beside what --granularity names.",
        default="",
        path=True,
    )
    group_size: int = setting(help="Adjacent neurons that are edited together.", default=1, least=1)
    screen: int = setting(
        help="For when only the K strongest neurons matter: computes exactly the "
        f"{screening.MARGIN} K that gradients rank highest, and a random sample of all others, "
        "which says how many of the strongest may be missing. The rest keep the gradient's "
        "estimate, marked as such. 0 computes every neuron exactly.",
        default=0,
        least=0,
    )
    screen_audit: int = setting(
        help="--screen: neurons of that sample. More of them make for a tighter bound.",
        default=screening.AUDIT,
        least=0,
        needs="screen",
    )
    screen_steps: int = setting(
        help="--screen: points between the two prompts at which the gradient is taken; 1 takes it "
        "at the run that is patched, more are integrated gradients (EAP-IG) at so many times the "
        "cost.",
        default=1,
        least=1,
        needs="screen",
    )
    scout_pairs: int = setting(
        help="For many pairs: computes all neurons on so many of them, the scouts, drawn by hash "
        f"(each with all pairs that share a prompt with it), and on the others only the "
        f"{screening.MARGIN} x --scout_top that are strongest there, and a random sample of all "
        "others, which says how many of the strongest may be missing. Means, intervals and tests "
        "of neurons are of the others alone. 0 computes every neuron on every pair.",
        default=0,
        least=0,
    )
    scout_top: int = setting(
        help="--scout_pairs: how many of the strongest neurons matter.",
        default=1000,
        least=1,
        needs="scout_pairs",
    )
    scout_audit: int = setting(
        help="--scout_pairs: neurons of the sample. More of them make for a tighter bound.",
        default=screening.AUDIT,
        least=0,
        needs="scout_pairs",
    )
    joint_size: int = setting(
        help="Neurons, at most, of a joint set that grows by the one that most raises the joint "
        f"effect; 0 for none. Each step tries {joint_lib.CANDIDATES} candidates.",
        default=0,
        least=0,
    )
    joint_share: float = setting(
        help="--joint_size: the search stops at this share of TE, by both estimands, and takes "
        "out the neurons that it does not need.",
        default=joint_lib.SHARE,
        least=0,
        most=1,
        needs="joint_size",
    )
    joint_pairs: int = setting(
        help="--joint_size: pairs that the set is searched on, from the first; the others confirm "
        "it. With --scout_pairs the first of the scouts, and all that are no scouts.",
        default=8,
        least=1,
        needs="joint_size",
    )
    chat: bool = setting(help="Wrap text prompts in the tokenizer's chat template.", default=False)
    date: str = setting(
        help="The day, as 2026-01-31, that it is for a chat template that asks; by default the one "
        "on which the run began.",
        default="",
    )
    template_args: str = setting(
        help="JSON object of what else the chat template reads, by name, as "
        '{"enable_thinking": false}, which has many models answer without thinking first.',
        default="",
    )
    harmful_tokens: tuple[str, ...] = setting(
        help="logit_diff: a harmful first token, as a text whose first token counts (as it follows "
        "the prompts), or as id:NUMBER, a token id; may be given several times. By default each "
        "pair's own harmful response.",
        default=(),
        needs="metric=logit_diff",
    )
    safe_tokens: tuple[str, ...] = setting(
        help="logit_diff: a safe first token, likewise.", default=(), needs="metric=logit_diff"
    )
    response_part: str = setting(
        help="response_logprob_diff: the part of the response that is read.",
        default="all",
        choices=("all", "decision", "continuation"),
        needs="metric=response_logprob_diff",
    )
    decision_tokens: int = setting(
        help="response_logprob_diff: tokens of the decision.",
        default=1,
        least=1,
        needs="metric=response_logprob_diff",
    )
    dtype: str = setting(
        help="Type of the parameters in memory; by default the checkpoint's own. Activations are "
        "float32 at least.",
        default="",
        choices=("", *DTYPES),
    )
    ignore_config: tuple[str, ...] = setting(
        help="A key of config.json that is accepted though its meaning is not known here: one that "
        "does not change what the model computes. May be given several times; holds for every "
        "checkpoint that is loaded.",
        default=(),
    )
    matmul_precision: str = setting(
        help="How differences are multiplied by weights: in float32, or in three, two or one "
        "bfloat16 parts (split3, split2, bfloat16), for matrix units that multiply bfloat16 "
        "numbers. float32 and split3 are as exact, and auto takes the faster of them on this "
        "machine; split2 is off by some 4e-6 of the effects' norm, bfloat16 by 3e-3 (one neuron "
        "in six by more than 1% of its effect). Plain runs are as exact as in float32 in any.",
        default=rates.AUTO,
        choices=(rates.AUTO, *products.PRECISIONS),
    )
    memory_gb: float | None = setting(
        help="Memory that the run may take on its device, weights and program included, in GiB; by "
        "default most of what is free. Of several processes on one machine, each one's part.",
        default=None,
        least=1e-3,
    )
    mesh: str = setting(
        help="How this process's devices are laid out, as 8x1: units are spread over all of them, "
        "and each layer's weights are stored in as many parts as the second number says. By "
        "default as few as hold the weights.",
        default="",
    )
    skip_bad_pairs: bool = setting(
        help="Leave out, and count, pairs that cannot be used.", default=False
    )
    overwrite: bool = setting(
        help="Start again in a folder that holds an earlier run.", default=False
    )
    dry_run: bool = setting(
        help="Only tell what the run would compute and store, and how long it would take here; no "
        "weights are read, and nothing is written.",
        default=False,
    )
    accelerator: str = setting(
        help="--dry_run: tell how long it would take on one of these as well, by its datasheet.",
        default="",
        choices=("", *costs_lib.ACCELERATORS),
        needs="dry_run",
    )
    process: int | None = setting(
        help="Which of several processes this is that do one run together, from 0: each is the "
        "same command, on the same or another machine, and --out a folder or bucket that all of "
        "them see. By default what Slurm, Kubernetes or Cloud TPU says, else the only one.",
        default=None,
        least=0,
    )
    processes: int | None = setting(
        help="How many these are; none that is missing is waited for. By default what Slurm or "
        f"Cloud TPU says, or ${processes.COUNT} beside Kubernetes' index.",
        default=None,
        least=1,
    )
    retry_failed: bool = setting(
        help="Compute the units of work again that failed in an earlier run.", default=False
    )
    show_text: bool = setting(help="Show prompts in the report, escaped.", default=False)

    @property
    def granularities(self) -> tuple[str, ...]:
        """Those that are computed: a file of directions is enough to ask for them."""
        added = ("direction",) if self.directions else ()
        return tuple(dict.fromkeys((*self.granularity, *added)))


@dataclasses.dataclass(frozen=True)
class MediateRun:
    """A run, once everything has been read and checked.

    Attributes:
        decoder, pairs, question, settings: what is asked of what.
        budget: bytes of memory.
        process: which of those that do the run together.
        progress: show progress bars, and say what goes on.
    """

    decoder: Decoder
    pairs: list[Pair]
    question: Question
    settings: MediateSettings
    budget: int
    process: Process
    progress: bool

    def say(self, text: str) -> None:
        """Tells people what goes on."""
        sweep.teller(self.progress)(text)


def run(settings: MediateSettings) -> Results:
    """Computes every effect that is asked for, and writes files and report; see `measure`.

    Of several processes the first writes summary and report, once nothing is left to compute; it
    waits for none of the others.
    """
    results, asked = measure(settings)
    if not asked.process.is_first:
        asked.say(
            f"Nothing is left for {asked.process}. Process 0 writes summary and report; should it "
            "be gone, the same command does, as process 0 or alone"
        )
        return results
    summary.write_summary(results)
    mediation.write(results.folder, settings.show_text, asked.pairs)
    results.finish()
    return results


def dry_run(settings: MediateSettings) -> Iterator[str]:
    """Lines on what a run of these settings would take. No weights are read, and nothing is
    written; all else is checked as for a run.

    Raises:
        InputError: as `measure`.
    """
    check(settings)
    settings = loading.settled(settings)
    _check_files(settings)
    loaded = loading.shapes(settings)
    decoder, config = loaded.decoder, loaded.decoder.config
    check_counts(settings, config)
    read = _read(settings, decoder, loaded.tokenizer, sweep.say)
    pairs, question = read.pairs, read.question
    shape_of = sizes(config, pairs, question, settings.granularities).shape
    units = {name: math.prod(shape_of(name)) for name in settings.granularities}
    of_pairs = {
        name: [cost.operations(config, pair, question, [name]) for pair in pairs] for name in units
    }
    if computed := _most_chosen(settings):
        scouts = set(_scouts(settings, pairs))
        share = min(1.0, computed / units["neuron"])
        of_pairs["neuron"] = [
            whole * (1 if index in scouts else share)
            for index, whole in enumerate(of_pairs["neuron"])
        ]
    plan = costs_lib.Plan(
        weights=loading.weights_size(decoder),
        dtype=decoder.dtype.name,
        precision=decoder.products.precision,
        pairs=len(pairs),
        units=units,
        blocks={},
        operations={name: sum(each) for name, each in of_pairs.items()},
        joint=_joint_operations(settings, config, pairs, question),
        screened=bool(settings.screen),
    )
    try:
        budget = memory.free(settings.memory_gb) - plan.weights // Devices.of(decoder.mesh).storing
        together = _layers_together(settings, config, pairs, question)
        scanned = scan.Scan(decoder, pairs, question, chosen=[{}] * len(pairs))
        blocks = scanned.blocks(units, budget, together)
        plan = dataclasses.replace(plan, blocks=Counter(block.granularity for block in blocks))
    except InputError as error:
        yield f"Here it would not fit: {error}"
    about = (question.positions.value, question.metric.name, question.group_size)
    yield from costs_lib.told(plan, costs_lib.Forecast(decoder, about), settings.accelerator)


def measure(settings: MediateSettings, *, progress: bool = True) -> tuple[Results, MediateRun]:
    """Computes every effect that is asked for, and stores them, without summary and report.

    A folder that holds an unfinished run of the same settings is gone on with. Nothing is written
    before the checkpoint and every pair have been checked. Several processes do the phases of a run
    together: gradients of the screen or the scan of the scouts, from which each then makes the same
    selection; and the scan.
    The first one alone does the joint set. None waits for another: it does what is missing.

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
    process = processes.this(settings.process, settings.processes)
    _check_together(settings, process)
    settings = loading.settled(settings)
    chosen_here = settings.matmul_precision == rates.AUTO
    say = sweep.teller(progress)
    _check_files(settings)
    say(f"Loading {settings.model}")
    loaded = loading.load(settings)
    decoder, tokenizer = loaded.decoder, loaded.tokenizer
    settings = dataclasses.replace(
        settings,
        matmul_precision=decoder.products.precision,
        mesh=placement.named(decoder.mesh),
    )
    check_counts(settings, decoder.config)
    budget = memory.free(settings.memory_gb)
    read = _read(settings, decoder, tokenizer, say)
    encoder, pairs, question, skipped = read.encoder, read.pairs, read.question, read.skipped
    together = _layers_together(settings, decoder.config, pairs, question)

    def opened() -> Results:
        return Results.resume_or_create(
            settings.out,
            _description(settings, question, loaded, pairs, skipped.count),
            sizes(decoder.config, pairs, question, settings.granularities),
            [pair.id for pair in pairs],
            settings.granularities,
            layers_together=together,
            overwrite=settings.overwrite,
        )

    try:
        results = opened()
    except InputError:
        # A process that began at the same time may have found another precision the faster.
        other = claims.recorded(settings.out, "matmul_precision")
        if not chosen_here or other in (None, settings.matmul_precision):
            raise
        settings = dataclasses.replace(settings, matmul_precision=other)
        decoder = decoder.at_precision(other)
        results = opened()
    if (earlier := results.run["mesh"]) != settings.mesh:
        say(
            f"{results.folder} was begun on devices laid out as {earlier}, here they are "
            f"{settings.mesh}: the last bits of what is computed here may be others"
        )
    asked = MediateRun(decoder, pairs, question, settings, budget, process, progress)
    retried, selection, phase = False, None, _Phase.of_all(asked, results)
    if settings.screen:
        selection = _screen(asked, results)
        phase = dataclasses.replace(phase, computed=selection.computed)
    elif settings.scout_pairs:
        retried, selection = _scout(asked, results)
        phase = _Phase.after_scouts(asked, results, selection)
    retried |= _scan(asked, results, phase)
    if process.is_first:
        _complete_totals(asked, results)
    measured = {}
    if process.is_first:
        # Of all that the file has, also what this run does not use: no reason not to go on.
        measured["tokenisation"] = encoder.counts
        if selection:
            measured["audit"] = _audit(results, selection, settings.screen or settings.scout_top)
        wanted = settings.joint_size and (retried or "joint" not in results.run)
        if wanted and (joint := _joint(asked, results)):
            measured["joint"] = joint
    # A run that was stopped, or is repeated, adds to what it took before, and so do processes.
    results.record(measured)
    results.add_up({"seconds": time.time() - began})
    return results, asked


def _check_together(settings: MediateSettings, process: Process) -> None:
    """Raises `InputError` where several processes cannot do what is asked."""
    if settings.overwrite and not process.is_alone:
        raise InputError(
            f"--overwrite: this is {process}, and each would delete what the others have begun; "
            "delete the folder first, or choose another --out, or give --processes=1"
        )


def _layers_together(
    settings: MediateSettings, config: DecoderConfig, pairs: list[Pair], question: Question
) -> dict[str, int]:
    """By granularity, how many layers are stored together."""
    return blocks_lib.layers_together(
        *(config, pairs, question, settings.granularities),
        platform=jax.default_backend(),
        computed=_most_computed(settings),
    )


def _most_computed(settings: MediateSettings) -> dict[str, int]:
    """How many units of a granularity are computed of any pair, where it is not all of them."""
    return {"neuron": _most_chosen(settings)} if settings.screen else {}


def _most_chosen(settings: MediateSettings) -> int:
    """How many neurons a screen or scouts choose at most; 0 where all are computed of all pairs."""
    if settings.screen:
        return screening.MARGIN * settings.screen + settings.screen_audit
    if settings.scout_pairs:
        return screening.MARGIN * settings.scout_top + settings.scout_audit
    return 0


def check(settings: MediateSettings) -> None:
    """Raises `InputError` where settings contradict each other; nothing is loaded for it."""
    settings_lib.check(settings)
    loading.template_settings(settings.date, settings.template_args)
    if not settings.granularity:
        raise InputError(f"--granularity=: not one of {', '.join(SITES)}")
    if "direction" in settings.granularity and not settings.directions:
        raise InputError("--granularity=direction needs --directions=FILE.npz")
    if settings.positions == Positions.RESPONSE and settings.metric == "logit_diff":
        raise InputError(
            "--positions=response: logit_diff reads the last prompt token, which no later "
            "position can change; use --metric=response_logprob_diff"
        )
    if settings.screen and settings.scout_pairs:
        raise InputError(
            "--screen and --scout_pairs: each says which neurons are computed; give one of them"
        )
    for name, done in (("screen", "screened"), ("scout_pairs", "scouted")):
        if getattr(settings, name) and "neuron" not in settings.granularity:
            raise InputError(f"--{name} needs --granularity=neuron: nothing else is {done}")
    if settings.joint_size and (settings.group_size > 1 or "neuron" not in settings.granularity):
        raise InputError("--joint_size needs --granularity=neuron and --group_size=1")


def check_counts(settings: MediateSettings, config: DecoderConfig) -> None:
    """Raises `InputError` where more neurons are looked for than the model has."""
    most = config.num_layers * group_count(config, settings.group_size)
    units = "neurons" if settings.group_size == 1 else "groups of neurons"
    asked = ("joint_size", "screen", *(("scout_top",) if settings.scout_pairs else ()))
    for name in asked:
        if getattr(settings, name) > most:
            raise InputError(f"--{name}={getattr(settings, name)}: the model has {most} {units}")


def _check_files(settings: MediateSettings) -> None:
    """Raises `DataError` where files cannot be used whatever the model is."""
    if settings.directions:
        reading.existing_file(settings.directions)
    for _, fields in reading.json_lines(reading.existing_file(settings.pairs)):
        if isinstance(fields, DataError) and not settings.skip_bad_pairs:
            raise fields


def _metric(
    settings: MediateSettings, decoder: Decoder, encoder: Encoder, pairs: list[Pair]
) -> metrics.Metric:
    if settings.metric == "response_logprob_diff":
        return metrics.ResponseLogprobDifference(settings.response_part, settings.decision_tokens)
    size = decoder.config.vocab_size
    prompts = [pair.written for pair in pairs if pair.written]
    first_tokens = functools.partial(encoder.first_tokens, vocab_size=size, after=prompts)
    return metrics.LogitDifference(
        first_tokens(settings.harmful_tokens, where="--harmful_tokens"),
        first_tokens(settings.safe_tokens, where="--safe_tokens"),
    )


def _read_pairs(
    settings: MediateSettings, encoder: Encoder, skipped: Skipped, say: Callable[[str], None]
) -> list[Pair]:
    """The pairs of the splits that are asked for."""
    pairs = pairs_lib.read_encoded(settings.pairs, encoder, on_bad=skipped.on_bad, say=say)
    if settings.split:
        everywhere = len(pairs)
        pairs = [pair for pair in pairs if pair.split in settings.split]
        if not pairs:
            raise DataError(
                f"--split={','.join(settings.split)}: none of the {everywhere} pairs of "
                f"{settings.pairs} is in it"
            )
        say(f"{len(pairs)} of {everywhere} pairs are in split {' or '.join(settings.split)}")
    return pairs


def _usable(
    settings: MediateSettings,
    decoder: Decoder,
    pairs: list[Pair],
    ask: Callable[[list[Pair]], Question],
    skipped: Skipped,
    say: Callable[[str], None],
) -> list[Pair]:
    """The pairs of which each can be asked the question that `ask` makes of it."""
    usable = []
    for pair in pairs:
        try:
            check_pair(decoder.config, pair, ask([pair]), settings.granularities)
            usable.append(pair)
        except DataError as error:
            skipped.add(error)
    if not usable:
        raise DataError(f"{settings.pairs}: not one of its pairs can be used")
    skipped.tell(len(usable))
    same = sum(pair.prompt_ids == pair.counterfactual_ids for pair in usable)
    if same:
        say(f"{same} of {len(usable)} pairs have identical prompts: all their effects are 0")
    return usable


def _drawn(pairs: list[Pair], most: int, say: Callable[[str], None]) -> list[Pair]:
    """At most so many of the pairs, in their order: those whose ids have the smallest hashes."""
    by_hash = sorted(pairs, key=lambda pair: responses.seed_of(pair.id, 0, DRAW_SEED))
    chosen = {pair.id for pair in by_hash[:most]}
    if len(chosen) < len(pairs):
        say(f"{len(chosen)} of {len(pairs)} pairs are drawn (--most_pairs)")
    return [pair for pair in pairs if pair.id in chosen]


def _scouts(settings: MediateSettings, pairs: list[Pair]) -> list[int]:
    """Indices of the pairs of which all neurons are computed, to choose those of the others; none
    where nothing is scouted.

    Raises:
        DataError: no others are left.
    """
    scouts = clusters.drawn(pairs, settings.scout_pairs, SCOUT_SEED)
    if len(scouts) == len(pairs):
        raise DataError(
            f"--scout_pairs={settings.scout_pairs}: that takes all of the {len(pairs)} pairs "
            "(those that share a prompt count as one), and others are needed to compute what the "
            "scouts have chosen; give a smaller number"
        )
    return scouts


@dataclasses.dataclass(frozen=True)
class _Read:
    """What is asked of which pairs; `encoder` has made their tokens, `skipped` counts others."""

    encoder: Encoder
    pairs: list[Pair]
    question: Question
    skipped: Skipped


def _read(
    settings: MediateSettings, decoder: Decoder, tokenizer, say: Callable[[str], None]
) -> _Read:
    """Reads and checks the pairs; of the model only the config is looked at."""
    encoder = loading.encoder(
        tokenizer,
        chat=settings.chat,
        date=settings.date,
        template_args=settings.template_args,
    )
    skipped = Skipped("pairs", settings.skip_bad_pairs, say)
    pairs = _read_pairs(settings, encoder, skipped, say)
    directions = (
        directions_lib.read(settings.directions, decoder.config) if settings.directions else None
    )

    def ask(of: list[Pair]) -> Question:
        return Question(
            _metric(settings, decoder, encoder, of),
            Positions(settings.positions),
            Align(settings.align),
            settings.group_size,
            directions,
        )

    pairs = _usable(settings, decoder, pairs, ask, skipped, say)
    if settings.most_pairs:
        pairs = _drawn(pairs, settings.most_pairs, say)
    _scouts(settings, pairs)  # that there are enough
    question = ask(pairs)
    for line in encoder.told:
        say(line)
    if pairs[0].prompt_text is not None and not pairs[0].is_chat and encoder.has_template:
        say(loading.AS_IT_STANDS)
    return _Read(encoder, pairs, question, skipped)


def _description(
    settings: MediateSettings,
    question: Question,
    loaded: loading.Loaded,
    pairs: list[Pair],
    skipped: int,
) -> dict:
    """What `run.json` says of the run."""
    return (dataclasses.asdict(settings) | circumstances.circumstances()) | {
        "metric_unit": question.metric.metric_unit,
        "meaning": question.metric.meaning,
        # The name under which the results' arrays record it.
        "precision": settings.matmul_precision,
        "weights_hash": checkpoint.weights_hash(loaded.folder),
        "config_hash": checkpoint.config_hash(loaded.decoder.config),
        "adapter_hash": checkpoint.adapter_hash(loaded.adapter),
        "pairs_hash": _pairs_hash(pairs),
        "pair_bases": [pair.base for pair in pairs],
        "scouts": [pairs[index].id for index in _scouts(settings, pairs)],
        "prompt_hashes": _prompt_hashes(pairs),
        "directions_hash": question.directions and question.directions.hash,
        "skipped": skipped,
        "truth": _truth(loaded, pairs),
        "seeds": {
            "bootstrap": statistics.SEED,
            "screen": SCREEN_SEED,
            "draw": DRAW_SEED,
            "scout": SCOUT_SEED,
        },
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


def _screen(asked: MediateRun, results: Results) -> screening.Selection:
    """Which neurons are computed exactly, by the strength that gradients estimate.

    The estimates are kept, so that a run that goes on elsewhere selects the same neurons.
    """
    settings = asked.settings

    def compute(index: int, advance: Callable[[float], None]) -> tuple[np.ndarray, np.ndarray]:
        return screening.scores(
            asked.decoder, asked.pairs[index], asked.question, steps=settings.screen_steps
        )

    def lacking(indices: Sequence[int]) -> list[int]:
        missing = set(results.missing_estimates())
        return [index for index in indices if index in missing]

    def fail(index: int) -> None:
        results.write_estimates(index, *np.full((2, *results.sizes.shape("neuron")), np.nan))

    # Later estimates would select other neurons than those that have been computed.
    is_settled = "blocks" in results.run
    failed = [name for name in sweep.failed(results.place) if name.startswith(_SCREENED)]
    if settings.retry_failed and is_settled and failed:
        asked.say(
            "Which neurons are computed is settled, without the pairs whose gradients failed; only "
            "--overwrite takes these up again"
        )
    sweep.run(
        range(len(asked.pairs)),
        compute,
        lambda index, estimates: results.write_estimates(index, *estimates),
        name="gradient screen",
        shared=Shared(
            results,
            asked.process,
            name=lambda index: f"{_SCREENED}{index:05d}",
            lacking=lacking,
            fail=fail,
            about=lambda index: f"pair '{results.pair_ids[index]}'",
            retry_failed=settings.retry_failed and not is_settled,
        ),
        progress=asked.progress,
    )
    estimated = ranking.estimated_strength(results)
    return screening.select(estimated, settings.screen, settings.screen_audit, SCREEN_SEED)


def _audit(results: Results, selection: screening.Selection, top: int) -> dict:
    """What the exact effects say of the neurons that were not computed, for `run.json`."""
    exact = ranking.exact_strength(results, "neuron")
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
            exact[selection.sampled], ranking.estimated_strength(results)[selection.sampled]
        ),
    }


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation over the units that have both; NaN where there is none."""
    both = np.isfinite(left) & np.isfinite(right)
    left, right = stats.rankdata(left[both]), stats.rankdata(right[both])
    if not (left.size and np.ptp(left) and np.ptp(right)):
        return math.nan
    return float(np.corrcoef(left, right)[0, 1])


@dataclasses.dataclass(frozen=True)
class _Phase:
    """What is computed before anything is made of it.

    Attributes:
        key: of `run.json`, under which its blocks are.
        pairs: by granularity, indices of the pairs whose units are computed.
        totals: the pairs whose Y it measures.
        computed: the neurons that are computed; all for None.
        others: what is known of those that are not.
        told: of what it is, for people.
    """

    key: str
    pairs: Mapping[str, Sequence[int]]
    totals: Sequence[int]
    computed: np.ndarray | None = None
    others: Status = Status.ESTIMATED
    told: str = ""

    @classmethod
    def of_all(cls, asked: MediateRun, results: Results) -> "_Phase":
        """Everything, of all pairs."""
        every = range(len(asked.pairs))
        return cls("blocks", dict.fromkeys(results.granularities, every), every)

    @classmethod
    def of_scouts(cls, results: Results) -> "_Phase":
        """All neurons of the scouts."""
        scouts = results.scouts
        return cls("scout_blocks", {"neuron": scouts}, scouts, told=" of the scouts")

    @classmethod
    def after_scouts(
        cls, asked: MediateRun, results: Results, selection: screening.Selection
    ) -> "_Phase":
        """The chosen neurons of all other pairs, and everything else of all pairs."""
        phase, others = cls.of_all(asked, results), _others(results)
        return dataclasses.replace(
            phase,
            pairs={**phase.pairs, "neuron": others},
            totals=others,
            computed=selection.computed,
            others=Status.LEFT_OUT,
        )

    @property
    def chosen(self) -> dict[str, np.ndarray]:
        """By granularity, the units that are computed; all of one that it does not name."""
        return {} if self.computed is None else {"neuron": self.computed}


def _others(results: Results) -> list[int]:
    """Indices of the pairs that are no scouts."""
    return [index for index in range(len(results.pair_ids)) if index not in results.scouts]


def _scout(asked: MediateRun, results: Results) -> tuple[bool, screening.Selection]:
    """Computes all neurons of the scouts, and chooses those that are computed of the others.

    Returns:
        Whether some of it had failed before; and the choice.
    """
    settings, scouts = asked.settings, results.scouts
    units = math.prod(results.sizes.shape("neuron"))
    share = min(1.0, _most_chosen(settings) / units)
    operations = [
        cost.operations(asked.decoder.config, pair, asked.question, ["neuron"])
        for pair in asked.pairs
    ]
    whole, total = sum(operations[index] for index in scouts), sum(operations)
    asked.say(
        f"{len(scouts)} of {len(asked.pairs)} pairs are scouts, of which all {units:,} neurons are "
        f"computed; of the others then {round(share * units):,}: about "
        f"{whole + share * (total - whole):.2e} floating-point operations in all, "
        f"{share + (1 - share) * whole / total:.0%} of those of all neurons of all pairs"
    )
    # Later effects would choose other neurons than those that have been computed.
    is_settled, failed = "blocks" in results.run, sweep.failed(results.place)
    of_scouts = {Block.of(each).name for each in results.run.get("scout_blocks", ())}
    if settings.retry_failed and is_settled and of_scouts & set(failed):
        asked.say(
            "Which neurons are computed is settled, without the scouts' units that failed; only "
            "--overwrite takes these up again"
        )
    retried = _scan(
        asked,
        results,
        _Phase.of_scouts(results),
        retry_failed=settings.retry_failed and not is_settled,
    )
    strength = ranking.estimated_strength(results)
    return retried, screening.select(
        strength, settings.scout_top, settings.scout_audit, SCREEN_SEED
    )


def _scan(
    asked: MediateRun, results: Results, phase: _Phase, *, retry_failed: bool | None = None
) -> bool:
    """Computes what is missing of a phase, block by block.

    Args:
        asked, results: the run.
        phase: what is computed.
        retry_failed: as of `Shared`; by default as the settings say.

    Returns:
        Whether some of it had failed before.
    """
    pairs, question, say, chosen = asked.pairs, asked.question, asked.say, phase.chosen
    of_pairs = scan.Scan(asked.decoder, pairs, question, chosen=[chosen] * len(pairs))
    blocks = _blocks(asked, results, phase)
    # Bits of a pair's totals depend on the pairs that it is run with: one block writes them.
    of_totals = {index: block.name for block in reversed(blocks) for index in block.pairs}
    of_totals = {index: of_totals[index] for index in phase.totals}

    def fail(block: Block) -> None:
        for index in block.pairs:
            nothing = np.full(results.sizes.shape(block.granularity), np.nan)
            _write(asked, results, phase, block, index, (nothing, nothing), Status.FAILED)

    shared = Shared(
        results,
        asked.process,
        name=lambda block: block.name,
        lacking=functools.partial(_lacking, results),
        fail=fail,
        smaller=Block.halved,
        about=functools.partial(_about, results),
        retry_failed=asked.settings.retry_failed if retry_failed is None else retry_failed,
    )
    todo = shared.left(blocks)
    if not todo:
        say(f"Nothing is left to compute{phase.told} in {results.place}")
        return False
    left, every = ({index for block in some for index in block.pairs} for some in (todo, blocks))
    if len(left) < len(every):
        say(f"Going on with {results.place}: {len(every) - len(left)} pairs are done")

    @functools.cache
    def of_layers(index: int, granularity: str) -> np.ndarray:
        return cost.layer_operations(
            asked.decoder.config, pairs[index], question, granularity, chosen
        )

    costs = {
        block: sum(
            float(np.sum(of_layers(index, block.granularity)[slice(*block.layers)]))
            for index in block.pairs
        )
        for block in todo
    }
    own = [block for block in shared.own(blocks) if block in costs]
    forecast, compiled = None, compilation.so_far()
    if asked.progress:
        about = (question.positions.value, question.metric.name, question.group_size)
        # Of short lists of neurons the rate is another one.
        about += ("chosen",) if chosen else ()
        forecast = costs_lib.Forecast(asked.decoder, about)
        shares = {block: costs[block] for block in own}
        _announce(
            asked,
            results,
            todo=len(left),
            operations=_by_granularity(costs),
            own=_by_granularity(shares),
            chosen=chosen,
            forecast=forecast,
        )
    began, to_come = time.time(), {block: costs[block] for block in own}

    def commit(block: Block, found: list[effects.PairEffects]) -> None:
        name = block.granularity
        for index, of_pair in zip(block.pairs, found, strict=True):
            if of_totals.get(index) == block.name:
                results.write_totals(index, of_pair.y_base, of_pair.y_source)
            sides = of_pair.nie[name], of_pair.tie[name]
            _write(asked, results, phase, block, index, sides, Status.EXACT)
        if to_come.pop(block, None) is None:
            return
        done = [other for other in own if other not in to_come]
        of_each = [other.granularity for other in done]
        # Once, when the last of the granularities has been begun with.
        if of_each.count(name) == 1 and set(of_each) == {other.granularity for other in own}:
            seconds, operations = time.time() - began, sum(costs[other] for other in done)
            told = costs_lib.left(seconds, operations, _by_granularity(to_come))
            if told and asked.progress:
                say(told)

    def done(block: Block, seconds: float) -> None:
        if forecast:
            forecast.add(block.granularity, costs[block], seconds)

    sweep.run(
        blocks,
        of_pairs.effects,
        commit,
        name="block",
        unit="block",
        costs=costs,
        on_done=done,
        shared=shared,
        progress=asked.progress,
    )
    if forecast:
        say(forecast.keep(compilation.so_far().since(compiled)))
    return shared.retries


def _complete_totals(asked: MediateRun, results: Results) -> None:
    """Measures Y of pairs whose block failed that would have written it."""
    shared: Shared[int] = Shared(
        results,
        Process(),
        name="total-{:05d}".format,
        lacking=lambda indices: indices,
        fail=lambda index: None,
    )
    is_unknown = np.isnan(results.te)
    for index in np.flatnonzero(~is_unknown).tolist():
        shared.done(index)  # what failed here its block may have measured since
    unknown = np.flatnonzero(is_unknown).tolist()
    if not unknown:
        return
    nothing_chosen = [{}] * len(asked.pairs)
    of_pairs = scan.Scan(asked.decoder, asked.pairs, asked.question, chosen=nothing_chosen)
    sweep.run(
        unknown,
        lambda index, advance: of_pairs.totals(index),
        lambda index, found: results.write_totals(index, *found),
        name="total effect",
        shared=shared,
        progress=asked.progress,
    )


def _blocks(asked: MediateRun, results: Results, phase: _Phase) -> list[Block]:
    """The units of work, whose batches are sized once: whoever goes on with the run keeps them."""
    recorded = results.run.get(phase.key)
    if recorded is None:
        of_each: dict[tuple[int, ...], list[str]] = {}
        for name, pairs in phase.pairs.items():
            of_each.setdefault(tuple(pairs), []).append(name)
        together, blocks = _together(asked, results, phase), []
        for pairs, names in of_each.items():
            chosen = {name: mask for name, mask in phase.chosen.items() if name in names}
            every = [chosen] * len(asked.pairs)
            of_pairs = scan.Scan(asked.decoder, asked.pairs, asked.question, chosen=every)
            blocks += of_pairs.blocks(names, asked.budget, together, pairs)
        recorded = results.settle(phase.key, [dataclasses.asdict(block) for block in blocks])
    _check_chosen(results, phase)
    return [Block.of(block) for block in recorded]


def _check_chosen(results: Results, phase: _Phase) -> None:
    """Raises `InputError` where other units are chosen now than those that the run began with: what
    they are chosen by was computed again meanwhile."""
    if not phase.chosen:
        return
    masks = b"".join(name.encode() + phase.chosen[name].tobytes() for name in sorted(phase.chosen))
    chosen = hashlib.sha256(masks).hexdigest()
    if results.settle(f"{phase.key}_chosen", chosen) != chosen:
        raise InputError(
            f"{results.folder}: its neurons were chosen by other estimates than are there now; the "
            "pairs would not have the same ones: choose another --out, or --overwrite"
        )


def _together(asked: MediateRun, results: Results, phase: _Phase) -> dict[str, int]:
    """By granularity, how many layers a block has: those that are stored together or, where few of
    the units are computed, several times as many."""
    stored = {name: results.layers_together(name) for name in phase.pairs}
    if phase.others != Status.LEFT_OUT:
        return stored  # a screen's are stored as few of the units are computed
    enough = blocks_lib.layers_together(
        *(asked.decoder.config, asked.pairs, asked.question, ["neuron"]),
        platform=jax.default_backend(),
        computed={"neuron": _most_chosen(asked.settings)},
    )
    return stored | {"neuron": max(stored["neuron"], enough["neuron"])}


def _lacking(results: Results, blocks: Sequence[Block]) -> list[Block]:
    """Those of which the store lacks anything. One of which a pair is missing is computed whole:
    bits are those of its batches."""
    if len(blocks) == 1:
        (block,) = blocks
        parts = _parts(results, block)
        there = results.committed(block.granularity, block.pairs)[:, parts.start : parts.stop]
        return [] if there.all() else [block]
    committed = {name: results.committed(name) for name in {each.granularity for each in blocks}}
    return [
        block
        for block in blocks
        if not committed[block.granularity][np.ix_(block.pairs, _parts(results, block))].all()
    ]


def _parts(results: Results, block: Block) -> range:
    """The parts of the layers, as they are stored, that a block has."""
    together, (first, stop) = results.layers_together(block.granularity), block.layers
    return range(first // together, -(-stop // together))


def _about(results: Results, block: Block) -> str:
    """A block, as people are told of it."""
    first, *others = (results.pair_ids[index] for index in block.pairs)
    told = f"{block.granularity} of pair '{first}'"
    if others:
        told += f" and {len(others)} more"
    if block.layers != (0, results.sizes.layers):
        told += f", layers {block.layers[0]} to {block.layers[1] - 1}"
    return told


def _by_granularity(costs: Mapping[Block, float]) -> dict[str, float]:
    """Operations of blocks, added up."""
    totals: dict[str, float] = {}
    for block, operations in costs.items():
        totals[block.granularity] = totals.get(block.granularity, 0.0) + operations
    return totals


def _write(
    asked: MediateRun,
    results: Results,
    phase: _Phase,
    block: Block,
    index: int,
    sides: tuple[np.ndarray, np.ndarray],
    computed: Status,
) -> None:
    """Writes one pair's effects; a screen's estimates stand in for neurons that were not computed.

    Args:
        asked, results, phase: the run.
        block: whose effects they are.
        index: of the pair.
        sides: NIE and TIE of all the pair's units; those of other layers are not read.
        computed: what is known of the units that were computed.
    """
    granularity, question = block.granularity, asked.question
    shape = results.sizes.shape(granularity)
    nie, tie = (effects.fitted(side, shape) for side in sides)
    status = np.full(shape, computed)
    if granularity == "direction" and question.directions:
        status[~question.directions.given] = Status.NOT_RUN
    elif granularity == "token":
        columns = token_columns(asked.pairs[index], question)
        status[..., np.setdiff1d(np.arange(shape[-1]), columns)] = Status.NOT_RUN
    elif granularity == "neuron" and phase.computed is not None:
        status[~phase.computed] = phase.others
        if phase.others == Status.ESTIMATED:
            estimates = results.estimates(index)
            nie = np.where(phase.computed, nie, estimates[0])
            tie = np.where(phase.computed, tie, estimates[1])
    together = results.layers_together(granularity)
    for part in _parts(results, block):
        here = slice(part * together, (part + 1) * together)
        results.write(index, granularity, nie[here], tie[here], status[here], part=part)


def _announce(
    asked: MediateRun,
    results: Results,
    todo: int,
    operations: dict[str, float],
    own: dict[str, float],
    chosen: dict[str, np.ndarray],
    forecast: costs_lib.Forecast,
) -> None:
    """Says what the run will cost, and how to leave out what costs most.

    Args:
        asked, results: the run.
        todo: pairs to be scanned.
        operations: floating-point operations of their scan, by granularity.
        own: those of what this process begins with.
        chosen: by granularity, the units that are computed; all of the others.
        forecast: what they are expected to take.
    """
    settings = asked.settings
    joint = _joint_operations(settings, asked.decoder.config, asked.pairs, asked.question)
    units = {
        name: int(chosen[name].sum()) if name in chosen else math.prod(results.sizes.shape(name))
        for name in operations
    }
    total = sum(operations.values())
    asked.say(
        f"{todo} pairs, at most {sum(units.values()):,} units each, by both estimands: "
        f"{total:.2e} floating-point operations"
        + (f", and at most {joint:.2e} for the joint set" if joint else "")
        + (f". {forecast.told(own)}" if asked.process.is_alone else "")
    )
    if not asked.process.is_alone:
        told = f": {forecast.told(own)}" if own else ""
        share = costs_lib.share(own, operations)
        asked.say(f"This is {asked.process}; {share:.0%} of it is its own{told}")
    if len(operations) > 1 and total:
        asked.say(costs_lib.shares(operations, units))
        if without := _without(settings, costs_lib.dearest(operations)):
            asked.say(without)


def _joint_operations(
    settings: MediateSettings, config: DecoderConfig, pairs: list[Pair], question: Question
) -> float:
    """Floating-point operations of the search for a joint set, at most."""
    searched = (_scouts(settings, pairs) or range(len(pairs)))[: settings.joint_pairs]
    return settings.joint_size * sum(
        joint_lib.operations(config, pairs[index], question) * joint_lib.CANDIDATES
        for index in searched
    )


def _without(settings: MediateSettings, dearest: str) -> str:
    """A sentence on how to leave a granularity out; "" where another setting needs it."""
    others = ",".join(name for name in settings.granularity if name != dearest)
    if not others or (dearest == "neuron" and (_most_chosen(settings) or settings.joint_size)):
        return ""
    said = f"To leave {dearest} out, stop this, and give another --out and --granularity={others}"
    if dearest == "direction":
        return f"{said} without --directions"
    if dearest == "neuron":
        return f"{said}; or compute only the strongest, --screen=100"
    return said


def _joint(asked: MediateRun, results: Results) -> dict | None:
    """The greedy joint set, as `run.json` and the report have it; None where TE is too small.

    Its fields are those of `joint.JointSet`; "share" that it was searched for; "confirmed": its
    shares on the pairs that it was not searched on, and how many pairs they are, None if there are
    none or their TE is too small; "seconds" that search and confirmation took. The search sees
    nothing of those other pairs, but that a screen has chosen its neurons by all of them. Scouts
    are searched, among all of their neurons, and the pairs that are none confirm: these must have
    had no part in what is tested on them.
    """
    settings, say = asked.settings, asked.say
    every = range(len(asked.pairs))
    searched = (results.scouts or every)[: settings.joint_pairs]
    others = _others(results) if results.scouts else every[settings.joint_pairs :]
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

        def step() -> None:
            bar.update()

        found = joint_lib.greedy_set(
            asked.decoder,
            [asked.pairs[index] for index in searched],
            asked.question,
            ranking.exact_strength(results, "neuron", np.array(results.scouts or searched)),
            size=settings.joint_size,
            share=settings.joint_share,
            memory=asked.budget,
            on_step=step,
        )
    confirmed = None
    if _has_total_effect(results, others):
        members = np.zeros((1, *results.sizes.shape("neuron")), bool)
        members[0][tuple(np.transpose(found.picked))] = True
        confirming = [asked.pairs[index] for index in others]
        nie, tie = joint_lib.joint_shares(
            asked.decoder, confirming, asked.question, members, asked.budget
        )
        confirmed = {
            "share_nie": float(nie[0]),
            "share_tie": float(tie[0]),
            "pairs": len(others),
        }
    return dataclasses.asdict(found) | {
        "share": settings.joint_share,
        "seconds": time.time() - began,
        "confirmed": confirmed,
    }


def _has_total_effect(results: Results, pairs: Sequence[int]) -> bool:
    """Whether shares of the mean total effect of these pairs can be formed; not without pairs."""
    te = results.te[list(pairs)]
    return len(te) > 0 and abs(float(np.mean(te))) >= ranking.MINIMUM_TOTAL_EFFECT


def _truth(loaded: loading.Loaded, pairs: list[Pair]) -> dict | None:
    """What was planted for the contrast that an organism's pairs are of.

    None for any other checkpoint, an organism that an adapter has changed among them, and where the
    pairs' category is no contrast of the organism.
    """
    folder = loaded.folder
    if loaded.adapter is not None or not (folder / organisms.TRUTH).is_file():
        return None
    categories = {pair.category for pair in pairs}
    contrasts = organisms.truth(folder)["contrasts"]
    return contrasts.get(categories.pop()) if len(categories) == 1 else None
