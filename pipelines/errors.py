"""What a person at a terminal reads: one line for a fault, one line for a notice, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from safetensors import SafetensorError

FAULT = 2  # the exit code of every error that the user can mend
INTERRUPTED = 130
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a primitive",  # so oneDNN says it
    "could not create a memory",
)


def one_line(error: BaseException) -> str:
    """The error's message on one line; for an OSError, the file and what the system says about it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


_given: ContextVar[set[str] | None] = ContextVar("given", default=None)
"""The notices that the command has given; None outside of one."""


def notice(text: str) -> None:
    """Writes one line for the user on stderr, which a command says only once; stdout belongs to paths and JSON."""
    line, given = " ".join(text.split()), _given.get()
    if given is not None:
        if line in given:
            return
        given.add(line)
    print(f"notice: {line}", file=sys.stderr)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the user's errors into `error: ...` on stderr and exit code 2, an interruption into exit code 130.

    Everything else is a defect of the program and keeps its traceback.
    """
    outer = _given.set(set())
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        text = one_line(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = "out of memory; make fewer or smaller pictures at once"
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    else:
        return
    finally:
        _given.reset(outer)
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(FAULT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or on an accelerator."""
    # torch raises a plain RuntimeError on the CPU; its own class for accelerators must not be imported here
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in str(error) for sign in OUT_OF_MEMORY)
    )
