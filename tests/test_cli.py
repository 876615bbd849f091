"""The commands from the outside: what they print, leave behind and return."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.descent import Descent
from halfbyte.local import Problem, Solution
from halfbyte.parity import Difference
from tiny import array, files, halfbyte, network, pictures, quantized

EXPORT: Any = importlib.import_module("halfbyte.export_onnx")  # the package's attribute of that name is the function
SIZE = ("--size", 8, "--mean", 127, "--std", 64)


def quantize(folder: Path, net: str, data: object, *options: object) -> tuple[int, str]:
    result = halfbyte("quantize", net, "--calibration", data, "-o", folder / "out", "--threads", 1, *options)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    pictures(folder / "photos")
    code, text = quantize(folder, network(folder), folder / "photos", *SIZE)
    assert code == 0, text
    return folder


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    text = subprocess.run(
        [sys.executable, "-m", "halfbyte", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert time.perf_counter() - start < 1.5
    assert "Exit status: 0 done, 2 bad usage or input, 3 a limit is missed, 4" in text


@pytest.mark.parametrize("command", ["quantize", "evaluate", "inspect", "benchmark", "report", "completion"])
def test_every_command_has_help(command: str) -> None:
    assert halfbyte(command, "--help").exit_code == 0


def test_pictures(done: Path) -> None:
    assert set(files(done / "out")) == {"model.onnx", "proof.npz", "checkpoint", "summary.json", "report.html"}
    described = json.loads((done / "out" / "summary.json").read_text())
    assert described["schema"] == 1
    assert described["preprocess"]["size"] == [8, 8] or described["preprocess"]["size"] == 8


def test_file_tells_nothing_about_where_it_was_made(done: Path) -> None:
    data = (done / "out" / "model.onnx").read_bytes()
    for secret in (str(done), "site-packages", "forward(", 'File "'):
        assert secret.encode() not in data, secret


def test_array_and_callable(tmp_path: Path) -> None:
    quantized(tmp_path, out="first")
    code, text = quantize(tmp_path, network(tmp_path, "pair"), network(tmp_path, "batches"), "--bits", "W4A8", "--json")
    assert code == 0, text
    assert json.loads(text[text.index("{") :])["parity"]


def test_several_inputs(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    a, b = (noise.standard_normal((8, n)).astype(np.float32) for n in (4, 5))
    np.savez(tmp_path / "x.npz", a=a, b=b)
    code, text = quantize(tmp_path, network(tmp_path, "two"), tmp_path / "x.npz", "-q")
    assert (code, text) == (0, "")


def test_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (quantized(tmp_path, out=name) / "model.onnx" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_existing_output(tmp_path: Path) -> None:
    out = quantized(tmp_path)
    (out / "mine.txt").write_text("keep")
    net, data = network(tmp_path, "pair"), tmp_path / "x.npy"
    code, text = quantize(tmp_path, net, data)
    assert code == 2
    assert "--resume" in text
    assert quantize(tmp_path, net, data, "--overwrite", "--seed", 1)[0] == 0
    assert (out / "mine.txt").read_text() == "keep"
    code, text = quantize(tmp_path, net, data, "--resume", "--seed", 2)
    assert code == 2
    assert "different: seed" in text
    assert quantize(tmp_path, net, data, "--resume", "--seed", 1)[0] == 0
    assert quantize(tmp_path, net, data, "--resume", "--overwrite")[0] == 2


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_foreign_folder_is_left_alone(tmp_path: Path, option: str) -> None:
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "thesis.txt").write_text("years")
    code, text = quantize(tmp_path, network(tmp_path, "pair"), array(tmp_path / "x.npy"), option)
    assert code == 2
    assert "holds no earlier result" in text
    assert set(files(tmp_path / "out")) == {"checkpoint", "thesis.txt"}


def test_interrupted_run_is_resumed_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (quantized(tmp_path, out="whole") / "model.onnx").read_bytes()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    net, data = network(tmp_path, "pair"), tmp_path / "x.npy"
    with monkeypatch.context() as patch:
        patch.setattr(EXPORT, "compare", interrupt)
        code, text = quantize(tmp_path, net, data)
    assert code == 130
    assert "--resume" in text
    assert set(files(tmp_path / "out")) == {"checkpoint"}
    assert quantize(tmp_path, net, data, "--resume")[0] == 0
    assert (tmp_path / "out" / "model.onnx").read_bytes() == whole


def test_file_that_is_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, different = EXPORT.compare, Difference("first", 1.0, 2.0, 1)
    monkeypatch.setattr(
        EXPORT, "compare", lambda *a, **k: replace(real(*a, **k), first_difference=different, proven=False)
    )
    code, text = quantize(tmp_path, network(tmp_path, "pair"), array(tmp_path / "x.npy"))
    assert code == 4
    assert "first" in text
    assert {"model.unproven.onnx", "summary.json", "report.html"} <= set(files(tmp_path / "out"))
    assert "model.onnx" not in files(tmp_path / "out")


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "no such network": (("{}/gone.py:build", "{}/x.npy"), "there is no file"),
    "no module": (("no_module_of_this_name:f", "{}/x.npy"), "there is no module"),
    "not a module": (("number", "{}/x.npy"), "returned int"),
    "raises": (("raises", "{}/x.npy"), "ValueError: no weights here (tinynet.py, line"),
    "not exportable": (("branch", "{}/x.npy"), "cannot"),
    "no example": (("build", "{}/photos"), "--size"),
    "nan weight": (("nan", "{}/x.npy"), "first.weight"),
    "no data": (("pair", "{}/gone"), "there is no file or folder"),
    "shape": (("pair", "{}/shape.npy"), "[5, 3, 9, 8]"),
    "nan data": (("pair", "{}/nan.npy"), "NaN"),
    "empty folder": (("build", "{}/empty", *SIZE), "empty"),
    "unreadable": (("build", "{}/unreadable", *SIZE), "0.png"),
    "truncated": (("build", "{}/truncated", *SIZE), "0.png"),
    "W1A8": (("pair", "{}/x.npy", "--bits", "W1A8"), "1"),
    "W8A99": (("pair", "{}/x.npy", "--bits", "W8A99"), "99"),
    "foo": (("pair", "{}/x.npy", "--bits", "foo"), "foo"),
    "zero": (("pair", "{}/x.npy", "--weight-bits", "0"), "0"),
    "target": (("pair", "{}/x.npy", "--target", "onxruntime"), "'onnxruntime'"),
    "weights": (("pair", "{}/x.npy", "--weights", "w.pt"), "--weight-bits"),
    "key": (("build", "{}/photos", "--preprocess", "{}/pre.json"), "sizes"),
    "checkpoint keys": (("pair", "{}/x.npy", "--checkpoint", "{}/keys.pt"), "1 missing, such as 'last.bias'"),
    "pickle": (("pair", "{}/x.npy", "--checkpoint", "{}/pickled.pt"), "--trust"),
    "range": (("pair", "{}/x.npy", "--range", "input=3"), "LOWEST..HIGHEST"),
    "output is file": (("pair", "{}/x.npy", "-o", "{}/x.npy"), "is a file"),
}


class Custom:
    """Something that a safe loader refuses."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    network(folder)
    array(folder / "x.npy")
    array(folder / "nan.npy", float("nan"))
    np.save(folder / "shape.npy", np.zeros((5, 3, 9, 8), np.float32))
    (folder / "empty").mkdir()
    pictures(folder / "photos")
    for name, size in (("unreadable", 0), ("truncated", 150)):
        path = pictures(folder / name, 1) / "0.png"
        path.write_bytes(path.read_bytes()[:size] if size else b"not a picture")
    (folder / "pre.json").write_text('{"sizes": 8}')
    state = {"first.weight": torch.zeros(8, 3, 3, 3), "first.bias": torch.zeros(8), "last.weight": torch.zeros(3, 8)}
    torch.save(state | {"other": torch.zeros(1)}, folder / "keys.pt")
    torch.save({"net": Custom()}, folder / "pickled.pt")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(material: Path, case: str) -> None:
    (net, data, *options), words = BAD[case]
    net = net if ":" in net else network(material, net)
    before = files(material)
    code, text = quantize(
        material, net.format(material), data.format(material), *(str(o).format(material) for o in options)
    )
    assert code == 2, text
    told = [line for line in text.splitlines() if line.startswith("halfbyte: ")]
    assert len(told) == 1, text
    assert words in told[0]
    assert "Traceback" not in text
    assert files(material) == before


