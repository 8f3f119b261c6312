"""What programs share that ask prompts: every setting, prompt and judge that cannot be used."""

import dataclasses
import json
import pathlib

import pytest

from jaxmed.behaviour import responses
from jaxmed.behaviour.answering import AnsweringModel
from jaxmed.behaviour.judges.rules import FirstTokens, RefusalPhrases
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data.tokens import Encoder
from jaxmed.files import reading
from jaxmed.files.reading import DataError
from jaxmed.runs import asking, loading, sweep
from jaxmed.runs.asking import AnswerSettings
from jaxmed.runs.settings import like
from models import checkpoint
from models.errors import InputError
from tests import chats, tiny, words

WITH_TOKENS = {"judge": ("tokens",), "comply_tokens": ("id:1",), "refuse_tokens": ("id:2",)}


def settings(prompts=("prompts.jsonl",), **fields):
    fields = {"max_tokens": 4} | fields
    return AnswerSettings(model="model", out="out", prompts=tuple(map(str, prompts)), **fields)


@pytest.fixture(scope="module")
def model():
    decoder = tiny.decoder(num_layers=2, hidden_size=16, vocab_size=len(words.WORDS))
    return AnsweringModel(
        pathlib.Path("model"), decoder, Encoder(words.tokenizer()), frozenset({3})
    )


@pytest.fixture(scope="module")
def chatting(model):
    return dataclasses.replace(model, encoder=Encoder(words.tokenizer(), chat=True))


@pytest.fixture(scope="module")
def without_text(model):
    return dataclasses.replace(model, encoder=Encoder())


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="prompts.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    return write


def read_prompts(asked, model, say=sweep.say):
    """The prompts of the files, as the model gets them."""
    return asking.as_asked(asked, asking.read_files(asked, say, judged=False), model, say)


# Settings.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "--dtype=int8: not one of , float16"),
        ({"samples": 0}, "--samples=0: must be a number, and at least 1"),
        ({"max_tokens": 0}, "--max_tokens=0: must be a number, and at least 1"),
        ({"temperature": float("nan")}, "--temperature=nan: must be a number, and at least 0"),
        ({"temperature": float("inf")}, "--temperature=inf: must be a number, and at least 0"),
        ({"top_p": 1.5}, "--top_p=1.5: must be a number, and at most 1"),
        ({"top_p": 0.0}, "--top_p=0.0: must be above 0"),
        ({"top_k": -1}, "--top_k=-1: must be a number, and at least 0"),
        ({"top_k": 2**31}, "--top_k=2147483648: must be a number, and at most 2147483647"),
        ({"seed": 2**32}, "--seed=4294967296: must be a number, and at most 4294967295"),
        ({"memory_gb": 0.0}, "--memory_gb=0.0: must be a number, and at least 0.001"),
        ({"prompts": ()}, "--prompts=FILE: name at least one file of prompts"),
        ({"judge": ()}, "--judge: name at least one of phrases, tokens"),
        ({"samples": 2}, "--samples=2 --temperature=0: the likeliest tokens are the same each"),
        ({"judge": ("tokens",)}, "--comply_tokens and --judge=tokens need each other"),
        ({"refuse_tokens": ("id:1",)}, "--refuse_tokens and --judge=tokens need each other"),
        (WITH_TOKENS | {"refuse_tokens": ()}, "--refuse_tokens and --judge=tokens need each other"),
        ({"cut": True}, "--cut: --judge=phrases reads responses of any length"),
        ({"judge": ("phrases=x",)}, "judge 'phrases=x': phrases runs no model: leave =x out"),
        ({"judge": ("harmbench=",)}, "judge 'harmbench=': names no checkpoint after the ="),
    ],
)
def test_settings_that_cannot_be_used(fields, message):
    with pytest.raises(InputError) as caught:
        asking.check(settings(**fields))
    assert str(caught.value).startswith(message)


def test_settings_that_can():
    asking.check(settings())
    asking.check(settings(samples=2, temperature=0.5, top_p=0.1, memory_gb=None, **WITH_TOKENS))
    asking.check(settings(judge=("phrases", "harmbench=x"), cut=True))


@dataclasses.dataclass(frozen=True)
class LongAnswers(AnswerSettings):
    max_tokens: int = like(AnswerSettings, "max_tokens", least=10)


