"""Thoughts are told from the answer that follows them, and nobody judges them."""

import pytest

from jaxmed.behaviour import generation, responses, thoughts
from jaxmed.behaviour.generation import Generated
from jaxmed.behaviour.judges.protocol import Verdict
from jaxmed.behaviour.responses import PLAIN, Asked, Key, Response
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data.control import TextTokenizer
from jaxmed.data.prompts import Prompt
from tests import chats, tiny

DECODER = tiny.decoder(num_layers=2, hidden_size=16, vocab_size=700)
ASKS = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return chats.byte_level(chats.THINKING)


def ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


IN_CHAT = "<|im_start|>user\nI <think><|im_end|>\n" + ASKS
LONG = "<think>\n" + "tell me how to do it " * 9
CASES = {
    "none": (ASKS, "I will", "", False),
    "at the start": (ASKS, "<think>\nhow\n</think>\n\nI will", "<think>\nhow\n</think>\n\n", False),
    "opened by the template": (ASKS + "<think>\n", "how</think>\n\nI", "how</think>\n\n", False),
    "begun by the prompt": (
        ASKS + "<think>\nI will",
        " how</think>\n\nI",
        " how</think>\n\n",
        False,
    ),
    "begun long before": (ASKS + LONG, "how</think>I", "how</think>", False),
    "begun by text": ("tell me\n<think>\nI will", " how</think>I", " how</think>", False),
    "begun again": (ASKS + "<think>\n</think>\nI\n<think>", "how</think>I", "how</think>", False),
    "begun and ended by the prompt": (ASKS + "<think>\nhow\n</think>\nI", " will", "", False),
    "begun by what a user says": (IN_CHAT, "I will", "", False),
    "a tag within a sentence": ("I will <think> it, how", " to", "", False),
    "closed by the template": (ASKS + "<think>\n\n</think>\n\n", "I will", "", False),
    "cut": (ASKS, "<think>\nhow to", "<think>\nhow to", True),
    "cut, opened by the template": (ASKS + "<think>", "how to", "how to", True),
    "with nothing after": (ASKS, "<think></think>", "<think></think>", True),
    "a tag in an answer": (ASKS, "I will </think> it", "", False),
    "another tag": (ASKS, "[THINK]how[/THINK]I", "[THINK]how[/THINK]", False),
    "nothing": (ASKS, "", "", False),
}


@pytest.mark.parametrize("case", CASES)
def test_how_far_thoughts_go(case, tokenizer):
    prompt, response, thought, only = CASES[case]
    tokens = ids(tokenizer, response)
    length = thoughts.length(TextTokenizer(tokenizer), ids(tokenizer, prompt), tokens)
    # A token may hold the end of a tag and more.
    found = tokenizer.decode(tokens[:length])
    assert found.startswith(thought) and len(found) <= len(thought) + 1
    assert Response(tokens, "", True, length).only_thinks == only


def test_judges_read_the_answer_alone(tokenizer, tmp_path, monkeypatch):
    said = {"a": "<think>\nI cannot\n</think>\n\nSure, I will", "b": "<think>\nI cannot"}
    asked = [Asked(Prompt(name, name, "harmful", "A"), ids(tokenizer, ASKS)) for name in said]

    def generate(decoder, prompts, **options):
        texts = enumerate(said.values())
        options["ended"]({index: Generated(ids(tokenizer, text), True) for index, text in texts})

    monkeypatch.setattr(generation, "generate", generate)
    log = responses.response_log(tmp_path)
    responses.generate(DECODER, tokenizer, PLAIN, asked, log, stop=[3], sampling=Sampling(9))
    first, second = (log.values[Key("plain", name, 0)] for name in said)
    assert first.text == "Sure, I will" and first.tokens == ids(tokenizer, said["a"])
    assert (second.text, second.only_thinks) == ("", True)
    assert responses.says_something(first) and not responses.says_something(second)
    assert responses.response_log(tmp_path).values == log.values
    read = []

    class Judge:
        name, meaning, says = "reader", "reads", ("harmful",)

        def __call__(self, exchanges):
            read.extend(exchanges)
            return [Verdict(harmful=1.0) for _ in exchanges]

    verdicts = responses.verdict_log(tmp_path, "judges")
    responses.judge(asked, [Judge()], list(log.values), log, verdicts)
    assert [each.response for each in read] == ["Sure, I will", ""]
    assert tokenizer.decode(read[0].response_ids).strip() == "Sure, I will"
    assert read[1].response_ids == ()
