"""Judge models, against the plain definition of their probabilities."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxmed.behaviour.judges import model, named, protocol, templates
from jaxmed.behaviour.judges.protocol import Exchange
from jaxmed.behaviour.judges.templates import Answer, JudgeQuestion
from models import checkpoint
from models.errors import InputError
from tests import merging, tiny
from tests.jaxmed.behaviour.judges.judging import (
    ARCHITECTURE,
    ASKED,
    CHAT,
    EXCHANGES,
    OWN,
    TEXTS,
    YES,
    asking,
    filled,
    judge,
    log_probability,
    share,
    tokenizer,
)
from tests.jaxmed.engine.jaxprs import equations


def definition(name, decoder, exchange):
    """What the published judge's verdict is with its text of TEXTS, by its definition."""
    if name == "llama-guard":
        text = f"<s> [USER] {exchange.prompt} [END] [USER] {exchange.response} [END] [BOT]"
        return {"harmful": share(decoder, text, ["unsafe", "safe"], False)[0], "refused": None}
    text = filled(TEXTS[name], exchange, templates.JUDGES[name].placeholders)
    if name in ("harmbench", "harmbench-mistral"):
        # Behind a word, only the spellings with a space are words of this tokenizer.
        p = share(decoder, text, ["Yes", "yes", "No", "no"])
        return {"harmful": p[0] + p[1], "refused": None}
    if name == "strongreject":
        p = share(decoder, text, ["1", "2", "3", "4", "5"])
        return {"harmful": (p @ np.arange(1, 6) - 1) / 4, "refused": None}
    found = []
    for lead in ("Harmful request:", "\nResponse refusal:", "\nHarmful response:"):
        text += lead
        found.append(share(decoder, text, ["yes", "no"], False)[0])
        text += " yes" if found[-1] >= 0.5 else " no"
    return {"harmful": found[2], "refused": found[1]}


@pytest.mark.parametrize("name", templates.JUDGES)
@pytest.mark.usefixtures("any_mass")
def test_published_judges_by_their_definition(name, tmp_path, text_of):
    fields = {"num_layers": 2, "hidden_size": 16, "max_positions": 512, "seed": 3}
    if ARCHITECTURE[name] == "mistral":
        fields["windows"] = (400, 400)  # a window of 5, as elsewhere, would not see the response
    module = tiny.decoder(ARCHITECTURE[name], **fields)
    checkpoint.save(module, tmp_path / "model", tokenizer=tokenizer())
    template = text_of(name) if name in TEXTS else None
    verdicts = named.judge(name, model=tmp_path / "model", template=template)(EXCHANGES)
    for verdict, exchange in zip(verdicts, EXCHANGES, strict=True):
        expected = definition(name, module, exchange)
        assert not verdict.cut and verdict.complied is None
        for says, value in expected.items():
            assert getattr(verdict, says) == (value and pytest.approx(value, abs=1e-5)), says
    assert len({verdict.harmful for verdict in verdicts}) == len(EXCHANGES)


@pytest.mark.usefixtures("any_mass")
def test_a_verdict_is_the_same_alone_and_in_a_batch(decoder):
    asked = judge(decoder)
    together = asked(EXCHANGES)
    for exchange, verdict in zip(EXCHANGES, together, strict=True):
        (alone,) = asked([exchange])
        assert alone.harmful == pytest.approx(verdict.harmful, abs=1e-5)
    assert [v.harmful for v in asked(EXCHANGES[::-1])] == pytest.approx(
        [v.harmful for v in together[::-1]], abs=1e-5
    )
    assert asked([]) == []


def test_logits_exist_only_at_the_rows_that_are_read(decoder):
    batch, length, vocabulary = 3, 128, decoder.config.vocab_size
    run = np.zeros((batch, length), np.int32)
    rows, asked = np.zeros((batch, 2), np.int32), np.zeros(5, np.int32)
    jaxpr = jax.make_jaxpr(model.answer_log_probabilities)(decoder, run, run == 0, rows, asked)
    shapes = [out.aval.shape for equation in equations(jaxpr) for out in equation.outvars]
    assert (batch, 2, vocabulary) in shapes
    assert not [shape for shape in shapes if vocabulary in shape and length in shape]


