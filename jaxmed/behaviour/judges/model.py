"""Judge models: published classifiers that run through the decoders here, asked by a `Template`.

N is the padded length of a run, B the number of runs of a batch, R the rows that are read of each,
K the tokens whose probabilities are asked for.
"""

import dataclasses
import datetime
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
import transformers
from jaxtyping import Array, Bool, Float, Int

from jaxmed.behaviour import batches
from jaxmed.behaviour.judges import protocol
from jaxmed.behaviour.judges.protocol import SAYS, Exchange, Verdict, named_exchanges, text_of
from jaxmed.behaviour.judges.templates import Answer, JudgeQuestion, Template, braced
from jaxmed.data.chat import ChatTemplate
from jaxmed.data.control import TextTokenizer
from jaxmed.engine import capture, cost
from models import checkpoint as checkpoints
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class _Path:
    """One spelling of an answer, as the tokens that give it."""

    answer: Answer
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Run:
    """One sequence that the model reads: an exchange, and the beginning of some spellings.

    Attributes:
        index: of the exchange.
        begun: the first tokens of a spelling of several; () where only its next token is asked.
        tokens: of the whole run.
    """

    index: int
    begun: tuple[int, ...]
    tokens: tuple[int, ...]


# The day that it is for a judge's chat template, so that its verdicts do not change overnight.
_DATE = datetime.date(2025, 1, 1)
# Not to be found in a template: what was lost of them was lost by rendering.
_PROBE = Exchange("jaxmed asks this", "and the model says that", where="a trial exchange")


