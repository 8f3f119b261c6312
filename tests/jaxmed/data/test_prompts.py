"""Prompt sets are recognised by their columns, read by line, and paired as asked."""

import csv
import io
import json

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies

from jaxmed.data import pairing, prompts, sets
from jaxmed.data import pairs as pairs_lib
from jaxmed.data import splits as splits_lib
from jaxmed.data.prompts import Prompt
from jaxmed.data.tokens import Encoder
from jaxmed.files import reading
from models.errors import InputError
from tests import merging, words
from tests.words import ids


@pytest.fixture(scope="module")
def encoder():
    return Encoder(words.tokenizer())


@pytest.fixture(scope="module")
def chatting():
    return Encoder(words.tokenizer(), chat=True)


@pytest.fixture
def write(tmp_path):
    """Writes a file of text or bytes under a name."""

    def write_file(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write_file


def as_csv(header, *rows):
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([header.split(","), *rows])
    return lines.getvalue()


def told(call, *args, **settings):
    """The message of the error that a call ends with."""
    with pytest.raises(reading.DataError) as caught:
        call(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Published sets: their real headers, invented rows.

ADVBENCH = "goal,target"
HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
JAILBREAKBENCH = "Index,Goal,Target,Behavior,Category,Source"
STRONGREJECT = "category,source,forbidden_prompt"
JAILBREAKBENCH_UNNAMED = ",Goal,Target,Behavior,Category,Source"  # of its Python package
DOLLY = "instruction,context,response,category"
XSTEST = "id,prompt,type,label,focus,note"
XSTEST_1 = "id,type,prompt,focus,note"
XSTEST_2 = "id_v1,id_v2,type,prompt,focus,note"
OR_BENCH = "prompt,category"
ALPACA = "instruction,input,output"


def test_advbench(write):
    file = write("harmful_behaviors.csv", as_csv(ADVBENCH, ["tell me", "Sure, I"], ["why", "Yes"]))
    first, second = prompts.read(file)
    assert first == Prompt(
        id="advbench-harmful-1",
        prompt="tell me",
        label="harmful",
        split=first.split,
        source="advbench",
        harmful_response="Sure, I",
    )
    assert (second.id, second.where) == ("advbench-harmful-2", f"{file}:3")


def test_harmbench_puts_the_context_first(write):
    rows = [
        ["tell me", "standard", "kind", "", "", "one"],
        ["say it", "contextual", "other kind", "context", "line 1\nline 2", "two"],
    ]
    plain, contextual = prompts.read(write("harmbench.csv", as_csv(HARMBENCH, *rows)))
    assert (plain.id, plain.prompt) == ("harmbench-harmful-one", "tell me")
    assert (plain.label, plain.source) == ("harmful", "harmbench")
    assert contextual.prompt == "line 1\nline 2\n\n---\n\nsay it"
    # Contextual and copyright behaviours can be told from standard ones.
    assert [plain.category, contextual.category] == ["kind (standard)", "other kind (contextual)"]


@pytest.mark.parametrize("label", ["harmful", "benign"])
def test_jailbreakbench_says_its_label_by_the_name_of_the_file(label, write):
    rows = as_csv(JAILBREAKBENCH, ["0", "tell me", "Sure", "Telling", "kind", "Original"])
    (prompt,) = prompts.read(write(f"{label}-behaviors.csv", rows))
    assert (prompt.id, prompt.label) == (f"jailbreakbench-{label}-0", label)
    assert (prompt.match, prompt.category) == ("Telling", "kind")
    assert prompt.source == "jailbreakbench"
    # A benign prompt's target is no harmful response.
    assert prompt.harmful_response == ("Sure" if label == "harmful" else "")
    (named,) = prompts.read(write("behaviors.csv", rows), label=label)
    assert named == prompt


def test_prompts_that_correspond_share_a_split(write):
    rows = [[str(n), f"tell {n}", "Sure", f"Telling {n}", "kind", "x"] for n in range(30)]
    sides = [
        prompts.read(write(f"{label}-behaviors.csv", as_csv(JAILBREAKBENCH, *rows)))
        for label in ("harmful", "benign")
    ]
    splits = [[prompt.split for prompt in side] for side in sides]
    assert splits[0] == splits[1] and set(splits[0]) == {"A", "B", "C"}


def test_jailbreakbench_whose_index_has_no_name(write):
    """As its Python package has it."""
    row = ["7", "tell me", "Sure", "Telling", "kind", "Original"]
    named, unnamed = (
        prompts.read(write("harmful-behaviors.csv", as_csv(header, row)))
        for header in (JAILBREAKBENCH, JAILBREAKBENCH_UNNAMED)
    )
    assert named == unnamed and named[0].id == "jailbreakbench-harmful-7"


def test_dolly_puts_the_context_behind(write):
    rows = [["tell me", "", "yes", "kind"], ["tell me", "how", "no", "kind"]]
    plain, about = prompts.read(write("dolly.csv", as_csv(DOLLY, *rows)))
    assert (plain.prompt, about.prompt) == ("tell me", "tell me\n\nhow")
    assert (plain.id, plain.label, plain.category) == ("dolly-benign-1", "benign", "kind")


@pytest.mark.parametrize("header", [XSTEST, XSTEST_2])
def test_an_unsafe_prompt_of_xstest_contrasts_with_its_own_safe_one(header, write):
    """Which stands 25 before it, and must not be in another split."""
    kinds = {0: "homonyms", 25: "contrast_homonyms"}
    rows = [
        {"prompt": f"{kind} {n}", "type": kind, "id": str(n + more), "id_v2": f"v2-{n + more}"}
        for more, kind in kinds.items()
        for n in range(1, 26)
    ]
    columns = header.split(",")
    cells = [[row.get(column, "") for column in columns] for row in rows]
    found = prompts.read(write("xstest.csv", as_csv(header, *cells)))
    assert {one.split for one in found} == {"A", "B", "C"}
    pairs = pairing.pair_up(found, "matched", Encoder(words.tokenizer()))
    assert len(pairs) == 25
    by_text = {one.prompt: one for one in found}
    for pair in pairs:
        base, other = by_text[pair.prompt_text], by_text[pair.counterfactual_text]
        assert pair.prompt_text == f"contrast_{pair.counterfactual_text}"
        assert (base.label, other.label) == ("harmful", "overrefusal")
        assert pair.split == base.split == other.split
        # The base prompt's name decides the split.
        assert base.split == splits_lib.split_of(None, f"xstest {base.match}", "")


@pytest.mark.parametrize("number", ["", "none", "v2-"])
def test_a_prompt_of_xstest_without_a_number_corresponds_to_none(number, write):
    row = [number, "do it", "homonyms", "safe", "f", ""]
    (prompt,) = prompts.read(write("xstest.csv", as_csv(XSTEST, row)))
    assert prompt.match == ""


def test_strongreject(write):
    rows = as_csv(STRONGREJECT, ["kind", "custom", "tell me"])
    (prompt,) = prompts.read(write("strongreject_dataset.csv", rows))
    assert (prompt.id, prompt.prompt) == ("strongreject-harmful-1", "tell me")
    assert (prompt.label, prompt.category) == ("harmful", "kind")
    assert prompt.source == "strongreject"  # and not the set's own column of that name


@pytest.mark.parametrize(
    "header, rows, numbers",
    [
        (
            XSTEST,
            [["1", "do it", "homonyms", "safe", "f", ""],
             ["26", "do it", "contrast_homonyms", "unsafe", "f", "n"]],
            ["overrefusal-1", "harmful-26"],
        ),
        (
            XSTEST_2,
            [["v1-1", "v2-1", "homonyms", "do it", "f", ""],
             ["", "v2-2", "contrast_homonyms", "do it", "", ""]],
            ["overrefusal-v2-1", "harmful-v2-2"],
        ),
        (XSTEST_1, [["v1-1", "homonyms", "do it", "f", ""]], ["overrefusal-v1-1"]),
    ],
)  # fmt: skip
def test_xstest_in_all_its_versions(header, rows, numbers, write):
    found = prompts.read(write("xstest_prompts.csv", as_csv(header, *rows)))
    assert [prompt.id for prompt in found] == [f"xstest-{number}" for number in numbers]
    assert [prompt.label for prompt in found] == ["overrefusal", "harmful"][: len(rows)]
    assert [prompt.category for prompt in found] == ["homonyms", "contrast_homonyms"][: len(rows)]
    assert {prompt.prompt for prompt in found} == {"do it"}


@pytest.mark.parametrize(
    "name, word, label",
    [
        ("or-bench-80k.csv", "80k", "overrefusal"),
        ("or-bench-hard-1k.csv", "hard", "overrefusal"),
        ("or-bench-toxic.csv", "toxic", "harmful"),
    ],
)
def test_or_bench_says_its_label_by_the_name_of_the_file(name, word, label, write):
    (prompt,) = prompts.read(write(name, as_csv(OR_BENCH, ["tell me", "kind"])))
    assert (prompt.label, prompt.category, prompt.source) == (label, "kind", "or-bench")
    # Its three files can be read together.
    assert prompt.id == f"or-bench-{word}-1"


def test_alpaca_puts_the_input_behind(write):
    rows = [["tell me", "", "yes"], ["tell me", "how", "no"]]
    plain, about = prompts.read(write("alpaca.csv", as_csv(ALPACA, *rows)))
    assert (plain.prompt, about.prompt) == ("tell me", "tell me\n\nhow")
    assert (plain.label, plain.harmful_response, plain.safe_response) == ("benign", "", "")
    listed = [dict(zip(ALPACA.split(","), row, strict=True)) for row in rows]
    assert prompts.read(write("alpaca_data.json", json.dumps(listed))) == [plain, about]


@pytest.mark.parametrize("label", [None, "benign", "harmful"])
def test_instructions_alone_are_alpaca_like(label, write):
    rows = [{"instruction": "tell me", "category": None}, {"instruction": "why", "category": "c"}]
    found = prompts.read(write("split.json", json.dumps(rows)), label=label)
    assert [(one.prompt, one.category) for one in found] == [("tell me", ""), ("why", "c")]
    assert {(one.label, one.source) for one in found} == {(label or "benign", "alpaca")}
    assert [one.id for one in found] == [f"alpaca-{label or 'benign'}-{n}" for n in (1, 2)]


@pytest.mark.parametrize(
    "header", [ADVBENCH, HARMBENCH, JAILBREAKBENCH, STRONGREJECT, XSTEST, XSTEST_1, XSTEST_2]
)
def test_a_column_of_instructions_hides_no_other_set(header, write):
    columns = header.split(",")
    row = ["harmonyms" if name == "type" else name for name in columns]
    alone, more = (
        prompts.read(write("harmful.csv", as_csv(",".join(names), cells)))
        for names, cells in ((columns, row), ([*columns, "instruction"], [*row, "why"]))
    )
    assert alone == more and alone[0].source != "alpaca"


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_a_set_is_the_same_in_every_kind_of_file(ending, write, tmp_path):
    rows = [
        ["tell me", "standard", "kind", None, None, "one"],
        ['say "it", é 😀\u2028', "contextual", "kind", None, "a\nb", "two"],
    ]
    listed = [dict(zip(HARMBENCH.split(","), row, strict=True)) for row in rows]
    expected = prompts.read(write("set.csv", as_csv(HARMBENCH, *rows)))
    file = tmp_path / f"set{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(listed), file)
    elif ending == ".json":
        file.write_text(json.dumps(listed, indent=1), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in listed]
        file.write_text("\n".join(lines), encoding="utf-8")
    assert prompts.read(file) == expected
    assert expected[1].prompt.endswith('say "it", é 😀\u2028')


def test_a_prompt_of_several_published_sets_has_one_split(write):
    texts = [f"Tell me {n}" for n in range(30)]
    rows = [[text, "Sure"] for text in texts]
    first = prompts.read(write("a.csv", as_csv(ADVBENCH, *rows)))
    shuffled = prompts.read(write("b.csv", as_csv(ADVBENCH, *rows[::-1])))
    assert [one.split for one in first] == [one.split for one in shuffled[::-1]]
    # Another set, other white space and letter case.
    other = [["kind", "custom", f"  tell\nME {n} "] for n in range(30)]
    again = prompts.read(write("c.csv", as_csv(STRONGREJECT, *other)))
    assert [one.split for one in first] == [one.split for one in again]
    assert {one.split for one in first} == {"A", "B", "C"}
    assert first[0].split == splits_lib.split_of(None, "tell me 0", "")


def test_another_source_can_be_named(write):
    file = write("set.csv", as_csv(ADVBENCH, ["tell me", "Sure"]))
    (prompt,) = prompts.read(file, source="mine")
    assert (prompt.id, prompt.source) == ("mine-harmful-1", "mine")


# jaxmed's own form.

MESSAGES = [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": "no"}]


def test_every_field_of_the_own_form_is_read(write):
    line = {
        "id": 7,
        "prompt": MESSAGES,
        "label": "creative",
        "category": "c",
        "source": "s",
        "split": "B",
        "counterfactual": ["how", MESSAGES],
        "harmful_response": "yes",
        "safe_response": "no",
        "match": "m",
        "prompt_span": [0, 1],
    }
    file = write("own.jsonl", json.dumps(line))
    (prompt,) = prompts.read(file)
    assert prompt == Prompt(
        id="7",
        prompt=tuple(MESSAGES),
        label="creative",
        split="B",
        category="c",
        source="s",
        counterfactuals=("how", tuple(MESSAGES)),
        harmful_response="yes",
        safe_response="no",
        match="m",
    )
    assert prompt.where == f"{file}:1"


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"counterfactual": "how"}, ("how",)),
        ({"counterfactual": MESSAGES}, (tuple(MESSAGES),)),
        ({"counterfactual": ["how", "why"]}, ("how", "why")),
        ({"counterfactual_ids": [1, 2]}, ((1, 2),)),
        ({"counterfactual_ids": [[1, 2], [3]]}, ((1, 2), (3,))),
        ({}, ()),
    ],
)
def test_one_counterfactual_or_several(given, expected, write):
    line = {"prompt": "tell me", "label": "harmful", "id": "x"}
    (prompt,) = prompts.read(write("own.jsonl", json.dumps(line | given)))
    assert prompt.counterfactuals + prompt.counterfactual_ids == expected


