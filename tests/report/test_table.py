"""The table: its text, and the values behind it."""

import json

import pytest

from sparkir.evaluate.benchmark import ImageScore
from sparkir.report.table import HEADER, Row, cells, to_markdown


def row(name: str = "QAT W4A4", **changes) -> Row:
    scores = [
        ImageScore(name="one", psnr_db=30.0, ssim=0.9),
        ImageScore(name="two", psnr_db=31.0, ssim=0.8),
    ]
    return Row(**{"name": name, "arithmetic": "integer", "scores": scores} | changes)


def test_a_row_is_the_mean_over_images():
    assert row().psnr_db == pytest.approx(30.5)
    assert row().ssim == pytest.approx(0.85)


def test_the_cells_stand_under_their_headings():
    texts = dict(zip(HEADER, cells(row(size_bytes=5 * 1024 + 100)), strict=True))
    assert texts == {
        "": "QAT W4A4",
        "computed in": "integer",
        "PSNR dB": "30.500",
        "SSIM": "0.8500",
        "weights": "5 KiB",
    }


def test_what_has_no_weights_has_no_size():
    assert cells(row(size_bytes=None))[-1] == ""
    assert cells(row(size_bytes=0))[-1] == "0 KiB"


def test_the_values_hold_the_means_and_every_image():
    values = row(size_bytes=7).as_values()
    assert values["psnr_db"] == pytest.approx(30.5)
    assert values["ssim"] == pytest.approx(0.85)
    assert values["scores"][1] == {"name": "two", "psnr_db": 31.0, "ssim": 0.8, "lpips": None}
    assert (values["name"], values["arithmetic"], values["size_bytes"]) == (
        "QAT W4A4",
        "integer",
        7,
    )
    assert json.loads(json.dumps(values)) == values


def test_the_convention_stands_above_the_table():
    lines = to_markdown([row()], "PSNR-Y studio range").splitlines()
    assert lines[:2] == ["PSNR-Y studio range", ""]
    assert lines[2].startswith("|")


def test_the_table_is_markdown():
    text = to_markdown([row("a"), row("b"), row("c")], "caption")
    assert text.endswith("|\n")
    table = text.splitlines()[2:]
    assert len(table) == 2 + 3
    parts = [line.split("|") for line in table]
    assert {len(part) for part in parts} == {len(HEADER) + 2}
    assert all(part[0] == part[-1] == "" for part in parts)
    assert [cell.strip() for cell in parts[1][1:-1]] == ["---", "---", "---:", "---:", "---:"]
    assert [part[1].strip() for part in parts[2:]] == ["a", "b", "c"]


def test_a_name_cannot_add_a_column():
    (line,) = to_markdown([row("a|b")], "caption").splitlines()[4:]
    assert line.startswith("| a\\|b | integer |")
