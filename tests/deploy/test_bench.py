"""Benchmarks: who runs when, what a median is, what a row says, and real runtimes at tiny sizes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import Deployed, deploy, images
from torch import nn

from sparkir.deploy.bench import cores, fitting, interleaved, measure, plan_of, require_sizes
from sparkir.deploy.card import Card
from sparkir.deploy.contenders import (
    Contender,
    executorch_contender,
    float_contenders,
    installed,
    integer_contenders,
    notes_on,
    open_contender,
    torch_contenders,
)
from sparkir.deploy.onnx import to_float_onnx, write_model
from sparkir.deploy.peak import Peak, peak_of
from sparkir.deploy.results import (
    HEADER,
    LEAD_IN_S,
    Benchmark,
    Plan,
    Row,
    cells,
    ratio_of,
    reference_of,
    write_json,
)
from sparkir.deploy.session import open_session
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts
from sparkir.models.registry import build

FACTS = ModelFacts(name="toy", scale=2, channels=3, value_range=255.0, taps=(), halo_px=1)
TINY = Plan(sizes_px=((16, 24),), repeats=2, threads=1)


def ignore(event: dict) -> None:
    """Report nothing."""


class Clock:
    """Moves only when somebody works."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Worker:
    """Takes `durations_s`, the last one for ever, and notes when it was called."""

    def __init__(self, name: str, clock: Clock, calls: list[str], *durations_s: float) -> None:
        self.name, self.clock, self.calls = name, clock, calls
        self.durations_s = list(durations_s)

    def __call__(self, lq: np.ndarray) -> None:
        self.calls.append(self.name)
        many = len(self.durations_s) > 1
        self.clock.now_s += self.durations_s.pop(0) if many else self.durations_s[0]


def toy(engine="onnxruntime", arithmetic="float32", **values) -> Contender:
    return Contender(engine=engine, arithmetic=arithmetic, file="toy.onnx", **values)


def row(engine, arithmetic, *samples_ms, size_px=(10, 100), **values) -> Row:
    contender = toy(engine, arithmetic)
    return Row(contender=contender, size_px=size_px, samples_ms=samples_ms, **values)


# Timing ---------------------------------------------------------------------------------------


def test_contenders_take_turns_and_each_round_begins_with_another():
    clock, calls = Clock(), []
    runs = {i: Worker(name, clock, calls, 1.0) for i, name in enumerate("abc")}
    interleaved(runs, np.zeros(1), 4, ignore, clock)
    assert calls[::2] == calls[1::2], "an untimed run comes before each timed one"
    assert "".join(calls[1::2]) == "abcbcacababc"


def test_only_the_run_after_the_lead_in_counts():
    clock, calls = Clock(), []
    slow_start = Worker("a", clock, calls, 3.0, 0.25, 5.0, 0.5)
    samples, failures = interleaved({0: slow_start}, np.zeros(1), 2, ignore, clock)
    assert samples == {0: [250.0, 500.0]}
    assert not failures


def test_a_fast_contender_leads_in_for_long_enough():
    clock, calls = Clock(), []
    interleaved({0: Worker("a", clock, calls, LEAD_IN_S / 7.5)}, np.zeros(1), 1, ignore, clock)
    assert len(calls) == 8 + 1


def test_one_that_fails_midway_is_left_out_and_the_others_go_on():
    clock, calls = Clock(), []

    def failing(lq: np.ndarray) -> None:
        if clock.now_s > 4:
            raise MemoryError
        clock.now_s += 1

    runs = {0: failing, 1: Worker("b", clock, calls, 1.0)}
    samples, failures = interleaved(runs, np.zeros(1), 3, ignore, clock)
    assert failures == {0: "MemoryError"}
    assert samples[1] == [1000.0] * 3


