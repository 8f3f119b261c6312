"""Pairs of a model's own answers: which responses make them, and that `pairs.read` reads them."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import models
from jaxmed.behaviour import answers as answers_of
from jaxmed.behaviour import generation, responses, thoughts
from jaxmed.behaviour.answers import Answers, Unpaired
from jaxmed.behaviour.generation import Generated
from jaxmed.behaviour.judges.protocol import Doubt, Verdict
from jaxmed.behaviour.responses import Key, Response
from jaxmed.data import pairs as pairs_lib
from jaxmed.data import splits as splits_lib
from jaxmed.data.control import TextTokenizer
from jaxmed.data.tokens import Encoder
from jaxmed.question import metrics
from jaxmed.question import question as question_lib
from jaxmed.question.positions import Align, Positions
from jaxmed.report import respond
from jaxmed.runs import asking
from jaxmed.runs import respond as respond_lib
from jaxmed.runs.respond import RespondSettings
from jaxmed.store import claims
from models import checkpoint
from models.errors import InputError
from tests import chats, tiny, words

VOCABULARY = len(words.WORDS)
SHAPE = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 12, "head_dim": 4}
END = words.IDS["[END]"]
COMPLY, REFUSE = range(4, 10), range(10, VOCABULARY)
JUDGED = {
    "judge": ("tokens",),
    "comply_tokens": tuple(f"id:{token}" for token in COMPLY),
    "refuse_tokens": tuple(f"id:{token}" for token in REFUSE),
}
SAMPLED = {"samples": 6, "temperature": 1.0, "max_tokens": 5}
HARMFUL = [
    {
        "id": f"h{n}",
        "prompt_ids": [5 + n, 6, 7],
        "label": "harmful",
        "counterfactual_ids": [1, 2, 3],
    }
    for n in range(3)
]
BENIGN = [{"id": f"b{n}", "prompt_ids": [9 + n, 6, 7], "label": "benign"} for n in range(2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model with and without tokenizer."""
    made = {}
    for name, tokenizer in (("text", words.tokenizer()), ("ids", None)):
        made[name] = tmp_path_factory.mktemp("respond") / name
        decoder = tiny.decoder(vocab_size=VOCABULARY, **SHAPE)
        checkpoint.save(decoder, made[name], tokenizer=tokenizer)
        (made[name] / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    return made


@pytest.fixture
def ask(folders, tmp_path):
    """A function that gives settings for a file of prompts with these rows."""

    def make(*rows, model="ids", **fields):
        file = tmp_path / "prompts.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        fields = {"out": str(tmp_path / "out")} | SAMPLED | JUDGED | fields
        return RespondSettings(model=str(folders[model]), prompts=(str(file),), **fields)

    return make


@pytest.fixture
def answer(monkeypatch):
    """A function that has the model give these answers, in words, to each prompt in turn."""

    def give(*answers):
        found = [Generated(words.ids(text), True) for text in answers]

        def generate(decoder, prompts, **options):
            options["ended"]({i: found[i % len(found)] for i in range(len(prompts))})

        monkeypatch.setattr(generation, "generate", generate)

    return give


@pytest.fixture
def run(ask):
    return lambda *rows, **fields: respond_lib.run(ask(*rows, **fields), progress=False)


def samples(folder, prompt):
    """The responses to a prompt, by sample."""
    kept = responses.response_log(folder).values
    own = {key.sample: response for key, response in kept.items() if key.prompt == prompt}
    return [own[sample] for sample in sorted(own)]


def expected(folder, prompt, kind):
    """The tokens of the first response of a kind, finished ones first."""
    own = [r for r in samples(folder, prompt) if r.tokens and r.tokens[0] in kind]
    own.sort(key=lambda response: not response.stopped)
    return own[0].tokens if own else None


# What is written.


def test_pairs_of_tokens_are_the_first_responses_of_each_kind(run):
    found = run(*HARMFUL, *BENIGN)
    pairs = pairs_lib.read(found.folder / "pairs.jsonl")
    wanted = {
        row["id"]: [expected(found.folder, row["id"], kind) for kind in (COMPLY, REFUSE)]
        for row in HARMFUL
    }
    wanted = {name: answers for name, answers in wanted.items() if None not in answers}
    assert {pair.base: [pair.harmful_ids, pair.safe_ids] for pair in pairs} == wanted
    assert len(pairs) == sum(found.pairs.values()) >= 2
    assert found.pairs == {split: sum(pair.split == split for pair in pairs) for split in "ABC"}
    assert (found.templates, found.same_start) == (0, 0)
    for pair in pairs:
        assert pair.id == f"{pair.base}/1" and pair.label == "harmful"
        assert pair.prompt_ids[1:] == (6, 7) and pair.counterfactual_ids == (1, 2, 3)
        assert pair.split == splits_lib.split_of(None, pair.base, "")


def test_rates_by_prompt_and_by_label(run):
    found = run(*HARMFUL, *BENIGN)
    table = pq.read_table(found.folder / "prompts.parquet")
    assert table.schema == answers_of.ROW and table == found.table
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [row["id"] for row in HARMFUL + BENIGN]
    for row in rows:
        own = samples(found.folder, row["id"])
        first = [response.tokens[:1] for response in own]
        complied = sum(t != () and t[0] in COMPLY for t in first) / 6
        assert row["harm_rate"] == (complied if row["label"] == "harmful" else None)
        assert row["refusal_rate"] == sum(t != () and t[0] in REFUSE for t in first) / 6
        assert (row["samples"], row["unfinished"]) == (6, sum(not r.stopped for r in own))
    lines = respond.closing_lines(found)
    assert lines[0].startswith("Judge tokens: exact for a language of abstract tokens")
    mean = np.mean([row["harm_rate"] for row in rows[:3]])
    assert lines[1].startswith(f"harmful: 3 prompts, 6 responses each; harm rate {mean:.3f} [")
    assert lines[2].startswith("benign: 2 prompts, 6 responses each; refusal rate ")
    unfinished = sum(row["unfinished"] for row in rows)
    assert 0 < unfinished < 30
    assert lines[3].endswith(f"not by the model: {unfinished} of 30 responses")
    assert (
        lines[4] == f"Prompts: {found.folder / 'prompts.parquet'} (5); responses and verdicts "
        "are in the same folder"
    )
    splits = ", ".join(f"{found.pairs[split]} in split {split}" for split in "ABC")
    total = sum(found.pairs.values())
    assert lines[5] == f"Pairs: {found.folder / 'pairs.jsonl'} ({total}: {splits})"
    assert found.unpaired.number == len(HARMFUL) - total == 1
    assert lines[6].startswith("1 of 3 harmful prompts make no pair: 1 got harmful responses alone")
    assert lines[7].startswith("The command finds units by split A alone")
    command = f"python -m launch.mediate --model={found.model} "
    command += f"--pairs={found.folder / 'pairs.jsonl'} --positions=prompt --split=A "
    command += f"--out={found.folder / 'mediate'}"
    assert found.pairs["A"] and lines[8:] == [command]


@pytest.mark.parametrize(
    ("split", "said"),
    [("B", "The command finds units by split B alone"), ("C", "All pairs are in split C, whose")],
)
def test_without_pairs_of_split_a(split, said, run):
    found = run(*(row | {"split": split} for row in HARMFUL))
    *_, words, command = respond.closing_lines(found)
    assert words.startswith(said) and (f" --split={split} " in command) == (split == "B")


def test_responses_can_be_labelled(run):
    found = run(*HARMFUL, *BENIGN)
    lines = map(json.loads, (found.folder / "exchanges.jsonl").read_text().splitlines())
    assert {line["id"] for line in lines} == {
        f"plain/{row['id']}/{sample}" for row in HARMFUL + BENIGN for sample in range(6)
    }


def test_benign_prompts_that_no_pair_needs_are_not_answered(run):
    """Of a file with tens of thousands of them."""
    found = run(*HARMFUL, *BENIGN, counterfactual="length")
    pairs = pairs_lib.read(found.folder / "pairs.jsonl")
    used = {pair.counterfactual_ids for pair in pairs}
    answered = {row["id"] for row in found.table.to_pylist()}
    made = {pair.base for pair in pairs}
    assert made <= {"h0", "h1", "h2"} <= answered
    drawn = {row["id"] for row in BENIGN if tuple(row["prompt_ids"]) in used}
    assert drawn <= answered and len(answered & {"b0", "b1"}) == 1


@pytest.mark.parametrize("how", ["given", "matched", "length"])
def test_pairs_of_text_give_the_models_own_tokens(how, run, folders):
    chat = [{"role": "user", "content": "how to do"}]
    rows = [
        {"id": "h", "prompt": "tell me how ", "label": "harmful", "counterfactual": ["why", chat]},
        {"id": "m", "prompt": chat, "label": "harmful", "counterfactual": "tell me"},
        {"id": "b", "prompt": "tell me why", "label": "benign"},
        {"id": "c", "prompt": [{"role": "user", "content": "how to [USER]"}], "label": "benign"},
    ]
    shared = {"split": "B", "source": "here", "category": "words"}
    rows = [row | shared | {"match": name} for row, name in zip(rows, "xyxy", strict=True)]
    # Answers of others are of no concern.
    rows[0] |= {"harmful_response": "why", "safe_ids": [1]}
    found = run(*rows, model="text", counterfactual=how, samples=16)
    decoder, tokenizer = models.load(folders["text"])
    pairs = pairs_lib.read(found.folder / "pairs.jsonl", tokenizer)
    lines = list(map(json.loads, (found.folder / "pairs.jsonl").read_text().splitlines()))
    counterfactuals = {
        "given": ["why", chat, "tell me"],
        "matched": [rows[2]["prompt"], rows[3]["prompt"]],
        "length": [rows[2]["prompt"], rows[3]["prompt"]],
    }[how]
    assert [line["counterfactual"] for line in lines] == counterfactuals
    assert [line["prompt"] for line in lines][-2:] == ["tell me how ", chat]
    for pair, line in zip(pairs, lines, strict=True):
        assert pair.harmful_ids == expected(found.folder, pair.base, COMPLY)
        assert pair.safe_ids == expected(found.folder, pair.base, REFUSE)
        assert (pair.split, pair.source, pair.category) == ("B", "here", "words")
        is_text = "harmful_response" in line and "safe_response" in line
        assert is_text or set(range(4)) & {*pair.harmful_ids, *pair.safe_ids}
        question = question_lib.Question(
            metrics.LogitDifference(), Positions.LAST, Align.END, 1, None
        )
        question_lib.check(decoder.config, pair, question, ("layer",))


def test_chat_is_told_to_mediate(run, folders):
    row = {"id": "h", "prompt": "tell me how", "label": "harmful", "counterfactual": "why"}
    found = run(row, model="text", chat=True)
    [pair] = pairs_lib.read(found.folder / "pairs.jsonl", words.tokenizer(), chat=True)
    assert pair.prompt_ids == words.ids("[BOS] [USER] tell me how [END] [BOT]")
    assert pair.harmful_ids == expected(found.folder, "h", COMPLY)
    assert " --chat " in respond.closing_lines(found)[-1]


def test_text_that_loses_tokens_is_written_as_tokens(tmp_path):
    encoder, field = Encoder(words.tokenizer()), "safe_response"
    after = encoder.prompt("tell me ", "prompt", "file")
    kept = Response(words.ids("no why"), "no why", True)
    lost = Response(words.ids("[BOS] no"), "no", True)
    assert answers_of.answer_field(field, kept, after, encoder) == {field: "no why"}
    assert answers_of.answer_field(field, lost, after, encoder) == {"safe_ids": lost.tokens}


def test_pairs_have_answers_without_thoughts(tmp_path):
    """As judges read them; and not what both begin with, the tag."""
    tokenizer = chats.byte_level(chats.THINKING)
    encoder, field = Encoder(tokenizer, chat=True), "harmful_response"
    after = encoder.prompt("tell me", "prompt", "file")
    thought, said = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in ("<think>\nwhy\n</think>\n\n", "Sure, I will")
    )
    begins = thoughts.length(TextTokenizer(tokenizer), after.ids, thought + said)
    response = Response(thought + said, "Sure, I will", True, begins)
    assert answers_of.answer_field(field, response, after, encoder) == {field: "Sure, I will"}
    altered = dataclasses.replace(response, text="Sure")
    assert answers_of.answer_field(field, altered, after, encoder) == {"harmful_ids": said}
    safe = Response(thought + (7, 8), "no", True, begins)
    both = Answers(harmful=response, safe=safe)
    assert both.came_of_thoughts and not both.start_alike
    assert not Answers(None, Response(said, "no", True)).came_of_thoughts


