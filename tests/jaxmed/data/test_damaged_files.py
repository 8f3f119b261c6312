"""Files of prompts and pairs, damaged at random: read whole, or one error that names the file.

Whatever is done to a file's bytes, no other exception comes of it, and nothing is read by half:
each prompt has text or tokens, a label and a split, and every row is either read or told.
"""

import json

import hypothesis
import pytest
from hypothesis import strategies

from jaxmed.data import pairs, prompts, sets, splits
from jaxmed.files import tables
from jaxmed.files.reading import DataError
from tests import words

MESSAGES = [{"role": "user", "content": "tell me é"}, {"role": "assistant", "content": "no"}]
PAIRS = [
    {"id": 1, "prompt": "tell me", "counterfactual": "why 😀", "harmful_response": "yes"},
    {"prompt_ids": [1, 2], "counterfactual_ids": [3], "prompt_span": [0, 1], "split": "B"},
    {"prompt": MESSAGES[:1], "counterfactual": "how", "safe_ids": [4], "base": "1"},
]
PROMPTS = [
    {"id": 1, "prompt": "tell me", "label": "harmful", "counterfactual": ["why", MESSAGES]},
    {"id": 2, "prompt_ids": [1, 2], "label": "benign", "counterfactual_ids": [[1], [2]]},
    {"id": 3, "prompt": MESSAGES, "label": "creative", "split": "C", "match": "m"},
    {"id": 4, "prompt": "why", "context": "how\nnot", "label": "overrefusal", "source": "s"},
]
ADVBENCH = 'goal,target\n"tell ""me"",\nhow é",Sure\nwhy 😀,"Yes, do"\r\nhow,No\n'
HARMBENCH = (
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    'tell me,contextual,kind,,"line 1\nline 2",one\nwhy,standard,kind,,,two\n'
)
XSTEST = (
    "id,prompt,type,label,focus,note\n"
    "1,do it,homonyms,safe,f,\n26,do it,contrast_homonyms,unsafe,f,n\n"
)
OWN = 'prompt_ids,label,harmful_ids\n"[5, 6]",harmful,[1]\n"[7]",benign,\n'


def as_lines(objects):
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


FILES = {
    "pairs.jsonl": [as_lines(PAIRS)],
    "prompts.jsonl": [as_lines(PROMPTS)],
    "prompts.json": [json.dumps(PROMPTS, indent=1, ensure_ascii=False)],
    "set.csv": [ADVBENCH, HARMBENCH, XSTEST, OWN],
}
# What breaks files: bytes of other encodings, of CSV's and JSON's own marks, and of nothing.
PIECES = [b"", b"\0", b"\xff", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\xe2\x80\xa8"]
PIECES += [b'"', b",", b"\n", b"\r", b"{", b"}", b"[", b"]", b"null", b"-1", b"1e999", b"NaN"]
PIECES += [b'"prompt":', b'"label": 5,', b"9" * 5000, b"[" * 2000, b'"id": 1,', "🜚".encode()]


@strategies.composite
def damaged(draw, whole):
    """The bytes of a file, in one of the encodings that are read, with some spans put to others."""
    encoding = draw(strategies.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    content = draw(strategies.sampled_from(whole)).encode(encoding)
    for _ in range(draw(strategies.integers(1, 3))):
        start = draw(strategies.integers(0, len(content)))
        end = min(len(content), start + draw(strategies.sampled_from([0, 0, 1, 2, 20, 1000])))
        other = draw(strategies.integers(0, len(content)))
        piece = draw(
            strategies.sampled_from([*PIECES, content[start:end], content[other : other + 30]])
            | strategies.binary(max_size=3)
        )
        content = content[:start] + piece + content[end:]
    return content


@pytest.fixture(scope="module")
def tokenizer():
    return words.tokenizer()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_as_a_whole_or_refused(name, tmp_path, tokenizer):
    file, read_or_told = tmp_path / name, set()

    def attempt(on_bad=None):
        """What is read, and the message of the error that refuses the file."""
        try:
            if name == "pairs.jsonl":
                return pairs.read(file, tokenizer, on_bad=on_bad), ""
            return prompts.read(file, on_bad=on_bad), ""
        except DataError as error:
            return [], str(error)

    @hypothesis.settings(max_examples=260, deadline=None, database=None, derandomize=True)
    @hypothesis.given(damaged(FILES[name]))
    def check(content):
        file.write_bytes(content)
        found, refused = attempt()
        read_or_told.add("told" if refused else "read")
        errors = []
        if refused:
            assert refused.startswith(str(file)) and "\n" not in refused
            found, refused_again = attempt(errors.append)
            if refused_again:  # the whole file, or nothing is left of it
                return
            assert str(errors[0]) == refused
        rows = sum(1 for _ in tables.READERS[file.suffix](file))
        assert len(found) + len(errors) == rows and len({one.id for one in found}) == len(found)
        for one in found:
            assert one.split in splits.SPLITS
            if name == "pairs.jsonl":
                assert one.prompt_ids and one.counterfactual_ids
            else:
                assert one.label in sets.LABELS and bool(one.prompt) != bool(one.prompt_ids)

    check()
    assert read_or_told == {"read", "told"}