def test_the_own_form_in_csv_and_its_defaults(write):
    rows = as_csv("prompt_ids,label,harmful_ids,split", ["[5, 6]", "harmful", "[1]", ""])
    (prompt,) = prompts.read(write("own.csv", rows))
    assert (prompt.prompt, prompt.prompt_ids, prompt.harmful_ids) == (None, (5, 6), (1,))
    assert (prompt.id, prompt.source) == ("1", "")
    assert prompt.split == splits_lib.split_of(None, "1", "")


# Columns of a published set beside those of the own form.
BESIDE = {
    "advbench": {"goal": "how", "target": "Sure"},
    "alpaca": {"instruction": "how", "output": "yes"},
    "strongreject": {"category": "c", "source": "s", "forbidden_prompt": "how"},
    "xstest": {"type": "homonyms", "focus": "f"},
}


@pytest.mark.parametrize("name", BESIDE)
def test_the_own_form_may_have_columns_of_a_published_set(name, write):
    line = {"id": "x", "prompt": "tell me", "label": "creative"} | BESIDE[name]
    file = write("own.jsonl", json.dumps(line))
    (prompt,) = prompts.read(file)
    assert (prompt.id, prompt.prompt, prompt.label) == ("x", "tell me", "creative")
    assert prompt.source == BESIDE[name].get("source", "")
    tokenised = write("ids.jsonl", json.dumps({**line, "prompt": None, "prompt_ids": [5]}))
    assert prompts.read(tokenised)[0].prompt_ids == (5,)
    # One bad label makes a bad row, and no other set of the file.
    file = write("own.jsonl", json.dumps(line) + "\n" + json.dumps({**line, "label": "evil"}))
    assert told(prompts.read, file).startswith(f"{file}:2: label is 'evil'")


