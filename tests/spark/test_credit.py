import pytest
import torch
from torch import nn

from sparkir.spark.credit import cell_credit
from sparkir.spark.difficulty import to_cells
from sparkir.spark.reward import psnr_db, ssim

SETTINGS = {"alpha": 1.0, "beta": 10.0, "grid": 4}


@pytest.fixture
def batch():
    """(lq, teacher, target): six images of 16 x 16 px, the teacher near the target."""
    target = torch.rand(6, 3, 16, 16)
    lq = target + 0.1 * torch.randn_like(target)
    return lq, target + 0.02 * torch.randn_like(target), target


def student():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1))


def credit(network, batch, *, reach, **changes):
    lq, teacher, target = batch
    return cell_credit(
        network,
        list(network.parameters()),
        lq,
        output=network(lq),
        teacher=teacher,
        target=target,
        reach=reach,
        **(SETTINGS | changes),
    )


def test_is_the_gain_of_a_little_more_weight_on_the_cell(batch):
    """Against the definition: cell by cell, the gradient of its distance times the reward's."""
    network = student().double()
    lq, teacher, target = (x.double() for x in batch)
    weights = [p for p in network.parameters() if p.dim() > 1]
    output = network(lq)
    reward = psnr_db(output[:3], target[:3]).sum() + 10 * ssim(output[:3], target[:3]).sum()
    uphill = torch.autograd.grad(reward, weights, retain_graph=True)
    uphill = [g * w.detach().norm() / g.norm() for g, w in zip(uphill, weights, strict=True)]
    distance = to_cells((output - teacher).square().mean(1, keepdim=True), 4).mean(-1)
    found = credit(network, (lq, teacher, target), reach=1e-6) / 1e-6
    for image, row, column in [(3, 0, 0), (3, 2, 1), (5, 3, 3)]:
        downhill = torch.autograd.grad(distance[image, 0, row, column], weights, retain_graph=True)
        expected = -sum((a * b).sum() for a, b in zip(downhill, uphill, strict=True))
        assert found[image - 3, 0, row, column].item() == pytest.approx(expected.item(), rel=1e-2)


def test_images_of_the_second_half_do_not_reward_themselves(batch):
    network, (lq, teacher, target) = student(), batch
    first = credit(network, batch, reach=0.01)
    other = target.clone()
    other[3:] = torch.rand_like(other[3:])
    assert torch.equal(credit(network, (lq, teacher, other), reach=0.01), first)


def test_a_teacher_that_is_right_earns_credit_and_one_that_misleads_loses_it(batch):
    network, (lq, _, target) = student(), batch
    output = network(lq).detach()
    misled = 2 * output - target  # as far from the output, on the other side
    assert credit(network, (lq, target, target), reach=1e-3).mean() > 0
    assert credit(network, (lq, misled, target), reach=1e-3).mean() < 0


def test_the_student_is_left_as_it_was(batch):
    network = student()
    before = [p.detach().clone() for p in network.parameters()]
    credit(network, batch, reach=0.1)
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def test_the_graph_still_gives_its_gradients(batch):
    network, (lq, teacher, target) = student(), batch
    expected = torch.autograd.grad((network(lq) - target).abs().mean(), network.parameters())
    output = network(lq)
    cell_credit(
        network,
        list(network.parameters()),
        lq,
        output=output,
        teacher=teacher,
        target=target,
        reach=0.1,
        **SETTINGS,
    )
    (output - target).abs().mean().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_also_when_looking_ahead_fails(batch):
    network, (lq, teacher, target) = student(), batch
    before = [p.detach().clone() for p in network.parameters()]

    def fail(images):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        cell_credit(
            fail,
            list(network.parameters()),
            lq,
            output=network(lq),
            teacher=teacher,
            target=target,
            reach=0.1,
            **SETTINGS,
        )
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_a_parameter_without_gradient_stays(batch):
    network = student()
    network.unused = nn.Parameter(torch.ones(2, 2))
    lq, teacher, target = batch
    lonely = [*network[0].parameters(), *network[2].parameters(), network.unused]
    found = cell_credit(
        nn.Sequential(network[0], network[1], network[2]),
        lonely,
        lq,
        output=network[2](network[1](network[0](lq))),
        teacher=teacher,
        target=target,
        reach=0.01,
        **SETTINGS,
    )
    assert found.shape == (3, 1, 4, 4)
    assert found.isfinite().all()
