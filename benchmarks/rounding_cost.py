"""What 8 bits cost a network without training, and which of them.

    python benchmarks/rounding_cost.py                    # the demo's teacher and photographs
    python benchmarks/rounding_cost.py RECIPE [KEY=VALUE ...]

The recipe's student in W8A8, calibrated on its training crops and scored on its test images: as it
is; with six more bits for the weights, for sums and products of tensors, for all tensors; and what
ONNX Runtime's own static quantization makes of the same network with the same crops (minimum and
maximum, weights by channel). Whatever six more bits give back, 8 bits have cost.
"""

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from sparkir.assemble import Materials, convention_of, gather, quantize_student
from sparkir.deploy.onnx import to_float_onnx, write_model
from sparkir.deploy.session import EXACT_PRODUCTS
from sparkir.evaluate.benchmark import Restorer, evaluate, mean
from sparkir.evaluate.metrics import to_uint8
from sparkir.models.facts import facts_of
from sparkir.quant.calibrate import activation_quantizers
from sparkir.quant.layers import QuantLayer
from sparkir.quant.spec import QuantSpec
from sparkir.recipe import load

MORE_BITS = 6


def main() -> None:
    torch.set_num_threads(1)
    recipe = load(sys.argv[1] if len(sys.argv) > 1 else "demo", sys.argv[2:])
    materials, convention = gather(recipe), convention_of(recipe)
    student = materials.student.eval()

    def score(network: nn.Module | Restorer) -> float:
        return mean(evaluate(network, materials.test, convention)).psnr_db

    print(f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}")
    print(f"{recipe.name}, {facts_of(student).name}, {convention.label}")
    unrounded = score(student)
    print(f"float: {unrounded:.3f} dB; to it:")
    for method in ("mse", "minmax"):
        spec = QuantSpec(calibration=method)
        for what, refine in (
            ("as it is", ()),
            ("finer weights", (finer_weights,)),
            ("finer sums and products", (finer_sums,)),
            ("finer tensors, all", (finer_tensors,)),
            ("finer tensors and weights", (finer_tensors, finer_weights)),
        ):
            prepared = quantize_student(student, spec, materials.crops).eval()
            for make_finer in refine:
                make_finer(prepared, spec)
            print(f"{method}, {what}: {score(prepared) - unrounded:+.3f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        theirs = quantized_by_onnxruntime(student, materials, Path(folder))
        print(f"ONNX Runtime's own, minmax: {score(theirs) - unrounded:+.3f}")


def finer_weights(prepared: nn.Module, spec: QuantSpec) -> None:
    for layer in prepared.modules():
        if isinstance(layer, QuantLayer):
            layer.weight_quantizer.bits += MORE_BITS
            layer.weight_quantizer.calibrate(layer.real_weight(), spec.calibration)


def finer_sums(prepared: nn.Module, spec: QuantSpec) -> None:
    finer_tensors(prepared, spec, ("add", "mul", "cat"))


def finer_tensors(prepared: nn.Module, spec: QuantSpec, made_by: tuple[str, ...] = ("",)) -> None:
    for name, grid in activation_quantizers(prepared).items():
        if grid.image_step is None and name.removeprefix("quantizers.").startswith(made_by):
            with torch.no_grad():
                grid.log_scale.sub_(MORE_BITS * math.log(2))
                grid.zero_point.mul_(2**MORE_BITS)
            grid.bits += MORE_BITS
            grid._zero_level *= 2**MORE_BITS


class Crops(CalibrationDataReader):
    """The crops, one at a time, as ONNX Runtime asks for them."""

    def __init__(self, name: str, crops: list[Tensor]) -> None:
        self.name, self.images = name, self._images(crops)

    def _images(self, crops: list[Tensor]) -> Iterator[np.ndarray]:
        for batch in crops:
            yield from batch[:, None].numpy()

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {self.name: image}


def quantized_by_onnxruntime(student: nn.Module, materials: Materials, folder: Path) -> Restorer:
    """The float network in ONNX Runtime's own integers."""
    white = facts_of(student).value_range
    made, ready, quantized = (folder / f"{name}.onnx" for name in ("made", "ready", "quantized"))
    write_model(to_float_onnx(student), made)
    quant_pre_process(str(made), str(ready), skip_symbolic_shape=True)
    name = open_file(ready).get_inputs()[0].name
    crops = [crop * white for crop in materials.crops]
    quantize_static(
        str(ready),
        str(quantized),
        Crops(name, crops),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return restorer_of(open_file(quantized), name, white)


def open_file(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(EXACT_PRODUCTS, "1")
    return onnxruntime.InferenceSession(str(path), options)


def restorer_of(
    session: onnxruntime.InferenceSession, name: str, white: float
) -> Callable[[np.ndarray], np.ndarray]:
    def restore(lq: np.ndarray) -> np.ndarray:
        image = lq.transpose(2, 0, 1)[None].astype(np.float32) * np.float32(white / 255)
        (output,) = session.run(None, {name: image})
        return to_uint8(torch.from_numpy(output[0]) / white)

    return restore


if __name__ == "__main__":
    main()
