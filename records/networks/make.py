"""Measures the published networks: as published, as integers without training, and as files.

    python records/networks/make.py DATA PHOTOGRAPHS [NAME ...]

DATA holds weights/ (the authors' checkpoints, under the names below) and test/ (Set5, Set14, B100:
HR/, and LR_bicubic/X2, X3, X4 where the set came with its small images; else they are made by the
older MATLAB's bicubic). PHOTOGRAPHS is a folder of images that are none of those, for calibration.
NAMEs are rows to measure again; all others are kept. Half an hour or more on two cores. None of the
weights and images is part of this repository.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparkir.assemble import quantize_student
from sparkir.data.degrade import bicubic_resize, mod_crop
from sparkir.data.images import read_image
from sparkir.deploy.onnx import to_onnx
from sparkir.deploy.runtime import RuntimeNetwork
from sparkir.deploy.session import Runtime
from sparkir.evaluate.infer import restore_image
from sparkir.evaluate.metrics import Convention, psnr_db
from sparkir.models.checkpoint import load_weights
from sparkir.models.facts import facts_of
from sparkir.models.registry import build
from sparkir.quant.prepare import placement_of, prepare
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec
from sparkir.run import versions

HERE = Path(__file__).parent
SETS = ("Set5", "Set14", "B100")
TARGETS: tuple[Runtime, ...] = ("onnxruntime", "openvino")
"""And the runtimes that execute their files."""
CROPS, CROP_PX, CORNER_PX = 128, 48, 20


@dataclass(frozen=True)
class Published:
    """A checkpoint, and what its paper says of it."""

    model: str
    weights: str
    options: dict[str, Any]
    psnr_db: dict[str, float] = field(default_factory=dict)


def _published(*values: float) -> dict[str, float]:
    return dict(zip(SETS, values, strict=True))


PRINTED = (
    "psnr_db",
    "ptq_w8a8_set5_psnr_db",
    "ptq_w8a8_set5_psnr_db_equalized",
    "set5_values_that_differ_in_the_runtime",
)
NETWORKS = {
    "RFDN (AIM 2020) x4": Published("rfdn", "RFDN/RFDN_AIM.pth", {}),
    "RLFN-S x2": Published(
        "rlfn", "RLFN/rlfn_s_x2.pth", {"width": 48, "scale": 2}, _published(38.05, 33.68, 32.19)
    ),
    "RLFN-S x4": Published(
        "rlfn", "RLFN/rlfn_s_x4.pth", {"width": 48}, _published(32.23, 28.61, 27.58)
    ),
    "RLFN (NTIRE 2022) x4": Published(
        "rlfn", "RLFN/rlfn_ntire_x4.pth", {"width": 46, "inner_width": 48, "blocks": 4}
    ),
    "BSRN x2": Published(
        "bsrn", "BSRN/net_g_BSRN_x2.pth", {"scale": 2}, _published(38.10, 33.74, 32.24)
    ),
    "BSRN x4": Published("bsrn", "BSRN/net_g_BSRN_x4.pth", {}, _published(32.35, 28.73, 27.65)),
    "BSRN-S x4": Published("bsrn-s", "BSRN/net_g_BSRN-S.pth", {}, _published(32.16, 28.62, 27.58)),
    "CARN-M x2": Published(
        "carn-m", "CARN/carn_m.pth", {"scale": 2}, _published(37.53, 33.26, 31.92)
    ),
    "CARN-M x3": Published("carn-m", "CARN/carn_m.pth", {"scale": 3}),
    "CARN-M x4": Published("carn-m", "CARN/carn_m.pth", {}, _published(31.92, 28.42, 27.44)),
    "IMDN (NTIRE 2022) x4": Published("imdn", "IMDN_NTIRE22_baseline/imdn_baseline.pth", {}),
    "FMEN (test weights) x4": Published("fmen", "FMEN/FMEN_x4.pt", {}),
    "SAFMN (NTIRE 2023) x4": Published("safmn", "SAFMN/SAFMN_x4.pth", {}),
    "SPAN (NTIRE 2025) x4": Published("span", "SPAN/SPAN_team46_x4.pth", {"cat_width": 20}),
    "SPAN (NTIRE 2024) x4": Published("span", "SPAN/SPAN_ch28_slim_team38_x4.pth", {}),
    **{
        f"PlainUSR-{size.upper()} x{scale}": Published(
            "plainusr",
            f"PlainUSR/PlainUSR{size.upper()}_Rep_x{scale}.pth",
            {"size": size, "scale": scale},
        )
        for size in "utsm"
        for scale in (2, 4)
    },
}


def main(data: str, photographs: str, *names: str) -> None:
    """Measure row after row, keeping each as it comes."""
    path = HERE / "result.json"
    rows = json.loads(path.read_text())["networks"] if path.exists() else {}
    wanted = names or [name for name in NETWORKS if name not in rows]
    for name in wanted:
        rows[name] = measured(NETWORKS[name], Path(data), Path(photographs))
        kept = {key: rows[key] for key in NETWORKS if key in rows}
        values = {"versions": versions(), "convention": _convention(4).label, "networks": kept}
        path.write_text(json.dumps(values, indent=1) + "\n")
        print(name, *(rows[name][key] for key in PRINTED), flush=True)


def measured(one: Published, data: Path, photographs: Path) -> dict[str, Any]:
    """One checkpoint."""
    network = build(one.model, **one.options).eval()
    load_weights(network, data / "weights" / one.weights)
    crops = calibration_crops(network, photographs)

    set5 = data / "test/Set5"
    as_it_is, equalized = (
        {
            target: freeze(
                quantize_student(network, QuantSpec(target=target, equalize=equalize), crops)
            )
            for target in TARGETS
        }
        for equalize in (False, True)
    )
    return {
        "model": one.model,
        "options": one.options,
        "weights": one.weights,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "published_psnr_db": one.psnr_db,
        "psnr_db": {name: mean_psnr_db(network, data / "test" / name) for name in SETS},
        "ptq_w8a8_set5_psnr_db": {
            target: mean_psnr_db(integer, set5) for target, integer in as_it_is.items()
        },
        "ptq_w8a8_set5_psnr_db_equalized": {
            target: mean_psnr_db(integer, set5) for target, integer in equalized.items()
        },
        "set5_values_that_differ_in_the_runtime": {
            target: differing(integer, target, set5) for target, integer in equalized.items()
        },
        "left_in_float": placement_of(prepare(network, QuantSpec())).left_in_float,
    }


def calibration_crops(network: nn.Module, photographs: Path) -> list[Tensor]:
    """Batches of eight crops in [0, 1], one from each of the first 128 photographs."""
    facts, crops = facts_of(network), []
    for path in sorted(photographs.iterdir())[:CROPS]:
        side = facts.scale * (CORNER_PX + CROP_PX + CORNER_PX)
        small = bicubic_resize(read_image(path)[:side, :side], scale=Fraction(1, facts.scale))
        crop = small[CORNER_PX:][:CROP_PX, CORNER_PX:][:, :CROP_PX]
        crops.append(torch.from_numpy(crop).movedim(-1, 0).float() / 255)
    return list(torch.stack(crops).split(8))


def mean_psnr_db(network: nn.Module, folder: Path) -> float:
    """Over a benchmark set."""
    scale = facts_of(network).scale
    found = [
        psnr_db(restore_image(network, lq), gt, _convention(scale))
        for lq, gt in benchmark(folder, scale)
    ]
    return round(float(np.mean(found)), 3)


def differing(integer: fx.GraphModule, runtime: Runtime, folder: Path) -> float:
    """The share of values that the exported file shows otherwise than the integer network."""
    executed = RuntimeNetwork(to_onnx(integer).SerializeToString(), runtime=runtime)
    differ = [
        (restore_image(integer, lq) != restore_image(executed, lq)).ravel()
        for lq, _ in benchmark(folder, facts_of(integer).scale)
    ]
    return float(np.concatenate(differ).mean())


def benchmark(folder: Path, scale: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Small images and large ones."""
    for path in sorted((folder / "HR").iterdir()):
        gt = mod_crop(read_image(path), scale)
        published = folder / f"LR_bicubic/X{scale}" / f"{path.stem}x{scale}.png"
        if published.exists():
            lq = read_image(published)
        else:
            lq = bicubic_resize(gt, scale=Fraction(1, scale), border="replicate")
        yield lq, gt


def _convention(scale: int) -> Convention:
    return Convention(space="y", crop_px=scale)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
