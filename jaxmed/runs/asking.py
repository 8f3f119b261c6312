"""What every program shares that has a model answer prompts: settings, prompts, judges."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import jax

from jaxmed.behaviour import answering, generation
from jaxmed.behaviour.answering import AnsweringModel
from jaxmed.behaviour.judges import named, protocol, rules
from jaxmed.behaviour.judges.protocol import Judge
from jaxmed.behaviour.responses import Asked
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data import prompts as prompts_lib
from jaxmed.data import sets
from jaxmed.data.prompts import Prompt
from jaxmed.engine import cost, memory, rates
from jaxmed.files.reading import DataError
from jaxmed.runs import loading, sweep
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.settings import like, setting
from jaxmed.runs.skipping import Skipped
from jaxmed.store import circumstances
from models import placement, products
from models.errors import InputError

# What responses do not depend on: a run that goes on may be judged otherwise, and may answer more.
MAY_CHANGE = (
    "most_prompts",
    "judge",
    "judge_template",
    "comply_tokens",
    "refuse_tokens",
    "tokenisation",
    "cut",
    "judges",
    "judges_hash",
    "judge_precisions",
)


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """Which model answers which prompts, how, and who judges."""

    model: str = like(MediateSettings, "model")
    prompts: tuple[str, ...] = setting(
        help="File of prompts: CSV, JSON, JSONL or parquet, a published set or jaxmed's own form "
        "(id, prompt or prompt_ids, label). LABEL=FILE gives the label of a file that does not say "
        f"it: {', '.join(sets.LABELS)}. NAME:LABEL=FILE (or NAME:=FILE) has its ids begin with a "
        "name, where two files number their prompts alike. May be given several times.",
        path=True,
    )
    out: str = like(
        MediateSettings, "out", help="Folder for the results; a stopped run goes on.", bucket=False
    )
    adapter: str = like(MediateSettings, "adapter")
    chat: bool = like(MediateSettings, "chat")
    most_prompts: int = setting(
        help="Prompts of a label that are answered at most, drawn by hash; 0 for all.",
        default=0,
        least=0,
    )
    date: str = like(MediateSettings, "date")
    template_args: str = like(MediateSettings, "template_args")
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
    stop_tokens: tuple[str, ...] = setting(
        help="A token that ends a response beside those that the checkpoint's files name, as the "
        "text of one token (<|im_end|>), or as id:NUMBER; may be given several times.",
        default=(),
    )
    seed: int = setting(
        help="Of all samples: a response depends on it, its prompt's id and its number.",
        default=0,
        least=0,
        most=2**32 - 1,
    )
    judge: tuple[str, ...] = setting(
        help=f"NAME or NAME=CHECKPOINT: one of {', '.join(named.NAMES)}, or a JSON file with a "
        "judge of your own (docs/judges.md); and a folder or hub id, for a copy of the judge's "
        "model. May be given several times: each says what those before it do not say.",
        default=("phrases",),
        path=True,
    )
    judge_template: tuple[str, ...] = setting(
        help="NAME=FILE: file with a judge's text as its authors publish it, for those whose text "
        "is published (docs/judges.md says where). May be given several times.",
        default=(),
        path=True,
    )
    comply_tokens: tuple[str, ...] = setting(
        help="--judge=tokens: first token of a response that complies, as a text whose first token "
        "counts (as it follows the prompts), or as id:NUMBER, a token id; may be given several "
        "times.",
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
    matmul_precision: str = setting(
        help="How values are multiplied by weights: in float32, or in three bfloat16 parts "
        "(split3), as exactly; auto takes the faster on this machine.",
        default=rates.AUTO,
        choices=(rates.AUTO, *products.EXACT),
    )
    cache_dtype: str = setting(
        help="Type in which keys and values of earlier tokens are kept while a response is "
        "generated: by default that of the activations. bfloat16 halves their memory, so that more "
        "rows fit; it rounds them to 8 bits, by which logits change about as in a model that runs "
        "in bfloat16, and some responses with them. What is measured on responses is not rounded.",
        default="",
        choices=generation.CACHE_DTYPES,
    )
    ignore_config: tuple[str, ...] = like(MediateSettings, "ignore_config")
    memory_gb: float | None = like(MediateSettings, "memory_gb")
    mesh: str = like(MediateSettings, "mesh")
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
    loading.template_settings(settings.date, settings.template_args)
    if not settings.prompts:
        raise InputError("--prompts=FILE: name at least one file of prompts")
    if not settings.judge:
        raise InputError(f"--judge: name at least one of {', '.join(named.NAMES)}")
    if settings.samples > 1 and not settings.temperature:
        raise InputError(
            f"--samples={settings.samples} --temperature=0: the likeliest tokens are the same each "
            "time; give a --temperature above 0"
        )
    for name in ("comply_tokens", "refuse_tokens"):
        if bool(getattr(settings, name)) != ("tokens" in settings.judge):
            raise InputError(f"--{name} and --judge=tokens need each other")
    judges = [named.name_and_checkpoint(given)[0] for given in settings.judge]
    if settings.cut and set(judges) <= set(named.WITHOUT_MODEL):
        raise InputError(f"--cut: --judge={','.join(judges)} reads responses of any length")


def load(settings: AnswerSettings, say: Callable[[str], None] = sweep.say) -> AnsweringModel:
    """Loads the model.

    Args:
        settings: which, and how it is asked.
        say: told of what its files ask of generation and is not done, and of what ends its
            responses where that looks amiss.

    Raises:
        InputError: as `models.load`; or a setting of texts cannot be used.
    """
    loaded = loading.load(settings, rows=cost.most_rows(jax.default_backend()))
    encoder = loading.encoder(
        loaded.tokenizer,
        chat=settings.chat,
        date=settings.date,
        template_args=settings.template_args,
    )
    size = loaded.decoder.config.vocab_size
    configs = answering.generation_configs(loaded.folder)
    stop = answering.stop_tokens(configs, loaded.tokenizer) | {
        encoder.single_token(text, size, where="--stop_tokens") for text in settings.stop_tokens
    }
    not_followed = answering.not_followed(configs, settings.sampling)
    if not_followed:
        asked = ", ".join(f"{name}={json.dumps(value)}" for name, value in not_followed.items())
        say(
            f"{settings.model} asks for generation with {_shortened(asked)}; responses here do "
            "without: they are of the model's own logits, as the flags say"
        )
    if not stop:
        say(
            f"{settings.model} names no token that ends a response: all go on to --max_tokens; "
            "--stop_tokens names one"
        )
    elif encoder.has_template and (end := encoder.template.unstopped(stop)):
        say(
            f"The chat template of {settings.model} ends an answer with {end}, which no file "
            f"names as what ends a response: --stop_tokens='{end}' does"
        )
    return AnsweringModel(
        loaded.folder,
        loaded.decoder,
        encoder,
        stop,
        memory_gb=settings.memory_gb,
        cache_dtype=settings.cache_dtype,
        not_followed=not_followed,
        adapter=loaded.adapter,
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


@dataclasses.dataclass(frozen=True)
class PromptFiles:
    """What the files of prompts hold.

    Attributes:
        prompts: those of all files, in their order.
        skipped: what was left out of them, and will be.
    """

    prompts: list[Prompt]
    skipped: Skipped


def read_files(
    settings: AnswerSettings, say: Callable[[str], None] = sweep.say, *, judged: bool = True
) -> PromptFiles:
    """Reads all that needs no model, so that what is wrong with it is told before one is loaded.

    Args:
        settings: which files, and what is done with bad prompts.
        say: told of what is skipped.
        judged: whether the judges that the settings name are used.

    Raises:
        InputError: a file or prompt cannot be used (or is left out, where that is asked); there is
            no judge of a name, or its text is missing or not to be used.
    """
    if judged:
        named.check(settings.judge, settings.judge_template)
    skipped = Skipped("prompts", settings.skip_bad_prompts, say)
    found = []
    for given in settings.prompts:
        source, label, path = _described_file(given)
        found += prompts_lib.read(path, label=label, source=source, on_bad=skipped.on_bad, say=say)
    return PromptFiles(found, skipped)


def as_asked(
    settings: AnswerSettings,
    files: PromptFiles,
    model: AnsweringModel,
    say: Callable[[str], None] = sweep.say,
) -> list[Asked]:
    """The prompts of all files, as the model gets them.

    Args:
        settings: what responses are to be like, and who judges them.
        files: the prompts, and what is done with bad ones.
        model: gets the prompts.
        say: told of what is skipped, and if a chat template is not used.

    Returns:
        The prompts, each once: of those that are the same but for their ids the first, with the
        counterfactuals of all.

    Raises:
        InputError: a prompt cannot be used (or is left out, where that is asked), ids are used
            twice, or prompts that are the same have different labels.
    """
    skipped = files.skipped
    reads_text = any(
        named.name_and_checkpoint(given)[0] not in named.WITHOUT_MODEL for given in settings.judge
    )
    found, again, places, seen = [], [], {}, {}
    for prompt in files.prompts:
        try:
            if prompt.id in places:
                raise DataError(
                    f"{prompt.where}: id '{prompt.id}' was used before, by "
                    f"{places[prompt.id]}; give one of them another id, or one of the files a "
                    "name that goes before its own: --prompts=NAME:LABEL=FILE"
                )
            tokens = prompts_lib.tokens_of(prompt, model.encoder)
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
            skipped.add(error)
            continue
        places[prompt.id] = prompt.where
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
    skipped.tell(len(found))
    if not found:
        raise DataError(f"{', '.join(settings.prompts)}: not one prompt can be used")
    is_text = any(isinstance(one.prompt.prompt, str) for one in found)
    if is_text and model.encoder.has_template and not model.encoder.chat:
        say(loading.AS_IT_STANDS)
    return found


def _with_counterfactuals_of(one: Asked, again: Prompt) -> Asked:
    """The prompt, with those that it has where it stands again."""

    def both(own: tuple, more: tuple) -> tuple:
        return (*own, *(given for given in more if given not in own))

    prompt = dataclasses.replace(
        one.prompt,
        counterfactuals=both(one.prompt.counterfactuals, again.counterfactuals),
        counterfactual_ids=both(one.prompt.counterfactual_ids, again.counterfactual_ids),
    )
    return dataclasses.replace(one, prompt=prompt)


def _described_file(given: str) -> tuple[str | None, str | None, str]:
    """The source, label and path that FILE, LABEL=FILE, NAME:LABEL=FILE or NAME:=FILE says; a
    file's name may have a = and a : of its own."""
    told, equals, path = given.partition("=")
    source, colon, label = told.rpartition(":")
    if equals and (label in sets.LABELS or (colon and not label)):
        return source or None, label or None, path
    return None, None, given


