import pytest
import torch
from torch import nn, optim

from sparkir.spark.trust import Trust


def seen(teacher_error: float, *, noise: float = 0.1, gap: float = 0.2) -> Trust:
    """The best guess from the input is 0; student and truth scatter around it, and the teacher."""
    trust = Trust()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        truth, student, error = torch.randn((3, 4, 1, 32, 32), generator=generator)
        trust.follow(gap * student, teacher_error * error, noise * truth)
    return trust


def test_one_batch_by_hand():
    trust = Trust()
    student = torch.tensor([0.0, 0.4]).view(1, 1, 1, 2)
    teacher = torch.tensor([0.3, 0.4]).view(1, 1, 1, 2)
    target = torch.tensor([0.2, 0.2]).view(1, 1, 1, 2)
    trust.follow(student, teacher, target)
    expected = (0.3 * 0.1 + 0) / (0.3 * (0.1**2 + 0.2**2) ** 0.5)
    assert trust.correlation.item() == pytest.approx(expected)
    assert trust.value.item() == pytest.approx(1 / (1 + 300 * expected**2))


def test_means_are_running_and_of_every_image():
    trust = Trust()
    for value in (0.1, 0.3):
        shown = torch.zeros(2, 1, 2, 2)
        shown[1] = value
        trust.follow(torch.zeros_like(shown), shown, torch.zeros_like(shown))
    assert trust.means[1].item() == pytest.approx((0.1**2 / 2 + 0.3**2 / 2) / 2)
    for _ in range(200):  # the newest count for a fiftieth
        trust.follow(torch.zeros_like(shown), shown, torch.zeros_like(shown))
    assert trust.means[1].item() == pytest.approx(0.3**2 / 2, rel=0.03)


def test_what_it_remembers_is_a_mean_first_and_then_of_fifty_batches():
    trust, expected = Trust(), 0.0
    shown = torch.zeros(1, 1, 2, 2)
    for step in range(1, 121):
        value = 0.1 + 0.3 * (step % 7)
        trust.follow(shown, shown + value, shown)
        expected += max(1 / step, 0.02) * (value**2 - expected)
    assert trust.means[1].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
def test_the_truths_noise_is_no_fault_of_the_teachers(noise):
    """A teacher that is right is believed, however noisy the truth it is compared with."""
    assert seen(0.0, noise=noise).value > 0.95


def test_the_worse_the_teacher_the_less_it_is_believed():
    values = [seen(error).value.item() for error in (0.0, 0.03, 0.1, 0.2, 0.8)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.01


def test_the_nearer_the_student_the_less_there_is_to_learn():
    values = [seen(0.02, gap=gap).value.item() for gap in (0.4, 0.1, 0.03, 0.0)]
    assert values == sorted(values, reverse=True)


def test_a_teacher_that_stops_short_is_left_as_one_that_goes_too_far():
    far, short = Trust(), Trust()
    one = torch.ones(1, 1, 2, 2)
    far.follow(0 * one, one, 0.9 * one)
    short.follow(0 * one, one, 1.1 * one)
    assert far.correlation == 1
    assert short.correlation == -1
    assert far.value == short.value < 0.01


def test_a_teacher_that_is_its_student_or_the_truth_is_no_matter():
    same, other = torch.rand(2, 2, 3, 8, 8)
    for images in ((same, same, other), (same, other, other), (same, same, same)):
        trust = Trust()
        assert trust.value == 1
        trust.follow(*images)
        assert trust.value == 1


def test_its_state_goes_on():
    first, second = Trust(), Trust()
    images = torch.rand(3, 2, 3, 8, 8)
    first.follow(*images)
    second.load_state_dict(first.state_dict())
    for trust in (first, second):
        trust.follow(*(image.square() for image in images))
    assert torch.equal(first.means, second.means)


@pytest.mark.parametrize("is_right", [True, False])
def test_a_right_teacher_is_followed_and_a_wrong_one_left(is_right):
    """A student learns to undo a filter from noisy truths; its teacher undoes it, or a part."""
    torch.manual_seed(0)
    trust, student = Trust(), nn.Conv2d(3, 3, 3, padding=1)
    optimizer = optim.Adam(student.parameters(), lr=0.02)
    for _ in range(400):
        clean = torch.rand(4, 3, 16, 16)
        gt = clean + 0.1 * torch.randn_like(clean)
        teacher = clean if is_right else 0.7 * clean
        output = student(0.5 * clean)
        trust.follow(output.detach(), teacher, gt)
        share = trust.value
        to_teacher, to_truth = (output - teacher).square(), (output - gt).square()
        optimizer.zero_grad()
        loss = share * to_teacher + (1 - share) * to_truth + 0.1 * (output - gt).abs()
        loss.mean().backward()
        optimizer.step()
    assert trust.value > 0.9 if is_right else trust.value < 0.1
    assert (output - clean).square().mean() < (0.9 * clean - clean).square().mean()
