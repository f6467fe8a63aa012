"""A comparison's figures against hand computation, and what the table looks like in every form."""

import csv
import io
import itertools
from dataclasses import replace

import numpy as np
import pytest

from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import ImageScore
from sparkir.report.comparison import Entry, lines_of
from sparkir.report.comparison_text import SetTable, columns, to_csv, to_latex, to_markdown


def scores(*rows: list[float], lpips: bool = False) -> dict[int, list[ImageScore]]:
    """PSNR of every image, a row for each seed; SSIM is a hundredth of it, LPIPS 1 / it."""
    return {
        seed: [
            ImageScore(name=name, psnr_db=db, ssim=db / 100, lpips=1 / db if lpips else None)
            for name, db in zip("abc", row, strict=False)
        ]
        for seed, row in enumerate(rows)
    }


QAT = Entry(
    name="qat",
    label="QAT",
    scores=scores([30.0, 32.0], [31.0, 33.0]),
    as_trained=scores([30.1, 32.1], [31.1, 33.1]),
    step_ms={0: 10.0, 1: 30.0},
)
KD = Entry(
    name="kd-mse@1",
    label="KD, 1 x MSE",
    scores=scores([30.5, 32.1], [31.2, 33.4]),
    step_ms={0: 30.0, 1: 30.0},
)
STRONG = replace(
    KD, name="kd-mse@20", label="KD, 20 x MSE", scores=scores([30.5, 32.1], [31.0, 33.0])
)
DEGRADED = Entry(name="degraded", label="degraded_input", scores=scores([20.0, 21.0], [20.0, 21.0]))


def line(name: str, entries: list[Entry], baseline: str = "qat"):
    return next(x for x in lines_of(entries, baseline=baseline) if x.name == name)


def test_means_and_differences_by_hand():
    found = line("kd-mse@1", [QAT, KD])
    assert found.psnr_db == pytest.approx((30.5 + 32.1 + 31.2 + 33.4) / 4)
    assert found.ssim == pytest.approx(found.psnr_db / 100)
    assert found.lpips is found.differences["lpips"] is None
    assert found.differences["psnr_db"].mean == pytest.approx((0.5 + 0.1 + 0.2 + 0.4) / 4)
    assert found.differences["ssim"].mean == pytest.approx(0.003)
    assert (found.seeds, found.images) == (2, 2)
    assert found.step_ms == pytest.approx(30.0)
    assert found.cost == pytest.approx(1.5)
    assert found.psnr_db_as_trained is None
    assert line("qat", [QAT, KD]).psnr_db_as_trained == pytest.approx(31.6)
    assert line("qat", [QAT, KD]).cost == 1.0
    assert line("degraded", [QAT, DEGRADED]).cost is None


