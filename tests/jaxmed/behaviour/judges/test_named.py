"""Judges by name, and what of these cannot be used."""

import json

import pytest

from jaxmed.behaviour.judges import named, templates
from models import checkpoint
from models.errors import InputError
from tests import tiny
from tests.jaxmed.behaviour.judges.judging import (
    ASKED,
    EXCHANGES,
    OWN,
    TEXTS,
    filled,
    judge,
    share,
    tokenizer,
)


def test_a_checkpoint_without_tokenizer(tmp_path):
    tiny.save(tmp_path / "model", num_layers=2, hidden_size=16)
    with pytest.raises(InputError, match=f"'llama-guard': {tmp_path}/model has no tokenizer"):
        named.judge("llama-guard", model=tmp_path / "model")


def test_an_unknown_judge():
    for template in (None, "a.txt"):
        with pytest.raises(InputError, match="'nobody': not one of phrases, tokens, harmbench"):
            named.judge("nobody", template=template)


@pytest.mark.parametrize("name", TEXTS)
def test_a_judge_without_its_text(name, decoder):
    message = rf"^judge '{name}': needs its text.*\({templates.JUDGES[name].source[:20]}.*"
    message += f"judge_template, {name}=FILE"
    with pytest.raises(InputError, match=message):
        named.judge(name, model="/nowhere")
    with pytest.raises(InputError, match=message):
        judge(decoder, templates.JUDGES[name])


@pytest.mark.parametrize("name", ["phrases", "tokens", "llama-guard", "own.json"])
def test_a_judge_that_takes_no_text(name):
    message = f"^judge '{name}': takes no text from a file, as harmbench, .*: leave a.txt out"
    with pytest.raises(InputError, match=message):
        named.judge(name, template="a.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{behavior} {response}", "judge 'harmbench': its template has no {generation}; save"),
        (b"{prompt} {generation}", "judge 'harmbench': its template has no {behavior}; save"),
        (b"\n", "judge 'harmbench': its template has no {behavior}"),
        (b"\xff{behavior} {generation}", "not UTF-8 text .byte 0.: save"),
        (None, "there is no such file"),
    ],
)
def test_files_that_hold_no_text_of_a_judge(text, message, tmp_path):
    if text is not None:
        (tmp_path / "text.txt").write_bytes(text)
    with pytest.raises(InputError, match=f"^{tmp_path}/text.txt: {message}"):
        named.judge("harmbench", template=tmp_path / "text.txt")


def test_a_text_is_no_folder_and_no_json(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}: is a folder"):
        named.judge("harmbench", template=tmp_path)
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    with pytest.raises(InputError, match="own.json: judge 'harmbench' reads its text as it is"):
        named.judge("harmbench", template=str(tmp_path / "own.json"))


@pytest.mark.usefixtures("any_mass")
def test_a_judge_of_ones_own_is_a_json_file(tmp_path, decoder):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(OWN | {"says": "refused"}))
    checkpoint.save(decoder, tmp_path / "model", tokenizer=tokenizer())
    own = named.judge(str(file), model=tmp_path / "model")
    assert (own.name, own.meaning) == ("own", "whether it says yes")
    (verdict,) = own(EXCHANGES[:1])
    p = share(decoder, filled(ASKED.text, EXCHANGES[0]), ["yes", "no", "not"])
    assert verdict.refused == pytest.approx(p[0], abs=1e-5) and verdict.harmful is None
    with pytest.raises(InputError, match="'own': give its checkpoint"):
        named.judge(str(file))


def test_a_judge_without_a_published_checkpoint(text_of):
    with pytest.raises(InputError, match="'strongreject': give its checkpoint"):
        named.judge("strongreject", template=text_of("strongreject"))


@pytest.mark.parametrize(
    ("given", "name", "folder"),
    [
        ("phrases", "phrases", ""),
        ("harmbench=org/name", "harmbench", "org/name"),
        ("harmbench=/a=b/c", "harmbench", "/a=b/c"),
        ("/a=b/own.json", "/a=b/own.json", ""),
        ("/a=b/own.json=/c=d", "/a=b/own.json", "/c=d"),
    ],
)
def test_a_judge_and_its_checkpoint(given, name, folder):
    assert named.name_and_checkpoint(given) == (name, folder)
