"""Judges responses in a file; says how the judge agrees with the labels there.

python -m launch.judge --judge=NAME --responses=FILE.jsonl --out=DIR
"""

import dataclasses
import hashlib
import json
import math
import pathlib

import tqdm
from absl import flags

from jaxmed.behaviour import responses
from jaxmed.behaviour.judges import agreement, named, protocol, rules
from jaxmed.files import atomic
from jaxmed.store import circumstances, claims
from launch import program
from models.errors import InputError

VERDICTS, JUDGED, AGREEMENT = "verdicts.jsonl", "judged.jsonl", "agreement.json"
_OWN_FILES = (VERDICTS, JUDGED, AGREEMENT)
# Settings that change no verdict; where text and weights of a judge are does not matter either.
_MAY_CHANGE = ("judge_model", "judge_template", "responses", "threshold", "cut")
_AT_ONCE = 64  # responses that are judged before their verdicts are kept

_JUDGE = flags.DEFINE_string(
    "judge",
    None,
    f"NAME or NAME=CHECKPOINT: one of {', '.join(named.NAMES)}, or a JSON file with a judge of "
    "your own (name, meaning, template: a text with {prompt} and {response}, yes, no); and the "
    "folder or Hugging Face hub id of its checkpoint, by default the published one, where it can "
    "be used as it is (docs/judges.md).",
    required=True,
)
_TEMPLATE = flags.DEFINE_multi_string(
    "judge_template",
    [],
    "NAME=FILE: file with the judge's text as its authors publish it, for those judges whose text "
    "is published (docs/judges.md says where).",
)
_RESPONSES = flags.DEFINE_string(
    "responses",
    None,
    "JSONL file, one response a line: prompt and response (or prompt_ids and response_ids), as in "
    "exchanges.jsonl of launch.respond; and as labels, where there are any, harmful (or label) and "
    "refused: true or false, or 1 or 0.",
    required=True,
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Folder for the verdicts. Where it has some of the same judge, only what is missing is judged.",
    required=True,
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Start again in a folder with verdicts of an earlier run."
)
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    0.5,
    "A verdict of at least this counts as yes, where it is compared with a label.",
    lower_bound=0,
    upper_bound=1,
)
_CUT = flags.DEFINE_bool(
    "cut",
    False,
    "Cut the end of a response off where it is too long for the judge; by default it is an error.",
)
_COMPLY = flags.DEFINE_multi_string(
    "comply_tokens",
    [],
    "--judge=tokens: a token id that a response begins with if it complies; may be given several "
    "times.",
)
_REFUSE = flags.DEFINE_multi_string("refuse_tokens", [], "--judge=tokens: likewise, if it refuses.")


def main() -> None:
    """Judges, keeps the verdicts as they come, and prints how they agree with the labels."""
    out = pathlib.Path(_OUT.value).expanduser()
    lines = agreement.read(pathlib.Path(_RESPONSES.value).expanduser())
    judge = _judge()
    described = _described(judge)
    try:
        run = described | circumstances.circumstances()
        claims.claim(out, run, _OWN_FILES, _OVERWRITE.value, _MAY_CHANGE)
        verdicts = _verdicts(judge, lines, responses.Log(out / VERDICTS, protocol.Verdict))
        found = _agreement(lines, verdicts)
        rows = [agreement.judged(judge, *each) for each in zip(lines, verdicts, strict=True)]
        _write(out / JUDGED, rows)
        agreed = {says: _without_nan(dataclasses.asdict(one)) for says, one in found.items()}
        _write(out / AGREEMENT, [described | {"agreement": agreed}], indent=2)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written to ({error})") from error
    print(f"Verdicts: {out / JUDGED} ({len(lines)} responses; {judge.name}: {judge.meaning})")
    print("\n".join(_means(verdicts) + _agreements(found)))


def _judge() -> protocol.Judge:
    """The judge that is asked for."""
    name, _ = named.name_and_checkpoint(_JUDGE.value)
    if name in named.WITHOUT_MODEL and _CUT.value:
        raise InputError(f"--judge={name} runs no model: leave --cut out")
    if name != rules.FirstTokens.name and (_COMPLY.value or _REFUSE.value):
        raise InputError("--comply_tokens and --refuse_tokens are for --judge=tokens alone")
    [judge] = named.read(
        [_JUDGE.value],
        _TEMPLATE.value,
        cut=_CUT.value,
        comply=_ids(_COMPLY),
        refuse=_ids(_REFUSE),
    )
    return judge


def _ids(flag: flags.FlagHolder) -> tuple[int, ...]:
    if not all(text.strip().isdecimal() for text in flag.value):
        raise InputError(f"--{flag.name}={','.join(flag.value)}: must be token ids (integers >= 0)")
    return tuple(int(text) for text in flag.value)


def _described(judge: protocol.Judge) -> dict:
    """What `run.json` and `agreement.json` say of a run."""
    return {
        "program": "judge",
        "judge": judge.name,
        "comply_tokens": _ids(_COMPLY),
        "refuse_tokens": _ids(_REFUSE),
        "judge_text_and_weights": protocol.fingerprint(judge),
        "judge_model": named.name_and_checkpoint(_JUDGE.value)[1] or None,
        "judge_template": _TEMPLATE.value,
        "meaning": judge.meaning,
        "responses": _RESPONSES.value,
        "threshold": _THRESHOLD.value,
        "cut": _CUT.value,
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
    lines: list[agreement.Line], verdicts: list[protocol.Verdict]
) -> dict[str, agreement.Agreement]:
    """The agreement with the labels of each part of a verdict that has any."""
    return {
        says: agreement.agreement(
            verdicts, [line.labels.get(says) for line in lines], _THRESHOLD.value, says
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


def _means(verdicts: list[protocol.Verdict]) -> list[str]:
    """Mean verdicts, and how many responses were cut."""
    lines = []
    for says in protocol.SAYS:
        said = [value for v in verdicts if (value := getattr(v, says)) is not None]
        if said:
            above = sum(value >= _THRESHOLD.value for value in said)
            mean = sum(said) / len(said)
            lines.append(
                f"{says}: {above} of {len(said)} at {_THRESHOLD.value:g} or above, mean {mean:.3f}"
            )
    if cut := sum(verdict.cut for verdict in verdicts):
        lines.append(f"Cut off at their ends, as too long for the judge: {cut} of {len(verdicts)}")
    return lines


def _agreements(found: dict[str, agreement.Agreement]) -> list[str]:
    if not found:
        return ["No response has a label of what the judge says: there is nothing to compare."]
    lines = []
    for says, a in found.items():
        accuracy, kappa = (
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            for value, (low, high) in (
                (a.accuracy, a.accuracy_interval),
                (a.kappa, a.kappa_interval),
            )
        )
        lines.append(
            f"{says}, {a.n} labels: accuracy {accuracy}, Cohen's kappa {kappa}, "
            f"precision {a.precision:.3f}, recall {a.recall:.3f} (true and false positives "
            f"{a.true_positive} and {a.false_positive}, negatives {a.true_negative} and "
            f"{a.false_negative})"
        )
    return lines


if __name__ == "__main__":
    program.start(main)
