"""Folders as the sets' authors lay them out, of a few tiny images each."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from sparkir.data.blocks import CLEAN, NOISY, count_blocks, read_blocks
from sparkir.data.layouts import clean_images, holds_pairs, pair_files, part_of, set_name
from sparkir.data.pairs import PairStore
from sparkir.errors import SparkirError

TINY = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def tree(save, tmp_path):
    """Makes tiny images at these paths, and returns the folder that they are in."""

    def make(*names):
        for name in names:
            save(name, TINY)
        return tmp_path

    return make


def found(folder, split="test"):
    return {
        p.name: (str(p.input.relative_to(folder)), str(p.target.relative_to(folder)))
        for p in pair_files(folder, split)
    }


class TestPairs:
    @pytest.mark.parametrize(
        ("degraded", "clean"),
        [
            ("input", "target"),
            ("low", "high"),
            ("blur", "sharp"),
            ("rain", "norain"),
            ("input_crops", "gt_crops"),
            ("input", "groundtruth"),
            ("Input", "Target"),
        ],
    )
    def test_two_folders(self, tree, degraded, clean):
        folder = tree(f"{degraded}/a.png", f"{clean}/a.bmp", f"{degraded}/b.png", f"{clean}/b.png")
        assert holds_pairs(folder)
        assert found(folder) == {
            "a": (f"{degraded}/a.png", f"{clean}/a.bmp"),
            "b": (f"{degraded}/b.png", f"{clean}/b.png"),
        }

    def test_rain_as_its_authors_distribute_it(self, tree):
        folder = tree("rain/X2/norain-1x2.png", "rain/X2/norain-10x2.png", "norain/norain-1.png")
        tree("norain/norain-10.png")
        assert found(folder) == {
            "1": ("rain/X2/norain-1x2.png", "norain/norain-1.png"),
            "10": ("rain/X2/norain-10x2.png", "norain/norain-10.png"),
        }

    def test_rain_with_one_word_more_in_the_clean_name(self, tree):
        folder = tree("rain/rain-001.png", "norain/norain-001.png")
        assert found(folder) == {"001": ("rain/rain-001.png", "norain/norain-001.png")}

    @pytest.mark.parametrize("inside", ["", "rainy/"])
    def test_rain_beside_its_clean_image(self, tree, inside):
        folder = tree(f"{inside}rain-001.png", "norain-001.png")
        assert found(folder) == {"norain-001": (f"{inside}rain-001.png", "norain-001.png")}

    def test_sidd_medium(self, tree):
        scenes = ["0001_001_S6_00100_00060_3200_L", "0002_001_S6_00100_00020_3200_N"]
        for scene in scenes:
            for kind in ("GT", "NOISY"):
                for take in ("010", "011"):
                    folder = tree(f"Data/{scene}/{scene[:4]}_{kind}_SRGB_{take}.PNG") / "Data"
        pairs = found(folder, "train")
        assert len(pairs) == 4
        one = f"{scenes[0]}/0001_NOISY_SRGB_010.PNG", f"{scenes[0]}/0001_GT_SRGB_010.PNG"
        assert pairs[f"{scenes[0]}-0001_GT_SRGB_010"] == one

    def test_gopro_has_the_same_names_in_every_scene(self, tree, cache):
        for scene in ("GOPR0372_07_00", "GOPR0374_11_00"):
            for kind in ("blur", "sharp", "blur_gamma"):
                folder = tree(f"train/{scene}/{kind}/000047.png") / "train"
        assert found(folder) == {
            f"{scene}-000047": (f"{scene}/blur/000047.png", f"{scene}/sharp/000047.png")
            for scene in ("GOPR0372_07_00", "GOPR0374_11_00")
        }
        pairs = PairStore.from_files(pair_files(folder), cache=cache)
        assert pairs.names == ("GOPR0372_07_00-000047", "GOPR0374_11_00-000047")

    def test_the_parts_of_a_set_are_never_mixed(self, tree):
        folder = tree("our485/low/1.png", "our485/high/1.png", "eval15/low/2.png")
        tree("eval15/high/2.png")
        assert not holds_pairs(folder)
        with pytest.raises(SparkirError, match="no pairs in"):
            pair_files(folder)

    @pytest.mark.parametrize("parts", [("Train", "Test"), ("training", "validation")])
    def test_nor_those_of_other_names(self, tree, parts):
        for part in parts:
            folder = tree(f"{part}/input/{part}.png", f"{part}/target/{part}.png")
        assert not holds_pairs(folder)
        for split, part in zip(("train", "test"), parts, strict=True):
            assert part_of(folder, split).name == part

    def test_a_scene_with_one_side_alone(self, tree):
        folder = tree("train/a/blur/1.png", "train/a/sharp/1.png", "train/c/blur/1.png") / "train"
        with pytest.raises(SparkirError, match="c holds only blur, and no pairs, as the folders"):
            pair_files(folder)

    def test_a_ground_truth_without_its_degraded_image(self, tree):
        folder = tree("rain-1.png", "norain-1.png", "norain-2.png", "rainstreak-1.png")
        with pytest.raises(SparkirError, match=r"norain-2.png has no degraded partner \(1 of 2"):
            pair_files(folder)

    def test_a_marked_scene_without_its_degraded_image(self, tree):
        folder = tree("s/0001_NOISY_SRGB_010.PNG", "s/0001_GT_SRGB_010.PNG")
        tree("t/0002_GT_SRGB_010.PNG")
        with pytest.raises(SparkirError, match="t holds images, and no pairs"):
            pair_files(folder)

    def test_two_pairs_of_one_name(self, tree):
        folder = tree("a/input/b-c.png", "a/target/b-c.png", "a-b/input/c.png", "a-b/target/c.png")
        with pytest.raises(SparkirError, match="would both be 'a-b-c'; rename one"):
            pair_files(folder)

    def test_rain_in_a_photographs_name_is_but_a_name(self, tree):
        assert not holds_pairs(tree("rain-forest.png", "b.png"))

    def test_none(self, tree):
        folder = tree("a.png", "low/a.png")
        assert not holds_pairs(folder)
        with pytest.raises(SparkirError, match=r"put degraded images in .*input and clean ones"):
            pair_files(folder)

    @pytest.mark.parametrize(
        "names",
        [
            ("low/a.png", "high/b.png"),
            ("rainy/rain-001.png", "norain-002.png"),
            ("s/0001_NOISY_SRGB_010.PNG", "s/0002_GT_SRGB_010.PNG"),
        ],
    )
    def test_a_missing_partner_is_named(self, tree, names):
        folder = tree(*names)
        assert holds_pairs(folder)
        with pytest.raises(SparkirError, match="has no partner named"):
            pair_files(folder)


class TestParts:
    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("our485", "eval15"),
            ("train", "test"),
            ("RainTrainL", "Rain100L"),
            ("RainTrainH", "Rain100H"),
            ("rain_data_train_Light", "rain_data_test_Light"),
        ],
    )
    def test_of_pairs(self, tree, train, test):
        for part in (train, test):
            folder = tree(f"{part}/input/a.png", f"{part}/target/a.png")
        assert part_of(folder, "train") == folder / train
        assert part_of(folder, "test") == folder / test
        assert part_of(folder / train, "train") == folder / train

    def test_of_clean_images(self, tree):
        folder = tree("DIV2K_train_HR/0001.png", "DIV2K_valid_HR/0801.png")
        assert part_of(folder, "train") == folder / "DIV2K_train_HR"
        assert part_of(folder, "test") == folder / "DIV2K_valid_HR"
        assert part_of(folder / "DIV2K_train_HR", "train") == folder / "DIV2K_train_HR"

    def test_gopro(self, tree):
        for part in ("train", "test"):
            folder = tree(f"{part}/S_{part}/blur/1.png", f"{part}/S_{part}/sharp/1.png")
        assert part_of(folder, "train") == folder / "train"
        assert part_of(folder, "test") == folder / "test"

    @pytest.mark.parametrize("inside", ["HR", "GTmod12", "original_png", "image_SRF_4"])
    def test_clean_images_inside(self, tree, inside):
        folder = tree(f"{inside}/a.png", "LR_bicubic/X2/ax2.png", "noisy10/a.png")
        assert part_of(folder, "test") == folder / inside

    def test_images_directly_in_the_folder_come_first(self, tree):
        folder = tree("a.png", "train/c.png")
        assert part_of(folder, "train") == folder

    def test_an_image_beside_a_folder_of_clean_ones_does_not_hide_them(self, tree):
        folder = tree("preview.png", "HR/b.png", "LR_bicubic/b.png")
        with pytest.raises(SparkirError, match=r"\(preview\.png\).*give .*HR, or move"):
            part_of(folder, "test")
        assert part_of(folder / "HR", "test") == folder / "HR"

    def test_nothing(self, tree, tmp_path):
        folder = tree("our485/low/1.png", "our485/high/1.png")
        assert part_of(folder, "test") is None
        assert part_of(tmp_path / "gone", "test") is None

    def test_clean_among_reduced_copies(self, tree):
        folder = tree("img_001_SRF_4_HR.png", "img_001_SRF_4_LR.png", "img_001_SRF_4_ScSR.png")
        assert [path.name for path in clean_images(folder)] == ["img_001_SRF_4_HR.png"]
        other = tree("other/a_HR.png", "other/b.png") / "other"
        assert [path.name for path in clean_images(other)] == ["a_HR.png", "b.png"]


class TestBlocks:
    """SIDD's validation files, of 2 scenes with 3 blocks of 8 x 8 px."""

    @pytest.fixture
    def blocks(self):
        return np.random.default_rng(0).integers(0, 256, (2, 2, 3, 8, 8, 3), dtype=np.uint8)

    @pytest.fixture
    def folder(self, tmp_path, blocks):
        for file, values in zip((NOISY, CLEAN), blocks, strict=True):
            savemat(tmp_path / file, {file.removesuffix(".mat"): values}, do_compression=True)
        return tmp_path

    def test_are_pairs_to_test_on(self, folder, blocks, cache):
        assert part_of(folder, "test") == folder
        assert part_of(folder, "train") is None
        pairs = PairStore.from_files(pair_files(folder), cache=cache)
        numbers = ((scene, block) for scene in (1, 2) for block in (1, 2, 3))
        assert pairs.names == tuple(f"block-{scene:02d}-{block:02d}" for scene, block in numbers)
        flat = blocks.reshape(2, 6, 8, 8, 3)
        for index in range(6):
            for side in (0, 1):
                np.testing.assert_array_equal(pairs.pair(index)[side], flat[side, index])

    def test_lie_beside_what_is_trained_on(self, folder, tree):
        tree("SIDD_Medium_Srgb/Data/s/1_NOISY_S.PNG", "SIDD_Medium_Srgb/Data/s/1_GT_S.PNG")
        assert part_of(folder, "train") == folder / "SIDD_Medium_Srgb/Data"
        assert part_of(folder, "test") == folder

    def test_are_counted_without_being_read(self, folder):
        assert count_blocks(folder / NOISY) == (2, 3)

    def test_without_scipy(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(SparkirError, match=r"Srgb\.mat is a MATLAB file.*pip install scipy"):
            read_blocks(folder / NOISY)

    @pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file" + bytes(300), b"\x89HDF\r\n"])
    def test_damaged(self, folder, cache, content):
        (folder / NOISY).write_bytes(content)
        with pytest.raises(SparkirError, match=r"cannot read .*Noisy.*|does not hold Validation"):
            PairStore.from_files(pair_files(folder), cache=cache)

    def test_cut_off(self, folder):
        (folder / NOISY).write_bytes((folder / NOISY).read_bytes()[:400])
        with pytest.raises(SparkirError, match="cannot read"):
            read_blocks(folder / NOISY)

    @pytest.mark.parametrize(
        "values", [np.zeros((2, 3, 8, 8, 3)), np.zeros((3, 8, 8, 3), np.uint8), "text"]
    )
    def test_something_else(self, tmp_path, values):
        savemat(tmp_path / NOISY, {NOISY.removesuffix(".mat"): values})
        with pytest.raises(SparkirError, match="does not hold ValidationNoisyBlocksSrgb"):
            read_blocks(tmp_path / NOISY)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("data/Set14/HR", "Set14"),
        ("data/Set14", "Set14"),
        ("HR", "HR"),
        ("B100/image_SRF_4", "B100"),
    ],
)
def test_a_set_is_called_as_its_folder_or_the_one_around(folder, name):
    assert set_name(Path(folder)) == name
