"""The automatic recipe: it stops at what is enough, escalates where it is not, and says how sure it is."""

import json
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.data import Samples
from halfbyte.errors import DataError, UsageError
from halfbyte.model import QModel
from halfbyte.search import _split, least_samples, search, upper_bound
from halfbyte.targets import ONNXRUNTIME_AVX2
from tiny import array, halfbyte, network
from trained import pixels, prepared, trained


@pytest.fixture(scope="module")
def model() -> QModel:
    return hb.capture(trained("plain"), torch.zeros(2, 3, 16, 16))


def data(count: int, seed: int = 3) -> torch.Tensor:
    return prepared(pixels(count, seed)[0])


def test_plain_eight_bits_is_enough(model: QModel) -> None:
    found = search(model, data(640), max_drop=2.0, target=ONNXRUNTIME_AVX2, samples=128)
    assert found.reached
    assert [a.name for a in found.attempts] == ["plain 8 bits"]
    assert found.verdict.startswith("plain 8 bits is enough")
    assert not found.labelled
    assert found.samples == 200
    x, _ = pixels(600, 9)
    (got,), (wanted,) = (hb.predict(m, (prepared(x),)) for m in (found.model, found.model.as_float()))
    assert float((got.argmax(1) != wanted.argmax(1)).float().mean()) <= 0.02
    assert found.model.log[-1].figures["reached"]
    assert "plain 8 bits" in repr(found) and "<table>" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["chosen"] == "plain 8 bits"


def test_escalates_and_keeps_the_best(model: QModel) -> None:
    x, y = pixels(400, 8)
    validation = [((prepared(x),), y)]
    found = search(
        model, data(96), max_drop=1e-3, validation=validation, weight_bits=2, target=ONNXRUNTIME_AVX2, samples=96
    )
    assert not found.reached
    assert found.labelled
    names = [a.name for a in found.attempts]
    assert names[:3] == ["plain 2 bits", "2 bits, equalized and corrected", "2 bits, weights by descent"]
    assert any("layers with 8-bit weights" in n for n in names)
    assert "not reached" in found.verdict and "train" in found.verdict
    assert found.chosen.points == min(a.points for a in found.attempts)
    assert len([e for e in found.model.log if e.stage == "search"]) == len(names) + 1


def test_upper_bound_respects_the_sample_size() -> None:
    few, many = torch.zeros(50), torch.zeros(5000)
    assert upper_bound(few, 1) > upper_bound(many, 1)
    assert upper_bound(many, 5) >= upper_bound(many, 1)
    some = torch.zeros(1000)
    some[:10] = 100.0
    assert 1.0 < upper_bound(some, 1) < 1.5
    n = least_samples(0.5)
    assert upper_bound(torch.zeros(n), 1) <= 0.5 < upper_bound(torch.zeros(n - 1), 1)
    mixed = some.clone()
    mixed[10:30] = -100.0
    assert -1.0 < upper_bound(mixed, 1) < 0.0


def test_bound_covers_as_often_as_it_says() -> None:
    """Of many draws with one decision in a hundred changed, the bound lies below the truth about as rarely as claimed."""
    g = torch.Generator().manual_seed(0)
    missed = sum(upper_bound(100 * (torch.rand(400, generator=g) < 0.01).double(), 1) < 1.0 for _ in range(600))
    assert missed / 600 < 0.16 + 0.03


def test_held_out_samples_are_not_fitted_to() -> None:
    x = torch.arange(100.0).view(-1, 1)
    fit, out = _split(Samples("numbers", 100, lambda: iter([(x[:64],), (x[64:],)])), 60, 40)
    seen = [torch.cat([b[0] for b in part]).flatten().tolist() for part in (fit, out)]
    assert sorted(seen[0] + seen[1]) == x.flatten().tolist()
    assert len(seen[1]) == 40
    assert max(b - a for a, b in zip(seen[1], seen[1][1:], strict=False)) <= 3


def test_what_makes_no_sense(model: QModel) -> None:
    with pytest.raises(UsageError, match="max_drop"):
        search(model, data(8), max_drop=0)
    with pytest.raises(DataError, match="no samples"):
        search(model, data(8), max_drop=1, validation=[])
    pictures = hb.capture(torch.nn.Conv2d(3, 4, 3).eval(), torch.zeros(2, 3, 16, 16))
    with pytest.raises(UsageError, match="class scores"):
        search(pictures, data(8), max_drop=1)


def test_command(tmp_path: Path) -> None:
    net, x = network(tmp_path, "pair"), array(tmp_path / "x.npy")
    common = ("quantize", net, "--calibration", x, "--threads", 1)
    result = halfbyte(*common, "-o", tmp_path / "out", "--max-drop", 60)
    assert result.exit_code == 0, result.output
    assert "plain 8 bits is enough" in result.output
    assert "plain 8 bits is enough" in (tmp_path / "out" / "report.html").read_text()
    result = halfbyte(*common, "-o", tmp_path / "strict", "--max-drop", 0.01)
    assert result.exit_code == 3, result.output
    assert "not reached" in result.output and "samples at least" in result.output
    assert (tmp_path / "strict" / "model.onnx").exists()
    for wrong, words in (
        (("--max-drop", 1, "--recipe", "dfq"), "leave --recipe out"),
        (("--validation", x), "--max-drop, which was not given"),
    ):
        result = halfbyte(*common, "-o", tmp_path / "wrong", *wrong)
        assert result.exit_code == 2
        assert words in result.output
    assert halfbyte("quantize", net, "--data-free", "--max-drop", 1).exit_code == 2