# Which responses count.

YES, NO, NONE = 0.9, 0.1, None


@pytest.mark.parametrize(
    ("harmful", "refused", "kind"),
    [
        (YES, NO, "harmful"),
        (YES, YES, "harmful"),
        (YES, NONE, "harmful"),
        (0.5, NO, "harmful"),
        (NONE, NO, "harmful"),
        (NO, YES, "safe"),
        (NO, 0.5, "safe"),
        (NONE, YES, "safe"),
        (NO, NONE, "safe"),
        (NO, NO, None),
        (NONE, NONE, None),
    ],
)
def test_what_a_verdict_makes_of_a_response(harmful, refused, kind):
    verdict = Verdict(harmful, refused)
    found = answers_of.is_harmful(verdict, 0.5), answers_of.is_safe(verdict, 0.5)
    assert found == (kind == "harmful", kind == "safe")


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [
        (Verdict(None, NO, harmful_mass=0.01), None),  # another judge would call it harmful
        (Verdict(None, YES, harmful_mass=0.01), "safe"),
        (Verdict(NO, None, refused_mass=0.01), None),
        (Verdict(YES, None, refused_mass=0.01), "harmful"),
        (Verdict(YES, NO, harmful_mass=0.2), "harmful"),
    ],
)
def test_a_judge_that_was_asked_and_has_no_verdict(verdict, kind):
    found = answers_of.is_harmful(verdict, 0.5), answers_of.is_safe(verdict, 0.5)
    assert found == (kind == "harmful", kind == "safe")


