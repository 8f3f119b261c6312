"""Responses that are kept, gone on with, and judged: what is written is written once."""

import json

import numpy as np
import pytest

from jaxmed.behaviour import generation, responses
from jaxmed.behaviour.generation import Generated
from jaxmed.behaviour.judges.protocol import Verdict
from jaxmed.behaviour.responses import PLAIN, Asked, Condition, Key, Log, Response
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data.prompts import Prompt
from models.edits import Hold
from models.errors import InputError
from models.sites import Site
from tests import tiny, words

LENGTHS = {"a": 3, "b": 9, "c": 5}
KEY = Key("plain", "a", 0)
JUDGES = "their hash"
DECODER = tiny.decoder(num_layers=2, hidden_size=16, vocab_size=len(words.WORDS))
RESPONSE = Response((5, 6), "tell me", True)


def asked(lengths=LENGTHS):
    return [
        Asked(Prompt(name, None, "benign", "A", prompt_ids=(1,) * size), (1,) * size)
        for name, size in lengths.items()
    ]


@pytest.fixture
def generated(monkeypatch):
    """What `generation.generate` was asked for; it answers with a prompt's length and its seed."""
    calls = []

    def generate(decoder, prompts, **options):
        calls.append((prompts, options))
        for index, (prompt, seed) in enumerate(zip(prompts, options["seeds"], strict=True)):
            options["ended"]({index: Generated((len(prompt), seed % 7), seed % 2 == 0)})

    monkeypatch.setattr(generation, "generate", generate)
    return calls


def fill(log, samples=2, condition=PLAIN, tokenizer=None, **options):
    responses.generate(
        DECODER,
        tokenizer,
        condition,
        asked(),
        log,
        stop=[3],
        sampling=Sampling(4, 1.0),
        samples=samples,
        **options,
    )


# What is kept.


def test_a_log_gives_back_what_was_added(tmp_path):
    log = responses.response_log(tmp_path)
    assert log.values == {} and not log.path.exists()
    added = {KEY: RESPONSE, Key("clamp", "a \u2028\n", 1): Response((), "\u00e4\r\n", False)}
    log.append(added)
    log.append({Key("plain", "b", 0): Response((7,), None, True)})
    again = responses.response_log(tmp_path)
    assert again.values == log.values and list(again.values)[:2] == list(added)
    assert len(log.path.read_bytes().split(b"\n")) == 4
    verdicts = responses.verdict_log(tmp_path, JUDGES)
    verdict = Verdict(0.5, None, cut=True)
    verdicts.append({KEY: verdict})
    assert responses.verdict_log(tmp_path, JUDGES).values == {KEY: verdict}


def test_verdicts_of_other_judges_stay_and_do_not_count(tmp_path):
    """A run that goes on with another text for its judge must not mix the two."""
    for judges_hash, harmful in (("one", 0.0), ("two", 1.0)):
        verdicts = responses.verdict_log(tmp_path, judges_hash)
        assert verdicts.values == {}
        verdicts.append({KEY: Verdict(harmful)})
    assert responses.verdict_log(tmp_path, "one").values == {KEY: Verdict(0.0)}
    assert responses.verdict_log(tmp_path, "two").values == {KEY: Verdict(1.0)}


