"""Chat messages, and what a tokenizer's chat template makes of them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from jaxmed.files.reading import DataError

# Many templates refuse a system role, or two messages in a row, by a TemplateError; the others come
# of operations on what is not there.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


def chat_text(
    tokenizer,
    messages: Sequence[dict],
    needed: Sequence[str],
    *,
    what: str,
    where: str,
    owner: str = "the tokenizer",
) -> str:
    """Messages as a chat template writes them, up to where the answer begins.

    Templates of models that also read images may render contents only as lists of parts: where they
    lose those that are text, they get lists.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: each with `role` and `content`, both text.
        needed: contents that must be there one after the other, but for white space at their ends,
            which many templates strip.
        what: what the messages are, for errors; so `where`, and `owner`, who has the template.

    Raises:
        DataError: there is no template, it fails, or it drops or alters what is needed.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{where}: {what} cannot be shown as a chat: {owner} has no chat template")
    problems = []
    for as_content in (str, lambda text: [{"type": "text", "text": text}]):
        given = [message | {"content": as_content(message["content"])} for message in messages]
        try:
            rendered = tokenizer.apply_chat_template(
                given, add_generation_prompt=True, tokenize=False
            )
        except _TEMPLATE_ERRORS as error:
            problems.append(f"refuses {what}: {error}")
            continue
        # Where a template for text gets a list, it writes brackets and all.
        as_list = as_content is not str and any(str(m["content"]) in rendered for m in given)
        if _has_in_order(rendered, needed) and not as_list:
            return rendered
        problems.append(f"drops or alters {what}")
    raise DataError(f"{where}: the chat template of {owner} {problems[0]}")


def _has_in_order(rendered: str, texts: Iterable[str]) -> bool:
    end = 0
    for text in map(str.strip, texts):
        start = rendered.find(text, end)
        if start < 0:
            return False
        end = start + len(text)
    return True


def check_messages(value: Any, name: str, where: str) -> None:
    """Raises `DataError` unless the value of the field `name` is a list of chat messages."""
    if not are_messages(value):
        raise DataError(
            f"{where}: '{name}' must be text or a list of messages with 'role' and 'content', "
            "both text"
        )


def are_messages(value: Any) -> bool:
    """Whether it is a list or tuple of objects with `role` and `content`, both text."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content"))
        for m in value
    )


def as_text(prompt: str | Sequence[dict] | None) -> str | None:
    """A prompt as it is shown: text as it stands, messages as JSON; None for no prompt."""
    return prompt if prompt is None or isinstance(prompt, str) else json.dumps(prompt)
