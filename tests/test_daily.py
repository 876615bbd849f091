"""The commands of daily use on one small result: limits, comparison, proof elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import halfbyte as hb
from halfbyte.check import check, parse_size
from halfbyte.compare import compare
from halfbyte.errors import UsageError
from halfbyte.job import open_output
from tiny import files, halfbyte, quantized


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``out`` (W8A8), ``few`` (W2A2 in every layer), and noise with labels that the float network gives."""
    folder = tmp_path_factory.mktemp("daily")
    out = quantized(folder)
    quantized(folder, "--bits", "W2A2", "--uniform", "--rounding", "nearest", out="few")
    noise = np.random.default_rng(5)
    x = (noise.standard_normal((256, 3, 1, 1)) + noise.standard_normal((256, 3, 8, 8))).astype(np.float32)
    (y,) = hb.predict(open_output(out)[0].as_float(), (torch.from_numpy(x),))
    np.savez(folder / "labelled.npz", x=x, target=y.argmax(1).numpy())
    np.save(folder / "unlabelled.npy", x)
    return folder


def disagreement(out: Path, x: np.ndarray) -> float:
    """Points of decisions that the file and the float network take differently, counted without Halfbyte's own counting."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x})
    (expected,) = hb.predict(open_output(out)[0].as_float(), (torch.from_numpy(x),))
    return float((got.argmax(1) != expected.argmax(1).numpy()).mean() * 100)


@pytest.mark.parametrize("way", ["data", "unlabelled"])
def test_drop_is_what_was_counted(done: Path, way: str) -> None:
    source = done / ("labelled.npz" if way == "data" else "unlabelled.npy")
    lost = disagreement(done / "few", np.load(done / "unlabelled.npy"))
    assert lost > 0  # or the test says nothing
    for most, held in ((lost + 0.1, True), (lost - 0.1, False)):
        (limit,) = check(done / "few", max_drop=most, **{way: source}).limits
        assert limit.measured == pytest.approx(lost)
        assert limit.held is held


def test_check_in_a_pipeline(done: Path) -> None:
    size, before = (done / "out" / "model.onnx").stat().st_size, files(done / "out")
    good = ("check", done / "out", "--max-size", size, "--max-drop", 100, "--unlabelled", done / "unlabelled.npy")
    result = halfbyte(*good, "--min-speedup", 0.0001, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()] == ["held"] * 4
    result = halfbyte("check", done / "out", "--max-size", size - 1)
    assert result.exit_code == 3
    assert "1 of 1 limits missed" in result.output
    assert f"{size:,} bytes" in result.output
    told = json.loads(halfbyte("check", done / "out", "--max-size", size - 1, "--json").stdout)
    assert (told["held"], told["limits"][0]["measured"]) == (False, size)
    result = halfbyte("check", done / "out", "--min-speedup", 1e6, "--threads", 1, "-q")
    assert result.exit_code == 3
    assert files(done / "out") == before


def test_check_uses_what_was_measured_before(done: Path) -> None:
    out = shutil.copytree(done / "few", done / "evaluated")
    assert halfbyte("evaluate", out, "--data", done / "labelled.npz", "-q").exit_code == 0
    assert halfbyte("benchmark", out, "--rounds", 3, "--threads", 1, "-q").exit_code == 0
    stored = json.loads((out / "summary.json").read_text())
    drop, speed = check(out, max_drop=1, min_speedup=1).limits
    assert drop.measured == pytest.approx(-stored["evaluation"]["difference"]["points"])
    assert speed.measured == stored["benchmark"]["ratio"]


def test_check_refuses_what_it_cannot_know(done: Path) -> None:
    cases = {
        "there is no limit": (),
        "the drop is not known": ("--max-drop", 1),
        "not a size": ("--max-size", "big"),
        "were both given": ("--max-drop", 1, "--data", done / "labelled.npz", "--unlabelled", done / "unlabelled.npy"),
    }
    for words, options in cases.items():
        result = halfbyte("check", done / "out", *options)
        assert result.exit_code == 2
        assert words in result.output
    out = shutil.copytree(done / "out", done / "no file")
    (out / "model.onnx").unlink()
    assert halfbyte("check", out, "--max-size", "1MB").exit_code == 4


def test_sizes() -> None:
    assert [parse_size(s) for s in ("5MB", "4.5 MiB", "10kb", "7", 7)] == [5_000_000, 4_718_592, 10_000, 7, 7]
    for bad in ("", "-5MB", "5 m", "MB"):
        with pytest.raises(UsageError, match="not a size"):
            parse_size(bad)


def test_compare_is_paired_on_the_same_samples(done: Path) -> None:
    x = np.load(done / "unlabelled.npy")
    found = compare([done / "out", done / "few"], unlabelled=done / "unlabelled.npy")
    first, second = found.results
    lost = [disagreement(done / name, x) for name in ("out", "few")]
    assert [first.score, second.score] == pytest.approx([1 - p / 100 for p in lost])
    assert second.difference is not None and second.against_first is not None and first.against_first is None
    assert second.difference.points == pytest.approx(-lost[1])
    assert second.against_first.points == pytest.approx(lost[0] - lost[1])
    labelled = compare([done / "out", done / "few"], data=done / "labelled.npz")
    assert [r.score for r in labelled.results] == [first.score, second.score]  # these labels are the float network's
    assert {c.name: c.formats for c in found.layers} == dict.fromkeys(("first", "last"), ("W8A8", "W2A2"))
    assert all(a is not None and b is not None and a > b for a, b in (c.noise for c in found.layers))


def test_compare_as_page_and_data(done: Path) -> None:
    evil = shutil.copytree(done / "few", done / "<b>few")
    page = done / "page.html"
    result = halfbyte(
        "compare", done / "out", evil, "--benchmark", "--rounds", 3, "--threads", 1, "--html", page, "--json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [r["bits"] for r in told["results"]] == ["W8A8", "W2A2"]
    assert all(r["proven"] and r["milliseconds"] > 0 for r in told["results"])
    assert "--data" in told["notes"][0]
    text = page.read_text()
    assert "&lt;b&gt;few" in text
    assert "<b>" not in text
    text = halfbyte("compare", done / "out", evil).output
    assert "2 layers differ" in text
    assert "W2A2" in text


def test_compare_refuses(done: Path, tmp_path: Path) -> None:
    for words, folders in {"at least two": ["out"], "twice": ["out", "out"], "no summary": ["out", "gone"]}.items():
        result = halfbyte("compare", *(done / f for f in folders))
        assert result.exit_code == 2
        assert words in result.output