def test_exchanges_are_what_people_label(tmp_path):
    log = responses.response_log(tmp_path)
    told = Asked(Prompt("a", "why", "harmful", "A"), (4, 5))
    ids = Asked(Prompt("b", None, "benign", "A", prompt_ids=(6,)), (6,))
    log.append({KEY: RESPONSE, Key("held", "b", 1): Response((7,), None, True)})
    log.append({Key("plain", "elsewhere", 0): RESPONSE})
    verdicts = responses.verdict_log(tmp_path, JUDGES)
    verdicts.append({KEY: Verdict(None, 0.25, harmful_mass=0.0625, refused_mass=0.5)})
    responses.write_exchanges(tmp_path / "exchanges.jsonl", [told, ids], log, verdicts)
    lines = map(json.loads, (tmp_path / "exchanges.jsonl").read_text().splitlines())
    assert list(lines) == [
        {"id": "plain/a/0", "label": "harmful", "prompt": "why", "response": "tell me"}
        | {"prompt_ids": [4, 5], "response_ids": [5, 6]}
        | {"judge_harmful_mass": 0.0625, "judge_refused_mass": 0.5},
        {"id": "held/b/1", "label": "benign", "prompt_ids": [6], "response_ids": [7]},
    ]


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_torn_last_line_is_taken_off(left, tmp_path):
    log = responses.response_log(tmp_path)
    log.append({KEY: RESPONSE})
    whole = log.path.read_bytes()
    other = Key("plain", "b", 0)
    log.append({other: RESPONSE})
    added = log.path.read_bytes()[len(whole) :]
    log.path.write_bytes(whole + added[:left])
    log = responses.response_log(tmp_path)
    assert log.values == {KEY: RESPONSE} and log.path.read_bytes() == whole
    log.append({other: RESPONSE})
    assert log.path.read_bytes() == whole + added


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "null",
        "\ufeff",
        '{"condition": "plain", "prompt": "a", "sample": 0}',
        '{"condition": [], "prompt": "a", "sample": 0, "tokens": [], "text": "", "stopped": true}',
        '{"condition": "p", "prompt": "a", "sample": 0, "tokens": 5, "text": "", "stopped": true}',
        '{"condition": "p", "prompt": "a", "sample": 0, "harmful": 1, "refused": 0, "cut": false}',
    ],
)
def test_a_file_of_something_else_is_left_alone(line, tmp_path):
    log = responses.response_log(tmp_path)
    log.append({KEY: RESPONSE})
    content = log.path.read_bytes() + line.encode() + b"\n"
    log.path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        responses.response_log(tmp_path)
    assert str(caught.value) == f"{log.path}:2: no line of a run of jaxmed; choose another folder"
    assert log.path.read_bytes() == content


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "responses.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="responses.jsonl:1: no line of a run"):
        Log(tmp_path / "responses.jsonl", Response)


# What is generated.


def test_seeds_differ_and_stay():
    # They must never change, or a stopped run would go on with others.
    assert responses.seed_of("a", 0, 0) == 3612086107  # sha256 of [0, "a", 0]
    seeds = [responses.seed_of(p, s, seed) for p in "ab" for s in range(50) for seed in range(5)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)


def test_every_sample_is_generated_once_the_longest_prompts_first(generated, tmp_path):
    log, added = responses.response_log(tmp_path), []
    fill(log, tokenizer=None, seed=5, memory=9, cache_dtype="bfloat16", progress=added.append)
    [(prompts, options)] = generated
    assert list(map(len, prompts)) == [9, 9, 5, 5, 3, 3] and added == [1] * 6
    assert options["seeds"] == [responses.seed_of(p, s, 5) for p in "bca" for s in range(2)]
    assert (options["stop"], options["memory"], options["holds"]) == ([3], 9, ())
    assert (options["sampling"], options["cache_dtype"]) == (Sampling(4, 1.0), "bfloat16")
    assert set(log.values) == set(responses.keys(["plain"], asked(), 2))
    seed = responses.seed_of("c", 1, 5)
    assert log.values[Key("plain", "c", 1)] == Response((5, seed % 7), None, seed % 2 == 0)
    fill(log, seed=5, progress=added.append)
    assert len(generated) == 1 and added == [1] * 6
    fill(log, samples=3, seed=5, progress=added.append)
    assert list(map(len, generated[1][0])) == [9, 5, 3] and added == [1] * 9


