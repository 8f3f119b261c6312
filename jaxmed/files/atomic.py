"""Files that appear whole or not at all."""

import os
import pathlib


def replace_file(path: pathlib.Path, write) -> None:
    """Calls `write(temporary path)` and moves the file into place, so that no half file is seen."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
