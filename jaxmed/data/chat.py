"""Chat messages, and what a tokenizer's chat template makes of them."""

import datetime
import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta

from jaxmed.data.control import TextTokenizer, unquoted
from jaxmed.files.reading import DataError
from models.errors import InputError

# What models write first if they think before they answer, and what ends it.
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))

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
# What transformers' templates may have beyond Jinja's: loops that break, and marks of answers.
_EXTENSIONS = ("jinja2.ext.loopcontrols",)
_MARKED = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")
# Contents as templates take them: text, or a list of parts.
_CONTENTS: tuple[Callable[[str], Any], ...] = (
    str,
    lambda text: [{"type": "text", "text": text}],
)
_PROBE = "jaxmed asks this"  # not to be found in a template
_INSTRUCTED = ("system", "developer")  # roles of who tells the model how to answer


class ChatTemplate:
    """A tokenizer's chat template, and what it is given beside messages.

    Args:
        text: the tokenizer.
        date: the day that it is for a template that asks; the time is midnight.
        args: what else the template is given, by name, as JSON has it.
        owner: who has the template, for messages.

    Raises:
        InputError: it reads no argument of a given name.
    """

    def __init__(
        self,
        text: TextTokenizer,
        *,
        date: datetime.date,
        args: Mapping[str, Any] | None = None,
        owner: str = "the tokenizer",
    ):
        self.text, self.args, self.owner = text, dict(args or {}), owner
        given = text.tokenizer.chat_template
        # Of several templates with names it is the one that is called default.
        source = given.get("default", "") if isinstance(given, dict) else given or ""
        self.reads_date = "strftime_now" in source
        own = {*inspect.signature(text.tokenizer.apply_chat_template).parameters}
        own |= {"messages", "strftime_now", "raise_exception"}
        self._read = _read_names(source)
        for name in self.args:
            if name in own - {"tools", "documents"}:
                raise InputError(f"template_args: '{name}' is not to be given")
            if name not in self._read:
                raise InputError(f"template_args: the chat template of {owner} reads no '{name}'")
        self.source = _dated(source, date) if self.reads_date else source

    def write(
        self,
        messages: Sequence[dict],
        needed: Sequence[str],
        *,
        go_on: bool,
        what: str,
        where: str,
    ) -> str:
        """Messages as the template writes them, up to where the answer begins.

        Control tokens in contents are quoted (`TextTokenizer.quoted`). Templates of models that
        also read images may render contents only as lists of parts: where they lose those that are
        text, they get lists.

        Args:
            messages: each with `role` and `content`, both text.
            needed: contents that must be there one after the other, but for white space at their
                ends, which many templates strip.
            go_on: leave the last message open, for the answer to go on with.
            what: what the messages are, for errors; so `where`.

        Raises:
            DataError: there is no template, it fails, or it drops or alters what is needed, or
                drops a system message.
        """
        if not self.source:
            raise DataError(
                f"{where}: {what} cannot be shown as a chat: {self.owner} has no chat template"
            )
        messages = [message | {"content": self._quoted(message)} for message in messages]
        problems = []
        for as_content in _CONTENTS:
            try:
                rendered = self._render(messages, as_content, go_on=go_on)
                dropped = self._dropped(messages, as_content)
            except _TEMPLATE_ERRORS as error:
                problems.append(f"refuses {what}: {str(error).partition(chr(10))[0]}")
                continue
            # Where a template for text gets a list, it writes brackets and all.
            lists = [str(as_content(message["content"])) for message in messages]
            as_list = as_content is not str and any(text in rendered for text in lists)
            if not _has_in_order(unquoted(rendered), needed) or as_list:
                problems.append(f"drops or alters {what}")
            elif dropped:
                problems.append(
                    f"drops the {dropped} message of {what}: say it in a message of the user"
                )
            else:
                return rendered
        raise DataError(f"{where}: the chat template of {self.owner} {problems[0]}")

    def _quoted(self, message: dict) -> str:
        # Templates take the thoughts of earlier answers out, which they know by their tags.
        tags = sum(THOUGHTS, ()) if message["role"] == "assistant" else ()
        return self.text.quoted(message["content"], but=tags)

    def _render(
        self,
        messages: Sequence[dict],
        as_content: Callable[[str], Any] = str,
        *,
        go_on: bool = False,
        ask: bool = True,
        more: Mapping[str, Any] | None = None,
    ) -> str:
        given = [message | {"content": as_content(message["content"])} for message in messages]
        rendered = self.text.tokenizer.apply_chat_template(
            given,
            chat_template=self.source,
            add_generation_prompt=ask and not go_on,
            continue_final_message=go_on,
            tokenize=False,
            **self.args | dict(more or {}),
        )
        return str(rendered)  # not tokenised, it is text

    def _dropped(self, messages: Sequence[dict], as_content: Callable[[str], Any]) -> str:
        """The role of a message that instructs the model, and is not there; "" if none is."""
        for place, message in enumerate(messages):
            if message["role"] in _INSTRUCTED:
                probed = [*messages]
                probed[place] = message | {"content": _PROBE}
                if _PROBE not in self._render(probed, as_content):
                    return message["role"]
        return ""

    @functools.cached_property
    def _around(self) -> tuple[str, str]:
        """What the template writes before and behind the only message of a user, up to where the
        answer begins; nothing where it writes no such message as text."""
        before, found, behind = self._asked({}).partition(_PROBE)
        return (before, behind) if found else ("", "")

    def _asked(self, more: Mapping[str, Any]) -> str:
        """The only message of a user as the template writes it, up to where the answer begins, if
        it is given some more; "" where it fails."""
        try:
            return self._render([{"role": "user", "content": _PROBE}], more=more)
        except _TEMPLATE_ERRORS:
            return ""

    @functools.cached_property
    def _answered(self) -> tuple[str, str]:
        """What the template writes before an answer, from where a prompt ends, and behind it;
        nothing where it writes none there."""
        before, behind = self._around
        messages = [
            {"role": "user", "content": _PROBE},
            {"role": "assistant", "content": f"{_PROBE} again"},
        ]
        try:
            whole = self._render(messages, ask=False)
        except _TEMPLATE_ERRORS:
            return "", ""
        asked = before + _PROBE + behind
        lead, found, end = whole.removeprefix(asked).partition(f"{_PROBE} again")
        return (lead, end) if found and whole.startswith(asked) else ("", "")

    @property
    def gap(self) -> str:
        """White space that the template writes between a prompt and an answer, which a model of
        such a template generates too: a space with Llama 2's, mostly nothing."""
        lead, _ = self._answered
        return lead if lead.isspace() else ""

    def unstopped(self, stop: Collection[int]) -> str:
        """The control token that the template ends an answer with; "" where it is none, or one of
        these."""
        _, end = self._answered
        token = self.text.at_start_of(end.lstrip())
        return "" if self.text.control_tokens.get(token) in stop else token

    def written_in(self, text: str) -> str:
        """What shows that a text has been through such a template already; "" if nothing does: it
        begins with a control token, or as the template does, or ends as it does."""
        text = text.strip()
        if found := self.text.at_start_of(text):
            return found
        before, behind = map(str.strip, self._around)
        while token := self.text.at_start_of(before):
            before = before.removeprefix(token).lstrip()
        if before and text.startswith(before):
            return before
        return behind if self.text.first_in(behind) and text.endswith(behind) else ""

    @functools.cached_property
    def thinking_switch(self) -> str:
        """What has the model think before it answers, unless it is turned off, by its name; ""
        where nothing does, or it has been given.

        It is something that the template reads, with a name that tells of thoughts, and that as
        false has other text written: enable_thinking, thinking, reasoning_effort, ...
        """
        switches = sorted(name for name in self._read if re.search("think|reason", name))
        if self.args.keys() & set(switches):
            return ""
        usual = self._asked({})
        return next((name for name in switches if self._asked({name: False}) != usual), "")


