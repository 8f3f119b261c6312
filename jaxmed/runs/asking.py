"""What every program shares that has a model answer prompts: settings, prompts, judges."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import tqdm

from jaxmed.behaviour import generation, responses
from jaxmed.behaviour.answers import Model
from jaxmed.behaviour.generation import Sampling
from jaxmed.behaviour.judges import named as named_lib
from jaxmed.behaviour.judges import protocol, rules
from jaxmed.behaviour.judges import templates as templates_lib
from jaxmed.behaviour.judges.protocol import Judge, Verdict
from jaxmed.behaviour.responses import PLAIN, Asked, Condition, Log, Response
from jaxmed.data import prompts as prompts_lib
from jaxmed.data import sets
from jaxmed.data import tokens as tokens_lib
from jaxmed.data.prompts import Prompt
from jaxmed.data.splits import SPLITS
from jaxmed.engine import memory
from jaxmed.files.reading import DataError
from jaxmed.runs import loading, sweep
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.settings import like, setting
from jaxmed.store import circumstances
from models.errors import InputError

LEAVE_OUT = "(or leave such prompts out: --skip_bad_prompts)"

# Judges that are no model of their own.
WITHOUT_MODEL = (rules.RefusalPhrases.name, rules.FirstTokens.name)

# What responses do not depend on: a run that goes on may be judged otherwise.
MAY_CHANGE = (
    *("judge", "judge_template", "comply_tokens", "refuse_tokens", "cut"),
    *("judges", "judges_hash"),
)


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """Which model answers which prompts, how, and who judges."""

    model: str = like(MediateSettings, "model")
    prompts: tuple[str, ...] = setting(
        help="File of prompts: CSV, JSON, JSONL or parquet, a published set or jaxmed's own form "
        "(id, prompt or prompt_ids, label). LABEL=FILE gives the label of a file that does not say "
        f"it: {', '.join(sets.LABELS)}. NAME:LABEL=FILE (or NAME:=FILE) has its ids begin with a "
        "name, where two files number their prompts alike. May be given several times."
    )
    out: str = like(MediateSettings, "out")
    chat: bool = like(MediateSettings, "chat")
    samples: int = setting(
        help="Responses of each prompt; more than one need a --temperature.", default=1, least=1
    )
    temperature: float = setting(
        help="What logits are divided by before a token is drawn; 0 takes the likeliest.",
        default=0.0,
        least=0,
    )
    top_p: float = setting(
        help="Draws from the fewest likeliest tokens that have this probability together; 1 for "
        "all.",
        default=1.0,
        above=0,
        most=1,
    )
    top_k: int = setting(
        help="Draws from so many of the likeliest tokens; 0 for all.",
        default=0,
        least=0,
        most=2**31 - 1,
    )
    max_tokens: int = setting(
        help="Tokens of a response at most, the one that ends it included.", default=128, least=1
    )
    seed: int = setting(
        help="Of all samples: a response depends on it, its prompt's id and its number.",
        default=0,
        least=0,
        most=2**32 - 1,
    )
    judge: tuple[str, ...] = setting(
        help=f"NAME or NAME=CHECKPOINT: one of {', '.join(named_lib.NAMES)}, or a JSON file with a "
        "judge of your own (docs/judges.md); and a folder or hub id, for a copy of the judge's "
        "model. May be given several times: each says what those before it do not say.",
        default=("phrases",),
    )
    judge_template: tuple[str, ...] = setting(
        help="NAME=FILE: file with a judge's text as its authors publish it, for those whose text "
        "is published (docs/judges.md says where). May be given several times.",
        default=(),
    )
    comply_tokens: tuple[str, ...] = setting(
        help="--judge=tokens: first token of a response that complies, as a token id or as a text "
        "whose first token counts; may be given several times.",
        default=(),
    )
    refuse_tokens: tuple[str, ...] = setting(
        help="--judge=tokens: first token of a response that refuses, likewise.", default=()
    )
    cut: bool = setting(
        help="Let a judge read the beginning of a response that is too long for it; by default it "
        "is an error.",
        default=False,
    )
    dtype: str = like(MediateSettings, "dtype")
    memory_gb: float | None = like(MediateSettings, "memory_gb")
    skip_bad_prompts: bool = setting(
        help="Leave out, and count, prompts that cannot be used.", default=False
    )
    overwrite: bool = like(MediateSettings, "overwrite")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.top_k)


def check(settings: AnswerSettings) -> None:
    """Raises `InputError` where a setting is out of range or contradicts another."""
    settings_lib.check(settings)
    if not settings.prompts:
        raise InputError("--prompts=FILE: name at least one file of prompts")
    if not settings.judge:
        raise InputError(f"--judge: name at least one of {', '.join(named_lib.NAMES)}")
    if settings.samples > 1 and not settings.temperature:
        raise InputError(
            f"--samples={settings.samples} --temperature=0: the likeliest tokens are the same each "
            "time; give a --temperature above 0"
        )
    for name in ("comply_tokens", "refuse_tokens"):
        if bool(getattr(settings, name)) != ("tokens" in settings.judge):
            raise InputError(f"--{name} and --judge=tokens need each other")
    named = [judge_and_checkpoint(given)[0] for given in settings.judge]
    if settings.cut and set(named) <= set(WITHOUT_MODEL):
        raise InputError(f"--cut: --judge={','.join(named)} reads responses of any length")


def load(settings: AnswerSettings) -> Model:
    """Loads the model.

    Raises:
        InputError: as `models.load`.
    """
    folder, decoder, tokenizer = loading.load(settings.model, settings.dtype)
    stop = generation.stop_tokens(folder, tokenizer)
    return Model(folder, decoder, tokenizer, stop, settings.memory_gb)


def read_prompts(
    settings: AnswerSettings, model: Model, say: Callable[[str], None] = sweep.say
) -> list[Asked]:
    """The prompts of all files, as the model gets them.

    Args:
        settings: which files, and what is done with bad prompts.
        model: gets the prompts.
        say: told of what is skipped, and if a chat template is not used.

    Returns:
        The prompts, each once: of those that are the same but for their ids the first, with the
        counterfactuals of all.

    Raises:
        InputError: a file or prompt cannot be used (or is left out, where that is asked), ids are
            used twice, or prompts that are the same have different labels.
    """
    bad, again = [], []

    def skip(error: DataError) -> None:
        bad.append(error)
        say(f"Skipped: {error}")

    on_bad = skip if settings.skip_bad_prompts else None
    reads_text = any(
        judge_and_checkpoint(given)[0] not in WITHOUT_MODEL for given in settings.judge
    )
    found, files, seen = [], {}, {}
    for given in settings.prompts:
        source, label, path = _described_file(given)
        for prompt in prompts_lib.read(path, label=label, source=source, on_bad=on_bad):
            try:
                if prompt.id in files:
                    raise DataError(
                        f"{prompt.where}: id '{prompt.id}' was used before, by "
                        f"{files[prompt.id]}; give one of them another id, or one of the files a "
                        "name that goes before its own: --prompts=NAME:LABEL=FILE"
                    )
                tokens = prompts_lib.tokens_of(prompt, model.tokenizer, chat=settings.chat)
                check_tokens(f"{prompt.where}: prompt '{prompt.id}'", tokens, settings, model)
                if reads_text or prompt.prompt is not None:
                    prompts_lib.text(prompt)
                one = Asked(prompt, tokens)
                earlier = next((seen[name] for name in one.fingerprints if name in seen), None)
                if earlier is not None and found[earlier].prompt.label != prompt.label:
                    raise DataError(
                        f"{prompt.where}: prompt '{prompt.id}' is {prompt.label}, and the same "
                        f"prompt is {found[earlier].prompt.label} at {found[earlier].prompt.where}"
                    )
            except DataError as error:
                if on_bad is None:
                    raise DataError(f"{error} {LEAVE_OUT}") from None
                on_bad(error)
                continue
            files[prompt.id] = prompt.where
            if earlier is not None:
                again.append(one)
                found[earlier] = _with_counterfactuals_of(found[earlier], prompt)
                continue
            seen |= dict.fromkeys(one.fingerprints, len(found))
            found.append(one)
    if again:
        say(
            f"{len(again)} prompts are the same as others before them and are left out, the first "
            f"at {again[0].prompt.where}: each counts once, and is in one split"
        )
    if bad:
        say(f"Skipped {len(bad)} of {len(bad) + len(found)} prompts")
    if not found:
        raise DataError(f"{', '.join(settings.prompts)}: not one prompt can be used")
    is_text = any(isinstance(one.prompt.prompt, str) for one in found)
    if is_text and not settings.chat and model.tokenizer.chat_template:
        say(loading.AS_IT_STANDS)
    return found


def _with_counterfactuals_of(one: Asked, again: Prompt) -> Asked:
    """The prompt, with those that it has where it stands again."""
    more = {
        name: (*own, *(given for given in getattr(again, name) if given not in own))
        for name in ("counterfactuals", "counterfactual_ids")
        for own in [getattr(one.prompt, name)]
    }
    return dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, **more))


def _described_file(given: str) -> tuple[str | None, str | None, str]:
    """The source, label and path that FILE, LABEL=FILE, NAME:LABEL=FILE or NAME:=FILE says; a
    file's name may have a = and a : of its own."""
    told, equals, path = given.partition("=")
    source, colon, label = told.rpartition(":")
    if equals and (label in sets.LABELS or colon and not label):
        return source or None, label or None, path
    return None, None, given


