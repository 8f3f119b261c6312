"""Metrics Y: a real number of one run, harmful minus safe.

A metric is the sum of signed terms. Each term runs the prompt with a teacher-forced response (or
with none) and reads a number off its logits: `terms` says which, `value` computes the number. The
same `value` serves a plain run, whose logits are all known, and the engine, which asks only for
the rows and tokens that are read, and goes through the vocabulary in chunks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.data.pairs import Pair
from jaxmed.files.reading import DataError
from models.shapes import AnyArray

# Tokens whose logits are in memory at once where the whole vocabulary is read.
VOCABULARY_CHUNK = 4096


@runtime_checkable
class Logits(Protocol):
    """The logits at the R rows that a metric reads."""

    def of(self, tokens: Int[AnyArray, "K"]) -> Float[Array, "R K"]:
        """Logits of the given tokens."""
        ...

    def log_normaliser(self) -> Float[Array, "R"]:
        """Log-sum-exp over the vocabulary."""
        ...


@dataclasses.dataclass(frozen=True)
class KnownLogits:
    """Logits of a plain run, all of them.

    Attributes:
        rows: [R, V].
    """

    rows: Float[Array, "R V"]

    def of(self, tokens: Int[AnyArray, "K"]) -> Float[Array, "R K"]:
        """Logits of the given tokens."""
        return self.rows[:, tokens]

    def log_normaliser(self) -> Float[Array, "R"]:
        """Log-sum-exp over the vocabulary."""
        return jax.nn.logsumexp(self.rows, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read off a run; arrays, so that it is no reason to compile again.

    Attributes:
        offsets: positions whose logits are read, counted from the last prompt token, [R].
        tokens: token ids, of any shape; their meaning is the metric's.
        weights: same shape as tokens; 0 where it is padding.
    """

    offsets: Int[AnyArray, "*batch R"]
    tokens: Int[AnyArray, "*K"]
    weights: Float[AnyArray, "*K"]


@dataclasses.dataclass(frozen=True)
class Term:
    """One run of the metric: Y is the sum over terms of sign * value.

    Attributes:
        response: tokens that are teacher-forced after the prompt; may be empty.
        sign: +1 or -1.
        reading: what is read.
        whole_vocabulary: whether `Metric.value` asks for the log-normaliser.
    """

    response: tuple[int, ...]
    sign: int
    reading: Reading
    whole_vocabulary: bool


@runtime_checkable
class Metric(Protocol):
    """What every metric provides: one of those here, or an object of your own (see `OfLogits`).

    It must be hashable, as a frozen dataclass is: it is a static argument of compiled functions.
    """

    @property
    def name(self) -> str:
        """What it is called, in results and messages."""
        ...

    @property
    def metric_unit(self) -> str:
        """What Y is counted in, for people: "logits", "nats per token"."""
        ...

    @property
    def meaning(self) -> str:
        """What Y is, for people."""
        ...

    def terms(self, pair: Pair) -> list[Term]:
        """The runs, and what is read off each.

        Raises:
            DataError: the pair lacks what is read.
        """
        ...

    def value(self, logits: Logits, reading: Reading) -> Float[Array, ""]:
        """The number that one run gives, made of operations that `engine.difference` has rules
        for."""
        ...


@jax.jit
def logsumexp_last_axis(logits: Float[Array, "... n"]) -> Float[Array, "..."]:
    """log sum exp over the last axis. Named: difference propagation has a rule for it."""
    return jax.nn.logsumexp(logits, axis=-1)


@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """Logit of the harmful answer's first token minus that of the safe one's.

    Read at the last prompt position. With sets of first tokens it is the difference of their
    log-sum-exps. Counted in logits (nats of odds).

    Attributes:
        harmful_tokens, safe_tokens: sets of first tokens that replace every pair's own answers.
    """

    harmful_tokens: tuple[int, ...] = ()
    safe_tokens: tuple[int, ...] = ()

    name = "logit_diff"
    metric_unit = "logits"

    @property
    def meaning(self) -> str:
        """What Y is, for people."""

        def answer(tokens, name):
            if not tokens:
                return f"the logit of the {name} answer’s first token"
            return f"the log-sum-exp of the logits of the {name} first tokens {list(tokens)}"

        harmful = answer(self.harmful_tokens, "harmful")
        return f"{harmful} minus {answer(self.safe_tokens, 'safe')}, at the last prompt token"

    def terms(self, pair: Pair) -> list[Term]:
        """One run, of the prompt alone.

        Raises:
            DataError: an answer is missing, or both have the same first token.
        """
        harmful = self.harmful_tokens or _first_token(pair, pair.harmful_ids, "harmful")
        safe = self.safe_tokens or _first_token(pair, pair.safe_ids, "safe")
        if both := set(harmful) & set(safe):
            raise DataError(
                f"{pair.where}: pair '{pair.id}': the harmful and the safe answer have the same "
                f"first token {sorted(both)}, so that {self.name} would say nothing; the metric "
                f"{ResponseLogprobDifference.name} compares whole responses"
            )
        size = max(len(harmful), len(safe))
        tokens, weights = np.zeros((2, size), np.int32), np.zeros((2, size), np.float32)
        for row, answer in enumerate((harmful, safe)):
            tokens[row, : len(answer)], weights[row, : len(answer)] = answer, 1
        reading = Reading(offsets=np.zeros(1, np.int32), tokens=tokens, weights=weights)
        return [Term(response=(), sign=1, reading=reading, whole_vocabulary=False)]

    def value(self, logits: Logits, reading: Reading) -> Float[Array, ""]:
        """The difference of the two sets' log-sum-exps."""
        chosen = logits.of(reading.tokens.reshape(-1))[0].reshape(reading.tokens.shape)
        if reading.tokens.shape[-1] == 1:
            return chosen[0, 0] - chosen[1, 0]
        lowest = jnp.finfo(chosen.dtype).min / 4
        harmful, safe = logsumexp_last_axis(jnp.where(reading.weights > 0, chosen, lowest))
        return harmful - safe