def open_thoughts(reader: TextTokenizer, text: str) -> str:
    """The tag that will close the thoughts in which a prompt ends; "" where it ends in none.

    A tag opens some if the template, or an assistant's message that the answer goes on with, begins
    with it: behind the last control token, at the beginning of a line or the end of the prompt.
    Elsewhere it is a word of what is said.

    Args:
        reader: the tokenizer.
        text: of the prompt, as the template has written it.
    """
    begun = reader.behind_last(text, but=sum(THOUGHTS, ()))
    for opens, closes in THOUGHTS:
        tag = re.escape(opens)
        _, *behind = re.split(rf"(?:^|\n)\s*{tag}|{tag}(?=\s*$)", begun)
        if behind and closes not in behind[-1]:
            return closes
    return ""


def _read_names(template: str) -> set[str]:
    """What a template reads of what it is given, by name; nothing where it is no template."""
    try:
        parsed = jinja2.Environment(extensions=_EXTENSIONS).parse(_MARKED.sub("", template))
        return jinja2.meta.find_undeclared_variables(parsed)
    except (*_TEMPLATE_ERRORS, RecursionError):
        return set()


def _dated(template: str, date: datetime.date) -> str:
    """The template, for which it is that day: the function that it asks is one of its own."""
    moment = datetime.datetime.combine(date, datetime.time())
    letters = "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZ"
    codes = [flag + letter for flag in ("%", "%-") for letter in letters]
    steps = [("%%", "\0"), *((code, moment.strftime(code)) for code in codes), ("\0", "%")]
    filters = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps)
    # The line break after a block is not written.
    return f"{{% macro strftime_now(form) %}}{{{{ form{filters} }}}}{{% endmacro %}}\n{template}"


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
