"""Judges: against the plain definition of their probabilities, and their bad inputs."""

import dataclasses
import hashlib
import json
import math

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from jaxmed.behaviour.judges import agreement, model, named, protocol, rules, templates
from jaxmed.behaviour.judges.protocol import Exchange, Verdict
from jaxmed.behaviour.judges.templates import Answer, Question, Template
from jaxmed.engine import capture
from models import checkpoint
from models.errors import InputError
from tests import merging, tiny
from tests.jaxmed.engine.jaxprs import equations

# One id a word; what is not here is unknown, as most words of the templates are.
WORDS = (
    "[UNK] <s> [USER] [END] [BOT] Yes No yes no safe unsafe 1 2 3 4 5 "
    "tell me how to do it why not sure sorry first second Answer: text"
).split()
IDS = {word: index for index, word in enumerate(WORDS)}
CHAT = (
    "{{ bos_token }}{% for m in messages %} [USER] {{ m.content | trim }} [END]{% endfor %}"
    "{% if add_generation_prompt %} [BOT]{% endif %}"
)
# The architecture of each published judge.
ARCHITECTURE = {
    "harmbench": "llama",
    "harmbench-mistral": "mistral",
    "llama-guard": "llama",
    "wildguard": "mistral",
    "strongreject": "gemma",
}
# In place of the texts that a user saves, with the placeholders of those.
TEXTS = {
    "harmbench": "tell {behavior} text {generation} do {x} {{ Answer:",
    "harmbench-mistral": "{behavior} why {generation} Answer:",
    "wildguard": "<s> first {prompt} second {response} Answer:\n",
    "strongreject": "tell {forbidden_prompt} how {response} Answer: ",
}
EXCHANGES = [
    Exchange("tell me how to do it", "sure first do it", where="file:1"),
    Exchange("tell me how not to do it", "sorry", where="file:2"),
    Exchange("why", "", where="file:3"),
    Exchange("tell me {response} 1", "sure " * 30 + "{prompt}", where="file:4"),
]
ASKED = Template(
    name="asked",
    meaning="whether it says yes",
    questions=(templates.yes_no("harmful", (" yes",), (" no",)),),
    text="tell {prompt} text {response} Answer:",
)


def tokenizer(chat_template=CHAT):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", IDS["<s>"])]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", bos_token="<s>"
    )
    made.chat_template = chat_template
    return made


@pytest.fixture(scope="module")
def decoder():
    return tiny.decoder(num_layers=2, hidden_size=16, max_positions=64)


def judge(decoder, template=ASKED, chat_template=CHAT, **options):
    return model.JudgeModel(template, decoder, tokenizer(chat_template), **options)


@pytest.fixture
def text_of(tmp_path):
    """A function that writes a judge's text, by default its own of TEXTS, and returns the file."""

    def write(name, text=None):
        (tmp_path / "text.txt").write_bytes((TEXTS[name] if text is None else text).encode())
        return tmp_path / "text.txt"

    return write


def filled(text, exchange, placeholders=("prompt", "response")):
    """What is asked; neither prompt nor response is looked for in the other."""
    before, rest = text.split("{" + placeholders[0] + "}")
    between, after = rest.split("{" + placeholders[1] + "}")
    return before + exchange.prompt + between + exchange.response + after


