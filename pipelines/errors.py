"""What a person at a terminal reads: one line for a fault, one line for a notice, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

FAULT = 2  # the exit code of every error that the user can mend
INTERRUPTED = 130


def one_line(error: BaseException) -> str:
    """The error's message on one line; for an OSError, the file and what the system says about it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def notice(text: str) -> None:
    """Writes one line for the user on stderr; stdout belongs to paths and JSON."""
    print(f"notice: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the user's errors into `error: ...` on stderr and exit code 2, an interruption into exit code 130.

    Everything else is a defect of the program and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        text = one_line(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        text = "out of memory; make fewer or smaller pictures at once"
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    else:
        return
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(FAULT)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch raises a plain RuntimeError on the CPU; its own class for accelerators must not be imported here
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