class Doubtful:
    """Has a verdict on what says yes or no, of which the latter is unsure."""

    name, meaning, says = "doubtful", "whether it says yes", ("harmful",)

    def __call__(self, exchanges):
        masses = {"yes": 0.9, "no": 0.3}
        return [
            Verdict(
                harmful=float(each.response == "yes") if each.response in masses else None,
                harmful_mass=masses.get(each.response, 1e-6),
            )
            for each in exchanges
        ]


def test_responses_without_a_verdict_are_counted_and_make_no_pair(ask, answer):
    answer("tell", "yes", "do", "no")
    asked = ask(ONE, model="text", samples=4)
    found = respond_lib.run(asked, own_judges=[Doubtful()], progress=False)
    [line] = map(json.loads, (found.folder / "pairs.jsonl").read_text().splitlines())
    assert (line["harmful_response"], line["safe_response"]) == ("yes", "no")
    assert found.doubts == [Doubt("harmful", 2, 1, 4)]
    assert found.table.to_pylist()[0]["harm_rate"] == 0.5
    lines = respond.closing_lines(found)
    assert any(
        line.startswith("No verdict on whether 2 of 4 responses are harmful") for line in lines
    )
    exchanges = map(json.loads, (found.folder / "exchanges.jsonl").read_text().splitlines())
    assert [line["judge_harmful_mass"] for line in exchanges] == [1e-6, 0.9, 1e-6, 0.3]
    answer("tell", "do")
    again = dataclasses.replace(asked, samples=2, overwrite=True)
    with pytest.raises(InputError) as caught:
        respond_lib.run(again, own_judges=[Doubtful()], progress=False)
    assert "On 2 of 2 responses there is no verdict (harmful), since all answers" in str(
        caught.value
    )


