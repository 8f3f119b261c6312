"""Tokens of prompts and answers, from text, messages or token ids."""

import dataclasses
import datetime
import enum
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmed.data.chat import THOUGHTS, ChatTemplate, check_messages, open_thoughts
from jaxmed.data.control import TextTokenizer, unquoted
from jaxmed.files.reading import DataError
from models.errors import InputError

# Fields of text, and those that may give its token ids instead.
PROMPTS = {"prompt": "prompt_ids", "counterfactual": "counterfactual_ids"}
ANSWERS = {"harmful_response": "harmful_ids", "safe_response": "safe_ids"}
# How a setting that takes texts is given a token id.
BY_ID = "id:"


def check_one_given(fields: dict, text_name: str, ids_name: str, where: str) -> None:
    """Raises `DataError` where the fields have both a text and its token ids."""
    if text_name in fields and ids_name in fields:
        raise DataError(f"{where}: both '{text_name}' and '{ids_name}' are given; keep one")


def token_ids(value, name: str, where: str) -> tuple[int, ...]:
    """Token ids that a field gives; `DataError` unless it is a list of integers from 0."""
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise DataError(f"{where}: '{name}' must be a list of token ids (integers >= 0)")
    return tuple(value)


def id_given(text: str, vocab_size: int | None, *, where: str) -> int | None:
    """The token id that id:NUMBER gives; None for any other text.

    Raises:
        InputError: it is no number, or no token of a vocabulary of that size, if one is known.
    """
    if not text.startswith(BY_ID):
        return None
    number = text.removeprefix(BY_ID)
    if not (number.isascii() and number.isdecimal()):
        raise InputError(f"{where}={text}: {BY_ID} stands before the number of a token")
    # Python refuses to read a number of thousands of digits.
    if len(number) > 10 or (vocab_size is not None and int(number) >= vocab_size):
        of = "" if vocab_size is None else f" of {vocab_size}"
        raise InputError(f"{where}={text}: token id outside the vocabulary{of}")
    return int(number)


@dataclasses.dataclass(frozen=True)
class Written:
    """A prompt as the model reads it.

    Attributes:
        ids: its tokens.
        text: what these are of, the chat template's text included; None where only they are known.
        gap: white space that stands before an answer unless the answer begins with some.
        begin: how many of its tokens the tokenizer has put before the text.
    """

    ids: tuple[int, ...]
    text: str | None = None
    gap: str = ""
    begin: int = 0


class Remark(enum.StrEnum):
    """What an `Encoder` has to tell of what it was given."""

    ALONE = "answers that are tokenised alone"
    UNLIKE = "answers that are other tokens after the counterfactual"
    QUOTED = "prompts whose control tokens are text"
    CONTROL = "texts with control tokens"
    THINKS = "prompts that thoughts follow"


_TOLD = {
    Remark.ALONE: "Behind their prompt they would change its last token (as where white space "
    "ends it), or it is given as token ids; they may begin with another token than the model's own",
    Remark.UNLIKE: "Both runs get the tokens that follow the prompt",
    Remark.QUOTED: "What the prompt says is never read as a control token",
    Remark.CONTROL: "They are used as they stand",
    Remark.THINKS: "The first token of an answer is not the first that the model generates; "
    "template_args (--template_args), by the name in brackets or mostly "
    '{"enable_thinking": false}, may have it answer at once',
}