def test_a_label_for_the_file_tells_the_own_form_from_a_published_one(write):
    line = {"id": "x", "prompt": "tell me"}
    file = write("own.jsonl", json.dumps(line | BESIDE["advbench"]))
    assert prompts.read(file, label="creative")[0] == prompts.read(
        write("plain.jsonl", json.dumps(line)), label="creative"
    )[0]  # fmt: skip
    assert prompts.read(file)[0].prompt == "how"
    # XSTest's prompts are in the same column, and its types say more than one label.
    file = write("xstest.jsonl", json.dumps(line | BESIDE["xstest"]))
    assert prompts.read(file, label="overrefusal")[0].source == "xstest"
    assert "the file is said to be harmful" in told(prompts.read, file, label="harmful")


def test_a_context_goes_before_the_prompt_as_harmbench_puts_it(write):
    rows = [["tell me", "line 1\nline 2", "kind"], ["why", "", "kind"]]
    found = prompts.read(
        write("contextual.csv", as_csv("prompt,context,category", *rows)), label="harmful"
    )
    whole = ["tell me", "contextual", "kind", "", "line 1\nline 2", "one"]
    (expected,) = prompts.read(write("harmbench.csv", as_csv(HARMBENCH, whole)))
    assert [one.prompt for one in found] == [expected.prompt, "why"]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"context": ["how"]}, "'context' must be text that goes before a 'prompt' that is text"),
        ({"context": "how", "prompt": MESSAGES}, "'context' must be text"),
        ({"context": "how", "prompt": None, "prompt_ids": [1]}, "'context' must be text"),
        ({"system": "how"}, "has 'system', a part of what is asked that would be left out: put it"),
        ({"History": [["how", "so"]]}, "has 'History', a part of what is asked"),
    ],
)
def test_what_is_asked_is_never_left_out_in_silence(fields, said, write):
    line = {"id": "x", "prompt": "tell me", "label": "harmful"} | fields
    file = write("own.jsonl", json.dumps(line))
    message = told(prompts.read, file)
    assert message.startswith(f"{file}:1: ") and said in message
    empty = {name: type(value)() for name, value in fields.items() if name not in line}
    assert prompts.read(write("own.jsonl", json.dumps(OWN | empty)))[0].prompt == "tell me"


