"""TensorBoard's files say what the event stream says, as TensorBoard itself reads them."""

import importlib.util
import json
import shutil
import threading
import time
from contextlib import closing

import pytest
from test_scalars import RESUMED, stage, step, stream

from helpers import call
from sparkir.report import tensorboard
from sparkir.report.events import EventLog, read_events
from sparkir.report.tensorboard import TensorBoardLog, write_tensorboard

pytest_plugins = ["helpers"]
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard"
)


def read(folder):
    """Tag -> (step, value, time) of all that is in a folder, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(s.step, s.value, s.wall_time) for s in accumulator.Scalars(tag)] for tag in tags}


def losses(folder):
    return {step: value for step, value, _ in read(folder)["train/loss"]}


@needs_tensorboard
def test_every_figure_of_a_run_is_there(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    said = call("report", tmp_path / "run", "--tensorboard")
    assert said.code == 0, said
    assert f"written: {tmp_path}/run/tensorboard" in said.out
    assert f"tensorboard --logdir {tmp_path}/run" in said.out
    folder = tmp_path / "run" / "tensorboard"
    assert sorted(path.name for path in folder.iterdir()) == ["qat", "spark-paper"]
    events = [e for e in read_events(finished.folder / "events.jsonl") if e["kind"] == "step"]
    for name, of_training in (("qat", events[:12]), ("spark-paper", events[12:])):
        found = read(folder / name)
        for key in ("loss", "gradient_norm", "learning_rate", "reconstruction"):
            expected = [pytest.approx((e["step"], e[key], e["time_s"])) for e in of_training]
            assert found[f"train/{key}"] == expected
        assert [step for step, *_ in found["evaluation/psnr_db"]] == [12]
        assert any(tag.startswith("policy/") for tag in found) == (name == "spark-paper")


@needs_tensorboard
def test_again_is_the_same_and_no_second_curve(finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished.folder / "events.jsonl", tmp_path / "run")
    for _ in range(2):
        write_tensorboard([tmp_path / "run"])
        assert len(list((tmp_path / "run/tensorboard/qat").iterdir())) == 1
        assert list(losses(tmp_path / "run/tensorboard/qat")) == list(range(1, 13))


@needs_tensorboard
def test_what_a_resume_undid_is_gone(tmp_path):
    with closing(TensorBoardLog(tmp_path)) as log:
        for event in RESUMED:
            log(event)
    assert losses(tmp_path / "qat") == {1: 1.0, 2: 2.0, 3: 3.0}
    assert losses(tmp_path / "spark") == {1: 10.0, 2: 20.0, 3: 31.0}


@needs_tensorboard
def test_a_growing_stream_is_followed_until_it_is_done(tmp_path):
    path = tmp_path / "events.jsonl"
    looks = []
    with EventLog(path) as log:
        log(stage("train A"))
        log(step(1, 0.5))
        thread = threading.Thread(
            target=write_tensorboard,
            args=([tmp_path],),
            kwargs={"follow": True, "seen": looks.append, "poll_s": 0.02},
        )
        thread.start()
        wait_until(lambda: looks and looks[-1] == 1)
        assert losses(tmp_path / "tensorboard" / "a") == {1: 0.5}
        log(step(2, 0.25))
        wait_until(lambda: looks[-1] == 2)
        assert losses(tmp_path / "tensorboard" / "a") == {1: 0.5, 2: 0.25}
        assert thread.is_alive()
        log({"kind": "done", "rows": []})
    thread.join(timeout=20)
    assert not thread.is_alive()


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@needs_tensorboard
def test_ctrl_c_ends_following_and_what_was_written_stays(tmp_path, monkeypatch):
    events = stream(stage("train A"), step(1, 0.5))
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorboard.time, "sleep", stop)
    said = call("report", tmp_path, "--tensorboard", "--follow")
    assert said.code == 0, said
    assert f"written: {tmp_path}/tensorboard" in said.out
    assert losses(tmp_path / "tensorboard" / "a") == {1: 0.5}


def test_without_the_package_the_fix_is_said(finished, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    shutil.copy(finished.folder / "events.jsonl", tmp_path / "run")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    said = call("report", tmp_path / "run", "--tensorboard")
    assert said.code == 1
    assert "pip install 'sparkir[tensorboard]'" in said.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["events.jsonl"]
