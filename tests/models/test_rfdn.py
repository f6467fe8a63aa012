import pytest
import torch

from sparkir.errors import SparkirError
from sparkir.models.checkpoint import load_weights
from sparkir.models.facts import restore
from sparkir.models.rfdn import RFDN


@pytest.mark.data
def test_published_weights_load_unchanged(development_data):
    path = development_data / "weights/RFDN/RFDN_AIM.pth"
    network = RFDN()
    load_weights(network, path)
    published = torch.load(path, weights_only=True)
    loaded = network.state_dict()
    assert list(loaded) == list(published)
    assert all(torch.equal(loaded[name], published[name]) for name in published)


def test_smallest_size_is_the_one_in_the_facts():
    network = RFDN(width=8, blocks=1)
    smallest = network.facts.min_size_px
    assert network(torch.rand(1, 3, smallest, smallest)).shape[-1] == 4 * smallest
    with pytest.raises(RuntimeError):
        network(torch.rand(1, 3, smallest, smallest - 1))
    with pytest.raises(SparkirError, match="a height of at least 15 px"):
        restore(network, torch.rand(1, 3, smallest - 1, smallest))


def test_width_too_small_for_the_attention_is_refused():
    with pytest.raises(SparkirError, match="width >= 4"):
        RFDN(width=3)


def test_anchored_tiles_see_what_the_whole_image_sees():
    """As published they do not: a cell's place depends on the size of the image."""
    torch.manual_seed(0)
    image = 255 * torch.rand(1, 3, 150, 162)
    apart = {}
    for anchored in (False, True):
        network = RFDN(scale=2, width=8, blocks=2, anchored=anchored).eval()
        halo, phase = network.facts.halo_px, network.facts.tile_phase_px
        top, left, side = 60, 66, 36
        y, x = ((start - halo) // phase * phase for start in (top, left))
        with torch.no_grad():
            whole = network(image)
            tile = network(image[..., y : top + side + halo, x : left + side + halo])
        of_whole = whole[..., 2 * top : 2 * (top + side), 2 * left : 2 * (left + side)]
        of_tile = tile[..., 2 * (top - y) :, 2 * (left - x) :][..., : 2 * side, : 2 * side]
        apart[anchored] = float((of_whole - of_tile).abs().max())
    assert apart[True] < 0.01 < apart[False]
