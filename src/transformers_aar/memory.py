"""How programs on a CPU keep their memory."""

import ctypes
import os
import sys

# M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# what of the environment decides the same
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """
    Makes the C library keep what is freed for what is allocated next. By default glibc hands large blocks back, so
    that the system fills the next ones with zeros again, page by page: in a codec on a CPU, whose activations are
    large, this takes up to two fifths of the time. What is free in between stays with the process, and in pieces that
    don't always fit, so that it may hold more than it needs at the peak.

    A decision about the whole process, so that programs take it and not the models. Does nothing where there is no
    glibc, and where the environment has decided (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`,
    `MALLOC_MMAP_MAX_` or `GLIBC_TUNABLES`).
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _ENVIRONMENT):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_MAX, 0)
        set_option(_TRIM_THRESHOLD, -1)  # the largest, since it is taken for unsigned
