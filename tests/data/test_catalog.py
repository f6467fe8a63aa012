"""The known sets, and folders of tiny images that have their layout."""

import re

import numpy as np
import pytest
from scipy.io import savemat

from sparkir.data.blocks import CLEAN, NOISY
from sparkir.data.catalog import CATALOG, fits, known_set, numbered
from sparkir.data.inventory import recognise, take_inventory
from sparkir.data.layouts import part_of
from sparkir.errors import SparkirError

NAMES = [
    "DIV2K",
    "Flickr2K",
    "Set5",
    "Set14",
    "B100",
    "Urban100",
    "Manga109",
    "BSD400",
    "CBSD68",
    "Kodak24",
    "McMaster",
    "LIVE1",
    "SIDD",
    "LOLv1",
    "Rain100L",
    "Rain100H",
    "GoPro",
]


@pytest.fixture
def touch(tmp_path):
    """Makes empty files; for what does not look inside them."""

    def make(*names, folder=tmp_path):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    return make


@pytest.fixture
def images(save, tmp_path):
    """Makes images of one size."""

    def make(*names, size=(4, 6)):
        for name in names:
            save(name, np.zeros((*size, 3), np.uint8))
        return tmp_path

    return make


def lines(folder, name):
    return [
        found.line().replace(str(folder), "DIR")
        for found in take_inventory(folder, known_set(name))
    ]


class TestFacts:
    def test_every_set_is_there(self):
        assert [known.name for known in CATALOG] == NAMES

    @pytest.mark.parametrize("known", CATALOG, ids=NAMES)
    def test_says_all_that_is_needed(self, known):
        assert re.match(r"https?://", known.source)
        assert known.terms
        assert known.parts
        for part in known.parts:
            assert part.where
            for names in part.names:
                assert len(set(names)) == len(names) == part.count
                assert fits(part, names) == 1
            assert part.count > 0 or part.pattern

    def test_numbered(self):
        assert numbered("img_{:03d}", 9, 11) == ("img_009", "img_010", "img_011")

    def test_names_of_sets(self):
        assert known_set("div2k").name == "DIV2K"
        with pytest.raises(SparkirError, match=r"no set is called 'Urban10'.*mean 'Urban100'"):
            known_set("Urban10")
        with pytest.raises(SparkirError, match="known: DIV2K, Flickr2K"):
            known_set("qqqqqq")


