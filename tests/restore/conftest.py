from collections.abc import Callable
from pathlib import Path

import pytest
from small_networks import facts, float_model, integer_model, network

from sparkir.restore.network import Restorer, open_exported
from sparkir.tools import Opened, restorer_of


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The path of a network, by name and kind (`integer` or `float`), as an exported file."""
    folder = tmp_path_factory.mktemp("models")

    def write(name: str, kind: str = "integer") -> Path:
        path = folder / f"{name} {kind}.onnx"
        if not path.exists():
            model = integer_model(name) if kind == "integer" else float_model(name)
            path.write_bytes(model.SerializeToString())
        return path

    return write


@pytest.fixture
def restorer(model_file) -> Callable[[str, str], Restorer]:
    """A network by name and kind: `torch`, `integer` or `float`."""

    def make(name: str, kind: str) -> Restorer:
        if kind == "torch":
            return restorer_of(Opened(network=network(name), label=name))
        return open_exported(model_file(name, kind))

    return make


@pytest.fixture
def identity() -> Restorer:
    """A network that does nothing."""
    return Restorer(facts=facts(), run=lambda lq: lq, label="identity", identity="0")