class Encoder:
    """How text becomes the tokens that a model reads, and what there is to tell of it.

    Args:
        tokenizer: a Hugging Face tokenizer; None if all is given as token ids.
        chat: wrap a prompt that is text in the tokenizer's chat template as one user message.
            Messages always go through the template; text does not unless asked, and gets what the
            tokenizer puts before a text, as a BOS.
        date: what day it is for a chat template that asks; by default today.
        template_args: what else the template is given, as {"enable_thinking": False}.

    Raises:
        InputError: the template does not read an argument.
    """

    def __init__(
        self,
        tokenizer=None,
        *,
        chat: bool = False,
        date: datetime.date | None = None,
        template_args: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self.chat = tokenizer, chat
        self._places: dict[Remark, dict[str, str]] = {}
        if tokenizer is not None:
            self._text = TextTokenizer(tokenizer)
            self.template = ChatTemplate(
                self._text, date=date or datetime.date.today(), args=template_args
            )
        elif template_args:
            raise InputError("template_args: there is no tokenizer, whose template would read them")

    @property
    def has_template(self) -> bool:
        """Whether there is a tokenizer with a chat template."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    @property
    def reads_date(self) -> bool:
        """Whether there is a chat template that asks what day it is."""
        return self.tokenizer is not None and self.template.reads_date

    def prompt(self, value, name: str, where: str) -> Written:
        """A prompt, of text or of chat messages.

        Args:
            value: text, or a list or tuple of messages. With a last message of the assistant, the
                answer goes on with that.
            name: of the field, for messages; so `where`.
            where: file and line.

        Returns:
            The prompt; without tokens if it is empty.

        Raises:
            DataError: it is neither text nor messages; there is no tokenizer, or its template
                cannot write them, or drops or alters what is said; or it is to go through the
                template, and has been.
        """
        self._check_tokenizer(name, PROMPTS[name], where)
        if not value and isinstance(value, (str, list, tuple)):
            return Written(())  # of which the template would make a conversation
        if isinstance(value, str) and not self.chat:
            if found := self._text.first_in(value):
                self._note(Remark.CONTROL, where, name, found)
            if open_thoughts(self._text, value):
                self._note(Remark.THINKS, where, name)
            begin, own = self._text.prompt_ids(value, where)
            return Written(begin + own, value, begin=len(begin))
        if isinstance(value, str) and (found := self.template.written_in(value)):
            raise DataError(
                f"{where}: '{name}' has {found!r}, as if it had been through the chat template: it "
                "would be wrapped twice; leave chat out (--chat) to use texts as they stand, or "
                "give it as a message, in which such tokens are text: "
                '[{"role": "user", "content": ...}]'
            )
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        check_messages(messages, name, where)
        go_on = messages[-1]["role"] == "assistant"
        if go_on and not messages[-1]["content"].strip():
            raise DataError(
                f"{where}: the last message of '{name}' is one of the assistant, the beginning of "
                "the answer, and says nothing: leave it out"
            )
        asked = [message["content"] for message in messages if message["role"] == "user"]
        text = self.template.write(messages, asked, go_on=go_on, what=f"'{name}'", where=where)
        if unquoted(text) != text:
            found = next(filter(None, (self._text.first_in(m["content"]) for m in messages)))
            self._note(Remark.QUOTED, where, name, found)
        if self._thoughts_follow(text, go_on):
            self._note(Remark.THINKS, where, name, self.template.thinking_switch)
        return Written(self._text.ids(text, where), text, "" if go_on else self.template.gap)

    def answer(self, text, name: str, where: str, after: Written) -> tuple[int, ...]:
        """Tokens of an answer: those that follow its prompt where both are tokenised together.

        Where the tokens of both do not begin with the prompt's, or its text is not known, the
        answer is tokenised alone, and that is noted.

        Args:
            text: the field's value.
            name: the field's, for messages; so `where`.
            where: file and line.
            after: its prompt.

        Raises:
            DataError: it is no text, or there is no tokenizer.
        """
        self._check_tokenizer(name, ANSWERS[name], where)
        if not isinstance(text, str):
            raise DataError(f"{where}: '{name}' must be text")
        return self._noted(text, name, where, after)

    def both_answers(
        self, texts: Mapping[str, Any], where: str, prompt: Written, counterfactual: Written
    ) -> dict[str, tuple[int, ...]]:
        """Tokens of the answers to a pair, by the name of their field; see `answer`.

        Args:
            texts: by field.
            where: file and line.
            prompt: what they follow.
            counterfactual: what they are told to follow otherwise, if they do.
        """
        found = {}
        for name, text in texts.items():
            found[name] = self.answer(text, name, where, prompt)
            other = self.following(text, counterfactual, where)
            if prompt.text is not None and other not in (None, found[name]):
                self._note(Remark.UNLIKE, where, name)
        return found

    def _noted(self, text: str, name: str, where: str, after: Written) -> tuple[int, ...]:
        """Tokens of an answer; see `answer`."""
        joined = self.following(text, after, where)
        if joined is None:
            self._note(Remark.ALONE, where, name)
            return self._text.ids(text, where)
        return joined

    def following(self, text: str, after: Written, where: str) -> tuple[int, ...] | None:
        """What a text adds to the tokens of its prompt; None if it changes these, or only they are
        known."""
        if after.text is None or self.tokenizer is None:
            return None
        lead = "" if not text or text[0].isspace() else after.gap
        before = after.ids[after.begin :]
        both = self._text.ids(f"{after.text}{lead}{text}", where)
        # An unknown word is the same token whatever is added to it.
        is_known = not before or before[-1] != self.tokenizer.unk_token_id
        return both[len(before) :] if is_known and both[: len(before)] == before else None

    def first_tokens(
        self, given: Iterable[str], vocab_size: int, after: Iterable[Written], *, where: str
    ) -> tuple[int, ...]:
        """First tokens of answers, given as texts or as id:NUMBER; each once.

        Args:
            given: the texts.
            vocab_size: of the model.
            after: the prompts that a text's first token must be the same after.
            where: the argument or flag that gives them, for messages.

        Raises:
            InputError: a number is no token of the model; a text has no token, or has not the same
                first one after all prompts; or there is no tokenizer.
        """
        prompts = list({prompt.text: prompt for prompt in after}.values()) or [Written(())]
        found = []
        for text in given:
            token = id_given(text, vocab_size, where=where)
            if token is None:
                token = self._first_token(text, prompts, where)
            found.append(token)
        return tuple(dict.fromkeys(found))

    def _first_token(self, text: str, prompts: Iterable[Written], where: str) -> int:
        if self.tokenizer is None:
            example = "12" if not text.isdecimal() else text
            raise InputError(
                f"{where}={text}: the checkpoint has no tokenizer; give token ids instead, as "
                f"{where}={BY_ID}{example}"
            )
        firsts = set()
        for prompt in prompts:
            tokens = self._noted(text, "", where, prompt)
            if not tokens:
                raise InputError(f"{where}: '{text}' has no tokens")
            firsts.add(tokens[0])
        if len(firsts) > 1:
            raise InputError(
                f"{where}={text}: begins with another token after some prompts than after others "
                f"({', '.join(map(str, sorted(firsts)))}); give token ids, as {where}="
                f"{BY_ID}{min(firsts)}"
            )
        return firsts.pop()

    def single_token(self, text: str, vocab_size: int, *, where: str) -> int:
        """The token that a text is, or that id:NUMBER gives.

        Raises:
            InputError: it is none, or several.
        """
        token = id_given(text, vocab_size, where=where)
        if token is not None:
            return token
        if self.tokenizer is None:
            raise InputError(
                f"{where}={text}: the checkpoint has no tokenizer; give a token id instead, as "
                f"{where}={BY_ID}12"
            )
        tokens = self._text.ids(text, where)
        if len(tokens) != 1:
            raise InputError(
                f"{where}={text}: is {len(tokens)} tokens of this tokenizer, not one; "
                f"{BY_ID}NUMBER gives one by its id"
            )
        return tokens[0]

    def _thoughts_follow(self, text: str, go_on: bool) -> bool:
        if open_thoughts(self._text, text):
            return True
        are_closed = any(text.rstrip().endswith(closes) for _, closes in THOUGHTS)
        return bool(self.template.thinking_switch) and not (are_closed or go_on)

    def _note(self, remark: Remark, where: str, name: str, example: str = "") -> None:
        place = f"{where}: '{name}'" if name else where
        self._places.setdefault(remark, {})[place] = example

    @property
    def counts(self) -> dict[str, int]:
        """How often there is something to tell, by what it is: each field of a line once."""
        return {remark: len(self._places[remark]) for remark in Remark if remark in self._places}

    @property
    def told(self) -> list[str]:
        """A sentence on each of `counts`."""
        lines = []
        for remark in Remark:
            if places := self._places.get(remark):
                place, example = next(iter(places.items()))
                shown = f" ({example!r})" if example else ""
                what = remark[0].upper() + remark[1:]
                lines.append(f"{what}: {len(places)}, the first at {place}{shown}. {_TOLD[remark]}")
        return lines

    def _check_tokenizer(self, text_name: str, ids_name: str, where: str) -> None:
        if self.tokenizer is None:
            raise DataError(
                f"{where}: '{text_name}' is text, but the checkpoint has no tokenizer; "
                f"give '{ids_name}' instead"
            )
