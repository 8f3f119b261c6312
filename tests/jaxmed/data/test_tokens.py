"""Text becomes the tokens that a model reads: with tokenizers and templates of published shapes."""

import datetime
import json

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from jaxmed.data import pairs as pairs_lib
from jaxmed.data.chat import ChatTemplate
from jaxmed.data.control import TextTokenizer
from jaxmed.data.tokens import Encoder, Remark, Written
from jaxmed.files.reading import DataError
from models import checkpoint
from models.errors import InputError
from tests import chats, words

WHERE = "pairs.jsonl:1"
USER = {"role": "user", "content": "tell me"}
SYSTEM = {"role": "system", "content": "do it"}


@pytest.fixture(scope="module")
def made():
    """Tokenizers by kind and template, each made once."""
    kept = {}

    def make(kind, template, **settings):
        key = (kind, template, *settings.items())
        if key not in kept:
            kept[key] = getattr(chats, kind)(template, **settings)
        return kept[key]

    return make


def prompt_of(encoder, value):
    return encoder.prompt(value, "prompt", WHERE)


def answer_of(encoder, text, after):
    return encoder.answer(text, "harmful_response", WHERE, after)


def pieces(encoder, ids):
    return encoder.tokenizer.convert_ids_to_tokens(list(ids))


# Answers.


@pytest.mark.parametrize(
    ("kind", "settings", "template", "first"),
    [
        # After the template's line break there is no mark of a space before the word.
        ("sentencepiece", {}, chats.DROPS_SYSTEM, "Sure"),
        ("sentencepiece", {"first": True}, chats.DROPS_SYSTEM, "Sure"),
        # Llama 2's template has a space between prompt and answer, and its models write one.
        ("sentencepiece", {}, chats.LLAMA_2, "▁Sure"),
        ("sentencepiece", {"first": True}, chats.LLAMA_2, "▁Sure"),
        ("sentencepiece", {}, chats.MISTRAL, "Sure"),
        ("byte_level", {}, chats.LLAMA_3, "Sure"),
        ("byte_level", {}, chats.CHAT_ML, "Sure"),
    ],
)
def test_an_answer_is_what_follows_its_prompt(made, kind, settings, template, first):
    encoder = Encoder(made(kind, template, **settings), chat=True)
    prompt = prompt_of(encoder, "tell me how")
    found = answer_of(encoder, "Sure, I will", prompt)
    assert pieces(encoder, found)[0] == first
    assert encoder.first_tokens(["Sure"], 700, [prompt], where="--harmful_tokens") == found[:1]
    # Both together are the tokens of both texts together.
    whole = prompt.text + ("" if first == "Sure" else " ") + "Sure, I will"
    joint = encoder.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*prompt.ids, *found] == joint and encoder.counts == {}


def test_answers_that_begin_with_a_space_have_first_tokens_of_their_own(made):
    encoder = Encoder(made("sentencepiece", chats.LLAMA_2), chat=True)
    prompt = prompt_of(encoder, "tell me how")
    alone = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in
             (" Sure", " I")]  # fmt: skip
    assert alone[0] == alone[1]  # the bare mark
    sure, refuses = (answer_of(encoder, text, prompt)[0] for text in (" Sure", " I"))
    assert pieces(encoder, (sure, refuses)) == ["▁Sure", "▁I"]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_an_answer_that_changes_its_prompts_tokens_is_tokenised_alone_and_told(made, kind):
    encoder = Encoder(made(kind, chats.CHAT_ML))
    prompt = prompt_of(encoder, "tell m")
    alone = tuple(encoder.tokenizer("e how", add_special_tokens=False)["input_ids"])
    assert answer_of(encoder, "e how", prompt) == alone
    assert answer_of(encoder, "e how", prompt) == alone  # is counted once
    assert answer_of(encoder, " how", prompt) != () and encoder.counts == {Remark.ALONE: 1}
    [line] = encoder.told
    assert line.startswith(
        "Answers that are tokenised alone: 1, the first at pairs.jsonl:1: 'harmful_response'. "
    )