def test_at_most_so_many_prompts_of_a_label_are_answered(run):
    rows = [row | {"split": "A"} for row in HARMFUL + BENIGN]
    rows += [{"id": "o", "prompt_ids": [4, 4], "label": "overrefusal", "split": "A"}]
    few = run(*rows, most_prompts=1, counterfactual="length")
    assert [row["label"] for row in few.table.to_pylist()] == ["harmful", "benign", "overrefusal"]
    # Counterfactuals are those of all prompts, and the same command goes on with more.
    more = run(*rows, most_prompts=2, counterfactual="length")
    assert {row["id"] for row in few.table.to_pylist()} < {r["id"] for r in more.table.to_pylist()}
    assert sum(row["label"] == "harmful" for row in more.table.to_pylist()) == 2
    pairs = (pairs_lib.read(found.folder / "pairs.jsonl") for found in (more,))
    assert {pair.base for pair in next(pairs)} <= {row["id"] for row in more.table.to_pylist()}


def test_the_nearest_counterfactuals_are_told(ask, folders):
    rows = [
        *({"id": f"h{n}", "prompt_ids": [5] * n, "label": "harmful"} for n in (3, 4, 9)),
        {"id": "b", "prompt_ids": [6] * 3, "label": "benign"},
    ]
    asked = ask(*(row | {"split": "A"} for row in rows), counterfactual="length")
    model = asking.load(asked)
    prompts = asking.as_asked(asked, asking.read_files(asked), model)

    def said(**changes):
        told = []
        changed = dataclasses.replace(asked, **changes)
        pairs = respond_lib.find_pairs(changed, model, prompts, told.append)
        return [pair.base for pair in pairs], told

    every = "counterfactuals have as many tokens as their prompts; the farthest differs by"
    assert said() == (["h3", "h4", "h9"], [f"1 of 3 {every} 6"])
    bases, told = said(most_length_difference=1)
    assert bases == ["h3", "h4"] and told[1:] == [
        "2 of 3 harmful prompts can be paired", f"1 of 2 {every} 1",
    ]  # fmt: skip
    assert told[0].startswith("No pair: ") and "differs by 6 tokens, and 1 are allowed" in told[0]


