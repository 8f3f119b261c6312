"""What is raised when the user's input cannot be used."""

import contextlib
import re
from collections.abc import Iterator


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message names the file and line, the tensor, the attribute or the flag, and the way out:
    programs print it alone, without a traceback. It is one line, though a library whose message it
    quotes may have written several.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(r"\s*\n\s*", " ", message.strip()))


@contextlib.contextmanager
def failures_as(kind: type[InputError], what: str) -> Iterator[None]:
    """Makes an error of a library that reads the user's files one that says what failed.

    A panic of a library in Rust is no `Exception` in Python, and is an error all the same.

    Args:
        kind: what is raised; errors that say enough, `InputError`, go through.
        what: the beginning of the message.

    Raises:
        InputError: of that kind.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{what}: {' '.join(str(error).split())}") from error
        raise
