"""What the commands say of known sets of images, and where they find their parts."""

from pathlib import Path

import pytest

from helpers import call, contents, photo, save_image
from sparkir import cli
from sparkir.data.catalog import CATALOG

pytest_plugins = ["helpers"]


@pytest.fixture
def div2k(project: Path) -> Path:
    """Its validation images, but for two."""
    for number in set(range(801, 901)) - {805, 900}:
        save_image(project / "DIV2K/DIV2K_valid_HR" / f"{number:04d}.png", photo(12, 12, 0))
    return project / "DIV2K"


@pytest.mark.parametrize("named", [[], ["--as", "div2k"]])
def test_check_says_what_a_set_lacks(div2k, named):
    before = contents(div2k)
    said = call("check", "--data", "DIV2K", *named)
    assert said.code == 1
    assert said.err == "not what its authors distribute\n"
    assert said.out.splitlines() == [
        "DIV2K, for super-resolution",
        "train: not here (800 images; DIV2K_train_HR)",
        "test: 98 of 100 images in DIV2K/DIV2K_valid_HR; missing 0805, 0900",
        "from https://data.vision.ee.ethz.ch/cvl/DIV2K/",
        "terms: academic research only; copyright stays with the photographs' owners",
    ]
    assert contents(div2k) == before


def test_check_says_that_a_set_is_complete(div2k):
    for number in (805, 900):
        save_image(div2k / "DIV2K_valid_HR" / f"{number:04d}.png", photo(12, 12, 0))
    said = call("check", "--data", "DIV2K")
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1] == "complete"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["say what to check", "--data DIR"]),
        (["--data", "gone"], ["no folder gone"]),
        (["--data", "train"], ["train looks like no known set", "--as: DIV2K, "]),
        (["--data", "train", "--as", "DIV3K"], ["'DIV3K'", "did you mean 'DIV2K'?"]),
        (["--data", "train", "--as", "DIV2K"], ["train holds nothing of DIV2K", "800 images"]),
        (["tiny.toml", "--as", "DIV2K"], ["--as is for checking a folder alone"]),
    ],
)
def test_a_mistake_in_what_to_check(project, arguments, says):
    before = contents(project)
    said = call("check", *arguments)
    assert said.code == 1
    assert said.err.startswith("error: ")
    for words in says:
        assert words in said.err
    assert contents(project) == before


def test_sets_lists_every_set(project):
    said = call("sets")
    assert said.code == 0
    for known in CATALOG:
        assert f"{known.name} {known.task}: " in said.text
    assert "LOLv1 low light: train 485 pairs, test 15 pairs" in said.text


def test_sets_says_everything_about_one(project):
    said = call("sets", "rain100h")
    assert said.code == 0
    (known,) = (known for known in CATALOG if known.name == "Rain100H")
    for words in (known.source, known.terms, known.notes, *(part.where for part in known.parts)):
        assert words in said.out
    assert call("sets", "rain100x").err.startswith("error: no set is called 'rain100x'")


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("our485", "eval15"), ("DIV2K_train_HR", "DIV2K_valid_HR")],
)
def test_the_parts_of_a_set_are_found(project, train, test):
    for part in (train, test):
        save_image(project / "set" / part / "e.png", photo(64, 64, 7))
    assert list(cli._shortcuts(None, None, None, project / "set")) == [
        f'data.train="{project / "set" / train}"',
        f'data.test="{project / "set" / test}"',
    ]


def test_one_part_of_a_set_is_for_training(project):
    save_image(project / "set" / "our485" / "low" / "1.png", photo(64, 64, 7))
    save_image(project / "set" / "our485" / "high" / "1.png", photo(64, 64, 7))
    (only,) = cli._shortcuts(None, None, None, project / "set")
    assert only == f'data.train="{project / "set/our485"}"'
