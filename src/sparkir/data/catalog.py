"""The sets that the field trains and measures on: what is in them, where they are, on what terms.

Nothing is downloaded from here. `sparkir sets` prints this, and `inventory` checks a folder
against it. Counts and names are those of the sets' own distributions.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparkir.data.layouts import Split
from sparkir.errors import SparkirError


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of a set that are for one purpose."""

    split: Split
    count: int
    """Images, or pairs; 0 where it depends on how the set was cut into crops."""
    where: str
    """Where it lies in the set as it is distributed, for people; `layouts` finds it."""
    paired: bool = False
    """Degraded images come with clean ones."""
    names: tuple[tuple[str, ...], ...] = ()
    """The stems of the images, in each of the ways in which people number them."""
    pattern: str = ""
    """What every name looks like, where the names themselves are too many or irregular."""
    sizes_px: tuple[tuple[int, int], ...] = ()
    """Width and height of every image, or height and width."""

    @property
    def label(self) -> str:
        """Such as `485 pairs`."""
        kind = "pairs" if self.paired else "images"
        return f"{self.count:,} {kind}" if self.count else f"any number of {kind}"


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """One published set."""

    name: str
    task: str
    source: str
    """Address from which its authors, or those who keep it, give it."""
    terms: str
    """What may be done with it, as its source says."""
    parts: tuple[Part, ...]
    notes: str = ""
    """What it shares with other sets, and other traps."""
    aliases: tuple[str, ...] = ()
    """What else folders that hold it are called."""


def numbered(template: str, first: int, last: int) -> tuple[str, ...]:
    """``numbered("img_{:03d}", 1, 3)`` is ``("img_001", "img_002", "img_003")``."""
    return tuple(template.format(number) for number in range(first, last + 1))


def known_set(name: str) -> KnownSet:
    """A set by name, whatever its capitals.

    Raises:
        SparkirError: there is none of that name; the nearest is named.
    """
    by_name = {known.name.lower(): known for known in CATALOG}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_name, n=1, cutoff=0.5)
    names = ", ".join(known.name for known in CATALOG)
    hint = f"did you mean {by_name[near[0]].name!r}?" if near else f"known: {names}"
    raise SparkirError(f"no set is called {name!r} here; {hint}")


def fits(part: Part, names: Sequence[str]) -> float:
    """How well names of files fit a part: the share of its images that are there, 0 to 1.

    Where the names are not known, files in excess count against it as missing ones do.
    """
    known = nearest_names(part, names)
    if known:
        return len(set(names) & set(known)) / part.count
    if part.names and not part.pattern:
        return 0.0
    if part.pattern and not all(re.fullmatch(part.pattern, name) for name in names):
        return 0.0
    if not part.count:
        return 1.0
    return min(len(names), part.count) / max(len(names), part.count)


def nearest_names(part: Part, names: Sequence[str]) -> tuple[str, ...]:
    """The way of naming the part's images that these names follow; empty if none is known."""
    found = max(part.names, key=lambda known: len(set(names) & set(known)), default=())
    return found if set(names) & set(found) else ()


_BSD_TERMS = "non-commercial research and education"
_BSD = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/"
_RAIN = "https://www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html"
_RAIN_NOTE = (
    "the clean images are BSDS500's: do not train a derainer on BSDS500 and test it here. The "
    "authors' site now has another, larger version, Rain200; papers use this one"
)
_SET5 = ("baby", "bird", "butterfly", "head", "woman")
_SET14 = (
    "baboon barbara bridge coastguard comic face flowers "
    "foreman lenna man monarch pepper ppt3 zebra"
)
_LIVE1 = (
    "bikes building2 buildings caps carnivaldolls cemetry churchandcapitol coinsinfountain dancers "
    "flowersonih35 house lighthouse2 lighthouse3 manfishing monarch ocean paintedhouse parrots "
    "plane rapids sailing1 sailing2 sailing3 sailing4 statue stream studentsculpture woman womanhat"
)
_LOL_EVALUATION = "1 22 23 55 79 111 146 179 493 547 665 669 748 778 780"


def _sr_test(
    name: str,
    count: int,
    *,
    own: tuple[str, ...] = (),
    terms: str = "none stated; used for benchmarks",
    notes: str = "",
) -> KnownSet:
    """A super-resolution test set: HR images, which are degraded here."""
    by_number = (
        numbered("img_{:03d}", 1, count),
        numbered("img{:03d}", 1, count),
        numbered("img_{:03d}_SRF_4_HR", 1, count),
    )
    part = Part(
        split="test",
        count=count,
        where=f"{name}/HR, or image_SRF_4 (its *_HR files)",
        names=(own, *by_number) if own else by_number,
    )
    return KnownSet(
        name=name,
        task="super-resolution",
        source="https://github.com/jbhuang0604/SelfExSR",
        terms=terms,
        parts=(part,),
        notes=notes,
    )


