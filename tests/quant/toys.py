"""Small networks, each with a construction that quantization has to get right."""

import itertools
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparkir.models.attention import WindowAttention, shift_mask
from sparkir.models.facts import ModelFacts
from sparkir.models.mirnet import DualAttention, SelectiveKernelFusion
from sparkir.models.normalize import LayerNorm2d
from sparkir.models.registry import build
from sparkir.models.resample import BilinearUp, BlurDown
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.quantizer import ActivationQuantizer, activation_quantizers
from sparkir.quant.ranges import RangeObserver
from sparkir.quant.spec import QuantSpec

WIDTH = 8


def convolution(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def unit_grid(**options) -> ActivationQuantizer:
    """A grid of step 1, zero at byte 0."""
    quantizer = ActivationQuantizer(**options)
    nn.init.zeros_(quantizer.log_scale)
    return quantizer


class Toy(nn.Module):
    """head -> a body of the subclass -> tail, values in [0, 1] and outputs around grey."""

    def __init__(self, tail_inputs: int = WIDTH) -> None:
        super().__init__()
        self.facts = ModelFacts(
            name="toy", scale=1, channels=3, value_range=1.0, taps=("head",), halo_px=8
        )
        self.head = convolution(3, WIDTH)
        self.middle = convolution(WIDTH, WIDTH)
        self.relu = nn.ReLU()
        self.tail = convolution(tail_inputs, 3)
        with torch.no_grad():
            self.head.weight.mul_(2)
            self.tail.bias.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(self.head(x)))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Written(Toy):
    """A toy whose body is a function of it and a tensor of `WIDTH` channels, with modules of it."""

    def __init__(self, body: Callable[["Written", Tensor], Tensor], **modules: Any) -> None:
        super().__init__()
        self.written = body
        for name, module in modules.items():
            setattr(self, name, module)

    def body(self, x):
        return self.written(self, x)


class Plain(Toy):
    def body(self, x):
        return self.relu(self.middle(self.relu(x)))


class ResidualThenReLU(Toy):
    def body(self, x):
        return self.relu(self.middle(x) + x)


class MixedConcatenation(Toy):
    """Parts of every kind, one of them also read by a convolution and one by an addition."""

    def __init__(self):
        super().__init__(tail_inputs=4 * WIDTH)

    def body(self, x):
        rectified = self.relu(x)
        branch = self.middle(rectified)
        parts = [rectified, F.leaky_relu(branch, 0.1), torch.sigmoid(x), branch + x]
        return torch.cat(parts, dim=1)


class ReLUIntoConcatenation(Toy):
    """A grid shared with negative values cannot do the ReLU's work."""

    def __init__(self):
        super().__init__(tail_inputs=2 * WIDTH)

    def body(self, x):
        return torch.cat([x, self.relu(self.middle(x))], 1)


class Dense(Toy):
    """Every step reads all results so far."""

    def __init__(self):
        super().__init__(tail_inputs=3 * WIDTH)
        self.first, self.second = convolution(WIDTH, WIDTH), convolution(2 * WIDTH, WIDTH)

    def body(self, x):
        a = self.relu(self.first(x))
        b = self.relu(self.second(torch.cat([a, x], 1)))
        c = self.middle(torch.cat([a, x, b], 1)[:, WIDTH : 2 * WIDTH])
        return torch.cat([a, b, c], 1)


class ConcatenationWithConstant(Toy):
    def __init__(self):
        super().__init__(tail_inputs=2 * WIDTH)
        self.register_buffer("learned", torch.rand(1, WIDTH, 1, 1))

    def body(self, x):
        x = F.adaptive_avg_pool2d(self.relu(x), 1).mean(0, keepdim=True)
        return torch.cat((x, self.learned), 1)


class ConcatenationOfPieces(Toy):
    """chunk gives a tuple, which goes into a concatenation as it is."""

    def body(self, x):
        return torch.cat(self.relu(x).chunk(2, dim=1), axis=1)


