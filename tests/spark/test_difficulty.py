import numpy as np
import pytest
import torch

from sparkir.spark.difficulty import FEATURES, Standardize, difficulty_maps, rightness

LAPLACIAN, PIXELS, STUDENT, TEACHER = range(4)


def reference(student, teacher, target, grid=8):
    """The four maps of one image (c, h, w), cell by cell and pixel by pixel, in float64."""
    student, teacher, target = (np.asarray(x, dtype=np.float64) for x in (student, teacher, target))
    luma = target[0]
    if len(target) == 3:
        luma = 0.299 * target[0] + 0.587 * target[1] + 0.114 * target[2]
    height, width = luma.shape
    laplacian = np.zeros_like(luma)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                near = luma[np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)]
                laplacian[y, x] += near - luma[y, x]
    cell_h, cell_w = -(-height // grid), -(-width // grid)

    def cell(image, row, column):
        ys = np.clip(np.arange(row * cell_h, (row + 1) * cell_h), 0, height - 1)
        xs = np.clip(np.arange(column * cell_w, (column + 1) * cell_w), 0, width - 1)
        return image[np.ix_(ys, xs)]

    maps = np.zeros((4, grid, grid))
    for row in range(grid):
        for column in range(grid):
            maps[:, row, column] = (
                cell(laplacian, row, column).var(),
                cell(luma, row, column).var(),
                cell(np.abs(student - target).mean(0), row, column).mean(),
                cell(np.abs(teacher - student).mean(0), row, column).mean(),
            )
    return maps


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(32, 32, 8), (32, 48, 8), (37, 50, 8), (16, 8, 8), (9, 65, 8), (5, 3, 8), (20, 21, 4)],
)
def test_against_the_slow_reference(channels, height, width, grid):
    student, teacher, target = torch.rand(3, 2, channels, height, width)
    maps = difficulty_maps(student, teacher, target, grid=grid)
    assert maps.shape == (2, 4, grid, grid)
    for i in range(2):
        expected = reference(student[i], teacher[i], target[i], grid)
        np.testing.assert_allclose(maps[i].numpy(), expected, rtol=1e-4, atol=1e-7)


class TestEachMapAlone:
    """Images that excite one of the four signals, and leave the others at zero there."""

    def test_laplacian_variance(self):
        """A step along the border of two columns of cells: each cell is flat by itself."""
        target = torch.full((1, 3, 64, 64), 0.25)
        target[..., 32:] = 0.75
        (maps,) = difficulty_maps(target, target, target)
        assert (maps[LAPLACIAN, :, [3, 4]] > 1e-3).all()
        assert (maps[LAPLACIAN, :, [0, 1, 2, 5, 6, 7]] == 0).all()
        assert (maps[[PIXELS, STUDENT, TEACHER]] == 0).all()

    def test_laplacian_variance_of_one_edge_cell(self):
        """An impulse in the middle of a cell: its Laplacian is -4, 1, 1, 1, 1 times its height."""
        target = torch.full((1, 1, 64, 64), 0.5)
        target[..., 20, 43] = 0.75
        (maps,) = difficulty_maps(target, target, target)
        # 64 pixels with mean 0 and squares (16 + 4) / 16; and the variance of one impulse
        assert maps[LAPLACIAN, 2, 5].item() == pytest.approx(1.25 / 64)
        assert maps[PIXELS, 2, 5].item() == pytest.approx(0.25**2 * (1 / 64 - 1 / 64**2))
        maps[:, 2, 5] = 0
        assert (maps == 0).all()

    def test_pixel_variance(self):
        """A ramp: variance in every cell, no Laplacian but where the image ends."""
        target = torch.arange(64).div(64).expand(1, 3, 64, 64)
        (maps,) = difficulty_maps(target, target, target)
        expected = (np.arange(8) / 64).var()
        np.testing.assert_allclose(maps[PIXELS].numpy(), expected, rtol=1e-4)
        assert maps[LAPLACIAN, :, 1:-1].max() < 1e-12
        assert (maps[[STUDENT, TEACHER]] == 0).all()

    def test_student_error(self):
        """The student is wrong in the top right quadrant, in one of three channels."""
        target = torch.full((1, 3, 64, 64), 0.5)
        student = target.clone()
        student[:, 1, :32, 32:] += 0.3
        (maps,) = difficulty_maps(student, student, target)
        expected = torch.zeros(8, 8)
        expected[:4, 4:] = 0.1
        torch.testing.assert_close(maps[STUDENT], expected)
        assert (maps[[LAPLACIAN, PIXELS, TEACHER]] == 0).all()

    def test_teacher_gap(self):
        """The teacher is darker than a perfect student in the bottom left quadrant."""
        target = torch.full((1, 3, 64, 64), 0.5)
        teacher = target.clone()
        teacher[:, :, 32:, :32] -= 0.2
        (maps,) = difficulty_maps(target, teacher, target)
        expected = torch.zeros(8, 8)
        expected[4:, :4] = 0.2
        torch.testing.assert_close(maps[TEACHER], expected)
        assert (maps[[LAPLACIAN, PIXELS, STUDENT]] == 0).all()

    def test_the_names_are_in_this_order(self):
        assert FEATURES == ("laplacian_variance", "pixel_variance", "student_error", "teacher_gap")

    def test_texture_of_student_and_teacher_does_not_count(self):
        """Both variances are of the ground truth."""
        flat = torch.full((1, 3, 64, 64), 0.5)
        maps = difficulty_maps(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64), flat)
        assert (maps[:, [LAPLACIAN, PIXELS]] == 0).all()

    def test_colour_counts_by_luma(self):
        """Half a cell of pure red, green or blue: variance (weight / 2)**2."""
        for channel, weight in enumerate((0.299, 0.587, 0.114)):
            target = torch.zeros(1, 3, 8, 8)
            target[:, channel, :4] = 1
            maps = difficulty_maps(target, target, target, grid=1)
            assert maps[0, PIXELS].item() == pytest.approx((weight / 2) ** 2, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (50, 37)])