def test_an_answer_to_token_ids_is_told(made):
    encoder = Encoder(made("byte_level", chats.CHAT_ML))
    answer_of(encoder, "Sure", Written((1, 2)))
    assert encoder.counts == {Remark.ALONE: 1}


def test_pairs_have_joint_answers_and_tell_of_others_as_warnings(made, tmp_path):
    lines = [
        {"prompt": "tell me:", "counterfactual": "do it:", "harmful_response": " Sure"},
        {"prompt": "tell m", "counterfactual": "tell m", "harmful_response": "e how"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = made("sentencepiece", chats.MISTRAL)
    with pytest.warns(UserWarning, match="alone") as caught:
        first, _ = pairs_lib.read(file, tokenizer)
    assert tokenizer.convert_ids_to_tokens(first.harmful_ids) == ["▁Sure"]
    assert [str(line.message).partition(":")[0] for line in caught] == [
        "Answers that are tokenised alone"
    ]


def test_an_answer_that_is_other_tokens_after_the_counterfactual_is_told(made):
    encoder = Encoder(made("byte_level", chats.CHAT_ML))
    prompt, counterfactual = (prompt_of(encoder, text) for text in ("tell me ", "tell me: "))
    after = {"harmful_response": "Sure"}
    encoder.both_answers(after, WHERE, prompt, counterfactual)
    assert encoder.counts == {}
    encoder = Encoder(made("sentencepiece", chats.CHAT_ML))
    prompt, counterfactual = prompt_of(encoder, "tell\n"), prompt_of(encoder, "tell </s>")
    found = encoder.both_answers(after, WHERE, prompt, counterfactual)
    assert pieces(encoder, found["harmful_response"]) == ["Sure"]
    assert encoder.counts[Remark.UNLIKE] == 1


# First tokens.


def test_digits_are_text_and_ids_say_so(made):
    encoder = Encoder(made("byte_level", chats.CHAT_ML), chat=True)
    prompts = [prompt_of(encoder, "tell me")]
    one = encoder.tokenizer("1", add_special_tokens=False)["input_ids"][0]
    assert encoder.first_tokens(["12", "id:12", "1"], 700, prompts, where="--x") == (one, 12)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("id:700", "--x=id:700: token id outside the vocabulary of 700"),
        ("id:" + "9" * 5000, "token id outside the vocabulary of 700"),
        ("id:Sure", "--x=id:Sure: id: stands before the number of a token"),
        ("id:-1", "stands before the number"),
        ("id:²", "stands before the number"),
        ("", "--x: '' has no tokens"),
    ],
)
def test_first_tokens_that_are_none(made, given, said):
    encoder = Encoder(made("byte_level", chats.CHAT_ML), chat=True)
    with pytest.raises(InputError) as caught:
        encoder.first_tokens([given], 700, [prompt_of(encoder, "tell me")], where="--x")
    assert said in str(caught.value)


def test_a_first_token_is_the_same_after_all_prompts(made):
    encoder = Encoder(made("sentencepiece", chats.CHAT_ML))
    prompts = [prompt_of(encoder, text) for text in ("tell me\n", "tell me </s>")]
    with pytest.raises(InputError, match="--x=Sure: begins with another token after some prompts"):
        encoder.first_tokens(["Sure"], 700, prompts, where="--x")
    with pytest.raises(InputError, match="--x=12: .* no tokenizer; give token ids .* --x=id:12"):
        Encoder().first_tokens(["12"], 700, [], where="--x")


def test_a_stop_token_is_one_token(made):
    encoder = Encoder(made("byte_level", chats.CHAT_ML))
    assert encoder.single_token("<|im_end|>", 700, where="--stop_tokens") == 3
    assert encoder.single_token("id:5", 700, where="--stop_tokens") == 5
    with pytest.raises(InputError, match="--stop_tokens=</s>: is 4 tokens of this tokenizer"):
        encoder.single_token("</s>", 700, where="--stop_tokens")
    with pytest.raises(InputError, match="has no tokenizer; give a token id instead"):
        Encoder().single_token("<|im_end|>", 700, where="--stop_tokens")


