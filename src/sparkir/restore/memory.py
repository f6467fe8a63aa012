"""How much memory there is, how much a computation took, and whether it failed for want of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from sparkir.errors import SparkirError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SHARE = 0.5  # of what is free; the rest is for whatever else happens meanwhile
_UNKNOWN = 2 * 10**9  # free bytes, where the system does not say
# What ONNX Runtime, OpenVINO, torch and the C++ library say.
_NO_MEMORY = re.compile(
    r"bad[_ ]?alloc|out of memory|not enough memory"
    r"|(fail(ed|ure)?|cannot|can't|could not|unable|not able) (to )?alloc(ate)?\b",
    re.IGNORECASE,
)


def parse_bytes(text: str) -> int:
    """The bytes in a size such as `2GB`, `1.5 GiB` or `800M`.

    Raises:
        SparkirError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not found or (found[3] and not found[2]) or float(found[1]) <= 0:
        raise SparkirError(f"{text!r} is no amount of memory; write it as in 2GB or 800MB")
    units = _BINARY_UNITS if found[3] else _UNITS
    return int(float(found[1]) * units[found[2].lower()])


def default_bytes() -> int:
    """Half of what this process could still get."""
    return int(_SHARE * max(0, min(_free(), default=_UNKNOWN)))


def shown_bytes(count: float) -> str:
    """A size for messages, such as `1.2 GB`."""
    unit = "GB" if count >= 10**9 else "MB"
    return f"{count / (10**9 if unit == 'GB' else 10**6):.1f} {unit}"


def is_allocation_failure(error: BaseException) -> bool:
    """Whether a runtime failed because it got no memory; each says so in its own words."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def peak_bytes_of(work: Callable[[], object]) -> int | None:
    """Do `work` and return by how much the process grew at its peak; None if nobody can say."""
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the old peak
    except OSError:
        before = None
    work()
    after = _status("VmHWM")
    return None if before is None or after is None else max(0, after - before)


def _free() -> Iterator[int]:
    """Every limit that is known."""
    if (available := _field(Path("/proc/meminfo"), "MemAvailable")) is not None:
        yield available
    else:
        with suppress(OSError, ValueError, AttributeError):
            yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield from _free_in_container()
    with suppress(ImportError, OSError):
        import resource

        limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], _status("VmSize")
        if limit != resource.RLIM_INFINITY and used is not None:
            yield limit - used


def _free_in_container(group: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no such group, or the limit is "max"
        limit = int((group / "memory.max").read_text("ascii"))
        used = int((group / "memory.current").read_text("ascii"))
        statistics = dict(
            line.split() for line in (group / "memory.stat").read_text("ascii").splitlines()
        )
        yield limit - used + int(statistics.get("inactive_file", 0))  # a cache it gives back


def _status(field: str) -> int | None:
    return _field(Path("/proc/self/status"), field)


def _field(file: Path, field: str) -> int | None:
    """The bytes of a line such as `VmRSS:  1234 kB`."""
    with suppress(OSError, ValueError, IndexError):
        for line in file.read_text("ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return None
