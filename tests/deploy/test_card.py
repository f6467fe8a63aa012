"""What a card says to people."""

import pytest
from exported import deploy

from sparkir.deploy.card import Card
from sparkir.export import Exported
from sparkir.models.registry import build

FACTS = build("srcnn", scale=2).facts
REDUCED = "[quant]\nreduce_range = true\n"


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"target": "onnxruntime"}, "session.x64quantprecision"),
        ({"target": "portable"}, "session.x64quantprecision"),
        ({"target": ""}, "session.x64quantprecision"),
        ({"target": "openvino"}, "shows another image"),
        ({"target": "openvino", "training": "reduce_range = false"}, "shows another image"),
        ({"target": "openvino", "training": REDUCED}, "keep to 7 bits"),
    ],
    ids=str,
)
def test_it_says_what_a_processor_without_vnni_shows(card, words):
    text = Card(facts=FACTS, quantization="W8A8", **card).to_markdown()
    (line,) = [line for line in text.splitlines() if line.startswith("| x86 without VNNI |")]
    assert words in line


@pytest.mark.parametrize("card", [{"quantization": "float"}, {"target": "tensorrt"}], ids=str)
def test_it_says_nothing_where_that_is_no_matter(card):
    text = Card(facts=FACTS, **{"quantization": "W8A8"} | card).to_markdown()
    assert "VNNI" not in text


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("onnxruntime", "8-bit weights, 8-bit input, int8 kernel"),
        ("openvino", "8-bit weights, 8-bit input, int8 kernel"),
        ("tensorrt", "8-bit weights, 8-bit input"),  # what runs it here is a stand-in
    ],
)
def test_it_says_how_a_layer_is_run_where_that_was_seen(target, words):
    made = deploy("dncnn", 8, target=target)
    card = Card(facts=made.facts, quantization="W8A8", target=target)
    exported = Exported(model=made.model, frozen=made.frozen, parity=made.parity, card=card)
    layers = [how for _, how in exported.layers() if not how.startswith("left in float")]
    assert layers == [words] * len(layers)
    assert layers
