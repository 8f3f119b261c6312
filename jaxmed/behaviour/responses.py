"""Responses to prompts under one or several conditions: generated, kept, judged.

Every response is one line of a file that grows as they come, so that a stopped run goes on where it
stopped. What a prompt is answered depends on the prompt, its sample's seed and the condition alone
(`generation`), so a run that was stopped gives what one that was not gives.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int

from jaxmed.behaviour import generation, thoughts
from jaxmed.behaviour.judges import protocol
from jaxmed.behaviour.judges.protocol import Exchange, Judge, Verdict
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data import chat, prompts, splits
from jaxmed.data.control import TextTokenizer
from jaxmed.data.prompts import Prompt
from jaxmed.data.sets import LABELS
from jaxmed.data.splits import SPLITS
from jaxmed.files import atomic
from models.decoder import Decoder
from models.edits import Hold
from models.errors import InputError

EXCHANGES = "exchanges.jsonl"
FILES = ("responses.jsonl", "verdicts.jsonl", EXCHANGES)
NGRAM = 4  # tokens; see `repetition`
_AT_ONCE = 64  # responses that are judged before verdicts are written
# Prompts of which one follows the other as rows of a batch end: the more, the fewer rows wait for
# the last. All their own holds are in memory together.
_TOGETHER = 256


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt as the model gets it: its tokens."""

    prompt: Prompt
    tokens: tuple[int, ...]

    @property
    def fingerprints(self) -> set[str]:
        """As `splits.fingerprints` has them."""
        return splits.fingerprints(chat.as_text(self.prompt.prompt), self.tokens)


@dataclasses.dataclass(frozen=True)
class Condition:
    """Under what responses are generated.

    Attributes:
        name: of the condition.
        holds: gives the interventions, made together, for prompts by their rows: their places among
            those that `generate` gets. None is the plain model.
    """

    name: str
    holds: Callable[[Int[np.ndarray, "B"]], Sequence[Hold]] = lambda rows: ()


PLAIN = Condition("plain")


@dataclasses.dataclass(frozen=True)
class Key:
    """Which response: the sample-th one to a prompt (its id) under a condition (its name)."""

    condition: str
    prompt: str
    sample: int