class JudgeModel:
    """A judge that is itself a language model.

    An answer's probability is the softmax, over all answers' spellings, of their log-probabilities
    as the next tokens; a spelling of several tokens is scored teacher-forced, by their sum. The
    verdict is the mean of the answers' values; there is none where the answers' probability before
    that, all together, is under `LEAST_MASS`: the model was about to say something else.

    Args:
        template: what it is asked.
        decoder, tokenizer: of its checkpoint.
        checkpoint: the checkpoint's name, for messages.
        folder: of the checkpoint, where its weights can be hashed.
        cut: cut the end of a response that is too long for the model off, and say so in the
            verdict; by default it is an error.

    Raises:
        InputError: the template lacks its text, the checkpoint has no tokenizer, or its tokenizer
            cannot render the template, loses prompt or response, or cannot tell the answers apart.
    """

    def __init__(
        self,
        template: Template,
        decoder: Decoder,
        tokenizer: transformers.PreTrainedTokenizerBase | None,
        *,
        checkpoint: str = "the checkpoint",
        folder: pathlib.Path | None = None,
        cut: bool = False,
    ):
        template.require_text()
        if tokenizer is None:
            raise InputError(
                f"judge '{template.name}': {checkpoint} has no tokenizer, and a judge model reads "
                "text"
            )
        self.template, self.decoder, self.tokenizer = template, decoder, tokenizer
        self._text = TextTokenizer(tokenizer)
        self._chat = ChatTemplate(self._text, date=_DATE, owner=checkpoint)
        self.checkpoint, self.folder, self.cut = checkpoint, folder, cut
        self.name, self.meaning = template.name, template.meaning
        said = [question.says for question in template.questions]
        self.says = tuple(one for one in SAYS if one in said)
        text, self._paths = self._render(_PROBE), []
        length = len(self._encode(text))
        self._room = 0  # what questions and answers add to an exchange, at most
        for question in template.questions:
            text = _continued(text, question.lead)
            self._paths.append(self._paths_of(question, text))
            longest = max(self._paths[-1], key=lambda path: len(path.tokens))
            added = len(self._encode(text)) + len(longest.tokens) - 1 - length
            self._room = max(self._room, added)
            text += longest.answer.spellings[0]

    @property
    def precision(self) -> str:
        """How it multiplies by its weights, one of `products.EXACT`."""
        return self.decoder.products.precision

    @property
    def basis(self) -> tuple[float, dict, object, str | None, str]:
        """The least mass of a verdict, its template, the chat template that writes its messages,
        and hashes of its weights and of its config; None for what it has not."""
        return (
            protocol.LEAST_MASS,
            dataclasses.asdict(self.template),
            self.tokenizer.chat_template if self.template.messages else None,
            None if self.folder is None else checkpoints.weights_hash(self.folder),
            checkpoints.config_hash(self.decoder.config),
        )

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts, each the same whatever else is judged with it (but for rounding).

        Raises:
            InputError: an exchange has no text, or is too long for the model.
        """
        seen = [self._fitted(exchange) for exchange in named_exchanges(exchanges)]
        texts = [self._render(exchange) for exchange in seen]
        said = [{} for _ in exchanges]
        least = [1.0] * len(texts)  # mass of all questions so far
        for question, paths in zip(self.template.questions, self._paths, strict=True):
            texts = [_continued(text, question.lead) for text in texts]
            for index, (weights, mass) in enumerate(self._answer(texts, paths)):
                least[index] = min(least[index], mass)
                if question.says:
                    said[index][f"{question.says}_mass"] = least[index]
                if question.says and least[index] >= protocol.LEAST_MASS:
                    values = [answer.value * weight for answer, weight in weights.items()]
                    said[index][question.says] = float(np.clip(sum(values), 0, 1))
                texts[index] += max(weights, key=lambda answer: weights[answer]).spellings[0]
        return [
            Verdict(**fields, cut=shown.response != exchange.response)
            for fields, shown, exchange in zip(said, seen, exchanges, strict=True)
        ]

    def _answer(
        self, texts: list[str], paths: list[_Path]
    ) -> list[tuple[dict[Answer, float], float]]:
        """The probability of each answer, after each of the texts, if it is one of them; and that
        it is."""
        runs = [
            _Run(index, begun, tokens + begun)
            for index, tokens in enumerate(map(self._encode, texts))
            for begun in sorted({path.tokens[:-1] for path in paths})
        ]
        asked = sorted({token for path in paths for token in path.tokens})
        column = {token: place for place, token in enumerate(asked)}
        read = self._read(runs, np.array(asked, np.int32), max(len(p.tokens) for p in paths))
        scores = np.empty((len(texts), len(paths)))
        for run, rows in zip(runs, read, strict=True):
            for place, path in enumerate(paths):
                if path.tokens[:-1] == run.begun:
                    steps = [rows[row, column[token]] for row, token in enumerate(path.tokens)]
                    scores[run.index, place] = sum(steps)
        masses = np.minimum(np.exp(scores).sum(axis=1), 1)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        answers = dict.fromkeys(path.answer for path in paths)
        shares = [
            {
                answer: float(sum(w for w, p in zip(row, paths, strict=True) if p.answer == answer))
                for answer in answers
            }
            for row in weights
        ]
        return list(zip(shares, map(float, masses), strict=True))

    def _read(
        self, runs: list[_Run], asked: Int[np.ndarray, "K"], size: int
    ) -> list[Float[np.ndarray, "R K"]]:
        """Log-probabilities of the asked tokens at the end of each run's text and at the positions
        after it, `size` in all."""
        read = {}
        for length, members in batches.by_length([run.tokens for run in runs], cost.judged_at_once):
            # A batch of a power of two shares its compilation; its first runs fill it up.
            filled = [runs[i] for i in np.resize(members, capture.bucket(len(members)))]
            ends = np.array([len(run.tokens) for run in filled])[:, None]
            starts = np.array([len(run.tokens) - len(run.begun) - 1 for run in filled])[:, None]
            with jax.default_matmul_precision("float32"):
                found = answer_log_probabilities(
                    self.decoder,
                    batches.padded([run.tokens for run in filled], length),
                    valid=np.arange(length) < ends,
                    rows=starts + np.arange(size),
                    asked=asked,
                )
            for index, values in zip(members, np.asarray(found), strict=False):
                read[index] = values.astype(np.float64)
        return [read[index] for index in range(len(runs))]

    def _fitted(self, exchange: Exchange) -> Exchange:
        """The exchange, with as much of its response as the model has positions for."""
        most = self.decoder.config.max_positions - self._room
        length = len(self._encode(self._render(exchange)))
        if length <= most:
            return exchange
        if not self.cut:
            raise InputError(
                f"{exchange.where}: has {length} tokens as judge '{self.name}' reads it, and "
                f"{self.checkpoint} has room for {most}; shorten it, or have the responses' ends "
                "cut off: cut (--cut)"
            )

        response = text_of(exchange, "response", f"judge '{self.name}'")

        def shortened(characters: int) -> Exchange:
            return dataclasses.replace(exchange, response=response[:characters])

        def fits(characters: int) -> bool:
            return len(self._encode(self._render(shortened(characters)))) <= most

        if not fits(0):
            raise InputError(
                f"{exchange.where}: its prompt alone is too long for judge '{self.name}', which "
                f"has room for {most} tokens"
            )
        return shortened(_largest(fits, len(response)))

    def _encode(self, text: str) -> tuple[int, ...]:
        """Token ids, with what the tokenizer puts before a text where the text lacks it."""
        where = f"judge '{self.name}'"
        if self.template.messages:
            return self._text.ids(text, where)
        begin, own = self._text.prompt_ids(text, where)
        return begin + own

    def _render(self, exchange: Exchange) -> str:
        """What the model reads of an exchange, before the first question; control tokens in what
        is shown of it are text."""
        fields = zip(self.template.placeholders, ("prompt", "response"), strict=True)
        shown = {name: text_of(exchange, field, f"judge '{self.name}'") for name, field in fields}
        if self.template.text is not None:
            quoted = {name: self._text.quoted(text) for name, text in shown.items()}
            return _filled(self.template.text, quoted)
        messages = [
            {"role": role, "content": _filled(text, shown)} for role, text in self.template.messages
        ]
        return self._chat.write(
            messages,
            [
                message["content"]
                for message, (_, text) in zip(messages, self.template.messages, strict=True)
                if any(braced(name) in text for name in shown)
            ],
            go_on=False,
            what=f"the messages of judge '{self.name}'",
            where=exchange.where,
        )

    def _paths_of(self, question: JudgeQuestion, text: str) -> list[_Path]:
        """The tokens of each answer after a text; spellings that come to the same count once, and
        one that begins with another counts within it."""
        paths, first_tokens = [], {}
        for answer in question.answers:
            found = {self._tokens_after(text, spelling) for spelling in answer.spellings} - {()}
            where = f"judge '{self.name}': answer {answer.spellings[0]!r}"
            if not found:
                raise InputError(
                    f"{where}: the tokenizer of {self.checkpoint} has no tokens for it there; is "
                    "it that of another model?"
                )
            for tokens in sorted(found):
                if any(tokens[:end] in found for end in range(1, len(tokens))):
                    continue
                other = first_tokens.setdefault(tokens[0], answer)
                if other is not answer:
                    raise InputError(
                        f"{where} begins with the same token as {other.spellings[0]!r} with the "
                        f"tokenizer of {self.checkpoint}: {tokens[0]}"
                    )
                paths.append(_Path(answer, tokens))
        return paths

    def _tokens_after(self, text: str, spelling: str) -> tuple[int, ...]:
        """What a spelling adds to the text's tokens; () if it is unknown or changes them."""
        before, both = self._encode(text), self._encode(text + spelling)
        added = both[len(before) :]
        known = self.tokenizer.unk_token_id not in added
        return added if known and both[: len(before)] == before else ()


@jax.jit
def answer_log_probabilities(
    decoder: Decoder,
    tokens: Int[Array, "B N"],
    valid: Bool[Array, "B N"],
    rows: Int[Array, "B R"],
    asked: Int[Array, "K"],
) -> Float[Array, "B R K"]:
    """Log-probabilities of tokens after the given positions; no other position's logits exist."""
    logits, _ = decoder(tokens, valid=valid, positions=rows, sites=())
    return jax.nn.log_softmax(logits)[..., asked]


def _continued(text: str, lead: str) -> str:
    """The text with the lead of a question; line breaks between the two count once."""
    return text.rstrip("\n") + lead if lead.startswith("\n") else text + lead


def _filled(template: str, shown: dict[str, str]) -> str:
    """The template with what is shown for its placeholders; all other braces mean nothing."""
    texts = {braced(placeholder): text for placeholder, text in shown.items()}
    return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], template)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number below `most` that fits, given that 0 does and larger ones do not."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
