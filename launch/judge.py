"""Judges responses in a file; says how the judge agrees with the labels there.

python -m launch.judge --judge=NAME --responses=FILE.jsonl --out=DIR
"""

import dataclasses
import json
import math
import pathlib

from absl import flags

from jaxmed import asking, judges, results
from launch import program
from models.errors import InputError

VERDICTS, AGREEMENT = "verdicts.jsonl", "agreement.json"

_JUDGE = flags.DEFINE_string(
    "judge",
    None,
    f"NAME or NAME=CHECKPOINT: one of {', '.join(judges.NAMES)}, or a JSON file with a judge of "
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
    "JSONL file, one response a line: prompt and response (or prompt_ids and response_ids), and as "
    "labels, where there are any, harmful (or label) and refused: true or false, or 1 or 0.",
    required=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder for the verdicts.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the verdicts of an earlier run.")
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
    """Judges, writes the verdicts, and prints how they agree with the labels."""
    out = pathlib.Path(_OUT.value).expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out}: is a file; give a folder")
    if (out / VERDICTS).exists() and not _OVERWRITE.value:
        raise InputError(f"{out / VERDICTS}: is there already; --overwrite replaces it")
    lines = judges.read(pathlib.Path(_RESPONSES.value).expanduser())
    judge = _judge()
    verdicts = judge([line.exchange for line in lines])
    found = {
        says: judges.agreement(
            verdicts, [line.labels.get(says) for line in lines], _THRESHOLD.value, says
        )
        for says in judges.SAYS
        if any(
            says in line.labels and getattr(verdict, says) is not None
            for line, verdict in zip(lines, verdicts, strict=True)
        )
    }
    _write(out, judge, lines, verdicts, found)
    print(f"Verdicts: {out / VERDICTS} ({len(lines)} responses; {judge.name}: {judge.meaning})")
    print("\n".join(_means(verdicts) + _agreements(found)))


def _judge() -> judges.Judge:
    """The judge that is asked for."""
    name, _ = asking.judge_and_checkpoint(_JUDGE.value)
    if name in asking.WITHOUT_MODEL and _CUT.value:
        raise InputError(f"--judge={name} runs no model: leave --cut out")
    if name != judges.FirstTokens.name and (_COMPLY.value or _REFUSE.value):
        raise InputError("--comply_tokens and --refuse_tokens are for --judge=tokens alone")
    return asking.read_judge(
        _JUDGE.value,
        cut=_CUT.value,
        templates=asking.template_files(_TEMPLATE.value, [_JUDGE.value]),
        comply=_ids(_COMPLY),
        refuse=_ids(_REFUSE),
    )


def _ids(flag: flags.FlagHolder) -> tuple[int, ...]:
    if not all(text.strip().isdecimal() for text in flag.value):
        raise InputError(f"--{flag.name}={','.join(flag.value)}: must be token ids (integers >= 0)")
    return tuple(int(text) for text in flag.value)


def _write(out: pathlib.Path, judge, lines, verdicts, found) -> None:
    rows = [
        json.dumps(judges.judged(judge, line, verdict), ensure_ascii=False)
        for line, verdict in zip(lines, verdicts, strict=True)
    ]
    about = {
        "judge": judge.name,
        "meaning": judge.meaning,
        "judge_model": asking.judge_and_checkpoint(_JUDGE.value)[1] or None,
        "judge_template": _TEMPLATE.value,
        "responses": _RESPONSES.value,
        "threshold": _THRESHOLD.value,
        "agreement": {says: _without_nan(dataclasses.asdict(a)) for says, a in found.items()},
    }
    texts = {AGREEMENT: json.dumps(about, indent=2), VERDICTS: "\n".join(rows)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            results.replace_file(
                out / name, lambda path, text=text: path.write_text(text + "\n", encoding="utf-8")
            )
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written to ({error})") from error


def _without_nan(fields: dict) -> dict:
    """JSON has no NaN: null says that there is no such number."""

    def known(value):
        if isinstance(value, tuple):
            return [known(part) for part in value]
        return None if math.isnan(value) else value

    return {name: known(value) for name, value in fields.items()}


def _means(verdicts: list[judges.Verdict]) -> list[str]:
    """Mean verdicts, and how many responses were cut."""
    lines = []
    for says in judges.SAYS:
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


def _agreements(found: dict[str, judges.Agreement]) -> list[str]:
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
