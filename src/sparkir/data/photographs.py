"""Photographs that come inside the scikit-image wheel: a demonstration that downloads nothing.

They are read where pip put them; this project does not redistribute them. What scikit-image's
documentation says of each:

=======================  ==========================================================  ==============
file                     source                                                      terms
=======================  ==========================================================  ==============
astronaut.png            Eileen Collins; NASA Great Images (flic.kr/p/r9qvLn)        public domain
brick.png                CC0Textures, Bricks25                                       CC0
camera.png               Lav Varshney                                                CC0
chelsea.png              Stefan van der Walt                                         CC0
coffee.png               Rachel Michetti, courtesy of Pikolo Espresso Bar            CC0
coins.png                Greek coins; Brooklyn Museum, archives image 51611          no known
                                                                                     restrictions
grass.png                DeviantArt, linolafett, Grass-01                            CC0
gravel.png               CC0Textures, Gravel04                                       CC0
hubble_deep_field.jpg    NASA, HubbleSite 2012-37                                    public domain
ihc.png                  Center for Microscopy and Molecular Imaging                 no known
                                                                                     restrictions
moon.png                 not stated                                                  not stated
motorcycle_left.png      Middlebury 2014 stereo benchmark (Scharstein et al.),       not stated
motorcycle_right.png     reduced four times                                          not stated
retina.jpg               Mikael Häggström, WikiJournal of Medicine 1 (2), 2014       CC0
rocket.jpg               SpaceX, launch of DSCOVR (flickr.com/photos/spacexphotos)   public domain
=======================  ==========================================================  ==============
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sparkir.errors import SparkirError

_FILES = {
    "train": (
        "brick.png",
        "camera.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "test": ("astronaut.png", "chelsea.png", "coffee.png"),
}
_INSTALL = 'pip install "sparkir[demo]"'


def photographs(split: Literal["train", "test"]) -> list[Path]:
    """The files of one split: 12 to train on (6 of them grey), 3 in colour to test on.

    Twelve images are enough to see the tools work, not to judge a method.

    Raises:
        SparkirError: scikit-image is not installed, or its wheel lacks one of the files.
    """
    # find_spec does not import: scikit-image takes a second, and all we want is its folder.
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise SparkirError(f"the demo photographs come with scikit-image: {_INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    paths = [folder / name for name in _FILES[split]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SparkirError(f"{folder} lacks {', '.join(missing)}: reinstall with {_INSTALL}")
    return paths
