"""Fixed batches, names of one's own, raw pixels: the file has them and still computes what was simulated."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
import tiny
from halfbyte import engine
from halfbyte.benchmark import between_files, float_file
from halfbyte.evaluate import forwards
from halfbyte.ports import pixel_grid
from halfbyte.prove import read
from halfbyte.recipe import load_recipe

ENGINES = ["onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


class Net(nn.Module):
    """Padding, whose zeros are the mean pixel; a reshape that names the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(torch.relu(self.first(x)), 2)
        return self.last(y.reshape(y.shape[0], -1))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def quantized(target: str = "onnxruntime", **options: object) -> hb.QModel:
    return hb.quantize(
        hb.capture(Net().eval(), torch.randn(2, 3, 8, 8)), [torch.randn(8, 3, 8, 8)], target=target, **options
    )


def shapes(path: Path) -> list[list[int | str]]:
    graph = onnx.load(str(path)).graph
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]


@pytest.mark.parametrize("batch", [1, 3, None])
def test_linear_layers_of_tokens_stay_integers_in_a_static_file(tmp_path: Path, batch: int | None) -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 16))
    p = hb.export_onnx(hb.quantize(net, [torch.randn(8, 10, 16)]), tmp_path / "net.onnx", static_batch=batch)
    assert p.proven
    assert p.kernels == {"MatMulIntegerToFloat": 3}