def test_a_program_has_choices_and_bounds_of_its_own():
    with pytest.raises(InputError, match="--max_tokens=9: must be a number, and at least 10"):
        asking.check(LongAnswers("model", ("prompts.jsonl",), "out", max_tokens=9))


def test_how_tokens_are_chosen():
    asked = settings(max_tokens=5, temperature=0.5, top_p=0.9, top_k=7)
    assert asked.sampling == Sampling(5, 0.5, 0.9, 7)


# Prompts.


def test_prompts_of_several_files(model, write):
    harmful = write({"id": "a", "prompt": "tell me", "split": "B"}, name="a=b.jsonl")
    benign = write({"id": "b", "prompt_ids": [5, 6], "label": "benign", "split": "A"})
    found = read_prompts(settings([f"harmful={harmful}", benign]), model)
    assert [(one.prompt.id, one.prompt.label) for one in found] == [
        ("a", "harmful"), ("b", "benign"),
    ]  # fmt: skip
    assert [one.tokens for one in found] == [words.ids("[BOS] tell me"), (5, 6)]
    assert (
        responses.of_split(found, ["B"]) == found[:1] == responses.of_split(found, label="harmful")
    )
    assert responses.of_split(found, ["B"], "benign") == [] and responses.of_split(found) == found


def test_chat_wraps_text(model, chatting, write):
    file, said = write({"id": "a", "prompt": "how", "label": "benign"}), []
    [found] = read_prompts(settings([file]), chatting, said.append)
    assert found.tokens == words.ids("[BOS] [USER] how [END] [BOT]") and said == []
    [found] = read_prompts(settings([file]), model, said.append)
    assert found.tokens == words.ids("[BOS] how") and said == [loading.AS_IT_STANDS]


