"""Files that appear whole or not at all."""

import os
import pathlib
from collections.abc import Callable


def replace_file(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write(temporary path)` and moves the file into place, so that no half file is seen.

    Where writing fails nothing is left behind, and an earlier file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
