"""What every program shares: how it starts, where it keeps what it compiles, and how it ends."""

import enum
import errno
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
from absl import app, flags

from jaxmed.runs import compilation, devices, loading, sweep
from models import cache
from models.errors import InputError

Settings = TypeVar("Settings")

# The flag belongs to the program that starts, whose --help then shows it.
flags.disclaim_key_flags()

# What is wrong with the place that is written to, not with the program.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_KEPT = "What was finished is kept: the same command goes on."


class Exit(enum.IntEnum):
    """Exit status of every program."""

    DONE = 0
    ERROR = 1  # bad input, nothing can be written, or a defect of the program
    UNITS_FAILED = 2  # all else is done
    UNITS_MISSING = 3  # stopped by SIGTERM; the same command goes on
    INTERRUPTED = 130


def start(
    settings: Callable[[], Settings],
    run: Callable[[Settings], Iterable[str] | None],
    *,
    computes: bool = True,
) -> None:
    """Parses the flags, says which device is used, runs what the flags ask for, prints the lines
    that it ends with, and exits as `Exit` has it.

    Input that cannot be used, and a disk that is full, end the program with one message; a defect
    of the program itself shows its traceback.

    Args:
        settings: what `flags.of` returns.
        run: is given the settings, and returns the lines, unless it has said all by then.
        computes: whether it needs a device; one that does not leaves them to others.
    """
    compiled = flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder that keeps compiled programs, so that the next run need not compile them; empty "
        "for none. By default jaxmed/compiled in $XDG_CACHE_HOME or in ~/.cache, or the folder "
        "that $JAX_COMPILATION_CACHE_DIR names.",
    )

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            sys.exit(f"Error: flags only, as --name=value; not {' '.join(arguments[1:])}")
        # JAX reports every kind of device that it looked for and did not find.
        logging.getLogger("jax").setLevel(logging.WARNING)
        keep_compiled(compiled.value)
        try:
            with sweep.terminable():
                asked = settings()
                # The mesh of a program that loads no model is of other devices.
                mesh = asked.mesh if isinstance(asked, loading.Settled) else ""
                for line in devices.told(mesh) if computes else ():
                    print(line, file=sys.stderr)
                for line in run(asked) or ():
                    print(line)
            if told := compilation.so_far().told:
                print(told, file=sys.stderr)
        except InputError as error:
            sys.exit(f"Error: {error}")
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            sys.exit(f"Error: {error.filename or 'files'}: cannot be written ({error.strerror})")
        except sweep.UnitsFailedError as error:
            print(error, file=sys.stderr)
            sys.exit(Exit.UNITS_FAILED)
        except sweep.Terminated:
            end_at_once(f"Ended by SIGTERM. {_KEPT}", Exit.UNITS_MISSING)
        except KeyboardInterrupt:
            end_at_once(f"Stopped. {_KEPT}", Exit.INTERRUPTED)

    app.run(guarded)


def end_at_once(message: str, status: Exit) -> None:
    """Ends the process with a message, without the interpreter's own end: that would take back
    memory which a device may still compute in, and be killed for it with another status."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def keep_compiled(asked: str | None) -> None:
    """Has JAX keep compiled programs in a folder, by the program, the devices and the versions that
    they are of: what is computed does not depend on it. A folder that cannot be written to is told
    and not used.

    Args:
        asked: the folder; "" for none, None for the one that the environment names, else jaxmed's.
    """
    if asked is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # JAX has read it
    if asked == "":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    asked = os.path.expanduser(asked or cache.default_folder() / "compiled")
    folder = pathlib.Path(asked)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(
            f"Compiled programs are not kept: {folder} cannot be written to ({error.strerror}); "
            "--compilation_cache=DIR names another folder",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: a run has hundreds of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