# Templates.


def test_the_date_is_the_one_that_is_asked_for(made):
    dates = [datetime.date(2026, 1, 31), datetime.date(2025, 12, 1)]
    texts = [
        prompt_of(Encoder(made("byte_level", chats.LLAMA_3), chat=True, date=date), "tell me").text
        for date in dates
    ]
    assert "Today Date: 31 Jan 2026\n" in texts[0] and "Today Date: 01 Dec 2025\n" in texts[1]
    today = prompt_of(Encoder(made("byte_level", chats.LLAMA_3), chat=True), "tell me").text
    assert datetime.date.today().strftime("Today Date: %d %b %Y") in today


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%-d. %B, %A", "100%% %H:%M %%d", "", "%j %y%y"])
def test_a_template_may_ask_for_the_day_in_any_form(made, form):
    template = "  {{ strftime_now(" + json.dumps(form) + ") }}\n{{ messages[0].content }}"
    tokenizer = chats.byte_level(template)
    moment = datetime.datetime(2026, 1, 3)
    encoder = Encoder(tokenizer, chat=True, date=moment.date())
    assert prompt_of(encoder, "tell").text == "  " + moment.strftime(form) + "\ntell"


def test_arguments_reach_the_template(made):
    tokenizer = made("byte_level", chats.THINKING)
    thinking = Encoder(tokenizer, chat=True)
    assert prompt_of(thinking, "tell me").text.endswith("<|im_start|>assistant\n")
    assert thinking.counts == {Remark.THINKS: 1}
    answering = Encoder(tokenizer, chat=True, template_args={"enable_thinking": False})
    assert prompt_of(answering, "tell me").text.endswith("assistant\n<think>\n\n</think>\n\n")
    assert answering.counts == {}
    with pytest.raises(InputError, match="template_args: the chat template .* reads no 'thinking'"):
        Encoder(tokenizer, chat=True, template_args={"thinking": False})
    with pytest.raises(InputError, match="template_args: 'messages' is not to be given"):
        Encoder(tokenizer, chat=True, template_args={"messages": []})
    with pytest.raises(InputError, match="template_args: there is no tokenizer"):
        Encoder(None, template_args={"enable_thinking": False})


SWITCHED = "{{ messages[0].content }}\n{% if SWITCH %}ON{% else %}OFF{% endif %}"


@pytest.mark.parametrize(
    ("read", "switch"),
    [
        ("thinking is not defined or thinking", "thinking"),
        ("think is undefined or think != false", "think"),
        ("(reasoning_effort | default('medium')) != false", "reasoning_effort"),
        # An operation that fails on a switch that is off is one that reads it.
        ("'low' in (reasoning_effort | default('low')) + ''", "reasoning_effort"),
        # Off by itself.
        ("thinking is defined and thinking", ""),
        # What is no argument: a field of messages, a name of the template's own.
        ("messages[0].reasoning_content is not defined", ""),
        ("not add_vision_id | default(false)", ""),
    ],
)
def test_thoughts_are_told_by_what_the_template_does(read, switch):
    template = "{% generation %}{% set thought = 1 %}{% endgeneration %}"
    tokenizer = chats.byte_level(template + SWITCHED.replace("SWITCH", read))
    encoder = Encoder(tokenizer, chat=True)
    prompt_of(encoder, "tell me")
    assert encoder.counts == ({Remark.THINKS: 1} if switch else {})
    assert f"('{switch}')" in "".join(encoder.told) or not switch
    if switch:
        told = Encoder(tokenizer, chat=True, template_args={switch: "low"})
        prompt_of(told, "tell me")
        assert told.counts == {}
    with pytest.raises(InputError, match="reads no 'thought'"):
        Encoder(tokenizer, chat=True, template_args={"thought": 2})