def check_tokens(what: str, tokens: Sequence[int], settings: AnswerSettings, model: Model) -> None:
    """Raises `DataError`, about `what`, where the model cannot answer a prompt of these tokens."""
    config = model.decoder.config
    if not tokens:
        raise DataError(f"{what} has no tokens: a response needs one to follow")
    if bad := [token for token in tokens if token >= config.vocab_size]:
        raise DataError(
            f"{what} has the token {bad[0]}, outside the vocabulary of {config.vocab_size}"
        )
    if len(tokens) + settings.max_tokens > config.max_positions:
        raise DataError(
            f"{what} has {len(tokens)} tokens, which with --max_tokens={settings.max_tokens} are "
            f"more than the model's {config.max_positions} positions"
        )


def judge_and_checkpoint(given: str) -> tuple[str, str]:
    """What NAME=CHECKPOINT says; "" for the judge's own checkpoint. Files of templates, and
    checkpoints, may have a = in their names.

    Raises:
        InputError: the checkpoint is empty, or of a judge that runs no model.
    """
    if given.endswith(".json"):
        return given, ""
    name, equals, folder = given.partition(".json=" if ".json=" in given else "=")
    name += equals.removesuffix("=")
    if equals and not folder:
        raise InputError(f"--judge={given}: names no checkpoint after the =")
    if equals and name in WITHOUT_MODEL:
        raise InputError(f"--judge={given}: {name} runs no model: leave ={folder} out")
    return name, folder