def test_the_interval_is_that_of_every_possible_resample():
    """Two seeds and two images have 16 equally likely resamples."""
    differences = np.array([[0.5, 0.1], [0.2, 0.4]])
    means = [
        differences[np.ix_(seeds, images)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for images in itertools.product(range(2), repeat=2)
    ]
    low, high = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    found = line("kd-mse@1", [QAT, KD]).differences["psnr_db"]
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert found.low <= found.mean <= found.high


def test_the_baseline_is_any_method_and_has_no_difference_itself():
    against = lines_of([QAT, KD], baseline="kd-mse@1")
    assert against[0].differences["psnr_db"].mean == pytest.approx(-0.3)
    assert set(against[1].differences.values()) == {None}


def test_pairs_are_of_the_seeds_that_both_have():
    half = replace(KD, scores={1: KD.scores[1]})
    found = line("kd-mse@1", [QAT, half])
    assert found.seeds == 1
    assert found.psnr_db == pytest.approx((31.2 + 33.4) / 2)
    assert found.differences["psnr_db"].mean == pytest.approx(0.3)
    none = replace(KD, scores={})
    found = line("kd-mse@1", [QAT, none])
    assert found.psnr_db is found.differences["psnr_db"] is None
    assert line("kd-mse@1", [replace(QAT, scores={}), KD]).differences["psnr_db"] is None


def test_lpips_is_compared_where_both_have_it():
    with_it = replace(KD, scores=scores([20.0, 40.0], [20.0, 40.0], lpips=True))
    assert line("kd-mse@1", [QAT, with_it]).lpips == pytest.approx(0.0375)
    assert line("kd-mse@1", [QAT, with_it]).differences["lpips"] is None
    base = replace(QAT, scores=scores([50.0, 50.0], [50.0, 50.0], lpips=True))
    assert line("kd-mse@1", [base, with_it]).differences["lpips"].mean == pytest.approx(0.0175)


def test_other_images_are_refused():
    moved = replace(KD, scores={0: KD.scores[0][::-1], 1: KD.scores[1]})
    with pytest.raises(SparkirError, match=r"kd-mse@1 and qat were scored on different images.*to"):
        lines_of([QAT, moved], baseline="qat")


def test_an_image_without_error_has_no_difference_but_stays_in_the_table():
    perfect = replace(KD, scores=scores([float("inf"), 32.0], [31.0, 33.0]))
    found = line("kd-mse@1", [QAT, perfect])
    assert found.psnr_db == float("inf")
    assert found.differences["psnr_db"] is None
    assert "inf" in to_markdown([table([QAT, perfect])], "t", [])


def test_the_best_strength_is_marked_and_a_single_one_is_not():
    assert [x.best_of_family for x in lines_of([QAT, KD, STRONG], baseline="qat")] == [0, 1, 0]
    assert [x.best_of_family for x in lines_of([QAT, STRONG], baseline="qat")] == [0, 0]
    failed = replace(KD, scores={})
    assert [x.best_of_family for x in lines_of([QAT, failed, STRONG], baseline="qat")] == [0, 0, 0]


def test_the_best_is_one_of_its_kind_and_of_as_many_trainings():
    half = replace(STRONG, scores={0: scores([40.0, 40.0])[0]})  # one seed, an easy one
    assert [x.best_of_family for x in lines_of([QAT, KD, half], baseline="qat")] == [0, 0, 0]
    truth = replace(STRONG, name="truth", scores=scores([40.0, 40.0], [40.0, 40.0]))
    once, more = replace(KD, name="truth@1"), replace(STRONG, name="truth@20")
    found = lines_of([QAT, truth, once, more], baseline="qat")
    assert [x.best_of_family for x in found] == [0, 0, 1, 0]


# As text --------------------------------------------------------------------------------------


def table(entries: list[Entry], **changes) -> SetTable:
    lines = lines_of(entries, baseline="qat")
    made = SetTable(
        name="Set5", convention="PSNR-Y", baseline="QAT", lines=lines, notes=["50 % off"]
    )
    return replace(made, **changes)


def test_markdown():
    text = to_markdown([table([DEGRADED, QAT, KD, STRONG])], "mine", ["missing: kd"])
    lines = text.splitlines()
    assert lines[:5] == ["# mine", "", "## Set5", "", "PSNR-Y; SSIM alike."]
    head, rule, *rows = [x.strip("|").split("|") for x in lines if x.startswith("|")]
    assert len({len(cells) for cells in (head, rule, *rows)}) == 1
    kd = [cell.strip() for cell in rows[2]]
    assert kd[:3] == ["KD, 1 x MSE *", "31.800", "0.3180"]
    assert kd[3].startswith("+0.300 [+0.1")
    assert kd[-2:] == ["", "1.50"]
    assert [cell.strip() for cell in rows[1]][3:] == ["", "", "31.600", "1.00"]
    assert "- 50 % off" in lines
    assert lines[-3:] == ["## Notes", "", "- missing: kd"]


def test_a_failed_method_says_so():
    text = to_markdown([table([QAT, replace(KD, scores={}, step_ms={})])], "mine", [])
    assert "| KD, 1 x MSE | failed |  |  |  |  |  |" in text


def test_lpips_is_a_column_only_where_it_was_measured():
    plain, measured = (
        table([replace(QAT, scores=scores([30.0, 32.0], lpips=lpips))]) for lpips in (False, True)
    )
    assert not any("LPIPS" in column.title for column in columns(plain))
    assert sum("LPIPS" in column.title for column in columns(measured)) == 2
    assert sum("LPIPS" in column.title for column in columns(measured, brief=True)) == 1


def test_latex_escapes_and_counts_its_columns():
    text = to_latex([table([DEGRADED, QAT, KD, STRONG])], "a_b", ["100 % of {it} ~ ^ \\ #1 & $2"])
    assert r"degraded\_input" in text
    assert r"KD, 1 x MSE $^{*}$" in text
    said = r"100 \% of \{it\} \textasciitilde{} \textasciicircum{} \textbackslash{} \#1 \& \$2"
    assert said in text
    assert r"\caption{a\_b, Set5. PSNR-Y; SSIM alike. 50 \% off 100" in text
    rows = [x for x in text.splitlines() if x.endswith(r"\\")]
    assert len(rows) == 5
    assert {row.replace(r"\&", "").count("&") for row in rows} == {6}
    assert r"\begin{tabular}{lrrrrrr}" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1


def test_csv_has_every_digit_and_every_set():
    made = [table([QAT, KD]), table([QAT, KD], name="Set14")]
    rows = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert [(row["set"], row["method"]) for row in rows] == [
        *(("Set5", "qat"), ("Set5", "kd-mse@1"), ("Set14", "qat"), ("Set14", "kd-mse@1"))
    ]
    found = made[0].lines[1]
    assert float(rows[1]["psnr_db"]) == found.psnr_db
    assert float(rows[1]["psnr_db_difference_low"]) == found.differences["psnr_db"].low
    assert float(rows[1]["ssim_difference_high"]) == found.differences["ssim"].high
    assert float(rows[1]["step_cost"]) == found.cost
    assert rows[0]["psnr_db_difference"] == rows[1]["lpips"] == ""
