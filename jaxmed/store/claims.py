"""`run.json`: which run a folder belongs to, and whether another may go on with it."""

import json
import os
import pathlib
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from jaxmed.files import atomic
from models.errors import InputError

# Keys of a run that say where and when it ran, not what was asked; a resumed run may change them.
CIRCUMSTANCES = (
    "command",
    "device",
    "memory_gb",
    "mesh",
    "out",
    "overwrite",
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
    "directions_hash": "directions (what --directions holds)",
    "generation_not_followed": "generation_config.json in --model",
    "granularities": "granularities",
    "judge_text_and_weights": "judge (its text or weights)",
    "meaning": "meaning of what is measured",
    "metric_unit": "unit of the metric",
    "pair_bases": "pairs (what --pairs holds)",
    "pair_ids": "pairs (what --pairs holds)",
    "pairs_hash": "pairs (what --pairs holds)",
    "precision": "precision",
    "prompt_hashes": "pairs (what --pairs holds)",
    "prompts_hash": "prompts (what --prompts hold)",
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
    folder, run = pathlib.Path(folder), plain(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from error
    check_kind(folder, run["program"])
    if not (folder / RUN_FILE).exists():
        write_run(folder, run)
        return run
    earlier = read_object(folder / RUN_FILE)
    if overwrite:
        for name in own_files:
            delete(folder / name)
        write_run(folder, run)
        return run
    check_same_settings(folder, earlier, run, (*CIRCUMSTANCES, *may_change))
    current = earlier | {name: run[name] for name in may_change}
    if current != earlier:
        write_run(folder, current)
    return current


def check_kind(folder: str | os.PathLike, program: str) -> None:
    """Raises `InputError` where a folder holds files of something else than a run of this program,
    which no setting could go on with or replace."""
    folder = pathlib.Path(folder)
    if (folder / RUN_FILE).exists():
        if read_object(folder / RUN_FILE).get("program") != program:
            raise InputError(f"{folder} holds another kind of run: choose another folder")
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} holds files of something else: choose another folder")


def recorded(folder: str | os.PathLike, key: str) -> Any:
    """What the `run.json` of a folder says of a key; None if there is none, or it says nothing.

    Raises:
        InputError: the file is damaged.
    """
    path = pathlib.Path(folder) / RUN_FILE
    return read_object(path).get(key) if path.is_file() else None


def check_same_settings(
    folder: pathlib.Path, earlier: dict, wanted: dict, ignored: Collection[str]
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


def read_object(path: pathlib.Path) -> dict:
    """The JSON object that a file holds; `InputError` if it is damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): choose another folder") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} was not written by a run of jaxmed: choose another folder")
    return content


def write_run(folder: pathlib.Path, run: dict) -> None:
    """Writes `run.json`, whole or not at all."""
    text = json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic.replace_file(folder / RUN_FILE, lambda path: path.write_text(text, encoding="utf-8"))


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


def delete(path: pathlib.Path) -> None:
    """Deletes a file, a folder with all that is in it, or nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
