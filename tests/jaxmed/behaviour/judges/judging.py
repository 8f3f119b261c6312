"""What tests of judges share: a tokenizer of a few words, exchanges, and the plain definition."""

import dataclasses

import numpy as np

from jaxmed.behaviour.judges import model, templates
from jaxmed.behaviour.judges.protocol import Exchange
from jaxmed.behaviour.judges.templates import Answer, JudgeQuestion, Template
from jaxmed.engine import capture
from tests import words

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
    return words.tokenizer_of(IDS, "<s>", chat_template)


def judge(decoder, template=ASKED, chat_template=CHAT, **options):
    return model.JudgeModel(template, decoder, tokenizer(chat_template), **options)


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


def asking(*answers, text=ASKED.text):
    return dataclasses.replace(
        ASKED, questions=(JudgeQuestion("harmful", answers),) if answers else (), text=text
    )


YES, NO = Answer(1.0, (" yes",)), Answer(0.0, (" no",))
OWN = {
    "name": "own",
    "meaning": "whether it says yes",
    "template": ASKED.text,
    "yes": " yes",
    "no": [" no", " not"],
}
