"""What the C library does with the memory of tensors that are gone."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # in malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors on the CPU for the next ones, in all of the process.

    glibc would give large blocks back and take them anew, page by zeroed page, which lasts longer than most of what is
    then done in them: four times as long as a group norm in the decoder, and a quarter of a training step. Other
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
