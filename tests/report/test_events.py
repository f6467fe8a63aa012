"""The event stream: appended to line by line, and readable after a kill."""

import json
import math
import os
import time
from pathlib import Path

import pytest

from sparkir.errors import SparkirError
from sparkir.report.events import EventLog, read_events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def write(path: Path, *events: dict) -> None:
    with EventLog(path) as log:
        for event in events:
            log(event)


def test_what_is_written_is_read_back_in_order(path):
    events = [{"kind": "step", "step": step, "loss": 0.1 * step} for step in range(5)]
    write(path, *events)
    read = read_events(path)
    assert [{k: v for k, v in event.items() if k != "time_s"} for event in read] == events
    assert len(path.read_text().splitlines()) == 5


def test_every_event_has_the_time_of_day(path):
    before = time.time()
    write(path, {"kind": "a"}, {"kind": "b"})
    first, second = (event["time_s"] for event in read_events(path))
    assert before - 0.01 <= first <= second <= time.time() + 0.01


def test_an_event_is_in_the_file_before_the_next_begins(path):
    with EventLog(path) as log:
        log({"kind": "a"})
        assert [event["kind"] for event in read_events(path)] == ["a"]


def test_a_line_break_in_a_message_does_not_break_the_line(path):
    write(path, {"kind": "warning", "message": "one\ntwo \u2028 é"})
    assert read_events(path)[0]["message"] == "one\ntwo \u2028 é"
    assert path.read_bytes().count(b"\n") == 1


def test_a_second_log_appends(path):
    write(path, {"kind": "a"})
    write(path, {"kind": "b"})
    assert [event["kind"] for event in read_events(path)] == ["a", "b"]


@pytest.mark.parametrize("cut", range(1, 25, 4))
def test_a_last_line_that_was_cut_off_is_left_out(path, cut):
    write(path, {"kind": "a"}, {"kind": "b"}, {"kind": "c"})
    path.write_bytes(path.read_bytes()[:-cut])
    kinds = [event["kind"] for event in read_events(path)]
    assert kinds == ["a", "b"]


@pytest.mark.parametrize("cut", range(1, 25, 4))
def test_what_is_appended_after_a_cut_line_is_not_lost(path, cut):
    write(path, {"kind": "a"}, {"kind": "b"}, {"kind": "c"})
    path.write_bytes(path.read_bytes()[:-cut])
    write(path, {"kind": "d"}, {"kind": "e"})
    assert [event["kind"] for event in read_events(path)] == ["a", "b", "d", "e"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_was_cut_in_its_only_line(path):
    path.write_text('{"kind": "sta')
    assert read_events(path) == []
    write(path, {"kind": "a"})
    assert [event["kind"] for event in read_events(path)] == ["a"]


def test_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "gone" / "events.jsonl"
    with pytest.raises(SparkirError, match=r"cannot write the event stream .*gone.events\.jsonl"):
        EventLog(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")  # noqa: PTH110
def test_a_full_disk_is_told_once(path):
    path.symlink_to("/dev/full")
    with (
        pytest.raises(SparkirError, match=r"cannot write the event stream .*No space left"),
        EventLog(path) as log,
    ):
        log({"kind": "a"})


@pytest.mark.parametrize("line", [b"\xff\xfe", b"{bad", b"[1]", b'{"a": 1}'])
def test_what_is_no_event_is_refused(path, line):
    write(path, {"kind": "a"})
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(SparkirError, match=r"events\.jsonl is (damaged|no event stream)"):
        read_events(path)


def test_numbers_that_json_has_not_are_null(path):
    """Equal images have a PSNR without end."""
    write(path, {"kind": "evaluation", "psnr_db": math.inf, "more": [{"x": math.nan}, 1.5]})
    assert "Infinity" not in path.read_text()
    (event,) = read_events(path)
    assert event["psnr_db"] is None
    assert event["more"] == [{"x": None}, 1.5]
