"""GGUF files, of tiny models: tokens as the file prescribes, and refusals."""

import itertools
import json

import numpy as np
import pytest
import regex

from models import checkpoint
from tests.launch import process
from tests.real import published

pytestmark = pytest.mark.real
pytest.importorskip("torch", reason="needs torch: make real")
gguf = pytest.importorskip("gguf", reason="needs gguf: make real")

WIDTH = 8
# What Gemma 2 norms after each module.
GEMMA2 = ("attention", "ffw")
TEXTS = (
    "a\n\n1. foo  12 it's",
    "In 1969, 12,345 people; $3.50",
    "don't I'll we've they're DON'T I'LL don’t",
    "\n1\n\n2\r\n3\t4   \n",
    "x1y22z333 4444 55555",
    " ½ ² ٣٤ 12年 naïve — “é” e\u0301",
    "foo()\n    return  1\n\n\n",
    "<s>abcde abcdef</s>",
)

# What llama.cpp splits text by, as its source writes it (src/llama-vocab.cpp): each pattern cuts
# the pieces that are left by those before.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
RULES = {
    "gpt-2": [GPT2],
    "olmo": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "dbrx": [LLAMA3],
    "qwen2": [QWEN2],
}
WHOLE_WORDS_AND_BOS = {"llama-bpe"}


def spelt():
    """The characters that stand for the 256 bytes in a byte-level vocabulary, as GPT-2 has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


SPELT = spelt()


def spell(text):
    return "".join(SPELT[byte] for byte in text.encode())


# Most would be made across a border of some rule, and not across those of another. "abcde" is
# made by no merge.
MERGES = [
    (spell(first), spell(second))
    for first, second in [
        *(
            ("\n", "\n"),
            (" ", " "),
            ("  ", "\n"),
            ("\r", "\n"),
            (")", "\n"),
            (";", " "),
            (" ", "$"),
        ),
        *(("1", "2"), ("3", "3"), ("4", "4"), ("44", "44"), (" ", "1"), (" ", "4"), (".", "5")),
        *(("'", "t"), ("'", "s"), ("'", "T"), ("n", "'"), ("l", "l"), ("'", "ll"), ("\t", "4")),
        *(("f", "o"), ("fo", "o"), (" ", "foo"), ("a", "b"), ("e", "n")),
    ]
]
SPECIAL = ("<s>", "</s>")
TOKENS = [*SPECIAL, *SPELT.values(), *dict.fromkeys("".join(pair) for pair in MERGES), "abcde"]


def write(file, *, arch="llama", left_out=(), tensors=(), **fields):
    """A model of one layer in GGUF, its tokenizer of `TOKENS` and `MERGES`.

    Args:
        file: where to.
        arch: the family, in GGUF's words.
        left_out: tensors that it does not hold.
        tensors: names of others that it does.
        fields: of the metadata, with __ for dots and ARCH for the family; over those here.
    """
    kind = gguf.TokenType
    told = {
        "ARCH__context_length": 64,
        "ARCH__embedding_length": WIDTH,
        "ARCH__block_count": 1,
        "ARCH__feed_forward_length": WIDTH,
        "ARCH__attention__head_count": 2,
        "ARCH__attention__head_count_kv": 2,
        "ARCH__attention__key_length": WIDTH // 2,
        "ARCH__attention__value_length": WIDTH // 2,
        "ARCH__attention__layer_norm_rms_epsilon": 1e-5,
        "ARCH__rope__freq_base": 1e4,
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "gpt-2",
        "tokenizer__ggml__tokens": TOKENS,
        "tokenizer__ggml__token_type": [
            int(kind.CONTROL if token in SPECIAL else kind.NORMAL) for token in TOKENS
        ],
        "tokenizer__ggml__merges": [" ".join(pair) for pair in MERGES],
        "tokenizer__ggml__bos_token_id": 0,
        "tokenizer__ggml__eos_token_id": 1,
    } | fields
    writer = gguf.GGUFWriter(file, arch)
    for name, value in told.items():
        key = name.replace("__", ".").replace("ARCH", arch)
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    square, row = (WIDTH, WIDTH), (WIDTH,)
    shapes = {
        "token_embd.weight": (len(told["tokenizer__ggml__tokens"]), WIDTH),
        "output_norm.weight": row,
        **{f"blk.0.{name}_norm.weight": row for name in ("attn", "ffn")},
        **{f"blk.0.attn_{name}.weight": square for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": square for name in ("gate", "up", "down")},
        **({f"blk.0.post_{name}_norm.weight": row for name in GEMMA2} if arch == "gemma2" else {}),
        **dict.fromkeys(tensors, (WIDTH // 4,)),
    }
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name not in left_out:
            writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def pieces(text, patterns):
    found = [text]
    for pattern in patterns:
        found = [part for piece in found for part in cut(piece, pattern)]
    return found


def cut(text, pattern):
    """The matches, and what lies between them."""
    end = 0
    for match in regex.finditer(pattern, text):
        yield text[end : match.start()]
        yield match.group()
        end = match.end()
    yield text[end:]


def merged(piece, whole_words):
    """The tokens of a piece: what was merged earlier in the list goes first."""
    if whole_words and piece in TOKENS:
        return [piece]
    parts = list(piece)
    while set(pairs := list(itertools.pairwise(parts))) & set(MERGES):
        best = min(set(pairs) & set(MERGES), key=MERGES.index)
        at = pairs.index(best)
        parts[at : at + 2] = ["".join(best)]
    return parts


def defined(text, rule, bos):
    """The ids by the rule's definition; special tokens are cut out first."""
    ids = [TOKENS.index("<s>")] if bos else []
    for part in regex.split("(</?s>)", text):
        if part in SPECIAL:
            ids.append(TOKENS.index(part))
            continue
        for piece in pieces(part, RULES[rule]):
            parts = merged(spell(piece), rule in WHOLE_WORDS_AND_BOS)
            ids += [TOKENS.index(token) for token in parts]
    return ids


