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


def test_a_file_alone_says_how_its_numbers_are_laid_out():
    luma = build("srcnn", scale=2, channels=1).facts
    said = Card(facts=luma, quantization="W8A8").to_metadata()["layout"]
    assert said.startswith("float32 (N, 1, H, W), luma of studio range; black 0, white 1; ")
    rgb = Card(facts=build("edsr", scale=2).facts, quantization="W8A8").to_metadata()["layout"]
    assert rgb.startswith("float32 (N, 3, H, W), RGB; black 0, white 255; ")
    assert rgb.endswith("clip it, then round")


def test_what_a_user_writes_does_not_break_the_table():
    card = Card(facts=FACTS, quantization="W8A8", licence="CC BY | 4.0\nsecond line")
    assert "| licence of the training images | CC BY \\| 4.0 second line |" in card.to_markdown()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("onnxruntime", "weights, 8-bit input, int8 kernel"),
        ("openvino", "weights, 8-bit input, int8 kernel"),
        ("tensorrt", "weights, 8-bit input"),  # what runs it here is a stand-in
    ],
)
def test_it_says_how_a_layer_is_run_where_that_was_seen(target, words):
    made = deploy("dncnn", 8, target=target)
    card = Card(facts=made.facts, quantization="W8A8", target=target)
    exported = Exported(model=made.model, frozen=made.frozen, parity=made.parity, card=card)
    layers = [how for _, how in exported.layers() if not how.startswith("left in float")]
    bits = 7 if made.frozen.placement.spec.reduce_range else 8
    assert layers == [f"{bits}-bit {words}"] * len(layers)
    assert layers