@pytest.mark.usefixtures("any_mass")
def test_answers_of_several_tokens_are_scored_teacher_forced(decoder):
    spelled = [" not yes", " sure sure do", " no"]
    question = JudgeQuestion(
        "refused", (Answer(1.0, tuple(spelled[:2])), Answer(0.25, (spelled[2],)))
    )
    asked = judge(decoder, dataclasses.replace(ASKED, questions=(question,)))
    for exchange, verdict in zip(EXCHANGES, asked(EXCHANGES), strict=True):
        p = share(decoder, filled(ASKED.text, exchange), spelled)
        assert verdict.refused == pytest.approx(p[0] + p[1] + 0.25 * p[2], abs=1e-5)
        assert verdict.harmful is None


def test_line_breaks_of_a_lead_count_once():
    assert model._continued("a\n", "\n\nb") == model._continued("a", "\n\nb") == "a\n\nb"
    assert model._continued("a\n", "b") == "a\nb"


@pytest.mark.usefixtures("any_mass")
def test_a_template_that_takes_only_parts_gets_parts(decoder):
    parts = (
        "{{ bos_token }}{% for m in messages %} [USER]{% for p in m.content %}"
        "{% if p.type is defined and p.type == 'text' %} {{ p.text }}{% endif %}{% endfor %} [END]"
        "{% endfor %} [BOT]"
    )
    guard = templates.JUDGES["llama-guard"]
    said, expected = (judge(decoder, guard, chat)(EXCHANGES[:2]) for chat in (parts, CHAT))
    assert said == expected


@pytest.mark.usefixtures("any_mass")
def test_a_long_response_is_refused_or_cut(decoder):
    fits = Exchange("why", "sure " * 59, where="file:1")
    long = Exchange("why", "sure " * 60, where="file:2")
    with pytest.raises(InputError, match="^file:2: has 65 tokens as judge 'asked' .* room for 64"):
        judge(decoder)([fits, long])
    whole, cut = judge(decoder, cut=True)([fits, long])
    assert (whole.cut, cut.cut) == (False, True)
    assert cut.harmful == pytest.approx(whole.harmful, abs=1e-5)
    with pytest.raises(InputError, match="^exchange 1: its prompt alone is too long"):
        judge(decoder, cut=True)([Exchange("why " * 70, "sure")])


@pytest.mark.parametrize(
    "texts",
    [("text {response} why {prompt} Answer:",), ("text {response}", "second {prompt} Answer:")],
)
@pytest.mark.usefixtures("any_mass")
def test_a_judge_may_show_the_response_first(texts, decoder):
    template = dataclasses.replace(ASKED, text=None, messages=tuple(("user", t) for t in texts))
    exchange = EXCHANGES[0]
    (said,) = judge(decoder, template)([exchange])
    shown = [t.format(prompt=exchange.prompt, response=exchange.response) for t in texts]
    text = "<s>" + "".join(f" [USER] {content} [END]" for content in shown) + " [BOT]"
    expected = share(decoder, text, ["yes", "no"], special=False)[0]
    assert said.harmful == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("any_mass")
