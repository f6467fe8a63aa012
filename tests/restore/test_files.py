"""Many pictures: which, where to, what is skipped, what is left out, what is never touched."""

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_networks import facts, network

from helpers import Said, call, contents, photo, save_image
from sparkir.data.images import read_image
from sparkir.errors import SparkirError
from sparkir.models.checkpoint import save_weights
from sparkir.restore.files import Restored, mark_for, restore_files
from sparkir.restore.memory import parse_bytes
from sparkir.restore.naming import find_jobs, shown
from sparkir.restore.network import Restorer
from sparkir.restore.pictures import mark_of, read_picture

INVERT = Restorer(facts=facts(), run=lambda lq: 1 - lq, label="invert", identity="1")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with photos/a.png and photos/b.jpg and photos/deep/c.png."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["a.png", "b.jpg", "deep/c.png"]):
        save_image(tmp_path / "photos" / name, photo(20, 24, seed))
    return tmp_path


def restore(source: str, target: str, restorer: Restorer = INVERT, **options) -> Restored:
    return restore_files(restorer, Path(source), Path(target), lambda event: None, **options)


def age(path: Path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


# Which and where ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "made"),
    [
        ("photos", {"a.png", "b.png"}),
        ("photos/", {"a.png", "b.png"}),
        ("photos/*.jpg", {"b.png"}),
        ("photos/**/*.png", {"a.png", "deep/c.png"}),
        ("**/*.png", {"photos/a.png", "photos/deep/c.png"}),
        ("photos/[ab].*", {"a.png", "b.png"}),
        ("photos/deep/../?.png", {"a.png"}),
        ("photos/b.jpg", {"b.png"}),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_what_is_restored_and_where_it_goes(folder, source, made, absolute):
    outcome = restore(f"{folder}/{source}" if absolute else source, "out")
    assert {str(path.relative_to("out")) for path in outcome.made} == made
    if "b.png" in made:
        expected = 255 - read_image(Path("photos/b.jpg"))
        np.testing.assert_array_equal(read_image(Path("out/b.png")), expected)


@pytest.mark.parametrize(
    ("target", "made"), [("x.png", "x.png"), ("x.TIF", "x.TIF"), ("x", "x/a.png"), (".", "a.png")]
)
def test_where_one_image_goes(folder, target, made):
    assert restore("photos/a.png", target).made == [Path(made)]


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".tif", "TIFF"), (".jpg", "JPEG"), (".webp", "WEBP")]
)
def test_the_format_in_a_folder(folder, suffix, kind):
    made = restore("photos", "out", suffix=suffix).made
    assert [path.name for path in made] == [f"a{suffix}", f"b{suffix}"]
    with Image.open(made[0]) as image:
        assert image.format == kind


def test_a_file_whose_name_looks_like_a_pattern(folder):
    save_image(folder / "photos/[x]*.png", photo(9, 9, 0))
    assert restore("photos/[x]*.png", "out").made == [Path("out/[x]*.png")]


def test_what_lies_in_the_target_is_no_source(folder):
    assert len(restore("photos/**/*.png", "photos/out").made) == 2
    again = restore("photos/**/*.png", "photos/out")
    assert (len(again.made), len(again.finished)) == (0, 2)


def test_results_beside_their_sources_are_no_sources(folder):
    save_image(folder / "beside/a.bmp", photo(9, 9, 0))
    first = restore("beside", "beside")
    assert [path.name for path in first.made] == ["a.png"]
    save_image(folder / "beside/b.bmp", photo(9, 9, 1))
    again = restore("beside", "beside")
    assert [path.name for path in again.made] == ["b.png"]
    assert [path.name for path in again.finished] == ["a.png"]


def test_a_folder_whose_name_looks_like_a_pattern(folder):
    save_image(folder / "in[1]/a.png", photo(9, 9, 0))
    assert len(restore("in[1]/*.png", "out").made) == 1
    assert len(restore("in[[]1]/*.png", "out2").made) == 1