def test_without_example_a_network_is_captured_on_samples(tmp_path: Path) -> None:
    array(tmp_path / "x.npy")
    code, text = quantize(tmp_path, network(tmp_path, "build"), tmp_path / "x.npy")
    assert code == 0, text
    assert "proven equal" in text
    again = halfbyte("quantize", network(tmp_path, "build"), "--data-free", "-o", tmp_path / "other")
    assert again.exit_code == 2
    assert "brings no example inputs" in again.output


def test_calibration_is_needed(tmp_path: Path) -> None:
    """A network without batch norm cannot do without data."""
    result = halfbyte("quantize", network(tmp_path, "pair"))
    assert result.exit_code == 2
    assert "--calibration" in result.output
    assert "--range" in result.output


@pytest.mark.parametrize("place", ["os.replace", "halfbyte.store.save_file", "onnx_ir.save"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, full)
    code, text = quantize(tmp_path, network(tmp_path, "pair"), array(tmp_path / "x.npy"))
    assert code == 2
    assert "No space left on device" in text
    assert "model.onnx" not in files(tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".*"))
    assert not list((tmp_path / "out").rglob("*unproven*"))


def test_evaluate(done: Path) -> None:
    data = pictures(done / "labelled", 12, classes=3)
    result = halfbyte("evaluate", done / "out", "--data", data, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["samples"] == 12
    assert {"float", "simulation", "file"} <= set(found)
    assert "top-1" in halfbyte("evaluate", done / "out", "--data", data, "--threads", 1).output
    one = halfbyte("evaluate", done / "out", "--data", data, "--threads", 1, "--limit", 1, "--json")
    assert json.loads(one.stdout)["difference"]["low"] is None


def test_evaluate_by_a_metric(done: Path) -> None:
    data = pictures(done / "labelled", 12, classes=3)
    result = halfbyte(
        "evaluate", done / "out", "--data", data, "--metric", network(done, "mean_output"), "--threads", 1
    )
    assert result.exit_code == 0, result.output
    assert "mean" in result.output
    assert halfbyte("evaluate", done / "out", "--metric", network(done, "alone"), "--threads", 1, "-q").output == ""
    for name, words in (("bad_metric", "nan"), ("failing_metric", "KeyError"), ("mean_output", "--data")):
        result = halfbyte("evaluate", done / "out", "--metric", network(done, name), "--threads", 1)
        assert result.exit_code == 2
        assert words in result.output


def test_evaluate_needs_something(done: Path) -> None:
    assert "--data" in halfbyte("evaluate", done / "out").output
    assert "no summary.json" in halfbyte("evaluate", done, "--data", done).output
    np.savez(done / "wrong.npz", x=np.zeros((2, 3, 9, 9), np.float32)[:, :2], target=np.zeros(2, np.int64))
    result = halfbyte("evaluate", done / "out", "--data", done / "wrong.npz", "--threads", 1)
    assert result.exit_code == 2
    assert "2, 2, 9, 9" in result.output


def test_inspect(done: Path) -> None:
    program = torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.zeros(2, 4),))
    torch.export.save(program, done / "net.pt2")
    things = (network(done, "pair"), done / "net.pt2", done / "out", done / "out" / "model.onnx")
    before = files(done / "out")
    for thing in things:
        assert halfbyte("inspect", thing).exit_code == 0
        assert json.loads(halfbyte("inspect", thing, "--json").stdout)["inputs"]
    assert files(done / "out") == before
    (done / "bad.onnx").write_bytes(b"nothing")
    for thing in ("gone.onnx", done / "bad.onnx", "gone.pt2"):
        assert halfbyte("inspect", thing).exit_code == 2


