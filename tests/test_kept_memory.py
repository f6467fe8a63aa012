"""Memory that a process keeps, in processes of their own: what is set cannot be taken back."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import ctypes, sys
from sparkir.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import resource, torch
size = int(sys.argv[2]) << 20
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def tensors():
    return [torch.ones(size // 4) for _ in range(4)]
def plain():
    taken = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size))) for _ in range(4)]
    for block in taken:
        ctypes.memset(block, 1, size)
    for block in reversed(taken):
        libc.free(block)
use = {"tensors": tensors, "plain": plain}[sys.argv[3]]
use(), use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (5 * 4 * size / 4096))
"""

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MODE = LARGE_PAGES.read_text("ascii") if LARGE_PAGES.is_file() else ""

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
        reason="needs glibc's malloc",
    ),
    pytest.mark.skipif("[always]" in MODE, reason="all memory is in large pages here"),
]


def share_of_pages_mapped(what: str, mib: int, *, kept: bool, **environment: str) -> float:
    """Of blocks of so many MiB, four at once, taken and freed again and again."""
    own = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    how = "kept" if kept else "as it is"
    command = [sys.executable, "-c", FAULTS, how, str(mib), what]
    done = subprocess.run(
        command, env=own | environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout)


def test_memory_that_was_freed_is_not_mapped_again():
    assert share_of_pages_mapped("plain", 28, kept=False) > 0.5
    assert share_of_pages_mapped("plain", 28, kept=True) < 0.1


@pytest.mark.skipif("[madvise]" not in MODE, reason="large pages cannot be asked for here")
def test_what_is_too_large_to_be_kept_is_mapped_in_large_pages():
    assert share_of_pages_mapped("tensors", 40, kept=False) > 0.5
    assert share_of_pages_mapped("tensors", 40, kept=True) < 0.1


def test_what_the_environment_says_about_memory_is_left():
    says = {"MALLOC_TRIM_THRESHOLD_": "131072", "THP_MEM_ALLOC_ENABLE": "0"}
    assert share_of_pages_mapped("plain", 28, kept=True, **says) > 0.5
    assert share_of_pages_mapped("tensors", 40, kept=True, **says) > 0.5
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}
    assert share_of_pages_mapped("plain", 28, kept=True, **tunables) > 0.5
    assert share_of_pages_mapped("plain", 28, kept=True, MALLOC_ARENA_MAX="2") < 0.1