def test_prompts_that_end_within_thoughts_are_told(made):
    encoder = Encoder(made("byte_level", chats.CHAT_ML))
    begun = {"role": "assistant", "content": "<think>\nI will"}
    prompt_of(encoder, [USER, begun])
    assert encoder.counts == {Remark.THINKS: 1}
    encoder.prompt("tell me <think>\n", "prompt", "pairs.jsonl:2")
    assert encoder.counts[Remark.THINKS] == 2
    ended = begun | {"content": "<think>\nI will\n</think>\nI"}
    for number, value in enumerate(([USER, ended], "the <think> is a word", [begun, USER])):
        encoder.prompt(value, "prompt", f"pairs.jsonl:{number + 3}")
    assert encoder.counts[Remark.THINKS] == 2


def test_a_template_that_does_not_write_the_prompt_is_refused_as_such():
    encoder = Encoder(chats.byte_level("tell {{ messages | length }}"), chat=True)
    with pytest.raises(DataError, match="the chat template of the tokenizer drops or alters"):
        prompt_of(encoder, "tell 1 word")


def test_a_prompt_is_tokenised_once_for_all_its_answers(made, monkeypatch):
    encoder = Encoder(made("byte_level", chats.CHAT_ML))
    prompt = prompt_of(encoder, "tell me:")
    tokenised, ids = [], TextTokenizer.ids
    monkeypatch.setattr(
        TextTokenizer,
        "ids",
        lambda self, text, where: tokenised.append(text) or ids(self, text, where),
    )
    found = [answer_of(encoder, text, prompt) for text in (" Sure", " I will")]
    assert tokenised == ["tell me: Sure", "tell me: I will"]
    assert prompt.ids[0] == encoder.tokenizer.bos_token_id and encoder.counts == {}
    assert [encoder.tokenizer.decode(answer) for answer in found] == [" Sure", " I will"]


@pytest.mark.parametrize(
    ("kind", "template", "end"),
    [
        ("byte_level", chats.CHAT_ML, "<|im_start|>assistant\nSure, I"),
        ("byte_level", chats.LLAMA_3, "<|end_header_id|>\n\nSure, I"),
        ("sentencepiece", chats.LLAMA_2, "[/INST] Sure, I"),
        ("sentencepiece", chats.MISTRAL, "[/INST]Sure, I"),
    ],
)
def test_a_last_message_of_the_assistant_is_gone_on_with(made, kind, template, end):
    encoder = Encoder(made(kind, template), chat=True)
    prompt = prompt_of(encoder, [USER, {"role": "assistant", "content": "Sure, I"}])
    assert prompt.text.endswith(end)
    assert (
        pieces(encoder, answer_of(encoder, " will", prompt))
        == pieces(encoder, encoder.tokenizer("x will", add_special_tokens=False)["input_ids"])[-1:]
    )


@pytest.mark.parametrize("said", ["", " \n"])
def test_a_last_message_of_the_assistant_that_says_nothing_is_refused(made, said):
    """Templates strip it, and with it what they write before an answer."""
    encoder = Encoder(made("byte_level", chats.LLAMA_3))
    with pytest.raises(DataError, match="'prompt' .* says nothing: leave it out"):
        prompt_of(encoder, [USER, {"role": "assistant", "content": said}])


def test_a_template_that_drops_a_system_message_is_refused(made):
    encoder = Encoder(made("sentencepiece", chats.DROPS_SYSTEM))
    # What it says stands in the user's message too.
    with pytest.raises(DataError, match="1: the chat .* drops the system message of 'prompt': say"):
        prompt_of(encoder, [SYSTEM, USER | {"content": "do it well"}])
    with pytest.raises(DataError, match="refuses 'prompt': Only user and assistant roles"):
        prompt_of(Encoder(made("sentencepiece", chats.MISTRAL)), [SYSTEM, USER])
    for kind, template in (("sentencepiece", chats.LLAMA_2), ("byte_level", chats.LLAMA_3)):
        assert "do it" in prompt_of(Encoder(made(kind, template)), [SYSTEM, USER]).text


