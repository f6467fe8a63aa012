"""A prepared network learns: its weights, and where its grids lie."""

import pytest
import torch
import torch.nn.functional as F
from toys import CASES, images, in_turn, quantized, unit_grid

from sparkir.quant.quantizer import ActivationQuantizer, WeightQuantizer
from sparkir.quant.spec import QuantSpec


def spec(bits: int, learned: str) -> QuantSpec:
    return QuantSpec(weight_bits=bits, activation_bits=bits, learned=learned)


@pytest.mark.parametrize(("case", "learned"), in_turn(("lsq", "pams")))
def test_everything_that_is_learned_gets_a_gradient(case, learned):
    network = CASES[case].network()
    x = images(network)
    student = quantized(network, spec(4, learned), x).train()
    restored = student(x)
    (restored * torch.randn_like(restored)).sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert {name for name, gradient in gradients.items() if gradient is None} == set()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    learned_here = {name for name in gradients if name.endswith("log_scale")}
    assert learned_here == {
        f"{name}.log_scale"
        for name, module in student.named_modules()
        if isinstance(module, WeightQuantizer)
        or (isinstance(module, ActivationQuantizer) and module.image_step is None)
    }
    if learned == "lsq":  # PAMS moves a bound only where something is clipped
        stuck = {name for name in learned_here if not gradients[name].any()}
        # Behind a float operation that only moves values, the same grid again rounds nothing.
        moved = {f"quantizers.{name}.log_scale" for name in CASES[case].left_in_float}
        assert stuck <= moved or case == "zero tail"


@pytest.mark.parametrize("learned", ["lsq", "pams", "none"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_twenty_steps_of_adam_lower_the_loss(bits, learned):
    network = CASES["residual"].network()
    x = images(network, count=4)
    target = F.avg_pool2d(x, 3, stride=1, padding=1)
    student = quantized(network, spec(bits, learned), x).train()
    grids = {n: p.detach().clone() for n, p in student.named_parameters() if "log_scale" in n}
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(student(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-3:]) < 0.5 * losses[0]
    moved = {n for n, p in student.named_parameters() if n in grids and not p.equal(grids[n])}
    if learned == "none":
        assert moved == set()
    else:
        assert "middle.weight_quantizer.log_scale" in moved
        assert len(moved) >= len(grids) - 2 - (learned == "pams")  # all but the images'


def test_gradients_do_not_depend_on_how_large_the_values_are():
    """The logarithm of the step: [0, 1] and [0, 255] learn alike."""
    gradients = []
    for factor in (1.0, 255.0):
        torch.manual_seed(0)
        quantizer = unit_grid(bits=4)
        with torch.no_grad():
            quantizer.log_scale.fill_(-1.0)
            quantizer.log_scale += torch.tensor(factor).log()
        (quantizer(torch.rand(1000) * 6 * factor).dequantize() / factor).square().sum().backward()
        gradients.append(float(quantizer.log_scale.grad))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-3)


def test_training_in_bfloat16_keeps_the_steps_finite():
    network = CASES["residual"].network()
    x = images(network)
    student = quantized(network, spec(4, "lsq"), x).train()
    with torch.autocast("cpu", torch.bfloat16):
        restored = student(x)
    assert restored.dtype == torch.float32
    restored.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.requires_grad)