class Windows(nn.Module):
    """Rows of the first layer are windows of pictures, several of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.reshape(-1, 4, 6))
        return self.last(x).reshape(-1, 12, 3)


@pytest.mark.parametrize("batch", [1, 3, None])
def test_windows_of_any_batch_are_proven(tmp_path: Path, batch: int | None) -> None:
    m = hb.quantize(Windows(), [torch.randn(8, 12, 6)])
    assert any("3*batch" in n.meta.get("shape", ()) for n in m.graph.nodes)
    assert hb.export_onnx(m, tmp_path / "net.onnx", static_batch=batch).proven
    x = torch.randn(5, 12, 6)
    (simulated,) = hb.predict(m, (x,))
    (got,) = engine.infer(engine.session(tmp_path / "net.onnx"), (x,))
    assert got.shape == (5, 12, 3)
    assert torch.allclose(torch.from_numpy(got), simulated, atol=0.1)


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_static_batch_is_in_the_file_and_proven(tmp_path: Path, target: str, batch: int) -> None:
    m, path = quantized(target), tmp_path / "net.onnx"
    x = torch.randn(5, 3, 8, 8)  # no multiple of 3
    p = hb.export_onnx(m, path, samples=(x,), static_batch=batch)
    assert p.proven and p.samples == 5
    assert shapes(path) == [[batch, 3, 8, 8], [batch, 4]]
    free = hb.export_onnx(m, tmp_path / "free.onnx", samples=(x,))
    assert shapes(tmp_path / "free.onnx")[0][0] == "batch"
    compared = -(-5 // batch) * batch  # samples again, where they do not fill the last batch
    assert p.integer_elements * 5 == free.integer_elements * compared
    assert torch.equal(forwards(m, path)["file"](x), forwards(m, tmp_path / "free.onnx")["file"](x))


def test_a_benchmark_takes_the_batch_of_the_file(tmp_path: Path) -> None:
    m = quantized()
    hb.export_onnx(m, tmp_path / "net.onnx", static_batch=3)
    float_file(m, tmp_path / "float.onnx")
    assert between_files(m, tmp_path / "net.onnx", tmp_path / "float.onnx", rounds=3, threads=1).batch == 3


def test_names_are_the_file_s(tmp_path: Path) -> None:
    m, path = quantized(), tmp_path / "net.onnx"
    assert hb.export_onnx(m, path, input_names=["image:0"], output_names=["scores/1"]).proven
    s = ort.InferenceSession(str(path))
    assert [i.name for i in s.get_inputs()] == ["image:0"] and [o.name for o in s.get_outputs()] == ["scores/1"]
    assert m.outputs == hb.capture(Net(), torch.randn(2, 3, 8, 8)).outputs  # the model keeps its own


def test_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    m, path = quantized(), tmp_path / "net.onnx"
    with pytest.raises(hb.UsageError, match=r"1 inputs \(x\), 2 names"):
        hb.export_onnx(m, path, input_names=["a", "b"])
    with pytest.raises(hb.UsageError, match="'y' is given twice"):
        hb.export_onnx(m, path, input_names=["y"], output_names=["y"])
    with pytest.raises(hb.UsageError, match="called 'x:codes' already"):
        hb.export_onnx(m, path, input_names=["x:codes"])
    with pytest.raises(hb.UsageError, match="at least 1"):
        hb.export_onnx(m, path, static_batch=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (127, 128), (128, 127.5), (0, 255), (255, 3.7)])
def test_codes_of_the_pixel_grid_are_the_pixels(mean: float, std: float) -> None:
    grid = pixel_grid(hb.Preprocess(mean=mean, std=std))
    pixels = torch.arange(256, dtype=torch.float32)
    x = (pixels - mean) / std  # as Preprocess computes it
    assert torch.equal(hb.quantize_tensor(x, grid), pixels)
    assert torch.allclose(hb.dequantize(pixels, grid), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("mean", "std", "why"),
    [
        (127.5, 127.5, "127.5 is not a whole number"),
        ((1, 2, 3), 1, "mean differs"),
        (5, (1, 2, 3), "std differs"),
        (300, 1, "0 to 255"),
    ],
)
def test_other_means_are_no_grid(mean: float | tuple[float, ...], std: float | tuple[float, ...], why: str) -> None:
    with pytest.raises(hb.UsageError, match=why):
        pixel_grid(hb.Preprocess(mean=mean, std=std))


@pytest.mark.parametrize("target", ENGINES)
def test_a_file_that_takes_pixels_computes_the_same(tmp_path: Path, target: str) -> None:
    preprocess = hb.Preprocess(size=8, mean=127, std=128)
    pixels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    x = (pixels.float() - 127) / 128
    model = hb.capture(Net().eval(), x[:2])
    m = hb.quantize(model, [x], target=target, preprocess=preprocess, input_type="uint8")
    p = hb.export_onnx(m, tmp_path / "bytes.onnx", input_type="uint8")
    hb.export_onnx(m, tmp_path / "floats.onnx")
    assert p.proven
    graph = onnx.load(str(tmp_path / "bytes.onnx")).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert "x" not in [i for n in graph.node if n.op_type == "QuantizeLinear" for i in n.input]
    run = {n: ort.InferenceSession(str(tmp_path / f"{n}.onnx")).run for n in ("bytes", "floats")}
    assert np.array_equal(run["bytes"](None, {"x": pixels.numpy()})[0], run["floats"](None, {"x": x.numpy()})[0])
    assert torch.equal(
        forwards(m, tmp_path / "bytes.onnx")["file"](x), forwards(m, tmp_path / "floats.onnx")["file"](x)
    )


def test_pixels_need_to_be_described() -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(hb.UsageError, match="what becomes of a pixel"):
        hb.quantize(hb.capture(Net().eval(), x[:2]), [x], input_type="uint8")


def test_a_folder_of_a_file_that_takes_pixels(tmp_path: Path) -> None:
    preprocess = hb.Preprocess(size=8, mean=127, std=128)
    x = (torch.randint(0, 256, (8, 3, 8, 8)).float() - 127) / 128
    m = hb.quantize(hb.capture(Net().eval(), x[:2]), [x], preprocess=preprocess, input_type="uint8")
    hb.export(m, tmp_path / "out", input_type="uint8", preprocess=preprocess)
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert hb.evaluate(tmp_path / "out", [((x,), torch.zeros(8, dtype=torch.int64))])
    assert hb.prove(tmp_path / "out").equal


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_the_proof_of_a_file_with_a_fixed_batch_can_be_repeated(tmp_path: Path, batch: int) -> None:
    """Also where the file takes more samples at once than were kept for the proof."""
    hb.export(quantized(), tmp_path / "out", static_batch=batch, input_names=["image"], output_names=["scores"])
    assert hb.prove(tmp_path / "out").equal
    stored, arrays = read(tmp_path / "out" / "proof.npz")
    assert len(arrays["input0"]) == batch * stored["samples"]
    arrays["input0"] = arrays["input0"] + 1
    np.savez(tmp_path / "out" / "proof.npz", description=np.frombuffer(json.dumps(stored).encode(), np.uint8), **arrays)
    assert not hb.prove(tmp_path / "out").equal


def test_a_folder_of_a_model_in_memory_tells_its_recipe(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    m = hb.quantize(hb.capture(Net().eval(), x[:2]), [x], bits="W4A8")
    told = hb.export(m, tmp_path / "out").summary["configuration"]["recipe"]
    assert told["name"] == "low-bit" and told == load_recipe("low-bit").to_dict()


def test_an_input_in_float_takes_no_pixels(tmp_path: Path) -> None:
    m = quantized(overrides={"first": None})
    with pytest.raises(hb.UsageError, match="held in float"):
        hb.export_onnx(m, tmp_path / "net.onnx", input_type="uint8")


def test_the_command_line_writes_such_a_file(tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "pictures", classes=2)
    options = (
        "--size 8 --mean 127 --std 128 --input uint8 --static-batch 2 --input-names image --output-names scores".split()
    )
    result = tiny.halfbyte(
        "quantize", tiny.network(tmp_path), "--calibration", folder, "-o", tmp_path / "out", *options
    )
    assert result.exit_code == 0, result.output
    assert shapes(tmp_path / "out" / "model.onnx") == [[2, 3, 8, 8], [2, 3]]
    scored = tiny.halfbyte("evaluate", tmp_path / "out", "--data", folder)
    assert scored.exit_code == 0 and "decide alike on 100.00%" in scored.output, scored.output
    assert tiny.halfbyte("benchmark", tmp_path / "out", "--rounds", 3).exit_code == 0
    proved = tiny.halfbyte("prove", tmp_path / "out")
    assert proved.exit_code == 0 and "equal" in proved.output


@pytest.mark.parametrize(
    ("options", "why"),
    [("--size 8 --mean 127.5 --std 127.5", "not a whole number"), ("", "give --size, --mean and --std")],
)
def test_pixels_that_are_no_grid_are_refused_before_the_work(tmp_path: Path, options: str, why: str) -> None:
    data = tiny.array(tmp_path / "x.npy")
    result = tiny.halfbyte(
        "quantize",
        tiny.network(tmp_path, "pair"),
        "--calibration",
        data,
        "-o",
        tmp_path / "out",
        "--input",
        "uint8",
        *options.split(),
    )
    assert result.exit_code == 2 and why in result.output
    assert not (tmp_path / "out").exists()


class SequenceFirst(nn.Module):
    """Samples lie along the second dimension inside, as in nn.TransformerEncoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.transpose(0, 1))
        return self.last(torch.relu(y)).transpose(0, 1)


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("batch", [1, 3, None])
def test_samples_along_another_dimension_are_proven(tmp_path: Path, target: str, batch: int | None) -> None:
    m = hb.quantize(SequenceFirst(), [torch.randn(8, 5, 6)], target=target)
    assert hb.export_onnx(m, tmp_path / "net.onnx", static_batch=batch).proven
