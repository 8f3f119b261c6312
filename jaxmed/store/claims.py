"""`run.json`: which run a folder belongs to, and whether another may go on with it."""

import json
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxmed.files import places
from jaxmed.files.places import Place
from models.errors import InputError

# Keys of a run that say where and when it ran, not what was asked; a resumed run may change them.
CIRCUMSTANCES = (
    "command",
    "device",
    "memory_gb",
    "mesh",
    "out",
    "overwrite",
    "process",
    "processes",
    "retry_failed",
    "seconds",
    "show_text",
    "started",
    "versions",
)

# Keys of a run that are no flags, but follow from them and from what their files hold; and what a
# person would call it.
_FOLLOWING = {
    "adapter_hash": "adapter (what --adapter holds)",
    "chosen": "units (those that --results ranks highest)",
    "config_hash": "config (config.json in --model)",
    "directions_hash": "directions (what --directions holds)",
    "generation_not_followed": "generation_config.json in --model",
    "granularities": "granularities",
    "judge_text_and_weights": "judge (its text, weights or config)",
    "meaning": "meaning of what is measured",
    "metric_unit": "unit of the metric",
    "pair_bases": "pairs (what --pairs holds)",
    "pair_ids": "pairs (what --pairs holds)",
    "pairs_hash": "pairs (what --pairs holds)",
    "precision": "precision",
    "prompt_hashes": "pairs (what --pairs holds)",
    "prompts_hash": "prompts (what --prompts hold)",
    "scouts": "pairs (what --pairs holds)",
    "seeds": "seeds",
    "sizes": "sizes (of model, pairs and directions)",
    "skipped": "number of pairs that were left out",
    "sources_hash": "counterfactuals (what --prompts hold)",
    "truth": "planted truth",
    "weights_hash": "weights (what --model holds)",
}

RUN_FILE = "run.json"


def claim(
    folder: str | os.PathLike,
    run: dict,
    own_files: Sequence[str],
    overwrite: bool = False,
    may_change: Collection[str] = (),
) -> dict:
    """Takes a folder for a run that is no sweep: starts it, or goes on with one of the same
    settings.

    Args:
        folder: made if it is not there.
        run: what `run.json` is to say; "program" names the kind of run.
        own_files: what such a run writes beside `run.json`; `overwrite` deletes that and no more.
        overwrite: start again.
        may_change: settings that a run which goes on may have otherwise, since what was written
            under them is as good under others.

    Returns:
        The content of `run.json`.

    Raises:
        InputError: the folder cannot be made, holds a run with another setting, or files but no
            run.
    """
    place, run = places.at(folder), plain(run)
    place.make()
    check_kind(place, run["program"])
    if place.create(RUN_FILE, encoded(run)):
        return run
    if overwrite:
        for name in own_files:
            place.delete(name)
        place.write(RUN_FILE, encoded(run))
        return run

    def going_on(earlier: dict) -> dict:
        check_same_settings(place, earlier, run, (*CIRCUMSTANCES, *may_change))
        return earlier | {name: run[name] for name in may_change}

    return change(place, going_on)


def check_kind(folder: str | os.PathLike | Place, program: str) -> None:
    """Raises `InputError` where a folder holds files of something else than a run of this program,
    which no setting could go on with or replace."""
    place = places.at(folder)
    if place.is_empty():
        return
    run = read_run(place)
    if run is None:
        raise InputError(f"{place} holds files of something else: choose another folder")
    if run.get("program") != program:
        raise InputError(f"{place} holds another kind of run: choose another folder")


def recorded(folder: str | os.PathLike, key: str) -> Any:
    """What the `run.json` of a folder says of a key; None if there is none, or it says nothing.

    Raises:
        InputError: the file is damaged.
    """
    run = read_run(places.at(folder))
    return None if run is None else run.get(key)


def check_same_settings(
    folder: Place, earlier: dict, wanted: dict, ignored: Collection[str]
) -> None:
    """Raises `InputError` where a run is asked for otherwise than the folder's, and says in what.

    Args:
        folder: for the message.
        earlier, wanted: what the folder's `run.json` says, and what is asked now.
        ignored: the keys that may differ.
    """
    changed = [
        key
        for key in dict.fromkeys((*wanted, *earlier))
        if key not in ignored and earlier.get(key) != wanted.get(key)
    ]
    if not changed:
        return
    flags = [key for key in changed if key not in _FOLLOWING]
    if flags:
        told = "; ".join(
            f"--{key} was {_shortened(earlier.get(key))}, is now {_shortened(wanted.get(key))}"
            for key in flags
        )
        raise InputError(
            f"{folder} holds a run with other settings: {told}: give them as they were, or choose "
            "another --out, or --overwrite"
        )
    told = ", ".join(dict.fromkeys(_FOLLOWING[key] for key in changed))
    raise InputError(
        f"{folder} holds a run of the same settings, but not of the same {told}: choose another "
        "--out, or --overwrite"
    )


def read_run(place: Place) -> dict | None:
    """What `run.json` holds; None if there is none.

    Raises:
        InputError: it is damaged, or holds something else.
    """
    return _decoded(place, place.read(RUN_FILE))


def change(place: Place, changed: Callable[[dict], dict]) -> dict:
    """Replaces `run.json` by what a function makes of its content, and loses nothing that others
    write there at the same time: the function is called again on what another has written.

    Returns:
        The new content.

    Raises:
        InputError: it is damaged, or there is none any more.
    """
    while True:
        content, generation = place.look(RUN_FILE)
        earlier = _decoded(place, content)
        if earlier is None:
            raise places.gone(place, RUN_FILE)
        run = changed(earlier)
        if run == earlier or place.replace(RUN_FILE, encoded(run), generation):
            return run


def encoded(run: dict) -> bytes:
    """`run.json` of this content."""
    return (json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _decoded(place: Place, content: bytes | None) -> dict | None:
    if content is None:
        return None
    path = place.path(RUN_FILE)
    try:
        run = json.loads(content.decode())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): choose another folder") from error
    if not isinstance(run, dict):
        raise InputError(f"{path} was not written by a run of jaxmed: choose another folder")
    return run


def plain(value: Any) -> Any:
    """The value as strict JSON would give it back: no tuples, no numpy; null for NaN."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _shortened(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