def test_a_stopped_run_goes_on_to_the_same_file(generated, tmp_path, monkeypatch):
    monkeypatch.setattr(responses, "_TOGETHER", 2)
    (tmp_path / "whole").mkdir()
    whole = responses.response_log(tmp_path / "whole")
    fill(whole, samples=3)
    calls, answer = len(generated), generation.generate

    def stop(*arguments, **options):
        if len(generated) == calls + 2:
            raise KeyboardInterrupt
        return answer(*arguments, **options)

    monkeypatch.setattr(generation, "generate", stop)
    log = responses.response_log(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fill(log, samples=3)
    assert len(responses.response_log(tmp_path).values) == 4
    monkeypatch.setattr(generation, "generate", answer)
    fill(responses.response_log(tmp_path), samples=3)
    assert log.path.read_bytes() == whole.path.read_bytes()
    assert len(generated) == 2 * calls


def test_conditions_share_seeds_and_have_their_own_holds(generated, tmp_path):
    shift = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((3, 2, 16), np.float32)
    ones = np.ones((2, 16), np.float32)

    def held(rows):
        return [Hold.affine(Site.MLP, ones, shift[rows])]

    log = responses.response_log(tmp_path)
    fill(log, samples=1)
    fill(log, samples=1, condition=Condition("held", held))
    (_, plain), (_, other) = generated
    assert plain["seeds"] == other["seeds"]
    # Of prompts b, c and a, in the order in which they are generated.
    assert other["holds"][0].shift[:, 0, 0].tolist() == [1, 2, 0]
    assert [key.condition for key in log.values] == ["plain"] * 3 + ["held"] * 3


def test_a_real_model_and_its_text(tmp_path):
    log = responses.response_log(tmp_path)
    responses.generate(
        DECODER,
        words.tokenizer(),
        PLAIN,
        asked(),
        log,
        stop=[],
        sampling=Sampling(4),
    )
    found = generation.generate(
        DECODER, [one.tokens for one in asked()], stop=[], sampling=Sampling(4)
    )
    for one, response in zip(asked(), found, strict=True):
        kept = log.values[Key("plain", one.prompt.id, 0)]
        text = words.tokenizer().decode(response.tokens, skip_special_tokens=True)
        assert kept == Response(response.tokens, text, False) and len(kept.tokens) == 4


# What is judged.


class Recorder:
    """A judge that says what it is told to, and remembers what it has read."""

    name, meaning = "recorder", "what it is told to say"

    def __init__(self, **says):
        self.says, self.saying, self.read = tuple(says), says, []

    def __call__(self, exchanges):
        self.read += exchanges
        return [
            Verdict(**{name: value(exchange) for name, value in self.saying.items()})
            for exchange in exchanges
        ]


@pytest.fixture
def answered(tmp_path):
    """Four responses to a, of which two are equal, and one to b that is equal to these."""
    log = responses.response_log(tmp_path)
    tokens = [(5,), (6,), (5,), (7,)]
    log.append({Key("plain", "a", n): Response(t, None, True) for n, t in enumerate(tokens)})
    log.append({Key("plain", "b", 0): Response((5,), None, True)})
    return log


def test_equal_responses_to_a_prompt_are_judged_once(answered, tmp_path):
    judge, added = Recorder(refused=lambda exchange: exchange.response_ids[0] / 10), []
    verdicts = responses.verdict_log(tmp_path, JUDGES)
    wanted = list(answered.values)
    responses.judge(asked(), [judge], wanted, answered, verdicts, progress=added.append)
    assert [e.response_ids for e in judge.read] == [(5,), (6,), (7,), (5,)] and added == [5]
    assert [verdicts.values[key].refused for key in wanted] == [0.5, 0.6, 0.5, 0.7, 0.5]
    assert judge.read[0].prompt_ids == (1, 1, 1) and judge.read[0].prompt is None
    assert judge.read[0].where == "prompt: prompt 'a'"
    # Nothing is judged again, and a later response that is equal is not either.
    later = {Key("clamp", "a", 0): Response((6,), None, False)}
    later[Key("clamp", "a", 1)] = Response((8,), None, False)
    answered.append(later)
    verdicts = responses.verdict_log(tmp_path, JUDGES)
    wanted += later
    responses.judge(asked(), [judge], wanted, answered, verdicts, progress=added.append)
    assert [e.response_ids for e in judge.read[4:]] == [(8,)] and added == [5, 1, 1]
    assert verdicts.values[Key("clamp", "a", 0)].refused == 0.6
    assert responses.verdict_log(tmp_path, JUDGES).values == verdicts.values


def test_only_what_is_wanted_is_judged_and_a_stopped_run_goes_on(answered, tmp_path, monkeypatch):
    monkeypatch.setattr(responses, "_AT_ONCE", 1)

    def stop_at_7(exchange):
        if exchange.response_ids == (7,):
            raise KeyboardInterrupt
        return 1.0

    wanted, verdicts = list(answered.values)[:4], responses.verdict_log(tmp_path, JUDGES)
    with pytest.raises(KeyboardInterrupt):
        responses.judge(asked(), [Recorder(harmful=stop_at_7)], wanted, answered, verdicts)
    verdicts = responses.verdict_log(tmp_path, JUDGES)
    judge = Recorder(harmful=lambda exchange: 1.0)
    assert list(verdicts.values) == [wanted[0], wanted[2], wanted[1]]
    responses.judge(asked(), [judge], wanted, answered, verdicts)
    assert [exchange.response_ids for exchange in judge.read] == [(7,)]
    assert set(verdicts.values) == set(wanted)


def test_each_judge_says_what_those_before_it_do_not(answered, tmp_path):
    key = Key("plain", "a", 0)

    def said(*judges, name):
        verdicts = Log(tmp_path / name, Verdict)
        responses.judge(asked(), judges, [key], answered, verdicts)
        return verdicts.values[key]

    no, yes, half = (Recorder(refused=lambda e, v=v: v) for v in (0.0, 1.0, 0.5))
    harm = Recorder(harmful=lambda exchange: 0.2, cut=lambda exchange: True)
    assert said(no, yes, name="1") == Verdict(None, 0.0)
    does = Recorder(complied=lambda exchange: 0.7)
    assert said(harm, half, yes, name="2") == Verdict(0.2, 0.5, cut=True)
    assert said(half, does, harm, name="3") == Verdict(0.2, 0.5, 0.7, True)


def test_judges_read_the_text_of_a_prompt(answered, tmp_path):
    messages = ({"role": "system", "content": "do it"}, {"role": "user", "content": "how"})
    texts = [
        Asked(Prompt("a", "why", "benign", "A"), (1,)),
        Asked(Prompt("b", messages, "benign", "A"), (1,)),
    ]
    judge = Recorder(refused=lambda exchange: 0.0)
    keys = [Key("plain", "a", 0), Key("plain", "b", 0)]
    responses.judge(texts, [judge], keys, answered, responses.verdict_log(tmp_path, JUDGES))
    assert [exchange.prompt for exchange in judge.read] == ["why", "how"]


# What is counted.


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ((1, 2, 3, 4), 0),
        ((1, 2, 3, 4, 5), 0),
        ((1, 1, 1, 1, 1, 1), 2 / 3),  # one of three is new
        ((1, 2, 1, 2, 1, 2, 1), 1 / 2),  # 1212 2121 1212 2121
    ],
)
def test_repetition(tokens, share):
    assert responses.repetition(tokens) == pytest.approx(share)