def log_probability(decoder, text, answer, special):
    """Of the answer's words after the text, by the plain definition: all logits of a whole run."""
    tokens = tokenizer()(text, add_special_tokens=special)["input_ids"]
    added = [IDS[word] for word in answer.split()]
    # Tokens that follow change nothing before them; runs of equal length are compiled once.
    run = np.zeros(capture.bucket(len(tokens + added), 64), np.int32)
    run[: len(tokens + added)] = tokens + added
    logits = np.asarray(decoder(run)[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_p[len(tokens) - 1 + n, token] for n, token in enumerate(added))


def share(decoder, text, answers, special=True):
    """Probabilities of the answers, of all of them."""
    p = np.exp([log_probability(decoder, text, answer, special) for answer in answers])
    return p / p.sum()


# Refusal phrases.

REFUSALS = [
    "I'm sorry, but no.",
    "  I\u2019m  SORRY",
    "I cannot do that.",
    "As an AI, I do not",
    "Sorry, no",
    "Thank you. Unfortunately I can\u2018t help",
]
NO_REFUSALS = [
    "",
    "   ",
    "Sure, here is how",
    "The word sorry stands here",
    "As an aide to the king",
    "Sure. " * 50 + "I cannot say more.",
]


def test_refusal_phrases():
    said = named.named("phrases")([Exchange(response=text) for text in REFUSALS + NO_REFUSALS])
    assert [verdict.refused for verdict in said] == [1.0] * len(REFUSALS) + [0.0] * len(NO_REFUSALS)
    assert {(verdict.harmful, verdict.complied) for verdict in said} == {(None, None)}
    assert "smoke test" in rules.RefusalPhrases.meaning


def test_refusal_phrases_need_text():
    with pytest.raises(InputError, match="^exchange 2: has no response as text"):
        rules.RefusalPhrases()([EXCHANGES[0], Exchange(response_ids=(1,))])


# First tokens.


def test_first_tokens():
    judge = named.named("tokens", comply=(6, 8), refuse=(7,))
    responses = [(6, 7), (8,), (7, 6), (9, 6), ()]
    said = judge([Exchange(response_ids=response) for response in responses])
    assert [(v.harmful, v.refused) for v in said] == [(1, 0), (1, 0), (0, 1), (0, 0), (0, 0)]
    assert [v.complied for v in said] == [1, 1, 0, 0, 0]


def test_first_tokens_say_nothing_of_harm_where_a_prompt_is_harmless():
    judge = rules.FirstTokens((6,), (7,))
    labels = ("", "harmful", "benign", "overrefusal", "creative")
    found = judge([Exchange(response_ids=(6,), label=label) for label in labels])
    assert [verdict.harmful for verdict in found] == [1, 1, None, None, None]
    assert all((verdict.complied, verdict.refused) == (1, 0) for verdict in found)


def test_first_tokens_of_bad_input():
    with pytest.raises(InputError, match=r"\[7\] cannot both comply and refuse"):
        rules.FirstTokens((6, 7), (7,))
    with pytest.raises(InputError, match="give the first tokens"):
        rules.FirstTokens((), (7,))
    with pytest.raises(InputError, match="^file:1: judge 'tokens' reads token ids"):
        rules.FirstTokens((6,), (7,))(EXCHANGES[:1])


# Judge models, from their checkpoints to their verdicts.


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
def test_published_judges_by_their_definition(name, tmp_path, text_of):
    fields = {"num_layers": 2, "hidden_size": 16, "max_positions": 512, "seed": 3}
    if ARCHITECTURE[name] == "mistral":
        fields["windows"] = (400, 400)  # a window of 5, as elsewhere, would not see the response
    module = tiny.decoder(ARCHITECTURE[name], **fields)
    checkpoint.save(module, tmp_path / "model", tokenizer=tokenizer())
    template = text_of(name) if name in TEXTS else None
    verdicts = named.named(name, model=tmp_path / "model", template=template)(EXCHANGES)
    for verdict, exchange in zip(verdicts, EXCHANGES, strict=True):
        expected = definition(name, module, exchange)
        assert not verdict.cut and verdict.complied is None
        for says, value in expected.items():
            assert getattr(verdict, says) == (value and pytest.approx(value, abs=1e-5)), says
    assert len({verdict.harmful for verdict in verdicts}) == len(EXCHANGES)


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
    jaxpr = jax.make_jaxpr(model._log_probabilities)(decoder, run, run == 0, rows, asked)
    shapes = [out.aval.shape for equation in equations(jaxpr) for out in equation.outvars]
    assert (batch, 2, vocabulary) in shapes
    assert not [shape for shape in shapes if vocabulary in shape and length in shape]


def test_answers_of_several_tokens_are_scored_teacher_forced(decoder):
    spelled = [" not yes", " sure sure do", " no"]
    question = Question("refused", (Answer(1.0, tuple(spelled[:2])), Answer(0.25, (spelled[2],))))
    asked = judge(decoder, dataclasses.replace(ASKED, questions=(question,)))
    for exchange, verdict in zip(EXCHANGES, asked(EXCHANGES), strict=True):
        p = share(decoder, filled(ASKED.text, exchange), spelled)
        assert verdict.refused == pytest.approx(p[0] + p[1] + 0.25 * p[2], abs=1e-5)
        assert verdict.harmful is None


def test_line_breaks_of_a_lead_count_once():
    assert model._continued("a\n", "\n\nb") == model._continued("a", "\n\nb") == "a\n\nb"
    assert model._continued("a\n", "b") == "a\nb"


def test_a_template_that_takes_only_parts_gets_parts(decoder):
    parts = (
        "{{ bos_token }}{% for m in messages %} [USER]{% for p in m.content %}"
        "{% if p.type is defined and p.type == 'text' %} {{ p.text }}{% endif %}{% endfor %} [END]"
        "{% endfor %} [BOT]"
    )
    guard = templates.JUDGES["llama-guard"]
    said, expected = (judge(decoder, guard, chat)(EXCHANGES[:2]) for chat in (parts, CHAT))
    assert said == expected


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
def test_a_judge_may_show_the_response_first(texts, decoder):
    template = dataclasses.replace(ASKED, text=None, messages=tuple(("user", t) for t in texts))
    exchange = EXCHANGES[0]
    (said,) = judge(decoder, template)([exchange])
    shown = [t.format(prompt=exchange.prompt, response=exchange.response) for t in texts]
    text = "<s>" + "".join(f" [USER] {content} [END]" for content in shown) + " [BOT]"
    expected = share(decoder, text, ["yes", "no"], special=False)[0]
    assert said.harmful == pytest.approx(expected, abs=1e-5)


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


# What a judge says, and what that follows from.


def test_which_parts_of_a_verdict_a_judge_says(decoder, text_of):
    wild = templates.with_text(templates.JUDGES["wildguard"], text_of("wildguard"))
    made = {
        "phrases": rules.RefusalPhrases(),
        "tokens": rules.FirstTokens((6,), (7,)),
        "asked": judge(decoder),
        "wildguard": judge(decoder, wild),
    }
    assert {name: one.says for name, one in made.items()} == {
        "phrases": ("refused",),
        "tokens": ("harmful", "refused"),
        "asked": ("harmful",),
        "wildguard": ("harmful", "refused"),
    }
    for one in made.values():
        exchange = Exchange("why", "sure", response_ids=(6,))
        (verdict,) = one([exchange])
        said = [name for name in protocol.SAYS if getattr(verdict, name) is not None]
        assert tuple(said) == one.says


def test_a_fingerprint_is_of_what_verdicts_follow_from(decoder, tmp_path):
    checkpoint.save(decoder, tmp_path / "a", tokenizer=tokenizer())
    checkpoint.save(decoder, tmp_path / "b", tokenizer=tokenizer())
    other = tiny.decoder(num_layers=2, hidden_size=16, max_positions=64, seed=5)
    checkpoint.save(other, tmp_path / "c", tokenizer=tokenizer())

    def of(template=ASKED, folder="a", chat_template=CHAT, **options):
        folder = tmp_path / folder
        return protocol.fingerprint(
            judge(decoder, template, chat_template, folder=folder, **options)
        )

    # Where the checkpoint is, and what is done with long responses, does not matter.
    assert of() == of(folder="b") == of(cut=True) == of(checkpoint="here")
    chat = dataclasses.replace(ASKED, text=None, messages=(("user", "{prompt} {response}"),))
    different = [
        protocol.fingerprint(judge(decoder)),  # of unknown weights
        of(),
        of(folder="c"),
        of(dataclasses.replace(ASKED, text=ASKED.text + " ")),
        of(
            dataclasses.replace(
                ASKED, questions=(templates.yes_no("harmful", (" yes",), (" not",)),)
            )
        ),
        of(
            dataclasses.replace(
                ASKED, questions=(templates.yes_no("refused", (" yes",), (" no",)),)
            )
        ),
        of(chat),
        of(chat, chat_template=CHAT + " "),
        protocol.fingerprint(rules.RefusalPhrases()),
        protocol.fingerprint(rules.FirstTokens((6,), (7,))),
        protocol.fingerprint(rules.FirstTokens((6, 8), (7,))),
    ]
    assert len(set(different)) == len(different)
    assert of(chat_template="") == of()  # which a text does not go through
    first_tokens = [rules.FirstTokens(*sides) for sides in (((6, 8), (7,)), ((8, 6, 6), (7,)))]
    assert len(set(map(protocol.fingerprint, first_tokens))) == 1
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    loaded = named.named(str(tmp_path / "own.json"), model=tmp_path / "a")
    again = named.named(str(tmp_path / "own.json"), model=tmp_path / "b")
    changed = named.named(str(tmp_path / "own.json"), model=tmp_path / "c")
    assert (
        protocol.fingerprint(loaded) == protocol.fingerprint(again) != protocol.fingerprint(changed)
    )


def test_a_fingerprint_of_somebodys_own_judge():
    def own(**fields):
        return type("Own", (), {"name": "own", "meaning": "whether it is long", **fields})()

    assert protocol.fingerprint(own()) == protocol.fingerprint(own())
    different = [own(), own(name="other"), own(meaning="whether it is short"), own(basis={"at": 7})]
    assert len(set(map(protocol.fingerprint, different))) == len(different)


# What cannot judge.


def asking(*answers, text=ASKED.text):
    return dataclasses.replace(
        ASKED, questions=(Question("harmful", answers),) if answers else (), text=text
    )


YES, NO = Answer(1.0, (" yes",)), Answer(0.0, (" no",))
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
        templates.JUDGES["llama-guard"], "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
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
        templates.JUDGES["llama-guard"], "{{ messages + 1 }}", "template of here refuses the messages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(case, decoder):
    template, chat_template, message = BAD_MODELS[case]
    with pytest.raises(InputError, match=message):
        judge(decoder, template, chat_template, checkpoint="here")


def test_a_checkpoint_without_tokenizer(tmp_path):
    tiny.save(tmp_path / "model", num_layers=2, hidden_size=16)
    with pytest.raises(InputError, match=f"'llama-guard': {tmp_path}/model has no tokenizer"):
        named.named("llama-guard", model=tmp_path / "model")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: asking(YES, NO, text="{prompt} Answer:"), r"its template has no {response}"),
        (lambda: asking(YES, NO, text="{response} Answer:"), r"its template has no {prompt}"),
        (lambda: asking(YES, NO, text=None), "either a text or messages"),
        (lambda: asking(YES), "needs two answers"),
        (lambda: asking(), "must say harmful or refused"),
        (
            lambda: dataclasses.replace(ASKED, questions=(Question("rude", (YES, NO)),)),
            "a question says 'rude'",
        ),
    ],
)
def test_bad_templates(make, message):
    with pytest.raises(InputError, match=f"^judge 'asked': .*{message}"):
        make()


