"""Whole comparisons: equal terms, gone on with wherever they stop, and what a mistake costs."""

import csv
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import sparkir.compare.cell
import sparkir.run
from helpers import RECIPE, call, contents, photo, save_image, write_recipe
from sparkir.assemble import gather
from sparkir.compare.comparison import compare, sets_of
from sparkir.compare.controls import record_of
from sparkir.compare.methods import choose
from sparkir.data.pairs import PatchSampler
from sparkir.distill.task import DistillationTask
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import evaluate
from sparkir.evaluate.metrics import Convention
from sparkir.evaluate.perceptual import Lpips
from sparkir.evaluate.statistics import paired_bootstrap
from sparkir.models.checkpoint import read_weights
from sparkir.models.registry import available, build
from sparkir.quant.reference import freeze
from sparkir.recipe import load
from sparkir.report.events import read_events
from sparkir.run import train_student
from sparkir.train.loop import Interrupted

pytest_plugins = ["helpers"]

SHORT = {"train.steps": 6, "train.log_every": 2, "train.learning_rate": 5e-3}
FEW = ("--methods", "qat,kd,constant", "--seeds", 2)
"""Four methods, as `constant` brings `spark-paper` along: eight cells."""
TO_COMPARE = ("compare", "tiny.toml", *FEW, "--out", "made")


@pytest.fixture
def short(project: Path) -> Path:
    """The project with a recipe of six steps."""
    write_recipe(project / "tiny.toml", SHORT)
    return project