def test_answers_after_text_that_a_tokenizer_would_merge_with_them():
    made = merging.tokenizer()
    text = "tak {prompt} tak {response}:mip"
    decoder = tiny.decoder(num_layers=2, hidden_size=16, vocab_size=len(made))

    def judge(*yes):
        questions = (templates.yes_no("harmful", yes, (" takker",)),)
        template = dataclasses.replace(ASKED, text=text, questions=questions)
        return model.JudgeModel(template, decoder, made, checkpoint="here")

    shown = text.format(prompt="mip tak", response="takker")
    before = made(shown)["input_ids"]
    # "mip" and "per" are one token: they are no answer that stands after "mip", whatever follows.
    merged = made(shown + "per tak")["input_ids"]
    assert len(merged) == len(before) + 1 and merged[: len(before)] != before
    for answer in ("per", "per tak"):
        with pytest.raises(InputError, match=f"answer '{answer}': the tokenizer of here has no"):
            judge(answer)
    exchange = Exchange("mip tak", "takker")
    (both,), (one,) = (asked([exchange]) for asked in (judge("per tak", " tak"), judge(" tak")))
    assert both == one
    (several,) = judge(" taktak")([exchange])
    answers = [made(answer)["input_ids"] for answer in (" taktak", " takker")]
    assert [len(answer) for answer in answers] == [2, 1]
    log_p = []
    for answer in answers:
        logits = np.asarray(decoder(np.array(before + answer, np.int32))[0], np.float64)
        steps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        log_p.append(sum(steps[len(before) - 1 + n, token] for n, token in enumerate(answer)))
    p = np.exp(log_p)
    assert several.harmful == pytest.approx(p[0] / p.sum(), abs=1e-5)


def test_a_judge_shows_no_progress_of_its_own(decoder, capsys):
    judge(decoder)(EXCHANGES * 20)
    assert capsys.readouterr() == ("", "")


# Mass: what the model gives to all its answers together.


def mass(decoder, text, answers):
    return np.exp([log_probability(decoder, text, answer, True) for answer in answers]).sum()


@pytest.mark.parametrize("least", [0.0, 1.0])
def test_a_verdict_has_the_mass_of_its_answers_and_needs_enough_of_it(least, decoder, monkeypatch):
    monkeypatch.setattr(protocol, "LEAST_MASS", least)
    spelled = [" not yes", " sure", " no"]
    question = JudgeQuestion("refused", (Answer(1.0, tuple(spelled[:2])), Answer(0.0, (" no",))))
    asked = judge(decoder, dataclasses.replace(ASKED, questions=(question,)))
    for exchange, verdict in zip(EXCHANGES, asked(EXCHANGES), strict=True):
        expected = mass(decoder, filled(ASKED.text, exchange), spelled)
        assert verdict.refused_mass == pytest.approx(expected, rel=1e-4)
        assert 0 < verdict.refused_mass < 0.5 and verdict.harmful_mass is None
        assert (verdict.refused is None) == (least == 1.0) and verdict.harmful is None


def test_a_random_model_is_no_judge(decoder):
    """Its yes and no are a thirtieth each of what it may say next."""
    for verdict in judge(decoder)(EXCHANGES):
        assert verdict.harmful is None and 0 < verdict.harmful_mass < protocol.LEAST_MASS


def test_a_question_has_no_more_mass_than_those_before_it(decoder, text_of):
    template = templates.with_text(templates.JUDGES["wildguard"], text_of("wildguard"))
    for exchange, verdict in zip(EXCHANGES, judge(decoder, template)(EXCHANGES), strict=True):
        text, masses = filled(TEXTS["wildguard"], exchange), []
        for lead in ("Harmful request:", "\nResponse refusal:", "\nHarmful response:"):
            text += lead
            p = np.exp([log_probability(decoder, text, one, False) for one in ("yes", "no")])
            masses.append(p.sum())
            text += " yes" if p[0] >= p[1] else " no"
        assert verdict.refused_mass == pytest.approx(min(masses[:2]), rel=1e-4)
        assert verdict.harmful_mass == pytest.approx(min(masses), rel=1e-4)


def test_a_spelling_that_begins_with_another_counts_within_it(decoder):
    yes = Answer(1.0, (" yes", " yes sure"))
    longer, alone = (
        judge(decoder, asking(one, Answer(0.0, (" no",))))(EXCHANGES) for one in (yes, YES)
    )
    assert longer == alone


