import errno
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from small_run import assert_same, small_run

from sparkir.errors import SparkirError
from sparkir.train import state as state_module

FULL = {"source": "spark-paper", "bits": 4, "ema": 0.9, "options": {"reward_every": 2}}


@pytest.fixture
def trained(tmp_path):
    run = small_run(tmp_path, **FULL, steps=4)
    run.train()
    return run


def test_round_trip_into_a_run_that_started_otherwise(trained):
    """Nothing is left of the other run's own weights, grids, draws or place in the data."""
    trained.state.save(trained.checkpoint)
    saved = trained.state.state_dict()
    other = small_run(trained.checkpoint.parent, **FULL, steps=4, seed=99)
    assert not torch.equal(
        torch.cat([p.flatten() for p in other.state.student.parameters()]),
        torch.cat([p.flatten() for p in trained.state.student.parameters()]),
    )
    random.random(), np.random.rand(), torch.rand(1)
    other.resume()
    assert_same(other.state.state_dict(), saved)
    assert other.state.step == 4

    lq = torch.rand(1, 3, 12, 12) * 255  # what the grids keep outside of tensors came along
    for mode in (True, False):
        networks = [run.state.student.train(mode) for run in (trained, other)]
        assert torch.equal(*(network(lq) for network in networks))
        averages = [run.state.average.module.train(mode) for run in (trained, other)]
        assert torch.equal(*(network(lq) for network in averages))


def test_all_generators_go_on_where_they_were(trained):
    def draws():
        return [random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()]

    random.gauss(0, 1), np.random.standard_normal()  # each keeps a second value for later
    trained.state.save(trained.checkpoint)
    expected = draws(), np.random.standard_normal(), random.gauss(0, 1)
    trained.state.load(trained.checkpoint)
    assert (draws(), np.random.standard_normal(), random.gauss(0, 1)) == expected


def test_file_holds_nothing_but_tensors_and_plain_values(trained):
    torch.load(trained.checkpoint, weights_only=True)


def test_checkpoint_from_before_there_were_methods(trained):
    saved = torch.load(trained.checkpoint, weights_only=True)
    assert saved.pop("method") == {}
    torch.save(saved, trained.checkpoint)
    trained.resume()


def test_teacher_is_not_saved(trained):
    values = torch.load(trained.checkpoint, weights_only=True)
    assert not any("teacher" in key for key in values["student"])
    names = dict(trained.task.named_parameters())
    assert not any("teacher" in name for name in names)


class TestDamaged:
    @pytest.mark.parametrize("kind", ["empty", "text", "half", "without end"])
    def test_file(self, trained, kind):
        content = trained.checkpoint.read_bytes()
        damaged = {
            "empty": b"",
            "text": b"no checkpoint\n" * 100,
            "half": content[: len(content) // 2],
            "without end": content[:-20],
        }[kind]
        trained.checkpoint.write_bytes(damaged)
        with pytest.raises(SparkirError, match=r"cannot read .*last\.pt.*delete it") as caught:
            trained.state.load(trained.checkpoint)
        assert "weights_only" not in str(caught.value)  # torch advises to run whatever is in it

    def test_missing(self, trained, tmp_path):
        with pytest.raises(SparkirError, match=r"cannot read .*none\.pt"):
            trained.state.load(tmp_path / "none.pt")

    def test_code_in_it_is_not_run(self, trained):
        class Harmful:
            def __reduce__(self):
                return print, ("run",)

        torch.save({"format": 1, "student": Harmful()}, trained.checkpoint)
        with pytest.raises(SparkirError, match="cannot read"):
            trained.state.load(trained.checkpoint)

    @pytest.mark.parametrize("content", [{"format": 1}, {}, [1, 2], torch.zeros(3)])
    def test_torch_file_of_something_else(self, trained, content):
        torch.save(content, trained.checkpoint)
        with pytest.raises(SparkirError, match=r"of another run|has format None"):
            trained.state.load(trained.checkpoint)


class TestAnotherRun:
    @pytest.mark.parametrize(
        "change",
        [
            {"bits": None},
            {"source": "uniform", "options": None},
            {"options": {"reward_every": 2, "sigma": 0.3}},  # fits, and is overwritten
            {"ema": 0.0},
            {"name": "fitnet"},
        ],
    )
    def test_of_other_parts(self, trained, tmp_path, change):
        other = small_run(tmp_path, **FULL | change)
        if "sigma" in (change.get("options") or {}):
            other.resume()
            return
        with pytest.raises(SparkirError, match="of another run"):
            other.resume()

    def test_without_the_average_that_this_one_keeps(self, tmp_path):
        small_run(tmp_path, steps=1).train()
        with pytest.raises(SparkirError, match="of another run"):
            small_run(tmp_path, ema=0.9).resume()

    def test_of_other_images(self, trained, monkeypatch):
        sampler = trained.state.sampler
        monkeypatch.setattr(sampler, "_images", lambda: "other")
        with pytest.raises(SparkirError, match="training images"):
            trained.resume()

    def test_of_another_format(self, trained):
        values = trained.state.state_dict() | {"format": 0}
        torch.save(values, trained.checkpoint)
        with pytest.raises(SparkirError, match="has format 0, this version reads 1"):
            trained.resume()


class TestDiskFull:
    @pytest.fixture
    def full_after(self, monkeypatch):
        """Let only so many bytes be written."""

        class Full:
            def __init__(self, file, left):
                self.file, self.left = file, left

            def write(self, data):
                size = memoryview(data).nbytes
                if size > self.left:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.left -= size
                return self.file.write(data)

            def flush(self):
                self.file.flush()

        original = state_module.atomic_file

        def limit(size):
            @contextmanager
            def limited(path):
                with original(path) as file:
                    yield Full(file, size)

            monkeypatch.setattr(state_module, "atomic_file", limited)

        return limit

    @pytest.mark.parametrize("size", [0, 1000, 50_000])
    def test_while_saving_leaves_the_old_checkpoint(self, trained, full_after, size):
        before = trained.checkpoint.read_bytes()
        files = sorted(trained.checkpoint.parent.iterdir())
        assert len(before) > size
        trained.state.step = 1000
        full_after(size)
        with pytest.raises(SparkirError, match=r"cannot write .*last\.pt.*--resume"):
            trained.state.save(trained.checkpoint)
        assert trained.checkpoint.read_bytes() == before
        assert sorted(trained.checkpoint.parent.iterdir()) == files

    def test_in_the_middle_of_training(self, tmp_path, full_after, monkeypatch):
        """The run stops; once there is space it goes on to what it would have become."""
        whole = small_run(tmp_path / "whole", **FULL, steps=8).train().values()
        run = small_run(tmp_path / "full", **FULL, steps=8, checkpoint_every=3)

        def fill_the_disk(event):
            if event["kind"] == "checkpoint":
                full_after(2000)

        run.events = type("Events", (list,), {"append": lambda self, e: fill_the_disk(e)})()
        with pytest.raises(SparkirError, match="cannot write"):
            run.train()
        monkeypatch.undo()
        again = small_run(tmp_path / "full", **FULL, steps=8, checkpoint_every=3).resume()
        assert again.state.step == 3
        assert_same(again.train().values(), whole)

    def test_no_permission(self, trained, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(SparkirError, match="cannot write"):
            trained.state.save(tmp_path / "file" / "last.pt")
