"""Networks that take a fixed number of samples at a time: everything works as it does for others, a batch after another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.errors import DataError
from halfbyte.recipe import load_recipe
from halfbyte.run import fixed_batch, portions

SAMPLES = 48


class Fixed(nn.Module):
    """``len`` makes a constant of the batch size, as in many published networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.depthwise(torch.relu(self.norm(self.stem(x)))))
        y = y + self.point(y)
        return self.head(nn.functional.adaptive_avg_pool2d(y, 3).reshape(len(x), 72))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Fixed().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SAMPLES, 3, 6, 6, generator=torch.Generator().manual_seed(1))


WAYS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A4": {"weight_bits": 4, "activation_bits": 4},
    "adaround": {"weight_bits": 4, "rounding": "adaround", "iterations": 5},
    "calibtip": {"weight_bits": 4, "recipe": load_recipe("calibtip-advanced").changed("tune", iterations=3)},
    "omse": {"weight_bits": 4, "recipe": load_recipe("omse").changed("tune", iterations=3)},
    "widths": {"weight_bits": (2, 4, 8), "budget": "size=60%"},
}


@pytest.mark.parametrize(
    ("way", "count"), [("W8A8", 1), ("W8A8", 32), ("W4A4", 1), ("W4A4", 32), *((way, 3) for way in WAYS)]
)
def test_every_recipe_quantizes_and_is_proven(way: str, count: int, x: Tensor, tmp_path: Path) -> None:
    m = hb.capture(net(), (x[:count],))
    assert not m.dynamic and fixed_batch(m) == count
    q = hb.quantize(m, x, samples=SAMPLES, **WAYS[way])
    parity = hb.export_onnx(q, tmp_path / "net.onnx")
    assert parity.proven and parity.samples % count == 0 and parity.samples >= min(15, count)


def test_the_network_itself_needs_no_batch_size_from_the_user(x: Tensor, tmp_path: Path) -> None:
    loader = [x[i : i + 16] for i in range(0, SAMPLES, 16)]
    for data in (x, loader):
        q = hb.quantize(net(), data, weight_bits=4)
        assert hb.export_onnx(q, tmp_path / "net.onnx").proven
    m = hb.capture(net(), (x[:5],))  # which does not divide these batches
    assert hb.export_onnx(hb.quantize(m, loader, **WAYS["omse"]), tmp_path / "own.onnx").proven
    (one,) = hb.predict(q, (x[:7],))
    (other,) = hb.predict(q, (x[:8],))
    assert one.shape == (7, 10) and torch.equal(one, other[:7])
    found = hb.evaluate(q, [(x[:7], torch.zeros(7, dtype=torch.int64))], file=tmp_path / "net.onnx")
    assert found.samples == 7 and found.agreement["file_simulation"] == 1
    assert hb.export_onnx(q, tmp_path / "again.onnx", samples=(x[:7],)).proven


def test_search_and_front(x: Tensor) -> None:
    m = hb.capture(net(), (x[:3],))
    assert hb.search(m, x, max_drop=50.0, samples=24).reached
    assert len(hb.tradeoff(m, x, weight_bits=(2, 8), samples=SAMPLES).points) >= 2


def test_an_output_folder_is_described_diagnosed_and_proven_anew(x: Tensor, tmp_path: Path) -> None:
    q = hb.quantize(hb.capture(net(), (x[:3],)), x, samples=SAMPLES)
    hb.export(q, tmp_path / "out")
    assert hb.prove(tmp_path / "out").equal
    for data in (None, [x[:20]], [((x[:20],), torch.zeros(20, dtype=torch.int64))]):
        assert hb.diagnose(q, data, file=tmp_path / "out" / "model.onnx", repairs=False).steps


def test_what_cannot_be_is_one_sentence(x: Tensor) -> None:
    m = hb.capture(net(), (x[:32],))
    with pytest.raises(DataError, match="has 7 samples, and the network takes 32 at a time: give at least that many"):
        hb.quantize(m, x[:7])
    with pytest.raises(
        hb.UsageError, match=r"takes 32 samples at a time, and blocks .*: free its batch size, or choose"
    ):
        hb.quantize(m, x, weight_bits=4, rounding="blocks", iterations=2)
    with pytest.raises(DataError, match=r"has shape \[32, 3, 5, 5\] but the network takes \[batch, 3, 6, 6\]"):
        hb.quantize(m, torch.zeros(48, 3, 5, 5))


def test_portions_are_whole(x: Tensor) -> None:
    m = hb.capture(net(), (x[:5],))
    assert [len(t) for (t,) in portions(m, [(x[:12],), (x[:4],), (x[:5],)])] == [5, 5, 5]
