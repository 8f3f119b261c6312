"""A model that answers prompts under conditions, and judges that read the answers."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm
import transformers

from jaxmed.behaviour import responses
from jaxmed.behaviour.judges.protocol import Judge, Verdict
from jaxmed.behaviour.responses import PLAIN, Asked, Condition, Log, Response
from jaxmed.behaviour.sampling import Sampling
from jaxmed.engine import memory
from models import checkpoint
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class AnsweringModel:
    """A model that answers.

    Attributes:
        folder: of its checkpoint.
        decoder, tokenizer: as `models.load` gives them.
        stop: the tokens that end a response.
        memory_gb: all that a run may take on its device, as in `memory.free`.
        adapter: folder of what was merged into the checkpoint; None where nothing was.
    """

    folder: pathlib.Path
    decoder: Decoder
    tokenizer: transformers.PreTrainedTokenizerBase | None
    stop: frozenset[int]
    memory_gb: float | None = None
    adapter: pathlib.Path | None = None

    @property
    def budget(self) -> int:
        """Bytes that a run may take beside all that is loaded by now, the judges' weights too."""
        return memory.free(self.memory_gb)

    @functools.cached_property
    def weights_hash(self) -> str:
        """Of the checkpoint's files."""
        return checkpoint.weights_hash(self.folder)

    @functools.cached_property
    def adapter_hash(self) -> str | None:
        """Of the adapter's files; None without one."""
        return checkpoint.adapter_hash(self.adapter)


def stop_tokens(
    folder: str | os.PathLike, tokenizer: transformers.PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """Tokens that end a checkpoint's responses.

    Those of its generation_config.json (which names the end of a turn, where a chat has one) and
    config.json, and the tokenizer's own end of sequence.

    Args:
        folder: the checkpoint's.
        tokenizer: its tokenizer; None if it has none.

    Raises:
        InputError: a file is not JSON, or what it names are not token ids.
    """
    found: set[Any] = set()
    if tokenizer is not None:
        found.add(tokenizer.eos_token_id)
    for name in (checkpoint.GENERATION_CONFIG, "config.json"):
        file = pathlib.Path(folder) / name
        if not file.is_file():
            continue
        try:
            named = json.loads(file.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file}: not a JSON object ({error})") from None
        named = named if isinstance(named, list) else [named]
        if bad := [token for token in named if type(token) not in (int, type(None))]:
            raise InputError(f"{file}: eos_token_id is {bad[0]!r}, which is no token id")
        found.update(named)
    return frozenset(found - {None})


def answer(
    model: AnsweringModel,
    asked: Sequence[Asked],
    conditions: Sequence[Condition],
    judges: Sequence[Judge],
    answered: Log[Response],
    verdicts: Log[Verdict],
    *,
    sampling: Sampling,
    samples: int = 1,
    seed: int = 0,
    label: str = "",
    progress: bool = True,
) -> None:
    """Adds to the logs what they lack: responses to prompts under conditions, and verdicts.

    Args:
        model: answers.
        asked: the prompts; their ids differ.
        conditions: under each of these.
        judges: each says what those before it do not say.
        answered, verdicts: the logs.
        sampling: how tokens are chosen.
        samples: responses of each prompt.
        seed: of all samples.
        label: before the names of the progress bars.
        progress: show these.

    Raises:
        InputError: the memory does not suffice, or a judge cannot read a response.
    """
    wanted = responses.keys([each.name for each in conditions], asked, samples)
    budget = model.budget

    def bar(what: str, log: Log) -> tqdm.tqdm:
        # `initial`: what an earlier run did says nothing of the time that the rest takes.
        done = sum(key in log.values for key in wanted)
        name = f"{label}: {what}" if label else what
        return tqdm.tqdm(
            total=len(wanted), initial=done, desc=name, unit="response", disable=not progress
        )

    with bar("responses", answered) as shown:
        for condition in conditions:
            shown.set_postfix_str(condition.name)
            with under(condition):
                responses.generate(
                    model.decoder,
                    model.tokenizer,
                    condition,
                    asked,
                    answered,
                    stop=model.stop,
                    sampling=sampling,
                    samples=samples,
                    seed=seed,
                    memory=budget,
                    progress=shown.update,
                )
    with bar("verdicts", verdicts) as shown:
        responses.judge(asked, judges, wanted, answered, verdicts, progress=shown.update)


@contextlib.contextmanager
def under(condition: Condition) -> Iterator[None]:
    """Names the condition in errors, unless it is the plain model."""
    try:
        yield
    except InputError as error:
        if condition is PLAIN:
            raise
        raise InputError(
            f"condition '{condition.name}': {error} (what was answered before is kept)"
        ) from None
