"""How the C library keeps memory that tensors give back."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**30


def keep_freed_memory() -> None:
    """Lets a process reuse what a training step has freed in the next one.

    By default glibc returns large blocks to the system at once, and each step then waits for the
    same pages to be handed out and zeroed again; changes no number. Other C libraries, which do not
    have the setting, are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MOST)
        mallopt(_M_MMAP_THRESHOLD, _MOST)