def test_short_responses_have_no_repetition():
    assert np.isnan(responses.repetition((1, 1, 1))) and np.isnan(responses.repetition(()))


def test_means_by_prompt():
    table = {"a": [1, np.nan], "b": [np.nan, np.nan], "c": [0, 1]}
    found = responses.by_prompt(asked(), 2, lambda prompt, sample: table[prompt][sample])
    np.testing.assert_array_equal(found, [1, np.nan, 0.5])
    assert responses.by_prompt([], 2, lambda prompt, sample: 1.0).shape == (0,)


def test_the_order_of_keys():
    names = [(key.condition, key.prompt, key.sample) for key in responses.keys("xy", asked(), 2)]
    assert names[:4] == [("x", "a", 0), ("x", "a", 1), ("x", "b", 0), ("x", "b", 1)]
    assert len(names) == 12 and names[6] == ("y", "a", 0)


def test_a_line_is_plain_json(tmp_path):
    log = responses.response_log(tmp_path)
    log.append({KEY: RESPONSE})
    assert json.loads(log.path.read_text()) == {
        "condition": "plain", "prompt": "a", "sample": 0,
        "tokens": [5, 6], "text": "tell me", "stopped": True, "thoughts": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # The first that has a verdict, with its mass; where none has, the mass alone tells why.
        (
            [Verdict(harmful_mass=0.01), Verdict(harmful=0.9, harmful_mass=0.8)],
            Verdict(harmful=0.9, harmful_mass=0.8),
        ),
        (
            [Verdict(harmful_mass=0.01), Verdict(refused=1.0)],
            Verdict(None, 1.0, harmful_mass=0.01),
        ),
        (
            [Verdict(harmful=1.0), Verdict(harmful=0.0, harmful_mass=0.8, complied=0.5, cut=True)],
            Verdict(harmful=1.0, complied=0.5, cut=True),
        ),
    ],
)
def test_several_judges_each_say_what_those_before_do_not(said, expected):
    assert responses._merged([[each] for each in said]) == [expected]