def test_rows_hold_medians_and_the_reasons_of_those_that_fail():
    clock = Clock()
    contenders = [
        toy(),
        toy(arithmetic="integer"),
        toy("openvino"),
        toy("executorch", size_px=(8, 8)),
        toy("torch", failure="is broken"),
    ]
    opened, peaked = [], []

    def opener(contender: Contender, *, threads: int):
        opened.append(contender.label)
        assert threads == 3
        if contender.arithmetic == "integer":
            raise RuntimeError("cannot\nopen")
        # two warm-up runs, then lead-in and timed run in turn
        return Worker("a", clock, [], 9.0, 9.0, 1.0, 0.3, 1.0, 0.1, 1.0, 0.2)

    def peak(contender: Contender, shape, *, white: float, threads: int) -> Peak:
        peaked.append(contender.label)
        assert (shape, white, threads) == ((1, 3, 10, 20), 255.0, 3)
        return Peak(None, "out of memory") if contender.engine == "openvino" else Peak(1.5)

    plan = Plan(sizes_px=((10, 20),), repeats=3, threads=3)
    rows = measure(contenders, FACTS, plan, ignore, clock=clock, opener=opener, peak=peak)
    assert opened == ["ONNX Runtime float32", "ONNX Runtime integer"]
    assert peaked == [*opened, "OpenVINO float32"]
    assert [r.failure for r in rows] == ["", "cannot open", "out of memory", "is broken"]
    assert rows[0].median_ms == pytest.approx(200)
    assert rows[0].megapixels_per_s == pytest.approx(200 / 0.2 / 1e6)
    assert rows[0].peak_mib == 1.5
    assert all(r.median_ms is None and r.megapixels_per_s is None for r in rows[1:])


# Comparing ------------------------------------------------------------------------------------


def test_rows_are_compared_with_torch_else_with_float_in_the_same_runtime():
    torch_row = row("torch", "float32", 40.0)
    float_row, integer = row("openvino", "float32", 20.0), row("openvino", "integer", 5.0)
    other_size = row("torch", "float32", 1.0, size_px=(1, 1))
    everything = [other_size, torch_row, float_row, integer]
    assert reference_of(integer, everything) is torch_row
    assert ratio_of(integer, everything) == 8
    failed = row("torch", "float32", failure="no")
    assert ratio_of(integer, [other_size, failed, float_row, integer]) == 4
    assert ratio_of(integer, [row("onnxruntime", "float32", 3.0), integer]) is None
    assert ratio_of(failed, everything) is None


def test_a_row_as_text():
    contender = toy(
        arithmetic="integer",
        file_bytes=2048,
        layers=4,
        float_layers=1,
        integer_share=0.5,
        notes=("made for another",),
    )
    shown = Row(contender=contender, size_px=(10, 100), samples_ms=(2.0,), peak_mib=3.4)
    expected = ["2.00", "0.50", "-", "3", "2", "50%", "1/4"]
    assert cells(shown, [shown]) == ["ONNX Runtime integer\n  made for another", *expected]
    failed = row("torch", "float32", failure="no memory")
    assert cells(failed, [])[0] == "torch float32\n  failed: no memory"
    assert cells(failed, [])[1:] == ["-"] * (len(HEADER) - 1)


@pytest.mark.parametrize(
    ("quantization", "target", "engine", "in_float", "notes"),
    [
        ("W8A8", "onnxruntime", "onnxruntime", 0, []),
        ("W8A8", "portable", "onnxruntime", 0, []),
        ("W8A8", "openvino", "openvino", 0, []),
        ("W8A8", "onnxruntime", "openvino", 0, ["made for ONNX Runtime on the CPU, not for"]),
        ("W8A8", "tensorrt", "onnxruntime", 0, ["made for TensorRT, not for ONNX Runtime"]),
        ("W8A8", "", "onnxruntime", 0, ["does not say what it was made for"]),
        ("W8A8", "onnxruntime", "onnxruntime", 2, ["2 of 5 convolutions run in float"]),
        ("W8A8", "onnxruntime", "onnxruntime", 5, ["an integer network simulated"]),
        ("W4A8", "onnxruntime", "onnxruntime", 0, ["stored in 4 bits, computed in int8"]),
        ("W3A8", "onnxruntime", "onnxruntime", 0, ["weights of 3 bits, stored in 4 bits"]),
        ("W7A8", "openvino", "openvino", 0, ["weights of 7 bits, stored in 8 bits"]),
        ("W4A8", "portable", "executorch", 0, ["stored in 8 bits, computed in int8"]),
    ],
)
def test_what_keeps_a_speed_from_being_that_of_integers_is_said(
    quantization, target, engine, in_float, notes
):
    card = Card(facts=FACTS, quantization=quantization, target=target)
    found = notes_on(card, engine, layers=5, float_layers=in_float)
    assert len(found) == len(notes)
    for text, part in zip(found, notes, strict=True):
        assert part in text