def test_an_exchange_of_tokens_is_no_text(decoder):
    with pytest.raises(InputError, match="^file:9: has no prompt as text, which judge 'asked'"):
        judge(decoder)([Exchange(response="sure", where="file:9")])


def test_an_unknown_judge():
    for template in (None, "a.txt"):
        with pytest.raises(InputError, match="'nobody': not one of phrases, tokens, harmbench"):
            named.named("nobody", template=template)


# Texts of published judges.


def test_which_judges_need_a_text_and_what_it_calls_prompt_and_response():
    needing = {name: t.placeholders for name, t in templates.JUDGES.items() if t.lacks_text}
    assert needing == {
        "harmbench": ("behavior", "generation"),
        "harmbench-mistral": ("behavior", "generation"),
        "wildguard": ("prompt", "response"),
        "strongreject": ("forbidden_prompt", "response"),
    }


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize(("start", "line_break"), [("", "\n"), ("\ufeff", "\r\n")])
def test_line_breaks_at_the_end_of_a_text_do_not_count(start, line_break, end, text_of):
    text = "\n tell\n{behavior}\n\n{generation} Answer: "
    file = text_of("harmbench", start + (text + end).replace("\n", line_break))
    assert templates.with_text(templates.JUDGES["harmbench"], file).text == text


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


