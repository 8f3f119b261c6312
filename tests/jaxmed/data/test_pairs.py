"""Pairs are read as they are meant, or refused by one message that names file and line."""

import json

import pytest

from jaxmed.data import pairs as pairs_lib
from jaxmed.data import splits as splits_lib
from jaxmed.data.tokens import Encoder
from jaxmed.files import reading
from tests import words
from tests.words import ids


@pytest.fixture(scope="module")
def tokenizer():
    return words.tokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes a file of lines: objects, or text and bytes as they stand."""

    def write_lines(*lines):
        encoded = [
            line if isinstance(line, bytes) else
            line.encode() if isinstance(line, str) else
            json.dumps(line).encode()
            for line in lines
        ]  # fmt: skip
        file = tmp_path / "pairs.jsonl"
        file.write_bytes(b"\n".join(encoded))
        return file

    return write_lines


def in_ids(**fields):
    """A line that is in order, but for the given fields; None removes one."""
    line = {"prompt_ids": [5, 6], "counterfactual_ids": [7]} | fields
    return {name: value for name, value in line.items() if value is not None}


def in_text(**fields):
    return {"prompt": "tell me", "counterfactual": "why not"} | fields


# What is read.


def test_fields_that_look_misspelt_are_told(write):
    line = in_text(harmfull_response="me", lable="harmful", note="x", prompt_id=3, Split="A")
    file, told = write(line, in_text(harmfull_response="me")), []
    pairs_lib.read_encoded(file, Encoder(words.tokenizer()), say=told.append)
    assert told == [
        f"{file}:1: its field '{name}' is not read: did you mean '{meant}'? (in {lines} of its "
        "lines)"
        for name, meant, lines in (
            ("harmfull_response", "harmful_response", 2),
            ("lable", "label", 1),
            ("Split", "split", 1),
        )
    ]
    with pytest.warns(UserWarning, match="did you mean 'harmful_response'"):
        pairs_lib.read(file, words.tokenizer())


def test_a_field_that_is_missing_since_it_is_misspelt_is_named(write, tokenizer):
    file = write({"prompt": "tell me", "counterfactal": "why not"})
    with pytest.raises(reading.DataError) as error:
        pairs_lib.read(file, tokenizer)
    assert str(error.value) == (
        f"{file}:1: pair '1' has no counterfactual (field 'counterfactual' or "
        "'counterfactual_ids'); its field 'counterfactal' is not read: did you mean "
        "'counterfactual'?"
    )


def test_token_ids_and_every_field_are_read(write):
    everything = in_ids(
        id="x",
        harmful_ids=[1, 2],
        safe_ids=[3],
        prompt_span=[0, 2],
        counterfactual_span=[0, 1],
        label="harmful",
        category="c",
        source="s",
        split="B",
        base="b",
    )
    file = write(everything)
    (pair,) = pairs_lib.read(file)
    assert pair == pairs_lib.Pair(
        id="x",
        prompt_ids=(5, 6),
        counterfactual_ids=(7,),
        harmful_ids=(1, 2),
        safe_ids=(3,),
        prompt_span=(0, 2),
        counterfactual_span=(0, 1),
        label="harmful",
        category="c",
        source="s",
        split="B",
        where=f"{file}:1",
        base_id="b",
    )


def test_a_pair_is_its_own_base_unless_it_names_another(write):
    pairs = pairs_lib.read(write(in_ids(id="x"), in_ids(id="y", base="x"), in_ids(base="")))
    assert [pair.base for pair in pairs] == ["x", "x", "3"]
    assert pairs_lib.Pair("z", (1,), (2,)).base == "z"


def test_text_is_tokenised_with_special_tokens_and_answers_without(write, tokenizer):
    (pair,) = pairs_lib.read(
        write(in_text(harmful_response="yes do it", safe_response="no")), tokenizer
    )
    assert pair.prompt_ids == ids("[BOS] tell me")
    assert pair.counterfactual_ids == ids("[BOS] why not")
    assert (pair.harmful_ids, pair.safe_ids) == (ids("yes do it"), ids("no"))
    assert (pair.prompt_text, pair.counterfactual_text) == ("tell me", "why not")
    assert not pair.is_chat


def test_messages_go_through_the_chat_template_with_a_single_bos(write, tokenizer):
    messages = [{"role": "user", "content": "tell me"}]
    (pair,) = pairs_lib.read(write(in_text(prompt=messages)), tokenizer)
    assert pair.prompt_ids == ids("[BOS] [USER] tell me [END] [BOT]")
    assert pair.counterfactual_ids == ids("[BOS] why not")  # text stays text
    assert pair.is_chat


def test_chat_wraps_prompts_but_not_answers(write, tokenizer):
    (pair,) = pairs_lib.read(write(in_text(safe_response="no")), tokenizer, chat=True)
    assert pair.prompt_ids == ids("[BOS] [USER] tell me [END] [BOT]")
    assert pair.counterfactual_ids == ids("[BOS] [USER] why not [END] [BOT]")
    assert pair.safe_ids == ids("no")
    assert pair.is_chat


def test_text_and_ids_may_be_mixed_in_a_line(write, tokenizer):
    line = {"prompt": "tell me", "counterfactual_ids": [9], "safe_ids": [2]}
    (pair,) = pairs_lib.read(write(line), tokenizer)
    assert (pair.prompt_ids, pair.counterfactual_ids) == (ids("[BOS] tell me"), (9,))
    assert pair.counterfactual_text is None


def test_blank_lines_are_passed_over_and_still_counted(write):
    pairs = pairs_lib.read(write(in_ids(), "", "  \t", in_ids()))
    assert [pair.where.rpartition(":")[2] for pair in pairs] == ["1", "4"]


@pytest.mark.parametrize("absent", [{}, {"id": None}])
def test_the_id_is_the_number_of_the_line_unless_given(write, absent):
    unnamed = json.dumps({"prompt_ids": [5], "counterfactual_ids": [7]} | absent)
    pairs = pairs_lib.read(write(unnamed, in_ids(id=17), unnamed))
    assert [pair.id for pair in pairs] == ["1", "17", "3"]


def test_null_is_the_same_as_absent(write):
    nothing = dict.fromkeys(("prompt", "safe_ids", "prompt_span", "label", "split"))
    (pair,) = pairs_lib.read(write(json.dumps(in_ids() | nothing)))
    assert (pair.safe_ids, pair.prompt_span, pair.label) == ((), None, "")


def test_windows_line_ends_and_a_byte_order_mark_are_no_harm(write):
    line = json.dumps(in_ids()).encode()
    pairs = pairs_lib.read(write(b"\xef\xbb\xbf" + line + b"\r", line + b"\r"))
    assert [pair.id for pair in pairs] == ["1", "2"]


def test_text_beyond_ascii_is_read(write, tokenizer):
    (pair,) = pairs_lib.read(
        write(json.dumps(in_text(prompt="é 😀"), ensure_ascii=False)), tokenizer
    )
    assert pair.prompt_text == "é 😀"


def test_a_split_is_the_hash_of_the_id_and_never_moves(write):
    lines = [in_ids(id=f"pair {index}") for index in range(60)]
    splits = {pair.id: pair.split for pair in pairs_lib.read(write(*lines))}
    assert (
        pairs_lib.read(write(*lines[10:]))[0].split == splits["pair 10"]
    )  # whatever else is there
    # First byte of SHA-256 of the id, modulo 3; results of earlier runs rely on it.
    assert [splits[f"pair {index}"] for index in range(6)] == ["A", "A", "A", "C", "C", "B"]
    assert all(list(splits.values()).count(split) > 10 for split in splits_lib.SPLITS)


def test_a_file_at_home(write, monkeypatch):
    file = write(in_ids(id="mine"))
    monkeypatch.setenv("HOME", str(file.parent))
    assert [pair.id for pair in pairs_lib.read(f"~/{file.name}")] == ["mine"]


# What is refused.

BAD_LINES = {
    "not JSON": ('{"prompt_ids": [1', "not JSON", "column 18"),
    "not an object": ("[1, 2]", "expected a JSON object", "list"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8", "byte 8"),
    "half a surrogate pair": ('{"id": "\\ud800"}', "surrogate"),
    "a number that is too long": ("1" * 5000, "JSON"),
    "brackets that are too deep": ("[" * 100_000, "JSON"),
    "no prompt": (in_ids(prompt_ids=None), "pair '2' has no prompt", "'prompt_ids'"),
    "an empty prompt": (in_ids(prompt_ids=[]), "pair '2' has an empty prompt"),
    "no counterfactual": (in_ids(counterfactual_ids=None), "no counterfactual"),
    "an empty counterfactual": (in_ids(counterfactual_ids=[]), "an empty counterfactual"),
    "text without tokenizer": (in_ids(safe_response="no"), "no tokenizer", "'safe_ids'"),
    "text and ids": (in_ids(prompt="a"), "both 'prompt' and 'prompt_ids'"),
    "a negative id": (in_ids(prompt_ids=[1, -1]), "'prompt_ids' must be a list of token ids"),
    "a bool as id": (in_ids(counterfactual_ids=[True]), "'counterfactual_ids' must be"),
    "a float as id": (in_ids(safe_ids=[1.0]), "'safe_ids' must be"),
    "ids as text": (in_ids(harmful_ids="12"), "'harmful_ids' must be"),
    "an unknown split": (in_ids(split="D"), "split is 'D'", "A, B, C"),
    "an empty span": (in_ids(prompt_span=[1, 1]), "'prompt_span' must be [start, stop]"),
    "a negative span": (in_ids(prompt_span=[-1, 1]), "'prompt_span' must be"),
    "a span of one number": (in_ids(counterfactual_span=[1]), "'counterfactual_span' must be"),
    "a span of floats": (in_ids(prompt_span=[0.0, 1.0]), "'prompt_span' must be"),
    "a span as text": (in_ids(prompt_span="01"), "'prompt_span' must be"),
    "a context": (in_ids(context="a"), "has 'context', a part of what is asked that would be left"),
    "an id that was used": (in_ids(id="first"), "id 'first' was used before", "pairs.jsonl:1"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_line_is_refused_by_file_and_line(fault, write):
    line, *said = BAD_LINES[fault]
    file = write(in_ids(id="first"), line)
    with pytest.raises(reading.DataError) as caught:
        pairs_lib.read(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:2: ") and "\n" not in message
    assert all(part in message for part in said), message


BAD_TEXTS = {
    "an empty prompt": (in_text(prompt=""), "an empty prompt"),  # the tokenizer would add a BOS
    "no messages": (in_text(prompt=[]), "an empty prompt"),
    "a number": (in_text(prompt=5), "'prompt' must be text or a list of messages"),
    "a list of texts": (in_text(counterfactual=["a"]), "'counterfactual' must be text or a list"),
    "a message without role": (in_text(prompt=[{"content": "a"}]), "'role' and 'content'"),
    "a message without text": (in_text(prompt=[{"role": "user", "content": None}]), "both text"),
    "a message of a number": (in_text(prompt=[{"role": "user", "content": 5}]), "both text"),
    "what the template refuses": (
        in_text(prompt=[{"role": "system", "content": "a"}]),
        "the chat template of the tokenizer refuses 'prompt': no system role",
    ),
    "an answer of messages": (in_text(safe_response=[]), "'safe_response' must be text"),
}


@pytest.mark.parametrize("fault", BAD_TEXTS)
def test_bad_text_is_refused_by_file_and_line(fault, write, tokenizer):
    line, said = BAD_TEXTS[fault]
    file = write(line)
    with pytest.raises(reading.DataError) as caught:
        pairs_lib.read(file, tokenizer)
    assert str(caught.value).startswith(f"{file}:1: ") and said in str(caught.value)


def test_an_empty_prompt_is_refused_as_a_chat_too(write, tokenizer):
    with pytest.raises(reading.DataError, match="an empty counterfactual"):
        pairs_lib.read(write(in_text(counterfactual="")), tokenizer, chat=True)


def test_a_chat_needs_a_chat_template(write):
    plain = words.tokenizer(chat_template=None)
    with pytest.raises(reading.DataError, match="1: 'prompt' cannot be .* no chat template"):
        pairs_lib.read(write(in_text()), plain, chat=True)


LOOP = "{{% for m in messages %}} [USER] {} [END]{{% endfor %}}"
BAD_TEMPLATES = {
    "drops every prompt": (" [USER] tell", "drops or alters 'prompt'"),
    "alters it": (LOOP.format("{{ m.content | upper }}"), "drops or alters 'prompt'"),
    "cuts it": (LOOP.format("{{ m.content[:4] }}"), "drops or alters 'prompt'"),
    "keeps the last": (" [USER] {{ messages[-1].content }}", "drops or alters 'prompt'"),
    "is of other messages": (LOOP.format("{{ m.images | length + 'a' }}"), "refuses 'prompt': "),
    "is no template": ("{% for %}", "refuses 'prompt': "),
    "asks what is not there": (LOOP.format("{{ m.parts[0].text }}"), "refuses 'prompt': 'dict obj"),
}
SEVERAL = [
    {"role": "user", "content": "tell me"},
    {"role": "assistant", "content": "why"},
    {"role": "user", "content": "tell me"},
]


@pytest.mark.parametrize("fault", BAD_TEMPLATES)
def test_a_chat_template_that_loses_the_prompt_is_refused(fault, write):
    template, said = BAD_TEMPLATES[fault]
    file = write(in_text(prompt=SEVERAL))
    with pytest.raises(reading.DataError) as caught:
        pairs_lib.read(file, words.tokenizer(template))
    assert str(caught.value).startswith(f"{file}:1: the chat template of the tokenizer {said}")


def test_a_chat_template_may_strip_what_it_shows_and_drop_what_the_user_did_not_say(write):
    stripping = LOOP.format("{{ m.content | trim if m.role == 'user' }}")
    line = in_text(prompt=[SEVERAL[0] | {"content": " tell me\n"}, *SEVERAL[1:]])
    (pair,) = pairs_lib.read(write(line), words.tokenizer(stripping))
    assert pair.prompt_ids == ids("[USER] tell me [END] [USER] [END] [USER] tell me [END]")


def test_a_chat_template_that_takes_only_parts_gets_parts(write):
    for part in ("{{ m.content[0]['text'] }}", "{{ '' + m.content[0].text }}"):
        (pair,) = pairs_lib.read(write(in_text(prompt=SEVERAL)), words.tokenizer(LOOP.format(part)))
        assert pair.prompt_ids == ids("[USER] tell me [END] [USER] why [END] [USER] tell me [END]")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(reading.DataError, match="gone.jsonl: there is no such file"):
        pairs_lib.read(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_a_file_without_pairs_is_refused(lines, write):
    file = write(*lines)
    with pytest.raises(reading.DataError, match="holds no pairs") as caught:
        pairs_lib.read(file)
    assert str(file) in str(caught.value)


def test_on_bad_is_told_of_bad_lines_and_the_rest_is_read(write):
    told = []
    lines = [in_ids(id="a"), "{", in_ids(id="a"), in_ids(prompt_ids=[]), in_ids(id="b")]
    pairs = pairs_lib.read(write(*lines), on_bad=told.append)
    assert [pair.id for pair in pairs] == ["a", "b"]
    assert [str(error).partition(": ")[0].rpartition(":")[2] for error in told] == ["2", "3", "4"]


def test_only_bad_lines_are_no_pairs(write):
    told = []
    with pytest.raises(reading.DataError, match="holds no pairs"):
        pairs_lib.read(write("{", "["), on_bad=told.append)
    assert len(told) == 2
