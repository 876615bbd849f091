"""Earlier results used again: written in another form, and quantized again without the network's code and file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.ops import REQUANTIZE
from halfbyte.output import open_output
from halfbyte.place import unplaced
from halfbyte.reexport import differences
from halfbyte.targets import GENERIC, ONNXRUNTIME, ONNXRUNTIME_AVX2
from tiny import files, halfbyte, network, pictures, quantized

RESULT = {"model.onnx", "proof.npz", "checkpoint", "summary.json", "report.html"}
EXACT = "onnxruntime-avx2"  # proven on every CPU


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a W4A8 result for a target with narrow products, made from eight samples."""
    folder = tmp_path_factory.mktemp("again")
    quantized(folder, "--bits", "W4A8", "--uniform", "--target", EXACT)
    return folder


def outputs(out: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


def weight_types(out: Path) -> set[int]:
    return {t.data_type for t in onnx.load(out / "model.onnx").graph.initializer}


def test_another_container_holds_the_same_integers(done: Path) -> None:
    out, new = done / "out", done / "int8"
    result = halfbyte("export", out, "--container", "int8", "-o", new, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "proven equal" in result.output
    assert set(files(new)) == RESULT
    assert onnx.TensorProto.INT4 in weight_types(out)
    assert onnx.TensorProto.INT4 not in weight_types(new)
    x = np.random.default_rng(1).standard_normal((16, 3, 8, 8)).astype(np.float32)
    assert np.array_equal(outputs(out, x), outputs(new, x))
    assert json.loads((new / "summary.json").read_text())["configuration"]["container"] == "int8"
    assert halfbyte("prove", new).exit_code == 0
    back = done / "packed"  # a result like any other: it can be written again, and gives the first file's graph
    assert halfbyte("export", new, "--container", "packed", "-o", back, "-q").exit_code == 0
    assert onnx.load(back / "model.onnx").graph == onnx.load(out / "model.onnx").graph


def test_a_target_that_runs_the_same(done: Path) -> None:
    new = done / "vnni"
    result = halfbyte("export", done / "out", "--target", "onnxruntime-vnni", "-o", new, "--json", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["target"] == "onnxruntime-vnni"
    assert open_output(new)[0].target == ONNXRUNTIME
    assert onnx.load(new / "model.onnx").graph == onnx.load(done / "out" / "model.onnx").graph


def test_a_target_that_runs_something_else(done: Path) -> None:
    result = halfbyte("export", done / "out", "--target", "onnxruntime-per-tensor-avx2", "-o", done / "no")
    assert result.exit_code == 2
    assert "a weight scale for each channel" in result.output
    assert "quantize again" in result.output
    assert not (done / "no").exists()


def test_what_makes_a_target_differ() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    m = hb.place(hb.capture(net, torch.zeros(2, 3, 8, 8)), ONNXRUNTIME)
    assert differences(m, ONNXRUNTIME) == []
    (kernel, floats) = differences(m, GENERIC), differences(replace(m, target=GENERIC), m.target)
    assert kernel == floats
    assert "generic runs conv transpose in integers" in kernel[0]
    assert "saturates" in differences(m, ONNXRUNTIME_AVX2)[0]
    assert "no 8 bits" in differences(m, replace(ONNXRUNTIME, widths=(2, 4)))[0]
    assert "signed" in differences(m, replace(ONNXRUNTIME, signed_activations=True))[0]
    assert "32 bits, not 16" in differences(m, replace(ONNXRUNTIME, bias_bits=16))[0]


def test_nothing_is_overwritten_unasked(done: Path) -> None:
    out = done / "out"
    before = files(out)
    for command in ("export", "quantize"):
        result = halfbyte(command, out, "-o", out, "--overwrite")
        assert result.exit_code == 2
        assert "the result that this starts from" in result.output
    (done / "other").mkdir()
    (done / "other" / "mine.txt").write_text("mine")
    assert halfbyte("export", out, "-o", done / "other").exit_code == 2
    assert halfbyte("export", out, "-o", done / "other", "--overwrite").exit_code == 2
    assert halfbyte("export", done / "other", "-o", done / "no").exit_code == 2
    assert set(files(done / "other")) == {"mine.txt"}
    assert files(out) == before


class Sums(nn.Module):
    """A value that a float operation, an addition and layers of fewer bits read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.a(x))
        z = y + self.b(y)
        return self.d(torch.relu(self.c(z))), torch.sigmoid(x).mean() * torch.sin(z)


def test_copies_for_kernels_are_gone() -> None:
    torch.manual_seed(0)
    m = hb.capture(Sums(), torch.zeros(2, 3, 8, 8))
    placed = hb.place(m, GENERIC, weight_bits=4, activation_bits=4, uniform=False)
    assert sum(n.target is REQUANTIZE for n in placed.graph.nodes) >= 2  # or the test says nothing
    back = unplaced(placed)
    assert [(n.target, n.meta.get("value")) for n in back.graph.nodes] == [
        (n.target, n.meta.get("value")) for n in m.graph.nodes
    ]
    again = hb.place(back, GENERIC, weight_bits=4, activation_bits=4, uniform=False)
    assert again.plan == placed.plan
    x = torch.randn(4, 3, 8, 8)
    for got, expected in zip(hb.run(back, (x,)), hb.run(m, (x,)), strict=True):
        assert torch.equal(got, expected)


def test_quantized_again_without_its_code(tmp_path: Path) -> None:
    out = quantized(tmp_path, "--samples", 6, "--seed", 3)
    (tmp_path / "tinynet.py").unlink()
    result = halfbyte("quantize", out, "--bits", "W4A8", "-o", tmp_path / "out2", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert set(files(tmp_path / "out2")) == RESULT
    (first, _, _, before), (second, _, _, after) = open_output(out), open_output(tmp_path / "out2")
    assert after["bits"] == "W4A8"
    assert {k: after["configuration"][k] for k in ("calibration", "samples", "seed")} == {
        "calibration": str(tmp_path / "x.npy"),
        "samples": 6,
        "seed": 3,
    }
    x = torch.from_numpy(np.load(tmp_path / "x.npy"))
    (expected,), (got,) = hb.predict(first.as_float(), (x,)), hb.predict(second.as_float(), (x,))
    assert torch.allclose(got, expected, atol=1e-5)
    stages = {"provenance", "place"}  # one entry for each fact: nothing of the first run is told twice
    digests = [[e.message for e in m.log if e.stage == "provenance"] for m in (first, second)]
    assert digests[0] == digests[1]
    told = [e.message for e in second.log if e.stage in stages and e.value is None]
    assert len(told) == len(set(told))
    assert len(before["layers"]) == len(after["layers"])


def test_earlier_pictures_are_used_unless_others_are_given(tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos")
    first = tmp_path / "out"
    size = ("--size", 8, "--mean", 127, "--std", 64)
    common = ("-q", "--threads", 1)
    given = halfbyte("quantize", network(tmp_path), "--calibration", photos, "-o", first, *size, *common)
    assert given.exit_code == 0, given.output
    shutil.copytree(photos, tmp_path / "others")
    for name, options, data, std in (
        ("same", (), "photos", 64),
        ("others", ("--calibration", tmp_path / "others", *size[:-1], 32), "others", 32),
    ):
        result = halfbyte("quantize", first, "-o", tmp_path / f"out-{name}", *options, *common)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / f"out-{name}" / "summary.json").read_text())
        assert Path(found["configuration"]["calibration"]).name == data
        assert found["preprocess"]["std"] == std
    plan = halfbyte("quantize", first, "--dry-run", *common[1:])
    assert plan.exit_code == 0, plan.output
    assert "first" in plan.output


@pytest.mark.parametrize(
    ("options", "words"), [(("--checkpoint", "w.pt"), "leave out --checkpoint"), (("--data-free",), "--calibration")]
)
def test_what_a_result_cannot_do(done: Path, options: tuple[str, ...], words: str) -> None:
    result = halfbyte("quantize", done / "out", "-o", done / "no", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert not (done / "no").exists()


def test_layers_that_were_split_are_not_split_again(done: Path) -> None:
    steps = {"fold_batchnorm": "", "place": "", "calibrate": "", "split_tensor": "share = 1.0"}
    lines = [f'[[steps]]\nstep = "{name}"\n{options}\n' for name, options in steps.items()]
    (done / "split.toml").write_text('name = "split"\ndescription = "x"\nversion = 1\n' + "".join(lines))
    options = ("--bits", "W4A8", "--uniform", "--target", EXACT, "--recipe", done / "split.toml")
    split = quantized(done, *options, out="split")
    names = [n.meta.get("value", "") for n in open_output(split)[0].graph.nodes]
    assert any(":second" in n for n in names)  # or the test says nothing
    result = halfbyte("quantize", split, "-o", done / "no")
    assert result.exit_code == 2
    assert "quantize the network itself" in result.output


def test_a_folder_that_is_no_result(tmp_path: Path) -> None:
    result = halfbyte("quantize", pictures(tmp_path / "photos"), "--data-free", "-o", tmp_path / "no")
    assert result.exit_code == 2
    assert "holds no finished result" in result.output
