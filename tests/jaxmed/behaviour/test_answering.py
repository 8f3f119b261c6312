"""A model that answers: what ends its responses, what it may take, and what is told meanwhile."""

import dataclasses
import json
import pathlib

import pytest

from jaxmed.behaviour import answering, generation
from jaxmed.behaviour.answering import AnsweringModel
from jaxmed.behaviour.generation import Generated
from jaxmed.behaviour.judges.rules import RefusalPhrases
from jaxmed.behaviour.responses import PLAIN, Asked, Condition, response_log, verdict_log
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data.prompts import Prompt
from jaxmed.data.tokens import Encoder
from jaxmed.engine import memory
from models.errors import InputError
from tests import tiny, words


@pytest.fixture(scope="module")
def model():
    decoder = tiny.decoder(num_layers=2, hidden_size=16, vocab_size=len(words.WORDS))
    return AnsweringModel(
        pathlib.Path("model"), decoder, Encoder(words.tokenizer()), frozenset({3})
    )


def asked(*texts):
    return [Asked(Prompt(text, text, "benign", "A"), words.ids(text)) for text in texts]


def answer(model, texts, condition, folder, **options):
    """Has the prompts answered and judged, and both kept in the folder."""
    answering.answer(
        model,
        asked(*texts),
        [condition],
        [RefusalPhrases()],
        response_log(folder),
        verdict_log(folder, "judges"),
        sampling=Sampling(4),
        **options,
    )


def stop_tokens(folder, tokenizer):
    return answering.stop_tokens(answering.generation_configs(folder), tokenizer)


def not_followed(folder, sampling):
    return answering.not_followed(answering.generation_configs(folder), sampling)


def test_stop_tokens_are_of_all_files(tmp_path):
    tokenizer = words.tokenizer()
    tokenizer.eos_token = "[END]"  # token 3
    assert stop_tokens(tmp_path, None) == frozenset()
    assert stop_tokens(tmp_path, tokenizer) == {3}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert stop_tokens(tmp_path, None) == {5}
    for named, tokens in (([7, 9], {3, 5, 7, 9}), (7, {3, 5, 7}), (None, {3, 5})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert stop_tokens(tmp_path, tokenizer) == tokens
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object, found list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=f"config.json: {message}"):
            stop_tokens(tmp_path, None)
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError, match="eos_token_id is '</s>'"):
        stop_tokens(tmp_path, None)


def test_the_budget_is_what_the_judges_leave(model, monkeypatch):
    given = []
    monkeypatch.setattr(memory, "free", lambda memory_gb: given.append(memory_gb) or 7)
    assert dataclasses.replace(model, memory_gb=2.0).budget == 7 and given == [2.0]


def test_a_condition_that_fails_is_named(model, tmp_path, monkeypatch):
    def generate(decoder, prompts, **options):
        raise InputError("logits")

    monkeypatch.setattr(generation, "generate", generate)
    for condition, message in (
        (PLAIN, "^logits$"),
        (Condition("strength 9"), r"^condition 'strength 9': logits \(what was answered before"),
    ):
        with pytest.raises(InputError, match=message):
            answer(model, ["why"], condition, tmp_path, progress=False)


def test_a_bar_counts_what_was_there_as_done_before(model, tmp_path, monkeypatch):
    bars = []

    class Bar(answering.tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    def generate(decoder, prompts, **options):
        options["ended"]({index: Generated((5,), True) for index in range(len(prompts))})

    monkeypatch.setattr(answering.tqdm, "tqdm", Bar)
    monkeypatch.setattr(generation, "generate", generate)
    for count in (2, 3):
        answer(model, ["how", "how how", "how how how"][:count], PLAIN, tmp_path, label="some")
    assert [(bar.desc, bar.initial, bar.n, bar.total) for bar in bars] == [
        ("some: responses", 0, 2, 2),
        ("some: verdicts", 0, 2, 2),
        ("some: responses", 2, 3, 3),
        ("some: verdicts", 2, 3, 3),
    ]


NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None}
NEUTRAL |= {"num_beams": 1, "length_penalty": 2.0, "min_p": 0.1, "do_sample": True}
DRAWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
NEUTRAL |= {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1], "max_length": 20}


@pytest.mark.parametrize(
    ("given", "sampling", "found"),
    [
        (NEUTRAL, Sampling(4), {}),
        ({"repetition_penalty": 1.1}, Sampling(4), {"repetition_penalty": 1.1}),
        ({"no_repeat_ngram_size": 3}, Sampling(4), {"no_repeat_ngram_size": 3}),
        ({"bad_words_ids": [[5]]}, Sampling(4), {"bad_words_ids": [[5]]}),
        ({"suppress_tokens": [1, 2]}, Sampling(4), {"suppress_tokens": [1, 2]}),
        ({"min_length": 5}, Sampling(4), {"min_length": 5}),
        ({"forced_bos_token_id": 5}, Sampling(4), {"forced_bos_token_id": 5}),
        (
            {"num_beams": 4, "length_penalty": 2.0},
            Sampling(4),
            {"num_beams": 4, "length_penalty": 2.0},
        ),
        (
            {"do_sample": True, "min_p": 0.1, "temperature": 0.7},
            Sampling(4, 0.7),
            {"min_p": 0.1},
        ),
        (DRAWN, Sampling(4, 1.0, 0.9), {"temperature": 0.6, "top_k": 20}),
        # What says how tokens are drawn says nothing where they are not drawn.
        (DRAWN | {"do_sample": False, "min_p": 0.1}, Sampling(4, 1.0), {}),
        (DRAWN | {"do_sample": None, "typical_p": 0.5}, Sampling(4, 1.0), {}),
    ],
)
def test_what_a_checkpoint_asks_of_generation_and_is_not_done(given, sampling, found, tmp_path):
    assert not_followed(tmp_path, sampling) == {}
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text(json.dumps(given))
        assert not_followed(tmp_path, sampling) == found
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.0}))
    assert not_followed(tmp_path, sampling) == {}
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="config.json: not JSON"):
        not_followed(tmp_path, sampling)
