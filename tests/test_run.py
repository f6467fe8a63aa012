"""Whole runs: what one leaves behind, and that it can be stopped anywhere and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import sparkir.export
from helpers import (
    ALL_BASELINES,
    IN_FLOAT,
    Finished,
    call,
    contents,
    load_image,
    one_order_of_sums,
    photo,
    save_image,
    write_recipe,
)
from sparkir import recipe
from sparkir.assemble import gather, load_student, open_pairs
from sparkir.data.atomic import held
from sparkir.data.degrade import bicubic_resize
from sparkir.deploy.onnx import to_onnx
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import ImageScore, evaluate
from sparkir.evaluate.infer import restore_image
from sparkir.evaluate.metrics import Convention
from sparkir.models.checkpoint import read_weights, save_weights
from sparkir.models.registry import build
from sparkir.quant.reference import freeze
from sparkir.report.events import read_events
from sparkir.report.picture import Panel, compose
from sparkir.report.table import Row
from sparkir.run import claim, method_name, qat_only, train_student
from sparkir.spark.weighting import Confidence, Constant
from sparkir.train.loop import Interrupted

pytest_plugins = ["helpers"]

ROWS = [
    ("bicubic", ""),
    ("teacher", "float"),
    ("PTQ W8A8", "integer"),
    ("PTQ W4A4", "integer"),
    ("QAT W4A4", "training"),
    ("QAT W4A4", "integer"),
    ("SPARK (paper) W4A4", "training"),
    ("SPARK (paper) W4A4", "integer"),
    ("SPARK (paper) W4A4", "runtime"),
]
DNCNN = {
    "metric": "rgb",
    "data.scale": 1,
    "student.model": "dncnn",
    "student.options": {"depth": 3, "width": 8, "channels": 3},
    "train.steps": 2,
}


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def table_of(markdown: str) -> list[list[str]]:
    """The cells of a Markdown table, without its two header lines."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# What a run leaves ----------------------------------------------------------------------------


def test_everything_is_there_and_the_command_says_where(finished):
    names = {path.name for path in finished.folder.iterdir()}
    written = {"report.md", "comparison.png", "student.safetensors", "student.onnx", "student.md"}
    assert names == written | {"report.json", "events.jsonl", "recipe.toml", "training", ".lock"}
    for name in [*written, "events.jsonl", "recipe.toml"]:
        assert f" run/{name}\n" in finished.said.out
        assert (finished.folder / name).stat().st_size > 0
    assert not list(finished.folder.rglob("*.partial"))
    assert finished.said.err == ""


def test_the_rows_stand_in_order(finished):
    report = report_of(finished.folder)
    assert [(row["name"], row["arithmetic"]) for row in report["rows"]] == ROWS
    table = table_of((finished.folder / "report.md").read_text())
    assert [(cells[0], cells[1]) for cells in table] == ROWS
    for cells, row in zip(table, report["rows"], strict=True):
        assert cells[2:4] == [f"{row['psnr_db']:.3f}", f"{row['ssim']:.4f}"]
        assert [score["name"] for score in row["scores"]] == ["c", "d"]
        assert row["psnr_db"] == np.mean([score["psnr_db"] for score in row["scores"]])
        assert cells[0] in finished.said.out
        assert cells[2] in finished.said.out


def test_the_figures_are_told_apart_and_no_two_methods_share_theirs(finished):
    """Rows that are equal by mistake, such as QAT measured twice, would be equal exactly."""
    rows = report_of(finished.folder)["rows"]
    integer = {row["name"]: row["psnr_db"] for row in rows if row["arithmetic"] == "integer"}
    assert len(set(integer.values())) == len(integer) == 4


def test_the_integer_network_and_the_runtime_restore_the_same_pixels(finished):
    rows = report_of(finished.folder)["rows"]
    assert rows[-2]["arithmetic"] == "integer"
    assert rows[-1]["arithmetic"] == "runtime"
    assert rows[-2]["scores"] == rows[-1]["scores"]
    size = (finished.folder / "student.onnx").stat().st_size
    assert size - 300 < rows[-1]["size_bytes"] < size  # its card came last
    assert abs(rows[-3]["psnr_db"] - rows[-2]["psnr_db"]) < 0.02