def test_benchmark_and_report(done: Path) -> None:
    result = halfbyte("benchmark", done / "out", "--rounds", 3, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rounds"] == 3
    (done / "out" / "report.html").unlink()
    assert halfbyte("report", done / "out", "-q").exit_code == 0
    assert (done / "out" / "report.html").exists()
    assert halfbyte("benchmark", done / "out", "--rounds", 1).exit_code == 2
    assert halfbyte("report", done / "nothing").exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    assert "_HALFBYTE_COMPLETE" in halfbyte("completion", shell).output


def four_bits(folder: Path, *options: object, out: str = "out") -> tuple[int, str]:
    """W4A8 of a network of two layers."""
    return quantize(
        folder, network(folder, "pair"), array(folder / "x.npy"), "--bits", "W4A8", "-o", folder / out, *options
    )


def test_the_first_and_the_last_layer_are_announced(tmp_path: Path) -> None:
    code, text = four_bits(tmp_path)
    assert code == 0, text
    assert "W4A8 in every convolution and linear layer; the first and the last keep 8 bits (--uniform" in text
    code, uniform = four_bits(tmp_path, "--uniform", out="uniform")
    assert code == 0, uniform
    assert "the first and the last have them, too" in uniform
    rows = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("out", "uniform")]
    assert [row["configuration"]["recipe"]["name"] for row in rows] == ["low-bit"] * 2
    assert (tmp_path / "out" / "model.onnx").read_bytes() != (tmp_path / "uniform" / "model.onnx").read_bytes()
    code, text = quantize(tmp_path, network(tmp_path, "pair"), tmp_path / "x.npy", "-o", tmp_path / "eight")
    assert code == 0, text
    assert "the first and the last" not in text