CATALOG: tuple[KnownSet, ...] = (
    KnownSet(
        name="DIV2K",
        task="super-resolution",
        source="https://data.vision.ee.ethz.ch/cvl/DIV2K/",
        terms="academic research only; copyright stays with the photographs' owners",
        parts=(
            Part(
                split="train",
                count=800,
                where="DIV2K_train_HR",
                names=(numbered("{:04d}", 1, 800),),
            ),
            Part(
                split="test",
                count=100,
                where="DIV2K_valid_HR",
                names=(numbered("{:04d}", 801, 900),),
            ),
        ),
    ),
    KnownSet(
        name="Flickr2K",
        task="super-resolution",
        source="https://cv.snu.ac.kr/research/EDSR/Flickr2K.tar",
        terms="none stated; photographs from Flickr",
        parts=(
            Part(
                split="train",
                count=2650,
                where="Flickr2K_HR",
                names=(numbered("{:06d}", 1, 2650),),
            ),
        ),
        notes="together with DIV2K it is called DF2K: put links to both into one folder",
    ),
    _sr_test(
        "Set5",
        5,
        own=_SET5,
        notes="`woman` is a reduced copy of 302003 in the training images of BSDS500",
    ),
    _sr_test("Set14", 14, own=tuple(_SET14.split()), notes="`bridge` is grey"),
    KnownSet(
        name="B100",
        task="super-resolution",
        source=_BSD,
        terms=_BSD_TERMS,
        parts=(
            Part(
                split="test",
                count=100,
                where="images/test of BSDS300, or BSD100/image_SRF_4 of SelfExSR",
                names=(
                    numbered("img_{:03d}", 1, 100),
                    numbered("img_{:03d}_SRF_4_HR", 1, 100),
                ),
                pattern=r"\d{4,6}",
            ),
        ),
        notes="the validation images of BSDS500, and CBSD68 is 68 of them: what was trained on "
        "CBSD432 has seen the other 32",
    ),
    _sr_test(
        "Urban100",
        100,
        terms="photographs from Flickr under Creative Commons licences, listed at the source",
        notes="image_SRF_2 holds images of half the size: take image_SRF_4",
    ),
    KnownSet(
        name="Manga109",
        task="super-resolution",
        source="http://www.manga109.org/en/",
        terms="academic use only, on application; Manga109-s, 87 of the books, also for companies",
        parts=(Part(split="test", count=109, where="Manga109/HR, a page of each title"),),
    ),
    KnownSet(
        name="BSD400",
        task="grey denoising",
        source="https://github.com/cszn/DnCNN",
        terms=_BSD_TERMS,
        parts=(
            Part(
                split="train",
                count=400,
                where="TrainingCodes/DnCNN_TrainingCodes_v1.0/data/Train400",
                names=(numbered("test_{:03d}", 1, 400),),
                sizes_px=((180, 180),),
            ),
        ),
        notes="training and test images of BSDS500, cut to 180x180 px; disjoint from CBSD68",
    ),
    KnownSet(
        name="CBSD68",
        task="colour denoising",
        source="https://github.com/clausmichele/CBSD68-dataset",
        terms=_BSD_TERMS,
        parts=(
            Part(
                split="test",
                count=68,
                where="CBSD68/original_png",
                names=(numbered("{:04d}", 0, 67),),
                pattern=r"\d{4,6}|test\d{3}",
                sizes_px=((481, 321),),
            ),
        ),
        notes="68 of the images of B100; the noisy copies in the same repository are not used",
    ),
    KnownSet(
        name="Kodak24",
        task="colour denoising",
        source="https://r0k.us/graphics/kodak/",
        terms="released by Kodak for unrestricted use, as the source understands it",
        parts=(
            Part(
                split="test",
                count=24,
                where="kodim01.png to kodim24.png",
                names=(numbered("kodim{:02d}", 1, 24),),
                sizes_px=((768, 512), (500, 500)),
            ),
        ),
        notes="papers on denoising use crops of 500x500 px; figures on whole images differ",
    ),
    KnownSet(
        name="McMaster",
        task="colour denoising",
        source="https://www4.comp.polyu.edu.hk/~cslzhang/CDM_Dataset.htm",
        terms="none stated; used for research",
        parts=(
            Part(
                split="test",
                count=18,
                where="1.tif to 18.tif",
                names=(numbered("{}", 1, 18),),
                sizes_px=((500, 500),),
            ),
        ),
    ),
    KnownSet(
        name="LIVE1",
        task="JPEG artifacts",
        source="https://live.ece.utexas.edu/research/quality/subjective.htm",
        terms="free for research, with notice",
        parts=(
            Part(
                split="test",
                count=29,
                where="the 29 reference images of LIVE's quality database",
                names=(tuple(_LIVE1.split()),),
            ),
        ),
        notes="papers use it in colour, or made grey: data.channels = 1",
    ),
    KnownSet(
        name="SIDD",
        task="real noise",
        source="https://abdokamel.github.io/sidd/",
        terms="MIT",
        parts=(
            Part(
                split="train",
                count=320,
                where="SIDD_Medium_Srgb/Data",
                paired=True,
                pattern=r".*\d{4}_GT_SRGB_\d{3}",
            ),
            Part(
                split="train",
                count=0,
                where="input_crops and gt_crops, cut from SIDD_Medium_Srgb",
                paired=True,
                pattern=r"\d{4}_SRGB_\d{3}_s\d{3}|\d+_\d+",
            ),
            Part(
                split="test",
                count=1280,
                where="ValidationNoisyBlocksSrgb.mat and ValidationGtBlocksSrgb.mat",
                paired=True,
                names=(
                    tuple(f"block-{s:02d}-{b:02d}" for s in range(1, 41) for b in range(1, 33)),
                    numbered("ValidationBlocksSrgb_{}", 0, 1279),
                ),
                sizes_px=((256, 256),),
            ),
        ),
        notes="whole images of SIDD Medium take some 30 GB when decoded; crops of 512x512 px that "
        "overlap take more",
    ),
    KnownSet(
        name="LOLv1",
        task="low light",
        aliases=("lol", "our485", "eval15"),
        source="https://daooshee.github.io/BMVC2018website/",
        terms="none stated",
        parts=(
            Part(
                split="train",
                count=485,
                where="our485/low and our485/high",
                paired=True,
                pattern=r"\d+",
                sizes_px=((600, 400),),
            ),
            Part(
                split="test",
                count=15,
                where="eval15/low and eval15/high",
                paired=True,
                names=(tuple(_LOL_EVALUATION.split()),),
                sizes_px=((600, 400),),
            ),
        ),
    ),
    KnownSet(
        name="Rain100L",
        aliases=("raintrainl",),
        task="deraining",
        source=_RAIN,
        terms="none stated; used for research",
        parts=(
            Part(
                split="train",
                count=200,
                where="RainTrainL, rain-1.png beside norain-1.png",
                paired=True,
                pattern=r"(norain-)?\d+",
            ),
            Part(
                split="test",
                count=100,
                where="Rain100L, rainy/rain-001.png and norain-001.png",
                paired=True,
                pattern=r"(norain-)?\d+",
            ),
        ),
        notes=_RAIN_NOTE,
    ),
    KnownSet(
        name="Rain100H",
        aliases=("raintrainh",),
        task="deraining",
        source=_RAIN,
        terms="none stated; used for research",
        parts=(
            Part(
                split="train",
                count=1800,
                where="RainTrainH, rain-1.png beside norain-1.png",
                paired=True,
                pattern=r"(norain-)?\d+",
            ),
            Part(
                split="test",
                count=100,
                where="Rain100H, rainy/rain-001.png and norain-001.png",
                paired=True,
                pattern=r"(norain-)?\d+",
            ),
        ),
        notes="546 of the 1,800 training images show scenes of the test images; 1,254 remain "
        f"without them. {_RAIN_NOTE}",
    ),
    KnownSet(
        name="GoPro",
        task="deblurring",
        source="https://seungjunnah.github.io/Datasets/gopro",
        terms="CC BY 4.0",
        parts=(
            Part(
                split="train",
                count=2103,
                where="train, a folder for each scene with blur and sharp inside",
                paired=True,
                sizes_px=((1280, 720),),
            ),
            Part(
                split="test",
                count=1111,
                where="test, a folder for each scene with blur and sharp inside",
                paired=True,
                sizes_px=((1280, 720),),
            ),
        ),
        notes="blur_gamma is not used",
    ),
)
"""Every set that is known here."""