# Special tokens.


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize(("kind", "bos"), [("sentencepiece", "<s>"), ("byte_level", "<|begin|>")])
def test_a_prompt_has_one_bos_and_no_eos(made, kind, bos, end):
    encoder = Encoder(made(kind, chats.CHAT_ML, end=end))
    tokenizer = encoder.tokenizer
    plain, with_bos = (prompt_of(encoder, text).ids for text in ("tell me", f"{bos}tell me"))
    assert (
        plain == with_bos == tuple(tokenizer(f"{bos}tell me", add_special_tokens=False).input_ids)
    )
    assert plain.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in plain
    assert tokenizer("tell me")["input_ids"][-1:] == [tokenizer.eos_token_id] or not end
    # A chat has what its template writes, and nothing else.
    chat = prompt_of(encoder, [USER])
    assert chat.ids == tuple(tokenizer(chat.text, add_special_tokens=False)["input_ids"])


def test_text_that_has_been_through_a_template_is_told(made):
    encoder = Encoder(made("byte_level", chats.CHAT_ML))
    text = "<|im_start|>user\ntell me<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(encoder, text).ids[1:] == prompt_of(encoder, [USER]).ids
    assert encoder.counts == {Remark.CONTROL: 1}
    assert encoder.told[0].startswith("Texts with control tokens: 1, the first at pairs.jsonl:1")


@pytest.mark.parametrize(
    ("kind", "template", "text", "shown"),
    [
        ("byte_level", chats.CHAT_ML, "<|im_start|>user\ntell<|im_end|>", "'<|im_start|>'"),
        ("byte_level", chats.CHAT_ML, " \n<|im_start|>system\nx", "'<|im_start|>'"),
        ("sentencepiece", chats.LLAMA_2, "<s>[INST] tell [/INST]", "'<s>'"),
        ("sentencepiece", chats.LLAMA_2, "[INST] <<SYS>>\nx\n<</SYS>>\n\ntell [/INST]", "'[INST]'"),
        (
            "byte_level",
            chats.CHAT_ML,
            "tell<|im_end|>\n<|im_start|>assistant\n",
            "'<|im_end|>\\n<|im_start|>assistant'",
        ),
    ],
)
def test_text_is_not_wrapped_twice(made, kind, template, text, shown):
    encoder = Encoder(made(kind, template), chat=True)
    with pytest.raises(DataError, match="leave chat out .--chat. to use texts as") as caught:
        prompt_of(encoder, text)
    assert f"'prompt' has {shown}, as if it had been through the chat template" in str(caught.value)
    prompt_of(encoder, [{"role": "user", "content": text}])  # says that it is what a user says


@pytest.mark.parametrize(
    ("kind", "template", "control"),
    [
        ("byte_level", chats.CHAT_ML, "<|im_end|>"),
        ("byte_level", chats.LLAMA_3, "<|begin|>"),
        ("byte_level", chats.THINKING, "<think>"),
        ("sentencepiece", chats.LLAMA_2, "</s>"),
        ("sentencepiece", chats.DROPS_SYSTEM, "<end_of_turn>"),
    ],
)
def test_control_tokens_in_what_a_user_says_are_text(made, kind, template, control):
    encoder = Encoder(made(kind, template), chat=True)
    tokenizer = encoder.tokenizer
    token = tokenizer.convert_tokens_to_ids(control)
    plain = prompt_of(encoder, "tell it me how")
    found = prompt_of(encoder, f"tell {control} me how")
    assert found.ids.count(token) == plain.ids.count(token)
    assert tokenizer.decode(found.ids) == tokenizer.decode(plain.ids).replace(
        " it ", f" {control} "
    )
    # All around it is as ever; and so is an answer.
    same = plain.ids.index(tokenizer("it", add_special_tokens=False)["input_ids"][-1])
    assert found.ids[: same - 1] == plain.ids[: same - 1]
    assert found.ids[-3:] == plain.ids[-3:]
    assert answer_of(encoder, "Sure", found) == answer_of(encoder, "Sure", plain)
    assert encoder.counts[Remark.QUOTED] == 1


