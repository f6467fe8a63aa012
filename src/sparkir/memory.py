"""How a process gets its memory, where training and evaluation spend up to half of their time.

Every step takes the same large tensors again, and every image. glibc gives what is freed back to
the system, which clears and maps it anew page by page when it is next taken.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_KEPT_BYTES = 2**25
"""glibc takes no larger threshold than this on machines of 64 bits."""
_NEVER = 2**31 - 1
_OWN_WORD = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, and take what is large in large pages.

    Values are the same bits. Has effect with glibc only; large pages, which torch asks for if its
    environment says so before its first tensor is made, on Linux. What the environment says about
    either is left as it is.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    told = _OWN_WORD & os.environ.keys() or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is None or told:
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
