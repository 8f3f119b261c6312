"""A judge on a file of responses: its verdicts, and how they agree with the labels there."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence

import tqdm

from jaxmed.behaviour import responses
from jaxmed.behaviour.judges import agreement, named, protocol, rules
from jaxmed.behaviour.judges.outcome import JudgeOutcome
from jaxmed.data import tokens
from jaxmed.files import atomic
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.settings import like, setting
from jaxmed.store import circumstances, claims
from models.errors import InputError

VERDICTS, JUDGED, AGREEMENT = "verdicts.jsonl", "judged.jsonl", "agreement.json"
_OWN_FILES = (VERDICTS, JUDGED, AGREEMENT)
# Settings that change no verdict; where text and weights of a judge are does not matter either.
_MAY_CHANGE = (
    "judge_model",
    "judge_template",
    "judge_precisions",
    "responses",
    "threshold",
    "cut",
)
_AT_ONCE = 64  # responses that are judged before their verdicts are kept


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """Who judges which responses."""

    judge: str = setting(
        help=f"NAME or NAME=CHECKPOINT: one of {', '.join(named.NAMES)}, or a JSON file with a "
        "judge of your own (name, meaning, template: a text with {prompt} and {response}, yes, "
        "no); and the folder or Hugging Face hub id of its checkpoint, by default the published "
        "one, where it can be used as it is (docs/judges.md).",
        path=True,
    )
    responses: str = setting(
        help="JSONL file, one response a line: prompt and response (or prompt_ids and "
        "response_ids), as in exchanges.jsonl of launch.respond; and as labels, where there are "
        "any, harmful (or label) and refused: true or false, or 1 or 0.",
        path=True,
    )
    out: str = setting(
        help="Folder for the verdicts. Where it has some of the same judge, only what is missing "
        "is judged.",
        path=True,
    )
    judge_template: tuple[str, ...] = setting(
        help="NAME=FILE: file with the judge's text as its authors publish it, for those judges "
        "whose text is published (docs/judges.md says where).",
        default=(),
        path=True,
    )
    overwrite: bool = setting(
        help="Start again in a folder with verdicts of an earlier run.", default=False
    )
    threshold: float = setting(
        help="A verdict of at least this counts as yes, where it is compared with a label.",
        default=0.5,
        least=0,
        most=1,
    )
    cut: bool = setting(
        help="Cut the end of a response off where it is too long for the judge; by default it is "
        "an error.",
        default=False,
    )
    comply_tokens: tuple[str, ...] = setting(
        help="--judge=tokens: what a response begins with if it complies, as id:NUMBER, a token "
        "id; may be given several times.",
        default=(),
    )
    refuse_tokens: tuple[str, ...] = setting(
        help="--judge=tokens: likewise, if it refuses.", default=()
    )
    ignore_config: tuple[str, ...] = like(MediateSettings, "ignore_config")


def run(settings: JudgeSettings) -> JudgeOutcome:
    """Judges, keeps the verdicts as they come, and compares them with the labels.

    A folder that has verdicts of the same judge is gone on with.

    Raises:
        InputError: something that the user gave cannot be used; the message names it.
    """
    settings_lib.check(settings)
    out = pathlib.Path(settings.out)
    lines = agreement.read(settings.responses)
    judge = _judge(settings)
    described = _described(settings, judge)
    try:
        run = described | circumstances.circumstances()
        claims.claim(out, run, _OWN_FILES, settings.overwrite, _MAY_CHANGE)
        verdicts = _verdicts(judge, lines, responses.Log(out / VERDICTS, protocol.Verdict))
        found = _agreement(lines, verdicts, settings.threshold)
        rows = [
            agreement.judged(judge, line, verdict)
            for line, verdict in zip(lines, verdicts, strict=True)
        ]
        _write(out / JUDGED, rows)
        agreed = {says: _without_nan(dataclasses.asdict(one)) for says, one in found.items()}
        _write(out / AGREEMENT, [described | {"agreement": agreed}], indent=2)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written to ({error})") from error
    return JudgeOutcome(out / JUDGED, judge, verdicts, found, settings.threshold)


def _judge(settings: JudgeSettings) -> protocol.Judge:
    """The judge that is asked for."""
    name, _ = named.name_and_checkpoint(settings.judge)
    if name in named.WITHOUT_MODEL and settings.cut:
        raise InputError(f"--judge={name} runs no model: leave --cut out")
    if name != rules.FirstTokens.name and (settings.comply_tokens or settings.refuse_tokens):
        raise InputError("--comply_tokens and --refuse_tokens are for --judge=tokens alone")
    (judge,) = named.read(
        [settings.judge],
        settings.judge_template,
        cut=settings.cut,
        comply=_ids(settings.comply_tokens, "comply_tokens"),
        refuse=_ids(settings.refuse_tokens, "refuse_tokens"),
        ignore_config=settings.ignore_config,
    )
    return judge


def _ids(given: Sequence[str], name: str) -> tuple[int, ...]:
    found = []
    for text in given:
        token = tokens.id_given(text, None, where=f"--{name}")
        if token is None:
            raise InputError(f"--{name}={text}: must be a token id, as {tokens.BY_ID}12")
        found.append(token)
    return tuple(found)


def _described(settings: JudgeSettings, judge: protocol.Judge) -> dict:
    """What `run.json` and `agreement.json` say of a run."""
    return {
        "program": "judge",
        "judge": judge.name,
        "comply_tokens": _ids(settings.comply_tokens, "comply_tokens"),
        "refuse_tokens": _ids(settings.refuse_tokens, "refuse_tokens"),
        "judge_text_and_weights": protocol.fingerprint(judge),
        "judge_model": named.name_and_checkpoint(settings.judge)[1] or None,
        "judge_template": settings.judge_template,
        "judge_precisions": protocol.precisions([judge]),
        "meaning": judge.meaning,
        "responses": settings.responses,
        "threshold": settings.threshold,
        "cut": settings.cut,
        "ignore_config": settings.ignore_config,
    }


def _verdicts(
    judge: protocol.Judge, lines: list[agreement.Line], log: responses.Log[protocol.Verdict]
) -> list[protocol.Verdict]:
    """The verdict on each line; those that the log lacks are added to it. Equal exchanges are
    judged once, wherever they stand, so that lines and labels may be added."""
    keys = [_key(line.exchange) for line in lines]
    by_key = {key: line.exchange for key, line in zip(keys, lines, strict=True)}
    # The longest come first: one that is too long for the judge shows at once.
    todo = [key for key in by_key if key not in log.values]
    todo.sort(key=lambda key: -_length(by_key[key]))
    with tqdm.tqdm(total=len(todo), unit="response", desc=judge.name, disable=not todo) as bar:
        for first in range(0, len(todo), _AT_ONCE):
            part = todo[first : first + _AT_ONCE]
            said = judge([by_key[key] for key in part])
            log.append(dict(zip(part, said, strict=True)))
            bar.update(len(part))
    return [log.values[key] for key in keys]


def _key(exchange: protocol.Exchange) -> responses.Key:
    """Which exchange it is: a hash of all that judges read."""
    content = json.dumps({**dataclasses.asdict(exchange), "where": ""}, sort_keys=True)
    return responses.Key("", hashlib.sha256(content.encode()).hexdigest(), 0)


def _length(exchange: protocol.Exchange) -> int:
    """About how long a judge's run takes."""
    return sum(map(len, (exchange.prompt or "", exchange.response or "", exchange.response_ids)))


def _agreement(
    lines: list[agreement.Line], verdicts: list[protocol.Verdict], threshold: float
) -> dict[str, agreement.Agreement]:
    """The agreement with the labels of each part of a verdict that has any."""
    return {
        says: agreement.agreement(
            verdicts, [line.labels.get(says) for line in lines], threshold, says
        )
        for says in protocol.SAYS
        if any(
            says in line.labels and getattr(verdict, says) is not None
            for line, verdict in zip(lines, verdicts, strict=True)
        )
    }


def _write(path: pathlib.Path, objects: list[dict], indent: int | None = None) -> None:
    text = "".join(json.dumps(one, ensure_ascii=False, indent=indent) + "\n" for one in objects)
    atomic.replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _without_nan(fields: dict) -> dict:
    """JSON has no NaN: null says that there is no such number."""

    def known(value):
        if isinstance(value, tuple):
            return [known(part) for part in value]
        return None if math.isnan(value) else value

    return {name: known(value) for name, value in fields.items()}