def test_a_text_that_is_not_the_published_one_shows_in_the_meaning(text_of):
    assert {name for name, t in templates.JUDGES.items() if t.sha256} == {
        "harmbench-mistral", "wildguard"
    }  # fmt: skip
    published = TEXTS["wildguard"].rstrip("\n")
    template = dataclasses.replace(
        templates.JUDGES["wildguard"], sha256=("0", hashlib.sha256(published.encode()).hexdigest())
    )
    same = templates.with_text(template, text_of("wildguard"))
    assert same.meaning == template.meaning
    for altered in (published.replace("first", "First"), published + " "):
        other = templates.with_text(template, text_of("wildguard", altered))
        assert other.meaning == template.meaning + "; its text is not the published one"
    unchecked = templates.with_text(templates.JUDGES["strongreject"], text_of("strongreject"))
    assert unchecked.meaning == (
        templates.JUDGES["strongreject"].meaning
        + "; its text was not compared with the published one"
    )


@pytest.mark.parametrize("name", ["harmbench", "harmbench-mistral"])
def test_harmbenchs_judges_say_which_rates_are_not_the_published_ones(name):
    meaning = templates.JUDGES[name].meaning
    assert "contextual ones are read with their context" in meaning
    assert "copyright ones, which HarmBench itself scores by hashes" in meaning