BAD_PROMPTS = {
    "text without tokenizer": (
        {"prompt": "how"}, {}, "'prompt' is text, but the checkpoint has no tokenizer; give",
    ),
    "outside the vocabulary": (
        {"prompt_ids": [1, 16]}, {},
        "prompt 'a' has the token 16, outside the vocabulary of 16",
    ),
    "too long": (
        {"prompt_ids": [1] * 60}, {"max_tokens": 5},
        "prompt 'a' has 60 tokens, which with --max_tokens=5 are more than the model's 64",
    ),
    "nothing to judge": (
        {"prompt_ids": [1]}, {"judge": ("phrases", "harmbench")},
        "prompt 'a' has no text of a user that could be judged",
    ),
    "nobody asks": (
        {"prompt": [{"role": "assistant", "content": "how"}]}, {},
        "prompt 'a' has no text of a user that could be judged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_prompts_that_cannot_be_used(case, model, without_text, write):
    row, fields, message = BAD_PROMPTS[case]
    asker = without_text if case == "text without tokenizer" else model
    bad = {"id": "a", "label": "harmful"} | row
    good = {"prompt": "how"} if asker is model else {"prompt_ids": [1]}
    file = write(bad, {"id": "b", "label": "harmful"} | good)
    with pytest.raises(DataError) as caught:
        read_prompts(settings([file], **fields), asker)
    assert str(caught.value).startswith(f"{file}:1: ") and message in str(caught.value)
    assert str(caught.value).endswith("(or leave such prompts out: --skip_bad_prompts)")
    said, asked = [], settings([file], skip_bad_prompts=True, **fields)
    assert [one.prompt.id for one in read_prompts(asked, asker, said.append)] == ["b"]
    assert said[0].startswith(f"Skipped: {file}:1: ") and message in said[0]
    assert said[1] == "Skipped 1 of 2 prompts"


def test_a_prompt_without_tokens(without_text):
    with pytest.raises(DataError, match="^this prompt has no tokens: a response needs one"):
        asking.check_tokens("this prompt", (), settings(), without_text)


def test_ids_that_two_files_use(model, write):
    files = [
        write({"id": 1, "prompt_ids": [1], "label": "benign"}, name=f"{n}.jsonl") for n in "ab"
    ]
    with pytest.raises(DataError) as caught:
        read_prompts(settings(files), model)
    message = f"{files[1]}:1: id '1' was used before, by {files[0]}:1; give one of them another id"
    assert str(caught.value).startswith(message)
    assert "--prompts=NAME:LABEL=FILE" in str(caught.value)


def test_files_that_number_their_prompts_alike_may_be_told_apart(model, write):
    alpaca = [write({"instruction": text}, name=f"{text}.jsonl") for text in ("how", "why")]
    rows = [{"prompt_ids": [4]}, {"prompt_ids": [5], "id": "x"}]
    own = write(*(row | {"label": "creative"} for row in rows), name="own:a=b.jsonl")
    asked = [f"harmful={alpaca[0]}", f"test:harmful={alpaca[1]}", f"c:={own}"]
    found = read_prompts(settings(asked), model)
    assert [(one.prompt.id, one.prompt.label) for one in found] == [
        ("alpaca-harmful-1", "harmful"), ("test-harmful-1", "harmful"), ("c-1", "creative"),
        ("c-x", "creative"),
    ]  # fmt: skip
    alone = read_prompts(settings([own]), model)
    assert [(one.prompt.id, one.prompt.source) for one in alone] == [("1", ""), ("x", "")]


def test_a_prompt_counts_once(chatting, write):
    """Under another id it would be in two splits, or narrow an interval."""
    rows = [{"id": 1, "prompt": "tell me"}, {"id": 2, "prompt": " Tell  ME "}]
    rows += [{"id": 3, "prompt_ids": [5]}, {"id": 4, "prompt_ids": [5]}, {"id": 5, "prompt": "why"}]
    file, said = write(*(row | {"label": "benign"} for row in rows)), []
    found = read_prompts(settings([file]), chatting, said.append)
    assert [one.prompt.id for one in found] == ["1", "3", "5"]
    [message] = said
    assert message.startswith("2 prompts are the same as others before them and are left out, the")
    assert f"{file}:2: each counts once" in message


def test_a_prompt_that_stands_twice_has_the_counterfactuals_of_both(model, write):
    rows = [{"prompt": "tell me", "counterfactual": ["why", "how"]}, {"prompt": "tell me"}]
    rows += [{"prompt": "Tell me", "counterfactual": ["how", "no"]}]
    file = write(*({"id": n, "label": "benign"} | row for n, row in enumerate(rows)))
    [one] = read_prompts(settings([file]), model, lambda text: None)
    assert one.prompt.counterfactuals == ("why", "how", "no")


def test_the_same_prompt_has_one_label(model, write):
    harmful = write({"id": "a", "prompt": "tell me"}, name="a.jsonl")
    benign = write({"id": "b", "prompt": "tell  me"}, {"id": "c", "prompt": "why"}, name="b.jsonl")
    files, said = [f"harmful={harmful}", f"benign={benign}"], []
    message = f"{benign}:1: prompt 'b' is benign, and the same prompt is harmful at {harmful}:1"
    with pytest.raises(DataError) as caught:
        read_prompts(settings(files), model)
    assert str(caught.value).startswith(message)
    asked = settings(files, skip_bad_prompts=True)
    found = read_prompts(asked, model, said.append)
    assert [one.prompt.id for one in found] == ["a", "c"] and said[0] == f"Skipped: {message}"


def test_text_and_messages_of_the_same_tokens_are_the_same_prompt(chatting, write):
    chat = [{"role": "user", "content": "tell me"}]
    rows = [{"id": "a", "prompt": chat}, {"id": "b", "prompt": "tell me"}]
    file = write(*(row | {"label": "benign"} for row in rows))
    found = read_prompts(settings([file]), chatting, lambda text: None)
    assert [one.prompt.id for one in found] == ["a"]


def test_nothing_is_left(model, write):
    file = write({"id": "a", "prompt_ids": [99], "label": "benign"})
    with pytest.raises(DataError, match="prompts.jsonl: not one prompt can be used"):
        read_prompts(settings([file], skip_bad_prompts=True), model, lambda text: None)


# Judges.


def test_judges_that_are_asked_for(model):
    asked = settings(
        judge=("tokens", "phrases"), comply_tokens=("yes", "id:1"), refuse_tokens=("no",)
    )
    yes, no = words.ids("yes no")
    assert asking.read_judges(asked, model, []) == [FirstTokens((yes, 1), (no,)), RefusalPhrases()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"judge": ("nobody",)}, "judge 'nobody': not one of phrases"),
        ({"judge": ("nobody=x",)}, "judge 'nobody': not one of phrases"),
        ({"judge": ("strongreject",)}, "judge 'strongreject': needs its text"),
        ({"judge": ("llama-guard=/nowhere",)}, "/nowhere: no such folder"),
        ({"judge_template": ("phrases",)}, "judge_template 'phrases': must be NAME=FILE"),
        ({"judge_template": ("wildguard=x",)}, "judge_template 'wildguard=x': no judge wildguard"),
        ({"judge": ("/no/own.json=x",)}, "/no/own.json: there is no such file"),
        (WITH_TOKENS | {"comply_tokens": ("id:99",)}, "--comply_tokens=id:99: token id outside"),
        (WITH_TOKENS | {"comply_tokens": ("id:2",)}, "judge 'tokens': [2] cannot both comply and"),
    ],
)
def test_judges_that_cannot_be_used(fields, message, model):
    with pytest.raises(InputError) as caught:
        asking.read_judges(settings(**fields), model, [])
    assert str(caught.value).startswith(message)