def template_files(given: Sequence[str], judges_given: Sequence[str]) -> dict[str, str]:
    """The file of each judge's text, as NAME=FILE says.

    Raises:
        InputError: one names no file, or a judge that is not given.
    """
    known = {judge_and_checkpoint(judge)[0] for judge in judges_given}
    found = {}
    for each in given:
        name, _, file = each.partition("=")
        if not file:
            raise InputError(f"--judge_template={each}: must be NAME=FILE")
        if name not in known:
            raise InputError(f"--judge_template={each}: --judge names no {name}")
        found[name] = file
    return found


def read_judge(
    given: str, *, cut: bool, templates: Mapping[str, str], **first_tokens: Sequence[int]
) -> Judge:
    """The judge NAME or NAME=CHECKPOINT.

    Args:
        given: the name, as `judges.named` knows it, and the checkpoint.
        cut: as in `AnswerSettings`.
        templates: the files of judges' texts, by name.
        first_tokens: `comply` and `refuse`, for the judge "tokens".

    Raises:
        InputError: it is unknown, or its checkpoint cannot be used.
    """
    name, folder = judge_and_checkpoint(given)
    if name == rules.FirstTokens.name:
        options = first_tokens
    elif name in templates_lib.JUDGES or name.endswith(".json"):
        options = {"model": folder, "cut": cut}
    else:
        options = {}
    return named_lib.named(name, template=templates.get(name), **options)