class TestInventory:
    def test_both_parts_with_gaps(self, images):
        train = [f"DIV2K_train_HR/{n:04d}.png" for n in range(1, 801) if n not in (17, 455)]
        folder = images(*train, "DIV2K_valid_HR/0801.png")
        missing = "missing 0802, 0803, 0804, 0805, 0806 and 94 more"
        assert lines(folder, "DIV2K") == [
            "train: 798 of 800 images in DIR/DIV2K_train_HR; missing 0017, 0455",
            f"test: 1 of 100 images in DIR/DIV2K_valid_HR; {missing}",
        ]

    def test_one_part_alone(self, images):
        folder = images(*(f"{n:04d}.png" for n in range(801, 901)))
        found = take_inventory(folder, known_set("DIV2K"))
        assert [one.complete for one in found] == [False, True]
        assert found[0].line() == "train: not here (800 images; DIV2K_train_HR)"
        assert found[0].problems == ()

    def test_a_part_of_pairs_is_known_by_its_names(self, images):
        (stems,) = known_set("LOLv1").parts[1].names
        for stem in stems:
            folder = images(f"eval15/low/{stem}.png", f"eval15/high/{stem}.png", size=(400, 600))
        assert lines(folder, "LOLv1") == [
            "train: not here (485 pairs; our485/low and our485/high)",
            "test: 15 of 15 pairs in DIR/eval15",
        ]
        assert lines(folder / "eval15", "lolv1")[1] == "test: 15 of 15 pairs in DIR"

    def test_counts_where_names_are_not_known(self, images):
        for number in range(2, 5):
            folder = images(
                f"our485/low/{number}.png", f"our485/high/{number}.png", size=(400, 600)
            )
        (train, _) = lines(folder, "LOLv1")
        which = "482 are missing, but which cannot be told"
        assert train == f"train: 3 of 485 pairs in DIR/our485; {which}"

    def test_too_many(self, images):
        folder = images(*(f"rainy/rain-{n:03d}.png" for n in range(1, 102)))
        images(*(f"norain-{n:03d}.png" for n in range(1, 102)))
        assert lines(folder, "Rain100L")[1] == "test: 101 of 100 pairs in DIR; 1 too many"

    def test_files_that_do_not_belong(self, images):
        folder = images(*(f"HR/{n}.png" for n in ("baby", "bird", "butterfly", "head", "woman")))
        images("HR/babyx2.png")
        found = "test: 5 of 5 images in DIR/HR; not of the set: babyx2"
        assert lines(folder, "Set5") == [found]

    @pytest.mark.parametrize("name", ["img_{:03d}", "img{:03d}", "img_{:03d}_SRF_4_HR"])
    def test_other_ways_to_name_the_same_images(self, images, name):
        folder = images(*(f"{name.format(n)}.png" for n in range(1, 21)))
        (line,) = lines(folder, "Urban100")
        assert line.startswith(f"test: 20 of 100 images in DIR; missing {name.format(21)}, ")

    def test_wrong_sizes_and_unreadable_files(self, images):
        folder = images(*(f"kodim{n:02d}.png" for n in range(1, 24)), size=(768, 512))
        images("kodim24.png", size=(100, 50))
        (folder / "kodim03.png").write_bytes(b"broken")
        (line,) = lines(folder, "Kodak24")
        assert "cannot be read: kodim03.png" in line
        assert "not of 768x512 or 500x500 px: kodim24.png (50x100)" in line

    def test_a_missing_partner_is_a_problem_not_an_end(self, images):
        folder = images("our485/low/2.png", "our485/low/5.png", "our485/high/2.png")
        (train, test) = lines(folder, "LOLv1")
        assert "our485/low/5.png has no partner" in train
        assert test.startswith("test: not here")

    def test_sidd_in_both_forms(self, images, tmp_path):
        blocks = np.zeros((40, 32, 2, 2, 3), np.uint8)
        for file in (NOISY, CLEAN):
            savemat(tmp_path / file, {file.removesuffix(".mat"): blocks})
        scene = "SIDD_Medium_Srgb/Data/0001_001_S6_00100_00060_3200_L"
        folder = images(f"{scene}/0001_GT_SRGB_010.PNG", f"{scene}/0001_NOISY_SRGB_010.PNG")
        train, test = lines(folder, "SIDD")
        assert train.startswith(
            "train: 1 of 320 pairs in DIR/SIDD_Medium_Srgb/Data; 319 are missing"
        )
        assert test == "test: 1,280 of 1,280 pairs in DIR"
        crops = images("crops/input_crops/0001_SRGB_010_s001.png") / "crops"
        images("crops/gt_crops/0001_SRGB_010_s001.png")
        train, test = lines(crops, "SIDD")
        assert train == "train: 1 pairs in DIR"
        assert test.startswith("test: not here")

    def test_gopro(self, images):
        for split, scene in (("train", "GOPR0372_07_00"), ("test", "GOPR0384_11_00")):
            for kind in ("blur", "sharp"):
                folder = images(f"{split}/{scene}/{kind}/000001.png", size=(720, 1280))
        assert [line.partition(";")[0] for line in lines(folder, "GoPro")] == [
            "train: 1 of 2,103 pairs in DIR/train",
            "test: 1 of 1,111 pairs in DIR/test",
        ]

    def test_nothing_of_the_set(self, images):
        folder = images("holiday.png")
        with pytest.raises(SparkirError, match=r"holds nothing of DIV2K; it has 800 images as in"):
            take_inventory(folder, known_set("DIV2K"))
        with pytest.raises(SparkirError, match="no folder"):
            take_inventory(folder / "gone", known_set("DIV2K"))


class TestRecognise:
    def test_by_the_names_of_files(self, touch):
        folder = touch(*(f"{n:04d}.png" for n in range(1, 500)))
        assert recognise(folder).name == "DIV2K"

    def test_by_the_folders_name(self, touch, tmp_path):
        folder = touch("a.png", "b.png", folder=tmp_path / "manga109" / "HR").parent
        assert recognise(folder).name == "Manga109"

    def test_by_the_folders_inside(self, touch):
        folder = touch("our485/low/2.png", "our485/high/2.png")
        assert recognise(folder).name == "LOLv1"

    def test_by_both(self, touch, tmp_path):
        names = [f"img_{n:03d}.png" for n in range(1, 101)]
        folder = touch(*names)
        with pytest.raises(SparkirError, match=r"one of several .* --as: B100, Urban100"):
            recognise(folder)
        assert recognise(touch(*names, folder=tmp_path / "B100")).name == "B100"

    def test_the_users_own(self, touch):
        folder = touch("holiday.png", "dog.jpg")
        with pytest.raises(SparkirError, match=r"no known set; name it with --as: DIV2K, Flickr2K"):
            recognise(folder)


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "name", "line"),
    [
        ("test/Set5", "Set5", "test: 5 of 5 images in DIR/HR"),
        ("test/Set14", "Set14", "test: 14 of 14 images in DIR/HR"),
        ("test/B100", "B100", "test: 100 of 100 images in DIR/HR"),
        ("tasks/lowlight_LOL_eval15", "LOLv1", "test: 15 of 15 pairs in DIR"),
    ],
)
def test_development_data(development_data, folder, name, line):
    folder = development_data / folder
    assert line in lines(folder, name)
    assert part_of(folder, "test") is not None