def test_the_first_finished_response_that_says_something(tmp_path):
    log, verdicts = responses.response_log(tmp_path), responses.verdict_log(tmp_path, "judges")
    kept = [
        (Response((), "", True), YES),
        (Response((5,), "  \n", True), YES),
        (Response((6,), "me", False), YES),
        (Response((7,), "how", True), YES),
        (Response((8,), "to", True), YES),
        (Response((9,), "do", False), NO),
        (Response((10,), None, False), NO),
    ]
    keys = [Key("plain", "h", sample) for sample in range(len(kept))]
    log.append(dict(zip(keys, [response for response, _ in kept], strict=True)))
    verdicts.append({k: Verdict(v, 1 - v) for k, (_, v) in zip(keys, kept, strict=True)})

    def found(samples):
        return answers_of.of_prompt("h", log, verdicts, samples=samples, threshold=0.5)

    assert found(7) == Answers(kept[3][0], kept[5][0])
    assert found(3) == Answers(kept[2][0], None)
    assert found(2) == Answers(None, None)


# An answer that follows a space is words of its own.
ONE = {"id": "h", "prompt": "tell me how ", "label": "harmful", "counterfactual": "why"}


def test_a_judge_that_says_nothing_of_harm(run, answer):
    answer("sorry no", "do it", "sorry", "tell me")
    only = {"judge": ("phrases",), "comply_tokens": (), "refuse_tokens": ()}
    found = run(ONE, model="text", samples=4, **only)
    [line] = map(json.loads, (found.folder / "pairs.jsonl").read_text().splitlines())
    assert (line["harmful_response"], line["safe_response"]) == ("do it", "sorry no")
    [row] = found.table.to_pylist()
    assert (row["harm_rate"], row["refusal_rate"], row["unfinished"]) == (None, 0.5, 0)
    lines = respond.closing_lines(found)
    assert lines[1].startswith("harmful: 1 prompts, 4 responses each; refusal rate 0.500 [")
    assert lines[3] == "No judge says what is harmful: a response that is no refusal counts as such"


def test_a_judge_of_ones_own_that_says_nothing_of_refusal(ask, answer):
    class Harm:
        name, meaning, says = "harm", "whether it says yes", ("harmful",)

        def __call__(self, exchanges):
            return [Verdict(harmful=float(each.response == "yes")) for each in exchanges]

    answer("do it", "yes")
    asked = ask(ONE, model="text", samples=2)
    found = respond_lib.run(asked, own_judges=[Harm()], progress=False)
    [line] = map(json.loads, (found.folder / "pairs.jsonl").read_text().splitlines())
    assert (line["harmful_response"], line["safe_response"]) == ("yes", "do it")
    lines = respond.closing_lines(found)
    assert lines[1].startswith("harmful: 1 prompts, 2 responses each; harm rate 0.500 [")
    assert lines[3] == "No judge says what refuses: a response that is not harmful counts as safe"