def test_the_convention_stands_beside_the_figures(finished):
    words = "PSNR-Y studio range, uint8, crop 2 px"
    assert report_of(finished.folder)["convention"] == words
    above, _, _ = (finished.folder / "report.md").read_text().partition("\n|")
    assert words in above
    assert words in finished.said.out


def test_the_bicubic_row_is_the_bicubic(finished, project):
    row = report_of(finished.folder)["rows"][0]
    data = recipe.load(finished.folder / "recipe.toml").data
    pairs = open_pairs(data, str(finished.project / "test"))
    enlarged = evaluate(
        lambda lq: bicubic_resize(lq, scale=2, border="symmetric"),
        pairs,
        Convention(space="y", crop_px=2),
    )
    assert [score["psnr_db"] for score in row["scores"]] == [one.psnr_db for one in enlarged]


def test_the_written_recipe_repeats_the_run(finished):
    asked = recipe.load(finished.project / "tiny.toml")
    assert recipe.load(finished.folder / "recipe.toml") == asked
    assert recipe.from_values(report_of(finished.folder)["recipe"], "report.json") == asked


def test_the_event_stream_tells_the_whole_story(finished):
    events = read_events(finished.folder / "events.jsonl")
    kinds = [event["kind"] for event in events]
    assert (kinds[0], kinds[-1]) == ("start", "done")
    assert events[0]["versions"]["torch"] == metadata.version("torch")
    stages = [event["name"] for event in events if event["kind"] == "stage"]
    assert stages == ["train QAT", "train SPARK (paper)", "measure", "export"]
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert steps == [*range(1, 13)] * 2
    assert kinds.count("policy") == 6  # every second step of one of the two
    rows = [event for event in events if event["kind"] == "row"]
    assert [(row["name"], row["arithmetic"]) for row in rows] == ROWS
    assert events[-1]["rows"] == report_of(finished.folder)["rows"]


def test_the_picture_has_a_panel_for_every_method(finished):
    """Ground truth, eight rows less the two as trained, and the weight map: nine panels."""
    picture = load_image(finished.folder / "comparison.png")
    panel = Panel(title="", note="", image=np.zeros((4, 4, 3), np.uint8))
    assert picture.shape == compose([panel] * 9, title="", subtitle="").shape
    ninth, tenth = (picture[368:600, left : left + 240] for left in (768, 1020))
    assert np.ptp(ninth) > 50
    assert np.ptp(tenth.reshape(-1, 3), axis=0).max() == 0  # bare paper


def test_the_saved_student_is_the_network_that_was_measured(finished):
    student, saved = load_student(finished.folder / "student.safetensors")
    assert saved == recipe.load(finished.folder / "recipe.toml")
    frozen = freeze(student)
    before, after = finished.frozen.state_dict(), frozen.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    image = torch.from_numpy(photo(40, 48, 3)).movedim(-1, 0)[None].float()
    assert torch.equal(frozen(image), finished.frozen(image))


def test_spark_costs_nothing_at_inference(finished, project):
    """The student that SPARK trained and the one of plain QAT are one graph with other numbers."""
    tiny = recipe.load(finished.folder / "recipe.toml")
    plain = train_student(
        qat_only(tiny), gather(tiny), Path(shutil.copytree(finished.folder / "training/qat", "qat"))
    )
    files = [to_onnx(finished.frozen), to_onnx(freeze(plain.student))]
    described = [
        [(n.op_type, n.name, list(n.input), list(n.output), str(n.attribute)) for n in m.graph.node]
        for m in files
    ]
    assert described[0] == described[1]
    shapes = [{t.name: (t.data_type, list(t.dims)) for t in m.graph.initializer} for m in files]
    assert shapes[0] == shapes[1]
    weights = [m.graph.initializer for m in files]
    assert weights[0] != weights[1]
    sizes = [len(m.SerializeToString()) for m in files]
    assert sizes[0] == sizes[1]


