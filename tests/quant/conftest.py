import pytest

from sparkir.quant import fused


@pytest.fixture
def uncompiled(monkeypatch):
    """The kernels themselves, without waiting for the compiler."""
    monkeypatch.setattr(fused, "_compiled", lambda kernel: kernel)
