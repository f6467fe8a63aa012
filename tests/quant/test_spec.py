import pytest

from sparkir.errors import SparkirError
from sparkir.quant.spec import QuantSpec


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits", "first_last_bits"])
@pytest.mark.parametrize("bits", [-8, 0, 1, 9, 32, 4.5])
def test_bits_that_no_grid_holds_are_refused(field, bits):
    with pytest.raises(SparkirError, match=f"{field} is {bits}; choose a whole number from 2 to 8"):
        QuantSpec(**{field: bits})


@pytest.mark.parametrize("bits", range(2, 9))
def test_label(bits):
    assert QuantSpec(weight_bits=bits, activation_bits=8).label == f"W{bits}A8"


@pytest.mark.parametrize("field", ["activation_grid", "learned", "calibration", "target"])
def test_what_there_is_not_is_refused(field):
    with pytest.raises(SparkirError, match=rf"no {field} 'exact'; known: \w+, \w+"):
        QuantSpec(**{field: "exact"})
