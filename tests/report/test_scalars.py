"""The figures of an event stream as rows, as CSV, and what `sparkir report` says of them."""

import csv
import io
import json
import math
import shutil

import pytest

from helpers import call
from sparkir.errors import SparkirError
from sparkir.report.events import EventTail, read_events
from sparkir.report.scalars import find_runs, rows_of, to_csv

pytest_plugins = ["helpers"]


def stream(*events):
    return [{"time_s": float(index)} | event for index, event in enumerate(events)]


def stage(name):
    return {"kind": "stage", "name": name, "steps": 9}


def step(number, loss):
    return {"kind": "step", "step": number, "loss": loss}


def test_every_step_is_a_row_of_its_training():
    events = stream(
        {"kind": "start", "recipe": "tiny"},
        stage("train QAT"),
        step(1, 0.5),
        stage("train SPARK"),
        {"kind": "policy", "step": 0, "sigma": 0.25, "policy_loss": 3.0},
        step(1, 0.75),
        {"kind": "evaluation", "step": 1, "psnr_db": 30.5, "best": True},
        stage("measure"),
        {"kind": "step", "step": 7, "loss": 9.0},  # of no training
        {"kind": "done", "rows": []},
    )
    assert rows_of("runs/a", events) == [
        {"run": "runs/a", "training": "QAT", "step": 1, "time_s": 2.0, "loss": 0.5},
        {
            **{"run": "runs/a", "training": "SPARK", "step": 1, "time_s": 6.0},
            **{"policy_sigma": 0.25, "policy_loss": 3.0, "loss": 0.75, "psnr_db": 30.5},
        },
    ]


RESUMED = stream(
    stage("train QAT"),
    step(1, 1.0),
    step(2, 2.0),
    step(3, 3.0),
    stage("train SPARK"),
    step(1, 10.0),
    step(2, 20.0),
    step(3, 30.0),
    step(4, 40.0),  # killed; the last checkpoint was of step 2
    stage("train QAT"),
    {"kind": "resumed", "step": 3},  # was finished
    stage("train SPARK"),
    {"kind": "resumed", "step": 2},
    step(3, 31.0),
)


def test_what_a_resume_undid_is_gone_and_the_rest_stays():
    rows = rows_of("r", RESUMED)
    losses = {(row["training"], row["step"]): row["loss"] for row in rows}
    qat = {("QAT", 1): 1.0, ("QAT", 2): 2.0, ("QAT", 3): 3.0}
    assert losses == qat | {("SPARK", 1): 10.0, ("SPARK", 2): 20.0, ("SPARK", 3): 31.0}


def test_a_training_without_a_checkpoint_begins_again():
    rows = rows_of("r", stream(stage("train A"), step(1, 1.0), step(2, 2.0), stage("train A")))
    assert len(rows) == 2  # nothing has come in their place yet
    again = stream(stage("train A"), step(1, 1.0), step(2, 2.0), stage("train A"), step(1, 1.5))
    assert [row["loss"] for row in rows_of("r", again)] == [1.5]


def test_csv_reads_back_with_every_digit():
    rows = rows_of('a "run", here', stream(stage("train A"), step(1, 1 / 3), step(2, math.inf)))
    rows[1]["psnr_db"] = 30.1
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert list(read[0]) == ["run", "training", "step", "time_s", "loss", "psnr_db"]
    assert read[0]["run"] == 'a "run", here'
    assert float(read[0]["loss"]) == 1 / 3
    assert read[0]["psnr_db"] == ""
    assert float(read[1]["loss"]) == math.inf


def test_a_tail_gives_whole_lines_once(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "a"}\n{"kind":')
    tail = EventTail(path)
    assert tail.read() == [{"kind": "a"}]
    assert tail.read() == []
    with path.open("a") as file:
        file.write(' "b"}\n{"kind": "c"}\n')
    assert tail.read() == [{"kind": "b"}, {"kind": "c"}]
    with path.open("a") as file:
        file.write("no event\n")
    with pytest.raises(SparkirError, match=r"events.jsonl is damaged"):
        tail.read()
    path.unlink()
    with pytest.raises(SparkirError, match="cannot read the event stream"):
        tail.read()


def test_a_folder_of_runs_stands_for_all_of_them(tmp_path):
    for name in ("b/seed-0/qat", "b/seed-0/kd", "a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "events.jsonl").touch()
    found = find_runs([tmp_path / "b", tmp_path / "a", tmp_path / "a"])
    assert [str(f.relative_to(tmp_path)) for f in found] == ["b/seed-0/kd", "b/seed-0/qat", "a"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SparkirError, match=r"no run in .*empty: it holds no events.jsonl"):
        find_runs([tmp_path / "a", tmp_path / "empty"])


# The command ----------------------------------------------------------------------------------


def test_the_command_says_how_far_a_run_is(finished, tmp_path):
    said = call("report", finished.folder)
    assert said.code == 0, said
    events = read_events(finished.folder / "events.jsonl")
    final = [e["psnr_db"] for e in events if e["kind"] == "evaluation"]
    assert len(final) == 2
    for psnr_db in final:
        assert f"{psnr_db:.3f}" in said.text
    assert "QAT" in said.text
    assert "SPARK (paper)" in said.text


def test_csv_has_what_the_stream_has(finished, tmp_path):
    said = call("report", finished.folder, "--csv", tmp_path / "new" / "run.csv")
    assert said.code == 0, said
    assert f"written: {tmp_path}/new/run.csv" in said.out
    with (tmp_path / "new" / "run.csv").open() as file:
        read = list(csv.DictReader(file))
    events = read_events(finished.folder / "events.jsonl")
    steps = [event for event in events if event["kind"] == "step"]
    assert len(read) == len(steps) == 24
    for row, event in zip(read, steps, strict=True):
        assert int(row["step"]) == event["step"]
        for name in ("loss", "gradient_norm", "learning_rate", "step_s"):
            assert float(row[name]) == event[name]
    policies = [event for event in events if event["kind"] == "policy"]
    learned = [row for row in read if row["policy_reward"]]
    assert [int(row["step"]) - 1 for row in learned] == [event["step"] for event in policies]
    assert [float(row["policy_reward"]) for row in learned] == [e["reward"] for e in policies]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], ["no run in nowhere", "sparkir distill"]),
        (["run", "--follow"], ["--follow keeps TensorBoard's files", "add --tensorboard"]),
        (["run", "--csv", "."], ["--csv . is a folder; give a file"]),
        (["run", "--csv", "/dev/null/x.csv"], ["cannot write /dev/null/x.csv", "another --csv"]),
        (["begun", "--csv", "x.csv"], ["no training has logged a step yet"]),
    ],
)
def test_a_mistake(finished, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(finished.folder / "events.jsonl", "run")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "events.jsonl").write_text(json.dumps({"kind": "start"}) + "\n")
    said = call("report", *arguments)
    assert said.code == 1
    for words in says:
        assert words in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "run"]
