"""Who answers prompts, and what was found when they were answered."""

import dataclasses
import functools
import pathlib
import typing

import pyarrow as pa

from jaxmed.behaviour.responses import Response
from jaxmed.engine import memory
from models import checkpoint
from models.decoder import Decoder

TABLE, PAIRS = "prompts.parquet", "pairs.jsonl"
RATES = {"harmful": "harm_rate", "refused": "refusal_rate"}

ROW = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("samples", pa.int32()),
        ("harm_rate", pa.float64()),
        ("refusal_rate", pa.float64()),
        ("unfinished", pa.int32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that answers.

    Attributes:
        folder: of its checkpoint.
        decoder, tokenizer: as `models.load` gives them.
        stop: the tokens that end a response.
        memory_gb: as in `Settings`.
    """

    folder: pathlib.Path
    decoder: Decoder
    tokenizer: object
    stop: frozenset[int]
    memory_gb: float | None = None

    @property
    def budget(self) -> int:
        """Bytes that a run may take beside all that is loaded by now, the judges' weights too."""
        return memory.free(self.memory_gb)

    @functools.cached_property
    def weights_hash(self) -> str:
        """Of its files."""
        return checkpoint.weights_hash(self.folder)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a prompt was answered, as far as pairs are made of it.

    Attributes:
        harmful, safe: the first response of each kind, of those that the model ended itself if
            there are any; None where there is none.
    """

    harmful: Response | None
    safe: Response | None


@dataclasses.dataclass(frozen=True)
class Found:
    """What a run found.

    Attributes:
        folder: where it was written.
        settings: what was asked.
        table: `prompts.parquet`, a row for each prompt. harm_rate, refusal_rate: share of its
            samples that a judge finds harmful, and refused; null where no judge says.
            unfinished: how many responses the limit ended.
        pairs: lines of `pairs.jsonl`, by split.
        templates: how many of these have the template as their safe response.
        same_start: how many of these have answers with the same first token.
        meanings: of the judges, by name.
    """

    folder: pathlib.Path
    settings: typing.Any
    table: pa.Table
    pairs: dict[str, int]
    templates: int
    same_start: int
    meanings: dict[str, str]
