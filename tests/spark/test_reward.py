import copy

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn, optim

from sparkir.spark.reward import psnr_db, reward, ssim, undone


def skimage_ssim(image, target):
    """SSIM of one (c, h, w) image's luma, mean over where the whole window fits."""
    luma = [
        np.tensordot([0.299, 0.587, 0.114], x.double().numpy(), 1) if len(x) == 3 else x[0].numpy()
        for x in (image, target)
    ]
    _, full = structural_similarity(
        *luma,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        full=True,
    )
    return full[5:-5, 5:-5].mean()


class TestPsnr:
    def test_by_hand(self):
        target = torch.full((3, 3, 8, 8), 0.5)
        image = target.clone()
        image[0] += 0.1  # error 0.01: 20 dB
        image[1, :, :2, :] -= 0.02  # error 0.0004 on a quarter: 40 dB
        image[2, 0, 0, 0] += 0.5  # 0.25 on one value of 192
        expected = [20, 40, -10 * np.log10(0.25 / 192)]
        assert psnr_db(image, target).tolist() == pytest.approx(expected, abs=1e-4)

    def test_perfect_is_100_db(self):
        image = torch.rand(1, 3, 8, 8)
        assert psnr_db(image, image).tolist() == pytest.approx([100])

    def test_nothing_is_rounded_or_clipped(self):
        target = torch.ones(1, 1, 8, 8)
        assert psnr_db(target + 0.001, target).item() == pytest.approx(60, abs=1e-3)


class TestSsim:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("size", [(11, 11), (32, 32), (40, 23)])
    def test_against_scikit_image(self, channels, size):
        target = torch.rand(3, channels, *size)
        noise = torch.tensor([0.01, 0.1, 1.0]).view(3, 1, 1, 1)
        image = (target + noise * torch.randn_like(target)).clamp(0, 1)
        expected = [skimage_ssim(a, b) for a, b in zip(image, target, strict=True)]
        assert ssim(image, target).tolist() == pytest.approx(expected, abs=2e-5)
        assert expected[0] > 0.9 > 0.5 > expected[2]

    def test_of_an_image_with_itself_is_one(self):
        for size in ((32, 32), (8, 6), (1, 1)):  # smaller than the window, too
            image = torch.rand(2, 3, *size)
            assert ssim(image, image).tolist() == pytest.approx([1, 1])

    def test_flat_images(self):
        """(2 a b + c1) / (a**2 + b**2 + c1), as all variances are zero."""
        image, target = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
        expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
        assert ssim(image, target).item() == pytest.approx(expected, abs=1e-5)


class TestReward:
    def test_by_hand(self):
        """Flat images: 0.1 off is 20 dB, 0.01 off is 40 dB."""
        target = torch.full((2, 1, 16, 16), 0.5)
        near, far = target + 0.01, target + 0.1
        better, worse = (torch.stack(x) for x in ((near[0], far[0]), (far[0], near[0])))
        ssim_near, ssim_far = ((2 * 0.5 * x + 1e-4) / (0.25 + x**2 + 1e-4) for x in (0.51, 0.6))
        for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (1.0, 10.0), (0.5, 3.0)):
            expected = alpha * 20 + beta * (ssim_near - ssim_far)
            found = reward(better, worse, target, alpha=alpha, beta=beta)
            assert found.tolist() == pytest.approx([expected, -expected], abs=1e-3)

    def test_is_zero_without_a_difference(self):
        image, target = torch.rand(2, 2, 3, 16, 16)
        assert reward(image, image, target, alpha=1.0, beta=10.0).tolist() == [0, 0]

    def test_resolves_differences_far_below_float32_decibels(self):
        """Late in training a step moves PSNR by 1e-6 dB, as much as float32 resolves at 30 dB."""
        target = torch.rand(4, 3, 32, 32) * 0.5 + 0.25
        without = target + 0.03 * torch.randn_like(target)
        closer = 1 - 1e-7 * torch.tensor([1.0, 2.0, 4.0, -2.0]).view(4, 1, 1, 1)
        better = (target.double() + (without - target).double() * closer.double()).float()

        def exact_db(image):
            error = (image.double() - target.double()).square().mean((1, 2, 3))
            return -10 * error.log10()

        expected = (exact_db(better) - exact_db(without)).tolist()
        found = reward(better, without, target, alpha=1.0, beta=0.0).tolist()
        assert found == pytest.approx(expected, rel=1e-3)

    def test_carries_no_gradient(self):
        images = [torch.rand(1, 3, 16, 16, requires_grad=True) for _ in range(3)]
        assert not reward(*images, alpha=1.0, beta=10.0).requires_grad


