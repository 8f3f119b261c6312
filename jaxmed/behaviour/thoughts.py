"""Thoughts that a model writes before it answers, and which are no part of its answer."""

import bisect
from collections.abc import Sequence

from jaxmed.data.chat import THOUGHTS, open_thoughts
from jaxmed.data.control import TextTokenizer


def length(reader: TextTokenizer, prompt: Sequence[int], response: Sequence[int]) -> int:
    """How many of a response's first tokens are thoughts, with the tags around them and the white
    space that parts them from the answer.

    A response begins with thoughts if it begins with a tag that opens some (`THOUGHTS`), or its
    prompt ends within some. Where nothing closes them, all of it is thoughts.

    Args:
        reader: the model's tokenizer.
        prompt: token ids of what the response was to.
        response: its own.
    """

    def text(tokens: Sequence[int]) -> str:
        return str(reader.tokenizer.decode(list(tokens), skip_special_tokens=False))

    said = text(response).lstrip()
    begun = (closes for opens, closes in THOUGHTS if said.startswith(opens))
    closes = open_thoughts(reader, text(prompt)) or next(begun, "")
    if not closes:
        return 0
    # Once they are closed they stay so: few decodings find where.
    end = bisect.bisect_left(
        range(len(response)), True, key=lambda end: closes in text(response[:end])
    )
    while end < len(response) and not text(response[end : end + 1]).strip():
        end += 1
    return end
