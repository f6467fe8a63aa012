"""The form that is exported: real values, a quantize-dequantize pair at every grid."""

import torch
from exported import images

from sparkir.deploy.qdq import QdqGrid, QdqLayer, dequantize, grid_calls, qdq, to_qdq
from sparkir.quant.prepare import placement_of
from sparkir.quant.reference import IntegerLayer, IntegerQuantizer


def test_it_computes_the_integer_network_up_to_float_rounding(deployed):
    x = images(deployed.facts, 2, 24, 19)
    view = to_qdq(deployed.frozen)
    with torch.no_grad():
        levels = (view(x) - deployed.frozen(x)) / deployed.facts.value_range * 255
    assert levels.abs().max() < 1.5
    assert (levels.abs() > 0.5).float().mean() < 0.02


def test_every_grid_and_layer_is_there_and_the_integer_network_keeps_its_own(dncnn):
    view = to_qdq(dncnn.frozen)
    for call in grid_calls(dncnn.frozen):
        assert isinstance(view.get_submodule(str(call.target)), QdqGrid)
        assert isinstance(dncnn.frozen.get_submodule(str(call.target)), IntegerQuantizer)
    for name in placement_of(dncnn.frozen).layers:
        assert isinstance(view.get_submodule(name), QdqLayer)
        assert isinstance(dncnn.frozen.get_submodule(name), IntegerLayer)


def test_a_pair_rounds_to_the_grid_and_back():
    x = torch.tensor([-9.0, -0.6, -0.25, 0.0, 0.25, 0.75, 9.0])
    found = qdq(x, torch.tensor(0.5), torch.tensor(3, dtype=torch.uint8), 0, 15)
    assert found.tolist() == [-1.5, -0.5, 0.0, 0.0, 0.0, 1.0, 6.0]


def test_weights_are_dequantized_per_output_channel():
    ints = torch.tensor([[[1, -2]], [[3, 4]]], dtype=torch.int8)
    found = dequantize(ints, torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(found, torch.tensor([[[0.5, -1.0]], [[0.3, 0.4]]]))
    biases = dequantize(torch.tensor([10, 20], dtype=torch.int32), torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(biases, torch.tensor([5.0, 2.0]))


def test_grids_are_in_order_of_execution(edsr):
    order = {node.name: place for place, node in enumerate(edsr.frozen.graph.nodes)}
    calls = [order[call.name] for call in grid_calls(edsr.frozen)]
    assert calls == sorted(calls)
    assert len(calls) > 10
