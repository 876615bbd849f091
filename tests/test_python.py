"""The same in Python as on the command line: a function for each command, with its options by the same names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.overrides import parse_overrides
from tiny import array, halfbyte, network, quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``out``, and samples with the labels that the float network gives."""
    place = tmp_path_factory.mktemp("python")
    quantized(place)
    noise = np.random.default_rng(5)
    x = (noise.standard_normal((256, 3, 1, 1)) + noise.standard_normal((256, 3, 8, 8))).astype(np.float32)
    (y,) = hb.predict(hb.load(place / "out" / "checkpoint").as_float(), (torch.from_numpy(x),))
    np.savez(place / "labelled.npz", x=x, target=y.argmax(1).numpy())
    np.save(place / "more.npy", x)
    return place


def grids(m: hb.QModel) -> dict[str, list[float]]:
    return {name: g.scale.flatten().tolist() for name, g in m.grids.items()}


def test_quantize_is_the_command(folder: Path, tmp_path: Path) -> None:
    """Whatever form the network and the widths have."""
    out = quantized(
        tmp_path, "--bits", "W4A8", "--set", "last=W4A8", "--weight-range", "min-max", "--rounding", "nearest"
    )
    expected = grids(hb.load(out / "checkpoint"))
    data, net = array(tmp_path / "x.npy"), network(tmp_path, "pair")
    options = {"sets": ["last=W4A8"], "rounding": "nearest"}
    assert grids(hb.quantize(net, data, bits="W4A8", weight_range="min-max", **options)) == expected
    overrides = parse_overrides((), ("last=W4A8",))
    captured = hb.capture(nn.Module.eval(_module(net)), torch.zeros(1, 3, 8, 8))
    m = hb.quantize(
        captured, np.load(data), weight_bits=4, weight_range=hb.MinMax(), overrides=overrides, rounding="nearest"
    )
    assert grids(m) == expected
    assert grids(hb.quantize(_module(net), data, bits=hb.bits(4, 8), weight_range="min-max", **options)) == expected
    again = grids(hb.quantize(out, bits="W4A8", weight_range="min-max", **options))
    assert again == grids(hb.load(halfbyte_again(out, tmp_path) / "checkpoint"))


def halfbyte_again(out: Path, folder: Path) -> Path:
    """The command on an earlier result; what was folded and equalized before stays so."""
    options = ("--bits", "W4A8", "--set", "last=W4A8", "--weight-range", "min-max", "--rounding", "nearest")
    assert halfbyte("quantize", out, "-o", folder / "again", "-q", "--threads", 1, *options).exit_code == 0
    return folder / "again"


def _module(net: str) -> nn.Module:
    from halfbyte.loading import load_callable

    module: nn.Module = load_callable(net)()[0]
    return module.eval()


def test_limit_on_the_drop(folder: Path, tmp_path: Path) -> None:
    """``max_drop`` searches as the command does, to the same model and the same verdict."""
    options = ("--max-drop", 3, "--samples", 64, "--threads", 1)
    net = network(folder, "pair")
    result = halfbyte("quantize", net, "--calibration", folder / "more.npy", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    by_command = hb.load(tmp_path / "out" / "checkpoint")
    m = hb.quantize(net, folder / "more.npy", max_drop=3, samples=64)
    assert grids(m) == grids(by_command)
    verdict = m.log[-1].message
    assert verdict in result.output
    assert f"verdict: {verdict}" in str(m)
    judged = hb.quantize(net, folder / "more.npy", max_drop=3, samples=64, validation=folder / "labelled.npz")
    assert "points lost on 256 held-out samples" in judged.log[-1].message
    # the data are in the provenance: those that it was fitted to and those held out, read once
    digests = [e.figures["calibration"] for e in m.log if "calibration" in e.figures]
    stored = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(digests) == 1 and digests[0] in [e["figures"].get("calibration") for e in stored["log"]]


def test_quantize_refuses(folder: Path) -> None:
    net, data = network(folder, "pair"), folder / "x.npy"
    module = _module(net)
    for words, arguments in {
        "use one form": {"bits": "W4A8", "weight_bits": 4},
        "contradict": {"data_free": True},
        "--validation is for --max-drop": {"validation": data},
        "leave --rounding out": {"max_drop": 1, "rounding": "descent"},
        "is not a time": {"time_limit": "soon", "rounding": "descent", "recipe": "low-bit"},
    }.items():
        with pytest.raises(UsageError, match=words):
            hb.quantize(net, data, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs --calibration"):
        hb.quantize(net, max_drop=1)
    for source in (None, iter([torch.zeros(2, 3, 8, 8)])):
        with pytest.raises(UsageError, match=r"capture it first with hb\.capture"):
            hb.quantize(module, source)
