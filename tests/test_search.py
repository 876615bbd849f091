"""The automatic recipe: it stops at what is enough, escalates where it is not, and says how sure it is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.data import Samples
from halfbyte.errors import DataError, UsageError
from halfbyte.model import QModel
from halfbyte.search import _split, search
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


def test_escalates_to_what_holds(model: QModel) -> None:
    found = search(
        model, data(640), max_drop=1.5, weight_bits=2, activation_bits=4, target=ONNXRUNTIME_AVX2, samples=128
    )
    names = [a.name for a in found.attempts]
    assert names[:3] == ["plain 2 bits", "2 bits, equalized and corrected", "2 bits, weights by descent"]
    assert names[-1].endswith("layers at 8 bits"), "wider layers are the last resort"
    assert found.reached and found.chosen == found.attempts[-1]
    assert found.verdict.startswith(f"reached with {names[-1]}")
    worst = [e.value for e in found.model.log if e.stage == "override"]
    assert worst and all(found.model.plan[str(v)].bits == 8 for v in worst)  # type: ignore[union-attr]
    assert len([e for e in found.model.log if e.stage == "search"]) == len(names) + 1
    x, _ = pixels(3000, 9)
    (got,), (wanted,) = (hb.predict(m, (prepared(x),)) for m in (found.model, found.model.as_float()))
    assert float((got.argmax(1) != wanted.argmax(1)).float().mean()) <= 0.01


def test_says_what_cannot_be_reached(model: QModel) -> None:
    """Ways that cannot help are left out, and the best is kept."""
    found = search(model, data(640), max_drop=0.1, target=ONNXRUNTIME_AVX2, samples=128)
    assert not found.reached
    assert found.chosen.points == min(a.points for a in found.attempts)
    assert any("layers in float: that would still cost" in text for text in found.left_out)
    assert not any("in float" in a.name for a in found.attempts)
    assert found.verdict.startswith("not reached") and "train" in found.verdict
    assert all(text in str(found) for text in found.left_out)
    noisy = search(model, data(640), max_drop=0.2, activation_bits=8, target=ONNXRUNTIME_AVX2, samples=128,
                   ranges={"relu": (0.0, 900.0)})  # fmt: skip
    assert any("the running values alone" in text for text in noisy.left_out)
    assert not any("descent" in a.name for a in noisy.attempts)


def test_labels_judge_where_there_are_any(model: QModel) -> None:
    x, y = pixels(400, 8)
    options = {"weight_bits": 2, "target": ONNXRUNTIME_AVX2, "samples": 96}
    found = search(model, data(96), max_drop=2, validation=[((prepared(x),), y)], **options)
    assert found.labelled and found.reached
    (got,), (wanted,) = (hb.predict(m, (prepared(x),)) for m in (found.model, found.model.as_float()))
    lost = float((wanted.argmax(1) == y).float().mean() - (got.argmax(1) == y).float().mean())
    assert found.chosen.points == pytest.approx(100 * lost, abs=1)


def test_too_few_samples_to_show_anything(model: QModel) -> None:
    """The search ends at what looks good enough, and says how many samples would be needed."""
    found = search(model, data(128), max_drop=1, target=ONNXRUNTIME_AVX2, samples=64)
    assert found.samples == 64
    assert [a.name for a in found.attempts] == ["plain 8 bits"]
    assert not found.reached
    assert "not shown, and perhaps held" in found.verdict and "99 samples at least" in found.verdict


def test_samples_that_are_too_easy_show_nothing(model: QModel) -> None:
    """A network is as sure as this only of what it was trained on, where fewer decisions change than elsewhere; labels tell."""
    sharp = replace(model, params={**model.params, "last.weight": 50 * model.params["last.weight"]})
    found = search(sharp, data(640), max_drop=2.0, target=ONNXRUNTIME_AVX2, samples=128)
    assert found.sure > 0.99
    assert len(found.attempts) == 1 and found.chosen.bound <= 2.0 and not found.reached
    assert "probably trained on them" in found.verdict and "--validation" in found.verdict
    x, y = pixels(400, 8)
    judged = search(
        sharp, data(128), max_drop=2.0, validation=[((prepared(x),), y)], target=ONNXRUNTIME_AVX2, samples=128
    )
    assert judged.reached


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
    assert "not shown, and perhaps held" in result.output and "samples at least" in result.output
    assert (tmp_path / "strict" / "model.onnx").exists()
    for wrong, words in (
        (("--max-drop", 1, "--recipe", "dfq"), "leave --recipe out"),
        (("--validation", x), "--max-drop, which was not given"),
    ):
        result = halfbyte(*common, "-o", tmp_path / "wrong", *wrong)
        assert result.exit_code == 2
        assert words in result.output
    assert halfbyte("quantize", net, "--data-free", "--max-drop", 1).exit_code == 2