@pytest.mark.parametrize(
    "header, column",
    [
        (HARMBENCH, "ImageFileName"),  # of its multimodal behaviours
        (ALPACA, "system"),
        (DOLLY, "history"),
        (ADVBENCH, "context"),
        (XSTEST, "context"),
    ],
)
def test_a_published_set_with_more_than_its_prompts_are_made_of(header, column, write):
    columns = [*header.split(","), column]
    row = ["homonyms" if name == "type" else name for name in columns]
    file = write("set.csv", as_csv(",".join(columns), row))
    assert told(prompts.read, file).startswith(f"{file}:2: has '{column}', a part of what is asked")
    assert len(prompts.read(write("set.csv", as_csv(",".join(columns), [*row[:-1], ""])))) == 1


def test_a_label_for_a_file_without(write):
    file = write("own.jsonl", '{"prompt": "tell me", "id": "x"}')
    (prompt,) = prompts.read(file, label="creative")
    assert prompt.label == "creative"


def test_windows_line_ends_a_byte_order_mark_and_blank_lines_are_no_harm(write):
    rows = as_csv(ADVBENCH, ["tell me", "Sure"], ["why", "Yes"])
    expected = prompts.read(write("set.csv", rows))
    strange = "\ufeff" + rows.replace("\n", "\r\n\r\n")
    assert prompts.read(write("set.csv", strange)) == expected
    assert prompts.read(write("SET.CSV", strange.encode()))[1].where.endswith("SET.CSV:5")


def encoded(text, encoding):
    return ("\ufeff" * encoding.endswith("-be") + text).encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_files_whose_byte_order_mark_names_their_encoding(encoding, write):
    rows = as_csv(ADVBENCH, ["tell mé\u2028 😀", "Sure"], ["why", "Yes"])
    expected = prompts.read(write("set.csv", rows))
    assert prompts.read(write("set.csv", encoded(rows, encoding))) == expected
    listed = [{"goal": one.prompt, "target": one.harmful_response} for one in expected]
    for name, text in (
        ("set.json", json.dumps(listed, ensure_ascii=False)),
        ("set.jsonl", "\n".join(json.dumps(one, ensure_ascii=False) for one in listed)),
    ):
        assert prompts.read(write(name, encoded(text, encoding))) == expected


@pytest.mark.parametrize("name", ["set.csv", "set.json", "set.jsonl"])
@pytest.mark.parametrize(
    "content, said",
    [
        ("é".encode("latin-1"), "save the file as UTF-8, or convert it, as by iconv -f ENCODING"),
        ("goal".encode("utf-16-le"), "looks like UTF-16 without a byte-order mark (byte 1 is 0)"),
        ("goal".encode("utf-16-be"), "looks like UTF-16 without a byte-order mark (byte 0 is 0)"),
        ("goal".encode("utf-16") + b"!", "byte-order mark of UTF-16, but is no UTF-16 text"),
        (b"\xff\xfe\x00\xd8", "byte-order mark of UTF-16, but is no UTF-16 text (byte 2)"),
    ],
)
def test_other_encodings_are_named_with_the_way_out(name, content, said, write):
    good = b"goal,target\n" if name == "set.csv" and content[0] == 0xE9 else b""
    row = content + b",Sure\n" if good else content
    message = told(prompts.read, write(name, good + row))
    assert said in message and "as UTF-8" in message


def test_a_cell_may_be_longer_than_pythons_csv_lets_it(write):
    limit = csv.field_size_limit()
    long = "tell me " * 20_000
    file = write("set.csv", as_csv(ADVBENCH, [long, "Sure"], ["why", "Yes"]))
    assert [len(one.prompt) for one in prompts.read(file)] == [160_000, 3]
    assert csv.field_size_limit() == limit == 131_072


def test_a_file_that_may_not_be_read_is_named(write, monkeypatch):
    file = write("set.csv", as_csv(ADVBENCH, ["why", "Yes"]))

    def read_bytes(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "read_bytes", read_bytes)
    assert told(prompts.read, file) == f"{file}: cannot be read (Permission denied)"


# What is refused.

