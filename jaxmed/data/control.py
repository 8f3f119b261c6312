"""Control tokens: those that a chat template writes, and those that only stand in a text."""

import functools
import re

import tokenizers

from jaxmed.files.reading import DataError
from models.errors import failures_as

# Stands inside a control token that is quoted; no character, so that no text has it.
_MARK = "\U0010fffe"


class TextTokenizer:
    """A tokenizer that can be told which control tokens of a text are not meant as such.

    A text in which a control token is `quoted` is tokenised as if the tokenizer did not know that
    token there: its characters are text, and all else is as ever.

    Args:
        tokenizer: a Hugging Face tokenizer. Its tokens, special tokens and template are not to be
            changed afterwards.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """The control tokens and their ids: special tokens, and of others that were added to the
        vocabulary those that the chat template writes, as <think>."""
        template = str(self.tokenizer.chat_template or "")
        return {
            token.content: index
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if token.content.strip()
            and (token.special or (token.content in template and not token.content.isalnum()))
        }

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        if not longest_first:
            return re.compile("(?!)")
        # Of some thousand tokens (Gemma 3) none is tried where no first character of one stands.
        starts = "".join(sorted({re.escape(token[0]) for token in longest_first}))
        return re.compile(f"(?=[{starts}])(?:{'|'.join(map(re.escape, longest_first))})")

    def first_in(self, text: str) -> str:
        """The first control token in a text; "" if it has none."""
        found = self._pattern.search(text)
        return found[0] if found else ""

    def at_start_of(self, text: str) -> str:
        """The control token that a text begins with; "" if it begins with none."""
        found = self._pattern.match(text)
        return found[0] if found else ""

    def behind_last(self, text: str, *, but: tuple[str, ...] = ()) -> str:
        """What stands behind a text's last control token, of those that are not in `but`; all of it
        where it has none."""
        ends = (found.end() for found in self._pattern.finditer(text) if found[0] not in but)
        return text[max(ends, default=0) :]

    def quoted(self, text: str, *, but: tuple[str, ...] = ()) -> str:
        """The text, with a mark in each control token, which `ids` then takes for text.

        Args:
            text: the text.
            but: control tokens that are left as they are.
        """

        def mark(found: re.Match) -> str:
            token = found[0]
            return token if token in but else token[:1] + _MARK + token[1:]

        return self._pattern.sub(mark, text)

    def ids(self, text: str, where: str) -> tuple[int, ...]:
        """Token ids of a text, without those that the tokenizer adds to one.

        Args:
            text: what control tokens in it are `quoted` is tokenised as text.
            where: file and line, for messages.

        Raises:
            DataError: the tokenizer fails, or cannot but make a control token of one that is
                quoted.
        """
        with failures_as(DataError, f"{where}: the tokenizer cannot read the text"):
            if _MARK not in text:
                return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if self._unmarking is None:
                raise DataError(
                    f"{where}: has the control token {self.first_in(unquoted(text))!r}, which this "
                    "tokenizer can read only as such; take it out, or give token ids"
                )
            encoding = self._unmarking.encode(text, add_special_tokens=False)
        control = set(self.control_tokens.values())
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index in control and _MARK in text[start:end]:
                raise DataError(
                    f"{where}: has the control token {unquoted(text[start:end])!r}, which this "
                    "tokenizer can read only as such; take it out, or give token ids"
                )
        return tuple(encoding.ids)

    def prompt_ids(self, text: str, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of a text that a model is to continue: what the tokenizer puts before a text,
        as a BOS, unless it is there already; and the text's own. What it puts behind a text, as an
        EOS, is in neither.

        Args:
            text, where: as of `ids`.

        Raises:
            DataError: as `ids`.
        """
        own = self.ids(text, where)
        with failures_as(DataError, f"{where}: the tokenizer cannot read the text"):
            whole = tuple(self.tokenizer(unquoted(text))["input_ids"])
        plain = own if _MARK not in text else self.ids(unquoted(text), where)
        starts = range(len(whole) - len(plain) + 1)
        start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0) if plain else 0
        added = whole[:start]
        return () if own[: len(added)] == added else added, own

    @functools.cached_property
    def _unmarking(self) -> tokenizers.Tokenizer | None:
        """The tokenizer, made to take marks out after it has looked for control tokens; None where
        it is not one that can be."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            return None
        copy = tokenizers.Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        steps = [tokenizers.normalizers.Replace(_MARK, "")]
        steps += [copy.normalizer] if copy.normalizer is not None else []
        copy.normalizer = tokenizers.normalizers.Sequence(steps)
        return copy


def unquoted(text: str) -> str:
    """The text without marks, as people read it."""
    return text.replace(_MARK, "")
