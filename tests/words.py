"""A tokenizer of a few words: one id a word, a BOS before every text, and a chat template."""

import tokenizers
import transformers

WORDS = "[UNK] [BOS] [USER] [END] [BOT] tell me how to do it why not yes no sorry".split()
IDS = {word: index for index, word in enumerate(WORDS)}
# As published templates do, it writes the BOS itself and refuses what it does not know, and an
# answer is tokens of its own.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    " [USER] {{ m.content }} [END]{% endfor %}{% if add_generation_prompt %} [BOT] {% endif %}"
)


def tokenizer(chat_template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer; without chat template if that is None."""
    return tokenizer_of(IDS, "[BOS]", chat_template)


def tokenizer_of(
    ids: dict[str, int], bos: str, chat_template: str | None
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of these words, "[UNK]" among them, with this BOS."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", bos_token=bos
    )
    made.chat_template = chat_template
    return made


def ids(text: str) -> tuple[int, ...]:
    """Token ids of words."""
    return tuple(IDS[word] for word in text.split())
