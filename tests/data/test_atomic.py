import os
import stat
import time
from pathlib import Path

import pytest

from sparkir.data.atomic import atomic_file, atomic_folder


def test_file_appears_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_file(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    assert list(path.parent.iterdir()) == [path]


def test_failure_keeps_the_older_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_file_and_folder_obey_the_umask(tmp_path):
    previous = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "file"):
            pass
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="half way"), atomic_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("x")
        raise ValueError("half way")
    assert not list(tmp_path.iterdir())

    with atomic_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("x")
        assert not (tmp_path / "a").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "x"]


def test_first_of_two_racing_processes_wins(tmp_path):
    folder = tmp_path / "a"
    with atomic_folder(folder) as ours:
        (ours / "x").write_text("ours")
        with atomic_folder(folder) as theirs:
            (theirs / "x").write_text("theirs")
    assert (folder / "x").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]


def test_an_empty_folder_that_cannot_be_replaced_is_no_result(tmp_path, monkeypatch):
    """A mount point, say: what was made must not be thrown away without a word."""
    folder = tmp_path / "a"
    folder.mkdir()

    def refused(path: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="busy"), atomic_folder(folder) as partial:
        (partial / "x").write_text("x")


def test_a_rename_that_fails_for_another_reason_is_reported(tmp_path):
    (tmp_path / "a").write_text("a file is in the way")
    with pytest.raises(OSError, match="a"), atomic_folder(tmp_path / "a"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_only_abandoned_leftovers_are_removed(tmp_path):
    """And none of other programs, whatever their age."""
    dead, alive, slow = (f".{digit * 32}.partial" for digit in "1a9")
    theirs = (".rsync.partial", ".IMG_2041.CR2.partial")
    for name, age_s in ((dead, 7200), (alive, 0), (slow, 7200), *((name, 7200) for name in theirs)):
        partial = tmp_path / name
        partial.mkdir()
        (partial / "pixels").write_bytes(b"half")
        for path in (partial / "pixels", partial):
            os.utime(path, (time.time() - age_s,) * 2)
    os.utime(tmp_path / slow / "pixels")  # an old folder that is still being written
    with atomic_folder(tmp_path / "a"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {alive, slow, *theirs, "a"}


def test_what_cannot_be_removed_stands_in_nobodys_way(tmp_path, monkeypatch):
    """In a folder such as /tmp, the leftovers of another user."""
    dead = tmp_path / f".{'1' * 32}.partial"
    dead.write_bytes(b"half")
    os.utime(dead, (0, 0))

    def refused(path: Path, **_: object) -> None:
        if path == dead:
            raise PermissionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with atomic_file(tmp_path / "a") as file:
            file.write(b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