@dataclasses.dataclass(frozen=True)
class Response:
    """A response, and how it came to its end.

    Attributes:
        tokens: without the token that stopped it.
        text: of the answer; None for a checkpoint without a tokenizer.
        stopped: whether the model ended it; if not, the limit did.
        thoughts: how many of the tokens come before the answer (see `thoughts.length`).
    """

    tokens: tuple[int, ...]
    text: str | None
    stopped: bool
    thoughts: int = 0

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens without thoughts."""
        return self.tokens[self.thoughts :]

    @property
    def only_thinks(self) -> bool:
        """Whether it ended within its thoughts, before it said anything."""
        return 0 < self.thoughts == len(self.tokens)


Value = TypeVar("Value", Response, Verdict)


class Log(Generic[Value]):
    """A file with one JSON object a line for every key, which only grows.

    Args:
        path: the file; lines that are there already are read. A last line that a stopped run left
            unfinished is taken off.
        value: makes a value of what a line says of it.
        maker: what made the values, where that may change from run to run; lines of other makers
            stay in the file and are passed over.

    Raises:
        InputError: the file holds something else.
    """

    def __init__(self, path: pathlib.Path, value: Callable[..., Value], maker: str = ""):
        self.path = path
        self._maker = {"maker": maker} if maker else {}
        self.values: dict[Key, Value] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                fields = json.loads(line)
                if fields.pop("maker", "") != maker:
                    continue
                key = Key(*(fields.pop(field.name) for field in dataclasses.fields(Key)))
                self.values[key] = value(**fields)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(
                    f"{path}:{number}: no line of a run of jaxmed; choose another folder"
                ) from None
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)

    def append(self, values: dict[Key, Value]) -> None:
        """Adds values."""
        with self.path.open("a", encoding="utf-8") as file:
            for key, value in values.items():
                line = dataclasses.asdict(key) | dataclasses.asdict(value) | self._maker
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.values |= values


def _response(tokens: list[int], text: str | None, stopped: bool, thoughts: int) -> Response:
    """A response as JSON has it, whose tokens are a list."""
    return Response(tuple(tokens), text, stopped, thoughts)


def response_log(folder: pathlib.Path) -> Log[Response]:
    """The responses that a folder holds, in `responses.jsonl`."""
    return Log(folder / "responses.jsonl", _response)


def verdict_log(folder: pathlib.Path, judges_hash: str) -> Log[Verdict]:
    """The verdicts of these judges that a folder holds, in `verdicts.jsonl`."""
    return Log(folder / "verdicts.jsonl", Verdict, judges_hash)


def seed_of(prompt: str, sample: int, seed: int) -> int:
    """The seed of a sample: the same under every condition, so that these can be compared."""
    content = json.dumps([seed, prompt, sample]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


def of_split(
    asked: Sequence[Asked], splits: Collection[str] = SPLITS, label: str = ""
) -> list[Asked]:
    """The prompts of splits, and of a label if one is given."""
    return [one for one in asked if one.prompt.split in splits and label in ("", one.prompt.label)]


def drawn(
    asked: Sequence[Asked], most: int, seed: int, labels: Collection[str] = LABELS
) -> list[Asked]:
    """The prompts, and of each of these labels at most so many, drawn by hash, so that all files
    have their share."""
    left_out = set()
    for label in labels:
        chosen = of_split(asked, label=label)
        chosen.sort(key=lambda one: seed_of(one.prompt.id, 0, seed))
        left_out |= {one.prompt.id for one in chosen[most:]}
    return [one for one in asked if one.prompt.id not in left_out]


def keys(conditions: Iterable[str], asked: Sequence[Asked], samples: int) -> list[Key]:
    """Of all responses, in order."""
    return [
        Key(condition, one.prompt.id, sample)
        for condition in conditions
        for one in asked
        for sample in range(samples)
    ]


def generate(
    decoder: Decoder,
    tokenizer,
    condition: Condition,
    asked: Sequence[Asked],
    log: Log[Response],
    *,
    stop: Collection[int],
    sampling: Sampling,
    samples: int = 1,
    seed: int = 0,
    cache_dtype: str = "",
    memory: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Adds to the log what it lacks of the responses to prompts under a condition.

    Args:
        decoder, tokenizer: the model; the tokenizer may be None.
        condition: under what.
        asked: the prompts; their ids differ.
        log: gets the responses.
        stop: tokens that end a response.
        sampling: how tokens are chosen.
        samples: how many responses each prompt gets.
        seed: of all samples.
        cache_dtype, memory: as in `generation.generate`.
        progress: told how many responses were added, as they are.

    Raises:
        InputError: as `generation.generate`.
    """
    todo = [
        (row, sample)
        for row, one in enumerate(asked)
        for sample in range(samples)
        if Key(condition.name, one.prompt.id, sample) not in log.values
    ]
    # Prompts of like length share batches. The longest come first: if the memory does not suffice,
    # that shows at once, and what is still to come takes no longer than what is done.
    todo.sort(key=lambda item: -len(asked[item[0]].tokens))
    reader = None if tokenizer is None else TextTokenizer(tokenizer)
    for first in range(0, len(todo), _TOGETHER):
        part = todo[first : first + _TOGETHER]
        rows = np.array([row for row, _ in part])

        def keep(found: dict[int, generation.Generated], part=part) -> None:
            values = {}
            for index, response in found.items():
                row, sample = part[index]
                key = Key(condition.name, asked[row].prompt.id, sample)
                values[key] = _with_text(reader, asked[row], response)
            log.append(values)
            if progress is not None:
                progress(len(values))

        generation.generate(
            decoder,
            [asked[row].tokens for row in rows],
            stop=stop,
            sampling=sampling,
            seeds=[seed_of(asked[row].prompt.id, sample, seed) for row, sample in part],
            holds=condition.holds(rows),
            cache_dtype=cache_dtype,
            memory=memory,
            ended=keep,
        )


def _with_text(reader: TextTokenizer | None, one: Asked, found: generation.Generated) -> Response:
    """What was generated, and the text of the answer in it."""
    if reader is None:
        return Response(found.tokens, None, found.stopped)
    begins = thoughts.length(reader, one.tokens, found.tokens)
    text = reader.tokenizer.decode(found.tokens[begins:], skip_special_tokens=True)
    # A token may hold the end of the white space that parts them, and more.
    return Response(found.tokens, text.lstrip() if begins else text, found.stopped, begins)