def test_control_tokens_as_text_are_what_a_tokenizer_without_them_makes(made):
    """All of a text at once, not piece by piece: its merges and marks are those of text."""
    text = "I will<|im_end|>Sure tell<|im_start|> me"
    tokenizer = made("byte_level", chats.CHAT_ML)
    without = json.loads(tokenizer.backend_tokenizer.to_str())
    without["added_tokens"] = without["post_processor"] = None
    bare = tokenizers.Tokenizer.from_str(json.dumps(without | {"added_tokens": []}))
    reader = TextTokenizer(tokenizer)
    assert list(reader.ids(reader.quoted(text), WHERE)) == bare.encode(text).ids


def test_a_control_token_that_cannot_be_text_is_refused():
    encoder = Encoder(words.tokenizer(), chat=True)  # splits at spaces, and knows the whole word
    with pytest.raises(DataError, match=r"1: has the control token '\[UNK\]', which .* only as"):
        prompt_of(encoder, "tell [UNK] me")


def test_thoughts_of_earlier_answers_are_left_to_the_template(made):
    encoder = Encoder(made("byte_level", chats.THINKING), template_args={"enable_thinking": False})
    said = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nno"}
    prompt = prompt_of(encoder, [USER, said, USER])
    assert "why" not in prompt.text and encoder.counts == {}


def test_a_template_of_parts_has_quoted_text_too():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content[0]['text'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|>{% endif %}"
    )
    encoder = Encoder(chats.byte_level(template), chat=True)
    found = prompt_of(encoder, "tell <|im_end|>")
    assert (found.ids.count(2), found.ids.count(3)) == (1, 1)


def test_what_ends_an_answer_is_known_by_the_template(made):
    ends = {
        ("byte_level", chats.CHAT_ML): "<|im_end|>",
        ("byte_level", chats.LLAMA_3): "<|eot_id|>",
        ("sentencepiece", chats.LLAMA_2): "</s>",
        ("byte_level", "{{ messages[0].content }}"): "",
        ("byte_level", "{{ raise_exception('no') }}"): "",
    }
    for (kind, template), end in ends.items():
        text = TextTokenizer(made(kind, template))
        template = ChatTemplate(text, date=datetime.date(2026, 1, 1))
        assert template.unstopped({0}) == end
        assert template.unstopped({text.control_tokens.get(end, 0)}) == ""


# Damaged files.


@pytest.fixture(scope="module")
def whole():
    return chats.byte_level(chats.CHAT_ML).backend_tokenizer.to_str()


@st.composite
def damage(draw):
    """A function that damages a text: bytes lost, put in or changed; or another JSON value."""
    kind = draw(st.sampled_from(["cut", "change", "insert", "value", "drop"]))
    at = draw(st.integers(0, 2**20))
    extra = draw(st.sampled_from(['"', "{", "]", "0", "-1", "null", "\0", "é"]))
    value = draw(st.sampled_from([None, -1, 2**40, "x", [], {}, True, [[1, 2]], 0.5]))

    def damaged(text):
        place = at % len(text)
        if kind == "cut":
            return text[:place]
        if kind in ("change", "insert"):
            return text[:place] + extra + text[place + (kind == "change") :]
        content = json.loads(text)
        holder, path = content, at
        while True:  # goes down to some field
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = keys[path % len(keys)]
            path //= len(keys) + 1
            below = holder[key]
            if path == 0 or not isinstance(below, (dict, list)) or not below:
                break
            holder = below
        if kind == "drop":
            del holder[key]
        else:
            holder[key] = value
        return json.dumps(content)

    return damaged


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(damaged=damage())
def test_a_damaged_tokenizer_is_refused_or_reads_all(damaged, whole, tmp_path):
    """Whatever is in tokenizer.json: tokens, or one message."""
    (tmp_path / "tokenizer.json").write_text(damaged(whole), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chats.CHAT_ML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    message = ""
    try:
        tokenizer = checkpoint.read_tokenizer(tmp_path)
        encoder = Encoder(tokenizer)
        found = [prompt_of(encoder, value) for value in ("tell me: <|im_end|> 12 é", [USER])]
        found.append(Written(answer_of(encoder, "Sure", found[-1])))
    except InputError as error:
        message, found = str(error), []
    assert found or (message and "\n" not in message)
    for each in found:
        assert all(type(token) is int and token >= 0 for token in each.ids)