def test_a_template_stands_in_for_safe_responses(run, answer):
    answer("tell me", "do it")
    found = run(ONE, model="text", samples=2, safe_template="no why")
    [line] = map(json.loads, (found.folder / "pairs.jsonl").read_text().splitlines())
    assert (line["harmful_response"], line["safe_response"]) == ("tell me", "no why")
    assert (sum(found.pairs.values()), found.templates) == (1, 1)
    [said] = [line for line in respond.closing_lines(found) if line.startswith("Pairs: ")]
    assert "pairs.jsonl (1: " in said
    assert said.endswith("; 1 of them with --safe_template as the safe response)")
    answer("tell me", "no")
    found = run(ONE, model="text", samples=2, safe_template="no why", overwrite=True)
    [line] = map(json.loads, (found.folder / "pairs.jsonl").read_text().splitlines())
    assert line["safe_response"] == "no" and found.templates == 0


def test_answers_that_begin_alike_need_the_other_metric(run, answer):
    answer("tell me")
    found = run(ONE, model="text", safe_template="tell me why not")
    assert found.same_start == 1
    said, command = respond.closing_lines(found)[-2:]
    assert said.startswith("In 1 of the pairs both answers begin with the same token, of which")
    assert " --metric=response_logprob_diff --out=" in command


# Going on.


def test_a_run_can_be_judged_otherwise(run, answer):
    """Responses do not depend on judges; a text that was too long for one must cost nothing."""
    answer("sorry no", "do it", "sorry", "tell me")
    only = {"judge": ("phrases",), "comply_tokens": (), "refuse_tokens": ()}
    before = run(ONE, model="text", samples=4, **only)
    kept = (before.folder / "responses.jsonl").read_bytes()
    answer()
    after = run(ONE, model="text", samples=4)
    assert list(after.meanings) == ["tokens"] and list(before.meanings) == ["phrases"]
    assert (after.folder / "responses.jsonl").read_bytes() == kept
    assert [row["harm_rate"] for row in before.table.to_pylist()] == [None]
    assert after.table.to_pylist()[0]["harm_rate"] is not None
    assert run(ONE, model="text", samples=4, **only).table == before.table


