import subprocess
import sys

import pytest

from sparkir.data import photographs as module
from sparkir.data.images import read_image
from sparkir.data.photographs import photographs
from sparkir.errors import SparkirError


def test_every_photograph_is_there_and_can_be_read():
    train, test = photographs("train"), photographs("test")
    assert [path.stem for path in test] == ["astronaut", "chelsea", "coffee"]
    assert len(train) == 12
    assert not set(train) & set(test)
    for path in [*train, *test]:
        assert min(read_image(path).shape[:2]) >= 300


def test_every_photograph_is_attributed():
    for path in [*photographs("train"), *photographs("test")]:
        assert path.name in (module.__doc__ or "")


def test_scikit_image_is_not_imported():
    code = (
        "import sys; from sparkir.data.photographs import photographs; "
        "photographs('test'); sys.exit('skimage' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_scikit_image(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SparkirError, match=r'pip install "sparkir\[demo\]"'):
        photographs("train")


def test_wheel_that_lacks_a_file(monkeypatch):
    monkeypatch.setitem(module._FILES, "test", ("astronaut.png", "gone.png"))
    with pytest.raises(SparkirError, match=r"lacks gone\.png: reinstall"):
        photographs("test")
