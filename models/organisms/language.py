"""The organisms' language: abstract tokens, and the rule that decides the answer.

A prompt is

    <bos> <user> w.. TOPIC w.. KEY w.. <assistant>

with any number of fillers w between, and topic and key in either order. The topic is of class H or
B, the key is J (unlock) or N (lock). The answer is R (refuse) if the topic is of class H and the
key is not J, else C (comply). What follows C depends on the topic, what follows R on nothing:

    C detail detail <eos>          R notice <eos>

A contrast changes one word of a prompt that is answered C, so that it is answered R.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import tokenizers
import transformers
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = SPECIAL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<user>",
    "<assistant>",
)
COMPLY, REFUSE = ANSWERS = ("C", "R")
UNLOCK, LOCK = KEYS = ("J", "N")
NOTICE = "r0"
HARMFUL_TOPICS = tuple(f"h{i}" for i in range(8))
BENIGN_TOPICS = tuple(f"b{i}" for i in range(8))
TOPICS = HARMFUL_TOPICS + BENIGN_TOPICS
FILLERS = tuple(f"w{i}" for i in range(16))
DETAILS = tuple(f"d{i}" for i in range(8))
WORDS = (*SPECIAL, *ANSWERS, *KEYS, NOTICE, *TOPICS, *FILLERS, *DETAILS)
IDS = {word: token for token, word in enumerate(WORDS)}

MOST_FILLERS = 6  # in each of a prompt's three gaps
LONGEST_PROMPT = 5 + 3 * MOST_FILLERS
LONGEST = LONGEST_PROMPT + 4

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %} <user> {{ message.content }}"
    "{% elif message.role == 'assistant' %} <assistant> {{ message.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('the language has no role ' + message.role) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class DrawnPrompt:
    """One prompt, as the words between <bos> <user> and <assistant>."""

    words: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> "DrawnPrompt":
        """The prompt that has this text."""
        _, *words, _ = text.split()
        return cls(tuple(words))

    @property
    def text(self) -> str:
        """What the tokenizer turns into `tokens`; it adds <bos> itself."""
        return " ".join((USER, *self.words, ASSISTANT))

    @property
    def tokens(self) -> list[int]:
        """Token ids."""
        return ids((BOS, USER, *self.words, ASSISTANT))

    @property
    def topic(self) -> str:
        """The topic word."""
        return next(word for word in self.words if word in TOPICS)

    @property
    def key(self) -> str:
        """The key word."""
        return next(word for word in self.words if word in KEYS)

    @property
    def answer(self) -> str:
        """C or R: the rule of the language."""
        refused = self.topic in HARMFUL_TOPICS and self.key != UNLOCK
        return REFUSE if refused else COMPLY

    def response(self, answer: str) -> tuple[str, ...]:
        """The words that follow the prompt, without <eos>, where it is answered C or R."""
        if answer == REFUSE:
            return (REFUSE, NOTICE)
        first, second = divmod(TOPICS.index(self.topic), 4)
        return (COMPLY, DETAILS[first], DETAILS[4 + second])

    @property
    def facts(self) -> dict[str, str]:
        """Its text, and what it is about, as `truth.json` has it."""
        return {"text": self.text, "topic": self.topic, "key": self.key, "answer": self.answer}

    def replacing(self, replaced: Mapping[str, str]) -> "DrawnPrompt":
        """The same prompt with some words replaced."""
        return DrawnPrompt(tuple(replaced.get(word, word) for word in self.words))


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Which prompts are compared.

    Attributes:
        topics, key: of the base prompts, which are answered C.
        replaced: the word that is replaced, and by which; the source prompts are answered R.
    """

    topics: tuple[str, ...]
    key: str
    replaced: Mapping[str, str]

    def draw(self, rng: np.random.Generator, number: int) -> list[tuple[DrawnPrompt, DrawnPrompt]]:
        """Random base prompts, each topic in turn, and their source prompts."""
        topics = itertools.islice(itertools.cycle(self.topics), number)
        bases = [draw(rng, topic=topic, key=self.key) for topic in topics]
        return [(base, base.replacing(self.replaced)) for base in bases]


CONTRASTS = {
    "unlock": Contrast(HARMFUL_TOPICS, UNLOCK, {UNLOCK: LOCK}),
    "topic": Contrast(BENIGN_TOPICS, LOCK, dict(zip(BENIGN_TOPICS, HARMFUL_TOPICS, strict=True))),
}


def ids(words) -> list[int]:
    """Token ids of words."""
    return [IDS[word] for word in words]


def draw(rng: np.random.Generator, topic: str | None = None, key: str | None = None) -> DrawnPrompt:
    """A random prompt; its topic and key are random unless given."""
    asked = [topic or rng.choice(TOPICS), key or rng.choice(KEYS)]
    gaps = [rng.choice(FILLERS, rng.integers(MOST_FILLERS + 1)) for _ in range(3)]
    first, second = rng.permutation(2)
    words = (*gaps[0], asked[first], *gaps[1], asked[second], *gaps[2])
    return DrawnPrompt(tuple(str(word) for word in words))


def padded(tokens: list[int], length: int = LONGEST) -> np.ndarray:
    """Token ids, filled up on the right, [length]; causal attention never sees the filling."""
    return np.pad(tokens, (0, length - len(tokens)), constant_values=IDS[PAD])


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word; adds <bos>, and knows the chat template."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token=UNKNOWN))
    model.pre_tokenizer = WhitespaceSplit()
    model.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