OPTIMIZERS = {
    "adam": lambda p: optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
}


class TestUndone:
    @pytest.fixture(params=OPTIMIZERS)
    def optimizer(self, request):
        network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return OPTIMIZERS[request.param](network.parameters())

    @staticmethod
    def parameters(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]

    def give_gradients(self, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    def snapshot(self, optimizer):
        parameters = self.parameters(optimizer)
        return copy.deepcopy(
            (
                [p.detach() for p in parameters],
                [p.grad for p in parameters],
                optimizer.state_dict(),
            )
        )

    def assert_same(self, optimizer, snapshot):
        values, gradients, state = snapshot
        now_values, now_gradients, now_state = self.snapshot(optimizer)
        for a, b in zip(values + gradients, now_values + now_gradients, strict=True):
            assert (a is b is None) or torch.equal(a, b)
        assert state["param_groups"] == now_state["param_groups"]
        assert state["state"].keys() == now_state["state"].keys()
        for key, entries in state["state"].items():
            assert entries.keys() == now_state["state"][key].keys()
            for name, value in entries.items():
                now = now_state["state"][key][name]
                assert torch.equal(value, now) if torch.is_tensor(value) else value == now, name

    @pytest.mark.parametrize("steps_before", [0, 1, 4])
    def test_everything_is_put_back(self, optimizer, steps_before):
        for i in range(steps_before):
            self.give_gradients(optimizer, i)
            optimizer.step()
        self.give_gradients(optimizer, 50)
        before = self.snapshot(optimizer)
        with undone(optimizer):
            for i in (60, 61):
                self.give_gradients(optimizer, i)
                optimizer.step()
            moved = self.snapshot(optimizer)
            assert not torch.equal(before[0][0], moved[0][0])
        self.assert_same(optimizer, before)

    @pytest.mark.parametrize("steps_before", [0, 3])
    def test_next_step_is_the_one_it_would_have_been(self, optimizer, steps_before):
        plain = copy.deepcopy(optimizer)
        for one in (optimizer, plain):
            for i in range(steps_before):
                self.give_gradients(one, i)
                one.step()
            self.give_gradients(one, 50)
        with undone(optimizer):
            self.give_gradients(optimizer, 60)
            optimizer.step()
        for one in (optimizer, plain):
            one.step()
            self.give_gradients(one, 51)
            one.step()
        self.assert_same(optimizer, self.snapshot(plain))

    @pytest.mark.parametrize("steps_before", [0, 3])
    def test_also_when_an_exception_is_raised_inside(self, optimizer, steps_before):
        for i in range(steps_before):
            self.give_gradients(optimizer, i)
            optimizer.step()
        self.give_gradients(optimizer, 50)
        before = self.snapshot(optimizer)
        with pytest.raises(ValueError, match="inside"), undone(optimizer):
            self.give_gradients(optimizer, 60)
            optimizer.step()
            raise ValueError("inside")
        self.assert_same(optimizer, before)

    def test_gradients_changed_in_place(self, optimizer):
        """A backward pass adds to the gradients that are there; clipping scales them."""
        self.give_gradients(optimizer, 0)
        before = self.snapshot(optimizer)
        with undone(optimizer):
            sum(p.square().sum() for p in self.parameters(optimizer)).backward()
            nn.utils.clip_grad_norm_(self.parameters(optimizer), 0.01)
            optimizer.step()
        self.assert_same(optimizer, before)

    def test_parameters_without_gradient(self, optimizer):
        self.parameters(optimizer)[0].grad = None
        before = self.snapshot(optimizer)
        with undone(optimizer):
            self.give_gradients(optimizer, 0)
            optimizer.step()
        self.assert_same(optimizer, before)
        assert self.parameters(optimizer)[0].grad is None
