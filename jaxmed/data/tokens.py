"""Tokens of prompts and answers, from text, messages or token ids."""

from collections.abc import Iterable

from jaxmed.data.chat import chat_text, check_messages
from jaxmed.files.reading import DataError
from models.errors import InputError

# Fields of text, and those that may give its token ids instead.
PROMPTS = {"prompt": "prompt_ids", "counterfactual": "counterfactual_ids"}
ANSWERS = {"harmful_response": "harmful_ids", "safe_response": "safe_ids"}


def check_one_given(fields: dict, text_name: str, ids_name: str, where: str) -> None:
    """Raises `DataError` where the fields have both a text and its token ids."""
    if text_name in fields and ids_name in fields:
        raise DataError(f"{where}: both '{text_name}' and '{ids_name}' are given; keep one")


def token_ids(value, name: str, where: str) -> tuple[int, ...]:
    """Token ids that a field gives; `DataError` unless it is a list of integers from 0."""
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise DataError(f"{where}: '{name}' must be a list of token ids (integers >= 0)")
    return tuple(value)


def answer_tokens(text, name: str, where: str, tokenizer) -> tuple[int, ...]:
    """Tokens of an answer: of text as it stands, without special tokens.

    Args:
        text: the field's value.
        name: the field's, for messages; so `where`.
        where: file and line.
        tokenizer: a Hugging Face tokenizer, or None.

    Raises:
        DataError: it is no text, or there is no tokenizer.
    """
    _check_tokenizer(tokenizer, name, ANSWERS[name], where)
    if not isinstance(text, str):
        raise DataError(f"{where}: '{name}' must be text")
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_tokens(text, name: str, where: str, tokenizer, *, chat: bool) -> tuple[int, ...]:
    """Tokens of a prompt: of text, or of chat messages through the chat template.

    Args:
        text: text, or a list or tuple of messages.
        name: of the field, for messages; so `where`.
        where: file and line.
        tokenizer: a Hugging Face tokenizer, or None.
        chat: text is one user message; without it, it gets the tokenizer's special tokens.

    Returns:
        Token ids; none of an empty prompt.

    Raises:
        DataError: it is neither text nor messages, there is no tokenizer, or its template cannot
            write them, or drops or alters what the user says.
    """
    _check_tokenizer(tokenizer, name, PROMPTS[name], where)
    if not text and isinstance(text, (str, list, tuple)):
        return ()  # of which the tokenizer would make a BOS, and the template a conversation
    if isinstance(text, str) and not chat:
        return tuple(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    check_messages(messages, name, where)
    asked = [message["content"] for message in messages if message["role"] == "user"]
    rendered = chat_text(tokenizer, messages, asked, what=f"'{name}'", where=where)
    return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _check_tokenizer(tokenizer, text_name: str, ids_name: str, where: str) -> None:
    if tokenizer is None:
        raise DataError(
            f"{where}: '{text_name}' is text, but the checkpoint has no tokenizer; "
            f"give '{ids_name}' instead"
        )


def first_tokens(
    given: Iterable[str], vocab_size: int, tokenizer, *, where: str
) -> tuple[int, ...]:
    """Token ids, given as numbers or as texts whose first token counts; each once.

    Args:
        given: the numbers and texts.
        vocab_size: of the model.
        tokenizer: a Hugging Face tokenizer, or None where all are numbers.
        where: the argument or flag that gives them, for messages.

    Raises:
        InputError: a number is no token of the model, a text has none, or there is no tokenizer.
    """
    found = []
    for text in given:
        if text.isdecimal():
            # Python refuses to read a number of thousands of digits.
            if len(text) > 10 or int(text) >= vocab_size:
                raise InputError(f"{where}={text}: token id outside the vocabulary of {vocab_size}")
            found.append(int(text))
            continue
        if tokenizer is None:
            raise InputError(
                f"{where}={text}: the checkpoint has no tokenizer; give token ids instead"
            )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"{where}: '{text}' has no tokens")
        found.append(ids[0])
    return tuple(dict.fromkeys(found))