def test_what_judges_read_must_be_there(without_text):
    with pytest.raises(InputError, match="--judge=phrases: reads text, but model has no tokenizer"):
        asking.read_judges(settings(), without_text, [])
    asked = settings(judge=("tokens",), comply_tokens=("yes",), refuse_tokens=("id:2",))
    with pytest.raises(InputError, match="--comply_tokens=yes: the checkpoint has no tokenizer"):
        asking.read_judges(asked, without_text, [])


# What the checkpoint's files say of generation.


@pytest.fixture
def checkpoint_folder(tmp_path):
    """A function that writes a checkpoint with this tokenizer and generation_config.json."""

    def make(tokenizer, generation):
        decoder = tiny.decoder(num_layers=2, hidden_size=16, vocab_size=700)
        folder = tmp_path / "model"
        checkpoint.save(decoder, folder, tokenizer=tokenizer)
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return make


def test_what_is_asked_of_generation_and_not_done_is_told_and_recorded(
    checkpoint_folder, monkeypatch
):
    tokenizer = chats.byte_level(chats.CHAT_ML)
    folder, said = checkpoint_folder(tokenizer, {"repetition_penalty": 1.3}), []
    asked = dataclasses.replace(settings(judge=("phrases",)), model=str(folder))
    read, object_in = [], reading.object_in
    monkeypatch.setattr(
        reading, "object_in", lambda path, *rest: read.append(path.name) or object_in(path, *rest)
    )
    model = asking.load(asked, said.append)
    assert read.count("generation_config.json") == 1
    assert said == [
        f"{folder} asks for generation with repetition_penalty=1.3; responses here do without: "
        "they are of the model's own logits, as the flags say",
        f"The chat template of {folder} ends an answer with <|im_end|>, which no file names as "
        "what ends a response: --stop_tokens='<|im_end|>' does",
    ]
    run = asking.described(asked, "respond", model, [], [])
    assert run["generation_not_followed"] == {"repetition_penalty": 1.3}
    assert run["stop_tokens"] == [1] and run["tokenisation"] == {}
    said.clear()
    both = dataclasses.replace(asked, stop_tokens=("<|im_end|>", "id:9"))
    assert asking.load(both, said.append).stop == {1, 3, 9} and len(said) == 1
    with pytest.raises(InputError, match="--stop_tokens=I will: is 2 tokens of this tokenizer"):
        asking.load(dataclasses.replace(asked, stop_tokens=("I will",)), said.append)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"date": "31.1.2026"}, "--date=31.1.2026: must be a day, as 2026-01-31"),
        ({"template_args": "{"}, "--template_args={: not JSON"),
        ({"template_args": "[1]"}, "--template_args=[1]: must be a JSON object"),
        (
            {"template_args": '{"enable_thinkin": false}'},
            "--template_args: the chat template of the tokenizer reads no 'enable_thinkin'",
        ),
    ],
)
def test_what_no_template_reads_is_refused(fields, message):
    given = {"chat": True, "date": "", "template_args": ""} | fields
    with pytest.raises(InputError) as caught:
        loading.encoder(chats.byte_level(chats.CHAT_ML), **given)
    assert str(caught.value).startswith(message)