def test_a_projection_is_trained_kept_and_no_part_of_the_student(finished, project):
    """Features of a narrower student: the checkpoint has the projection, the network has not."""
    changes = {
        "distill": {"method": "fitnet", "norm": "l1"},
        "student.options": {"width": 4, "blocks": 1, "scale": 2},
        "student.weights": "",
        "train.steps": 2,
    }
    made = recipe.load(write_recipe(project / "fitnet.toml", changes))
    trained = train_student(made, gather(made), Path("fitnet"))
    saved = torch.load("fitnet/last.pt", weights_only=True)
    assert saved["method"]["projections.0.weight"].shape == (8, 4, 1, 1)
    assert not any("projections" in name for name in trained.student.state_dict())
    moments = saved["optimizer"]["state"].values()
    assert (8, 4, 1, 1) in {tuple(m["exp_avg"].shape) for m in moments}
    nodes = to_onnx(freeze(trained.student)).graph.node
    assert len(nodes) == len(to_onnx(finished.frozen).graph.node)


@one_order_of_sums
def test_an_equalized_student_goes_on_where_it_stopped_and_is_exported(project):
    """Factors are found again; features are compared without them."""
    changes = {"distill": {"method": "fitnet", "norm": "l1"}, "quant.equalize": True}
    written = write_recipe(project / "equalized.toml", changes | {"train.steps": 4})
    made, whole = recipe.load(written), []
    trained = train_student(made, gather(made), Path("whole"), report=whole.append)
    seen: list[dict] = []
    halves = {"folder": Path("halves"), "report": seen.append}

    def after_two_steps() -> bool:
        return any(event["kind"] == "step" and event["step"] == 2 for event in seen)

    with pytest.raises(Interrupted):
        train_student(made, gather(made), **halves, stop_requested=after_two_steps)
    again = train_student(made, gather(made), **halves)
    for name, value in trained.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name
    losses = [[e["loss"] for e in events if e["kind"] == "step"] for events in (whole, seen)]
    assert losses[0] == losses[1]
    saved = call("distill", "equalized.toml", "--out", "run")
    assert saved.code == 0, saved


def test_the_report_says_what_a_method_looked_with(project):
    """The method's result depends on its encoder, which its name does not tell."""
    changes = {"distill.method": "dckd", "train.steps": 1, "baselines": []}
    write_recipe(project / "dckd.toml", changes, without=["quant", "weighting"])
    said = call("distill", "dckd.toml", "--out", "run")
    assert said.code == 0, said
    (event,) = [e for e in read_events(project / "run/events.jsonl") if e["kind"] == "method"]
    assert "fixed random convolutions of 5 levels (no VQGAN)" in event["remark"]
    assert event["remark"] in said.text
    assert f"{event['remark']}.\n" in (project / "run/report.md").read_text()
    assert report_of(project / "run")["remark"] == event["remark"]