MISTAKES = {
    "nothing there": ("gone.png", "out", "no image or folder at gone.png"),
    "no match": ("photos/*.bmp", "out", "no images match"),
    "up after a wildcard": ("*/../../*.png", "out", "goes up again after a wildcard"),
    "pattern to a file": ("photos/*.*", "x.png", "for a folder of images give a folder"),
    "folder to a file": ("photos", "photos/a.png", "for a folder of images give a folder"),
    "the same folder": ("photos", "photos", "would replace the image it is made from"),
    "the same file": ("photos/a.png", "photos/a.png", "would replace the image it is made"),
    "another source": ("photos/**/*.*", "photos/deep/..", "would replace the image"),
    "unknown format": ("photos/a.png", "x.gif", "written as .png"),
    "empty": ("empty", "out", "no images in empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_changes_nothing(folder, mistake):
    source, target, says = MISTAKES[mistake]
    (folder / "empty").mkdir()
    before = contents(folder)
    with pytest.raises(SparkirError, match=says):
        restore(source, target)
    assert contents(folder) == before


def test_two_images_of_one_name(folder):
    save_image(folder / "photos/a.bmp", photo(9, 9, 0))
    with pytest.raises(SparkirError, match=r"a\.bmp and a\.png are both named 'a'; rename"):
        restore("photos", "out")
    assert not (folder / "out").exists()


# Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["..png", "-rf.png", "--help.png", "a\nb.png", "\x1b[31mred.png", "ä ö.png", "~.png"]
)
def test_odd_names_stay_inside_the_target(folder, name):
    save = folder / "odd" / name
    save.parent.mkdir()
    Image.fromarray(photo(9, 9, 0)).save(save, format="PNG")
    outcome = restore(f"odd/{name}", "out")
    assert outcome.made == [Path("out") / (f"{Path(name).stem}.png")]
    assert {path.parent for path in Path("out").iterdir()} == {Path("out")}
    assert contents(folder).keys() - {"out", f"out/{outcome.made[0].name}"} <= {
        "odd",
        f"odd/{name}",
        *contents(folder / "photos").keys(),
        *(f"photos/{name}" for name in contents(folder / "photos")),
        "photos",
    }


def test_undecodable_names(folder):
    (folder / "odd").mkdir()
    name = os.fsdecode(b"odd/\xff.png")
    Image.fromarray(photo(9, 9, 0)).save(name, format="PNG")
    assert restore("odd", "out").made == [Path("out") / os.fsdecode(b"\xff.png")]


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\x9b", "\u202e", os.fsdecode(b"\xff")])
def test_shown_names_cannot_steer_a_terminal(text):
    assert shown(text).isprintable()
    assert shown("plain ä.png") == "plain ä.png"


def test_paths_that_go_up(folder):
    save_image(folder / "x/e.png", photo(9, 9, 0))
    (folder / "photos/y").mkdir()
    for source in ("photos/y/../../x", "photos/y/../../x/*.png", f"{folder}/x/../x/e.png"):
        assert restore(source, "out", overwrite=True).made == [Path("out/e.png")]


def test_a_linked_folder_in_the_target_does_not_lead_out(folder):
    (folder / "outside").mkdir()
    (folder / "out").mkdir()
    (folder / "out/deep").symlink_to(folder / "outside")
    with pytest.raises(SparkirError, match="out/deep leads out of out"):
        restore("photos/**/*.png", "out")
    assert list((folder / "outside").iterdir()) == []


def test_a_linked_result_is_replaced_and_not_followed(folder):
    secret = folder / "outside.png"
    save_image(secret, photo(9, 9, 0))
    before = secret.read_bytes()
    (folder / "out").mkdir()
    (folder / "out/a.png").symlink_to(secret)
    with pytest.raises(SparkirError, match="is there already and was not made by sparkir"):
        restore("photos/a.png", "out")
    restore("photos/a.png", "out", overwrite=True)
    assert not (folder / "out/a.png").is_symlink()
    assert secret.read_bytes() == before


def test_a_linked_source_is_read_and_a_dangling_one_reported(folder):
    (folder / "photos/link.png").symlink_to(folder / "photos/deep/c.png")
    (folder / "photos/gone.png").symlink_to(folder / "nowhere.png")
    outcome = restore("photos", "out")
    assert [path.name for path in outcome.made] == ["a.png", "b.png", "link.png"]
    assert outcome.failed == [
        "gone.png: cannot read image photos/gone.png: No such file or directory; "
        "replace or remove the file"
    ]


def test_the_target_is_a_device(folder):
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe")
    for name in ("pipe.png", "pipe"):
        with pytest.raises(SparkirError, match="pipe"):
            restore("photos", name)
    with pytest.raises(SparkirError, match="no file to be replaced"):
        restore("photos/a.png", "pipe.png", overwrite=True)
    if Path("/dev/full").exists():
        with pytest.raises(SparkirError, match="/dev/full"):
            find_jobs(Path("photos/a.png"), Path("/dev/full"), None)


# Skipping -------------------------------------------------------------------------------------


def test_finished_files_are_skipped(folder):
    assert len(restore("photos", "out").made) == 2
    before = contents(folder)
    again = restore("photos", "out")
    assert (again.made, len(again.finished)) == ([], 2)
    assert contents(folder) == before
    assert len(restore("photos", "out", overwrite=True).made) == 2


def test_a_changed_source_is_restored_again(folder):
    restore("photos", "out")
    age(folder / "out/a.png", 10)
    age(folder / "photos/b.jpg", 10)
    save_image(folder / "photos/a.png", photo(20, 24, 9))
    outcome = restore("photos", "out")
    assert (outcome.made, outcome.finished) == ([Path("out/a.png")], [Path("out/b.png")])


def test_another_models_results_are_replaced(folder):
    restore("photos", "out")
    other = Restorer(facts=facts(), run=lambda lq: lq, label="other", identity="2")
    outcome = restore("photos", "out", other)
    assert len(outcome.made) == 2
    assert mark_of(Path("out/a.png")) == mark_for(other)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_every_format_is_known_again(folder, suffix):
    restore("photos", "out", suffix=suffix)
    assert len(restore("photos", "out", suffix=suffix).finished) == 2


def test_a_file_that_sparkir_did_not_make_stays(folder):
    (folder / "out").mkdir()
    (folder / "out/a.png").write_text("my notes")
    save_image(folder / "out/b.png", photo(9, 9, 0))
    before = contents(folder)
    outcome = restore("photos", "out")
    assert len(outcome.failed) == 2
    assert "not made by sparkir; choose another OUT, or replace it with" in outcome.failed[0]
    assert contents(folder) == before
    assert len(restore("photos", "out", overwrite=True).made) == 2


# Failures -------------------------------------------------------------------------------------


def test_one_broken_image_among_many(folder):
    (folder / "photos/aa.png").write_bytes((folder / "photos/a.png").read_bytes()[:200])
    events: list[dict[str, object]] = []
    outcome = restore_files(INVERT, Path("photos"), Path("out"), events.append)
    assert [path.name for path in outcome.made] == ["a.png", "b.png"]
    (message,) = outcome.failed
    assert message.startswith("aa.png: cannot read image photos/aa.png")
    done = [(e["done"], e["total"], e["name"]) for e in events if e["kind"] == "restored"]
    assert done == [(1, 3, "a.png"), (2, 3, "aa.png"), (3, 3, "b.jpg")]
    tiles = [(e["done"], e["part"], e["parts"]) for e in events if e["kind"] == "tile"]
    assert tiles == [(0, 1, 1), (2, 1, 1)]


def test_what_a_format_cannot_hold_is_said_before_restoring(folder):
    transparent = np.dstack([photo(9, 9, 0), np.zeros((9, 9), np.uint8)])
    save_image(folder / "photos/t.png", transparent)

    def run(lq: np.ndarray) -> np.ndarray:
        raise AssertionError

    never = Restorer(facts=facts(), run=run, label="never", identity="3")
    with pytest.raises(SparkirError, match=r"JPEG cannot hold transparency.*write \.png or \.tif"):
        restore("photos/t.png", "t.jpg", never)


def test_exif_that_a_jpeg_cannot_hold_is_said_before_restoring(folder):
    def run(lq: np.ndarray) -> np.ndarray:
        raise AssertionError

    never = Restorer(facts=facts(), run=run, label="never", identity="3")
    exif = Image.Exif()
    exif[0x010E] = "a" * 65_490  # a JPEG has room for it, but not for what makes the result too
    Image.new("RGB", (9, 9)).save(folder / "told.jpg", exif=exif)
    with pytest.raises(SparkirError, match=r"JPEG cannot hold 65\d{3} bytes of EXIF.*write \.png"):
        restore("told.jpg", "out.jpg", never)
    assert restore("told.jpg", "out.png").failed == []


def test_a_full_disk_ends_it_and_leaves_nothing_half_written(folder, monkeypatch):
    restore("photos/a.png", "out")
    before = contents(folder)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    says = "cannot write out/b.png: No space left .*; 0 of 2 are restored, and the same command"
    with pytest.raises(SparkirError, match=says):
        restore("photos", "out")
    assert contents(folder) == before


# As a command ---------------------------------------------------------------------------------


@pytest.fixture
def command(folder):
    """`sparkir restore` with a network of two blocks."""
    save_weights(network("edsr"), folder / "w.safetensors", {})
    options = ["--weights", "w.safetensors", "--option", "width=8", "--option", "blocks=2"]
    return lambda *arguments: call("restore", "edsr", *arguments, *options)


def ended(said: Said, code: int) -> list[str]:
    assert said.code == code, said
    return said.err.splitlines()


def test_the_command_skips_and_says_so(command):
    assert ended(command("photos", "out"), 0) == []
    said = command("photos", "out")
    assert "2 skipped: this model has finished them already; --overwrite makes" in said.out
    assert "0 restored with edsr with w.safetensors, in out" in said.out
    assert "2 restored" in command("photos", "out", "--overwrite").out


def test_the_command_takes_formats_and_limits(command, folder):
    said = command("photos", "out", "--format", "webp", "--memory", "1.5GB")
    assert ended(said, 0) == []
    assert {p.name for p in (folder / "out").iterdir()} == {"a.webp", "b.webp"}
    assert read_picture(folder / "out/a.webp").pixels.shape == (80, 96, 3)
    errors = ended(command("photos", "out2", "--max-pixels", "100"), 1)
    assert len(errors) == 2
    assert "20 = 480 pixels, more than 100" in errors[0]
    assert ended(command("photos", "out", "--memory", "much"), 1)[0].startswith("error: 'much' is")
    assert "--runtime is for" in ended(command("photos", "out", "--runtime", "openvino"), 1)[0]


def test_one_broken_image_costs_exit_code_1_and_one_line(command, folder):
    (folder / "photos/a\n[red]b.png").write_bytes(b"no image")
    errors = ended(command("photos", "out"), 1)
    assert len(errors) == 1
    assert errors[0].startswith(r"left out: a\n[red]b.png: cannot read image photos/a\n[red]b.png")


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2e9), ("1.5 GiB", 1.5 * 2**30), ("800m", 8e8), ("4096", 4096), ("1kB", 1000)],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1 XB", "2GB2", "1e9", "3iB", "nan"])
def test_no_sizes(text):
    with pytest.raises(SparkirError, match="write it as in 2GB"):
        parse_bytes(text)
