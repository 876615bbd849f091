"""Options from files: a TOML file or an exported model repeat a job, the command line wins, what is unknown is named."""

import hashlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import halfbyte as hb
from halfbyte.cli import main
from halfbyte.cli_config import key_of
from halfbyte.pipeline import load_samples
from halfbyte.provenance import Hashed, note_weights
from tiny import array, halfbyte, quantized


def printed(*options: object) -> dict[str, object]:
    """What ``--print-config`` says, read back."""
    result = halfbyte("quantize", *options, "--print-config")
    assert result.exit_code == 0, result.output
    return tomllib.loads(result.stdout)


def config(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def test_printed_configuration_is_complete_and_reads_back(tmp_path: Path) -> None:
    odd = 'a "b"\\\n\x7fü😀.npy'
    first = halfbyte(
        "quantize", "net.py:f", "--calibration", odd, "--bits", "W4A8", "--keep-float", "a", "--keep-float", "b=c",
        "--set", "s.*=W8A8", "--time-limit", "20m", "--uniform", "--size", "8x9", "--mean", "1,2,3", "--threads", 2,
        "--print-config",
    )  # fmt: skip
    assert first.exit_code == 0, first.output
    values = tomllib.loads(first.stdout)
    assert values["calibration"] == odd
    assert (values["keep-float"], values["set"], values["uniform"]) == (["a", "b=c"], ["s.*=W8A8"], True)
    path = tmp_path / "job.toml"
    path.write_text(first.stdout, encoding="utf-8")
    assert halfbyte("quantize", "--config", path, "--print-config").stdout == first.stdout
    every = {key_of(p) for p in main.commands["quantize"].params}
    told = {line.lstrip("# ").split(" =")[0] for line in first.stdout.splitlines() if " =" in line}
    assert every - told == {"config", "print-config", "json", "quiet", "resume", "overwrite", "dry-run", "weights"}


def test_the_command_line_wins(tmp_path: Path) -> None:
    text = 'network = "net.py:f"\nbits = "W4A8"\ncalibration = "x.npy"\nsamples = 7\nkeep_float = ["a"]\n'
    path = config(tmp_path, text + "mean = [1, 2.5, 3]\nsize = [4, 5]\n")
    values = printed("--config", path)
    assert (values["network"], values["samples"], values["mean"], values["size"]) == ("net.py:f", 7, "1,2.5,3", "4x5")
    assert printed("other.py:g", "--config", path, "--samples", 9, "--keep-float", "b") == {
        **values,
        "network": "other.py:g",
        "samples": 9,
        "keep-float": ["b"],
    }
    narrower = printed("--config", path, "--weight-bits", 3)
    assert narrower["weight-bits"] == "3"
    assert "bits" not in narrower  # it says the same thing in another form
    free = printed("--config", path, "--data-free")
    assert free["data-free"] is True
    assert "calibration" not in free


BAD = {
    "unknown": ("sampels = 3", "unknown key 'sampels'; did you mean 'samples'?"),
    "type": ('samples = "many"', "samples"),
    "flag": ("uniform = 1", "not true or false"),
    "no flag": ("bits = true", "not a number or a text"),
    "table": ("[bits]\nx = 1", "not a number or a text"),
    "twice": ("keep_float = []\nkeep-float = []", "given twice"),
    "no toml": ("bits W8A8", "not valid TOML"),
    "nested": ('config = "a.toml"', "unknown key 'config'"),
    "choice": ('rounding = "nearst"', "nearst"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(tmp_path: Path, case: str) -> None:
    text, words = BAD[case]
    result = halfbyte("quantize", "net.py:f", "--config", config(tmp_path, text))
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("gone.toml", "gone.onnx"):
        assert halfbyte("quantize", "net.py:f", "--config", tmp_path / name).exit_code == 2
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "foreign.onnx"))
    assert "holds no configuration" in halfbyte("quantize", "net.py:f", "--config", tmp_path / "foreign.onnx").output


def test_a_model_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = quantized(tmp_path, "--bits", "W4A8", "--set", "first=W5A8", "--samples", 6, "--time-limit", "90s")
    before = (out / "model.onnx").read_bytes()
    monkeypatch.chdir(tmp_path)  # the file remembers names, not folders
    result = halfbyte("quantize", "--config", out / "model.onnx", "-o", "again", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again" / "model.onnx").read_bytes() == before
    assert "first.weight: 5 bits, as 'first' asks" in result.output


def test_provenance_is_in_the_file(tmp_path: Path) -> None:
    out = quantized(tmp_path)
    stored = json.loads(halfbyte("inspect", out / "model.onnx", "--json").stdout)["metadata"]
    told = {k.removeprefix("halfbyte."): v for k, v in stored.items()}
    described = json.loads((out / "summary.json").read_text())
    assert told["version"] == hb.__version__
    assert told["target"] == described["target"]
    assert json.loads(told["recipe"]) == described["configuration"]["recipe"]
    proof = json.loads(told["proof"])
    assert {k: proof[k] for k in ("samples", "integer_values", "integer_elements")} == {
        k: described["parity"][k] for k in ("samples", "integer_values", "integer_elements")
    }
    x = np.load(array(tmp_path / "x.npy"))
    data = hashlib.sha256(f"torch.float32 {list(x.shape)};".encode() + x.tobytes()).hexdigest()
    assert told["calibration.sha256"] == data
    assert len(told["weights.sha256"]) == 64
    text = halfbyte("inspect", out / "model.onnx").output
    assert f"halfbyte.weights.sha256: {told['weights.sha256']}" in text
    assert onnx.load(str(out / "model.onnx")).metadata_props[-1].key == "halfbyte.proof"


def test_digest_of_weights_changes_with_one_weight() -> None:
    net = torch.nn.Linear(3, 2)
    m = hb.capture(net.eval(), (torch.zeros(2, 3),))
    first = note_weights(m).log[-1].figures["weights"]
    assert note_weights(m).log[-1].figures["weights"] == first
    name = next(iter(m.params))
    changed = {**m.params, name: m.params[name] + torch.finfo(torch.float32).eps}
    assert note_weights(replace(m, params=changed)).log[-1].figures["weights"] != first


def test_samples_are_hashed_only_when_all_were_read(tmp_path: Path) -> None:
    m = hb.capture(torch.nn.Conv2d(3, 2, 1).eval(), (torch.zeros(2, 3, 8, 8),))
    watched = Hashed(load_samples(m, str(array(tmp_path / "x.npy")), batch=3))
    source = watched.samples()
    next(iter(source))
    assert watched.digest is None
    assert sum(len(b[0]) for b in source) == 8
    digest = watched.digest
    assert digest is not None
    list(source)
    assert watched.digest == digest
