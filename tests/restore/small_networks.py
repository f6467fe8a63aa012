"""Small networks, in torch and exported, each made once."""

import warnings
from functools import cache

import onnx
import torch
from torch import nn

from sparkir.deploy.card import Card
from sparkir.deploy.onnx import to_onnx
from sparkir.models.facts import ModelFacts, facts_of
from sparkir.models.registry import build
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec

NETWORKS: dict[str, dict[str, object]] = {
    "srcnn": {"scale": 2},
    "srcnn luma": {"scale": 2, "channels": 1},
    "dncnn": {"depth": 5, "width": 8, "channels": 3},
    "dncnn luma": {"depth": 5, "width": 8},
    "edsr": {"width": 8, "blocks": 2, "scale": 4},
    "rfdn": {"width": 8, "blocks": 1, "scale": 2, "anchored": True},
}


@cache
def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(name.split()[0], **NETWORKS[name]).eval()


@cache
def integer_model(name: str) -> onnx.ModelProto:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        facts = facts_of(network(name))
        student = prepare(network(name), QuantSpec())
        calibrate(student, [torch.rand(2, facts.channels, 32, 24) * facts.value_range])
        return to_onnx(freeze(student))


@cache
def float_model(name: str) -> onnx.ModelProto:
    facts = facts_of(network(name))
    size = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            network(name),
            (torch.zeros(2, facts.channels, 24, 32),),
            dynamo=True,
            dynamic_shapes=({0: size, 2: size, 3: size},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    card = Card(facts=facts, quantization="float")
    onnx.helper.set_model_props(model, card.to_metadata())
    return model


def facts(**changes: object) -> ModelFacts:
    values = {"name": "x", "scale": 1, "channels": 3, "value_range": 1.0, "taps": (), "halo_px": 0}
    return ModelFacts(**values | changes)