def check_tokens(
    what: str, tokens: Sequence[int], settings: AnswerSettings, model: AnsweringModel
) -> None:
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


def read_judges(
    settings: AnswerSettings, model: AnsweringModel, asked: Sequence[Asked]
) -> list[Judge]:
    """The judges that are asked for by name.

    Args:
        settings: which.
        model: gives the responses.
        asked: the prompts that these are to.

    Raises:
        InputError: one is unknown, its checkpoint cannot be used, the model gives no text that it
            could read, or they leave no memory.
    """
    for given in settings.judge:
        if model.tokenizer is None and given != rules.FirstTokens.name:
            raise InputError(
                f"--judge={given}: reads text, but {settings.model} has no tokenizer; give "
                "--judge=tokens"
            )
    found = named.read(
        settings.judge,
        settings.judge_template,
        cut=settings.cut,
        comply=_first_tokens("comply_tokens", settings.comply_tokens, model, asked),
        refuse=_first_tokens("refuse_tokens", settings.refuse_tokens, model, asked),
        ignore_config=settings.ignore_config,
    )
    memory.free(settings.memory_gb)  # raises where nothing is left
    return found


def _first_tokens(
    name: str, given: tuple[str, ...], model: AnsweringModel, asked: Sequence[Asked]
) -> tuple[int, ...]:
    """The tokens of the setting of this name."""
    if not given:
        return ()
    prompts = [prompts_lib.written(one.prompt, model.encoder) for one in asked]
    size = model.decoder.config.vocab_size
    return model.encoder.first_tokens(given, size, prompts, where=f"--{name}")


def described(
    settings: AnswerSettings,
    program: str,
    model: AnsweringModel,
    asked: Sequence[Asked],
    given: Sequence[Judge],
) -> dict:
    """What `run.json` says of a run."""
    seen = [(one.prompt.id, one.prompt.label, one.prompt.split, one.tokens) for one in asked]
    return dataclasses.asdict(settings) | {
        "program": program,
        "judges": {judge.name: judge.meaning for judge in given},
        "judge_precisions": protocol.precisions(given),
        "judges_hash": hash_of([protocol.fingerprint(judge) for judge in given]),
        "matmul_precision": model.decoder.products.precision,
        "mesh": placement.named(model.decoder.mesh),
        "stop_tokens": sorted(model.stop),
        "generation_not_followed": dict(model.not_followed),
        "tokenisation": model.encoder.counts,
        "weights_hash": model.weights_hash,
        "config_hash": model.config_hash,
        "adapter_hash": model.adapter_hash,
        "prompts_hash": hash_of(seen),
        **circumstances.circumstances(),
    }


def hash_of(value) -> str:
    """Of a value that JSON can hold, 64 hex digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
