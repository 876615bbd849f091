"""What all tests share."""

import functools

import pytest
from torch.onnx._internal.exporter import _registration

from elsewhere import register

register()


@pytest.fixture(autouse=True, scope="session")
def _one_registry() -> None:
    """The exporter parses its five hundred operators at each call, a third of an export; the tests read them once."""
    original = _registration.ONNXRegistry.from_torchlib
    _registration.ONNXRegistry.from_torchlib = staticmethod(functools.cache(original))  # type: ignore[method-assign]
