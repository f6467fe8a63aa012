import errno
import json
import os

import numpy as np
import pytest

from sparkir.data.images import SUFFIXES, ImageStore, find_images, read_image
from sparkir.errors import SparkirError


@pytest.fixture
def paths(save, photo):
    sizes = {"b": (9, 11), "a": (20, 5), "c": (1, 1)}
    return [save(f"in/{n}.png", photo(*size, seed=ord(n))) for n, size in sizes.items()]


def counter():
    calls: list[tuple[int, int]] = []
    return calls, lambda done, total: calls.append((done, total))


def break_file(path):
    path.write_bytes(path.read_bytes()[:30])


class TestFindImages:
    def test_sorted_flat_any_case_without_hidden_files(self, tmp_path):
        wanted = [f"{i}{suffix}" for i, suffix in enumerate(SUFFIXES)] + ["8.JPG", "9.Tif"]
        for name in [*reversed(wanted), ".hidden.png", "._9.png", "notes.txt", "png"]:
            (tmp_path / name).touch()
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "x.png").touch()
        assert [path.name for path in find_images(tmp_path)] == wanted
        assert find_images(tmp_path)[0].parent == tmp_path

    def test_dangling_link_is_not_lost(self, tmp_path):
        (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
        assert find_images(tmp_path) == [tmp_path / "a.png"]

    @pytest.mark.parametrize("make", ["missing", "file", "empty"])
    def test_unusable_folder_says_what_is_accepted(self, tmp_path, make):
        folder = tmp_path / "images"
        if make == "file":
            folder.touch()
        elif make == "empty":
            folder.mkdir()
            (folder / "a.txt").touch()
        with pytest.raises(SparkirError, match=r"images.*png jpg jpeg webp tif tiff bmp"):
            find_images(folder)


class TestStore:
    def test_holds_what_read_image_returns_in_the_given_order(self, paths, cache):
        calls, progress = counter()
        store = ImageStore.build(paths, cache=cache, progress=progress)
        assert store.names == ("b", "a", "c")
        assert len(store) == 3
        assert store.skipped == ()
        for image, path in zip(store, paths, strict=True):
            np.testing.assert_array_equal(image, read_image(path))
        assert calls == [(1, 3), (2, 3), (3, 3)]

    def test_views_are_read_only_and_not_copied(self, paths, cache):
        store = ImageStore.build(paths, cache=cache)
        assert not store[1].flags.writeable
        assert np.shares_memory(store[1], store[1])
        base = store[1]
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)

    def test_second_build_opens_without_decoding(self, paths, cache, monkeypatch):
        first = ImageStore.build(paths, cache=cache)
        monkeypatch.setattr("sparkir.data.images.read_image", None)
        calls, progress = counter()
        second = ImageStore.build(paths, cache=cache, progress=progress)
        assert second.folder == first.folder
        assert calls == []
        np.testing.assert_array_equal(second[0], first[0])

    def test_relative_and_absolute_paths_are_one_store(self, paths, cache, monkeypatch):
        first = ImageStore.build(paths, cache=cache)
        monkeypatch.chdir(paths[0].parent)
        relative = [path.relative_to(paths[0].parent) for path in paths]
        assert ImageStore.build(relative, cache=cache).folder == first.folder

    def test_changed_file_is_decoded_again(self, paths, cache, save, photo):
        ImageStore.build(paths, cache=cache)
        changed = photo(9, 11, seed=99)
        save("in/b.png", changed)
        os.utime(paths[0], ns=(1, 1))
        np.testing.assert_array_equal(ImageStore.build(paths, cache=cache)[0], changed)

    @pytest.mark.parametrize("change", ["time", "order", "fewer"])
    def test_what_makes_another_store(self, paths, cache, change):
        first = ImageStore.build(paths, cache=cache)
        if change == "time":
            os.utime(paths[1], ns=(5, 5))
        changed = {"time": paths, "order": paths[::-1], "fewer": paths[:2]}[change]
        second = ImageStore.build(changed, cache=cache)
        assert second.folder != first.folder
        assert second.names == tuple(path.stem for path in changed)

    def test_interrupted_build_leaves_nothing(self, paths, cache):
        def interrupt(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ImageStore.build(paths, cache=cache, progress=interrupt)
        assert list(cache.iterdir()) == []

    def test_leftovers_of_a_kill_are_no_store(self, paths, cache):
        leftover = cache / f".{'0123' * 8}.partial"
        leftover.mkdir(parents=True)
        (leftover / "pixels.u8").write_bytes(b"half")
        os.utime(leftover / "pixels.u8", (0, 0))
        os.utime(leftover, (0, 0))
        store = ImageStore.build(paths, cache=cache)
        assert len(store) == 3
        assert list(cache.iterdir()) == [store.folder]

    def test_two_builds_at_once_are_both_right(self, paths, cache):
        inner: list[ImageStore] = []

        def other_process(done: int, total: int) -> None:
            if done == 1:
                inner.append(ImageStore.build(paths, cache=cache))

        outer = ImageStore.build(paths, cache=cache, progress=other_process)
        for store in (outer, *inner):
            np.testing.assert_array_equal(store[0], read_image(paths[0]))
        assert list(cache.iterdir()) == [outer.folder]

    def test_full_disk_names_the_bytes_and_leaves_nothing(self, paths, cache, monkeypatch):
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        needed = 3 * (9 * 11 + 20 * 5 + 1)
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(SparkirError, match=rf"cache: No space left on device; {needed} bytes"):
            ImageStore.build(paths, cache=cache)
        assert list(cache.iterdir()) == []

    def test_cache_that_cannot_be_made(self, paths, tmp_path):
        (tmp_path / "cache").touch()
        with pytest.raises(SparkirError, match=r"cannot write the image cache in .*cache"):
            ImageStore.build(paths, cache=tmp_path / "cache")

    @pytest.mark.parametrize("damage", ["short", "long", "empty", "no index", "odd index"])
    def test_damaged_store_is_named(self, paths, cache, damage):
        folder = ImageStore.build(paths, cache=cache).folder
        if damage == "no index":
            (folder / "index.json").unlink()
        elif damage == "odd index":
            (folder / "index.json").write_text(json.dumps({"names": []}))
        else:
            pixels = (folder / "pixels.u8").read_bytes()
            damaged = {"short": pixels[:-1], "long": pixels + b"0", "empty": b""}
            (folder / "pixels.u8").write_bytes(damaged[damage])
        with pytest.raises(SparkirError, match=rf"{folder.name} is damaged: .*delete it"):
            ImageStore.build(paths, cache=cache)

    def test_same_stem_in_one_folder(self, save, photo, cache):
        paths = [save("x/a.png", photo(4, 4)), save("x/a.jpg", photo(4, 4))]
        with pytest.raises(SparkirError, match=r"a\.png and a\.jpg are both named 'a'"):
            ImageStore.build(paths, cache=cache)

    def test_same_stem_in_two_folders(self, save, photo, cache):
        paths = [save("x/a.png", photo(4, 4)), save("y/a.png", photo(5, 5))]
        assert ImageStore.build(paths, cache=cache).names == ("a", "a")

    def test_no_paths(self, cache):
        with pytest.raises(SparkirError, match="give at least one"):
            ImageStore.build([], cache=cache)
        assert list(cache.iterdir()) == []


class TestBroken:
    def test_first_broken_file_is_named_with_the_way_out(self, paths, cache):
        break_file(paths[1])
        with pytest.raises(SparkirError, match=r"a\.png: .*data\.skip_broken = true"):
            ImageStore.build(paths, cache=cache)
        assert list(cache.iterdir()) == []

    def test_skipped_files_are_listed(self, paths, cache):
        break_file(paths[1])
        calls, progress = counter()
        store = ImageStore.build(paths, cache=cache, skip_broken=True, progress=progress)
        assert store.names == ("b", "c")
        np.testing.assert_array_equal(store[1], read_image(paths[2]))
        assert len(store.skipped) == 1
        assert "a.png" in store.skipped[0]
        assert calls[-1] == (3, 3)
        assert ImageStore.build(paths, cache=cache, skip_broken=True).skipped == store.skipped

    def test_strict_run_does_not_inherit_a_lenient_store(self, paths, cache):
        break_file(paths[1])
        ImageStore.build(paths, cache=cache, skip_broken=True)
        with pytest.raises(SparkirError, match=r"a\.png: .*data\.skip_broken = true"):
            ImageStore.build(paths, cache=cache)

    def test_vanished_file_can_be_skipped(self, paths, cache):
        paths[0].unlink()
        assert ImageStore.build(paths, cache=cache, skip_broken=True).names == ("a", "c")

    def test_all_broken(self, paths, cache):
        for path in paths:
            break_file(path)
        with pytest.raises(SparkirError, match=r"not one of 3 images could be read: .*b\.png"):
            ImageStore.build(paths, cache=cache, skip_broken=True)
        assert list(cache.iterdir()) == []


class TestDerive:
    def test_transforms_once_per_key(self, paths, cache):
        store = ImageStore.build(paths, cache=cache)
        seen: list[str] = []

        def negative(name: str, image: np.ndarray) -> np.ndarray:
            seen.append(name)
            return 255 - image

        calls, progress = counter()
        first = store.derive(negative, key="negative", bytes_needed=1, progress=progress)
        again = store.derive(negative, key="negative", bytes_needed=1)
        other = store.derive(negative, key="other", bytes_needed=1)
        assert first.folder == again.folder != other.folder
        assert seen == list(store.names) * 2
        assert first.names == store.names
        assert calls == [(1, 3), (2, 3), (3, 3)]
        np.testing.assert_array_equal(again[1], 255 - store[1])

    def test_two_stores_derive_apart_with_the_same_key(self, paths, cache):
        for some in (paths[:1], paths[1:]):
            derived = ImageStore.build(some, cache=cache).derive(
                lambda name, image: image, key="same", bytes_needed=1
            )
            assert derived.names == tuple(path.stem for path in some)

    def test_full_disk(self, paths, cache, monkeypatch):
        store = ImageStore.build(paths, cache=cache)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(SparkirError, match="1,234 bytes are needed"):
            store.derive(lambda name, image: image, key="k", bytes_needed=1234)
        assert list(cache.iterdir()) == [store.folder]