# A user's words -------------------------------------------------------------------------------


def test_a_plan():
    plan = plan_of(["16x24", " 8X9", "16x24"], repeats=3, threads=None)
    assert plan == Plan(sizes_px=((16, 24), (8, 9)), repeats=3, threads=cores())
    assert plan_of([], repeats=1, threads=2).sizes_px == ((180, 320), (540, 960))


@pytest.mark.parametrize("size", ["16", "16x", "0x16", "-4x8", "16 by 24", "1e3x4", ""])
def test_what_is_no_size(size):
    with pytest.raises(SparkirError, match="height x width in pixels, as in 540x960"):
        plan_of([size], repeats=1, threads=1)


@pytest.mark.parametrize(("repeats", "threads", "named"), [(0, 1, "repeats"), (1, 0, "threads")])
def test_numbers_below_one(repeats, threads, named):
    with pytest.raises(SparkirError, match=f"--{named} 0: give a whole number of at least 1"):
        plan_of([], repeats=repeats, threads=threads)


def test_sizes_that_the_network_cannot_take():
    facts = replace(FACTS, size_multiple=8, min_size_px=20)
    require_sizes([(24, 32)], facts)
    with pytest.raises(SparkirError, match=r"24x30 is no such size; give --size 24x32"):
        require_sizes([(24, 32), (24, 30)], facts)
    with pytest.raises(SparkirError, match=r"give --size 24x24"):
        require_sizes([(8, 16)], facts)


def test_default_sizes_are_made_to_fit_and_a_users_are_not():
    facts = replace(FACTS, size_multiple=16)
    assert fitting(plan_of([], repeats=1, threads=1), facts).sizes_px == ((192, 320), (544, 960))
    own = plan_of(["180x320"], repeats=1, threads=1)
    assert fitting(own, facts) == own


# Real runtimes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin() -> nn.Module:
    return build("edsr", width=8, blocks=1, scale=2)


@pytest.fixture(scope="module")
def twin_file(twin, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("twin") / "twin.onnx"
    write_model(to_float_onnx(twin), path)
    return path


@pytest.fixture(scope="module")
def edsr_w4() -> Deployed:
    return deploy("edsr", 4)


@pytest.mark.parametrize("shape", [(1, 15, 16), (2, 40, 23)])
def test_the_float_file_is_the_float_network(twin, twin_file, shape):
    x = images(twin.facts, *shape)
    session = open_session(twin_file)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(x.numpy())[0]), twin(x))
    assert session.metadata["quantization"] == "float"
    assert twin.training, "the network keeps its mode"


def test_a_network_that_cannot_be_exported():
    class Undecided(nn.Module):
        facts = FACTS

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(SparkirError, match="toy cannot be exported to ONNX"):
        to_float_onnx(Undecided())


def test_every_runtime_is_measured(twin, twin_file, edsr_w4, tmp_path):
    torch.save(twin, tmp_path / "twin.pt")
    file = tmp_path / "student.onnx"
    write_model(edsr_w4.model, file)
    card = Card(facts=twin.facts, quantization="W4A4", target="onnxruntime")
    contenders = [
        *torch_contenders(tmp_path / "twin.pt"),
        *float_contenders(twin_file),
        *integer_contenders(file, card),
    ]
    rows = measure(contenders, twin.facts, TINY, ignore, peak=lambda *a, **k: Peak(1.0))
    by_label = {r.contender.label: r for r in rows}
    assert len(by_label) == len(contenders) >= 5
    bf16_failure = by_label.pop("OpenVINO bfloat16", rows[0]).failure
    assert bf16_failure in ("", "this processor has no bfloat16 arithmetic for OpenVINO")
    for label, found in by_label.items():
        assert not found.failure, label
        assert len(found.samples_ms) == 2
    integer = by_label["ONNX Runtime integer"].contender
    assert 0 < integer.integer_share < 1
    assert (integer.layers, integer.float_layers) == (6, 0)
    assert integer.file_bytes == file.stat().st_size
    assert integer.notes == ("weights of 4 bits, stored in 4 bits, computed in int8",)
    if installed("openvino"):
        assert "not for OpenVINO" in by_label["OpenVINO integer"].contender.notes[0]
    path = tmp_path / "new" / "bench.json"
    write_json(Benchmark(model="m", plan=TINY, rows=rows), path)
    values = json.loads(path.read_text())
    assert [r["label"] for r in values["rows"]] == [c.label for c in contenders]
    assert values["plan"]["threads"] == 1
    assert values["versions"]["onnxruntime"]
    assert values["versions"]["processor"]
    assert values["rows"][0]["times_as_fast"] == 1
    assert len(values["rows"][0]["samples_ms"]) == 2


