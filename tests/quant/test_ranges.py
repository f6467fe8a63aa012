"""Where grids start: against brute force, and at the edges."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from toys import WIDTH, Plain, images

from sparkir.errors import SparkirError
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.quantizer import activation_quantizers
from sparkir.quant.ranges import SAMPLES, RangeObserver, fit_grid, fit_weight_scale
from sparkir.quant.spec import QuantSpec


class Normalised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        nn.init.constant_(self.norm.running_var, 0.01)

    def body(self, x):
        return self.norm(super().body(x))


def observed(*tensors: torch.Tensor) -> RangeObserver:
    observer = RangeObserver()
    for tensor in tensors:
        observer.record(tensor)
    return observer


def fit(x, bits=8, method="minmax", *, symmetric=False, non_negative=False) -> tuple[float, int]:
    return fit_grid(
        observed(x), bits=bits, method=method, symmetric=symmetric, non_negative=non_negative
    )


def squared_error(x: torch.Tensor, step: float, zero: int, bits: int) -> float:
    stored = ((x.double() / step).round() + zero).clamp(0, 2**bits - 1)
    return float((((stored - zero) * step - x) ** 2).mean())


SIGNED = {
    "gauss": lambda: torch.randn(3000),
    "skewed": lambda: torch.randn(3000).exp() - 0.7,
    "long tail": lambda: torch.randn(3000) ** 3,
    "negative": lambda: -torch.rand(3000),
}
POSITIVE = {
    "uniform": lambda: torch.rand(3000),
    "rectified": lambda: torch.randn(3000).relu(),
    "long positive tail": lambda: torch.randn(3000).exp(),
}


@pytest.fixture(params=[2, 4, 8], ids=lambda bits: f"{bits} bits")
def bits(request):
    return request.param


@pytest.fixture(params=SIGNED | POSITIVE)
def x(request):
    return (SIGNED | POSITIVE)[request.param]()


def test_a_value_counts_as_much_in_a_small_batch_as_in_a_large():
    observer = observed(torch.zeros(8 * SAMPLES), torch.ones(SAMPLES), torch.full((1,), 2.0))
    kept = observer.sample()
    assert kept.numel() == pytest.approx(SAMPLES, rel=1e-3)
    assert float((kept == 1).float().mean()) == pytest.approx(1 / 9, rel=1e-3)
    assert observer.high == 2.0  # of a single value too
    many = observed(*[torch.full((SAMPLES,), float(batch)) for batch in range(40)])
    assert float(many.sample().mean()) == pytest.approx(19.5, rel=0.02)
    assert sum(part.numel() for part in many._kept) <= 16 * SAMPLES  # and memory is bounded
    equal = observed(torch.zeros(3 * SAMPLES), torch.ones(3 * SAMPLES)).sample()
    assert float(equal.mean()) == pytest.approx(0.5, rel=1e-3)


# -- extremes ------------------------------------------------------------------------------------


def test_minmax_covers_everything_and_no_more(x, bits):
    step, zero = fit(x, bits)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    assert step * (2**bits - 1) == pytest.approx(high - low)
    # The zero point is a whole number, which moves both ends by half a step at most.
    assert -zero * step == pytest.approx(low, abs=step * 0.5001)
    assert (2**bits - 1 - zero) * step == pytest.approx(high, abs=step * 0.5001)


@pytest.mark.parametrize("name", SIGNED)
def test_symmetric_minmax_covers_both_ends(name, bits):
    x = SIGNED[name]()
    step, zero = fit(x, bits, symmetric=True)
    assert zero == 2 ** (bits - 1)
    bounds = np.array([zero, 2**bits - 1 - zero]) * step
    needed = np.array([max(0.0, -float(x.min())), max(0.0, float(x.max()))])
    assert (bounds >= needed - 1e-6).all()
    assert np.isclose(bounds, needed).any()  # and one of them exactly


def test_percentile_is_the_999th_thousandth(x, bits):
    step, _ = fit(x, bits, "percentile")
    low, high = np.quantile(x.numpy(), [0.001, 0.999])
    low, high = min(0.0, low), max(0.0, high)
    assert step == pytest.approx((high - low) / (2**bits - 1), rel=1e-4)


def test_a_non_negative_grid_starts_at_zero(bits):
    x = torch.randn(1000)  # as seen before the ReLU that the grid absorbs
    for method in ("minmax", "percentile", "mse"):
        step, zero = fit(x, bits, method, non_negative=True)
        assert zero == 0
        assert step * (2**bits - 1) <= float(x.max()) + 1e-6


# -- least squares -------------------------------------------------------------------------------


def brute_force(x, bits, *, fixed: int | None) -> float:
    """The least error over 25 x 25 pairs of ends."""
    top = 2**bits - 1
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    lows = [low] if low == 0 or fixed is not None else np.linspace(0.04, 1, 25) * low
    highs = [high] if high == 0 else np.linspace(0.04, 1, 25) * high
    errors = []
    for one in lows:
        for other in highs:
            if fixed is None:
                step = (other - one) / top
                zero = int(min(top, max(0, round(-one / step))))
            else:
                step, zero = other / (top - fixed), fixed
            errors.append(squared_error(x, step, zero, bits))
    return min(errors)


def test_least_squares_is_next_to_brute_force(x, bits):
    step, zero = fit(x, bits, "mse")
    fixed = 0 if x.min() >= 0 else None
    assert squared_error(x, step, zero, bits) <= 1.05 * brute_force(x, bits, fixed=fixed)


EDGES = {
    "one value": torch.tensor([3.0]),
    "three values": torch.tensor([0.1, 5.0, 0.2]),
    "sixteen values": torch.arange(16.0),
    "one outlier": torch.cat([torch.linspace(0, 1, 50_001), torch.tensor([1000.0])]),
    "two-sided outliers": torch.cat(
        [torch.linspace(-1, 1, 5001), torch.tensor([-300.0, 0.0, 500.0])]
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_least_squares_is_never_worse_than_the_extremes(name, bits):
    """Also for a handful of values, and for an extreme that a thinned sample lacks."""
    x = EDGES[name]
    errors = [squared_error(x, *fit(x, bits, method), bits) for method in ("mse", "minmax")]
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_least_squares_clips_a_long_tail_at_2_bits():
    x = torch.randn(20_000).exp()
    step, _ = fit(x, 2, "mse")
    assert step * 3 < float(x.max()) / 3
    assert squared_error(x, step, 0, 2) < 0.5 * squared_error(x, *fit(x, 2), 2)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dead_tensor_gets_a_grid(method, symmetric, bits):
    step, zero = fit(torch.zeros(100), bits, method, symmetric=symmetric)
    assert step == 1 / (2**bits - 1)
    assert zero == 0


def test_rare_values_that_are_not_zero_are_not_lost():
    """999 of 1000 values zero: the percentile alone would say that the range is empty."""
    x = torch.zeros(100_000)
    x[::2000] = 4.0
    step, _ = fit(x, 8, "percentile")
    assert step == pytest.approx(4 / 255)


# -- observing -----------------------------------------------------------------------------------


def test_extremes_are_those_of_everything_seen():
    observer = observed(torch.tensor([[1.0, -2.0]]), torch.tensor(5.0), torch.tensor([0.5]))
    assert (observer.low, observer.high) == (-2.0, 5.0)
    assert sorted(observer.sample().tolist()) == [-2.0, 0.5, 1.0, 5.0]


@pytest.mark.parametrize("shape", [(8, 16, 64, 64), (4, 64, 48, 48), (1, 3, 300, 500)])
def test_every_column_and_channel_is_sampled_alike(shape):
    """Borders differ from the rest: what is next to zero padding must not be all that is seen."""
    observer = observed(torch.arange(shape[-1]).expand(shape))
    columns = observer.sample().long().bincount(minlength=shape[-1])
    assert columns.min() > 0.7 * columns.float().mean()
    assert columns.max() < 1.3 * columns.float().mean()
    channels = observed(torch.arange(shape[1])[:, None, None].expand(shape)).sample()
    counts = channels.long().bincount(minlength=shape[1])
    assert counts.max() < 1.3 * counts.float().mean()


@pytest.mark.parametrize("sizes", [[SAMPLES - 1], [2 * SAMPLES - 1], [200_000] * 3, [10] * 5])
def test_a_sample_is_bounded_and_from_every_record(sizes):
    sample = observed(*(torch.full((size,), float(i)) for i, size in enumerate(sizes))).sample()
    assert sample.numel() == min(SAMPLES, sum(sizes))
    assert sample.unique().numel() == len(sizes)


def test_a_record_is_a_copy():
    x = torch.ones(5)
    observer = observed(x)
    x.zero_()
    assert observer.sample().tolist() == [1.0] * 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(SparkirError, match=r"NaN or infinite.*check its weights"):
        observed(torch.tensor([1.0, bad, 2.0]))


def test_a_broken_network_is_refused_in_calibration():
    network = Plain()
    nn.init.constant_(network.middle.bias, float("nan"))
    student = prepare(network, QuantSpec())
    with pytest.raises(SparkirError, match="NaN or infinite"):
        calibrate(student, [images(network)])
    assert not any(one.observer for one in activation_quantizers(student).values())


def test_calibration_is_of_the_network_that_restores():
    """Statistics of the calibration's batches are not its own, and must not become them."""
    network = Normalised()
    x = images(network)
    students = [prepare(copy.deepcopy(network), QuantSpec()).train(mode) for mode in (False, True)]
    for student in students:
        calibrate(student, [x, 2 * x])
    restoring, training = students
    assert training.training
    assert training.norm.training
    for name, value in restoring.state_dict().items():
        assert torch.equal(training.state_dict()[name], value), name
    assert torch.equal(training.norm.running_var, network.norm.running_var)