@pytest.mark.parametrize("channels", [1, 3])
def test_constant_image_has_no_negative_variance(value, size, channels):
    """E[x**2] - E[x]**2 is below zero on some of these, and its logarithm NaN."""
    flat = torch.full((2, channels, *size), value)
    maps = difficulty_maps(flat, flat, flat)
    assert maps.min() >= 0
    assert maps.max() < 1e-12
    standardized = Standardize().train()(maps)
    assert standardized.isfinite().all()
    assert standardized.abs().max() < 1


def test_no_gradient_flows():
    student, teacher, target = (torch.rand(1, 3, 16, 16, requires_grad=True) for _ in range(3))
    assert not difficulty_maps(student, teacher, target).requires_grad
    standardize = Standardize()
    assert not standardize(difficulty_maps(student, teacher, target)).requires_grad
    assert not standardize.mean.requires_grad


class TestStandardize:
    def test_first_batch_provides_the_statistics(self):
        maps = torch.rand(16, 4, 8, 8) * torch.tensor([1e-5, 1e-2, 1.0, 100.0]).view(4, 1, 1)
        standardized = Standardize().train()(maps)
        np.testing.assert_allclose(standardized.mean((0, 2, 3)).numpy(), 0, atol=1e-4)
        np.testing.assert_allclose(standardized.std((0, 2, 3)).numpy(), 1, atol=1e-2)

    def test_later_batches_move_them_by_the_momentum(self):
        standardize = Standardize(2, momentum=0.1).train()
        first, second = torch.rand(2, 8, 2, 4, 4) + torch.tensor([0.0, 5.0]).view(2, 1, 1, 1, 1)
        standardize(first)
        standardize(second)
        a, b = (np.log(x.numpy().astype(np.float64) + 1e-6) for x in (first, second))
        axes = (0, 2, 3)
        for found, of_a, of_b in (
            (standardize.mean, a.mean(axes), b.mean(axes)),
            (standardize.variance, a.var(axes), b.var(axes)),
        ):
            np.testing.assert_allclose(found.numpy(), 0.9 * of_a + 0.1 * of_b, rtol=1e-4)

    def test_followed_in_training_only(self):
        standardize = Standardize().train()
        standardize(torch.rand(2, 4, 8, 8))
        before = {name: value.clone() for name, value in standardize.state_dict().items()}
        standardize.eval()
        maps = torch.rand(2, 4, 8, 8) * 9
        first, second = standardize(maps), standardize(maps)
        assert torch.equal(first, second)
        for name, value in standardize.state_dict().items():
            assert torch.equal(value, before[name]), name
        standardize.train()(maps)
        for name, value in standardize.state_dict().items():
            assert not torch.equal(value, before[name]), name

    def test_state_dict_round_trip(self):
        standardize, copy = Standardize().train(), Standardize().train()
        for _ in range(3):
            standardize(torch.rand(2, 4, 8, 8))
        copy.load_state_dict(standardize.state_dict())
        for _ in range(3):  # the next batch is no first batch
            maps = torch.rand(2, 4, 8, 8) * 2
            assert torch.equal(copy(maps), standardize(maps))


class TestRightness:
    @pytest.mark.parametrize(
        ("truth", "expected"),
        [(-0.2, 0.0), (0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (1.0, 1.0), (1.7, 1.0)],
    )
    def test_is_how_far_on_the_way_the_truth_lies(self, truth, expected):
        student, teacher = torch.rand(2, 2, 3, 16, 16)
        found = rightness(student, teacher, student + truth * (teacher - student))
        torch.testing.assert_close(found, torch.full((2, 1, 8, 8), expected), rtol=0, atol=1e-4)

    def test_is_of_the_least_error(self):
        student, teacher, target = torch.rand(3, 1, 1, 4, 4)
        r = rightness(student, teacher, target, grid=1).item()
        error = [
            (student + s * (teacher - student) - target).square().sum().item()
            for s in (r - 0.01, r, r + 0.01)
        ]
        assert 0 < r < 1
        assert min(error) == error[1]

    def test_where_both_agree(self):
        student, target = torch.rand(2, 1, 3, 16, 16)
        assert (rightness(student, student, target) == 0.5).all()