@dataclasses.dataclass(frozen=True)
class ResponseLogprobDifference:
    """Mean token log-probability of the harmful response minus that of the safe one.

    Both are teacher-forced. Counted in nats per token.

    Attributes:
        part: "all", "decision" (the first `decision_tokens` tokens) or "continuation" (the rest);
            the mean is over the part's tokens.
        decision_tokens: length of the decision, in tokens.
    """

    part: str = "all"
    decision_tokens: int = 1

    name = "response_logprob_diff"
    metric_unit = "nats per token"

    @property
    def meaning(self) -> str:
        """What Y is, for people."""
        tokens = {
            "all": "",
            "decision": f"’s first {self.decision_tokens} token(s)",
            "continuation": f" after its first {self.decision_tokens} token(s)",
        }[self.part]
        return (
            f"the mean token log-probability of the harmful response{tokens} minus that of the "
            "safe one" + (", likewise" if tokens else "")
        )

    def terms(self, pair: Pair) -> list[Term]:
        """Two runs, one for each response.

        Raises:
            DataError: a response is missing, or has no tokens in the part.
        """
        start, stop = {
            "all": (0, None),
            "decision": (0, self.decision_tokens),
            "continuation": (self.decision_tokens, None),
        }[self.part]
        terms = []
        for name, response, sign in (
            ("harmful", pair.harmful_ids, 1),
            ("safe", pair.safe_ids, -1),
        ):
            tokens = np.array(response[start:stop], np.int32)
            if not len(tokens):
                raise DataError(
                    f"{pair.where}: pair '{pair.id}': its {name} response has {len(response)} "
                    f"tokens, none of them in the part '{self.part}' that {self.name} reads "
                    f"(fields '{name}_response' or '{name}_ids')"
                )
            offsets = start + np.arange(len(tokens), dtype=np.int32)
            weights = np.full(len(tokens), 1 / len(tokens))
            reading = _padded(offsets, tokens, weights)
            terms.append(Term(tuple(response), sign, reading, whole_vocabulary=True))
        return terms

    def value(self, logits: Logits, reading: Reading) -> Float[Array, ""]:
        """The response's mean log-probability."""
        row = jnp.arange(reading.tokens.shape[0])
        chosen = logits.of(reading.tokens)[row, row]
        return jnp.sum((chosen - logits.log_normaliser()) * reading.weights.astype(chosen.dtype))


@dataclasses.dataclass(frozen=True)
class OfLogits:
    """A metric of your own: a function of the logits of some tokens at the last prompt position.

    The logit of token 17 against the mean of two others:

        OfLogits(lambda logits: logits[0] - (logits[1] + logits[2]) / 2, tokens=(17, 4, 5))

    The log-odds of the pair's safe answer among all first tokens:

        OfLogits(
            lambda log_p: log_p[0] - jnp.log1p(-jnp.exp(log_p[0])),
            tokens=lambda pair: pair.safe_ids[:1],
            log_probabilities=True,
            metric_unit="nats",
        )

    Attributes:
        function: gets the tokens' logits, [K], and gives a number, by operations that
            `engine.difference` has rules for. Two functions are two metrics, each of which is
            compiled, even if they are written alike: make one metric and use it for all pairs.
        tokens: token ids, [K]; or a function of the pair that gives them.
        log_probabilities: whether the function gets their log-probabilities instead.
        name, metric_unit, meaning: as of every metric.
    """

    function: Callable[[Float[Array, "K"]], Float[Array, ""]]
    tokens: tuple[int, ...] | Callable[[Pair], Sequence[int]]
    log_probabilities: bool = False
    name: str = "of_logits"
    metric_unit: str = "logits"
    meaning: str = "a function of the logits at the last prompt position"

    def terms(self, pair: Pair) -> list[Term]:
        """One run, of the prompt alone.

        Raises:
            DataError: there are no tokens for the pair.
        """
        tokens = np.array(self.tokens(pair) if callable(self.tokens) else self.tokens, np.int32)
        if not len(tokens):
            raise DataError(f"{pair.where}: pair '{pair.id}': {self.name} has no tokens to read")
        reading = Reading(
            offsets=np.zeros(1, np.int32),
            tokens=tokens,
            weights=np.ones(len(tokens), np.float32),
        )
        return [Term((), 1, reading, whole_vocabulary=self.log_probabilities)]

    def value(self, logits: Logits, reading: Reading) -> Float[Array, ""]:
        """What the function makes of the run."""
        read = logits.of(reading.tokens)[0]
        return self.function(read - logits.log_normaliser()[0] if self.log_probabilities else read)


# Those that a program can be asked for by name.
METRICS = {metric.name: metric for metric in (LogitDifference, ResponseLogprobDifference)}


def _first_token(pair: Pair, answer: tuple[int, ...], name: str) -> tuple[int, ...]:
    if not answer:
        raise DataError(
            f"{pair.where}: pair '{pair.id}' has no {name} answer (field '{name}_response' or "
            f"'{name}_ids'), and no set of {name} first tokens was given"
        )
    return answer[:1]


def _padded(offsets, tokens, weights) -> Reading:
    """Rows rounded up to a multiple of 8: responses of other lengths share a compilation."""
    extra = -len(tokens) % 8
    return Reading(
        offsets=np.pad(offsets, (0, extra), mode="edge"),
        tokens=np.pad(tokens, (0, extra)),
        weights=np.pad(weights, (0, extra)),
    )