def judge(
    asked: Sequence[Asked],
    judges: Sequence[Judge],
    wanted: Sequence[Key],
    responses: Log[Response],
    verdicts: Log[Verdict],
    *,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Adds to the verdicts what they lack. Equal responses to a prompt are judged once.

    Args:
        asked: the prompts.
        judges: each says what those before it do not say.
        wanted: which responses.
        responses: these.
        verdicts: get what is said of them.
        progress: told how many verdicts were added.

    Raises:
        InputError: as the judges.
    """
    by_id = {one.prompt.id: one for one in asked}

    def said_of(key):
        return key.prompt, responses.values[key].tokens

    said = {said_of(key): verdicts.values[key] for key in wanted if key in verdicts.values}
    missing = [key for key in wanted if key not in verdicts.values]
    if again := {key: said[said_of(key)] for key in missing if said_of(key) in said}:
        verdicts.append(again)
        if progress is not None:
            progress(len(again))
    groups = collections.defaultdict(list)
    for key in missing:
        if key not in again:
            groups[said_of(key)].append(key)
    groups = list(groups.values())
    for first in range(0, len(groups), _AT_ONCE):
        part = groups[first : first + _AT_ONCE]
        exchanges = [_exchange(by_id[keys[0].prompt], responses.values[keys[0]]) for keys in part]
        found = _merged([each(exchanges) for each in judges])
        verdicts.append(
            {key: verdict for keys, verdict in zip(part, found, strict=True) for key in keys}
        )
        if progress is not None:
            progress(sum(map(len, part)))


def _exchange(one: Asked, response: Response) -> Exchange:
    has_text = one.prompt.prompt is not None
    return Exchange(
        prompt=prompts.text(one.prompt) if has_text else None,
        response=response.text,
        prompt_ids=one.tokens,
        response_ids=response.answer,
        where=f"{one.prompt.where}: prompt '{one.prompt.id}'",
        label=one.prompt.label,
    )


def _merged(said: list[list[Verdict]]) -> list[Verdict]:
    """Of each exchange what the first judge says that says it."""

    def first(verdicts, *names):
        known = (v for name in names for v in verdicts if getattr(v, name) is not None)
        return next(known, Verdict())

    merged = []
    for verdicts in zip(*said, strict=True):
        fields: dict[str, Any] = {"cut": any(verdict.cut for verdict in verdicts)}
        fields["complied"] = first(verdicts, "complied").complied
        for name in protocol.SAYS:
            mass = f"{name}_mass"
            one = first(verdicts, name, mass)
            fields |= {name: getattr(one, name), mass: getattr(one, mass)}
        merged.append(Verdict(**fields))
    return merged


def write_exchanges(
    path: pathlib.Path, asked: Sequence[Asked], log: Log[Response], verdicts: Log[Verdict]
) -> None:
    """Writes responses beside their prompts, as `launch.judge` reads them once people have labelled
    them. The verdicts, which these people should not see, are not there, but the masses are, by
    which those can be found that the judge model was unsure of (`judge_harmful_mass`,
    `judge_refused_mass`)."""
    by_id = {one.prompt.id: one for one in asked}
    lines = []
    for key, response in log.values.items():
        if key.prompt in by_id:
            exchange = _exchange(by_id[key.prompt], response)
            fields = {"id": f"{key.condition}/{key.prompt}/{key.sample}", "label": exchange.label}
            fields |= {
                name: value
                for name in ("prompt", "response", "prompt_ids", "response_ids")
                if (value := getattr(exchange, name)) is not None
            }
            if verdict := verdicts.values.get(key):
                fields |= {
                    f"judge_{says}_mass": mass
                    for says in protocol.SAYS
                    if (mass := verdict.mass(says)) is not None
                }
            lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    atomic.replace_file(
        path,
        lambda temporary: temporary.write_text("".join(lines), encoding="utf-8", newline="\n"),
    )


def says_something(response: Response) -> bool:
    """Whether there is anything in a response but thoughts and white space."""
    return bool(response.answer) and (response.text is None or bool(response.text.strip()))


def repetition(tokens: Sequence[int]) -> float:
    """Share of a response's n-grams of tokens that it had before: 1 - distinct / all (rep-n of
    Welleck et al. 2020, arXiv 1908.04319); NaN where it has none."""
    count = len(tokens) - NGRAM + 1
    if count < 1:
        return np.nan
    return 1 - len({tuple(tokens[i : i + NGRAM]) for i in range(count)}) / count


def by_prompt(
    asked: Sequence[Asked], samples: int, value: Callable[[str, int], float]
) -> Float[np.ndarray, "prompt"]:
    """Mean over a prompt's samples of `value(id, sample)`; NaN where none has a value."""
    table = np.array(
        [[value(one.prompt.id, sample) for sample in range(samples)] for one in asked], np.float64
    ).reshape(len(asked), samples)
    known = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.where(known, table, 0).sum(axis=1) / known.sum(axis=1)