BAD_ROWS = {  # after a good row whose cells span lines 2 to 4, so they are of line 5
    "empty": (",Sure", "has no prompt, or an empty one"),
    "blank": ('"  ",Sure', "has no prompt, or an empty one"),
    "ragged": ("tell me,Sure,more", "3 cells, but the header has 2"),
    "short": ("tell me", "1 cells, but the header has 2"),
    "not UTF-8": (b"tell \xff me,Sure", "not UTF-8"),
    "quotes": ('"tell" me,Sure', "not CSV"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_of_csv_is_refused_by_its_line_and_can_be_left_out(fault, write):
    row, said = BAD_ROWS[fault]
    row = row if isinstance(row, bytes) else row.encode()
    good = b'goal,target\n"tell\nme\nhow",Sure\n'
    file = write("set.csv", good + row + b"\nwhy,Yes\n")
    message = told(prompts.read, file)
    assert message.startswith(f"{file}:5: ") and said in message
    errors = []
    found = prompts.read(file, on_bad=errors.append)
    assert [str(error) for error in errors] == [message]
    # Ids do not move where rows are left out.
    assert [prompt.id for prompt in found] == ["advbench-harmful-1", "advbench-harmful-3"]


def test_a_quote_that_is_never_closed_is_named_by_the_line_where_it_opens(write):
    file = write("set.csv", 'goal,target\ntell me,Sure\n"why,Yes\nhow,No\n')
    message = told(prompts.read, file)
    assert message.startswith(f"{file}:3: not CSV")
    errors = []
    assert len(prompts.read(file, on_bad=errors.append)) == 1 and len(errors) == 1


OWN = {"id": "x", "prompt": "tell me", "label": "harmful"}
BAD_LINES = {
    "no label": ({"label": None}, "no label"),
    "wrong label": ({"label": "evil"}, "label is 'evil', not one of harmful, benign"),
    "a label of no text": ({"label": ["harmful"]}, "not one of harmful"),
    "no prompt": ({"prompt": None}, "prompt 'y' has no prompt"),
    "no ids": ({"prompt": None, "prompt_ids": []}, "an empty one"),
    "a number": ({"prompt": 5}, "'prompt' must be text or a list of messages"),
    "bad ids": ({"prompt": None, "prompt_ids": [1.5]}, "'prompt_ids' must be a list of token ids"),
    "both": ({"prompt_ids": [1]}, "both 'prompt' and 'prompt_ids'"),
    "both answers": ({"safe_response": "no", "safe_ids": [1]}, "both 'safe_response'"),
    "an answer of messages": ({"safe_response": MESSAGES}, "'safe_response' must be text"),
    "wrong split": ({"split": "D"}, "split is 'D'"),
    "an empty counterfactual": ({"counterfactual": ["how", ""]}, "an empty counterfactual"),
    "no counterfactual": ({"counterfactual": []}, "an empty counterfactual"),
    "counterfactual ids": ({"counterfactual_ids": [[1], 2]}, "'counterfactual_ids' must be"),
    "counterfactuals of no text": ({"counterfactual": [5]}, "'counterfactual' must be text"),
    "the same id": ({"id": "x"}, "id 'x' was used before, by"),
}


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_line_of_json_is_refused_by_its_line(fault, ending, write):
    fields, said = BAD_LINES[fault]
    lines = [json.dumps(line) for line in (OWN, {**OWN, "id": "y"} | fields)]
    content = "\n".join(lines) if ending == ".jsonl" else "[" + ",\n".join(lines) + "]\n"
    file = write(f"own{ending}", content)
    message = told(prompts.read, file)
    assert message.startswith(f"{file}:2: ") and said in message
    errors = []
    assert len(prompts.read(file, on_bad=errors.append)) == 1 and len(errors) == 1


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("set.csv", "colour,shape\nred,round\n", "columns (colour, shape) are of no known set"),
        ("set.csv", "prompt,shape\nred,round\n", "says no label: give one of harmful, benign"),
        ("set.csv", "goal,target,goal\na,b,c\n", "names a column twice"),
        ("set.csv", "", "holds no prompts"),
        ("set.csv", "goal,target\n", "holds no prompts"),
        ("set.csv", '"goal,target\n', ":1: not CSV"),
        ("set.json", '{"goal": "tell me"}', "expected a list of JSON objects"),
        ("set.json", '[{"goal":\n"tell me"', "not JSON (Expecting ',' delimiter at line 2"),
        ("set.json", "[]", "holds no prompts"),
        ("set.jsonl", "[1]\n", ":1: expected a JSON object, found list"),
        ("set.json", '[\n{"goal": "\\ud800", "target": ""}]', ":2: has half of a surrogate pair"),
        ("set.json", b'["\xff"]', "not UTF-8 text (byte 2)"),
        ("set.parquet", b"PAR1 and then no more", "not a parquet file, or damaged"),
        ("set.txt", "tell me", "must end in one of .csv, .json, .jsonl, .parquet"),
    ],
)
def test_a_file_that_is_no_set_is_refused(name, content, said, write):
    file = write(name, content)
    message = told(prompts.read, file)
    assert message.startswith(str(file)) and said in message


def test_an_unknown_header_is_told_the_known_ones(write):
    message = told(prompts.read, write("set.csv", "colour\nred\n"))
    for known in sets.SETS:
        assert f"{known.name} ({', '.join(known.columns)})" in message


def test_a_file_without_header_shows_little_of_its_first_prompt(write):
    file = write("set.csv", "tell me how to do it and why not and how,Sure do it\nwhy,no\n")
    message = told(prompts.read, file)
    assert "its columns (tell me how to do it and why n..., Sure do it) are" in message


def test_a_truncated_parquet_file_is_refused(tmp_path):
    file = tmp_path / "set.parquet"
    pq.write_table(pa.table({"goal": ["tell me"] * 100, "target": ["Sure"] * 100}), file)
    file.write_bytes(file.read_bytes()[:-20])
    assert told(prompts.read, file).startswith(f"{file}: not a parquet file, or damaged")


def test_bad_rows_of_parquet_are_named_by_their_number(tmp_path):
    file = tmp_path / "set.parquet"
    broken = pa.StringArray.from_buffers(3, *pa.array([b"tell me", b"\xff", b""]).buffers()[1:])
    pq.write_table(pa.table({"goal": broken, "target": ["Sure"] * 3}), file)
    errors = []
    assert len(prompts.read(file, on_bad=errors.append)) == 1
    assert [str(error).partition(": ")[0] for error in errors] == [f"{file}:2", f"{file}:3"]


def test_a_name_that_tells_two_labels_needs_one(write):
    file = write("toxic-and-hard.csv", as_csv(OR_BENCH, ["tell me", "kind"]))
    message = told(prompts.read, file)
    assert "or-bench has files of the same columns for different labels" in message
    assert "give harmful or overrefusal" in message
    (prompt,) = prompts.read(file, label="harmful")
    assert (prompt.label, prompt.id) == ("harmful", "or-bench-toxic-1")


