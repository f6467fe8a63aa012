import pytest
import torch
from torch import nn

from sparkir.distill.encoder import Codebook, RandomEncoder, encode, encoder_of, fit_codebook
from sparkir.errors import SparkirError


class TestRandomEncoder:
    def test_is_the_same_everywhere_and_disturbs_no_draw(self):
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        first = RandomEncoder()
        assert torch.equal(torch.rand(1), expected)
        torch.manual_seed(9)
        images = torch.rand(1, 3, 16, 16)
        assert torch.equal(first(images).latents, RandomEncoder()(images).latents)
        assert first.weight_0[0, 0, 0, 0].item() == pytest.approx(-0.3004644)

    @pytest.mark.parametrize("side", [1, 7, 16, 40])
    def test_five_levels_each_half_the_size(self, side):
        levels, latents = encode(RandomEncoder(), torch.rand(2, 3, side, side))
        sides = [side]
        for _ in range(4):
            sides.append(-(-sides[-1] // 2))
        assert [level.shape[-1] for level in levels] == sides
        assert latents is levels[-1]
        assert all(level.std() > 0.05 for level in levels if level.shape[-1] > 1)

    def test_has_nothing_to_train_or_to_save(self):
        encoder = RandomEncoder()
        assert not list(encoder.parameters())
        assert encoder.state_dict() == {}

    def test_gradient_reaches_the_image(self):
        images = torch.rand(1, 3, 16, 16, requires_grad=True)
        RandomEncoder()(images).latents.sum().backward()
        assert images.grad.abs().min() > 0

    def test_grey_is_shown_as_rgb(self):
        grey = torch.rand(1, 1, 8, 8)
        shown = encode(RandomEncoder(), grey.expand(-1, 3, -1, -1))
        assert torch.equal(encode(RandomEncoder(), grey).latents, shown.latents)


class TestByName:
    def test_left_out(self):
        assert isinstance(encoder_of(""), RandomEncoder)

    def test_a_function_of_ones_own(self):
        assert isinstance(encoder_of("sparkir.distill.encoder:RandomEncoder"), RandomEncoder)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("torch.nn:Identity", r"'torch.nn:Identity' made Identity; it must return a sparkir"),
            ("no_such_module:f", "cannot import 'no_such_module' for the encoder"),
            ("torch.nn:no_such", "no function 'no_such'"),
            ("torch.nn:Linear", "'torch.nn:Linear' cannot be called without arguments"),
        ],
    )
    def test_of_something_else(self, name, message):
        with pytest.raises(SparkirError, match=message):
            encoder_of(name)


class TestCodebook:
    def test_by_hand(self):
        """From (1, 0) the codes (0, 0) and (3, 0) are 1 and 4 away, in squares."""
        codebook = Codebook(torch.tensor([[0.0, 0], [3, 0]]), torch.tensor(2.0))
        latent = torch.tensor([1.0, 0]).view(1, 2, 1, 1)
        expected = torch.tensor([-0.5, -2]).log_softmax(0)
        torch.testing.assert_close(codebook(latent).flatten(), expected)

    def test_layout(self):
        """Codes become channels; locations stay where they are."""
        codebook = Codebook(torch.randn(5, 3), torch.tensor(1.0))
        latents = torch.randn(2, 3, 4, 6)
        found = codebook(latents)
        assert found.shape == (2, 5, 4, 6)
        alone = codebook(latents[1:, :, 2:3, 5:])
        torch.testing.assert_close(found[1:, :, 2:3, 5:], alone)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 4, 6))

    def test_fitted_codes_are_the_clusters(self):
        centres = 10 * torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])
        points = centres.repeat(10, 1) + 0.1 * torch.randn(40, 2)
        codebook = fit_codebook(points.T.view(1, 2, 5, 8))
        assert len(codebook.codes) == 10
        assert (torch.cdist(points, codebook.codes).amin(1) < 1).all()
        assert 0 < codebook.temperature < 0.1

    def test_fitting_is_repeatable_and_disturbs_no_draw(self):
        latents = torch.randn(2, 4, 6, 6)
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        first = fit_codebook(latents)
        assert torch.equal(torch.rand(1), expected)
        torch.manual_seed(7)
        assert torch.equal(first.codes, fit_codebook(latents).codes)

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_few_latents(self, count):
        """As many codes as there are latents at most, and no division by zero."""
        latents = torch.randn(1, 3, 1, count)
        codebook = fit_codebook(latents)
        assert len(codebook.codes) == min(2, count)
        assert codebook(latents).isfinite().all()

    def test_no_more_than_256_codes(self):
        assert len(fit_codebook(torch.randn(1, 2, 50, 50)).codes) == 256


def test_modules_of_a_codebook_are_saved():
    codebook = Codebook(torch.randn(5, 3), torch.tensor(1.0))
    assert codebook.state_dict().keys() == {"codes", "temperature"}
    assert isinstance(codebook, nn.Module)