UNFIT: dict[str, tuple[tuple[Any, ...], str]] = {
    "time": (("--bits", "W4A8", "--time-limit", "soon"), "--time-limit 'soon' is not a time: write it as 90s, 20m"),
    "no time": (("--bits", "W4A8", "--time-limit", "0m"), "'0m' is not a time"),
    "time backwards": (("--bits", "W4A8", "--time-limit", "-5"), "'-5' is not a time"),
    "endless": (("--bits", "W4A8", "--time-limit", "inf"), "'inf' is not a time"),
    "eight bits": (("--rounding", "adaround"), "recipe 'default' has no step reconstruct, which --rounding is for"),
    "no data": (("--bits", "W4A8", "--recipe", "dfq", "--rounding", "descent"), "recipe 'dfq' has no step reconstruct"),
    "alone": (("--bits", "W4A8", "--recipe", "dfq", "--iterations", "50"), "which --iterations is for"),
    "closed form": (("--bits", "W4A8", "--iterations", "50"), "'descent' takes no iterations"),
    "nearest": (("--bits", "W4A8", "--rounding", "nearest", "--iterations", "50"), "'nearest' takes no iterations"),
    "gone": (("--bits", "W4A8", "--calibration", "gone.npy"), "there is no file or folder"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_options_of_rounding_that_do_not_fit(tmp_path: Path, case: str) -> None:
    options, words = UNFIT[case]
    code, text = quantize(tmp_path, network(tmp_path, "pair"), array(tmp_path / "x.npy"), *options)
    assert code == 2, text
    told = [line for line in text.splitlines() if line.startswith("halfbyte: ")]
    assert len(told) == 1, text
    assert words in told[0]
    assert not (tmp_path / "out").exists()


def test_a_rounding_and_its_iterations_are_noted(tmp_path: Path) -> None:
    code, text = four_bits(tmp_path, "--rounding", "adaround", "--iterations", 20, "--time-limit", "1m")
    assert code == 0, text
    described = json.loads((tmp_path / "out" / "summary.json").read_text())
    (step,) = [s for s in described["configuration"]["recipe"]["steps"] if s["step"] == "reconstruct"]
    assert (step["method"], step["iterations"]) == ("adaround", 20)
    assert described["configuration"]["time_limit"] == 60.0


def test_solved_layers_are_resumed_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = four_bits(tmp_path, "--uniform", out="whole")
    assert code == 0, text
    whole, solved = (tmp_path / "whole" / "model.onnx").read_bytes(), []
    solve = Descent.solve

    def interrupted(self: Descent, p: Problem) -> Solution:
        if solved:
            raise KeyboardInterrupt
        solved.append(p.layer.name)
        return solve(self, p)

    with monkeypatch.context() as patch:
        patch.setattr(Descent, "solve", interrupted)
        code, text = four_bits(tmp_path, "--uniform")
    assert code == 130
    assert "--resume" in text
    out = tmp_path / "out"
    assert set(files(out)) == {"checkpoint"}
    assert len(files(out / "checkpoint" / "layers")) == 1
    code, text = four_bits(tmp_path, "--resume")
    assert code == 2
    assert "different: uniform" in text
    again: list[str] = []
    monkeypatch.setattr(Descent, "solve", lambda self, p: again.append(p.layer.name) or solve(self, p))
    code, text = four_bits(tmp_path, "--uniform", "--resume")
    assert code == 0, text
    assert len(again) == 1
    assert again != solved
    assert (out / "model.onnx").read_bytes() == whole
    assert not (out / "checkpoint" / "layers").exists()