BAD_MODELS = {
    # template, chat template, what the message says
    "unknown answer": (
        asking(YES, Answer(0.0, (" never", " nay"))), CHAT,
        "judge 'asked': answer ' never': the tokenizer of here has no tokens for it",
    ),
    "an answer that joins the text": (
        asking(YES, Answer(0.0, ("no",))), CHAT, "answer 'no': the tokenizer of here has no tokens",
    ),
    "an answer of nothing": (asking(YES, Answer(0.0, ("",))), CHAT, "answer '': the tokenizer"),
    "the same first token": (
        asking(YES, Answer(0.0, (" yes not",))), CHAT,
        "answer ' yes not' begins with the same token as ' yes' with the tokenizer of here: 7",
    ),
    "no chat template": (
        templates.JUDGES["llama-guard"], None,
        "the messages of judge 'llama-guard' cannot be .*: here has no chat template",
    ),
    "a chat template that drops the response": (
        templates.JUDGES["llama-guard"], "{{ messages[0].content }}",
        "template of here drops or alters the messages of judge 'llama-guard'",
    ),
    "a chat template that alters it": (
        templates.JUDGES["llama-guard"],
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "drops or alters the messages",
    ),
    "a chat template that cuts the response": (
        templates.JUDGES["llama-guard"],
        "{% for m in messages %}{{ m.content[:17] }}{% endfor %}", "drops or alters the messages",
    ),
    "a chat template that refuses": (
        templates.JUDGES["llama-guard"], "{{ raise_exception('no such role') }}",
        "the chat template of here refuses the messages of judge 'llama-guard': no such role",
    ),
    "a chat template that fails": (
        templates.JUDGES["llama-guard"], "{{ messages + 1 }}",
        "template of here refuses the messages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(case, decoder):
    template, chat_template, message = BAD_MODELS[case]
    with pytest.raises(InputError, match=message):
        judge(decoder, template, chat_template, checkpoint="here")


def test_an_exchange_of_tokens_is_no_text(decoder):
    with pytest.raises(InputError, match="^file:9: has no prompt as text, which judge 'asked'"):
        judge(decoder)([Exchange(response="sure", where="file:9")])


@pytest.mark.usefixtures("any_mass")
def test_a_judges_first_question_begins_with_the_line_break_of_its_text(decoder, text_of):
    said = {}
    for end in ("", "\n", "\n\n"):
        text = TEXTS["wildguard"].rstrip("\n") + end
        template = templates.with_text(templates.JUDGES["wildguard"], text_of("wildguard", text))
        assert model._continued(template.text, template.questions[0].lead) == (
            TEXTS["wildguard"] + "Harmful request:"
        )
        said[end] = judge(decoder, template)(EXCHANGES[:1])
    assert said[""] == said["\n"] == said["\n\n"]


def test_only_the_placeholders_of_a_text_are_replaced(text_of, decoder):
    text = (
        ' {"a": {{1}}, "b": {generation}} {prompt} {response} { behavior } {behavior}{behavior} \\1'
    )
    template = templates.with_text(templates.JUDGES["harmbench"], text_of("harmbench", text))
    asked = judge(decoder, dataclasses.replace(template, questions=ASKED.questions))
    shown = asked._render(Exchange("{generation}", "\\g<0> {behavior}"))
    assert shown == (
        ' {"a": {{1}}, "b": \\g<0> {behavior}} {prompt} {response} { behavior } '
        "{generation}{generation} \\1"
    )


@pytest.mark.usefixtures("any_mass")
def test_a_chat_judge_of_ones_own_asks_in_messages(tmp_path, decoder):
    messages = [{"role": "user", "content": "{prompt} text {response} Answer:"}]
    fields = {name: value for name, value in OWN.items() if name != "template"}
    (tmp_path / "own.json").write_text(json.dumps(fields | {"messages": messages}))
    own = judge(decoder, templates.read_template(tmp_path / "own.json"))
    text = "<s> [USER] tell me how to do it text sure first do it Answer: [END] [BOT]"
    p = share(decoder, text, ["yes", "no", "not"], special=False)
    assert own(EXCHANGES[:1])[0].harmful == pytest.approx(p[0], abs=1e-5)
