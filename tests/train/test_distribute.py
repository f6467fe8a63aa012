"""Two processes on the CPU against one, for the same batches."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from several import KINDS, STEPS, STOPPED, made, stopped

from sparkir.errors import SparkirError
from sparkir.spark.batch import averaged, normal, of_all
from sparkir.train.distribute import Devices, start

needs_fabric = pytest.mark.skipif(
    find_spec("lightning_fabric") is None, reason="needs lightning-fabric, of sparkir[distributed]"
)
RELATIVE = 2e-4
LOGGED = ("loss", "reconstruction", "distillation", "gradient_norm", "mean_weight")
LEARNED = ("reward_deviation", "advantage_max", "log_probability", "entropy", "sigma")
LEARNED += ("gain", "divergence", "trust", "correlation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """Every kind of run by one process: its events; and a checkpoint from the middle."""
    events = {kind: made(folder / kind / "one", kind).train().events for kind in KINDS}
    for kind in KINDS:
        stopped(made(folder / kind / "one-half", kind), asks=True)
    return events


@pytest.fixture(scope="module")
def two(folder: Path, alone: dict[str, Any]) -> dict[str, Any]:
    """The same by two processes; see `several.py`."""
    script = Path(__file__).with_name("several.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["kind"] == kind]


def assert_close(found: list[dict], expected: list[dict], *, after: int = 0) -> None:
    """The same steps, with the same figures within what float32 sums in another order differ by."""
    for kind, first, names in (("step", after + 1, LOGGED), ("policy", after, LEARNED)):
        right = [event for event in of_kind(expected, kind) if event["step"] >= first]
        left = of_kind(found, kind)
        assert [event["step"] for event in left] == [event["step"] for event in right]
        for a, b in zip(left, right, strict=True):
            figures = [{name: e[name] for name in names if name in e} for e in (a, b)]
            assert figures[0] == pytest.approx(figures[1], rel=RELATIVE, abs=1e-6)


@needs_fabric
@pytest.mark.parametrize("kind", KINDS)
class TestTwoProcesses:
    def test_same_losses_as_alone(self, two, alone, kind):
        assert len(of_kind(two[kind]["events"], "step")) == STEPS
        assert_close(two[kind]["events"], alone[kind])

    def test_weights_statistics_and_generators_are_alike(self, two, kind):
        assert two[kind]["alike"] == [True, True, True]

    def test_all_stop_when_one_is_asked_to(self, two, kind):
        assert two[kind]["stopped"] == STOPPED

    def test_two_go_on_where_one_stopped(self, two, alone, kind):
        assert_close(two[kind]["resumed"], alone[kind], after=STOPPED)

    def test_one_goes_on_where_two_stopped(self, two, alone, folder, kind):
        run = made(folder / kind / "two-half", kind, seed=99).resume()
        assert run.state.step == STOPPED
        assert_close(run.train().events, alone[kind], after=STOPPED)


@needs_fabric
def test_an_error_anywhere_ends_all_and_is_said_once(two):
    both, first, other = zip(*two["errors"], strict=True)
    assert both == ("SparkirError('mistake 0')", "SystemExit(1)")
    assert first == ("SparkirError('mistake 0')", "SystemExit(1)")
    assert other == ("SparkirError('process 1 of 2: mistake 1')", "SystemExit(1)")


@needs_fabric
def test_two_draw_what_one_draws(two):
    torch.manual_seed(3)
    assert two["normal"] == torch.randn(4, 3).tolist()


class TestAlone:
    def test_agrees_with_itself(self):
        devices, x = Devices(), torch.ones(2)
        assert devices.first
        assert averaged([x, None]) == [x, None]
        assert devices.mean(x).equal(x)
        assert devices.any(True)
        assert not devices.any(False)
        assert devices.gather("a") == ["a"]
        assert devices.broadcast("a") == "a"
        assert isinstance(devices.alike(SparkirError("x")), SparkirError)
        with pytest.raises(SparkirError, match="mine"), devices.in_turn():
            raise SparkirError("mine")

    def test_draws_and_gathers_its_own(self):
        torch.manual_seed(3)
        drawn = normal((2, 3), device=torch.device("cpu"))
        torch.manual_seed(3)
        assert drawn.equal(torch.randn(2, 3))
        assert of_all(drawn).equal(drawn)

    @pytest.mark.parametrize(
        ("ranks", "batch", "near"),
        [(1, 5, ""), (4, 16, ""), (3, 16, "15 or 18"), (8, 5, "8"), (2, 1, "2")],
    )
    def test_shares(self, ranks, batch, near):
        devices = Devices()
        devices.ranks = ranks
        if not near:
            return devices.require_shares(batch)
        with pytest.raises(SparkirError) as refused:
            devices.require_shares(batch)
        assert str(refused.value) == (
            f"data.batch = {batch} cannot be shared equally by {ranks} processes; "
            f"set it to {near}, or start another number of processes"
        )
        return None


class TestStart:
    def test_alone(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert type(start("auto")) is Devices
        monkeypatch.setenv("WORLD_SIZE", "2")  # some cluster's, without torchrun
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        assert type(start("auto")) is Devices

    @pytest.fixture
    def launched(self, monkeypatch) -> None:
        """As torchrun starts the first of two processes."""
        told = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for name, value in (told | {"TORCHELASTIC_RUN_ID": "x"}).items():
            monkeypatch.setenv(name, value)

    def test_without_lightning_fabric(self, monkeypatch, launched):
        monkeypatch.setitem(sys.modules, "lightning_fabric", None)
        with pytest.raises(SparkirError, match=r"started 2 .*pip install 'sparkir\[distributed\]'"):
            start("auto")

    @needs_fabric
    def test_fewer_gpus_than_processes(self, monkeypatch, launched):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(SparkirError, match=r"2 processes .* 1 GPUs; .*--nproc_per_node 1"):
            start("auto")

    @needs_fabric
    def test_machines_with_unequal_numbers(self, monkeypatch, launched):
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(SparkirError, match="2 of 3 processes on this machine"):
            start("cpu")