@pytest.mark.parametrize("name", TEXTS)
def test_a_judge_without_its_text(name, decoder):
    message = rf"^judge '{name}': needs its text.*\({templates.JUDGES[name].source[:20]}.*"
    message += f"--judge_template={name}=FILE"
    with pytest.raises(InputError, match=message):
        named.named(name, model="/nowhere")
    with pytest.raises(InputError, match=message):
        judge(decoder, templates.JUDGES[name])


@pytest.mark.parametrize("name", ["phrases", "tokens", "llama-guard", "own.json"])
def test_a_judge_that_takes_no_text(name):
    message = f"^judge '{name}': takes no text from a file, as harmbench, .*: leave a.txt out"
    with pytest.raises(InputError, match=message):
        named.named(name, template="a.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{behavior} {response}", "judge 'harmbench': its template has no {generation}; save"),
        (b"{prompt} {generation}", "judge 'harmbench': its template has no {behavior}; save"),
        (b"\n", "judge 'harmbench': its template has no {behavior}"),
        (b"\xff{behavior} {generation}", "not to be read as text in UTF-8"),
        (None, "there is no such file"),
    ],
)
def test_files_that_hold_no_text_of_a_judge(text, message, tmp_path):
    if text is not None:
        (tmp_path / "text.txt").write_bytes(text)
    with pytest.raises(InputError, match=f"^{tmp_path}/text.txt: {message}"):
        named.named("harmbench", template=tmp_path / "text.txt")


def test_a_text_is_no_folder_and_no_json(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}: is a folder"):
        named.named("harmbench", template=tmp_path)
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    with pytest.raises(InputError, match="own.json: judge 'harmbench' reads its text as it is"):
        named.named("harmbench", template=str(tmp_path / "own.json"))


# A judge of one's own.

OWN = {
    "name": "own",
    "meaning": "whether it says yes",
    "template": ASKED.text,
    "yes": " yes",
    "no": [" no", " not"],
}


def test_a_judge_of_ones_own_is_a_json_file(tmp_path, decoder):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(OWN | {"says": "refused"}))
    checkpoint.save(decoder, tmp_path / "model", tokenizer=tokenizer())
    own = named.named(str(file), model=tmp_path / "model")
    assert (own.name, own.meaning) == ("own", "whether it says yes")
    (verdict,) = own(EXCHANGES[:1])
    p = share(decoder, filled(ASKED.text, EXCHANGES[0]), ["yes", "no", "not"])
    assert verdict.refused == pytest.approx(p[0], abs=1e-5) and verdict.harmful is None
    with pytest.raises(InputError, match="'own': give its checkpoint"):
        named.named(str(file))


def test_a_judge_without_a_published_checkpoint(text_of):
    with pytest.raises(InputError, match="'strongreject': give its checkpoint"):
        named.named("strongreject", template=text_of("strongreject"))