def test_a_stopped_run_goes_on_to_equal_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(responses, "_TOGETHER", 10)
    rows, generate, asked = HARMFUL + BENIGN, generation.generate, []

    def count(decoder, prompts, **options):
        asked.extend(zip(map(tuple, prompts), options["seeds"], strict=True))
        return generate(decoder, prompts, **options)

    def stop(decoder, prompts, **options):
        if len(asked) >= 20:
            raise KeyboardInterrupt
        return count(decoder, prompts, **options)

    monkeypatch.setattr(generation, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*rows)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"run.json", "responses.jsonl"}
    monkeypatch.setattr(generation, "generate", count)
    run(*rows)
    assert len(asked) == len(set(asked)) == 30
    run(*rows, out=str(tmp_path / "whole"))
    assert len(asked) == 60
    for name in ("responses.jsonl", "verdicts.jsonl", "pairs.jsonl", "prompts.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_can_be_paired_otherwise_and_sampled_further(run, monkeypatch):
    fewer = run(*HARMFUL, *BENIGN, samples=3)
    kept = (fewer.folder / "responses.jsonl").read_bytes()
    generate, asked = generation.generate, []

    def count(decoder, prompts, **options):
        asked.extend(prompts)
        return generate(decoder, prompts, **options)

    monkeypatch.setattr(generation, "generate", count)
    more = run(*HARMFUL, *BENIGN, counterfactual="length", count=2)
    assert len(asked) == 4 * 3 and sum(more.pairs.values()) >= sum(fewer.pairs.values())
    assert (more.folder / "responses.jsonl").read_bytes().startswith(kept)
    said = json.loads((more.folder / "run.json").read_text())
    assert (said["samples"], said["counterfactual"], said["count"]) == (6, "length", 2)
    with pytest.raises(InputError, match="other settings: --temperature was 1.0, is now 0.5"):
        run(*HARMFUL, *BENIGN, temperature=0.5)
    with pytest.raises(InputError, match=r"not of the same prompts \(what --prompts hold\)"):
        run(*HARMFUL)
    run(*HARMFUL, temperature=0.5, overwrite=True)
    assert len(asked) == 4 * 3 + 3 * 6


def test_keys_and_values_are_kept_as_asked(run, monkeypatch):
    generate, seen = generation.generate, []

    def watched(decoder, prompts, **options):
        seen.append(options.pop("cache_dtype"))
        return generate(decoder, prompts, **options)

    monkeypatch.setattr(generation, "generate", watched)
    found = run(*HARMFUL, *BENIGN, cache_dtype="bfloat16")
    assert set(seen) == {"bfloat16"}
    assert json.loads((found.folder / "run.json").read_text())["cache_dtype"] == "bfloat16"
    with pytest.raises(InputError, match="other settings: --cache_dtype was .bfloat16., is now"):
        run(*HARMFUL, *BENIGN)


def test_another_kind_of_run_is_not_gone_on_with(run, tmp_path, monkeypatch):
    claims.claim(tmp_path / "out", {"program": "clamp"}, ())
    monkeypatch.setattr(asking, "load", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(InputError, match="holds another kind of run: choose another folder"):
        run(*HARMFUL)
    (tmp_path / "out" / "run.json").rename(tmp_path / "out" / "mine.json")
    with pytest.raises(InputError, match="holds files of something else: choose another folder"):
        run(*HARMFUL)


def test_a_file_of_prompts_that_is_not_there_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(asking, "load", lambda *_: pytest.fail("was loaded"))
    asked = RespondSettings(model="m", prompts=("gone.jsonl",), out="out")
    with pytest.raises(InputError, match=r"^gone.jsonl: there is no such file"):
        respond_lib.run(asked, progress=False)


def test_ignored_keys_of_config_json_stay(run):
    """One rule for all programs: of what was loaded otherwise nobody says that it is the same."""
    row = {"id": "h", "prompt": "tell me how", "label": "harmful", "counterfactual": "why"}
    run(row, model="text")
    with pytest.raises(InputError, match=r"ignore_config was \[\], is now \[.trained_in.\]"):
        run(row, model="text", ignore_config=("trained_in",))


# Bad input.


def test_no_prompt_got_both_kinds(run, answer, tmp_path):
    texts = ("tell me how", "tell me why", "tell me to", "tell me no")
    rows = [ONE | {"id": n, "prompt": text} for n, text in zip("abcd", texts, strict=True)]
    run(*rows, model="text", samples=16)
    answer("no", "no", "do", "do", "[BOS]", "[BOS]", "no", "no")
    with pytest.raises(InputError) as caught:
        run(*rows, model="text", samples=2, overwrite=True)
    message = f"{tmp_path / 'out'}: no pair, since no prompt got both a harmful and a safe response"
    assert str(caught.value).startswith(f"{message}. Of 4 harmful prompts with counterfactuals 2 ")
    counts = "2 got safe ones alone, 1 harmful ones alone, 1 neither. The responses are kept"
    assert counts in str(caught.value)
    for way in ("more --samples", "another --threshold", "--safe_template=TEXT", "--temperature"):
        assert way in str(caught.value)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()
    assert (tmp_path / "out" / "prompts.parquet").exists()
    assert len(responses.response_log(tmp_path / "out").values) == 8
    answer("do", "no", "do", "do")
    found = run(*rows, model="text", samples=3)
    assert sum(found.pairs.values()) == 3  # of a, b and d
    assert found.unpaired == Unpaired(safe_alone=0, harmful_alone=1, neither=0, prompts=4)


def test_pairs_of_another_way_of_pairing_do_not_stay(run, answer, tmp_path):
    answer("do", "no")
    run(ONE, model="text", samples=2)
    assert (tmp_path / "out" / "pairs.jsonl").exists()
    with pytest.raises(InputError, match="no pair"):
        run(ONE, model="text", samples=1)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


TEXT = {"prompt": "tell me", "label": "harmful", "counterfactual": "why"}
ALONE = {"prompt_ids": [5, 6], "label": "harmful"}
BAD = {
    # rows; settings; what the message says
    "no benign prompts": (
        HARMFUL, {"counterfactual": "matched"},
        "--counterfactual=matched: {file} have no benign or overrefusal prompts; give "
        "some, --prompts=benign=FILE",
    ),
    "none in the split": (
        [ALONE | {"split": "A"}, BENIGN[0] | {"split": "B"}], {"counterfactual": "length"},
        "--counterfactual=length: {file}:1: prompt '1' cannot be paired: there is no benign prompt "
        "in its split, A (or leave such prompts out: --skip_bad_prompts)",
    ),
    "none as long": (
        [ALONE | {"split": "A"}, BENIGN[0] | {"split": "A"}],
        {"counterfactual": "length", "most_length_difference": 0},
        "--counterfactual=length: not one of 2 prompts has a counterfactual ('length')",
    ),
    "a length for others": (
        HARMFUL, {"most_length_difference": 0},
        "--most_length_difference needs --counterfactual=length",
    ),
    "none given": (
        [ALONE], {"skip_bad_prompts": True},
        "--counterfactual=given: no harmful prompt of {file} has a counterfactual in its file; "
        "give --counterfactual=matched or length, and benign --prompts",
    ),
    "some given": (
        [ALONE, *HARMFUL], {}, "cannot be paired: its file gives no counterfactual (or leave",
    ),
    "none harmful": (BENIGN, {}, "{file}: none of 2 prompts is harmful, and pairs are of harmful"),
    "a long counterfactual": (
        [ALONE | {"counterfactual_ids": [1] * 60}], {},
        "{file}:1: the counterfactual of prompt '1' has 60 tokens, which with --max_tokens=5 are",
    ),
    "long ones alone": (
        [ALONE | {"counterfactual_ids": [1] * 60}], {"skip_bad_prompts": True},
        "not one of 1 harmful prompts has a usable counterfactual",
    ),
    "text without a tokenizer": ([TEXT], {}, "{file}:1: 'prompt' is text, but the checkpoint has"),
    "a template without a tokenizer": (
        HARMFUL, {"safe_template": "no"}, "--safe_template: is text, and {ids} has no tokenizer",
    ),
    "an empty template": (
        [TEXT], {"safe_template": " ", "model": "text"}, "--safe_template: has no tokens",
    ),
    "a judge of text without a tokenizer": (
        HARMFUL, {"judge": ("tokens", "phrases")}, "--judge=phrases: reads text, but {ids} has no",
    ),
    "no such judge": ([TEXT], {"judge": ("tokens", "nobody"), "model": "text"}, "judge 'nobody'"),
    "no such counterfactuals": (
        HARMFUL, {"counterfactual": "none"}, "--counterfactual=none: not one of given, matched,",
    ),
    "a count of given ones": (HARMFUL, {"count": 2}, "--count needs --counterfactual=matched or"),
    "no count": (HARMFUL, {"count": 0}, "--count=0: must be a number, and at least 1"),
    "no threshold": (HARMFUL, {"threshold": 1.5}, "--threshold=1.5: must be a number, and at most"),
    "no memory": (HARMFUL, {"memory_gb": 0.01}, "memory_gb=0.01 (--memory_gb): model"),
    "no model": (HARMFUL, {"model": "none"}, "/nowhere: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_nothing_behind(case, ask, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(folders, "none", "/nowhere")
    rows, fields, message = BAD[case]
    asked = ask(*rows, **fields)
    with pytest.raises(InputError) as caught:
        respond_lib.run(asked, progress=False)
    message = message.format(file=asked.prompts[0], ids=folders["ids"])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_prompts_without_counterfactual_can_be_left_out(ask, folders, tmp_path):
    asked = ask(*HARMFUL, ALONE | {"id": "x"}, skip_bad_prompts=True)
    said, model = [], asking.load(asked)
    prompts = asking.as_asked(asked, asking.read_files(asked), model)
    pairs = respond_lib.find_pairs(asked, model, prompts, said.append)
    assert [pair.base for pair in pairs] == ["h0", "h1", "h2"]
    assert said[0].endswith("prompt 'x' cannot be paired: its file gives no counterfactual")
    assert said[1] == "3 of 4 harmful prompts can be paired"
