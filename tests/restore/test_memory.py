"""Memory is bounded; a runtime that gets none is given smaller tiles."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from small_networks import facts

from helpers import photo
from sparkir.errors import SparkirError
from sparkir.restore import engine, memory
from sparkir.restore.engine import Engine
from sparkir.restore.memory import is_allocation_failure
from sparkir.restore.network import Restorer
from sparkir.restore.tiles import spans

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Greedy:
    """Fails on inputs of more than `limit` pixels, with a runtime's words."""

    def __init__(self, limit: int, error: Exception) -> None:
        self.limit, self.error = limit, error
        self.seen: list[int] = []

    def __call__(self, lq: np.ndarray) -> np.ndarray:
        self.seen.append(lq.shape[2] * lq.shape[3])
        if self.seen[-1] > self.limit:
            raise self.error
        return lq

    def restorer(self) -> Restorer:
        return Restorer(facts=facts(halo_px=4), run=self, label="greedy", identity="")


FAILURES = [
    MemoryError("no memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer"),
    RuntimeError("bad allocation"),
    RuntimeError("Exception from src/inference/x.cpp: std::bad_alloc"),
    RuntimeError("[CPU] Add node with name 'node_add_50' can't alloc"),
]


@pytest.mark.parametrize("error", FAILURES, ids=str)
def test_tiles_are_halved_until_they_fit_and_stay_so(error):
    assert is_allocation_failure(error)
    greedy = Greedy(60 * 60, error)
    restorer = Engine(greedy.restorer())
    pixels = photo(130, 170, 1)
    np.testing.assert_array_equal(restorer(pixels), pixels)
    assert len([count for count in greedy.seen if count > greedy.limit]) >= 2
    greedy.seen.clear()
    np.testing.assert_array_equal(restorer(pixels), pixels)
    assert max(greedy.seen) <= greedy.limit


def test_a_flat_picture_is_halved_along_its_length():
    greedy = Greedy(5000, MemoryError())
    pixels = photo(20, 900, 1)
    np.testing.assert_array_equal(Engine(greedy.restorer())(pixels), pixels)


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("shape mismatch"), SparkirError("x is not available")):
        assert not is_allocation_failure(error)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        Engine(Greedy(0, RuntimeError("shape mismatch")).restorer())(photo(50, 50, 0))


@pytest.mark.parametrize("size", [(300, 300), (9, 9)])
def test_when_not_even_the_smallest_tile_fits(size):
    with pytest.raises(SparkirError, match="not even memory for tiles of 40 px, the smallest"):
        Engine(Greedy(0, MemoryError()).restorer())(photo(*size, 0))


def test_the_bound_decides_the_tile(monkeypatch):
    """A network that takes exactly 1000 bytes a pixel."""
    greedy = Greedy(10**9, MemoryError())
    restorer = Engine(greedy.restorer(), memory_bytes=20_000_000)
    monkeypatch.setattr(restorer, "_measured", lambda: 1000.0)
    pixels = photo(400, 500, 1)
    np.testing.assert_array_equal(restorer(pixels), pixels)
    left = 20_000_000 - 2 * pixels.nbytes - 4 * 400 * 500
    assert 0.7 * left < 1000 * max(greedy.seen) <= left


def test_a_bound_that_is_too_small_says_what_is_needed(monkeypatch):
    for memory_bytes, says in ((10**6, "px and its result take"), (3 * 10**6, "smallest tiles")):
        restorer = Engine(Greedy(10**9, MemoryError()).restorer(), memory_bytes=memory_bytes)
        monkeypatch.setattr(restorer, "_measured", lambda: 1e5)
        with pytest.raises(SparkirError, match=rf"{says}.*--memory"):
            restorer(photo(400, 500, 1))


@linux
def test_a_peak_is_measured():
    """In a process of its own: this one may give memory back to the system meanwhile."""
    code = (
        "import numpy as np; from sparkir.restore.memory import peak_bytes_of;"
        "print(peak_bytes_of(lambda: np.ones(50_000_000, np.uint8)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if run.stdout.strip() == "None":
        pytest.skip("this system does not let a process reset its peak")
    assert 45e6 < int(run.stdout) < 60e6


def test_where_nothing_can_be_measured_a_guess_stands_in(monkeypatch):
    monkeypatch.setattr(engine, "peak_bytes_of", lambda work: None)
    greedy = Greedy(10**9, MemoryError())
    restorer = Engine(greedy.restorer(), memory_bytes=20_000_000)
    pixels = photo(400, 500, 1)
    np.testing.assert_array_equal(restorer(pixels), pixels)
    assert restorer.bytes_per_px == 64 * 4 * 6
    assert len(spans(400, restorer.tiling)) == 1  # the engine's own tiling is not narrowed


@linux
def test_the_default_is_half_of_what_is_free(tmp_path):
    free = (
        int(
            next(
                line
                for line in Path("/proc/meminfo").read_text().splitlines()
                if line.startswith("MemAvailable")
            ).split()[1]
        )
        * 1024
    )
    assert 0 < memory.default_bytes() <= 0.6 * free
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert list(memory._free_in_container(tmp_path)) == [700_000]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory._free_in_container(tmp_path)) == []


# A real runtime in a process of its own -------------------------------------------------------

IN_A_PROCESS = """
import resource, sys
from pathlib import Path
import numpy as np
from sparkir.restore.engine import Engine
from sparkir.restore.memory import _status
from sparkir.restore.network import open_exported

kind, model = sys.argv[1], Path(sys.argv[2])
restorer = open_exported(model, sys.argv[3])
pixels = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
if kind == "limited":
    engine = Engine(restorer, memory_bytes=10**12)
    engine.bytes_per_px = 1.0  # wrong: it will ask for everything in one piece
    limit = _status("VmSize") + 200_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
else:
    engine = Engine(restorer, memory_bytes=int(kind))
before = _status("VmRSS")
parts = []
made = engine(pixels, lambda done, total: parts.append((done, total)))
after = _status("VmHWM")
np.save(sys.argv[4], made)
print(engine.tiling.side, parts[-1][1], after - before)
"""


def in_a_process(*arguments: object) -> tuple[int, int, int]:
    """The engine's tile, the number of tiles, and the bytes by which the process grew."""
    command = [sys.executable, "-c", textwrap.dedent(IN_A_PROCESS), *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    side, parts, grown = map(int, said.stdout.split())
    return side, parts, grown


@linux
@pytest.mark.parametrize(
    "runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)]
)
def test_a_runtime_that_is_refused_memory_goes_on_with_smaller_tiles(
    tmp_path, model_file, restorer, runtime
):
    pytest.importorskip(runtime)
    path = model_file("edsr", "integer")
    side, parts, _ = in_a_process("limited", path, runtime, tmp_path / "made.npy")
    assert side < 1024
    assert parts > 1
    _, whole, _ = in_a_process(4 * 10**9, path, runtime, tmp_path / "whole.npy")
    assert whole == 1
    made, expected = (np.load(tmp_path / name) for name in ("made.npy", "whole.npy"))
    assert np.abs(made.astype(int) - expected).max() <= 1


@linux
@pytest.mark.parametrize("bound", [150_000_000, 300_000_000])
def test_a_process_grows_by_no_more_than_its_bound(tmp_path, model_file, bound):
    path = model_file("edsr", "integer")
    _, parts, grown = in_a_process(bound, path, "onnxruntime", tmp_path / "made.npy")
    assert parts > 1
    assert grown < bound