def test_a_chat_judge_of_ones_own_asks_in_messages(tmp_path, decoder):
    messages = [{"role": "user", "content": "{prompt} text {response} Answer:"}]
    fields = {name: value for name, value in OWN.items() if name != "template"}
    (tmp_path / "own.json").write_text(json.dumps(fields | {"messages": messages}))
    own = judge(decoder, templates.read_template(tmp_path / "own.json"))
    text = "<s> [USER] tell me how to do it text sure first do it Answer: [END] [BOT]"
    p = share(decoder, text, ["yes", "no", "not"], special=False)
    assert own(EXCHANGES[:1])[0].harmful == pytest.approx(p[0], abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"yes": 1}, "'yes' must be a text"),
        ({"no": []}, "'no' must be a text"),
        ({"template": "{prompt}"}, r"judge 'own': its template has no {response}"),
        ({"template": 3}, "'template' must be text"),
        ({"name": ""}, "give 'name'"),
        ({"messages": [{"role": "user"}]}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "either a text or messages"),
        ({"template": None}, "'template' must be text"),
        ({"code": "x"}, "field 'code' is not one of name"),
    ],
)
def test_bad_files_of_a_judge(fields, message, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(OWN | fields))
    with pytest.raises(InputError, match=f"own.json: .*{message}"):
        templates.read_template(tmp_path / "own.json")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "JSON"), ("[]", "a JSON object"), (None, "no")]
)
def test_files_that_hold_no_judge(text, message, tmp_path):
    if text is not None:
        (tmp_path / "own.json").write_text(text)
    with pytest.raises(InputError, match=f"own.json: .*{message}"):
        templates.read_template(tmp_path / "own.json")


# Files of responses.


