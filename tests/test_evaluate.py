"""Scores, paired differences and signal-to-noise against numbers worked out by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import DataError, UsageError
from halfbyte.evaluate import evaluate, paired, signal_to_noise


def model(classes: int = 3) -> hb.QModel:
    torch.manual_seed(0)
    net = nn.Linear(4, classes).eval()
    return hb.quantize(hb.capture(net, torch.zeros(2, 4)), [torch.randn(16, 4)])


def test_paired() -> None:
    d = paired(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert d.points == pytest.approx(-25)
    assert d.high - d.points == pytest.approx(1.96 * 95.743 / 2, rel=1e-3)
    assert math.isinf(paired(torch.ones(1), torch.ones(1)).high)


def test_classification() -> None:
    m, x = model(), torch.randn(20, 4)
    (logits,) = hb.predict(m.as_float(), (x,))
    result = evaluate(m, [((x[:10],), logits[:10].argmax(1)), ((x[10:],), logits[10:].argmax(1))])
    assert result.samples == 20
    assert result.scores["top-1"]["float"] == 1.0
    assert result.agreement["simulation_float"] == result.scores["top-1"]["simulation"]
    assert "top-5" not in result.scores
    assert "top-5" in evaluate(model(10), [((x,), torch.zeros(20, dtype=torch.long))]).scores


def test_what_cannot_be_evaluated() -> None:
    with pytest.raises(UsageError, match="nothing to evaluate on"):
        evaluate(model(), None)
    with pytest.raises(DataError, match="no batches"):
        evaluate(model(), [])
    with pytest.raises(DataError, match="shape"):
        evaluate(model(), [((torch.zeros(2, 5),), torch.zeros(2, dtype=torch.long))])


def test_signal_to_noise() -> None:
    m = model()
    found = signal_to_noise(m, (torch.randn(8, 4),))
    assert set(found) >= {"input", "weight"}
    assert all(v > 25 for v in found.values())
    assert all(math.isinf(v) for v in signal_to_noise(m.as_float(), (torch.randn(8, 4),)).values())


def test_targets_of_any_kind_from_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(144, 5)).eval()\n"
        "def pictures():\n"
        "    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))\n"
        "def maps(): return [(pictures(), build()(pictures()).detach())]\n"
        "def classes(): return [(pictures(), build()(pictures()).argmax(1))]\n"
        "def error(forward, data):\n"
        "    return sum(float((forward(*x) - y).square().mean()) for x, y in data)\n"
        "def right(forward, data):\n"
        "    return sum(float((forward(*x).argmax(1) == y).float().mean()) for x, y in data)\n"
    )
    mine = f"{tmp_path / 'mine.py'}"
    m = hb.quantize(f"{mine}:build", f"{mine}:pictures")
    assert hb.evaluate(m, f"{mine}:maps", metric=f"{mine}:error").scores["error"]["float"] < 1e-9
    assert hb.evaluate(m, f"{mine}:classes", metric=f"{mine}:right").scores["right"]["float"] == 1.0
