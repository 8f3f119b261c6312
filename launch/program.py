"""What every program shares: how it starts, and how it fails."""

import logging
import sys
from collections.abc import Callable

from absl import app

from models.errors import InputError


def start(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`.

    Input that cannot be used ends the program with one message and exit status 1; a defect of the
    program itself shows its traceback.
    """

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            sys.exit(f"Error: flags only, as --name=value; not {' '.join(arguments[1:])}")
        # JAX reports every kind of device that it looked for and did not find.
        logging.getLogger("jax").setLevel(logging.WARNING)
        try:
            main()
        except InputError as error:
            sys.exit(f"Error: {error}")
        except KeyboardInterrupt:
            print("Stopped. What was finished is kept: the same command goes on.", file=sys.stderr)
            sys.exit(130)

    app.run(guarded)
