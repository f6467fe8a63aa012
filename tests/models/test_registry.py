import sys
import types

import pytest
from torch import nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts
from sparkir.models.registry import available, build
from sparkir.models.rfdn import RFDN

FACTS = {"name": "tiny", "scale": 1, "channels": 3, "value_range": 1.0, "taps": (), "halo_px": 1}


@pytest.fixture
def user_module(monkeypatch):
    """A module of the user's own, importable as ``their_networks``."""
    module = types.ModuleType("their_networks")

    def plain(width=3):
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1))

    def with_facts(facts):
        network = plain()
        network.facts = ModelFacts(**facts | {"name": "own"})
        return network

    module.plain, module.with_facts, module.number = plain, with_facts, 7
    module.not_a_network = lambda: "a string"
    monkeypatch.setitem(sys.modules, "their_networks", module)


def test_every_available_network_can_be_built_and_carries_facts():
    assert set(available()) == {
        *("bsrn", "bsrn-s", "carn-m", "dncnn", "edsr", "edsr-baseline", "fmen", "imdn"),
        *("mirnet", "nafnet", "plainusr", "rfdn", "rlfn", "safmn", "span", "srcnn", "swinir"),
    }
    for name, description in available().items():
        assert isinstance(build(name).facts, ModelFacts)
        assert description
        assert "\n" not in description


def test_options_reach_the_network():
    network = build("rfdn", width=12, blocks=2, scale=2, value_range=1)
    assert isinstance(network, RFDN)
    assert (network.facts.scale, network.facts.value_range) == (2, 1.0)
    assert network.fea_conv.out_channels == 12
    assert network.facts.taps == ("B1", "B2")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rfdnn", {}, "did you mean 'rfdn'"),
        ("RFDN", {}, "did you mean 'rfdn'"),
        ("zzz", {}, "known: bsrn, bsrn-s, carn-m, dncnn, edsr, edsr-baseline, fmen, imdn"),
        ("rfdn", {"depth": 3}, "no option 'depth'; it has: scale, width, blocks, value_range"),
        ("rfdn", {"scale": 0}, "'scale' of network 'rfdn' must be a whole number >= 1, got 0"),
        ("rfdn", {"scale": 2.0}, "must be a whole number"),
        ("rfdn", {"blocks": True}, "must be a whole number"),
        ("rfdn", {"value_range": "255"}, "must be a number, got '255'"),
        ("rfdn", {"value_range": 127.0}, "value_range must be 1.0 or 255.0"),
        ("rlfn", {"value_range": 100.0}, "value_range must be 1.0 or 255.0"),
        ("bsrn", {"width": 3}, "BSRN needs width >= 4"),
        ("bsrn-s", {"width": 3}, "BSRN-S needs width >= 4"),
        ("carn-m", {"scale": 8}, "CARN-M enlarges by 2, 3 or 4, got scale 8"),
        ("carn-m", {"width": 30}, "CARN-M needs a width that is a multiple of 4, got 30"),
        ("imdn", {"width": 30}, "IMDN needs a width that is a multiple of 4, got 30"),
        ("span", {"blocks": 1}, "SPAN needs blocks >= 2"),
        ("nafnet", {"encoder_blocks": 4}, "must be a list of whole numbers >= 1, got 4"),
        (
            "nafnet",
            {"decoder_blocks": [1, 0, 1, 1]},
            "'decoder_blocks' of network 'nafnet' must be",
        ),
        ("nafnet", {"encoder_blocks": [1]}, "as many levels as down, got encoder_blocks"),
        ("swinir", {"heads": 7}, "SwinIR's width must be a multiple of heads, got 60 and 7"),
        ("swinir", {"depths": []}, "'depths' of network 'swinir' must be a list of whole numbers"),
        ("plainusr", {"size": "xl"}, "'size' .* 'plainusr' must be one of u, t, s, m, got 'xl'"),
        ("plainusr", {"size": ["u"]}, "must be one of u, t, s, m"),
        ("rfdn", {"anchored": "no"}, "must be true or false, got 'no'"),
        ("rlfn", {"inner_width": 0}, "must be a whole number >= 1, got 0"),
        ("rlfn", {"inner_width": "48"}, "must be a whole number >= 1, got '48'"),
        ("edsr", {"res_scale": float("nan")}, "must be a number, got nan"),
        ("dncnn", {"channels": 4}, "channels must be 1"),
        ("dncnn", {"depth": 1}, "depth >= 2"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(name, options, message):
    with pytest.raises(SparkirError, match=message) as caught:
        build(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("user_module")
def test_a_users_function_gets_its_options_and_facts():
    network = build("their_networks:plain", width=5, facts=FACTS)
    assert network[0].out_channels == 5
    assert network.facts == ModelFacts(**FACTS)


@pytest.mark.usefixtures("user_module")
def test_an_option_may_be_called_name():
    sys.modules["their_networks"].chosen = lambda name: nn.Conv2d(3, len(name), 3)
    assert build("their_networks:chosen", name="four", facts=FACTS).out_channels == 4


@pytest.mark.usefixtures("user_module")
def test_a_users_function_may_set_the_facts_itself():
    assert build("their_networks:with_facts", facts=FACTS).facts.name == "own"


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("their_networks:plain", {}, "carries no facts.*for example"),
        ("their_networks:plain", {"facts": {"name": "x"}}, "facts of .*missing"),
        ("their_networks:plain", {"facts": FACTS, "depth": 2}, "unexpected.*it takes: width"),
        ("their_networks:not_a_network", {}, "must return an nn.Module, but returned str.*example"),
        ("their_networks:number", {}, "has no function 'number'"),
        ("their_networks:", {}, "not of the form package.module:function"),
        ("no_such_module_here:f", {}, "cannot import 'no_such_module_here'"),
        (":f", {}, "not of the form package.module:function"),
        ("broken_networks:f", {}, "cannot import 'broken_networks' .*invalid syntax.*mend the mo"),
        (
            "their_networks:plain",
            {"width": 3, "facts": FACTS | {"size_multiple": 8.0}},
            "size_multiple must be a whole number",
        ),
        (
            "their_networks:plain",
            {"width": 3, "facts": FACTS | {"taps": "body.3"}},
            "taps must be a list",
        ),
    ],
)
def test_mistakes_with_a_users_function(name, options, message, tmp_path, monkeypatch):
    (tmp_path / "broken_networks.py").write_text("def f(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SparkirError, match=message):
        build(name, **options)
