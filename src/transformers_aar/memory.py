"""How programs on a CPU keep their memory."""

import ctypes
import os
import sys

# of mallopt(3), where numbers are plain integers
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """
    Makes the C library keep what is freed for what is allocated next. By default glibc hands large blocks back, so
    that the system fills the next ones with zeros again, page by page: in a codec on a CPU, whose activations are
    large, this takes up to two fifths of the time. The memory at the peak stays nearly the same; what is free in
    between stays with the process.

    A decision about the whole process, so that programs take it and not the models. Does nothing where there is no
    glibc, and where `MALLOC_…_` or `GLIBC_TUNABLES` in the environment say that the user has decided.
    """
    if not sys.platform.startswith("linux"):
        return
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST)
        set_option(_TRIM_THRESHOLD, _LARGEST)