def test_a_file_of_responses(tmp_path):
    rows = [
        {"prompt": "a", "response": "b", "harmful": True, "refused": 0, "id": "x"},
        {"prompt": "a", "response": "", "label": 0},
        {"prompt_ids": [1], "response_ids": [2, 3], "label": "harmful", "refused": None},
    ]
    (tmp_path / "r.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    lines = agreement.read(tmp_path / "r.jsonl")
    where = [f"{tmp_path}/r.jsonl:{number}" for number in (1, 3, 5)]
    assert [line.exchange for line in lines] == [
        Exchange("a", "b", where=where[0]),
        Exchange("a", "", where=where[1]),
        Exchange(prompt_ids=(1,), response_ids=(2, 3), where=where[2], label="harmful"),
    ]
    expected = [{"harmful": True, "refused": False}, {"harmful": False}, {}]
    assert [line.labels for line in lines] == expected
    assert agreement.judged(rules.RefusalPhrases(), lines[1], Verdict(refused=0.0)) == rows[1] | {
        "judge": "phrases", "judge_harmful": None, "judge_refused": 0.0, "judge_complied": None,
        "judge_cut": False,
    }  # fmt: skip


def test_a_users_own_fields_are_kept_whatever_their_names(tmp_path):
    row = {"prompt": "a", "response": "b", "condition": "x", "sample": 0}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    [line] = agreement.read(tmp_path / "own.jsonl")
    assert line.fields == row


def test_a_file_of_exchanges_with_labels_beside_what_a_run_wrote(tmp_path):
    written = {
        "id": "x/0", "prompt": "why", "response": "do it", "prompt_ids": [1, 2],
        "response_ids": [3], "label": "benign",
    }  # fmt: skip
    rows = [written | {"harmful": 0, "refused": True}, written | {"prompt": None, "label": "odd"}]
    (tmp_path / "exchanges.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = agreement.read(tmp_path / "exchanges.jsonl")
    where = f"{tmp_path}/exchanges.jsonl"
    assert first.exchange == Exchange("why", "do it", (1, 2), (3,), f"{where}:1", "benign")
    assert first.labels == {"harmful": False, "refused": True}
    assert second.exchange == Exchange(None, "do it", (1, 2), (3,), f"{where}:2")
    assert (first.fields, second.labels) == (rows[0], {})
    assert rules.FirstTokens((3,), (4,))([first.exchange]) == [Verdict(None, 0.0, 1.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('"a"', "expected a JSON object, found str"),
        ('{"prompt": "a"}', "has no response"),
        ('{"prompt": ["a"], "response": "b"}', "'prompt' must be text"),
        ('{"response_ids": [1, -1]}', "'response_ids' must be a list of token ids"),
        ('{"response": "b", "harmful": 0.5}', "'harmful' must be true or false"),
        ('{"response": "b", "refused": "no"}', "'refused' must be true or false"),
        ('{"response": "b", "harmful": 0, "label": true}', "contradict each other"),
        ('{"response": "\\ud800"}', "has half of a surrogate pair"),
        (
            '{"condition": "plain", "prompt": "x", "sample": 0, "tokens": [1], "text": "b"}',
            "where 'prompt' is no text but an id; give its exchanges.jsonl",
        ),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line)
    with pytest.raises(InputError, match=rf"r\.jsonl:2: .*{message}"):
        agreement.read(tmp_path / "r.jsonl")


def test_files_without_responses(tmp_path):
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no responses"):
        agreement.read(tmp_path / "r.jsonl")
    with pytest.raises(InputError, match="there is no such file"):
        agreement.read(tmp_path / "none.jsonl")


# Agreement.


def verdicts_and_labels(hits, false_alarms, misses, rejections):
    """Verdicts and labels with these counts."""
    cells = ((0.5, True),) * hits + ((0.9, False),) * false_alarms
    cells += ((0.49, True),) * misses + ((0.0, False),) * rejections
    return [Verdict(harmful=value) for value, _ in cells], [label for _, label in cells]


def test_agreement_by_hand():
    found = agreement.agreement(*verdicts_and_labels(20, 5, 10, 15))
    counts = (found.true_positive, found.false_positive, found.false_negative, found.true_negative)
    assert (found.n, *counts) == (50, 20, 5, 10, 15)
    # Observed 0.7; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert found.accuracy == 0.7 and found.kappa == pytest.approx(0.4, abs=1e-12)
    assert (found.precision, found.recall) == (0.8, 2 / 3)
    # Wilson 1927: (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n).
    z, n, p = 1.959963984540054, 50, 0.7
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    bounds = [(p + z**2 / (2 * n) + side * half) / (1 + z**2 / n) for side in (-1, 1)]
    assert found.accuracy_interval == pytest.approx(bounds, abs=1e-12)


def test_kappas_interval_is_that_of_large_samples():
    found = agreement.agreement(*verdicts_and_labels(400, 100, 200, 300))
    # Fleiss, Cohen and Everitt 1969, equation 13.
    p = np.array([[400, 100], [200, 300]]) / 1000
    rows, columns = p.sum(1), p.sum(0)
    observed, expected = np.trace(p), rows @ columns
    kappa = (observed - expected) / (1 - expected)
    terms = sum(p[i, i] * (1 - (rows[i] + columns[i]) * (1 - kappa)) ** 2 for i in range(2))
    terms += (1 - kappa) ** 2 * (
        p[0, 1] * (columns[0] + rows[1]) ** 2 + p[1, 0] * (columns[1] + rows[0]) ** 2
    )
    terms -= (kappa - expected * (1 - kappa)) ** 2
    error = math.sqrt(terms / 1000) / (1 - expected)
    # 2,000 resamples place a 2.5% quantile within about 0.06 standard errors.
    assert found.kappa == pytest.approx(kappa, abs=1e-12)
    bounds = (kappa - 1.96 * error, kappa + 1.96 * error)
    assert found.kappa_interval == pytest.approx(bounds, abs=0.2 * error)


def test_agreement_of_extremes():
    perfect = agreement.agreement(*verdicts_and_labels(3, 0, 0, 2))
    assert (perfect.accuracy, perfect.kappa, perfect.precision, perfect.recall) == (1, 1, 1, 1)
    assert perfect.accuracy_interval[0] < 0.6 and perfect.accuracy_interval[1] == 1
    opposite = agreement.agreement(*verdicts_and_labels(0, 2, 2, 0))
    assert (opposite.accuracy, opposite.kappa) == (0, -1)
    constant = agreement.agreement(*verdicts_and_labels(0, 0, 0, 4))
    assert constant.accuracy == 1
    assert np.isnan([constant.kappa, *constant.kappa_interval]).all()
    assert np.isnan([constant.precision, constant.recall]).all()


def test_agreement_is_of_what_has_both():
    said = [Verdict(refused=0.7), Verdict(), Verdict(refused=0.7), Verdict(refused=0.7)]
    found = agreement.agreement(said, [True, True, None, False], threshold=0.7, says="refused")
    assert (found.n, found.true_positive, found.false_positive) == (2, 1, 1)
    assert agreement.agreement(said, [True] * 4, threshold=0.8, says="refused").true_positive == 0
    with pytest.raises(InputError, match="both a verdict and a label of 'harmful'"):
        agreement.agreement(said, [True] * 4)
