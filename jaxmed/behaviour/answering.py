"""A model that answers prompts under conditions, and judges that read the answers."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tqdm
import transformers

from jaxmed.behaviour import responses
from jaxmed.behaviour.judges.protocol import Judge, Verdict
from jaxmed.behaviour.responses import PLAIN, Asked, Condition, Log, Response
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data.tokens import Encoder
from jaxmed.engine import memory
from jaxmed.files import reading
from models import checkpoint
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class AnsweringModel:
    """A model that answers.

    Attributes:
        folder: of its checkpoint.
        decoder: as `models.load` gives it.
        encoder: makes tokens of prompts and answers.
        stop: the tokens that end a response.
        memory_gb: all that a run may take on its device, as in `memory.free`.
        cache_dtype: type that keys and values are kept in, as `generation.generate` takes it.
        adapter: folder of what was merged into the checkpoint; None where nothing was.
        not_followed: what its generation_config.json asks for otherwise, as `not_followed` gives
            it.
    """

    folder: pathlib.Path
    decoder: Decoder
    encoder: Encoder
    stop: frozenset[int]
    memory_gb: float | None = None
    cache_dtype: str = ""
    not_followed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: pathlib.Path | None = None

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase | None:
        """The checkpoint's; None if it has none."""
        return self.encoder.tokenizer

    @property
    def budget(self) -> int:
        """Bytes that a run may take beside all that is loaded by now, the judges' weights too."""
        return memory.free(self.memory_gb)

    @functools.cached_property
    def weights_hash(self) -> str:
        """Of the checkpoint's files."""
        return checkpoint.weights_hash(self.folder)

    @functools.cached_property
    def config_hash(self) -> str:
        """Of what the checkpoint's config says."""
        return checkpoint.config_hash(self.decoder.config)

    @functools.cached_property
    def adapter_hash(self) -> str | None:
        """Of the adapter's files; None without one."""
        return checkpoint.adapter_hash(self.adapter)


GenerationConfigs = Sequence[tuple[pathlib.Path, Mapping[str, Any]]]


def generation_configs(folder: str | os.PathLike) -> GenerationConfigs:
    """The files of a checkpoint that say how it generates, and what they hold: its
    generation_config.json, and its config.json, as in older checkpoints.

    Raises:
        InputError: one holds no JSON object.
    """
    names = (checkpoint.GENERATION_CONFIG, "config.json")
    files = [pathlib.Path(folder) / name for name in names]
    return [(file, reading.object_in(file)) for file in files if file.is_file()]


def stop_tokens(
    configs: GenerationConfigs, tokenizer: transformers.PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """Tokens that end a checkpoint's responses.

    Those of its generation_config.json (which names the end of a turn, where a chat has one) and
    config.json, and the tokenizer's own end of sequence.

    Args:
        configs: the checkpoint's `generation_configs`.
        tokenizer: its tokenizer; None if it has none.

    Raises:
        InputError: what a file names are not token ids.
    """
    found: set[Any] = set()
    if tokenizer is not None:
        found.add(tokenizer.eos_token_id)
    for file, config in configs:
        named = config.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        if bad := [token for token in named if type(token) not in (int, type(None))]:
            raise InputError(f"{file}: eos_token_id is {bad[0]!r}, which is no token id")
        found.update(named)
    return frozenset(found - {None})


# What changes the text beside what `Sampling` has, and the values at which it changes nothing.
_TEXT_CHANGING: dict[str, tuple] = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_decoder_ids": (None, []),
    "forced_eos_token_id": (None, []),
    "guidance_scale": (None, 1),
    "length_penalty": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_p": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "remove_invalid_values": (None, False),
    "repetition_penalty": (None, 1),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, [], ""),
    "suppress_tokens": (None, []),
    "top_h": (None,),
    "typical_p": (None, 1),
    "watermarking_config": (None,),
}
_SAMPLED = ("temperature", "top_p", "top_k")
# Of beams, or of drawn tokens, alone.
_NEEDS = {"length_penalty": "num_beams", "diversity_penalty": "num_beams"}
_NEEDS_SAMPLING = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def not_followed(configs: GenerationConfigs, sampling: Sampling) -> dict[str, Any]:
    """What a checkpoint's files ask of generation, and the responses here do without.

    They may name penalties, forbidden tokens, or how tokens are drawn. Here text comes of the
    model's own logits, as the metrics do.

    Args:
        configs: the checkpoint's `generation_configs`.
        sampling: how tokens are chosen here.

    Returns:
        Values by name, of those that would make other text. How tokens are drawn makes none where
        they are not drawn, here or (`do_sample`) there.
    """
    asked: dict[str, Any] = {}
    for _, config in reversed(configs):
        asked |= config
    both_draw = sampling.temperature > 0 and bool(asked.get("do_sample"))
    found = {
        name: asked[name]
        for name, neutral in _TEXT_CHANGING.items()
        if asked.get(name) not in neutral
        and (name not in _NEEDS or asked.get(_NEEDS[name]) not in (None, 1))
        and (name not in _NEEDS_SAMPLING or both_draw)
    }
    if both_draw:
        found |= {
            name: asked[name]
            for name in _SAMPLED
            if asked.get(name) not in (None, getattr(sampling, name))
        }
    return found


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
                    cache_dtype=model.cache_dtype,
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
