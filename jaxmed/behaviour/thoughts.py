"""Thoughts that a model writes before it answers, and which are no part of its answer."""

import bisect
from collections.abc import Sequence

import transformers

from jaxmed.data.chat import THOUGHTS

_TAIL = 16  # tokens of a prompt in which a template opens thoughts


def length(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: Sequence[int],
    response: Sequence[int],
) -> int:
    """How many of a response's first tokens are thoughts, with the tags around them.

    A response begins with thoughts if it begins with a tag that opens some (`THOUGHTS`), or its
    prompt ends with one. Where nothing closes them, all of it is thoughts.

    Args:
        tokenizer: of the model.
        prompt: token ids of what the response was to.
        response: its own.
    """

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False))

    before, said = text(prompt[-_TAIL:]).rstrip(), text(response).lstrip()
    for opens, closes in THOUGHTS:
        if before.endswith(opens) or said.startswith(opens):
            # Once they are closed they stay so: few decodings find where.
            return bisect.bisect_left(
                range(len(response)), True, key=lambda end: closes in text(response[:end])
            )
    return 0