def test_networks_that_a_method_cannot_compare_are_refused_before_training(project):
    (project / "bare.py").write_text(
        "from torch import nn\nfrom sparkir.models.facts import ModelFacts\n"
        "def bare():\n    enlarge = nn.Upsample(scale_factor=2)\n"
        "    network = nn.Sequential(nn.Conv2d(3, 3, 1), enlarge)\n"
        "    network.facts = ModelFacts(name='bare', scale=2, channels=3, value_range=1.0,"
        " taps=(), halo_px=1)\n    return network\n"
    )
    changes = {"distill.method": "fitnet", "student.model": "bare:bare", "student.options": {}}
    changes |= {"student.weights": ""}
    made = recipe.load(write_recipe(project / "bare.toml", changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(project))
        with pytest.raises(SparkirError, match=r"the student bare names no features .* \"kd\""):
            gather(made)


def test_export_writes_the_same_file_again(finished, project):
    said = call("export", finished.folder, "--out", "again.onnx", "--data", project / "test")
    assert said.code == 0, said
    assert "final image: 0 of 30048 values differ" in said.out
    assert "again.onnx (" in said.out
    first_card = (finished.folder / "student.md").read_text("utf-8")
    assert "int8 kernel |" in first_card
    (told,) = [line for line in first_card.splitlines() if line.startswith("| measured")]
    assert told in Path("again.md").read_text("utf-8")
    again, first = (onnx.load(p) for p in ("again.onnx", finished.folder / "student.onnx"))
    assert len(first.graph.initializer) > 10
    assert again.graph.initializer == first.graph.initializer
    assert again.graph == first.graph


@pytest.mark.parametrize("file", ["", "student.onnx", "student.safetensors"])
def test_evaluate_prints_the_figures_of_the_report(finished, project, file):
    row = report_of(finished.folder)["rows"][-1]
    said = call("evaluate", finished.folder / file, "--data", finished.project / "test", "--each")
    assert said.code == 0, said
    assert ": PSNR-Y studio range, uint8, crop 2 px; SSIM alike; input bicubic / 2\n" in said.out
    scores = [*row["scores"], {**row, "name": "mean"}]
    for score in scores:
        assert f"│ {score['name']} │ {score['psnr_db']:.3f} │ {score['ssim']:.4f} │" in said.text


@pytest.mark.parametrize("file", ["", "student.safetensors"])
def test_restore_writes_the_integer_networks_pixels(finished, project, file):
    image = photo(50, 44, 8)
    save_image(project / "in" / "x.png", image)
    save_image(project / "in" / "y.png", image[:32])
    said = call("restore", finished.folder / file, "in", "out")
    assert said.code == 0, said
    assert said.out.startswith("2 restored with ") or "\n2 restored with " in said.out
    assert np.array_equal(load_image(project / "out/x.png"), restore_image(finished.frozen, image))
    assert load_image(project / "out/y.png").shape == (64, 88, 3)
    said = call("restore", finished.folder / file, "in/x.png", "one.png")
    assert said.code == 0, said
    assert (project / "one.png").read_bytes() == (project / "out/x.png").read_bytes()


# Stopped and gone on with ---------------------------------------------------------------------

SLOWLY = """
import time
from sparkir import cli
from sparkir.distill.task import DistillationTask

forward = DistillationTask.forward

def slow(self, lq, gt):
    time.sleep(0.3)
    return forward(self, lq, gt)

DistillationTask.forward = slow
cli.main()
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    """A run in another process that takes at least 0.3 s for every step."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_step(process: subprocess.Popen[str], events: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if events.is_file():
            steps = [event["step"] for event in read_events(events) if event["kind"] == "step"]
            if steps and steps[-1] >= step:
                return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no step {step}: {process.communicate()}")


def without_export(monkeypatch: pytest.MonkeyPatch, finished: Finished) -> None:
    """Take the finished run's file instead of exporting anew; the parity check still compares."""
    model = onnx.load(finished.folder / "student.onnx")
    monkeypatch.setattr(sparkir.export, "to_onnx", lambda frozen: model)


def assert_same_student(folder: Path, finished: Finished) -> None:
    expected = read_weights(finished.folder / "student.safetensors")
    found = read_weights(folder / "student.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@one_order_of_sums
def test_ctrl_c_stops_after_the_step_and_resume_ends_with_the_same_student(
    project, finished, monkeypatch
):
    write_recipe(project / "tiny.toml", {"baselines": ALL_BASELINES})
    process = start("distill", "tiny.toml", "--out", "run")
    wait_for_step(process, project / "run/events.jsonl", 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, (out, err)
    assert err == "stopped and saved; go on with --resume --out run\n"
    assert (project / "run/training/qat/last.pt").is_file()
    assert not (project / "run/student.safetensors").exists()
    stopped = [e["step"] for e in read_events(project / "run/events.jsonl") if "step" in e][-1]
    assert stopped < 12

    without_export(monkeypatch, finished)
    said = call("distill", "tiny.toml", "--out", "run", "--resume")
    assert said.code == 0, said
    assert_same_student(project / "run", finished)
    assert report_of(project / "run")["rows"] == report_of(finished.folder)["rows"]
    events = read_events(project / "run/events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [stopped]
    assert [event["kind"] for event in events].count("start") == 2


@one_order_of_sums
def test_kill_and_resume_ends_with_the_same_student(project, finished, monkeypatch):
    process = start("distill", "tiny.toml", "--out", "run")
    wait_for_step(process, project / "run/events.jsonl", 5)
    process.kill()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert not (project / "run/student.safetensors").exists()
    with (project / "run/events.jsonl").open("a") as file:
        file.write('{"time_s": 1.0, "kind": "st')  # what a kill in the middle of a write leaves

    without_export(monkeypatch, finished)
    said = call("distill", "tiny.toml", "--out", "run", "--resume")
    assert said.code == 0, said
    assert_same_student(project / "run", finished)
    rows = [report_of(folder)["rows"][-1] for folder in (project / "run", finished.folder)]
    sizes = [row.pop("size_bytes") for row in rows]  # with the recipe, whose paths may be longer
    assert rows[0] == rows[1]
    assert abs(sizes[0] - sizes[1]) < 200
    events = read_events(project / "run/events.jsonl")
    assert events[-1]["kind"] == "done"
    (resumed,) = [event["step"] for event in events if event["kind"] == "resumed"]
    assert 4 <= resumed < 12  # the newest checkpoint; there is one for every second step
    assert resumed % 2 == 0


@pytest.fixture
def stopped_run(project, monkeypatch) -> Path:
    """A float run that was interrupted after training."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write_recipe(project / "tiny.toml", {"train.steps": 2}, without=IN_FLOAT)
    with monkeypatch.context() as patch:
        patch.setattr(sparkir.run, "_finish", stop)
        assert call("distill", "tiny.toml", "--out", "run").code == 130
    return project / "run"


def test_resuming_from_a_damaged_checkpoint(stopped_run):
    checkpoint = stopped_run / "training/float/last.pt"
    content = checkpoint.read_bytes()[:-1000]
    checkpoint.write_bytes(content)
    said = call("distill", "tiny.toml", "--out", "run", "--resume")
    assert said.code == 1
    assert said.err.startswith("error: cannot read the checkpoint run/training/float/last.pt")
    assert "delete it to start over" in said.err
    assert len(said.err.splitlines()) == 1
    assert checkpoint.read_bytes() == content
    checkpoint.unlink()
    assert call("distill", "tiny.toml", "--out", "run", "--resume").code == 0


def test_a_run_that_is_at_work_is_left_alone(stopped_run):
    before = contents(stopped_run)
    with held(stopped_run / ".lock", wait=False):
        said = call("distill", "tiny.toml", "--out", "run", "--resume")
    assert said.code == 1
    assert said.err == "error: another process is at work in run; wait for it, or stop it\n"
    assert contents(stopped_run) == before
    assert call("distill", "tiny.toml", "--out", "run", "--resume").code == 0


def test_a_student_that_cannot_be_frozen_is_not_kept(project):
    said = call("distill", "tiny.toml", "--out", "run", "--set", "train.learning_rate=1e30")
    assert said.code == 1
    assert len(said.err.splitlines()) == 1
    assert not (project / "run/student.safetensors").exists()


def test_resuming_on_other_images(stopped_run, project):
    save_image(project / "train/more.png", photo(64, 64, 9))
    said = call("distill", "tiny.toml", "--out", "run", "--resume")
    assert said.code == 1
    assert "the training images are not those of the saved run; restore them" in said.err
    assert (stopped_run / "training/float/last.pt").is_file()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_resuming_with_other_weights(project, monkeypatch, role):
    changes = {"student.weights": "own.safetensors", "train.steps": 3}
    shutil.copy(project / "teacher.safetensors", project / "own.safetensors")
    write_recipe(project / "tiny.toml", changes)
    monkeypatch.setattr(sparkir.run, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparkir.run.distill(recipe.load("tiny.toml"), project / "run")
    file = project / {"student": "own.safetensors", "teacher": "teacher.safetensors"}[role]
    weights = read_weights(file)
    next(iter(weights.values())).view(-1)[0] += 1
    save_weights(weights, file, {})
    said = call("distill", "tiny.toml", "--out", "run", "--resume")
    assert said.code == 1
    assert f"the weights of the {role} are not those that this run began with" in said.err


def test_what_a_killed_process_left_is_no_obstacle_and_goes(project, stopped_run):
    left = f".{'0123456789abcdef' * 2}.partial"
    for path in (project / "new" / left, stopped_run / "training/float" / left):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    foreign = stopped_run / ".download.partial"
    foreign.write_bytes(b"somebody else's")
    assert call("distill", "tiny.toml", "--out", "run", "--resume").code == 0
    assert not (stopped_run / "training/float" / left).exists()
    assert foreign.exists()
    assert call("distill", "tiny.toml", "--out", "new").code == 0


def test_a_name_that_no_file_system_takes(project):
    said = call("distill", "tiny.toml", "--out", "x" * 300)
    assert said.code == 1
    assert said.err.endswith("File name too long; choose another --out\n")
    made = recipe.load("tiny.toml", ['data.train="\udcff"'])
    with pytest.raises(SparkirError, match=r"is not UTF-8 \('\\udcff'\).*rename that folder"):
        claim(project / "run", made, resume=False)


def test_resuming_a_finished_run_changes_nothing(project):
    write_recipe(project / "tiny.toml", without=IN_FLOAT)
    assert call("distill", "tiny.toml", "--out", "run").code == 0
    before = read_weights(project / "run/student.safetensors")
    said = call("distill", "tiny.toml", "--out", "run", "--resume")
    assert said.code == 0, said
    after = read_weights(project / "run/student.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    events = read_events(project / "run/events.jsonl")
    assert [event["kind"] for event in events].count("step") == 12


@one_order_of_sums
def test_a_second_run_with_the_same_seed_is_the_same(project):
    write_recipe(project / "tiny.toml", {"student.weights": ""}, without=["quant", "baselines"])
    made = {}
    for name, seed in {"one": 0, "two": 0, "other": 1}.items():
        said = call("distill", "tiny.toml", "--out", name, "--set", f"seed={seed}")
        assert said.code == 0, said
        made[name] = read_weights(project / name / "student.safetensors")
    assert all(torch.equal(made["one"][key], made["two"][key]) for key in made["one"])
    assert not torch.equal(made["one"]["head.0.weight"], made["other"]["head.0.weight"])


# Other tasks ----------------------------------------------------------------------------------


def test_pairs_of_folders(project):
    for split, seed in (("train", 0), ("test", 1)):
        clean = photo(48, 56, seed)
        save_image(project / "pairs" / split / "target" / "e.png", clean)
        save_image(project / "pairs" / split / "input" / "e.png", clean // 2)
    changes = {
        "data.train": "pairs/train",
        "data.test": "pairs/test",
        "data.degradation": "pairs",
        "baselines": ["degraded"],
    }
    write_recipe(project / "tiny.toml", DNCNN | changes, without=IN_FLOAT)
    said = call("distill", "tiny.toml", "--out", "run")
    assert said.code == 0, said
    degraded, own = report_of(project / "run")["rows"]
    assert (degraded["name"], own["name"]) == ("degraded input", "float")
    clean = load_image(project / "pairs/test/target/e.png").astype(float)
    expected = 10 * np.log10(255**2 / np.mean((clean - clean // 2) ** 2))
    assert degraded["psnr_db"] == pytest.approx(expected)
    assert "PSNR-RGB, uint8, no crop" in (project / "run/report.md").read_text()
    said = call("evaluate", "run", "--data", "pairs/test")
    assert f"│ mean │ {own['psnr_db']:.3f} │" in said.text


def test_noise_in_integers(project):
    """Denoising, quantized and exported: another network, scale, metric and degradation."""
    changes = {"data.degradation": "noise", "data.sigma": 20.0, "baselines": ["degraded"]}
    without = ["teacher", "distill", "weighting"]
    write_recipe(project / "tiny.toml", DNCNN | changes, without=without)
    said = call("distill", "tiny.toml", "--out", "run")
    assert said.code == 0, said
    rows = report_of(project / "run")["rows"]
    assert [(row["name"], row["arithmetic"]) for row in rows] == [
        ("degraded input", ""),
        ("QAT W4A4", "training"),
        ("QAT W4A4", "integer"),
        ("QAT W4A4", "runtime"),
    ]
    assert rows[0]["psnr_db"] == pytest.approx(20 * np.log10(255 / 20), abs=0.3)
    # The exported file alone does not know what degraded its input; the run folder does.
    said = call("evaluate", "run", "--data", "test")
    assert said.code == 0, said
    assert ": PSNR-RGB, uint8, no crop; SSIM alike; input noise of sigma 20\n" in said.out
    assert f"│ mean │ {rows[-1]['psnr_db']:.3f} │" in said.text


def test_a_float_network_alone(project):
    changes = {"train.steps": 2, "train.ema": 0.9}
    write_recipe(project / "tiny.toml", changes, without=IN_FLOAT)
    said = call("distill", "tiny.toml", "--out", "run")
    assert said.code == 0, said
    (row,) = report_of(project / "run")["rows"]
    assert (row["name"], row["arithmetic"]) == ("float", "float")
    assert report_of(project / "run")["export"] is None
    assert not (project / "run/student.onnx").exists()
    said = call("evaluate", "run", "--data", "test")
    assert said.code == 0, said
    assert f"│ mean │ {row['psnr_db']:.3f} │" in said.text
    student, _ = load_student(project / "run/student.safetensors")
    checkpoint = project / "run/training/float/last.pt"
    last = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for name, value in student.state_dict().items():
        assert torch.equal(value, last["average"][f"module.{name}"]), name
    assert not torch.equal(student.head[0].weight, last["student"]["head.0.weight"])
    said = call("export", "run")
    assert said.code == 1
    assert said.err == "error: the student in run is in floating point; export is for integers\n"


def test_a_baseline_that_is_the_recipe_itself_is_not_trained_twice(project, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write_recipe(
        project / "tiny.toml",
        {"baselines": ["qat"]},
        without=["teacher", "distill", "weighting"],
    )
    monkeypatch.setattr(sparkir.export, "to_onnx", stop)
    assert call("distill", "tiny.toml", "--out", "run").code == 130
    events = read_events(project / "run/events.jsonl")
    assert [e["name"] for e in events if e["kind"] == "stage"] == ["train QAT", "measure", "export"]
    table = (project / "run/report.md").read_text()  # whatever becomes of the file
    assert [cells[:2] for cells in table_of(table)] == [
        ["QAT W4A4", "training"],
        ["QAT W4A4", "integer"],
    ]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_export_needs_is_missed_before_training(project, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    said = call("distill", "tiny.toml", "--out", "run")
    assert said.code == 1
    assert said.err.startswith("error: export needs ")
    assert not (project / "run").exists()


def test_a_cache_without_room_is_found_out_before_a_baseline_is_trained(project):
    changes = {"baselines": ["qat"], "train.teacher_cache": True, "train.teacher_cache_gb": 1e-9}
    write_recipe(project / "tiny.toml", changes)
    said = call("distill", "tiny.toml", "--out", "run")
    assert said.code == 1
    assert "train.teacher_cache_gb" in said.err
    assert not (project / "run").exists()


def test_a_reason_to_run_the_teacher_is_told_once(project):
    changes = {"baselines": ["qat"], "train.teacher_cache": True, "distill.method": "fitnet"}
    write_recipe(project / "tiny.toml", changes | {"train.steps": 1}, without=["weighting"])
    assert call("distill", "tiny.toml", "--out", "run").code == 0
    events = read_events(project / "run/events.jsonl")
    told = [e["message"] for e in events if e["kind"] == "warning"]
    assert sum("runs at every step" in message for message in told) == 1


def test_ptq_in_8_bits_is_of_the_recipes_own_kind(project):
    rows = {}
    for bits in (8, 4):
        changes = {"quant.weight_bits": bits, "quant.activation_bits": bits, "train.steps": 1}
        changes |= {"quant.float_layers": ["head.0"], "baselines": ["ptq-w8a8", "ptq"]}
        write_recipe(project / "tiny.toml", changes, without=["distill", "weighting"])
        said = call("distill", "tiny.toml", "--out", f"run-{bits}")
        assert said.code == 0, said
        found = report_of(project / f"run-{bits}")["rows"]
        rows[bits] = [row for row in found if row["name"].startswith("PTQ")]
    assert [row["name"] for row in rows[4]] == ["PTQ W8A8", "PTQ W4A4"]
    assert rows[8] == rows[4][:1]


def test_a_map_is_shown_where_the_teacher_takes_the_image():
    trained = SimpleNamespace(weighting=Confidence())
    materials = SimpleNamespace(teacher=build("nafnet", width=8))
    shown = partial(sparkir.measure._shows_weights, materials)
    assert shown(trained, photo(32, 32, 1))
    assert not shown(trained, photo(32, 5, 1))  # to be completed to 16 by more than it has
    assert not shown(SimpleNamespace(weighting=Constant(1.0)), photo(32, 32, 1))
    materials.teacher = None
    assert not shown(trained, photo(32, 32, 1))


# Parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "changes", "name"),
    [
        ([], {}, "SPARK (paper)"),
        (["weighting"], {}, "QAT + KD"),
        ([], {"weighting": {"name": "confidence"}}, "QAT + KD, confidence"),
        (["weighting"], {"distill": {"method": "fitnet"}}, "QAT + FitNet"),
        ([], {"distill": {"method": "fitnet"}}, "SPARK (paper) on FitNet"),
        (["weighting", "distill"], {}, "QAT"),
        (["weighting", "distill", "quant"], {}, "float"),
        (["weighting", "quant"], {}, "float + KD"),
        (["weighting"], {"distill": {"target": "truth"}}, "QAT + KD to truth"),
        ([], {"distill": {"target": "truth"}}, "SPARK (paper) on KD to truth"),
    ],
)
def test_what_a_method_is_called(project, without, changes, name):
    made = recipe.load(write_recipe(project / "named.toml", changes, without=without))
    assert method_name(made) == name


def test_the_baseline_differs_from_the_recipe_in_the_teacher_alone(project):
    made = recipe.load("tiny.toml")
    changed = recipe.differences(made, qat_only(made))
    assert all(line.startswith(("distill", "weighting")) for line in changed)
    assert method_name(qat_only(made)) == "QAT"


def test_a_run_that_is_worse_as_exported_is_refused():

    def row(arithmetic: str, psnr_db: float) -> Row:
        scores = [ImageScore(name="x", psnr_db=psnr_db, ssim=0.9)]
        return Row(name="own", arithmetic=arithmetic, scores=scores)

    rows = [row("training", 30.0), row("integer", 30.0), row("runtime", 30.015)]
    sparkir.run._require_same_quality(rows[-1], "own", rows)
    with pytest.raises(SparkirError, match=r"own as exported restores -0.030 dB away"):
        sparkir.run._require_same_quality(row("runtime", 29.97), "own", rows)


def test_images_that_the_runtime_restores_otherwise_are_named():

    def row(arithmetic: str, *psnr_db: float, name: str = "own") -> Row:
        scores = [ImageScore(name=f"{i}", psnr_db=db, ssim=0.9) for i, db in enumerate(psnr_db)]
        return Row(name=name, arithmetic=arithmetic, scores=scores)

    others = [row("integer", 28.0, 28.0, 28.0, name="QAT"), row("integer", 30.0, 31.0, 32.0)]
    assert sparkir.run.deviating_images([*others, row("runtime", 30.0, 31.0, 32.0)]) == ""
    assert sparkir.run.deviating_images([*others, row("runtime", 30.0, 30.9, 32.01)]) == (
        "2 of 3 test images come out otherwise in the runtime than in the integer network, at most "
        "by -0.100 dB (1)"
    )


def test_a_claimed_folder_is_refused_to_the_next(project):

    made = recipe.load("tiny.toml")
    claim(project / "run", made, resume=False)
    claim(project / "run", made, resume=True)
    with pytest.raises(SparkirError, match="already holds a run"):
        claim(project / "run", made, resume=False)
