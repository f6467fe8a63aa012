import pytest
import torch
import torch.nn.functional as F

from sparkir.models.resample import BilinearUp


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_bilinear_enlargement_is_torchs(factor):
    x = torch.randn(2, 3, 5, 4)
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(BilinearUp(3, factor)(x), expected)