@pytest.fixture(scope="session")
def compared(_template: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after `TO_COMPARE` with one more test set. Read-only."""
    folder = tmp_path_factory.mktemp("compared") / "project"
    shutil.copytree(_template, folder)
    write_recipe(folder / "tiny.toml", SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARKIR_CACHE", str(cache))
        patch.chdir(folder)
        said = call(*TO_COMPARE, "--test", "more=train")
    assert said.code == 0, said
    assert said.err == ""
    (folder / "said.txt").write_text(said.out)
    return folder


def cells(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("made/seed-*/*/result.json"))


def scores(cell: Path, test_set: str = "test") -> dict:
    return json.loads((cell / "scores" / f"{test_set}.json").read_text())


def comparison(folder: Path) -> dict:
    return json.loads((folder / "made/comparison.json").read_text())


def lines(folder: Path, test_set: str = "test") -> dict[str, dict]:
    table = next(t for t in comparison(folder)["tables"] if t["name"] == test_set)
    return {line["name"]: line for line in table["lines"]}


# What a comparison leaves ---------------------------------------------------------------------


def test_every_cell_has_its_student_its_recipe_and_its_scores(compared):
    names = [str(cell.relative_to(compared / "made")) for cell in cells(compared)]
    each = ["constant-spark-paper", "kd", "qat", "spark-paper"]
    assert names == [f"seed-{seed}/{name}" for seed in (0, 1) for name in each]
    for cell in cells(compared):
        assert {path.name for path in cell.iterdir()} == {
            *("recipe.toml", "events.jsonl", "student.safetensors", "result.json"),
            *("scores", ".lock"),
        }
        found = scores(cell)["scores"]
        assert found.keys() == {"training", "integer"}
        assert all([image["name"] for image in one] == ["c", "d"] for one in found.values())
        found = scores(cell, "more")["scores"]  # not the recipe's own, and not checked again
        assert found.keys() == {"integer"}
        assert [image["name"] for image in found["integer"]] == ["a", "b"]
        assert load(cell / "recipe.toml").seed == int(cell.parent.name[-1])


def test_the_table_is_what_the_scores_say(compared):
    def psnr(method: str) -> np.ndarray:
        found = [scores(compared / f"made/seed-{seed}/{method}") for seed in (0, 1)]
        return np.array([[i["psnr_db"] for i in one["scores"]["integer"]] for one in found])

    for test_set in ("test", "more"):
        assert list(lines(compared, test_set)) == [
            "qat",
            "kd",
            "constant:spark-paper",
            "spark-paper",
        ]
    kd = lines(compared)["kd"]
    assert kd["psnr_db"] == pytest.approx(psnr("kd").mean())
    assert kd["differences"]["psnr_db"] == list(paired_bootstrap(psnr("kd") - psnr("qat")))
    assert kd["differences"]["psnr_db"][0] != 0
    assert (kd["seeds"], kd["images"]) == (2, 2)
    trained = [scores(compared / f"made/seed-{seed}/kd")["scores"]["training"] for seed in (0, 1)]
    assert kd["psnr_db_as_trained"] == np.mean([i["psnr_db"] for one in trained for i in one])
    assert lines(compared)["qat"]["cost"] == 1.0
    assert lines(compared)["kd"]["cost"] > 0


def test_every_images_scores_are_in_one_file(compared):
    with (compared / "made/images.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 8 * 2 * 3  # cells, images, two arithmetics on one set and one on the other
    for line in found:
        cell = compared / f"made/seed-{line['seed']}" / line["method"].replace(":", "-")
        images = scores(cell, line["set"])["scores"][line["arithmetic"]]
        one = next(image for image in images if image["name"] == line["image"])
        assert (float(line["psnr_db"]), float(line["ssim"])) == (one["psnr_db"], one["ssim"])
        assert (line["lpips"], one["lpips"]) == ("", None)


def test_what_the_methods_of_a_seed_had_in_common_is_told(compared):
    starts = comparison(compared)["starts"]
    assert starts["0"]["the teacher"] == starts["1"]["the teacher"] is not None
    assert starts.keys() == {"0", "1"}


def test_the_command_prints_and_names_everything(compared):
    out = (compared / "said.txt").read_text()
    names = ("comparison.md", "comparison.tex", "comparison.csv", "comparison.json", "images.csv")
    for name in names:
        assert f" made/{name}\n" in out
        assert (compared / "made" / name).stat().st_size > 0
    for words in (
        *("test: PSNR-Y studio range, uint8, crop 2 px", "more: PSNR-Y"),
        "Differences to QAT are paired by image and seed",
        "resample 2 seeds and 2 images",
        "W of spark-paper, mean +- deviation, seed by seed: 0.",
        "No LPIPS: ",
        "Not in this table: degraded, teacher, float, ptq, kd-mse@1, kd-mse@20, ",
        "CPU time of all cores of a training step over that of QAT",
    ):
        assert words in out
    assert f"{lines(compared)['kd']['psnr_db']:.3f}" in out
    assert "random:spark-paper" in next(x for x in out.splitlines() if x.startswith("Not in"))


def test_methods_differ(compared):
    found = {
        json.dumps(scores(cell)["scores"]["integer"])
        for cell in cells(compared)
        if not cell.name.startswith("constant")
    }
    assert len(found) == 6


def test_a_constant_is_its_sparks_mean(compared):
    for seed in (0, 1):
        spark = compared / f"made/seed-{seed}/spark-paper"
        logged = record_of(read_events(spark / "events.jsonl"))
        constant = load(compared / f"made/seed-{seed}/constant-spark-paper/recipe.toml")
        assert constant.weighting.options == {"value": logged.mean}
        assert 0.3 < logged.mean < 0.7


def test_a_cell_is_the_run_of_its_recipe(compared, project):
    """The comparison trains what the recipe in the cell's folder does by itself."""
    cell = compared / "made/seed-1/kd"
    recipe = load(cell / "recipe.toml")
    materials = gather(recipe)
    student = train_student(recipe, materials, project / "alone").student
    expected, found = student.state_dict(), read_weights(cell / "student.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    measured = evaluate(freeze(student), materials.test, Convention(space="y", crop_px=2))
    assert [asdict(one) for one in measured] == scores(cell)["scores"]["integer"]


# Equal terms ----------------------------------------------------------------------------------


def test_every_method_sees_the_same_crops_and_starts_from_the_same_weights(short, monkeypatch):
    """All methods there are, policies that draw and students in float among them."""
    seen: dict[str, list[str]] = {}
    starts: dict[str, list[str]] = {}
    current = [""]
    train, draw, forward = (
        sparkir.compare.cell.train_student,
        PatchSampler.next,
        DistillationTask.forward,
    )

    def digest(*tensors: torch.Tensor) -> str:
        return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

    def train_noted(recipe, materials, folder, **options):
        current[0] = str(folder.relative_to(short / "made"))
        starts[current[0]] = [digest(*materials.student.state_dict().values())]
        trained = train(recipe, materials, folder, **options)
        current[0] = ""  # what is drawn now is for the calibration of the next seed
        return trained

    def draw_noted(sampler):
        lq, gt = draw(sampler)
        if current[0]:
            seen.setdefault(current[0], []).append(digest(lq, gt))
        return lq, gt

    def forward_noted(task, lq, gt):
        if len(starts[current[0]]) == 1:
            of_first_layer = task.student.get_parameter("head.0.weight")
            starts[current[0]].append(digest(of_first_layer))
        return forward(task, lq, gt)

    monkeypatch.setattr(sparkir.compare.cell, "train_student", train_noted)
    monkeypatch.setattr(PatchSampler, "next", draw_noted)
    monkeypatch.setattr(DistillationTask, "forward", forward_noted)
    recipe = load("tiny.toml", ["train.steps=3", "student.weights="])
    chosen = choose("all", recipe)
    compare(recipe, short / "made", methods=chosen, seeds=1)

    trained = [method for method in chosen if method.kind == "trained"]
    assert len(seen) == len(starts) == len(trained) > 12
    assert all(crops == seen["seed-0/qat"] for crops in seen.values())
    assert len(set(seen["seed-0/qat"])) == 3
    assert len({tuple(start) for start in starts.values()}) == 1
    compare(recipe, short / "made", methods=choose("qat", recipe), seeds=2)
    assert seen["seed-0/qat"] != seen["seed-1/qat"]
    assert starts["seed-0/qat"] != starts["seed-1/qat"]  # a fresh student's weights


def test_stored_outputs_of_the_teacher_change_nothing_of_what_is_seen(short):
    """Where the samplers end is compared before anything is put into a table."""
    recipe = load("tiny.toml", ["train.steps=3", "train.teacher_cache=true"])
    made = compare(recipe, short / "made", methods=choose("qat,kd,fitnet", recipe), seeds=1)
    assert [line.seeds for line in made.tables[0].lines] == [1, 1, 1]
    assert all("data_order" in (cell / "result.json").read_text() for cell in cells(short))


def test_denoising_in_grey(short):
    changes = {
        "data.degradation": "noise",
        "data.scale": 1,
        "data.channels": 1,
        "metric": "grey",
        "student.model": "dncnn",
        "student.options": {"depth": 3, "width": 8, "channels": 1},
        "train.steps": 2,
    }
    without = ["teacher", "distill", "weighting", "baselines"]
    write_recipe(short / "tiny.toml", changes, without=without)
    said = call("compare", "tiny.toml", "--methods", "degraded,float,ptq,qat", "--out", "made")
    assert said.code == 0, said
    assert {line["images"] for line in lines(short).values()} == {2}
    assert "PTQ: the student after its float training" in said.out


@pytest.mark.parametrize("name", available())
def test_networks_draw_nothing_while_they_train(name):
    """Or the draws of a policy, from the same generator, would change the student's."""
    network = build(name).train()
    facts = network.facts
    side = -(-max(24, facts.min_size_px) // facts.size_multiple) * facts.size_multiple
    before = torch.get_rng_state()
    network(torch.full((1, facts.channels, side, side), 0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_cells_that_saw_other_data_are_not_compared(compared, short):
    shutil.copytree(compared / "made", short / "made")
    result = short / "made/seed-1/kd/result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"data_order": "other"}))
    said = call(*TO_COMPARE)
    assert said.code == 1
    assert "the methods of seed 1 did not see the same crops" in said.err


# Reused and gone on with ----------------------------------------------------------------------


@pytest.fixture
def copied(compared: Path, short: Path) -> Path:
    """A finished comparison that may be changed."""
    shutil.copytree(compared / "made", short / "made")
    return short


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_, **__):
        raise AssertionError("this should have been found finished")

    monkeypatch.setattr(sparkir.compare.cell, "train_student", refused)


def test_a_finished_comparison_is_only_tabulated(copied, no_training, monkeypatch):
    before = contents(copied / "made")
    shutil.rmtree(copied / "train")  # not even the images are needed
    said = call(*TO_COMPARE, "--test", "more=train")
    assert said.code == 0, said
    assert contents(copied / "made") == before
    said = call("compare", "tiny.toml", "--methods", "kd,qat", "--baseline", "kd", "--out", "made")
    assert said.code == 0, said
    assert "Differences to KD, L1 are paired by image and seed; ONE seed: " in said.out
    assert "over 2 images alone and say nothing of other trainings" in said.out
    assert list(lines(copied)) == ["qat", "kd"]
    assert lines(copied)["kd"]["differences"]["psnr_db"] is None


def test_a_new_test_set_is_scored_without_training(copied, no_training):
    save_image(copied / "other/e.png", photo(40, 48, 7))
    said = call(*TO_COMPARE, "--test", "other=other")
    assert said.code == 0, said
    assert lines(copied, "other")["qat"]["images"] == 1
    assert [t["name"] for t in comparison(copied)["tables"]] == ["test", "other"]


def test_new_methods_and_seeds_are_added_to_what_is_there(copied, monkeypatch):
    trained = []
    train = sparkir.compare.cell.train_student

    def noted(recipe, materials, folder, **options):
        trained.append(str(folder.relative_to("made")))
        return train(recipe, materials, folder, **options)

    monkeypatch.setattr(sparkir.compare.cell, "train_student", noted)
    names = "degraded,teacher,ptq,float,qat,kd"
    said = call("compare", "tiny.toml", "--methods", names, "--seeds", 3, "--out", "made")
    assert said.code == 0, said
    assert trained == ["seed-0/float", "seed-1/float", "seed-2/float", "seed-2/qat", "seed-2/kd"]
    found = lines(copied)
    assert list(found) == names.replace("ptq,float", "float,ptq").split(",")
    assert {line["seeds"] for line in found.values()} == {3}
    assert not (copied / "made/seed-1/degraded").exists()  # the same for every seed
    assert found["degraded"]["psnr_db"] > found["qat"]["psnr_db"]
    assert found["ptq"]["cost"] is found["teacher"]["cost"] is None
    ptq = [scores(copied / f"made/seed-{seed}/ptq")["scores"] for seed in (0, 1)]
    assert ptq[0]["integer"] != ptq[1]["integer"]  # other calibration crops
    assert "PTQ: the student with its first weights, calibrated" in said.out


def test_ptq_of_a_fresh_student_is_that_of_its_float_training(short):
    chosen = load("tiny.toml", ["student.weights=", "train.steps=2"])
    made = compare(chosen, Path("made"), methods=choose("ptq", chosen), seeds=1, baseline="ptq")
    assert any("PTQ: the student after its float training" in note for note in made.notes)
    weights = [
        read_weights(short / f"made/seed-0/{name}/student.safetensors") for name in ("float", "ptq")
    ]
    assert torch.equal(weights[0]["head.0.weight"], weights[1]["head.0.weight"])


SLOWLY = """
import time
from sparkir import cli
from sparkir.data.pairs import PatchSampler

draw = PatchSampler.next

def slow(self):
    time.sleep(0.2)
    return draw(self)

PatchSampler.next = slow
cli.main()
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"it did not happen: {process.communicate()}")


def assert_same_cells(folder: Path, expected: Path) -> None:
    assert [c.relative_to(folder) for c in cells(folder)] == [
        c.relative_to(expected) for c in cells(expected)
    ]
    for found, wanted in zip(cells(folder), cells(expected), strict=True):
        assert scores(found) == scores(wanted)
        ours, theirs = (read_weights(c / "student.safetensors") for c in (found, wanted))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), found


def test_kill_and_go_on_ends_with_the_same_cells(short, compared):
    process = start(SLOWLY, *TO_COMPARE)
    wait_until(process, (short / "made/seed-0/qat/last.pt").exists)
    process.kill()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert len(cells(short)) == 1  # SPARK, which another one waits for, came first
    said = call(*TO_COMPARE)
    assert said.code == 0, said
    assert_same_cells(short, compared)
    events = read_events(short / "made/seed-0/qat/events.jsonl")
    (resumed,) = [event["step"] for event in events if event["kind"] == "resumed"]
    assert resumed in (2, 4)
    assert not list((short / "made").rglob("*.pt"))


def test_ctrl_c_saves_and_says_how_to_go_on(short, compared, monkeypatch):
    draws = []
    draw = PatchSampler.next

    def pressed(sampler):
        draws.append(1)
        if len(draws) == 4:  # one is for the calibration
            signal.raise_signal(signal.SIGINT)
        return draw(sampler)

    with monkeypatch.context() as patch:
        patch.setattr(PatchSampler, "next", pressed)
        said = call(*TO_COMPARE)
    assert said.code == 130, said
    assert said.err == "stopped and saved in made; go on with the same command\n"
    assert cells(short) == []
    saved = torch.load(short / "made/seed-0/spark-paper/last.pt", weights_only=True)
    assert saved["step"] == 3
    said = call(*TO_COMPARE)
    assert said.code == 0, said
    assert_same_cells(short, compared)


def in_processes(folder: Path, report: Callable[[dict], None], **options):
    recipe = load("tiny.toml")
    rows = choose("qat,kd,constant", recipe)
    return compare(recipe, folder / "made", methods=rows, seeds=2, jobs=2, report=report, **options)


def test_a_process_that_is_killed_is_a_row_and_the_others_make_the_same_cells(short, compared):
    killed = []

    def kill_one(event: dict) -> None:
        if event["kind"] == "step" and event["cell"] == "KD, L1, seed 0" and not killed:
            killed.append(int((short / "made/seed-0/kd/.lock").read_text()))
            os.kill(*killed, signal.SIGKILL)

    made = in_processes(short, kill_one)
    assert len(killed) == 1
    (reason,) = [note for note in made.notes if "failed" in note]
    assert reason.startswith("KD, L1, seed 0 failed: its process ended with exit code -9, as when")
    assert made.tables[0].lines[1].label == "KD, L1 (1 of 2 seeds)"
    assert multiprocessing.active_children() == []
    said = call(*TO_COMPARE)
    assert said.code == 0, said
    assert_same_cells(short, compared)


@pytest.mark.slow
def test_a_stop_reaches_all_processes_after_their_step(short, monkeypatch):
    write_recipe(short / "tiny.toml", SHORT | {"train.steps": 100_000, "train.compile": False})
    reached: dict[str, int] = {}

    def note(event: dict) -> None:
        if event["kind"] == "checkpoint":
            reached[event["cell"]] = event["step"]

    with pytest.raises(Interrupted):
        in_processes(short, note, stop_requested=lambda: len(reached) == 2)
    assert len(reached) == 2
    assert multiprocessing.active_children() == []
    for title, step in reached.items():
        name = {"SPARK (paper), seed 0": "spark-paper", "QAT, seed 0": "qat"}.get(title, "")
        saved = torch.load(short / f"made/seed-0/{name}/last.pt", weights_only=True)
        assert saved["step"] == step
        assert read_events(short / f"made/seed-0/{name}/events.jsonl")[-1]["step"] == step


def test_a_stop_while_images_are_scored_waits_for_one_image_at_most(short):
    asked: list[int] = []
    scoring: list[str] = []

    def note(event: dict) -> None:
        if event["kind"] == "scoring":
            scoring.append(event["cell"])

    def second_image() -> bool:
        asked.append(len(scoring))
        return asked.count(2) == 2  # of the second cell that is scored

    def scored(stop_requested: Callable[[], bool]) -> int:
        recipe = load("tiny.toml")
        rows = choose("degraded,ptq,qat", recipe)
        options = {"report": note, "stop_requested": stop_requested}
        with suppress(Interrupted):
            compare(recipe, short / "made", methods=rows, seeds=1, **options)
        return sum((cell / "scores/test.json").exists() for cell in cells(short))

    assert scored(second_image) == 1
    assert scored(lambda: False) == 3


# Failures and mistakes ------------------------------------------------------------------------


def test_a_method_that_diverges_is_a_row_with_its_reason(short, monkeypatch):
    chosen = load("tiny.toml", ["train.steps=3"])
    forward = DistillationTask.forward

    def diverging(task, lq, gt):
        losses = forward(task, lq, gt)
        if task.norm == "l1":
            losses.reconstruction.mul_(float("nan"))
        return losses

    monkeypatch.setattr(DistillationTask, "forward", diverging)
    rows = choose("qat,kd,truth", chosen)
    made = compare(chosen, Path("made"), methods=rows, seeds=1)
    found = {line.name: line for line in made.tables[0].lines}
    assert found["kd"].psnr_db is None
    assert found["truth"].differences["psnr_db"] is not None
    (said,) = [note for note in made.notes if "failed" in note]
    assert said.startswith("KD, L1, seed 0 failed: the loss is nan and the gradient norm nan at ")
    assert "| KD, L1 | failed |" in (short / "made/comparison.md").read_text()

    monkeypatch.undo()  # it is remembered: the same training would do it again
    monkeypatch.chdir(short)
    again = compare(chosen, Path("made"), methods=rows, seeds=1)
    assert again.notes == made.notes


def test_a_seed_that_fails_leaves_the_others(copied, monkeypatch):
    (copied / "made/seed-1/kd/result.json").write_text('{"failed": "it did"}')
    shutil.rmtree(copied / "made/seed-1/kd/scores")
    assert call(*TO_COMPARE).code == 0
    kd = lines(copied)["kd"]
    assert (kd["label"], kd["seeds"]) == ("KD, L1 (1 of 2 seeds)", 1)
    assert kd["differences"]["psnr_db"] is not None


def test_what_waits_for_a_failed_method_fails_with_it(short, monkeypatch):
    def full(*_, **__):
        raise SparkirError("the disk is full")

    monkeypatch.setattr(sparkir.compare.cell, "train_student", full)
    names = ("--methods", "constant,teacher", "--baseline", "constant")
    said = call("compare", "tiny.toml", *names, "--out", "made")
    assert said.code == 0, said
    assert "SPARK (paper), seed 0 failed: the disk is full" in said.out
    assert "failed: spark-paper did not finish, from which constant:spark-paper takes" in said.out
    assert cells(short) == [short / "made/seed-0/teacher"]  # and is tried again the next time


@pytest.fixture
def refused(short: Path) -> Callable[..., None]:
    """Runs a comparison that must fail with one line that holds `says`, and change no file."""

    def run(*arguments: object, says: str) -> None:
        before = contents(short)
        said = call("compare", "tiny.toml", "--out", "made", *arguments)
        assert said.code == 1, said
        assert len(said.err.splitlines()) == 1, said.err
        assert said.err.startswith("error: ")
        assert says in said.err
        assert contents(short) == before

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "qta"], "unknown method 'qta'; did you mean 'qat'?"),
        (["--methods", "kd"], "the baseline qat is not among the methods; add it to --methods"),
        (["--methods", "kd", "--baseline", "ptq"], "choose another with --baseline: kd"),
        (["--methods", "kd", "--baseline", "kdd"], "unknown method 'kdd'; did you mean 'kd'?"),
        (["--seeds", 0], "--seeds 0 --jobs 1: give 1 or more of each"),
        (["--jobs", 0], "--seeds 1 --jobs 0"),
        (["--test", "Set5"], "--test 'Set5': write it as NAME=DIR"),
        (["--test", "a/b=test"], "--test 'a/b=test': write it as NAME=DIR"),
        (["--test", "test=train"], "there is a test set test already; rename it"),
        (["--test", "more=nowhere"], "cannot list nowhere"),
        (["--set", "data.train=nowhere"], "cannot list nowhere"),
        (["--set", "train.step=1"], "did you mean 'train.steps'?"),
        (["--set", "weighting.options.gird=1"], "'spark-paper' has no option 'gird'"),
        (["--set", "teacher.weights=none.pth"], "none.pth"),
    ],
)
def test_a_mistake_costs_one_line_and_leaves_nothing(refused, arguments, says):
    refused(*arguments, says=says)


def test_a_recipe_without_a_teacher(refused, short):
    write_recipe(short / "tiny.toml", without=["teacher", "distill", "weighting", "baselines"])
    refused("--methods", "qat,kd", says="the recipe has no [teacher], which is needed by kd")


def test_a_recipe_in_float(refused, short):
    write_recipe(short / "tiny.toml", without=["quant", "baselines"])
    refused(says="compare is for quantized students; add a [quant]")


def test_a_test_image_too_small_to_measure(refused, short):
    save_image(short / "small/e.png", photo(12, 40, 1))
    refused("--test", "small=small", says="test image e: SSIM needs at least 11 x 11 px")


def refuse_again(folder: Path, *arguments: object) -> str:
    before = contents(folder)
    said = call(*TO_COMPARE, *arguments)
    assert said.code == 1, said
    assert contents(folder) == before
    return said.err


def test_a_folder_of_another_recipe(copied):
    said = refuse_again(copied, "--set", "train.steps=7")
    assert "made holds a comparison of another recipe: train.steps: 6 -> 7. Go on with" in said


def test_a_folder_of_a_run(copied):
    (copied / "made/events.jsonl").touch()
    assert "made holds a run, not a comparison" in refuse_again(copied)


def test_a_folder_of_something_else(refused, short):
    save_image(short / "made/x.png", photo(8, 8, 0))
    refused(says="made is not empty and holds no run; choose another --out")


def test_a_cell_of_another_recipe(copied):
    write_recipe(copied / "made/seed-0/kd/recipe.toml", SHORT)
    said = refuse_again(copied)
    assert "made/seed-0/kd was made by another recipe: " in said
    assert "distill.norm: 'mse' -> 'l1'" in said
    assert "Delete that folder to make it again" in said


def test_a_control_of_a_spark_that_is_gone(copied):
    shutil.rmtree(copied / "made/seed-1/spark-paper")
    said = refuse_again(copied)
    assert "spark-paper did not finish" in said
    assert "delete made/seed-1/constant-spark-paper to make it again" in said


def refuse_under_another_teacher(folder: Path) -> str:
    torch.manual_seed(1)
    teacher = build("edsr", **RECIPE["teacher"]["options"])
    sparkir.assemble.save_weights(teacher, folder / "teacher.safetensors", {})
    return refuse_again(folder)


def test_another_teacher_than_the_finished_cells_had(copied):
    shutil.rmtree(copied / "made/seed-0/kd")
    said = refuse_under_another_teacher(copied)
    assert (
        "not what the finished methods in made/seed-0 had: the student's first weights, the tea"
        in said
    )


def test_another_teacher_than_the_finished_seeds_had(copied):
    shutil.rmtree(copied / "made/seed-1")
    said = refuse_under_another_teacher(copied)
    assert "not what the finished methods in made/seed-0 had: the teacher. New ones could" in said


def test_a_damaged_score_file(copied):
    (copied / "made/seed-0/kd/scores/test.json").write_text("{")
    said = refuse_again(copied)
    assert "cannot read made/seed-0/kd/scores/test.json" in said
    assert "delete it to make it again" in said


def test_images_that_were_changed_between_two_scorings(copied):
    (copied / "test/d.png").rename(copied / "test/e.png")
    shutil.rmtree(copied / "made/seed-0/kd/scores")
    said = call(*TO_COMPARE)
    assert said.code == 1
    assert "kd and qat were scored on different images" in said.err


def test_pixels_that_were_changed_between_two_scorings(copied):
    save_image(copied / "test/d.png", photo(40, 48, 77))
    shutil.rmtree(copied / "made/seed-0/kd/scores")
    said = call(*TO_COMPARE)
    assert said.code == 1
    assert "the images of test have changed since some methods were scored; delete" in said.err
    for file in copied.glob("made/seed-*/*/scores/test.json"):
        file.unlink()
    assert call(*TO_COMPARE).code == 0


def test_an_unfinished_comparison_says_what_of_it_is_done(compared):
    """For whoever follows it."""
    for cell in cells(compared):
        assert read_events(cell / "events.jsonl")[-1]["kind"] == "done"


def test_names_of_test_sets():
    recipe = load("demo")
    assert sets_of(recipe, ["Set5=a/b=c"]) == {
        "photographs-test": "photographs:test",
        "Set5": "a/b=c",
    }


# What a record keeps --------------------------------------------------------------------------


def test_a_comparison_goes_on_from_its_record(compared, copied, monkeypatch):
    """The same tables from the kept scores, and more methods and seeds beside them."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "records/reproduction")
    kept = importlib.import_module("kept")
    kept.keep(copied / "made", copied / "record", {"data": copied})
    shutil.rmtree(copied / "made")
    tests = ["more=train"]
    kept.take_up(copied / "record", copied / "made", "tiny.toml", [], tests)
    trained = []
    monkeypatch.setattr(
        sparkir.compare.cell,
        "train_student",
        lambda recipe, *rest, **options: (
            trained.append(recipe.seed) or train_student(recipe, *rest, **options)
        ),
    )
    assert call(*TO_COMPARE, "--test", "more=train").code == 0
    assert trained == []
    for name in ("comparison.csv", "images.csv"):
        assert (copied / "made" / name).read_bytes() == (compared / "made" / name).read_bytes()

    more = ("--methods", "qat,kd,constant,kd-matched", "--seeds", 3, "--test", tests[0])
    assert call("compare", "tiny.toml", *more, "--out", "made").code == 0
    assert trained == [0, 1, 2, 2, 2, 2, 2]
    assert [line["seeds"] for line in lines(copied).values()] == [3] * 5


# LPIPS ----------------------------------------------------------------------------------------


def test_lpips_is_measured_as_soon_as_it_can_be(copied, no_training, monkeypatch):
    """A stand-in for the metric: the plumbing is what is tested."""

    def metric(output, target):
        return float(np.abs(output.astype(float) - target).mean())

    found = Lpips(metric, "LPIPS of a kind")
    for module in (sparkir.compare.cell, sparkir.compare.tabulate):
        monkeypatch.setattr(module, "find_lpips", lambda: found)
    said = call(*TO_COMPARE)
    assert said.code == 0, said
    assert "LPIPS of a kind." in said.out
    assert "No LPIPS" not in said.out
    kd = lines(copied)["kd"]
    assert kd["lpips"] > 0
    assert kd["differences"]["lpips"] is not None
    assert scores(copied / "made/seed-0/kd")["lpips"] == "LPIPS of a kind"
    monkeypatch.undo()  # and kept where it cannot be measured any more
    monkeypatch.chdir(copied)
    assert call(*TO_COMPARE).code == 0
    assert lines(copied)["kd"]["lpips"] == kd["lpips"]