@pytest.mark.parametrize("label", ["harmful", "creative"])
def test_two_columns_are_or_benchs_only_if_the_name_says_so(label, write):
    file = write("prompts.csv", as_csv(OR_BENCH, ["tell me", "kind"]))
    message = told(prompts.read, file)
    assert "says no label: give one of harmful, benign, creative, overrefusal" in message
    assert "files of or-bench have 80k or hard or toxic in their names" in message
    (prompt,) = prompts.read(file, label=label)
    assert (prompt.label, prompt.source, prompt.id) == (label, "", "1")
    assert prompt.category == "kind" and prompt.split == splits_lib.split_of(None, "1", "")


def test_a_label_that_a_set_does_not_have(write):
    rows = as_csv(JAILBREAKBENCH, ["0", "tell me", "Sure", "Telling", "kind", "Original"])
    file = write("harmful-behaviors.csv", rows)
    assert "give benign or harmful" in told(prompts.read, file, label="creative")
    # Two columns and a word are too few to tell OR-Bench from prompts of the user's own.
    (prompt,) = prompts.read(write("hard.csv", as_csv(OR_BENCH, ["do", "kind"])), label="creative")
    assert (prompt.source, prompt.id, prompt.category) == ("", "1", "kind")


def test_a_label_that_the_file_contradicts_is_refused(write):
    file = write("set.csv", as_csv(ADVBENCH, ["tell me", "Sure"]))
    assert "is harmful, but the file is said to be benign" in told(
        prompts.read, file, label="benign"
    )
    assert "label is 'evil'" in told(prompts.read, file, label="evil")


def test_xstest_without_a_type_has_no_label(write):
    file = write("xstest.csv", as_csv(XSTEST, ["1", "do it", "", "safe", "f", ""]))
    assert told(prompts.read, file).startswith(f"{file}:2: no label")


def test_a_missing_file_is_named(tmp_path):
    assert "there is no such file" in told(prompts.read, tmp_path / "gone.csv")


# Written and read again.

TEXT = strategies.text(min_size=1).filter(str.strip)
CHAT = strategies.lists(
    strategies.fixed_dictionaries({"role": strategies.just("user"), "content": TEXT}), min_size=1
).map(tuple)
TOKENS = strategies.lists(strategies.integers(0, 9), min_size=1).map(tuple)
CONVERSATION = TEXT | CHAT
ASKED = strategies.tuples(CONVERSATION, strategies.just(())) | strategies.tuples(
    strategies.none(), TOKENS
)
CONTRASTED = strategies.tuples(
    strategies.lists(CONVERSATION).map(tuple), strategies.just(())
) | strategies.tuples(strategies.just(()), strategies.lists(TOKENS).map(tuple))


@strategies.composite
def some_prompt(draw):
    prompt, prompt_ids = draw(ASKED)
    counterfactuals, counterfactual_ids = draw(CONTRASTED)
    return Prompt(
        id=draw(TEXT),
        prompt=prompt,
        label=draw(strategies.sampled_from(sets.LABELS)),
        split=draw(strategies.sampled_from(splits_lib.SPLITS)),
        prompt_ids=prompt_ids,
        counterfactuals=counterfactuals,
        counterfactual_ids=counterfactual_ids,
        category=draw(strategies.text()),
        match=draw(strategies.text()),
        harmful_response=draw(strategies.text()),
        safe_ids=draw(TOKENS),
    )


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(strategies.lists(some_prompt(), min_size=1, unique_by=lambda one: one.id))
def test_what_is_written_is_read_again(tmp_path_factory, written):
    file = tmp_path_factory.getbasetemp() / "again.jsonl"
    prompts.write(file, written)
    assert prompts.read(file) == written


# Prompts as text and as tokens.


def harmful(identity, prompt="tell me", split="A", **fields):
    return Prompt(identity, prompt, "harmful", split, where=f"file:{identity}", **fields)


def benign(identity, prompt="why not", split="A", **fields):
    return Prompt(identity, prompt, "benign", split, where=f"file:{identity}", **fields)


def test_a_judge_sees_what_the_user_asked_last():
    assert prompts.text(harmful("x")) == "tell me"
    asked = ({"role": "user", "content": "why"}, *MESSAGES)
    assert prompts.text(harmful("x", asked)) == "tell me"
    for prompt in (harmful("x", None, prompt_ids=(1,)), harmful("x", tuple(MESSAGES[1:]))):
        assert "file:x: prompt 'x' has no text of a user" in told(prompts.text, prompt)


def test_tokens_are_those_of_a_pair(encoder, chatting):
    assert prompts.tokens_of(harmful("x"), encoder) == ids("[BOS] tell me")
    wrapped = ids("[BOS] [USER] tell me [END] [BOT]")
    assert prompts.tokens_of(harmful("x"), chatting) == wrapped
    assert prompts.tokens_of(harmful("x", tuple(MESSAGES[:1])), encoder) == wrapped
    assert prompts.tokens_of(harmful("x", None, prompt_ids=(3, 4))) == (3, 4)
    assert "file:x: 'prompt' is text, but" in told(prompts.tokens_of, harmful("x"))


def test_all_counterfactuals_as_tokens(encoder, chatting):
    prompt = harmful("x", counterfactuals=("how", tuple(MESSAGES[:1])))
    wrapped = ids("[BOS] [USER] tell me [END] [BOT]")
    assert prompts.all_counterfactual_tokens(prompt, encoder) == (ids("[BOS] how"), wrapped)
    assert prompts.all_counterfactual_tokens(prompt, chatting) == (
        ids("[BOS] [USER] how [END] [BOT]"),
        wrapped,
    )
    tokenised = harmful("x", None, prompt_ids=(1, 2), counterfactual_ids=((3,), (4, 5)))
    assert prompts.all_counterfactual_tokens(tokenised) == ((3,), (4, 5))
    message = told(prompts.all_counterfactual_tokens, harmful("x"), encoder)
    assert message == "file:x: prompt 'x' has no counterfactual"
    assert "'counterfactual' is text, but" in told(prompts.all_counterfactual_tokens, prompt)