def test_eager_torch_computes_the_network_in_each_arithmetic(twin, tmp_path):
    torch.save(twin, tmp_path / "twin.pt")
    x = images(twin.facts, 1, 16, 24)
    with torch.no_grad():
        expected = twin(x)
    kinds = {}
    for contender in torch_contenders(tmp_path / "twin.pt"):
        kinds[contender.arithmetic] = open_contender(contender, threads=1)(x.numpy())
    torch.testing.assert_close(kinds["float32"], expected)
    torch.testing.assert_close(kinds["float32 channels_last"], expected)
    assert not torch.equal(kinds["bfloat16 channels_last"].float(), expected)


@pytest.mark.slow
def test_executorch(edsr_w4, tmp_path):
    pytest.importorskip("executorch")
    contender = executorch_contender(edsr_w4.frozen, (16, 24), tmp_path)
    if contender.failure:
        pytest.fail(contender.failure)
    assert contender.file_bytes == (tmp_path / "16x24.pte").stat().st_size
    assert 0 < contender.integer_share <= 1
    assert (contender.layers, contender.float_layers) == (6, 0)
    assert "stored in 8 bits" in contender.notes[-1]
    plan = Plan(sizes_px=((16, 24), (32, 24)), repeats=1, threads=os.cpu_count())
    (only,) = measure([contender], edsr_w4.facts, plan, ignore, peak=lambda *a, **k: Peak(1.0))
    assert (only.size_px, only.failure, len(only.samples_ms)) == ((16, 24), "", 1)
    with pytest.raises(SparkirError, match=r"takes all \d+ cores, not \d+; measure it without"):
        open_contender(contender, threads=os.cpu_count() + 1)


def test_an_executorch_program_that_cannot_be_made(edsr_w4, tmp_path):
    contender = executorch_contender(edsr_w4.frozen, (0, 0), tmp_path)
    assert contender.failure


def test_a_file_that_no_runtime_opens(edsr_w4, tmp_path):
    broken = onnx.ModelProto()
    broken.CopyFrom(edsr_w4.model)
    broken.graph.node[3].op_type = "Nonsense"
    (tmp_path / "broken.onnx").write_bytes(broken.SerializeToString())
    card = Card(facts=edsr_w4.facts, quantization="W4A4", target="onnxruntime")
    contenders = integer_contenders(tmp_path / "broken.onnx", card)
    assert contenders
    assert all(c.failure for c in contenders)
    rows = measure(contenders, edsr_w4.facts, TINY, ignore)
    assert all(r.failure and r.peak_mib is None for r in rows)


# Memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_memory_is_the_childs_own_and_grows_with_the_image(twin_file):
    (contender, *_) = float_contenders(twin_file)
    ballast = bytearray(os.urandom(1024)) * (400 * 1024)  # the child must not inherit this peak
    small, large = (peak_of(contender, (1, 3, s, s), threads=1) for s in (16, 512))
    assert len(ballast) == 400 * 2**20
    assert not small.failure
    assert not large.failure
    outputs_mib = 512 * 512 * 8 * 4 / 2**20
    assert 0 < small.mib < large.mib < 350
    assert large.mib - small.mib > outputs_mib


def test_a_child_that_fails_gives_its_reason(tmp_path):
    contender = replace(toy(), file=str(tmp_path / "gone.onnx"))
    peak = peak_of(contender, (1, 3, 8, 8), threads=1)
    assert peak.mib is None
    assert "there is no file" in peak.failure


def test_a_child_that_is_killed(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    peak = peak_of(toy(), (1, 3, 8, 8), threads=1)
    assert peak == Peak(None, "killed by signal 9, as for want of memory")
