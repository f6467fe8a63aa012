"""Teachers that spandrel recognises: they restore what spandrel restores, by their facts."""

import importlib.util
import sys
import types

import pytest
import torch

from helpers import assert_refused, call, photo, save_image, write_recipe
from sparkir import recipe
from sparkir.assemble import gather
from sparkir.errors import SparkirError
from sparkir.models.checkpoint import load_weights
from sparkir.models.facts import restore
from sparkir.models.registry import build
from sparkir.models.spandrel import recognised
from sparkir.teacher import teacher_outputs

pytest_plugins = ["helpers"]
needs_spandrel = pytest.mark.skipif(
    importlib.util.find_spec("spandrel") is None, reason="needs spandrel"
)


@pytest.fixture(scope="module", autouse=True)
def torchvision_for_the_import():
    """Two of spandrel's architectures import a resampling and a rotation that no test here uses."""
    if "spandrel" in sys.modules or importlib.util.find_spec("spandrel") is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            for name in list(sys.modules):
                if name.partition(".")[0] == "torchvision":
                    patch.delitem(sys.modules, name)
            for name in ("torchvision", "torchvision.transforms"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            functional = types.ModuleType("torchvision.transforms.functional")
            functional.InterpolationMode = functional.rotate = functional.normalize = object
            patch.setitem(sys.modules, functional.__name__, functional)
        import spandrel  # noqa: F401


def network(architecture):
    """A small network of spandrel's own."""
    torch.manual_seed(0)
    match architecture:
        case "Compact":
            from spandrel.architectures.Compact import Compact

            return Compact(num_feat=8, num_conv=2, upscale=2)
        case "SAFMN":
            from spandrel.architectures.SAFMN import SAFMN

            return SAFMN(dim=8, n_blocks=1, upscaling_factor=2)
        case "DnCNN":
            from spandrel.architectures.DnCNN import DnCNN

            return DnCNN(in_nc=1, out_nc=1, nc=8, nb=8, act_mode="R")
        case "DRUNet":
            from spandrel.architectures.DRUNet import DRUNet

            return DRUNet(in_nc=4, out_nc=3, nc=[8, 8, 8, 8], nb=2)


@pytest.fixture
def saved(tmp_path):
    """Weights as they are published."""

    def save(architecture, wrap=lambda state: {"params_ema": state}):
        path = tmp_path / f"{architecture}.pth"
        torch.save(wrap(network(architecture).eval().state_dict()), path)
        return path

    return save


@needs_spandrel
@pytest.mark.parametrize(
    ("architecture", "facts"),
    [
        ("Compact", {"scale": 2, "channels": 3, "size_multiple": 1, "name": "RealESRGAN Compact"}),
        ("SAFMN", {"scale": 2, "channels": 3, "size_multiple": 8, "name": "SAFMN"}),
        ("DnCNN", {"scale": 1, "channels": 1, "size_multiple": 1, "name": "DnCNN"}),
        ("DRUNet", {"scale": 1, "channels": 3, "size_multiple": 8, "name": "DRUNet"}),
    ],
)
def test_the_description_becomes_facts_and_the_output_is_the_networks(saved, architecture, facts):
    opened = recognised(saved(architecture))
    assert {key: getattr(opened.facts, key) for key in facts} == facts | {
        "name": f"{facts['name']} by spandrel"
    }
    assert opened.facts.value_range == 1.0
    image = torch.rand(2, facts["channels"], 24, 32)
    seen = image
    if architecture == "DRUNet":  # is told how much noise there is
        seen = torch.cat([image, torch.full((2, 1, 24, 32), 15 / 255)], dim=1)
    expected = network(architecture).eval()(seen)
    torch.testing.assert_close(restore(opened, image), expected.clamp(0, 1))


@needs_spandrel
def test_sizes_that_it_cannot_take_are_padded_by_its_facts(saved):
    opened = recognised(saved("SAFMN"))
    image = torch.rand(1, 3, 19, 21)
    padded = torch.nn.functional.pad(image, (0, 3, 0, 5), mode="reflect")
    expected = network("SAFMN").eval()(padded)[..., :38, :42].clamp(0, 1)
    torch.testing.assert_close(restore(opened, image), expected)


@needs_spandrel
def test_its_output_can_be_part_of_a_loss(saved):
    student = torch.rand(1, 3, 48, 48, requires_grad=True)
    teacher = recognised(saved("Compact")).requires_grad_(False)(torch.rand(1, 3, 24, 24))
    (student - teacher).square().mean().backward()
    assert student.grad.abs().max() > 0


@needs_spandrel
def test_it_teaches_a_student_in_a_run(project, saved):
    path = saved("Compact")
    changes = {"teacher": {"model": "spandrel", "weights": str(path)}, "student.weights": ""}
    changes |= {"train.steps": 2, "train.teacher_cache": True}
    write_recipe(project / "other.toml", changes)
    said = call("check", "other.toml")
    assert said.code == 0, said
    parameters = sum(p.numel() for p in network("Compact").parameters())
    assert f"teacher: RealESRGAN Compact by spandrel, {parameters:,} parameters" in said.text
    chosen = recipe.load("other.toml")
    materials = gather(chosen)
    assert teacher_outputs(chosen, materials, lambda event: None) is not None  # its code is known
    said = call("distill", "other.toml", "--out", "run")
    assert said.code == 0, said
    assert "teacher" in (project / "run" / "report.md").read_text("utf-8")


@needs_spandrel
def test_the_commands_open_it_by_its_weights(project, saved):
    path = saved("Compact", wrap=lambda state: state)
    said = call("evaluate", "spandrel", "--weights", path, "--data", "test")
    assert said.code == 0, said
    assert f"RealESRGAN Compact by spandrel with {path}" in said.text
    save_image(project / "in.png", photo(30, 40, 0))
    assert call("restore", "spandrel", "in.png", "out.png", "--weights", path).code == 0


MISTAKES = {
    "options": (
        {"teacher.options": {"scale": 2}},
        ["finds the options in the weights; leave out {'scale': 2}"],
    ),
    "student": (
        {"student.model": "spandrel", "student.options": {}, "student.weights": ""},
        ['student.model = "spandrel"', "can teach, but not be quantized"],
    ),
    "no weights": ({"teacher.weights": ""}, ["the teacher has no weights"]),
    "no file": ({"teacher.weights": "gone.pth"}, ["no weights at gone.pth"]),
    "features": ({"distill": {"method": "fitnet"}}, ["by spandrel", "taps"]),
    "scale": (
        {"data.scale": 4, "student.options": {"scale": 4}},
        ["restores x2, but the data is x4"],
    ),
}


@needs_spandrel
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(project, saved, mistake):
    changes, says = MISTAKES[mistake]
    usual = {"teacher": {"model": "spandrel", "weights": str(saved("Compact"))}}
    usual |= {"student.weights": ""}
    write_recipe(project / "other.toml", usual | changes)
    assert_refused("other.toml", says)


@needs_spandrel
@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda state: {"weight": torch.zeros(3)}, "spandrel recognises no architecture"),
        (lambda state: dict(list(state.items())[:-1]), "spandrel cannot load"),
        (lambda state: {k: v * float("nan") for k, v in state.items()}, "NaN or infinite"),
    ],
)
def test_weights_that_are_not_good(saved, wrap, says):
    with pytest.raises(SparkirError, match=says) as caught:
        recognised(saved("Compact", wrap=wrap))
    assert "\n" not in str(caught.value)


@needs_spandrel
@pytest.mark.data
def test_published_weights_restore_as_by_the_network_that_is_here(development_data):
    path = development_data / "weights/DnCNN/KAIR_dncnn_25.pth"
    ours = build("dncnn")
    load_weights(ours, path)
    noisy = torch.rand(1, 1, 40, 40)
    with torch.no_grad():
        expected = ours.eval()(noisy).clamp(0, 1)
    torch.testing.assert_close(recognised(path)(noisy), expected, rtol=0, atol=2e-6)


def test_a_network_by_this_name_alone_cannot_be_built(project):
    said = call("evaluate", "spandrel", "--data", "test")
    assert said.code == 1
    assert "add --weights FILE" in said.err


def test_without_the_package_the_fix_is_said(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(SparkirError, match=r"pip install 'sparkir\[spandrel\]'"):
        recognised(project / "teacher.safetensors")
    assert "spandrel" in call("models").text