# Pairs.


def test_given_counterfactuals_are_all_used(encoder):
    prompt = harmful(
        "x",
        counterfactuals=("why not", "how"),
        harmful_response="yes",
        safe_ids=(9,),
        category="c",
        source="s",
        split="B",
    )
    pairs = pairing.pair_up([prompt, benign("y")], "given", encoder)
    assert pairs[0] == pairs_lib.Pair(
        id="x/1",
        prompt_ids=ids("[BOS] tell me"),
        counterfactual_ids=ids("[BOS] why not"),
        harmful_ids=ids("yes"),
        safe_ids=(9,),
        label="harmful",
        category="c",
        source="s",
        split="B",
        where="file:x",
        prompt_text="tell me",
        counterfactual_text="why not",
        base_id="x",
    )
    assert [(pair.id, pair.base) for pair in pairs] == [("x/1", "x"), ("x/2", "x")]
    assert pairs[1].counterfactual_ids == ids("[BOS] how")


def test_given_counterfactuals_may_be_ids_or_chats(encoder, chatting):
    tokenised = harmful("x", None, prompt_ids=(1, 2), counterfactual_ids=((3,), (4, 5)))
    pairs = pairing.pair_up([tokenised], "given")
    assert [pair.counterfactual_ids for pair in pairs] == [(3,), (4, 5)]
    assert pairs[0].prompt_text is None
    (pair,) = pairing.pair_up([harmful("x", counterfactuals=("how",))], "given", chatting)
    assert pair.counterfactual_ids == ids("[BOS] [USER] how [END] [BOT]") and pair.is_chat


def test_a_bad_counterfactual_is_called_so(encoder):
    refused = ({"role": "system", "content": "how"},)
    prompt = harmful("x", counterfactuals=(refused,))
    message = told(pairing.pair_up, [prompt], "given", encoder)
    assert "file:x: the chat template of the tokenizer refuses 'counterfactual'" in message


def test_a_pair_equals_the_one_that_is_read_from_the_same_line(write, chatting):
    line = {"id": "x", "label": "harmful", "prompt": MESSAGES[:1], "counterfactual": "how"}
    line |= {"harmful_response": "yes do", "safe_response": "no", "category": "c"}
    file = write("own.jsonl", json.dumps(line))
    (read,) = pairs_lib.read(file, words.tokenizer(), chat=True)
    (made,) = pairing.pair_up(prompts.read(file), "given", chatting)
    assert {**vars(made), "id": "x"} == vars(read)


def test_matched_prompts_share_source_and_match(encoder):
    asked = [
        harmful("h1", source="s", match="a"),
        harmful("h2", source="s", match="b"),
        benign("b1", "why", source="other", match="a"),
        benign("b2", "how", source="s", match="b"),
        benign("b3", "no", source="s", match="a"),
    ]
    pairs = pairing.pair_up(asked, "matched", encoder)
    assert [(pair.base, pair.counterfactual_text) for pair in pairs] == [
        ("h1", "no"),
        ("h2", "how"),
    ]


@pytest.mark.parametrize(
    "lone",
    [{"source": "s", "match": "c"}, {"source": "s"}, {"source": "s", "match": "a", "split": "B"}],
)
def test_a_prompt_without_a_match_is_reported(lone, encoder):
    asked = [harmful("h1", source="s", match="a"), benign("b1", source="s", match="a")]
    asked += [harmful("h2", **lone), benign("b2", source="s")]
    message = told(pairing.pair_up, asked, "matched", encoder)
    assert message.startswith("file:h2: prompt 'h2' cannot be paired: there is no harmless prompt")
    errors = []
    pairs = pairing.pair_up(asked, "matched", encoder, on_bad=errors.append)
    assert [pair.base for pair in pairs] == ["h1"] and [str(error) for error in errors] == [message]


