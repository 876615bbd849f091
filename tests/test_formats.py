"""Number formats: their limits, their names, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import FormatError
from halfbyte.formats import Format, container_bits, parse_bits


@given(bits=st.integers(2, 16), signed=st.booleans(), narrow=st.booleans())
def test_limits_have_the_width(bits: int, signed: bool, narrow: bool) -> None:
    form = Format(bits, signed=signed, narrow=narrow)
    assert form.hi - form.lo + 1 == 2**bits - (1 if signed and narrow else 0)
    assert form.lo <= 0 <= form.hi
    assert (form.lo < 0) is signed
    if signed and narrow:
        assert form.lo == -form.hi


@given(bits=st.integers(-5, 40).filter(lambda b: not 2 <= b <= 16))
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match=f"{bits} bits are not supported"):
        Format(bits)


@pytest.mark.parametrize("arguments", [{"group": 4}, {"group": 4, "axis": 1}, {"group": 0, "axis": 0}])
def test_impossible_groups_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(FormatError, match="group"):
        Format(4, **arguments)


def test_words_for_a_format() -> None:
    assert str(Format(8)) == "uint8 asymmetric per tensor"
    assert str(Format(4, signed=True, symmetric=True, axis=0)) == "int4 symmetric per channel"
    assert str(Format(4, signed=True, symmetric=True, axis=0, group=32)) == "int4 symmetric per group of 32"
    assert str(Format(6, symmetric=True, power_of_two=True)) == "uint6 symmetric power-of-two per tensor"


@given(weights=st.integers(2, 16), activations=st.integers(2, 16))
def test_pairs_of_widths(weights: int, activations: int) -> None:
    assert parse_bits(f"W{weights}A{activations}") == (weights, activations)
    assert parse_bits(f" w{weights}a{activations}") == (weights, activations)


@pytest.mark.parametrize("text", ["", "8", "W8", "A8W8", "W8A8x", "W8 A8", "W1A8", "W8A17", "W-8A8"])
def test_other_pairs_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_bits(text)


def test_containers() -> None:
    assert [container_bits(b) for b in (2, 4, 8, 9, 16)] == [8, 8, 8, 16, 16]
