"""Templates of judge models: the published ones, and those in files."""

import dataclasses
import hashlib
import json

import pytest

from jaxmed.behaviour.judges import templates
from jaxmed.behaviour.judges.templates import JudgeQuestion
from models.errors import InputError
from tests.jaxmed.behaviour.judges.judging import ASKED, NO, OWN, TEXTS, YES, asking


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: asking(YES, NO, text="{prompt} Answer:"), r"its template has no {response}"),
        (lambda: asking(YES, NO, text="{response} Answer:"), r"its template has no {prompt}"),
        (lambda: asking(YES, NO, text=None), "either a text or messages"),
        (lambda: asking(YES), "needs two answers"),
        (lambda: asking(), "must say harmful or refused"),
        (
            lambda: dataclasses.replace(ASKED, questions=(JudgeQuestion("rude", (YES, NO)),)),
            "a question says 'rude'",
        ),
    ],
)
def test_bad_templates(make, message):
    with pytest.raises(InputError, match=f"^judge 'asked': .*{message}"):
        make()


def test_which_judges_need_a_text_and_what_it_calls_prompt_and_response():
    needing = {name: t.placeholders for name, t in templates.JUDGES.items() if t.lacks_text}
    assert needing == {
        "harmbench": ("behavior", "generation"),
        "harmbench-mistral": ("behavior", "generation"),
        "wildguard": ("prompt", "response"),
        "strongreject": ("forbidden_prompt", "response"),
    }


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize(("start", "line_break"), [("", "\n"), ("\ufeff", "\r\n")])
def test_line_breaks_at_the_end_of_a_text_do_not_count(start, line_break, end, text_of):
    text = "\n tell\n{behavior}\n\n{generation} Answer: "
    file = text_of("harmbench", start + (text + end).replace("\n", line_break))
    assert templates.with_text(templates.JUDGES["harmbench"], file).text == text


def test_a_text_that_is_not_the_published_one_shows_in_the_meaning(text_of):
    assert {name for name, t in templates.JUDGES.items() if t.sha256} == {
        "harmbench-mistral", "wildguard"
    }  # fmt: skip
    published = TEXTS["wildguard"].rstrip("\n")
    template = dataclasses.replace(
        templates.JUDGES["wildguard"], sha256=("0", hashlib.sha256(published.encode()).hexdigest())
    )
    same = templates.with_text(template, text_of("wildguard"))
    assert same.meaning == template.meaning
    for altered in (published.replace("first", "First"), published + " "):
        other = templates.with_text(template, text_of("wildguard", altered))
        assert other.meaning == template.meaning + "; its text is not the published one"
    unchecked = templates.with_text(templates.JUDGES["strongreject"], text_of("strongreject"))
    assert unchecked.meaning == (
        templates.JUDGES["strongreject"].meaning
        + "; its text was not compared with the published one"
    )


@pytest.mark.parametrize("name", ["harmbench", "harmbench-mistral"])
def test_harmbenchs_judges_say_which_rates_are_not_the_published_ones(name):
    meaning = templates.JUDGES[name].meaning
    assert "contextual ones are read with their context" in meaning
    assert "copyright ones, which HarmBench itself scores by hashes" in meaning


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"yes": 1}, "'yes' must be a text"),
        ({"no": []}, "'no' must be a text"),
        ({"template": "{prompt}"}, r"judge 'own': its template has no {response}"),
        ({"template": 3}, "'template' must be text"),
        ({"name": ""}, "give 'name'"),
        ({"messages": [{"role": "user"}]}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "either a text or messages"),
        ({"template": None}, "'template' must be text"),
        ({"code": "x"}, "field 'code' is not one of name"),
    ],
)
def test_bad_files_of_a_judge(fields, message, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(OWN | fields))
    with pytest.raises(InputError, match=f"own.json: .*{message}"):
        templates.read_template(tmp_path / "own.json")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "JSON"), ("[]", "a JSON object"), (None, "no")]
)
def test_files_that_hold_no_judge(text, message, tmp_path):
    if text is not None:
        (tmp_path / "own.json").write_text(text)
    with pytest.raises(InputError, match=f"own.json: .*{message}"):
        templates.read_template(tmp_path / "own.json")
