import numpy as np
import pytest
import torch
from torch import nn

from sparkir.data.grey import full_luma
from sparkir.errors import SparkirError
from sparkir.evaluate.metrics import luma
from sparkir.models.facts import ModelFacts, as_seen, facts_of, restore
from sparkir.models.registry import build


class Recorder(nn.Module):
    """Enlarges by repeating pixels, and remembers what it was given."""

    def __init__(self, **facts: object) -> None:
        super().__init__()
        given = {"name": "recorder", "scale": 2, "channels": 3, "value_range": 255.0}
        self.facts = ModelFacts(**given | {"taps": (), "halo_px": 0} | facts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_restore_brings_values_and_sizes_to_the_network_and_back():
    network = Recorder(size_multiple=4)
    lq = torch.rand(2, 3, 6, 9)
    restored = restore(network, lq)
    assert network.seen.shape == (2, 3, 8, 12)
    torch.testing.assert_close(network.seen[:, :, :6, :9], lq * 255)
    torch.testing.assert_close(network.seen[:, :, 6], network.seen[:, :, 4])  # reflected
    expected = lq.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(restored, expected)


def test_restore_leaves_sizes_that_fit_alone():
    network = Recorder(size_multiple=4)
    restore(network, torch.rand(1, 3, 8, 4))
    assert network.seen.shape == (1, 3, 8, 4)


def test_a_side_is_padded_by_itself():
    network = Recorder(size_multiple=16)
    restore(network, torch.rand(1, 3, 100, 9))
    assert network.seen.shape == (1, 3, 112, 16)


def test_restore_lets_gradients_through():
    lq = torch.rand(1, 3, 5, 5, requires_grad=True)
    restore(Recorder(size_multiple=3), lq).sum().backward()
    torch.testing.assert_close(lq.grad, torch.full_like(lq, 4.0))


@pytest.mark.parametrize(
    ("facts", "shape", "message"),
    [
        ({"min_size_px": 15}, (1, 3, 20, 14), "a width of at least 15 px, but got 20 x 14"),
        ({"size_multiple": 8}, (1, 3, 3, 16), "a height of at least 6 px, but got 3 x 16"),
        ({}, (1, 1, 8, 8), "3-channel images, but got 1"),
    ],
)
def test_restore_refuses_images_it_cannot_give_to_the_network(facts, shape, message):
    with pytest.raises(SparkirError, match=message):
        restore(Recorder(**facts), torch.zeros(shape))


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0},
        {"channels": 4},
        {"value_range": 1023.0},
        {"halo_px": -1},
        {"size_multiple": 0},
        {"min_size_px": 0},
    ],
)
def test_impossible_facts_are_refused(wrong):
    with pytest.raises(SparkirError, match=f"recorder.*{next(iter(wrong))}"):
        Recorder(**wrong)


def test_a_network_without_facts_is_told_how_to_get_them():
    with pytest.raises(SparkirError, match=r"Conv2d carries no facts; set network\.facts"):
        facts_of(nn.Conv2d(3, 3, 1))


def test_facts_are_enough_for_a_traced_network():
    network = build("rfdn", width=8, blocks=1)
    traced = torch.fx.symbolic_trace(network)
    traced.facts = network.facts
    lq = torch.rand(1, 3, 16, 17)
    torch.testing.assert_close(restore(traced, lq), restore(network, lq))


def facts_of_one(**facts: object) -> ModelFacts:
    return Recorder(**facts).facts


class TestAsSeen:
    """The luma that a network of one channel is trained on."""

    @pytest.mark.parametrize("luma_range", ["full", "studio"])
    def test_is_the_luma_by_which_whole_images_are_evaluated(self, luma_range):
        facts = facts_of_one(channels=1, luma_range=luma_range)
        image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        expected = luma(image) if luma_range == "studio" else full_luma(image)
        batch = torch.from_numpy(image).movedim(-1, 0)[None].float() / 255
        np.testing.assert_allclose(as_seen(batch, facts)[0, 0] * 255, expected, atol=1e-4)

    def test_colours_are_left_alone(self):
        image = torch.rand(2, 3, 4, 4)
        assert as_seen(image, facts_of_one(channels=3)) is image

    def test_one_channel_is_grey_to_a_network_of_three(self):
        image = torch.rand(2, 1, 4, 4)
        assert torch.equal(as_seen(image, facts_of_one(channels=3)), torch.cat([image] * 3, 1))

    def test_one_channel_is_that_luma_already(self):
        image = torch.rand(2, 1, 4, 4)
        assert as_seen(image, facts_of_one(channels=1, luma_range="studio")) is image
