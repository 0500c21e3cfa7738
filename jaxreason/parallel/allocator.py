"""The C library's allocator, told to keep the memory that every step needs again."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Freed memory stays with the process instead of going back to the system; True where it took.

    On CPU, XLA allocates a program's temporaries at every call. Glibc maps an allocation that large
    and unmaps it when freed, so every page is faulted in and zeroed at every step, by one thread: a
    third of the CPU time and half of the wall time of the quickstart's train step. In one heap that
    is never trimmed they stay mapped. The process then holds up to twice its largest memory
    (docs/benchmarks.md, "Tried"); the room that the heap grows by is address space until touched.

    Call it before JAX touches its first device: a thread that has an arena of its own keeps it.
    Nothing happens on other systems and with other C libraries.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**30, _ARENA_MAX: 1}
    taken = [libc.mallopt(option, value) == 1 for option, value in settings.items()]
    return all(taken)