def convert(file):
    out = file.with_suffix("")
    ran = process.call("convert", f"--gguf={file}", f"--out={out}")
    return ran, out


@pytest.mark.parametrize("rule", RULES)
def test_text_is_split_as_the_file_says(rule, tmp_path):
    """Ids of the checkpoint are those of the definition, with BOS where the rule begins with it."""
    ran, out = convert(write(tmp_path / "a.gguf", tokenizer__ggml__pre=rule))
    assert ran.returncode == 0, ran.stderr
    tokenizer = checkpoint.load(out)[1]
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == defined(text, rule, rule in WHOLE_WORDS_AND_BOS)


@pytest.mark.parametrize("rule", ["llama-bpe", "smollm"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_text_begins_with_bos_where_the_file_says(rule, bos, tmp_path):
    file = write(tmp_path / "a.gguf", tokenizer__ggml__pre=rule, tokenizer__ggml__add_bos_token=bos)
    ran, out = convert(file)
    assert ran.returncode == 0, ran.stderr
    assert checkpoint.load(out)[1]("abcde")["input_ids"] == defined("abcde", rule, bos)


def test_a_published_tokenizer():
    """Ids that llama.cpp makes with the same file."""
    tokenizer = checkpoint.load(published.folder("smollm2"))[1]
    wanted = [81, 1116, 33, 30, 29856, 256, 33, 34, 357, 506]
    assert tokenizer("a\n\n1. foo  12 it's")["input_ids"] == wanted


SPACED = ["\u2581", *"abfo", "ab", "\u2581ab", "\u2581\u2581", "fo", "foo", "\u2581foo"]
SENTENCEPIECE = {
    "tokenizer__ggml__model": "llama",
    "tokenizer__ggml__pre": "default",
    "tokenizer__ggml__tokens": ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    + SPACED,
    "tokenizer__ggml__token_type": [2, 3, 3, *[6] * 256, *[1] * len(SPACED)],
    "tokenizer__ggml__scores": [0.0] * 259 + [-float(index) for index in range(len(SPACED))],
    "tokenizer__ggml__merges": None,
    "tokenizer__ggml__bos_token_id": 1,
    "tokenizer__ggml__eos_token_id": 2,
}


@pytest.mark.parametrize("space", [None, True, False])
def test_a_sentencepiece_text_begins_with_a_space_where_the_file_says(space, tmp_path):
    """Tokens as llama.cpp makes them of the same files; decoding neither loses nor adds a space."""
    file = write(tmp_path / "a.gguf", tokenizer__ggml__add_space_prefix=space, **SENTENCEPIECE)
    ran, out = convert(file)
    assert ran.returncode == 0, ran.stderr
    tokenizer = checkpoint.load(out)[1]
    # A space is written as a lower eighth.
    texts = {
        "foo ab": "<s> ▁foo ▁ab",
        " ab": "<s> ▁ ▁ab",
        "ab</s>ab": "<s> ▁ab </s> ▁ab",
    }
    if space is False:
        texts = {"foo ab": "<s> foo ▁ab", " ab": "<s> ▁ab", "ab</s>ab": "<s> ab </s> ab"}
    for text, wanted in texts.items():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == wanted.split(), text
        if "</s>" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


ROTARY = "has a rotary scaling ({}), which transformers does not read from GGUF"
RULE = "by which its tokenizer splits text (tokenizer.ggml.pre); take the checkpoint that"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"ARCH__rope__scaling__type": "linear"}, ROTARY.format("llama.rope.scaling.type")),
        (
            {"ARCH__rope__scaling__type": "yarn", "ARCH__rope__scaling__factor": 4.0},
            ROTARY.format("llama.rope.scaling.type"),
        ),
        ({"ARCH__rope__scaling__factor": 4.0}, ROTARY.format("llama.rope.scaling.factor")),
        ({"ARCH__rope__scale_linear": 4.0}, ROTARY.format("llama.rope.scale_linear")),
        ({"tensors": ["rope_freqs.weight"]}, ROTARY.format("rope_freqs.weight")),
        (
            {"tokenizer__ggml__pre": "afmoe"},
            f"names a rule that is not known here (afmoe) {RULE}",
        ),
        ({"tokenizer__ggml__pre": "default"}, "names a rule that is not known here (default)"),
        ({"tokenizer__ggml__pre": None}, f"names no rule {RULE}"),
        ({"left_out": ["blk.0.ffn_up.weight"]}, "does not hold what its model needs"),
        ({"arch": "bloom"}, "model_type 'bloom' is not supported; supported: llama, "),
        (
            {"arch": "gemma2", **SENTENCEPIECE},
            "does not say how attention scores are scaled, and heads of 4 have another scale",
        ),
    ],
)
def test_refused(told, message, tmp_path):
    """With one message, and nothing is left."""
    file = write(tmp_path / "a.gguf", **told)
    ran, _ = convert(file)
    assert ran.returncode == 1
    assert f"Error: {file}: {message}" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_a_scaling_that_is_none(tmp_path):
    file = write(tmp_path / "a.gguf", ARCH__rope__scaling__type="none")
    ran, out = convert(file)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((out / "config.json").read_text())["rope_scaling"] is None


def test_no_gguf(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    ran, _ = convert(file)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"Error: {file}: cannot be read as GGUF")
    assert list(tmp_path.iterdir()) == [file]