class Shuffles(Toy):
    def __init__(self):
        super().__init__()
        self.inner = convolution(4 * WIDTH, 4 * WIDTH)

    def body(self, x):
        x = F.max_pool2d(self.relu(x), 3, stride=1, padding=1)
        x = self.relu(self.inner(F.pixel_unshuffle(x, 2)))
        return self.middle(F.pixel_shuffle(x, 2))


class Gate(Toy):
    """Channel attention, once with a linear layer and once with a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.pointwise = nn.Conv2d(WIDTH, WIDTH, 1)

    def body(self, x):
        x = self.relu(x)
        x = x * torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]
        return self.middle(x * self.pointwise(F.adaptive_avg_pool2d(x, 1)).sigmoid())


class LinearOverPixels(Toy):
    """A linear layer over more than two dimensions."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def body(self, x):
        return self.linear(self.relu(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Geometries(Toy):
    """Strided, depthwise, dilated, without bias, reflecting, transposed; and an enlargement."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False)
        self.depthwise = convolution(WIDTH, WIDTH, groups=WIDTH)
        self.dilated = nn.Conv2d(WIDTH, WIDTH, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.reflecting = convolution(WIDTH, WIDTH, padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)

    def body(self, x):
        small = self.depthwise(self.relu(self.strided(x)))
        large = F.interpolate(small, size=(x.size(2), x.size(3)), mode="bilinear")
        return self.dilated(large + self.transposed(small)) + self.reflecting(x)


class Constants(Toy):
    """Arithmetic with numbers, parameters and sizes."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, WIDTH, 1, 1))

    def body(self, x):
        x = (x * 0.1 + self.gamma * x) * x.size(2) / x.shape[-2]
        return self.middle(x) + torch.ones(1, dtype=x.dtype, device=x.device)


class OneTensorTwice(Toy):
    def body(self, x):
        return self.middle(x + x)


class SharedActivation(Toy):
    def body(self, x):
        x = self.relu(x)
        return self.relu(self.relu(self.middle(x)) + x)


class InPlace(Toy):
    """Operations that change a tensor, with and without use of what they return."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.1, inplace=True)

    def body(self, x):
        self.leaky(x)
        y = self.relu(self.middle(x))
        y += x
        z = y.sigmoid()
        z.add_(x)
        F.relu(z, inplace=True)
        torch.relu_(y)
        return z.mul_(y)


class InPlaceConcatenation(Toy):
    """A ReLU that no grid absorbs, working in place."""

    def __init__(self):
        super().__init__(tail_inputs=2 * WIDTH)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x):
        return torch.cat([self.relu(self.middle(x)), x], axis=1)


class ReLUBesideAnother(Toy):
    """A layer's result that is rectified, and read as it is too."""

    def body(self, x):
        branch = self.middle(x)
        return self.relu(branch) + branch.sigmoid()


class UnusedBranch(Toy):
    def body(self, x):
        x.sigmoid()
        self.middle(x)
        return self.relu(x)


class Halves(Toy):
    """The gate of NAFNet: half of the channels times the other half, and a split."""

    def __init__(self):
        super().__init__(tail_inputs=WIDTH // 4)

    def body(self, x):
        a, b = self.middle(x).chunk(2, dim=1)
        return torch.split(a * b, WIDTH // 4, dim=1)[1]


class CalledTwice(Toy):
    """One layer, two grids that it reads."""

    def body(self, x):
        return self.middle(self.relu(self.middle(x)))


class Scaled(Toy):
    """Factors behind convolutions: learned for each channel, and a number."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.rand(1, WIDTH, 1, 1))
        self.last = convolution(WIDTH, WIDTH, bias=False)

    def body(self, x):
        x = x + self.middle(self.relu(x)) * self.beta
        return x + 0.5 * self.last(self.relu(x))


class Resized(Toy):
    """Down and up again by constant convolutions, a transposed one, a PReLU."""

    def __init__(self):
        super().__init__()
        self.down, self.up = BlurDown(WIDTH), BilinearUp(WIDTH)
        self.act = nn.PReLU(init=0.3)
        self.transposed = nn.ConvTranspose2d(
            WIDTH, WIDTH, 3, stride=2, padding=1, output_padding=1, bias=False
        )

    def body(self, x):
        small = self.act(self.down(x))
        return self.transposed(small) + self.up(small)


class Attentions(Toy):
    """Everything that MIRNet's attentions are made of, one of its units called twice."""

    def __init__(self):
        super().__init__()
        self.unit, self.fuse = DualAttention(WIDTH), SelectiveKernelFusion(WIDTH, height=2)
        self.unit.CA.conv_du[1] = nn.LeakyReLU(0.1)  # of its one channel, half would be dead

    def body(self, x):
        first = self.unit(x)
        return self.fuse([x, self.unit(first)])


class Normalised(Toy):
    """Over the channels of planes, over those of pixels, and without parameters."""

    def __init__(self):
        super().__init__()
        self.planes, self.pixels = LayerNorm2d(WIDTH), nn.LayerNorm(WIDTH)
        self.plain = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.last = convolution(WIDTH, WIDTH)
        with torch.no_grad():
            for layer in (self.middle, self.linear, self.last):
                layer.weight.mul_(0.1)

    def body(self, x):
        x = x + self.middle(self.planes(x))
        pixels = x.permute(0, 2, 3, 1)
        pixels = pixels + self.linear(self.pixels(pixels))
        return x + self.last(self.plain(pixels).permute(0, 3, 1, 2))


class Attending(Toy):
    """The second window of the image is two halves that do not see each other."""

    def __init__(self):
        super().__init__()
        self.attention = WindowAttention(WIDTH, 2)
        nn.init.normal_(self.attention.relative_position_bias_table)
        self.shift = torch.tensor(0.1)  # no buffer

    def body(self, x):
        pixels = (self.middle(x) + self.shift).permute(0, 2, 3, 1)[:, :8, :16]
        windows = pixels.unflatten(2, (2, 8)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        attended = self.attention(windows, shift_mask(8, 16, torch.device("cpu")))
        return x[:, :, :8, :16] + attended.unflatten(2, (8, 8)).permute(0, 4, 2, 1, 3).flatten(3)


class Slices(Toy):
    """Channels taken apart and put together again; and a border cut off, whose width is data."""

    def __init__(self):
        super().__init__()
        self.first = convolution(WIDTH // 2, WIDTH // 2)

    def body(self, x):
        x = torch.cat([self.first(x[:, : WIDTH // 2]), x[:, WIDTH // 2 :]], dim=1)
        return x[..., : x.size(3)]


class Curves(Toy):
    """Functions of one value, as modules and as functions."""

    def __init__(self):
        super().__init__()
        self.gelu, self.silu = nn.GELU(), nn.SiLU()

    def body(self, x):
        return F.silu(self.middle(self.gelu(x))) + self.silu(x) * F.gelu(x)


class Statistics(nn.Module):
    """Multiplies tensors inside, which would be put on grids if it were looked into."""

    stays_in_float = "for a reason of its own"

    def forward(self, x):
        return (x * x.sigmoid()).mean((2, 3), keepdim=True)


class WholeInFloat(Toy):
    def __init__(self):
        super().__init__()
        self.statistics = Statistics()

    def body(self, x):
        return self.middle(x * self.statistics(x))


class KeywordCalls(Toy):
    def __init__(self):
        super().__init__(tail_inputs=2 * WIDTH)

    def body(self, x):
        x = F.leaky_relu(input=x, negative_slope=0.2)
        return torch.cat(tensors=[self.middle(input=x), x], dim=1)


class EdgesInFour(Toy):
    """The image is read at 4 bits and added at 8; the output is added to it."""

    def forward(self, x):
        return self.tail(self.relu(self.head(x))) + x


class DeadChannels(Toy):
    """Channels of zeros or next to zeros with a bias, as pruning and weight decay leave them."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.head.weight[1] = 0
            self.middle.weight[2] *= 1e-9
            self.head.bias[1] = self.middle.bias[2] = 0.7

    def body(self, x):
        return self.relu(self.middle(self.relu(x)))


class ZeroTail(Toy):
    """A residual network as it is initialised: the last layer gives nothing yet."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)

    def forward(self, x):
        return self.tail(self.relu(self.head(x))) + x


_LAST_LAYERS = {
    "srcnn": "conv3",
    "rfdn": "upsampler.0",
    "rlfn": "upsampler.0",
    "bsrn": "upsampler.upsampleOneStep.0",
    "bsrn-s": "upsampler.upsampleOneStep.0",
    "imdn": "model.2",
    "fmen": "tail.0",
    "span": "upsampler.0",
}
"""Of networks that do not add their output to something."""


@torch.no_grad()
def make_trained(network: nn.Module) -> None:
    """Give a fresh network what training would: an output around grey, no dead ReLUs."""
    name = network.facts.name
    if name in _LAST_LAYERS:
        last = network.get_submodule(_LAST_LAYERS[name])
        last.bias.fill_(network.facts.value_range / 2)
    if name == "carn-m":  # its groups are of two channels here
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                layer.bias.fill_(0.2)
    if name == "span":  # its first layer reads [0, 255]
        network.conv_1.eval_conv.weight.mul_(0.01)
    for layer in network.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
        if isinstance(layer, WindowAttention):
            nn.init.normal_(layer.relative_position_bias_table)
    if name == "nafnet":  # its branches start with factors of zero
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith(("beta", "gamma")):
                nn.init.normal_(parameter, std=0.3)
    if name == "plainusr":  # a dim image, and a little of the rest
        for weight in (network.head_image.weight, network.tail_image.weight):
            weight.lerp_(weight.round(), 0.8).mul_(0.5)
        network.tail.bias.fill_(0.4)
        network.tail.weight.mul_(0.2)


def shipped(name: str, **options) -> Callable[[], nn.Module]:
    """A registered network as if it were trained."""

    def make() -> nn.Module:
        network = build(name, **options)
        make_trained(network)
        return network

    return make


@dataclass(frozen=True)
class Case:
    network: Callable[[], nn.Module]
    edges: set[str] = field(default_factory=lambda: {"head", "tail"})
    """First and last layers."""
    left_in_float: dict[str, str] = field(default_factory=dict)
    """Operation -> a word of the reason."""
    at_least_db: float = 45.0
    """What 8 bits leave, before training."""
    not_layers: set[str] = field(default_factory=set)
    """Convolutions that stay in float or are not used."""
    more_layers: dict[str, bool] = field(default_factory=dict)
    """Layers that the network does not have: second calls, and constants (True), of 8 bits."""
    rewritten: bool = False
    """Whether it is said in other words, which float32 rounds otherwise."""


_NO_KERNEL = "no integer kernel"
_CONSTANT = "constant"
_EXPONENTIAL = "an exponential"
_STATISTICS = "the real statistics"
_PLAIN_EDGES = {"head", "head_image", "tail", "tail_image"}
_INTERPOLATION = {"interpolate": "between grid points"}
_UPSCALING = {"conv2d": "constants"}

CASES: dict[str, Case] = {
    "plain": Case(Plain),
    "residual": Case(ResidualThenReLU),
    "concatenation": Case(MixedConcatenation),
    "relu into concatenation": Case(ReLUIntoConcatenation),
    "dense": Case(Dense),
    "concatenation with constant": Case(
        ConcatenationWithConstant,
        left_in_float={"mean": _NO_KERNEL, "cat": _CONSTANT},
        not_layers={"middle"},
        rewritten=True,
    ),
    "concatenation of pieces": Case(
        ConcatenationOfPieces,
        left_in_float={"chunk": _NO_KERNEL, "cat": _CONSTANT},
        not_layers={"middle"},
    ),
    "shuffles": Case(Shuffles),
    "gate": Case(Gate, rewritten=True),
    "linear": Case(LinearOverPixels, not_layers={"middle"}),
    "geometries": Case(
        Geometries,
        left_in_float={
            "interpolate": "between grid points",
            "reflecting": "padding_mode='reflect'",
        },
        not_layers={"reflecting", "middle"},
        rewritten=True,
    ),
    "constants": Case(
        Constants,
        left_in_float={
            "mul": _CONSTANT,
            "mul_1": _CONSTANT,
            "mul_2": _CONSTANT,
            "truediv": _NO_KERNEL,
            "add_1": _CONSTANT,
        },
    ),
    "one tensor twice": Case(OneTensorTwice, left_in_float={"add": "one tensor"}),
    "shared activation": Case(SharedActivation),
    "in place": Case(InPlace),
    "in place concatenation": Case(InPlaceConcatenation),
    "relu beside another": Case(ReLUBesideAnother),
    "unused branch": Case(UnusedBranch, not_layers={"middle"}),
    "halves": Case(Halves, rewritten=True),
    "called twice": Case(CalledTwice, more_layers={"middle_call2": False}),
    "scaled": Case(Scaled, rewritten=True),
    "resized": Case(
        Resized,
        not_layers={"middle"},
        more_layers={"rewritten.conv2d": True, "rewritten.conv2d_1": True},
        rewritten=True,
    ),
    "attentions": Case(
        Attentions,
        left_in_float={"fuse.softmax": _EXPONENTIAL},
        not_layers={"middle"},
        more_layers={"rewritten.mean": True, "rewritten.mean_1": True}
        | dict.fromkeys(
            (
                "unit.body.0_call2",
                "unit.body.2_call2",
                "unit.SA.spatial.conv_call2",
                "unit.CA.conv_du.0_call2",
                "unit.CA.conv_du.2_call2",
                "unit.conv1x1_call2",
            ),
            False,
        ),
        rewritten=True,
    ),
    "normalised": Case(
        Normalised,
        left_in_float=dict.fromkeys(("planes", "pixels", "plain"), _STATISTICS),
    ),
    "attending": Case(
        Attending, left_in_float={"add": _CONSTANT, "attention.softmax": _EXPONENTIAL}
    ),
    "slices": Case(Slices, not_layers={"middle"}),
    "curves": Case(Curves),
    "whole in float": Case(WholeInFloat, left_in_float={"statistics": "a reason of its own"}),
    "keyword calls": Case(KeywordCalls),
    "edges in four": Case(EdgesInFour, not_layers={"middle"}),
    "dead channels": Case(DeadChannels),
    "zero tail": Case(ZeroTail, not_layers={"middle"}),
    "srcnn": Case(shipped("srcnn", scale=2), {"conv1", "conv3"}, {"conv2d": "8 bits do not hold"}),
    "dncnn": Case(
        shipped("dncnn", depth=4, width=8), {"model.0", "model.6"}, {"sub": "subtraction"}
    ),
    "edsr": Case(
        shipped("edsr", width=8, blocks=1, scale=2),
        {"head.0", "tail.1"},
        {"sub": "subtraction", "add_2": _CONSTANT},
    ),
    "rfdn": Case(
        shipped("rfdn", width=8, blocks=1, scale=2),
        {"fea_conv", "upsampler.0"},
        _INTERPOLATION,
    ),
    "rlfn": Case(
        shipped("rlfn", width=8, blocks=1, scale=2),
        {"conv_1", "upsampler.0"},
        _INTERPOLATION,
    ),
    "bsrn": Case(
        shipped("bsrn", width=16, blocks=1, scale=2),
        {"fea_conv.pw", _LAST_LAYERS["bsrn"]},
        _INTERPOLATION | {"B1.cca.contrast": "statistics of the whole image"},
    ),
    "bsrn-s": Case(
        shipped("bsrn-s", width=8, blocks=1, scale=2),
        {"fea_conv.pw", _LAST_LAYERS["bsrn-s"]},
        _INTERPOLATION,
    ),
    "carn-m": Case(shipped("carn-m", width=8, scale=2), {"entry", "exit"}, {"sub": "subtraction"}),
    "fmen": Case(shipped("fmen", width=8, blocks=1, scale=2), {"head", "tail.0"}),
    "safmn": Case(
        shipped("safmn", width=8, blocks=1, scale=2),
        {"to_feat", "to_img.0"},
        {"norm": "statistics of the whole image"},
        more_layers={"rewritten.conv2d": True},
        rewritten=True,
    ),
    "span": Case(
        shipped("span", width=8, cat_width=8, blocks=2, scale=2),
        {"conv_1.eval_conv", "upsampler.0"},
        {"sub": "subtraction", "mul": _CONSTANT},
    ),
    "imdn": Case(shipped("imdn", width=8, blocks=1, scale=2), {"model.0", "model.2"}),
    "nafnet": Case(
        shipped("nafnet", width=8, encoder_blocks=[1], middle_blocks=1, decoder_blocks=[1]),
        {"intro", "ending"},
        {
            f"{block}.{norm}": _STATISTICS
            for block in ("encoders.0.0", "middle_blks.0", "decoders.0.0")
            for norm in ("norm1", "norm2")
        },
        rewritten=True,
    ),
    "plainusr": Case(shipped("plainusr", size="u", scale=2), _PLAIN_EDGES),
    "plainusr with pooling": Case(
        shipped("plainusr", size="s", scale=2),
        _PLAIN_EDGES,
        dict.fromkeys((f"block{n}.body.3.body.1" for n in "12m34"), "an exponential")
        | dict.fromkeys((f"block{n}.body.3.modulation" for n in "12m34"), "between grid points")
        | dict.fromkeys(
            ("interpolate", *(f"interpolate_{n}" for n in range(1, 5))), "between grid points"
        ),
    ),
}


LARGE: dict[str, Case] = {
    "mirnet": Case(
        shipped("mirnet", width=8, groups=1, blocks=1),
        {"conv_in", "conv_out"},
        {f"body.0.body.0.selective_kernel.{level}.softmax": _EXPONENTIAL for level in range(3)},
    ),
    "swinir": Case(
        shipped("swinir", width=8, depths=[2], heads=2),
        {"conv_first", "upsample.0"},
        {"sub": "subtraction", "add_6": _CONSTANT, "patch_embed.norm": _STATISTICS}
        | {"norm": _STATISTICS}
        | {
            f"layers.0.residual_group.blocks.{block}.{name}": word
            for block in range(2)
            for name, word in {
                "norm1": _STATISTICS,
                "norm2": _STATISTICS,
                "attn.softmax": _EXPONENTIAL,
            }.items()
        },
        at_least_db=38,  # of 8 channels, a normalisation finds some that hardly vary
    ),
}
"""Shipped networks that take too long for every test; see `test_large`."""


def images(network: nn.Module, count: int = 2, height: int = 24, width: int = 20) -> Tensor:
    """Smooth noise of 256 grey levels, in the network's value range.

    (count, C, height, width), or more where the network wants multiples.
    """
    facts = network.facts
    height, width = (px + -px % facts.size_multiple for px in (height, width))
    noise = torch.rand(count, facts.channels, height, width)
    smooth = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (smooth * 255).round() / 255 * facts.value_range


def quantized(network: nn.Module, spec: QuantSpec, batch: Tensor) -> fx.GraphModule:
    """Prepared, calibrated on `batch`, in evaluation mode."""
    student = prepare(network, spec)
    calibrate(student, [batch])
    return student.eval()


@contextmanager
def observing(student: nn.Module):
    """Let the network run in floating point, as in calibration."""
    quantizers = activation_quantizers(student).values()
    for quantizer in quantizers:
        quantizer.observer = RangeObserver()
    yield
    for quantizer in quantizers:
        quantizer.observer = None


def psnr_db(a: Tensor, b: Tensor, value_range: float) -> float:
    return float(10 * torch.log10(value_range**2 / (a - b).square().mean()))


def in_turn(*choices: Iterable[str]) -> list[Any]:
    """Every network with one combination of choices, in turn; the other combinations are slow."""
    combinations = list(itertools.product(*choices))
    return [
        pytest.param(
            case,
            *combination,
            marks=() if place == row % len(combinations) else (pytest.mark.slow,),
            id="-".join((case, *combination)),
        )
        for row, case in enumerate(CASES)
        for place, combination in enumerate(combinations)
    ]
