"""Published weights load whole and show their published figures."""

import numpy as np
import pytest

from sparkir.evaluate.infer import restore_image
from sparkir.evaluate.metrics import Convention, psnr_db
from sparkir.models.checkpoint import load_weights
from sparkir.models.registry import build

pytestmark = pytest.mark.data

PUBLISHED = [
    # The papers' tables.
    ("rlfn", {"width": 48, "scale": 2}, "RLFN/rlfn_s_x2.pth", "Set5", 38.05),
    ("rlfn", {"width": 48}, "RLFN/rlfn_s_x4.pth", "Set5", 32.23),
    ("rlfn", {"width": 48}, "RLFN/rlfn_s_x4.pth", "Set14", 28.61),
    ("bsrn", {"scale": 2}, "BSRN/net_g_BSRN_x2.pth", "Set5", 38.10),
    ("bsrn", {}, "BSRN/net_g_BSRN_x4.pth", "Set5", 32.35),
    ("bsrn", {}, "BSRN/net_g_BSRN_x4.pth", "Set14", 28.73),
    ("bsrn-s", {}, "BSRN/net_g_BSRN-S.pth", "Set5", 32.16),
]
MEASURED = [
    # No table has these weights. Those of CARN-M are newer than its paper: 37.53 and 31.92 there.
    ("carn-m", {"scale": 2}, "CARN/carn_m.pth", "Set5", 37.68),
    ("carn-m", {"scale": 3}, "CARN/carn_m.pth", "Set5", 34.06),
    ("carn-m", {"scale": 4}, "CARN/carn_m.pth", "Set5", 31.88),
    (
        "rlfn",
        {"width": 46, "inner_width": 48, "blocks": 4},
        "RLFN/rlfn_ntire_x4.pth",
        "Set5",
        32.10,
    ),
    ("imdn", {}, "IMDN_NTIRE22_baseline/imdn_baseline.pth", "Set5", 32.25),
    ("fmen", {}, "FMEN/FMEN_x4.pt", "Set5", 32.12),
    ("safmn", {}, "SAFMN/SAFMN_x4.pth", "Set5", 32.15),
    ("span", {"cat_width": 20}, "SPAN/SPAN_team46_x4.pth", "Set5", 31.74),
    ("span", {}, "SPAN/SPAN_ch28_slim_team38_x4.pth", "Set5", 31.74),
    *(
        (
            "plainusr",
            {"size": size, "scale": scale},
            f"PlainUSR/PlainUSR{size.upper()}_Rep_x{scale}.pth",
            "Set5",
            figure,
        )
        for size, scale, figure in (
            ("u", 2, 37.10),
            ("u", 4, 30.77),
            ("t", 2, 37.46),
            ("t", 4, 31.20),
            ("s", 2, 37.64),
            ("s", 4, 31.56),
            ("m", 2, 37.79),
            ("m", 4, 31.79),
        )
    ),
]
QUICK = (PUBLISHED[0], PUBLISHED[4], MEASURED[0])


@pytest.mark.parametrize(
    ("model", "options", "weights", "name", "reference_db"),
    [
        *(
            case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
            for case in (*PUBLISHED, *MEASURED)
        )
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_weights_have_their_psnr(
    development_data, benchmark_set, model, options, weights, name, reference_db
):
    network = build(model, **options).eval()
    load_weights(network, development_data / "weights" / weights)
    scale = network.facts.scale
    pairs, convention = benchmark_set(name, scale), Convention(space="y", crop_px=scale)
    figures = [
        psnr_db(restore_image(network, lq), gt, convention)
        for lq, gt in map(pairs.pair, range(len(pairs)))
    ]
    assert np.mean(figures) == pytest.approx(reference_db, abs=0.02)