def read_judges(settings: AnswerSettings, model: Model) -> list[Judge]:
    """The judges that are asked for by name.

    Raises:
        InputError: one is unknown, its checkpoint cannot be used, the model gives no text that it
            could read, or they leave no memory.
    """
    first_tokens = {
        side: tokens_lib.first_tokens(
            getattr(settings, f"{side}_tokens"),
            model.decoder.config.vocab_size,
            model.tokenizer,
            f"--{side}_tokens",
        )
        for side in ("comply", "refuse")
    }
    for given in settings.judge:
        if model.tokenizer is None and given != rules.FirstTokens.name:
            raise InputError(
                f"--judge={given}: reads text, but {settings.model} has no tokenizer; give "
                "--judge=tokens"
            )
    files = template_files(settings.judge_template, settings.judge)
    found = [
        read_judge(given, cut=settings.cut, templates=files, **first_tokens)
        for given in settings.judge
    ]
    memory.free(settings.memory_gb)  # raises where nothing is left
    return found


def answer(
    settings: AnswerSettings,
    model: Model,
    asked: Sequence[Asked],
    conditions: Sequence[Condition],
    given: Sequence[Judge],
    answered: Log[Response],
    verdicts: Log[Verdict],
    *,
    label: str = "",
    progress: bool = True,
) -> None:
    """Adds to the logs what they lack: responses to prompts under conditions, and verdicts.

    Args:
        settings: how.
        model: answers.
        asked: the prompts.
        conditions: under each of these.
        given: the judges.
        answered, verdicts: the logs.
        label: before the names of the progress bars.
        progress: show these.

    Raises:
        InputError: the memory does not suffice, or a judge cannot read a response.
    """
    wanted = responses.keys([each.name for each in conditions], asked, settings.samples)
    budget = model.budget

    def bar(what: str, log: Log) -> tqdm.tqdm:
        # `initial`: what an earlier run did says nothing of the time that the rest takes.
        done = sum(key in log.values for key in wanted)
        name = f"{label}: {what}" if label else what
        return tqdm.tqdm(
            total=len(wanted), initial=done, desc=name, unit="response", disable=not progress
        )

    with bar("responses", answered) as shown:
        for condition in conditions:
            shown.set_postfix_str(condition.name)
            with under(condition):
                responses.generate(
                    *(model.decoder, model.tokenizer, condition, asked, answered),
                    stop=model.stop,
                    sampling=settings.sampling,
                    samples=settings.samples,
                    seed=settings.seed,
                    memory=budget,
                    progress=shown.update,
                )
    with bar("verdicts", verdicts) as shown:
        responses.judge(asked, given, wanted, answered, verdicts, progress=shown.update)


@contextlib.contextmanager
def under(condition: Condition) -> Iterator[None]:
    """Names the condition in errors, unless it is the plain model."""
    try:
        yield
    except InputError as error:
        if condition is PLAIN:
            raise
        raise InputError(
            f"condition '{condition.name}': {error} (what was answered before is kept)"
        ) from None


def of_split(
    asked: Sequence[Asked], splits: Sequence[str] = SPLITS, label: str = ""
) -> list[Asked]:
    """The prompts of splits, and of a label if one is given."""
    return [one for one in asked if one.prompt.split in splits and label in ("", one.prompt.label)]


def described(
    settings: AnswerSettings,
    program: str,
    model: Model,
    asked: Sequence[Asked],
    given: Sequence[Judge],
) -> dict:
    """What `run.json` says of a run."""
    seen = [(one.prompt.id, one.prompt.label, one.prompt.split, one.tokens) for one in asked]
    return dataclasses.asdict(settings) | {
        "program": program,
        "judges": {judge.name: judge.meaning for judge in given},
        "judges_hash": hash_of([protocol.fingerprint(judge) for judge in given]),
        "precision": generation.PRECISION,
        "stop_tokens": sorted(model.stop),
        "weights_hash": model.weights_hash,
        "prompts_hash": hash_of(seen),
        **circumstances.circumstances(),
    }


def hash_of(value) -> str:
    """Of a value that JSON can hold, 64 hex digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
