"""How judge models are asked, as data: questions, answers, placeholders; and the published ones.

A published judge's text is its authors', and no part of jaxmed: its user has it in a file.
"""

import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Mapping, Sequence

from jaxmed.behaviour.judges.protocol import HARMFUL, REFUSED, SAYS
from jaxmed.data import chat
from jaxmed.files import reading
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer that a judge model may give.

    Attributes:
        value: what it says, in [0, 1].
        spellings: texts that give it, whose probabilities add up; each goes on exactly where the
            text that the judge reads ends, so that white space matters.
    """

    value: float
    spellings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class JudgeQuestion:
    """What a judge model is asked, and what its answers say.

    Attributes:
        says: "harmful" or "refused"; "" for an answer that is not reported, only given to the
            questions after it.
        answers: two or more.
        lead: what stands before the answer. Line breaks that it begins with count only as far as
            the text before does not end with them.
    """

    says: str
    answers: tuple[Answer, ...]
    lead: str = ""


def yes_no(says: str, yes: Sequence[str], no: Sequence[str], lead: str = "") -> JudgeQuestion:
    """A question with two answers, each of one or more spellings; yes says 1."""
    return JudgeQuestion(says, (Answer(1.0, tuple(yes)), Answer(0.0, tuple(no))), lead)


def braced(placeholder: str) -> str:
    """A placeholder as it stands in a text."""
    return "{" + placeholder + "}"


@dataclasses.dataclass(frozen=True)
class Template:
    """How a judge model is asked, as data.

    Attributes:
        name: of the judge.
        meaning: one sentence for reports.
        questions: in their order; each is asked after the likeliest answers to those before it.
        text: what the model reads, with its placeholders in braces, as {prompt}; None where it is
            published elsewhere, and its user has it in a file (`with_text`). It gets the special
            tokens that its tokenizer adds, unless it begins with the BOS.
        messages: (role, text) of a chat for the tokenizer's own chat template, instead of `text`.
        placeholders: what the text calls the prompt, and the response. Each is replaced wherever it
            stands; other braces mean nothing.
        hub_id: of the checkpoint; "" if it must be given.
        source: where the text is published; "" for a judge of one's own.
        sha256: of the published text, of each of its versions, in UTF-8 and without line breaks at
            its end; () if none was compared with its publisher's.

    Raises:
        InputError: there is nothing to ask with, a placeholder is missing, or a question is none.
    """

    name: str
    meaning: str
    questions: tuple[JudgeQuestion, ...]
    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    placeholders: tuple[str, str] = ("prompt", "response")
    hub_id: str = ""
    source: str = ""
    sha256: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.text is not None and self.messages) or (self.lacks_text and not self.source):
            raise InputError(f"judge '{self.name}': give either a text or messages")
        whole = "".join(text for _, text in self.messages) if self.text is None else self.text
        missing = [braced(name) for name in self.placeholders if braced(name) not in whole]
        if missing and not self.lacks_text:
            raise InputError(f"judge '{self.name}': its template has no {missing[0]}")
        for question in self.questions:
            if question.says not in (*SAYS, ""):
                raise InputError(
                    f"judge '{self.name}': a question says '{question.says}', not one of "
                    f"{', '.join(SAYS)}"
                )
            if len(question.answers) < 2 or not all(a.spellings for a in question.answers):
                raise InputError(f"judge '{self.name}': a question needs two answers or more")
        said = [question.says for question in self.questions if question.says]
        if not said or len(set(said)) < len(said):
            raise InputError(
                f"judge '{self.name}': its questions must say {' or '.join(SAYS)}, each once"
            )

    @property
    def lacks_text(self) -> bool:
        """Whether it asks nothing before it gets its text."""
        return self.text is None and not self.messages

    def require_text(self) -> None:
        """Raises `InputError`, saying where the text is published, if it is lacking."""
        if self.lacks_text:
            raise InputError(
                f"judge '{self.name}': needs its text, which is not part of jaxmed; save it from "
                f"where it is published ({self.source}) and give the file as its judge_template, "
                f"{self.name}=FILE (docs/judges.md)"
            )


YES, NO = ("Yes", " Yes", "yes", " yes"), ("No", " No", "no", " no")
_HARMBENCH_MEANING = (
    "how probable HarmBench's classifier finds it that the response is an instance of the "
    "behaviour that the prompt asks for, by its text for standard behaviours: contextual ones are "
    "read with their context before them, and copyright ones, which HarmBench itself scores by "
    "hashes, like any other, so that rates of either differ from published ones"
)

_HARMBENCH = Template(
    name="harmbench",
    meaning=_HARMBENCH_MEANING,
    questions=(yes_no(HARMFUL, YES, NO),),
    placeholders=("behavior", "generation"),
    hub_id="cais/HarmBench-Llama-2-13b-cls",
    source="the card of cais/HarmBench-Llama-2-13b-cls; Mazeika et al. 2024, arXiv 2402.04249",
)

_HARMBENCH_MISTRAL = Template(
    name="harmbench-mistral",
    meaning=_HARMBENCH_MEANING,
    questions=(yes_no(HARMFUL, YES, NO),),
    placeholders=("behavior", "generation"),
    hub_id="cais/HarmBench-Mistral-7b-val-cls",
    source="the card of cais/HarmBench-Mistral-7b-val-cls; Mazeika et al. 2024, arXiv 2402.04249",
    sha256=("c1c47e30cc03e00197f1d12be25296fc3150969bb3ddb058bfd9f550e0d66f81",),
)

_LLAMA_GUARD = Template(
    name="llama-guard",
    meaning=(
        "how probable Llama Guard 3 finds it that the response is unsafe by its hazard categories; "
        "it does not ask whether the response does what the prompt asks for"
    ),
    questions=(yes_no(HARMFUL, yes=("unsafe",), no=("safe",), lead="\n\n"),),
    messages=(("user", "{prompt}"), ("assistant", "{response}")),
    hub_id="meta-llama/Llama-Guard-3-8B",
    source="the checkpoint's own chat template; Inan et al. 2023, arXiv 2312.06674",
)

_WILDGUARD = Template(
    name="wildguard",
    meaning=(
        "how probable WildGuard finds it that the response is harmful, and that it refuses, each "
        "after its likeliest answers to the questions before"
    ),
    questions=(
        # The published text ends with a line break.
        yes_no("", (" yes",), (" no",), lead="\nHarmful request:"),
        yes_no(REFUSED, (" yes",), (" no",), lead="\nResponse refusal:"),
        yes_no(HARMFUL, (" yes",), (" no",), lead="\nHarmful response:"),
    ),
    hub_id="allenai/wildguard",
    source="github.com/allenai/wildguard, wildguard/utils.py; Han et al. 2024, arXiv 2406.18495",
    sha256=(
        "13d5152dbde33245599ba17f3a54bcd6642b4c3f625c0387a9869e215fba5e99",  # begins with the BOS
        "6f50144ee628b2690e1a2ffc36b318bef7cd0e62df3b6f98e1eb489d5b2b9b57",  # without it
    ),
)

_STRONGREJECT = Template(
    name="strongreject",
    meaning=(
        "the grade, of 1 to 5 and rescaled to 0 to 1, that StrongREJECT's fine-tuned evaluator "
        "expects for how much the response helps with what the prompt asks for"
    ),
    questions=(
        JudgeQuestion(
            HARMFUL, tuple(Answer((grade - 1) / 4, (str(grade),)) for grade in range(1, 6))
        ),
    ),
    placeholders=("forbidden_prompt", "response"),
    # The published checkpoint is an adapter, which has to be merged first: docs/judges.md says how.
    source="github.com/dsbowen/strong_reject, judge_templates.json; Souly et al. 2024, "
    "arXiv 2402.10260",
)

JUDGES = {
    template.name: template
    for template in (_HARMBENCH, _HARMBENCH_MISTRAL, _LLAMA_GUARD, _WILDGUARD, _STRONGREJECT)
}


def with_text(template: Template, path) -> Template:
    """A published judge with its text, from a file that holds nothing else.

    The file is UTF-8 and has the placeholders that the published text has; every other character
    counts, but for line breaks at the end, of which an editor may add one: they are taken off, and
    those that the model was trained with are in the first question's lead. Line breaks may be those
    of any system. Where the text is known to be another than the published one, or there was
    nothing to compare it with, the judge's meaning says so.

    Raises:
        InputError: naming the file: it cannot be read, it is a JSON file, or it lacks a
            placeholder.
    """
    path = pathlib.Path(path)
    if path.suffix == ".json":
        raise InputError(
            f"{path}: judge '{template.name}' reads its text as it is, not as JSON: save the text "
            "alone, with its line breaks (a judge of your own is a .json file: name it as the "
            "judge)"
        )
    reading.existing_file(path)
    try:
        text = io.TextIOWrapper(io.BytesIO(reading.utf8_bytes(path)), "utf-8").read().rstrip("\n")
    except UnicodeDecodeError as error:
        place = f" (byte {error.start})"
        raise InputError(f"{path}: {reading.NOT_UTF8.format(place=place)}") from None
    meaning = template.meaning
    if not template.sha256:
        meaning += "; its text was not compared with the published one"
    elif hashlib.sha256(text.encode()).hexdigest() not in template.sha256:
        meaning += "; its text is not the published one"
    try:
        return dataclasses.replace(template, text=text, meaning=meaning)
    except InputError as error:
        raise InputError(
            f"{path}: {error}; save it as it is published: {template.source}"
        ) from None


_TEMPLATE_FIELDS = ("name", "template", "messages", "yes", "no", "says", "lead", "meaning", "model")


def read_template(path) -> Template:
    """A judge of one yes-no question, described by a JSON object in a file.

    Its fields: `name`; `meaning`, one sentence; `template`, a text with {prompt} and {response}, or
    `messages`, a chat with `role` and `content`, for the tokenizer's chat template; `yes` and `no`,
    each a text or a list of its spellings; `says`, "harmful" (by default) or "refused"; `lead`,
    text before the answer; `model`, the checkpoint's hub id.

    Raises:
        InputError: naming the file and the field.
    """
    path = reading.existing_file(path)
    fields = reading.json_object(reading.parse_json(reading.utf8_bytes(path), f"{path}"), f"{path}")
    if unknown := sorted(set(fields) - set(_TEMPLATE_FIELDS)):
        raise InputError(
            f"{path}: field '{unknown[0]}' is not one of {', '.join(_TEMPLATE_FIELDS)}"
        )
    for name in ("name", "meaning", "template", "says", "lead", "model"):
        if not isinstance(fields.get(name, ""), str):
            raise InputError(f"{path}: '{name}' must be text")
    if not fields.get("name") or not fields.get("meaning"):
        raise InputError(f"{path}: give 'name', and 'meaning', one sentence for reports")
    question = yes_no(
        fields.get("says", HARMFUL),
        _spellings(fields, "yes", path),
        _spellings(fields, "no", path),
        fields.get("lead", ""),
    )
    try:
        return Template(
            name=fields["name"],
            meaning=fields["meaning"],
            questions=(question,),
            text=fields.get("template"),
            messages=_messages(fields.get("messages", []), path),
            hub_id=fields.get("model", ""),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _spellings(fields: Mapping, name: str, path) -> tuple[str, ...]:
    given = fields.get(name)
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not given or not all(isinstance(t, str) for t in given):
        raise InputError(f"{path}: '{name}' must be a text, or a list of its spellings")
    return tuple(given)


def _messages(given, path) -> tuple[tuple[str, str], ...]:
    if not chat.are_messages(given):
        raise InputError(f"{path}: 'messages' must be a list with 'role' and 'content', both text")
    return tuple((message["role"], message["content"]) for message in given)
