"""The network of the user's own that the page on other tools shows."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import call, photo, save_image, write_recipe
from sparkir.models.facts import ModelFacts, restore
from sparkir.models.registry import build

pytest_plugins = ["helpers"]
PAGE = Path(__file__).parents[1] / "docs" / "ecosystem.md"


class Registered(nn.Sequential):
    """What a registry like timm's gives."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1))
        self.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture
def shown(project, monkeypatch):
    """The page's code as a module, with a registry in the place of timm's."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "timm" in c]
    (project / "shown_networks.py").write_text(code)
    registry = types.ModuleType("timm")
    registry.create_model = lambda name: {"tiny": Registered}[name]()
    monkeypatch.setitem(sys.modules, "timm", registry)
    monkeypatch.syspath_prepend(str(project))
    torch.manual_seed(0)
    torch.save(Registered().state_dict(), project / "published.pth")
    yield project
    sys.modules.pop("shown_networks", None)


def test_it_teaches_from_the_checkpoint_as_it_was_published(shown):
    teacher = {"model": "shown_networks:restorer", "options": {"name": "tiny"}}
    changes = {"teacher": teacher | {"weights": "published.pth"}, "train.steps": 2}
    changes |= {"data.degradation": "noise", "data.scale": 1, "metric": "rgb"}
    options = {"depth": 3, "width": 4, "channels": 3}
    changes |= {"student": {"model": "dncnn", "options": options}}
    write_recipe(shown / "own.toml", changes)
    said = call("check", "own.toml")
    assert said.code == 0, said
    assert "teacher: mine, " in said.text
    assert call("distill", "own.toml", "--out", "run").code == 0


def test_its_values_are_shifted_once(shown):
    network = build("shown_networks:restorer", name="tiny").eval()
    network.network = nn.Identity()
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(restore(network, image), image)


def trained():
    """A function that loads its weights itself."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)
    network.facts = ModelFacts(
        name="mine", scale=1, channels=3, value_range=1.0, taps=(), halo_px=1
    )
    return network


def test_a_function_may_return_it_trained(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "their_networks", types.SimpleNamespace(trained=trained))
    changes = {"teacher": {"model": "their_networks:trained"}, "train.steps": 2}
    changes |= {"data.degradation": "noise", "data.scale": 1, "metric": "rgb"}
    options = {"depth": 3, "width": 4, "channels": 3}
    changes |= {"student": {"model": "dncnn", "options": options}}
    write_recipe(project / "own.toml", changes)
    said = call("distill", "own.toml", "--out", "run")
    assert said.code == 0, said
    assert "teacher.weights is not set: the teacher is as their_networks:trained" in said.err
    save_image(project / "pairs/input/a.png", photo(20, 20, 1))
    save_image(project / "pairs/target/a.png", photo(20, 20, 2))
    assert call("evaluate", "their_networks:trained", "--data", "pairs").code == 0
