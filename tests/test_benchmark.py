"""Interleaving is fair, and its numbers add up."""

import itertools
from pathlib import Path

import pytest

import halfbyte as hb
from halfbyte.benchmark import between_files, float_file, interleaved
from halfbyte.errors import UsageError
from tiny import quantized


def test_calls_alternate() -> None:
    order: list[int] = []
    times = interleaved([lambda: order.append(0), lambda: order.append(1)], 4)
    assert [len(t) for t in times] == [4, 4]
    assert all(t > 0 for row in times for t in row)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes <= 2 * 4  # the second of one round is the first of the next


def test_ratio_of_two_files(tmp_path: Path) -> None:
    out = quantized(tmp_path)
    m = hb.load(out / "checkpoint")
    float_file(m, tmp_path / "float.onnx")
    result = between_files(m, out / "model.onnx", tmp_path / "float.onnx", rounds=5, batch=3, threads=1)
    assert result.ratio_low <= result.ratio <= result.ratio_high
    assert (result.rounds, result.batch, result.threads) == (5, 3, 1)
    assert "times as fast" in str(result)
    with pytest.raises(UsageError, match="at least 3 rounds"):
        between_files(m, out / "model.onnx", tmp_path / "float.onnx", rounds=2, threads=1)
