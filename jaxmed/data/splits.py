"""Splits: which prompts choose, and which confirm; the same prompt is always in the same one."""

import hashlib
import json

from jaxmed.files.reading import DataError

SPLITS = ("A", "B", "C")


def split_of(given: str | None, key: str, where: str) -> str:
    """The split that a file gives, or else a hash of the key, so that it never moves.

    Raises:
        DataError: what the file gives is no split.
    """
    if given is None:
        return SPLITS[hashlib.sha256(key.encode()).digest()[0] % len(SPLITS)]
    if given not in SPLITS:
        raise DataError(f"{where}: split is '{given}', not one of {', '.join(SPLITS)}")
    return given


def normalised(text: str) -> str:
    """The text without what does not make another prompt of it: white space and letter case."""
    return " ".join(text.split()).casefold()


def fingerprints(text: str | None, tokens: tuple[int, ...]) -> set[str]:
    """Hashes that two prompts share if they are the same, whatever their ids: that of the tokens,
    and that of what `as_text` shows, but for white space and letter case."""
    contents = [list(tokens)] + ([] if text is None else [normalised(text)])
    return {hashlib.sha256(json.dumps(one).encode()).hexdigest()[:32] for one in contents}