def test_calibration_without_images_is_refused():
    with pytest.raises(SparkirError, match="no images; it needs at least one"):
        calibrate(prepare(Plain(), QuantSpec()), [])


@pytest.mark.parametrize("method", ["mse", "percentile", "minmax"])
def test_calibration_fits_every_grid_by_the_method(method):
    """Each grid to the tensor that flows there in float, each weight to itself."""
    network = Plain()
    batches = [images(network), images(network)]
    student = prepare(network, QuantSpec(weight_bits=4, activation_bits=4))
    calibrate(student, iter(batches), method=method)
    with torch.no_grad():
        rectified = [network.head(x).relu() for x in batches]
    step, zero = fit_grid(
        observed(*rectified), bits=4, method=method, symmetric=False, non_negative=True
    )
    quantizer = student.quantizers.relu
    assert quantizer.zero_level == zero == 0
    assert float(quantizer.scale().detach()) == pytest.approx(step)
    torch.testing.assert_close(
        student.middle.weight_quantizer.scale(),
        fit_weight_scale(network.middle.weight, bits=4, method=method),
    )


# -- weights -------------------------------------------------------------------------------------


def channel_errors(weight: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    rows, step = weight.detach().double().flatten(1), step.double()[:, None]
    ints = (rows / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (ints * step - rows).square().sum(1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_steps_cover_or_fit_each_channel(bits):
    weight = torch.randn(6, 64, 3, 3) * torch.logspace(-1, 1, 6).view(-1, 1, 1, 1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest = fit_weight_scale(weight, bits=bits, method="minmax")
    rows = weight.flatten(1)
    assert (widest * high >= rows.amax(1) * (1 - 1e-6)).all()
    assert (widest * low <= rows.amin(1) * (1 - 1e-6)).all()
    touching = torch.isclose(widest * high, rows.amax(1)) | torch.isclose(
        widest * low, rows.amin(1)
    )
    assert touching.all()

    fitted = fit_weight_scale(weight, bits=bits, method="mse")
    errors = channel_errors(weight, fitted, bits)
    assert (errors <= channel_errors(weight, widest, bits) * (1 + 1e-6)).all()
    brute_force = torch.stack(
        [channel_errors(weight, widest * share, bits) for share in torch.linspace(0.2, 1.1, 200)]
    )
    assert (errors <= 1.1 * brute_force.amin(0)).all()


def test_2_bit_weights_are_better_fitted_than_covered():
    weight = torch.randn(4, 16, 3, 3)
    fitted, widest = (
        channel_errors(weight, fit_weight_scale(weight, bits=2, method=method), 2).sum()
        for method in ("mse", "minmax")
    )
    assert fitted < 0.6 * widest


def test_percentile_of_weights_is_between_a_tenth_and_all():
    weight = torch.randn(3, 2000)
    weight[0, 0] = 1000.0
    step = fit_weight_scale(weight, bits=8, method="percentile")
    widest = fit_weight_scale(weight, bits=8, method="minmax")
    torch.testing.assert_close(step[0], widest[0] * 0.1)
    expected = weight[1:].abs().quantile(0.999, dim=1) / 127
    torch.testing.assert_close(step[1:], expected)


@pytest.mark.parametrize("method", ["mse", "percentile", "minmax"])
def test_a_dead_channel_takes_a_step_near_the_others(method):
    """Its bias, counted in a tiny step, would not fit into int32."""
    weight = torch.randn(5, 8, 3, 3)
    weight[1] = 0
    weight[2] *= 1e-12
    step = fit_weight_scale(weight, bits=8, method=method)
    assert (step[1:3] > step.max() * 1e-4).all()
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("method", ["mse", "percentile", "minmax"])
def test_a_layer_of_zeros_gets_steps(method):
    step = fit_weight_scale(torch.zeros(4, 3, 3, 3), bits=4, method=method)
    assert (step > 1e-6).all()
    assert torch.isfinite(step.log()).all()


def test_a_power_of_two_has_an_even_zero_point_at_either_end():
    """Of values that are all below zero, too, whose best zero point would be the last level."""
    for sign in (-1, 1):
        observer = observed(sign * torch.linspace(0, 1, 5001))
        options = {"symmetric": False, "non_negative": False, "power_of_two": True}
        step, zero = fit_grid(observer, bits=8, method="minmax", **options)
        assert math.log2(step).is_integer()
        assert zero % 2 == 0