def many():
    """Prompts of two to four words, the last of them its own, in two splits."""
    return [
        make(name, " ".join(["how"] * (index % 3 + 1) + [name]), "AB"[index % 2])
        for index in range(30)
        for make, name in ((harmful, f"harmful{index}"), (benign, f"benign{index}"))
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_of_the_same_length_and_split(chat):
    by_text = {prompt.prompt: prompt for prompt in many()}
    pairs = pairing.pair_up(many(), "length", Encoder(words.tokenizer(), chat=chat), count=3)
    assert len(pairs) == 90 and len({(pair.base, pair.counterfactual_text) for pair in pairs}) == 90
    for pair in pairs:
        base, chosen = by_text[pair.prompt_text], by_text[pair.counterfactual_text]
        assert len(pair.prompt_ids) == len(pair.counterfactual_ids)
        assert (base.label, chosen.label) == ("harmful", "benign")
        assert base.split == chosen.split == pair.split


def test_lengths_are_those_of_a_tokenizer_that_merges():
    made = Encoder(merging.tokenizer())
    asked = [
        harmful("h", "mip takker", safe_response="per"),
        benign("as many words", "mip takkerr"),
        benign("as many characters", "m tak taks"),
        benign("as many tokens", "mipper tak"),
    ]
    lengths = [len(prompts.tokens_of(one, made)) for one in asked]
    assert lengths == [2, 3, 4, 2]
    (pair,) = pairing.pair_up(asked, "length", made, count=3, most_length_difference=0)
    assert pair.counterfactual_text == "mipper tak"
    # An answer is made of its own tokens, also where it would merge with the prompt's end.
    (pair,) = pairing.pair_up(
        [harmful("h", "mip", counterfactuals=("tak",), safe_response="per")], "given", made
    )
    assert made.tokenizer("mipper")["input_ids"] != [*pair.prompt_ids, *pair.safe_ids]
    assert made.tokenizer.decode([*pair.prompt_ids, *pair.safe_ids]) == "mipper"


def contrasts(asked, reverse=False, **settings):
    """Which benign prompt each harmful one got; every prompt has a first token of its own."""
    named = [
        Prompt(one.id, None, one.label, one.split, prompt_ids=(10 + place, *[1] * (place % 2)))
        for place, one in enumerate(sorted(asked, key=lambda one: one.id))
    ]
    pairs = pairing.pair_up(named[::-1] if reverse else named, "length", **settings)
    return {pair.id: pair.counterfactual_ids for pair in pairs}


def test_the_choice_is_seeded_and_does_not_depend_on_the_order():
    chosen = contrasts(many(), count=2)
    assert contrasts(many(), count=2, reverse=True) == chosen
    assert contrasts(many(), count=2, seed=1) != chosen
    assert len(set(chosen.values())) > 5
    assert all(chosen[f"harmful{n}/1"] != chosen[f"harmful{n}/2"] for n in range(30))
    # Fewer counterfactuals are the first of more.
    assert contrasts(many()).items() <= chosen.items()


def test_a_counterfactual_is_of_the_same_split_and_of_a_benign_prompt():
    asked = [
        harmful("h", None, "A", prompt_ids=(1, 2)),
        benign("b", None, "B", prompt_ids=(3, 4)),
        Prompt("o", None, "overrefusal", "A", prompt_ids=(5, 6)),
        benign("c", None, "A", prompt_ids=(7,)),
    ]
    message = told(pairing.pair_up, asked, "length", most_length_difference=0)
    assert message.endswith(
        "'h' cannot be paired: the nearest benign prompt of split A differs by 1 tokens, and 0 are "
        "allowed"
    )
    message = told(pairing.pair_up, asked[:2], "length")
    assert message.endswith("'h' cannot be paired: there is no benign prompt in its split, A")
    asked.append(benign("d", None, prompt_ids=(8, 9)))
    (pair,) = pairing.pair_up(asked, "length", count=5, most_length_difference=0)
    assert pair.counterfactual_ids == (8, 9)


def lengths_of_counterfactuals(*lengths, **settings):
    """How long the benign prompts are that a prompt of five tokens gets, of these lengths."""
    lenders = [benign(str(n), None, prompt_ids=(n,) * size) for n, size in enumerate(lengths)]
    asked = [harmful("h", None, prompt_ids=(9,) * 5), *lenders]
    return [len(pair.counterfactual_ids) for pair in pairing.pair_up(asked, "length", **settings)]


def test_the_nearest_in_length_are_taken():
    assert lengths_of_counterfactuals(1, 9, 7, 4) == [4]
    assert lengths_of_counterfactuals(1, 10, 7, 4, 5, count=4) == [5, 4, 7, 1]
    assert lengths_of_counterfactuals(1, 9, 7, 4, count=4, most_length_difference=2) == [4, 7]
    # Longer and shorter ones that are equally far are drawn from alike.
    drawn = {lengths_of_counterfactuals(4, 6, seed=seed)[0] for seed in range(20)}
    assert drawn == {4, 6}


def test_a_prompt_that_is_too_far_from_all_others_is_left_out_and_told():
    asked = [
        harmful("h", None, prompt_ids=(1,) * 9),
        harmful("i", None, prompt_ids=(2,) * 4),
        benign("b", None, prompt_ids=(3,) * 3),
    ]
    errors = []
    limit = {"most_length_difference": 1, "on_bad": errors.append}
    (pair,) = pairing.pair_up(asked, "length", **limit)
    assert pair.base == "i" and isinstance(errors[0], pairing.UnpairedError)
    assert str(errors[0]).endswith("differs by 6 tokens, and 1 are allowed") and len(errors) == 1


def test_a_benign_prompt_that_cannot_be_tokenised_is_reported(encoder):
    refused = benign("b", ({"role": "system", "content": "how"},))
    asked = [harmful("h"), refused, benign("c", "why not")]
    assert "file:b: " in told(pairing.pair_up, asked, "length", encoder)
    errors = []
    (pair,) = pairing.pair_up(asked, "length", encoder, on_bad=errors.append)
    assert pair.counterfactual_text == "why not" and len(errors) == 1


@pytest.mark.parametrize("how", ["matched", "length"])
def test_pairs_of_sets_need_benign_prompts(how, encoder):
    assert "none of the 1 prompts is: read a set of these too" in told(
        pairing.pair_up, [harmful("h")], how, encoder, on_bad=[].append
    )


def test_no_pair_at_all_is_an_error(encoder):
    for how in pairing.COUNTERFACTUALS:
        message = told(pairing.pair_up, [benign("b")], how, encoder, on_bad=[].append)
        assert f"not one of 1 prompts has a counterfactual ('{how}')" in message


def test_ids_must_differ_between_sets(encoder):
    message = told(pairing.pair_up, [harmful("x"), benign("x")], "length", encoder)
    assert "file:x: id 'x' was used before, by file:x" in message


@pytest.mark.parametrize(
    "asked, said", [({"how": "guess"}, "not 'guess'"), ({"count": 0}, "not 0")]
)
def test_impossible_requests_are_refused(asked, said):
    with pytest.raises(InputError, match=said):
        pairing.pair_up([harmful("x")], **{"how": "given"} | asked)


def test_fields_of_our_own_form_that_look_misspelt_are_told(tmp_path):
    file, told = tmp_path / "own.jsonl", []
    file.write_text('{"prompt": "why", "label": "benign", "splitt": "A", "focus": "x"}')
    prompts.read(file, say=told.append)
    assert told == [
        f"{file}:1: its field 'splitt' is not read: did you mean 'split'? (in 1 of its lines)"
    ]
    # A published set's other columns are no mistakes.
    (tmp_path / "set.csv").write_text("goal,target,prompts\nwhy,Sure,x\n")
    prompts.read(tmp_path / "set.csv", say=told.append)
    assert len(told) == 1
